"""`lorafold verify-merge`: what a merged checkpoint holds of an adapter."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from . import _output as output
from ._command import CheckFailed, command, settings
from ._source import adapter_options_beside_base, loaded

if TYPE_CHECKING:
    from rich.console import Console


@command("verify-merge", example="lorafold verify-merge base adapters/sql merged")
@click.argument("base", metavar="BASE")
@click.argument("adapter", metavar="ADAPTER")
@click.argument("merged", metavar="MERGED")
@adapter_options_beside_base
def verify_merge(base: str, adapter: str, merged: str, **options: Any) -> None:
    """Check, tensor by tensor, what a merged checkpoint holds of an adapter.

    For each module: whether MERGED = BASE + c·ΔW, with which c, how much of the difference is
    rounding, and how much is not explained. All other tensors must be those of BASE. Exit status 1
    where anything is amiss.
    """
    from ..merge.verify import verify_merge as verify

    with output.progress("comparing") as advance:
        found = verify(base, loaded(adapter, base=base, **options), merged, progress=advance)
    facts = {
        "base": base,
        "adapter": adapter,
        "merged": merged,
        "ok": found.ok,
        "says": found.says,
        "counts": found.counts,
        "parts": {part: dataclasses.asdict(f) for part, f in found.parts.items()},
        "others": dict(found.others),
        "compared": found.compared,
    }
    output.report(facts, lambda out: _show(out, facts), tables=("parts",))
    if not found.ok:
        amiss = sum(n for verdict, n in found.counts.items() if verdict != "applied")
        raise CheckFailed(
            f"{amiss} of {len(found.parts)} parts are not as they should be, and "
            f"{len(found.others)} other tensors differ" + (f": {found.says}" if found.says else "")
        )


def _show(out: Console, d: dict[str, Any]) -> None:
    parts, others = d["parts"], d["others"]
    counts = ", ".join(f"{n:,} {verdict}" for verdict, n in d["counts"].items())
    output.say(out, f"{output.count(len(parts), 'part')} of {d['adapter']}: {counts}")
    output.say(out, f"{output.count(d['compared'], 'other tensor')}: {len(others):,} differ")
    amiss = {p: f for p, f in parts.items() if f["verdict"] != "applied" or f["why"]}
    shown = parts if settings().verbose else amiss
    if shown:
        output.say(out, "")
        columns = ["part…", "verdict", ">c", ">rounding", ">unexplained", "why"]
        output.table(out, columns, [_row(part, f) for part, f in shown.items()], most=output.MOST)
    for key, why in list(others.items())[: None if settings().verbose else 10]:
        output.say(out, f"{key}: {why}")


def _row(part: str, f: dict[str, Any]) -> list[Any]:
    if f["c"] is None:
        return [part, f["verdict"], None, None, None, f["why"]]
    shares = (output.percent(f["rounding"]), output.percent(f["unexplained"]))
    return [part, f["verdict"], f"{f['c']:.3f}", *shares, f["why"]]
