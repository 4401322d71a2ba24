"""`lorafold resize`: the best adapter of another size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from . import _output as output
from ._command import command
from ._source import library_of, opened, source_options
from ._writing import DTYPES, dtype_option, torch_dtype

if TYPE_CHECKING:
    from rich.console import Console

    from ..adapter import Adapter


@command("resize", example="lorafold resize adapters/sql sql-r4 --rank 4")
@click.argument("source", metavar="IN")
@click.argument("target", metavar="OUT")
@click.option("--rank", type=int, help="Rank of every module.")
@click.option("--energy", type=float, help="Share of every module's ‖ΔW‖² to keep.")
@click.option("--tolerance", type=float, help="Bound on every module's relative error.")
@click.option("--budget", type=int, help="Parameters in all; ranks go where they count most.")
@click.option("--pad", is_flag=True, help="Zero-pad to one rank: the form all readers agree on.")
@dtype_option
@click.option("--overwrite", is_flag=True, help="Replace the adapter at OUT.")
@source_options
def resize(
    source: str,
    target: str,
    rank: int | None,
    energy: float | None,
    tolerance: float | None,
    budget: int | None,
    pad: bool,
    dtype: str | None,
    overwrite: bool,
    **options: Any,
) -> None:
    """Write an adapter at another size, with the error it costs.

    Each module becomes the nearest one of its rank (Eckart–Young). Give one of --rank, --energy,
    --tolerance and --budget. The error is that of what was written, against IN.
    """
    from ..files import open_adapter, save
    from ..files.replacing import check_apart

    with output.progress("resizing"):
        before = opened(source, dtype=dtype, **options)
        check_apart(target, [before.path, library_of(source)])
        adapter = before.load()
        smaller = adapter.resize(rank=rank, energy=energy, tolerance=tolerance, budget=budget)
        save(smaller, target, pad=pad, overwrite=overwrite, dtype=torch_dtype(dtype))
        after = open_adapter(target)
        written = after.load()
        norm = adapter.norm()
        found = {
            "source": source,
            "path": target,
            "parameters": [adapter.num_parameters, written.num_parameters],
            "bytes": [before.nbytes, after.nbytes],
            "ranks": [_ranks(adapter), _ranks(written)],
            "dtypes": [_dtypes(adapter), _dtypes(written)],
            "error": adapter.distance(written) / norm if norm > 0 else 0.0,
        }
    output.report(found, lambda out: _show(out, found))


def _ranks(adapter: Adapter) -> list[int]:
    """Smallest and largest."""
    ranks = [u.rank for u in adapter.modules.values()]
    return [min(ranks, default=0), max(ranks, default=0)]


def _dtypes(adapter: Adapter) -> list[str]:
    return sorted({str(u.A.dtype).removeprefix("torch.") for u in adapter.modules.values()})


def _show(out: Console, d: dict[str, Any]) -> None:
    parameters, size, ranks, dtypes = d["parameters"], d["bytes"], d["ranks"], d["dtypes"]
    output.facts(
        out,
        [
            ("written", d["path"]),
            ("rank", f"{output.span(ranks[0])} → {output.span(ranks[1])}"),
            ("parameters", f"{parameters[0]:,} → {parameters[1]:,}"),
            ("bytes", f"{output.size(size[0])} → {output.size(size[1])}"),
            ("dtype", " → ".join(dict.fromkeys(", ".join(names) for names in dtypes))),
            ("error", f"{output.percent(d['error'])} of ‖ΔW‖"),
        ],
    )
    if dtypes[0] != dtypes[1] and dtypes[0] and dtypes[0][0] in DTYPES and "float32" in dtypes[1]:
        output.say(out, f"\nThe factors became float32; --dtype {dtypes[0][0]} halves them.")
