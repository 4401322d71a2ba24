"""`lorafold merge`: adapters, or a recipe, into one adapter."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ..errors import MismatchError
from . import _output as output
from ._command import command
from ._source import base_option, named, reading_of, source_options
from ._writing import crew_of, crew_options, dtype_option, torch_dtype

if TYPE_CHECKING:
    from rich.console import Console

    from ..adapter import Adapter
    from ..collection.sources import Handle
    from ..files import AdapterFile

# {parameter: its flag} of what a recipe says itself.
_NOT_WITH_RECIPES = {
    "method": "--method",
    "space": "--space",
    "pairs": "--weight",
    "weights": "--weights",
    "names": "--name",
    "density": "--density",
    "drop_rate": "--drop-rate",
    "gamma": "--gamma",
    "epsilon": "--epsilon",
    "rule": "--rule",
    "common": "--common",
    "beta": "--beta",
    "lambda_": "--lambda",
    "pico": "--pico",
}


@command(
    "merge",
    example="lorafold merge adapters/sql adapters/poems -o both --method ties --density 0.5",
)
@click.argument("sources", nargs=-1, metavar="SOURCE...")
@click.option(
    "-o", "--output", "target", required=True, metavar="OUT", help="The adapter to write."
)
@click.option("--method", default="linear", help="How (linear by default); see docs/merge.md.")
@click.option("--weight", "pairs", multiple=True, metavar="NAME=W", help="A source's weight.")
@click.option("--weights", metavar="W,W,…", help="Weights in the order of the sources.")
@click.option("--name", "names", multiple=True, metavar="NAME=SOURCE", help="A source by a name.")
@click.option("--space", default="core", help="core (default), delta or factors.")
@click.option("--density", type=float, help="Share of entries to keep (0.5 by default).")
@click.option("--drop-rate", type=float, help="1 - density.")
@click.option("--gamma", type=float, help="Share of outliers that breadcrumbs drops.")
@click.option("--epsilon", type=float, help="How far della's probabilities lie apart.")
@click.option("--rule", help="What knots and ctm do inside: ties, dare, linear, …")
@click.option("--common", type=float, help="Share of the space that iso_cts has in common.")
@click.option("--beta", type=float, help="How much ctm lets large updates count for more.")
@click.option("--lambda", "lambda_", type=float, help="A factor for the result.")
@click.option("--pico", is_flag=True, help="Damp output directions that all share first.")
@click.option("--heads", metavar="NAME", help="Whose heads, biases and tokens to keep.")
@click.option("--seed", type=int, default=0, help="Of random masks.")
@click.option("--rank", type=int, help="Rank of the result; else it is exact.")
@click.option("--tolerance", type=float, help="Bound on each module's error; else it is exact.")
@click.option("--pad", is_flag=True, help="Zero-pad to one rank: the form all readers agree on.")
@base_option
@dtype_option
@click.option("--overwrite", is_flag=True, help="Replace what is at OUT.")
@crew_options
@source_options
def merge(
    sources: tuple[str, ...],
    target: str,
    rank: int | None,
    tolerance: float | None,
    pad: bool,
    dtype: str | None,
    overwrite: bool,
    **options: Any,
) -> None:
    """Merge adapters into one, of any ranks and targets.

    A source is an adapter, a glob or folder of adapters, a library, LIB:NAME, or one recipe of
    mergekit's (a .yaml file). The result is exact and of rank Σr at most, unless --rank or
    --tolerance cut it; the error of that is told.
    """
    from ..files import open_adapter, save
    from ..files.remote.place import place_of
    from ..files.replacing import check_apart, check_replaceable
    from ..files.save import ADAPTER

    if rank is not None and tolerance is not None:
        raise click.UsageError("give --rank or --tolerance, not both")
    check_replaceable(place_of(target), ADAPTER, overwrite, target)
    with output.progress("merging") as advance:
        options["progress"] = advance
        reading = {"dtype": dtype, **reading_of(options)}
        if any(map(_is_recipe, sources)):
            if len(sources) > 1:
                raise click.UsageError("a recipe names its adapters: give it alone")
            merged, own_dtype = _by_recipe(sources[0], rank, target, options, reading)
            dtype = dtype or own_dtype
        else:
            handles = named(sources, options.pop("names"), **reading)
            check_apart(target, [h.path for h in handles.values()])
            merged = _by_method(handles, rank, options)
        exact, merged = merged, _cut(merged, rank, tolerance)
        save(merged, target, pad=pad, overwrite=overwrite, dtype=torch_dtype(dtype))
        written = open_adapter(target)
        found = _found(exact, written, target)
    output.report(found, lambda out: _show(out, found))


def _by_method(handles: dict[str, Handle], rank: int | None, options: dict[str, Any]) -> Adapter:
    from ..merge.merge import run
    from ..merge.methods import job_of, takes_rank
    from ..scale.engine import Crew

    crew = Crew(**crew_of(options))
    names = tuple(handles)
    weights = _weights(names, options.pop("pairs"), options.pop("weights"))
    method, space, seed = (options.pop(key) for key in ("method", "space", "seed"))
    if method in ("lorahub", "regmean"):
        raise MismatchError(f"{method} needs what can be given in Python alone")
    given = {k: v for k, v in options.items() if v is not None and v is not False}
    if rank is not None and takes_rank(method, space):
        given["rank"] = rank
    return run(handles, job_of(method, names, weights, space, seed, given), crew)


def _by_recipe(
    path: str, rank: int | None, target: str, options: dict[str, Any], reading: dict[str, Any]
) -> tuple[Adapter, str | None]:
    """The merged adapter of a recipe, and the dtype that it asks for."""
    from ..files.replacing import check_apart
    from ..merge.recipe import Recipe

    given = click.get_current_context().get_parameter_source
    for name, flag in _NOT_WITH_RECIPES.items():
        if given(name) is not ParameterSource.DEFAULT:
            raise click.UsageError(f"a recipe says how to merge; leave out {flag}")
    recipe = Recipe.read(path)
    check_apart(target, [path, *(source for source, _ in recipe.models.values())])
    own = {"heads": options["heads"], "progress": options["progress"], **crew_of(options)}
    return recipe.merge(rank=rank, seed=options["seed"], **reading, **own), recipe.dtype


def _is_recipe(source: str) -> bool:
    return Path(source).suffix.lower() in (".yaml", ".yml") and not os.path.isdir(source)


def _weights(names: Sequence[str], pairs: Iterable[str], listed: str | None) -> Any:
    pairs = list(pairs)
    if pairs and listed is not None:
        raise click.UsageError("give --weight or --weights, not both")
    if listed is not None:
        return [_number(text, "--weights") for text in listed.split(",")]
    found: dict[str, float] = {}
    for pair in pairs:
        name, equals, value = pair.rpartition("=")
        if not (name and equals):
            raise click.BadParameter(f"{pair!r} is not NAME=W", param_hint="--weight")
        if name in found:
            raise click.BadParameter(f"{name!r} is given twice", param_hint="--weight")
        found[name] = _number(value, "--weight")
    return found or None


def _number(text: str, hint: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no number", param_hint=hint) from None


def _cut(merged: Adapter, rank: int | None, tolerance: float | None) -> Adapter:
    """The merged adapter, cut where that was asked for, and what it cost beside its provenance."""
    from ..merge.provenance import with_cut

    if tolerance is not None:
        smaller = merged.resize(tolerance=tolerance)
    elif rank is not None and merged.rank > rank:
        smaller = merged.resize(rank=rank)
    else:
        return merged
    norm = merged.norm()
    return with_cut(smaller, merged.distance(smaller) / norm if norm > 0 else 0.0)


def _found(exact: Adapter, written: AdapterFile, target: str) -> dict[str, Any]:
    from ..merge.provenance import facts_of

    facts = facts_of(exact.config) or {}
    norm, result = exact.norm(), written.load()
    return {
        **{key: facts.get(key) for key in ("method", "space", "seed", "options", "sources")},
        "missing": facts.get("missing", {}),
        "path": target,
        "modules": len(exact),
        "ranks": [_ranks(exact), _ranks(result)],
        "bytes": written.nbytes,
        "cut": facts.get("error"),
        "error": exact.distance(result) / norm if norm > 0 else 0.0,
    }


def _ranks(adapter: Adapter) -> list[int]:
    """Smallest and largest."""
    ranks = [u.rank for u in adapter.modules.values()]
    return [min(ranks, default=0), max(ranks, default=0)]


def _show(out: Console, d: dict[str, Any]) -> None:
    said = {**d["options"], "space": d["space"], "seed": d["seed"]}
    output.say(out, f"{output.count(len(d['sources']), 'adapter')} merged by {d['method']}\n")
    rows = [(s["name"], _weight(s["weight"]), s["digest"][:8]) for s in d["sources"]]
    output.table(out, ["adapter", ">weight", "digest"], rows)
    output.say(out, "")
    ranks = [output.span(r) for r in d["ranks"]]
    cut = d["cut"]
    output.facts(
        out,
        [
            ("written", d["path"]),
            ("how", ", ".join(f"{k} {v}" for k, v in said.items())),
            ("modules", f"{d['modules']:,}"),
            ("rank", " → ".join(dict.fromkeys(ranks))),
            ("bytes", output.size(d["bytes"])),
            ("cut to rank", None if cut is None else f"{output.percent(cut)} of ‖ΔW‖ lost"),
            ("error", f"{output.percent(d['error'])} of ‖ΔW‖, as written"),
        ],
    )


def _weight(weight: Any) -> str:
    return f"{weight:g}" if isinstance(weight, float | int) else "by module"
