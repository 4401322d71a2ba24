"""`lorafold add`: adapters into a library that is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import click

from . import _output as output
from ._command import command
from ._source import adapter_options, base_option, named
from ._writing import timeout_option

if TYPE_CHECKING:
    from rich.console import Console

    from ..fold import Library


@command("add", example="lorafold add lib adapters/law")
@click.argument("lib", metavar="LIB")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--name", help="Its name in the library. [default: the last part of its path]")
@click.option("--replace", is_flag=True, help="Take the place of an adapter of that name.")
@click.option("--tolerance", type=float, help="Its own bound. [default: the library's]")
@click.option(
    "--form",
    type=click.Choice(["svd", "exact"]),
    help="Keep it off the shared bases, or bit for bit.",
)
@timeout_option
@base_option
@adapter_options
def add(
    lib: str,
    adapters: tuple[str, ...],
    name: str | None,
    replace: bool,
    tolerance: float | None,
    form: Literal["svd", "exact"] | None,
    timeout: float,
    **reading: Any,
) -> None:
    """Add adapters to a library.

    What is stored of the others does not change by a bit. Each ADAPTER is a path, a folder of
    adapters, a glob or LIB:NAME, and is added in a step of its own: when one fails, those before it
    stay.
    """
    from ..fold import Library

    with Library.open(lib, timeout=timeout) as opened:
        found = named(adapters, **reading)
        if name is not None:
            if len(found) != 1:
                text = f"--name is for one adapter, and {len(found)} are given"
                raise click.UsageError(text, click.get_current_context())
            found = dict.fromkeys([name], *found.values())
        _check_free(opened, list(found), replace)
        before, rows = opened.nbytes, []
        with output.progress("adding") as advance:
            for k, (own, handle) in enumerate(found.items()):
                advance(k, len(found), own)
                start = opened.nbytes
                error = opened.add(handle, own, replace=replace, tolerance=tolerance, form=form)
                rows.append({"name": own, "error": error, "bytes": opened.nbytes - start})
        data = {"path": lib, "bytes": [before, opened.nbytes], "added": rows}
    output.report(data, lambda out: _show(out, data))


def _check_free(lib: Library, names: list[str], replace: bool) -> None:
    """Before anything is added, that no name is taken."""
    from ..errors import MismatchError

    taken = [name for name in names if name in lib]
    if taken and not replace:
        raise MismatchError(
            f"the library already has an adapter {taken[0]!r}; give --replace, or another --name"
        )


def _show(out: Console, d: dict[str, Any]) -> None:
    rows = ((r["name"], output.percent(r["error"]), f"{r['bytes']:+,}") for r in d["added"])
    output.table(out, ["added", ">error", ">library bytes"], rows, most=output.MOST)
    before, after = (output.size(n) for n in d["bytes"])
    output.say(out, f"\n{d['path']}: {before} → {after}")
