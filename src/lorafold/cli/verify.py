"""`lorafold verify`: is a library undamaged, and are its errors what it says?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from . import _output as output
from ._command import CheckFailed, command
from ._source import adapter_options, base_option
from ._source import named as named_handles
from ._subspace import verify_subspace
from ._writing import crew_of, crew_options

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
@crew_options
@base_option
@adapter_options
def verify(lib: str, sources: tuple[str, ...], named: tuple[str, ...], **reading: Any) -> None:
    """Check a library's checksums, and its errors against the sources.

    Without a SOURCE only the checksums are read. With sources, named as for fold, every one of
    them is compared with what comes out of the library. All that is wrong is told: damaged files,
    and the adapters that they concern. Exit status 1 if there is any.

    Of a vLoRA folder, that its numbers are finite, its directions orthonormal, and its sizes fit.
    """
    from ..files.find import is_subspace

    if is_subspace(lib) and not sources and not named:
        wrong_there = verify_subspace(lib)
        if wrong_there:
            raise CheckFailed(f"{len(wrong_there)} problems: {wrong_there[0]}")
        return
    crew = crew_of(reading)
    with _library(lib) as opened:
        given = named_handles(sources, named, **reading) if sources or named else None
        with output.progress("comparing" if given else "reading checksums") as advance:
            found = opened.verify(given, strict=False, progress=advance, **crew)
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
            "shards": len(opened.contents.state.shards),
            "bytes": opened.nbytes,
            "measured": given is not None,
            "ok": not found.damage and all(row["ok"] for row in rows),
            "damage": found.damage,
            "adapters": rows,
        }
    output.report(data, lambda out: _show(out, data))
    wrong = [row for row in rows if not row["ok"]]
    told = [f"{output.count(len(found.damage), 'file')} damaged"] if found.damage else []
    if wrong or not told:
        told.append(f"{len(wrong)} of {output.count(len(rows), 'adapter')} failed")
    if not data["ok"]:
        hint = f" (lorafold repair {lib} makes the rest whole)" if found.damage else ""
        first = [*found.damage, *(row["problem"] for row in wrong)][0]
        raise CheckFailed(f"{', '.join(told)}: {first}{hint}")


def _library(path: str) -> Library:
    """What is there but can't be opened is what this command looks for."""
    import warnings

    from ..errors import FileError
    from ..files.find import is_library
    from ..fold import Library

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of damage, which is told in full below
            return Library.open(path)
    except FileError as e:
        if is_library(path):
            raise CheckFailed(str(e)) from e
        raise


def _show(out: Console, d: dict[str, Any]) -> None:
    checked = f"{output.count(d['shards'], 'shard')}, {output.size(d['bytes'])}"
    if d["damage"]:
        output.say(out, f"{d['path']} is damaged ({checked} are there):")
        output.say(out, "\n".join(f"  {line}" for line in d["damage"]))
    else:
        output.say(out, f"{d['path']}: checksums are right ({checked})")
    rows = d["adapters"]
    if d["damage"] and not d["measured"]:
        bad = [(row["name"], row["problem"]) for row in rows if not row["ok"]]
        output.say(
            out, f"\n{len(rows) - len(bad)} of {output.count(len(rows), 'adapter')} are whole"
        )
        if bad:
            output.say(out)
            output.table(out, ["adapter", "what is wrong"], bad, most=output.MOST)
        return
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
            for row in sorted(rows, key=lambda row: (row["ok"], -(row["error"] or 0)))
        ),
        most=output.MOST,
    )
