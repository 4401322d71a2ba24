"""`lorafold unfold`: adapters of a library back as PEFT directories."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from ..collection.folders import NAMES_FILE
from . import _output as output
from ._command import CheckFailed, command, told
from ._writing import Places, dtype_option, torch_dtype

if TYPE_CHECKING:
    from rich.console import Console

    from ..adapter import Adapter
    from ..files.remote.place import Place


@command("unfold", example="lorafold unfold lib sql poems -o unfolded")
@click.argument("lib", metavar="LIB")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("-o", "--output", "folder", required=True, metavar="DIR", help="Where they go.")
@click.option("--base-model", help="Name or path of the base, for their configs.")
@dtype_option
@click.option("--pad", is_flag=True, help="Zero-pad to one rank: the form all readers agree on.")
@click.option("--overwrite", is_flag=True, help="Replace adapters that are in DIR already.")
def unfold(
    lib: str,
    names: tuple[str, ...],
    folder: str,
    base_model: str | None,
    dtype: str | None,
    pad: bool,
    overwrite: bool,
) -> None:
    """Write adapters of a library back as PEFT directories.

    All of them, or those named. An adapter goes to DIR/NAME; where its name is no plain folder
    name it goes to one made from it, listed in DIR/names.json. Factors are float32 unless --dtype
    says otherwise; adapters stored exactly come out bit for bit. Where the library is damaged, all
    that can be read are written, and the exit status is 1.
    """
    from ..errors import FileError
    from ..files import save
    from ..fold import Library

    with Library.open(lib) as opened:
        wanted = {name: opened.entry(name) for name in dict.fromkeys(names or opened.names)}
        places = Places.of(folder, wanted, [lib], overwrite=overwrite, among=opened.names)
        written: list[dict[str, Any]] = []
        lost: dict[str, str] = {}
        with output.progress("unfolding") as advance:
            for k, (name, entry) in enumerate(wanted.items()):
                advance(k, len(wanted), name)
                path = places.paths[name]
                try:
                    adapter = opened[name]
                except FileError as e:
                    lost[name] = told(e)
                    continue
                save(
                    adapter,
                    path,
                    pad=pad,
                    overwrite=overwrite,
                    dtype=torch_dtype(dtype),
                    base_model=base_model,
                )
                rounding = _rounding(adapter, path) if dtype not in (None, "float32") else 0.0
                row = {"name": name, "path": str(path), "error": entry["error"]}
                written.append({**row, "rounding": rounding})
    renamed = places.list_names(lost)
    found = {"path": folder, "dtype": dtype, "adapters": written, "lost": lost}
    output.report(found, lambda out: _show(out, found, renamed))
    if lost:
        name, why = next(iter(lost.items()))
        of = output.count(len(wanted), "adapter")
        raise CheckFailed(f"{len(lost)} of {of} can't be read, {name!r} first: {why}")


def _rounding(adapter: Adapter, path: Place) -> float | None:
    """Relative error that the dtype adds to what the library holds; None where ΔW is refused."""
    from ..files import load

    if adapter.refusal is not None:
        return None
    norm, written = adapter.norm(), load(path)
    distance = math.hypot(*((u - written[p]).norm() for p, u in adapter.modules.items()))
    return distance / norm if norm > 0 else 0.0


def _show(out: Console, d: Mapping[str, Any], renamed: Mapping[str, str]) -> None:
    adapters = d["adapters"]
    errors = [a["error"] for a in adapters]
    roundings = [a["rounding"] for a in adapters if a["rounding"]]
    output.say(out, f"{output.count(len(adapters), 'adapter')} written to {d['path']}")
    if errors:
        worst = output.percent(max(errors))
        output.say(out, f"error against the originals: at most {worst}, as stored")
    if roundings:
        rounding = output.percent(max(roundings))
        output.say(out, f"{d['dtype']} adds at most {rounding} to that")
    if renamed:
        output.say(out, f"\nNames that are no folder names ({NAMES_FILE} has them too):")
        output.table(out, ["folder", "name"], renamed.items(), most=output.MOST)
