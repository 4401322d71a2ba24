"""`lorafold similar`: which adapters do the same, nearly the same, and what could go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from . import _output as output
from ._command import command, settings
from ._source import adapter_options, base_option, named
from ._writing import crew_of, crew_options

if TYPE_CHECKING:
    from rich.console import Console

    from ..compare import Similarity

_LISTED = 10_000  # pairs listed at most: a thousand that are alike make half a million


@command("similar", example="lorafold similar adapters")
@click.argument("sources", nargs=-1, metavar="SOURCE...")
@click.option("--threshold", type=float, default=0.9, help="Cosine of near-duplicates (0.9).")
@click.option("--exact", is_flag=True, help="Compute every pair exactly, not only the near ones.")
@click.option("--name", "names", multiple=True, metavar="NAME=SOURCE", help="A source by a name.")
@click.option("--seed", type=int, default=0, help="Of the sketches.")
@crew_options
@base_option
@adapter_options
def similar(
    sources: tuple[str, ...],
    threshold: float,
    exact: bool,
    names: tuple[str, ...],
    seed: int,
    **options: Any,
) -> None:
    """Find adapters that do the same, or nearly, and what could go.

    A source is an adapter, a glob or folder of adapters, LIB:NAME, or a library. Cosines are those
    of what they do to the weights: another gauge, rank or scale hides no duplicate, and a common
    start makes none. What could go does the same as another at the same strength, with the same
    heads and tokens.
    """
    from ..compare import similarity

    with output.progress("comparing") as advance:
        crew = crew_of(options)
        handles = named(sources, names, **options)
        how: dict[str, Any] = {"threshold": threshold, "exact": exact, "seed": seed, **crew}
        found = similarity(handles, progress=advance, **how)
        d = described(found)
    output.report(d, lambda out: _show(out, d))


def described(s: Similarity) -> dict[str, Any]:
    """What is alike, in JSON's types."""
    from ..compare.similarity import DUPLICATES

    limit = max(DUPLICATES, s.threshold)
    norms, nbytes = (dict(zip(s.names, x.tolist(), strict=True)) for x in (s.norms, s.nbytes))
    redundant = s.redundant(limit)
    near = s.duplicates(s.threshold)
    pairs = [
        {"a": p.a, "b": p.b, "cosine": p.cosine, "norm_a": norms[p.a], "norm_b": norms[p.b]}
        for p in near[:_LISTED]
    ]
    return {
        "threshold": s.threshold,
        "error": s.error,
        "pairs": len(near),
        "adapters": [{"name": n, "norm": norms[n], "bytes": nbytes[n]} for n in s.names],
        "duplicates": [p for p in pairs if p["cosine"] >= limit],
        "near_duplicates": [p for p in pairs if p["cosine"] < limit],
        "pairs_left_out": len(near) - len(pairs),
        "clusters": [
            {"names": names, "bytes": sum(nbytes[n] for n in names)}
            for names in s.clusters(s.threshold)
            if len(names) > 1
        ],
        "outliers": [o._asdict() for o in s.outliers()],
        "zero": [n for n in s.names if not norms[n]],
        "redundant": [
            {"name": n, "same_as": kept, "bytes": nbytes[n]} for n, kept in redundant.items()
        ],
        "freed_bytes": sum(nbytes[n] for n in redundant),
        "missing": {path: list(who) for path, who in s.missing.items()},
    }


# For people


def _show(out: Console, d: Mapping[str, Any]) -> None:
    shown = settings().verbose
    near, missing = d["clusters"], d["missing"]
    output.facts(
        out,
        [
            ("adapters", f"{len(d['adapters']):,}"),
            ("duplicates", _pairs_of(len(d["duplicates"]))),
            ("alike", f"{_pairs_of(d['pairs'])} of cosine {d['threshold']:g} and more"),
            (
                "clusters",
                f"{len(near):,} of {output.span(len(c['names']) for c in near)}"
                if near
                else "none",
            ),
            ("zero updates", output.listed(d["zero"])),
            ("could go", f"{len(d['redundant']):,}, which frees {output.size(d['freed_bytes'])}"),
            (
                "not everywhere",
                f"{output.count(len(missing), 'module')}, zero where missing" if missing else None,
            ),
            (
                "exact",
                f"above {d['threshold']:g}; below, cosines are off by {d['error']:.1g}"
                if d["error"]
                else None,
            ),
        ],
    )
    pairs = [*d["duplicates"], *d["near_duplicates"]]
    if pairs:
        output.say(out)
        output.table(
            out,
            ["adapter", "and", ">cosine", ">norms"],
            ((p["a"], p["b"], f"{p['cosine']:.4f}", _norms(p)) for p in pairs),
            most=output.MOST,
        )
    if d["pairs_left_out"]:
        output.say(out, f"and {output.count(d['pairs_left_out'], 'pair')} that are not listed")
    _list(out, "\nclusters:", [", ".join(c["names"]) for c in near], shown)
    _list(
        out, "\ncould go:", [f"{r['name']}: same as {r['same_as']}" for r in d["redundant"]], shown
    )
    odd = [f"{o['name']}: {output.digits(o['z'], 2)} deviations" for o in d["outliers"]]
    _list(out, "\nfar from the others:", odd, shown)
    if shown and missing:
        _list(
            out, "\nmissing:", [f"{p}: {output.listed(who)}" for p, who in missing.items()], shown
        )


def _pairs_of(count: int) -> str:
    return output.count(count, "pair") if count else "none"


def _norms(p: Mapping[str, Any]) -> str:
    return f"{output.digits(p['norm_a'])}, {output.digits(p['norm_b'])}"


def _list(out: Console, title: str, lines: list[str], all_of_them: bool) -> None:
    most = len(lines) if all_of_them else output.MOST
    if lines:
        output.say(out, title)
    for line in lines[:most]:
        output.say(out, f"  {line}")
    if len(lines) > most:
        output.say(out, f"  and {len(lines) - most:,} more: --verbose")
