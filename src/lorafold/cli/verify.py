"""`lorafold verify`: is a library undamaged, and are its errors what it says?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from . import _output as output
from ._command import CheckFailed, command
from ._source import named_sources

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
    metavar="NAME=PATH",
    help="The source of the adapter NAME; can be given again.",
)
def verify(lib: str, sources: tuple[str, ...], named: tuple[str, ...]) -> None:
    """Check a library's checksums, and its errors against the sources.

    Without a SOURCE only the checksums are read. With sources, named as for fold, every one of
    them is compared with what comes out of the library. Exit status 1 if anything is wrong.
    """
    from ..errors import FileError
    from ..fold import Library

    with Library.open(lib) as opened:
        try:
            with output.progress("reading checksums"):
                opened.verify()
        except FileError as e:
            raise CheckFailed(str(e)) from e
        rows = _measured(opened, sources, named) if sources or named else _stored(opened)
        data = {
            "path": lib,
            "shards": len(opened.store.shards),
            "bytes": opened.nbytes,
            "measured": bool(sources or named),
            "ok": all(row["ok"] for row in rows),
            "adapters": rows,
        }
    output.report(data, lambda out: _show(out, data))
    wrong = [row for row in rows if not row["ok"]]
    if wrong:
        adapters = output.count(len(rows), "adapter")
        raise CheckFailed(f"{len(wrong)} of {adapters} failed: {wrong[0]['problem']}")


def _bound(lib: Library, entry: dict[str, Any]) -> float | None:
    bound = entry.get("tolerance", lib.tolerance)
    return 0.0 if entry.get("exact") else bound


def _stored(lib: Library) -> list[dict[str, Any]]:
    rows = []
    for name in lib.names:
        entry = lib.entry(name)
        row = {"name": name, "error": entry["error"], "bound": _bound(lib, entry)}
        rows.append({**row, "ok": True, "problem": None})
    return rows


def _measured(
    lib: Library, sources: tuple[str, ...], named: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Every source against what the library gives back; a broken bound doesn't end it."""
    from ..collection.sources import named_handles
    from ..errors import ToleranceError
    from ..fold.change import checked_error

    handles = named_handles(named_sources(sources, named))
    entries = {name: lib.entry(name) for name in handles}  # an unknown name is told at once
    rows = []
    with output.progress("comparing") as advance:
        for k, (name, handle) in enumerate(handles.items()):
            advance(k, len(handles), name)
            error, problem = None, None
            try:
                error = checked_error(lib, name, handle)
            except ToleranceError as e:
                problem = str(e)
            row = {"name": name, "error": error, "bound": _bound(lib, entries[name])}
            rows.append({**row, "ok": problem is None, "problem": problem})
    return rows


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
