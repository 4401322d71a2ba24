"""`lorafold resize`: the best adapter of another size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from ..errors import LorafoldError, MismatchError
from . import _output as output
from ._command import CheckFailed, command, told
from ._source import named, source_options, touched
from ._writing import DTYPES, Places, dtype_option, stands_for_many, torch_dtype

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from ..adapter import Adapter
    from ..collection.sources import Handle
    from ..files.remote.place import Place

# Rounding to half precision up to this share of the error that is made anyway is not worth twice
# the bytes: the two add up as squares, to half a percent more.
_SMALL = 0.1
_SAME = 1e-6  # an error that is float32's own


@command("resize", example="lorafold resize adapters/sql sql-r4 --rank 4")
@click.argument("sources", nargs=-1, required=True, metavar="IN...")
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
    sources: tuple[str, ...],
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
    """Write adapters at another size, with the error it costs.

    Each module becomes the nearest one of its rank (Eckart–Young). Give one of --rank, --energy,
    --tolerance and --budget. Several, a folder of adapters, a glob or a library go to OUT/NAME
    each. The error is that of what was written, against IN. Factors in half precision stay so where
    rounding them adds next to nothing to it; one whose ranks are small enough is written as it is.
    """
    handles = named(sources, dtype=dtype, **options)
    many = stands_for_many(sources, handles)
    apart = touched(sources, handles)
    places = Places.of(target, handles, apart, overwrite=overwrite, many=many)
    size = {"rank": rank, "energy": energy, "tolerance": tolerance, "budget": budget}
    saving = {"pad": pad, "overwrite": overwrite}
    rows, failed = [], {}
    with output.progress("resizing") as advance:
        for k, (name, path) in enumerate(places.paths.items()):
            advance(k, len(handles), name)
            try:
                row = _resized(handles[name], path, size, torch_dtype(dtype), saving)
                rows.append({"name": name, **row})
            except LorafoldError as e:
                if not many:
                    raise
                failed[name] = told(e)
    places.list_names(failed)
    found = {"path": target, "adapters": rows, "failed": failed}
    output.report(found, lambda out: _show(out, found, dtype is None))
    if failed:
        raise CheckFailed(f"{len(failed)} of {output.count(len(handles), 'adapter')} not written")


def _resized(
    handle: Handle,
    path: Place,
    size: Mapping[str, Any],
    dtype: torch.dtype | None,
    saving: Mapping[str, Any],
) -> dict[str, Any]:
    """One adapter, cut and written; what is to be said of it."""
    from ..files import open_adapter, save

    adapter = handle.load()
    norm = adapter.norm()
    cut = adapter.resize(**size)
    ranks = [{p: u.rank for p, u in a.modules.items()} for a in (adapter, cut)]
    error = adapter.distance(cut)
    unchanged = ranks[0] == ranks[1] and error <= _SAME * norm
    if unchanged and not saving["pad"]:
        cut = adapter
    save(cut, path, dtype=dtype or _kept(adapter, cut, error), **saving)
    after = open_adapter(path)
    written = after.load()
    return {
        "path": str(path),
        "parameters": [adapter.num_parameters, written.num_parameters],
        "bytes": [handle.nbytes, after.nbytes],
        "ranks": [_ranks(adapter), _ranks(written)],
        "unchanged": unchanged,
        "dtypes": [_dtypes(adapter), _dtypes(written)],
        "error": adapter.distance(written) / norm if norm > 0 else 0.0,
    }


def _kept(adapter: Adapter, cut: Adapter, error: float) -> torch.dtype | None:
    """The dtype of its factors, where that is a half and rounding to it adds little to an error."""
    import torch

    found = {t.dtype for u in adapter.modules.values() for t in (u.A, u.B)}
    if len(found) != 1 or not found <= {torch.float16, torch.bfloat16}:
        return None
    (dtype,) = found
    try:
        rounding = cut.distance(cut.to(dtype=dtype))
    except MismatchError:  # numbers that it does not have
        return None
    return dtype if rounding <= _SMALL * error else None


def _ranks(adapter: Adapter) -> list[int]:
    """Smallest and largest."""
    ranks = [u.rank for u in adapter.modules.values()]
    return [min(ranks, default=0), max(ranks, default=0)]


def _dtypes(adapter: Adapter) -> list[str]:
    return sorted({str(u.A.dtype).removeprefix("torch.") for u in adapter.modules.values()})


def _show(out: Console, d: Mapping[str, Any], may_cast: bool) -> None:
    rows = d["adapters"]
    if len(rows) == 1 and not d["failed"]:
        _show_one(out, rows[0], may_cast)
        return
    output.say(out, f"{output.count(len(rows), 'adapter')} written to {d['path']}\n")
    output.table(
        out,
        ["adapter", ">rank", ">bytes", ">error", "dtype"],
        (
            (
                row["name"],
                _rank_words(row),
                " → ".join(map(output.size, row["bytes"])),
                output.percent(row["error"]),
                _dtype_words(row),
            )
            for row in rows
        ),
        most=output.MOST,
    )
    for name, why in d["failed"].items():
        output.say(out, f"not written: {name}: {why}")


def _show_one(out: Console, row: Mapping[str, Any], may_cast: bool) -> None:
    output.facts(
        out,
        [
            ("written", row["path"]),
            ("rank", _rank_words(row)),
            ("parameters", _change(f"{n:,}" for n in row["parameters"])),
            ("bytes", " → ".join(map(output.size, row["bytes"]))),
            ("dtype", _dtype_words(row)),
            ("error", f"{output.percent(row['error'])} of ‖ΔW‖"),
        ],
    )
    if row["unchanged"]:
        output.say(out, "\nNo module is above that size: the ranks are unchanged.")
    before, after = row["dtypes"]
    half = [name for name in before if name in DTYPES and name not in after]
    if may_cast and half and after == ["float32"]:
        why = "rounding would count beside that error"
        output.say(out, f"\nThe factors became float32, as {why}; --dtype {half[0]} halves them.")


def _rank_words(row: Mapping[str, Any]) -> str:
    before, after = map(output.span, row["ranks"])
    return f"{after}, unchanged" if row["unchanged"] else f"{before} → {after}"


def _dtype_words(row: Mapping[str, Any]) -> str:
    return _change(", ".join(names) for names in row["dtypes"])


def _change(words: Any) -> str:
    return " → ".join(dict.fromkeys(words))
