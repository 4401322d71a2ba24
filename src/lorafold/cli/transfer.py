"""`lorafold transfer`: adapters of one base made into adapters of another."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from ..errors import LorafoldError
from . import _output as output
from ._bases import pair_options, tables_of, tokenizers_of
from ._command import CheckFailed, command, settings, told
from ._source import named, reading_of, source_options, touched
from ._texts import texts_of
from ._writing import Places, dtype_option, stands_for_many, torch_dtype

if TYPE_CHECKING:
    from rich.console import Console

    from ..collection.sources import Handle
    from ..files.remote.place import Place
    from ..transfer import Transfer

Advance = Callable[[int, int, str], None]

_ALIGNED = ("auto", "procrustes", "functional")
_JUDGED = ("auto", "distill")
_FLAGGED = ("rescale", "unchecked", "tokenizers", "roles")
_SHAPE = re.compile(r"(?P<pattern>.+)=(?P<out>\d+)[x×](?P<inner>\d+)")


def _of_methods() -> set[str]:
    from ..transfer.transfer import METHODS

    return {name for way in METHODS.values() for name in way.takes}


@command(
    "transfer",
    example="lorafold transfer adapters/sql --shape q_proj=48x32 -o wide",
    own=_of_methods,
)
@click.argument("source", metavar="ADAPTER")
@click.option("-o", "--output", "target", required=True, metavar="OUT", help="Where it goes.")
@click.option("--from", "old", metavar="BASE_S", help="The base that it was trained on.")
@click.option("--to", "new", metavar="BASE_T", help="The base that it is for.")
@click.option(
    "--method", help="auto (default with two bases), svd (without); see docs/transfer.md."
)
@click.option(
    "--shape", "shapes", multiple=True, metavar="PATTERN=OUTxIN", help="Instead of bases."
)
@click.option("--texts", metavar="FILE", help="Texts to learn from: .txt, or .jsonl.")
@click.option("--lines", type=click.IntRange(min=1), default=1, help="Lines of a text (1).")
@click.option("--alignment", metavar="A", help="What 'lorafold align' has written, instead.")
@pair_options
@click.option(
    "--option", "own", multiple=True, metavar="NAME=VALUE", help="One of the method's; repeatable."
)
@click.option("--rank", type=int, help="Largest rank of the result.")
@click.option("--energy", type=float, help="Share of every result's ‖ΔW‖² to keep.")
@click.option("--rescale", is_flag=True, help="Plain resizings: multiply by √(d_s/d_t).")
@click.option("--unchecked", is_flag=True, help="copy: don't compare the bases' weights.")
@click.option("--base-model", help="Name or path of the new base, for the config.")
@click.option("--pad", is_flag=True, help="Zero-pad to one rank: the form all readers agree on.")
@dtype_option
@click.option("--overwrite", is_flag=True, help="Replace what is at OUT.")
@source_options
def transfer(
    source: str,
    target: str,
    pad: bool,
    dtype: str | None,
    overwrite: bool,
    base_model: str | None,
    device: str | None,
    **options: Any,
) -> None:
    """Move adapters to another base model, or to other shapes.

    ADAPTER may be a folder of adapters, a glob or a library: each goes to OUT/NAME then. Shapes,
    or --to alone, are enough for the plain resizings (truncate, interpolate, svd); the methods that
    keep the effect learn from --texts run through both bases, or from an --alignment of them. Exit
    status 1 where some of many adapters could not be moved, or 'auto' advises against one.
    """
    reading = {"dtype": dtype, **reading_of(options)}
    reading["base"] = reading["base"] or options["old"]
    given = _arguments(options)
    handles = named([source], **reading)
    many = stands_for_many([source], handles)
    apart = touched([source], handles)
    out = Places.of(target, handles, apart, overwrite=overwrite, many=many)
    places = out.paths
    saving: dict[str, Any] = {"pad": pad, "overwrite": overwrite, "dtype": torch_dtype(dtype)}
    saving["base_model"] = base_model
    rows, failed = [], {}
    with output.progress("transferring") as advance:
        given = _read(given, device, advance)
        for k, (name, place) in enumerate(places.items()):
            tell = _within(advance, k, len(places))
            try:
                rows.append(_moved(name, handles[name], place, given, saving, tell))
            except LorafoldError as e:
                if len(places) == 1:
                    raise
                failed[name] = told(e)
    out.list_names(failed)
    found = {"path": target, "adapters": rows, "failed": failed}
    output.report(found, lambda out: _show(out, found), tables=("modules",))
    if failed:
        raise CheckFailed(f"{len(failed)} of {output.count(len(places), 'adapter')} were not moved")
    useless = [row["name"] for row in rows if row["report"]["said"].get("advice") == "don't"]
    if useless:
        raise CheckFailed(f"don't use {output.listed(useless)}: next to nothing of it arrived")


def _arguments(o: Mapping[str, Any]) -> dict[str, Any]:
    """What `lorafold.transfer` is called with."""
    from ..transfer.transfer import way_of

    shape: dict[str, tuple[int, int]] = {}
    for text in o["shapes"]:
        match = _SHAPE.fullmatch(text)
        if match is None:
            raise click.BadParameter(f"{text!r} is not PATTERN=OUTxIN", param_hint="--shape")
        if match["pattern"] in shape:
            raise click.BadParameter(f"{match['pattern']!r} is given twice", param_hint="--shape")
        shape[match["pattern"]] = int(match["out"]), int(match["inner"])
    if shape and (o["old"] or o["new"]):
        raise click.UsageError("give --shape, or bases; not both")
    if not shape and o["new"] is None and o["alignment"] is None:
        raise click.UsageError("give --to, the base that it is for, or --shape")
    between = o["alignment"] is not None or None not in (o["old"], o["new"])
    found = {
        "source": o["old"],
        "target": o["new"],
        "method": o["method"] or ("auto" if between else "svd"),
        "shape": shape or None,
        "texts": None if o["texts"] is None else texts_of(o["texts"], o["lines"]),
        "alignment": o["alignment"],
        "rank": o["rank"],
        "energy": o["energy"],
    }
    own: dict[str, Any] = {key: True for key in ("rescale", "unchecked") if o[key]}
    if o["tokenizers"]:
        own["tokenizers"] = tokenizers_of(o["tokenizers"])
    if o["tables"]:
        own["roles"] = tables_of(o["tables"])
    own |= _own(o["own"], [*found, *_FLAGGED])
    way_of(found["method"], own)  # before anything is read or run
    return found | own


def _own(given: Sequence[str], others: Container[str]) -> dict[str, Any]:
    """A method's own options: numbers, true and false as in JSON, and words."""
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals) or name in others or name in found:
            why = "has a flag of its own" if name in others else "is given twice"
            said = f"{name!r} {why}" if name and equals else f"{text!r} is not NAME=VALUE"
            raise click.BadParameter(said, param_hint="--option")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _read(given: dict[str, Any], device: str | None, advance: Advance) -> dict[str, Any]:
    """The same with bases and alignment in memory, once for all adapters, where they are needed."""
    from ..collection.limits import torch_device
    from ..transfer import Alignment, align
    from ..transfer.align.bases import base_of

    if given["alignment"] is not None:
        given = {**given, "alignment": Alignment.load(given["alignment"])}
    method, texts = given["method"], given["texts"]
    aligns = method in _ALIGNED and texts is not None and given["alignment"] is None
    runs = aligns or method == "vocabulary" or (texts is not None and method in _JUDGED)
    if not runs or None in (given["source"], given["target"]):
        return given
    tables = given.get("roles", ())
    two = zip(("source", "target"), given.get("tokenizers", (None, None)), strict=True)
    bases = [base_of(given[side], side, t, tables, torch_device(device)) for side, t in two]
    shared = {"tokenizers": tuple(base.tokenizer for base in bases), "roles": tables}
    models: dict[str, Any] = {base.side: base.model for base in bases}
    if aligns:
        given = {**given, "alignment": align(**models, texts=texts, **shared, progress=advance)}
    return {**given, **models, **shared}


