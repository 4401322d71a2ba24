"""`lorafold fold`: many adapters into one library."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from ..errors import LorafoldError
from . import _output as output
from ._command import CheckFailed, command, one_line, settings, told
from ._library import library_facts, library_table
from ._source import adapter_options, base_option, reading_of
from ._source import named as named_handles
from ._writing import folding_options

if TYPE_CHECKING:
    from rich.console import Console


@command("fold", example="lorafold fold adapters/* -o lib --tolerance 0.1")
@click.argument("sources", nargs=-1, metavar="SOURCE...")
@click.option("-o", "--output", "path", required=True, metavar="LIB", help="Folder to write.")
@click.option(
    "--name",
    "named",
    multiple=True,
    metavar="NAME=SOURCE",
    help="A source under a name of your own; can be given again.",
)
@click.option(
    "--tolerance",
    type=float,
    help="Bound on every adapter's ‖ΔŴ − ΔW‖ / ‖ΔW‖; 0 keeps every bit. [default: 0.1]",
)
@click.option("--retention", type=float, help="Share of each adapter's lift to keep, by --score.")
@click.option(
    "--score",
    metavar="MODULE:FUNCTION",
    help="fn(name, adapter, or None for the base) → higher is better; found from here.",
)
@click.option(
    "--keep-going",
    is_flag=True,
    help="Leave out adapters that can't be read, and say which; the exit status is 1 then.",
)
@click.option("--overwrite", is_flag=True, help="Replace the library at LIB.")
@folding_options
@base_option
@adapter_options
def fold(
    sources: tuple[str, ...],
    path: str,
    named: tuple[str, ...],
    score: str | None,
    keep_going: bool,
    **options: Any,
) -> None:
    """Fold many adapters into one library with a bounded error.

    Each SOURCE is an adapter, a folder of adapters (vLoRA's too), a glob, another library, or
    LIB:NAME. An adapter's name is the last part of its path; two alike need --name. The error is
    measured on what was written, adapter by adapter.
    """
    function = None if score is None else score_function(score)
    reading = reading_of(options)
    left_out: dict[str, str] = {}

    def leave_out(name: str, why: LorafoldError) -> None:
        left_out[name] = told(why)
        click.echo(f"warning: {one_line(f'{name} is left out: {left_out[name]}')}", err=True)

    broken = leave_out if keep_going else None
    from ..fold.fold import fold as fold_sources

    with output.notes(), output.progress("folding") as advance:
        lib = fold_sources(
            named_handles(sources, named, broken=broken, **reading),
            path,
            score=function,
            progress=advance,
            keep_going=broken or False,
            **{key: value for key, value in options.items() if value is not None},
        )
    with lib:
        stats = {"path": path, **lib.stats(), "left_out": left_out}
    if score is not None:
        stats["options"] = {**stats["options"], "retention": options["retention"], "score": score}

    def show(out: Console) -> None:
        library_facts(out, stats)
        if settings().verbose:
            library_table(out, stats)

    output.report(stats, show, tables=("modules",))
    if left_out:
        there = output.count(stats["adapters"] + len(left_out), "adapter")
        raise CheckFailed(f"{len(left_out)} of {there} left out")


def score_function(text: str) -> Callable[..., float]:
    """The function that MODULE:FUNCTION names, found from the working directory.

    Raises:
        BadParameter: no such module or function.
    """
    import importlib

    module, colon, name = text.partition(":")
    if not (module and colon and name):
        raise click.BadParameter(f"{text!r} is not MODULE:FUNCTION", param_hint="--score")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as e:
        raise click.BadParameter(f"{text!r}: {e}", param_hint="--score") from e
    if not callable(found):
        raise click.BadParameter(f"{text!r} is not a function", param_hint="--score")
    function: Callable[..., float] = found
    return function
