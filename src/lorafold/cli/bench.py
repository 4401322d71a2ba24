"""`lorafold bench`: how long a library takes for what is done with it."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import _output as output
from ._command import command

if TYPE_CHECKING:
    from rich.console import Console

    from ..fold import Library

_MOST = 32  # adapters that are rebuilt and projected in one run


@command("bench", example="lorafold bench lib")
@click.argument("lib", metavar="LIB")
@click.option("--repeat", type=click.IntRange(1), default=3, show_default=True, help="Runs.")
def bench(lib: str, repeat: int) -> None:
    """Time a library: open, rebuild, project, add.

    Works on a copy in the temporary folder: the library itself does not change. Times are medians
    of the runs. What is projected and added are the library's own adapters, rebuilt.
    """
    from ..errors import MismatchError
    from ..fold import Library

    with Library.open(lib) as opened:
        if not len(opened):
            raise MismatchError(f"{lib} has no adapters to time")
        stats = {"path": lib, "adapters": len(opened), "bytes": opened.nbytes}
        with (
            tempfile.TemporaryDirectory() as folder,
            opened.save(Path(folder, "lib")) as copy,
            output.progress("timing") as advance,
        ):
            rows = _times(copy, repeat, advance)
    data = {**stats, "repeat": repeat, "times": rows}
    output.report(data, lambda out: _show(out, data))


def _times(lib: Library, repeat: int, advance: output.Advance) -> list[dict[str, Any]]:
    """One row per verb: what one run does, its seconds, and adapters a second."""
    from ..fold import Library

    path = str(lib.path)
    names = lib.names[:_MOST]
    rebuilt = {name: lib[name] for name in names}
    able = {name: a for name, a in rebuilt.items() if a.refusal is None}
    fresh = "bench"
    while fresh in lib:
        fresh += "'"
    first = next(iter(able.values()), None)

    def read() -> None:
        with Library.open(path) as opened:
            for name in names:
                opened[name]

    def project() -> None:
        for adapter in able.values():
            lib.project(adapter)

    def add() -> None:
        lib.add(first, fresh)

    steps: list[tuple[str, int, Callable[[], None], Callable[[], None] | None]] = [
        ("open", len(lib), lambda: Library.open(path).close(), None),
        ("rebuild", len(names), read, None),
    ]
    if first is not None:
        steps.append(("project", len(able), project, None))
        steps.append(("add", 1, add, lambda: lib.remove(fresh)))
    rows = []
    for k, (verb, number, run, undo) in enumerate(steps):
        advance(k, len(steps), verb)
        seconds = statistics.median(_seconds(run, undo) for _ in range(repeat))
        rate = number / max(seconds, 1e-9)
        rows.append({"verb": verb, "adapters": number, "seconds": seconds, "per_second": rate})
    return rows


def _seconds(run: Callable[[], None], undo: Callable[[], None] | None) -> float:
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    if undo is not None:
        undo()
    return seconds


def _show(out: Console, d: dict[str, Any]) -> None:
    adapters, repeat = output.count(d["adapters"], "adapter"), output.count(d["repeat"], "run")
    output.say(out, f"{d['path']}: {adapters}, {output.size(d['bytes'])}; median of {repeat}\n")
    output.table(
        out,
        ["verb", ">adapters", ">time", ">each", ">a second"],
        (
            (
                row["verb"],
                output.count(row["adapters"]),
                output.duration(row["seconds"]),
                output.duration(row["seconds"] / row["adapters"]),
                f"{row['per_second']:,.0f}",
            )
            for row in d["times"]
        ),
    )