def _within(advance: Advance, done: int, count: int) -> Advance:
    """Progress of one adapter among several."""
    return advance if count == 1 else lambda d, n, what: advance(done * n + d, count * n, what)


def _moved(
    name: str,
    handle: Handle,
    place: Place,
    given: Mapping[str, Any],
    saving: Mapping[str, Any],
    advance: Advance,
) -> dict[str, Any]:
    """One adapter, transferred and written; what is to be said of it."""
    from ..files import open_adapter, save
    from ..transfer import transfer

    moved: Transfer = transfer(handle.load(), **given, progress=advance)
    save(moved.adapter, place, **saving)
    written = open_adapter(place)
    norm = moved.adapter.norm()
    apart = replace(moved.adapter, base_model=written.base_model).distance(written.load())
    return {
        "name": name,
        "path": str(place),
        "base_model": written.base_model,
        "bytes": written.nbytes,
        "ranks": sorted({u.rank for u in moved.adapter.modules.values()}),
        "rounding": apart / norm if norm > 0 else 0.0,
        "report": moved.report.to_dict(),
    }


# For people


def _show(out: Console, d: Mapping[str, Any]) -> None:
    rows = d["adapters"]
    if len(rows) == 1 and not d["failed"]:
        _show_one(out, rows[0])
    else:
        output.say(out, f"{output.count(len(rows), 'adapter')} written to {d['path']}\n")
        cells = [
            (row["name"], len(row["report"]["modules"]), *_totals(row["report"])) for row in rows
        ]
        columns = ["adapter", ">modules", ">error", ">norm ratio", ">rank ratio", ">cosine", ">R²"]
        output.table(out, columns, cells, most=output.MOST)
    for name, why in d["failed"].items():
        output.say(out, f"not moved: {name}: {why}")


