"""`lorafold ls`: the adapters of a library, one line each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from . import _output as output
from ._command import command
from ._subspace import show_subspace

if TYPE_CHECKING:
    from rich.console import Console

    from ..fold.store.catalog import Catalog


@command("ls", example="lorafold ls lib")
@click.argument("lib", metavar="LIB")
def ls(lib: str) -> None:
    """List the adapters of a library.

    For each: the error against its original, the bytes it takes in the library beside what is
    shared ("lost", where a file that it needs is damaged), the bytes of its original files, its
    ranks, and the start of its digest.
    """
    from ..files.find import is_subspace
    from ..fold.store.catalog import Catalog

    if is_subspace(lib):
        show_subspace(lib)
        return
    rows = _rows(Catalog.open(lib))
    output.report({"path": lib, "adapters": rows}, lambda out: _show(out, rows))


def _rows(lib: Catalog) -> list[dict[str, Any]]:
    rows = []
    for entry in lib.manifest.adapters.values():
        problem = lib.problem(entry.name)
        rows.append(
            {
                "name": entry.name,
                "error": entry.error,
                "bytes": lib.own_bytes(entry.name) if problem is None else 0,
                "file_bytes": entry.file_bytes,
                "ranks": list(entry.ranks),
                "parameters": entry.parameters,
                "exact": entry.exact,
                "digest": entry.digest,
                "problem": problem,
            }
        )
    return rows


def _show(out: Console, rows: list[dict[str, Any]]) -> None:
    output.table(
        out,
        ["name", ">rank", ">error", ">own bytes", ">file bytes", ">parameters", "digest…"],
        (
            (
                row["name"],
                output.span(row["ranks"]),
                "exact" if row["exact"] and not row["error"] else output.percent(row["error"]),
                "lost" if row["problem"] else output.size(row["bytes"]),
                output.size(row["file_bytes"]),
                output.count(row["parameters"]),
                row["digest"][:8],
            )
            for row in rows
        ),
    )
