"""`lorafold ls`: the adapters of a library, one line each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from . import _output as output
from ._command import command

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from ..fold import Library


@command("ls", example="lorafold ls lib")
@click.argument("lib", metavar="LIB")
def ls(lib: str) -> None:
    """List the adapters of a library.

    For each: the error against its original, the bytes it takes in the library beside what is
    shared, the bytes of its original files, its rank by its config, and the start of its digest.
    """
    from ..fold import Library

    with Library.open(lib) as opened:
        rows = _rows(opened)
    output.report(rows, lambda out: _show(out, rows))


def _rows(lib: Library) -> list[dict[str, Any]]:
    sizes = {name: _record_bytes(shard.read("at")) for name, shard in lib.store.shards.items()}
    common = lib.store.manifest["config"]
    rows = []
    for name in lib.names:
        entry = lib.entry(name)
        rows.append(
            {
                "name": name,
                "error": entry["error"],
                "bytes": int(sizes[entry["shard"]][entry["row"]]),
                "file_bytes": entry["file_bytes"],
                "ranks": _ranks(common, entry),
                "parameters": entry["parameters"],
                "exact": bool(entry.get("exact")),
                "digest": entry["digest"],
            }
        )
    return rows


def _record_bytes(at: np.ndarray) -> np.ndarray:
    """Bytes of every row of a shard: `at` (modules, rows + 1) is where records begin and end."""
    widths = at[:, 1:].astype("int64") - at[:, :-1].astype("int64")
    total: np.ndarray = widths.sum(0)
    return total


def _ranks(common: dict[str, Any], entry: dict[str, Any]) -> list[int]:
    """The ranks that the config names, r first; none where there is no config."""
    from ..fold.store.manifest import config_of

    config = config_of(common, entry)
    patterns = config.get("rank_pattern") or {}
    found = [config.get("r"), *patterns.values()]
    return list(dict.fromkeys(r for r in found if isinstance(r, int)))


def _show(out: Console, rows: list[dict[str, Any]]) -> None:
    output.table(
        out,
        ["name", ">rank", ">error", ">own bytes", ">file bytes", ">parameters", "digest…"],
        (
            (
                row["name"],
                output.span(row["ranks"]),
                "exact" if row["exact"] and not row["error"] else output.percent(row["error"]),
                output.size(row["bytes"]),
                output.size(row["file_bytes"]),
                output.count(row["parameters"]),
                row["digest"][:8],
            )
            for row in rows
        ),
    )
