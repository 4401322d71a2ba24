"""`lorafold extract`: an adapter from a base and a fine-tuned checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from . import _output as output
from ._command import command
from ._writing import dtype_option, torch_dtype

if TYPE_CHECKING:
    from rich.console import Console


@command("extract", example="lorafold extract base merged -o extracted --rank 4")
@click.argument("base", metavar="BASE")
@click.argument("tuned", metavar="TUNED")
@click.option(
    "-o", "--output", "target", required=True, metavar="OUT", help="The adapter to write."
)
@click.option("--rank", type=int, help="Rank of every module.")
@click.option("--tolerance", type=float, help="Bound on every module's relative error.")
@click.option("--base-model", help="Name or path of the base, for the config.")
@click.option("--pad", is_flag=True, help="Zero-pad to one rank: the form all readers agree on.")
@dtype_option
@click.option("--overwrite", is_flag=True, help="Replace what is at OUT.")
def extract(
    base: str,
    tuned: str,
    target: str,
    rank: int | None,
    tolerance: float | None,
    base_model: str | None,
    pad: bool,
    dtype: str | None,
    overwrite: bool,
) -> None:
    """Make an adapter of what differs between two checkpoints.

    Reads both tensor by tensor. Every matrix that changed gets its best update of that rank;
    what changed and is no matrix is kept whole. Tells the error, and how much of the difference
    may be rounding.
    """
    from ..files import save
    from ..files.remote.place import place_of
    from ..files.replacing import check_apart, check_replaceable
    from ..files.save import ADAPTER
    from ..merge.extract import extract as extracted
    from ..merge.extract import facts

    check_replaceable(place_of(target), ADAPTER, overwrite, target)
    check_apart(target, [base, tuned])
    with output.progress("comparing") as advance:
        adapter = extracted(
            base,
            tuned,
            rank=rank,
            tolerance=tolerance,
            base_model=base_model,
            progress=advance,
        )
        told = facts(adapter) or {}
        save(adapter, target, pad=pad, overwrite=overwrite, dtype=torch_dtype(dtype))
    ranks = [u.rank for u in adapter.modules.values()]
    found = {
        **{key: told.get(key) for key in ("base", "tuned", "error", "floor", "whole")},
        "path": target,
        "modules": len(adapter),
        "ranks": [min(ranks, default=0), max(ranks, default=0)],
        "parameters": adapter.num_parameters,
    }
    output.report(found, lambda out: _show(out, found))


def _show(out: Console, d: dict[str, Any]) -> None:
    output.facts(
        out,
        [
            ("written", d["path"]),
            ("modules", f"{d['modules']:,}"),
            ("rank", output.span(d["ranks"])),
            ("parameters", f"{d['parameters']:,}"),
            ("error", f"{output.percent(d['error'])} of the difference"),
            ("rounding", f"{output.percent(d['floor'])} of it may be rounding of the weights"),
            ("kept whole", output.listed(d["whole"]) or None),
        ],
    )
