"""`lorafold merge-into`: an adapter into the weights of a checkpoint, tensor by tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from . import _output as output
from ._command import CheckFailed, command
from ._source import library_of, opened, source_options_beside_base
from ._writing import DTYPES, torch_dtype

if TYPE_CHECKING:
    from rich.console import Console


@command("merge-into", example="lorafold merge-into base adapters/sql -o merged")
@click.argument("base", metavar="BASE_DIR")
@click.argument("adapter", metavar="ADAPTER")
@click.option("-o", "--output", "folder", required=True, metavar="DIR", help="The folder to write.")
@click.option("-c", "c", type=float, default=1.0, help="The dial: W + c·ΔW (1 by default).")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of all weights; else each keeps its own.")
@click.option("--partial", is_flag=True, help="Merge though parts have no place in the base.")
@click.option("--overwrite", is_flag=True, help="Replace what is at DIR.")
@source_options_beside_base
def merge_into(
    base: str,
    adapter: str,
    folder: str,
    c: float,
    dtype: str | None,
    partial: bool,
    overwrite: bool,
    **options: Any,
) -> None:
    """Write a checkpoint with an adapter merged, without loading the model.

    Shards, keys, metadata and dtypes stay those of BASE_DIR, and its other files are copied. One
    tensor at a time is in memory. Where a part of the adapter has no place in the base, nothing is
    written (exit status 1) unless --partial. Tells what rounding to the weights' dtype costs.
    """
    from ..files.replacing import check_apart
    from ..merge.into_checkpoint import Merge

    file = opened(adapter, dtype=dtype, base=base, **options)
    check_apart(folder, [file.path, library_of(adapter)])
    merge = Merge.of(base, file.load(), folder, c=c, dtype=torch_dtype(dtype))
    facts = {"base": base, "adapter": adapter, "c": c, "dtype": dtype}
    unplaced = dict(merge.plan.unplaced)
    if unplaced and not partial:
        missing = {**facts, "written": False, "unplaced": unplaced}
        output.report(missing, lambda out: _show_unplaced(out, unplaced), kind="unplaced")
        raise CheckFailed(
            f"{len(unplaced)} parts of the adapter have no place in {base}: nothing is written "
            "(--partial merges the rest)"
        )
    with output.progress("merging") as advance:
        merged = merge.write(overwrite=overwrite, progress=advance)
    found = {**facts, "written": True, **dataclasses.asdict(merged), "path": folder}
    output.report(found, lambda out: _show(out, found))


def _show(out: Console, d: dict[str, Any]) -> None:
    output.say(out, f"{d['adapter']} merged into {d['base']} with c = {d['c']:g}\n")
    files = output.count(len(d["files"]), "file")
    changed = f"{len(d['changed']):,} of {output.count(d['tensors'], 'tensor')} changed"
    rounding = f"{output.percent(d['rounding'])} of ‖c·ΔW‖, by the dtype of the weights"
    output.facts(
        out,
        [
            ("written to", d["path"]),
            ("weights", f"{changed}; {files}, {output.size(d['nbytes'])}"),
            ("rounding", rounding if d["rounding"] else None),
            ("left out", output.listed(d["left_out"]) or None),
        ],
    )
    if d["left_out"]:
        output.say(out, "\nFiles that are left out are weights in another form, not merged.")
    if d["untied"]:
        says = "has a weight of its own now, and the embedding another (tie_word_embeddings: false)"
        output.say(out, f"\n{d['untied']} {says}.")
    if d["unplaced"]:
        _show_unplaced(out, d["unplaced"])


def _show_unplaced(out: Console, unplaced: Mapping[str, str]) -> None:
    output.say(out, "\nHas no place in the base:")
    output.table(out, ["part of the adapter", "why"], unplaced.items(), most=output.MOST)