def _totals(r: Mapping[str, Any]) -> list[str]:
    fits = [m["fit"] for m in r["modules"] if m["fit"] is not None]
    fit = sum(fits) / len(fits) if fits else None
    return _cells({**r, "fit": fit})


def _cells(m: Mapping[str, Any]) -> list[str]:
    """Error, norm ratio, rank ratio, cosine and R²."""
    ratios = (output.digits(m[key]) for key in ("norm_ratio", "rank_ratio", "cosine", "fit"))
    return [output.percent(m["error"]), *ratios]


def _show_one(out: Console, row: Mapping[str, Any]) -> None:
    r = row["report"]
    error, norm, rank, cosine, fit = _totals(r)
    said = {name.replace("_", " "): value for name, value in r["said"].items()}
    output.facts(
        out,
        [
            ("written", row["path"]),
            ("base", row["base_model"]),
            ("method", r["method"]),
            ("modules", output.count(len(r["modules"]))),
            ("rank", f"{output.span(row['ranks'])} ({rank} of the numerical rank)"),
            ("norm", f"{norm} of what it was"),
            ("error", None if r["error"] is None else f"{error} of ‖ΔW‖"),
            ("leading directions", None if r["cosine"] is None else f"mean cosine {cosine}"),
            ("R² of the alignment", None if fit == output.NOTHING else fit),
            ("rounding", output.percent(row["rounding"]) if row["rounding"] > 1e-6 else None),
            *((name, _value(value)) for name, value in said.items()),
        ],
    )
    for title, listed in (("without a counterpart", "without"), ("left out", "dropped")):
        if r[listed]:
            output.say(out, f"\n{title}:")
            output.table(out, ["module…", "why"], r[listed].items())
    if r["left_behind"]:
        output.say(out, f"\nleft behind: {output.listed(r['left_behind'])}")
    if settings().verbose:
        columns = ["module", ">before", ">after", ">error", ">norm ratio", ">rank ratio"]
        rows = ((m["path"], *map(_shape, m["shapes"]), *_cells(m)) for m in r["modules"])
        output.say(out)
        output.table(out, [*columns, ">cosine", ">R²"], rows)


def _value(value: Any) -> Any:
    """What a method says, in a line; tables are for --json."""
    if isinstance(value, Mapping):
        numbers = {k: v for k, v in value.items() if isinstance(v, int | float)}
        whole = len(numbers) == len(value)
        return ", ".join(f"{k} {v:.3g}" for k, v in numbers.items()) if whole else None
    return f"{value:.4g}" if isinstance(value, float) else value


def _shape(shape: tuple[int, int]) -> str:
    return f"{shape[0]}×{shape[1]}"
