"""`lorafold verify`: is a library undamaged, and are its errors what it says?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from . import _output as output
from ._command import CheckFailed, command
from ._source import named as named_handles

if TYPE_CHECKING:
    from rich.console import Console

    from ..fold import Library


@command("verify", example="lorafold verify lib adapters")
@click.argument("lib", metavar="LIB")
@click.argument("sources", nargs=-1, metavar="[SOURCE]...")
@click.option(
    "--name",
    "named",
    multiple=True,
    metavar="NAME=SOURCE",
    help="The source of the adapter NAME; can be given again.",
)
def verify(lib: str, sources: tuple[str, ...], named: tuple[str, ...]) -> None:
    """Check a library's checksums, and its errors against the sources.

    Without a SOURCE only the checksums are read. With sources, named as for fold, every one of
    them is compared with what comes out of the library. Exit status 1 if anything is wrong.
    """
    from ..errors import FileError

    with _library(lib) as opened:
        given = named_handles(sources, named) if sources or named else None
        try:
            with output.progress("comparing" if given else "reading checksums") as advance:
                found = opened.verify(given, strict=False, progress=advance)
        except FileError as e:
            if given is not None:
                named_handles(sources, named)  # where it is a source that can't be read, it says so
            raise CheckFailed(str(e)) from e
        rows = [
            {
                "name": name,
                "error": check.error,
                "bound": check.bound,
                "ok": check.problem is None,
                "problem": check.problem,
            }
            for name, check in found.items()
        ]
        data = {
            "path": lib,
            "shards": opened.stats()["shards"],
            "bytes": opened.nbytes,
            "measured": given is not None,
            "ok": all(row["ok"] for row in rows),
            "adapters": rows,
        }
    output.report(data, lambda out: _show(out, data))
    wrong = [row for row in rows if not row["ok"]]
    if wrong:
        adapters = output.count(len(rows), "adapter")
        raise CheckFailed(f"{len(wrong)} of {adapters} failed: {wrong[0]['problem']}")


def _library(path: str) -> Library:
    """What is there but can't be opened is what this command looks for."""
    from ..errors import FileError
    from ..files.find import is_library
    from ..fold import Library

    try:
        return Library.open(path)
    except FileError as e:
        if is_library(path):
            raise CheckFailed(str(e)) from e
        raise


def _show(out: Console, d: dict[str, Any]) -> None:
    checked = f"{output.count(d['shards'], 'shard')}, {output.size(d['bytes'])}"
    output.say(out, f"{d['path']}: checksums are right ({checked})")
    rows = d["adapters"]
    if not d["measured"]:
        worst = output.percent(max((row["error"] for row in rows), default=0.0))
        adapters = output.count(len(rows), "adapter")
        output.say(out, f"{adapters}: errors as stored, at most {worst} (give sources to measure)")
        return
    output.say(out)
    output.table(
        out,
        ["adapter", ">error", ">bound", "result"],
        (
            (
                row["name"],
                output.percent(row["error"]),
                output.percent(row["bound"]),
                "right" if row["ok"] else row["problem"],
            )
            for row in rows
        ),
    )
