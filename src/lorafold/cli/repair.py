"""`lorafold repair`: a library that lost files, made whole without what is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from . import _output as output
from ._command import command
from ._source import adapter_options, base_option
from ._source import named as named_handles
from ._writing import timeout_option

if TYPE_CHECKING:
    from rich.console import Console

    from ..fold import Repair


@command("repair", example="lorafold repair lib --sources adapters")
@click.argument("lib", metavar="LIB")
@click.option(
    "--sources",
    multiple=True,
    metavar="SOURCE",
    help="Where lost adapters may be, as for fold; can be given again.",
)
@click.option(
    "--name",
    "named",
    multiple=True,
    metavar="NAME=SOURCE",
    help="The source of the adapter NAME; can be given again.",
)
@click.option("--memory", default="1GiB", show_default=True, help="Limit for what is held at once.")
@timeout_option
@base_option
@adapter_options
def repair(
    lib: str,
    sources: tuple[str, ...],
    named: tuple[str, ...],
    memory: str,
    timeout: float,
    **reading: Any,
) -> None:
    """Make a damaged library whole again: rebuild what is lost, or drop it.

    What can still be read stays as it is, bit for bit. Adapters that can't are folded again from
    their sources, within the bound that they had, and those without a source leave the library.
    First look at `lorafold verify LIB`, and put files back that a copy of the library still has.
    """

    from ..fold import repair as repaired

    given = named_handles(sources, named, **reading) if sources or named else None
    with output.progress("repairing") as advance:
        done = repaired(lib, given, memory=memory, timeout=timeout, progress=advance)
    data = {
        "path": lib,
        "damage": list(done.damage),
        "rebuilt": list(done.rebuilt),
        "dropped": dict(done.dropped),
        "lost_lists": done.lost_lists,
        "kept": done.kept,
    }
    output.report(data, lambda out: _show(out, lib, done))


def _show(out: Console, lib: str, done: Repair) -> None:
    if not (done.damage or done.rebuilt or done.dropped):
        output.say(out, f"{lib} is whole: nothing was done")
        return
    output.say(out, f"{lib} was damaged:" if done.damage else f"{lib}: files are as they were")
    output.say(out, "\n".join(f"  {line}" for line in done.damage))
    rows: list[tuple[str, Any]] = [
        ("kept", output.count(done.kept, "adapter")),
        ("rebuilt", output.listed(map(repr, done.rebuilt)) or None),
        ("dropped", output.listed(map(repr, done.dropped)) or None),
        (
            "lists lost",
            f"{done.lost_lists}, with names that nobody knows" if done.lost_lists else "",
        ),
    ]
    output.say(out)
    output.facts(out, rows)
