"""`lorafold route`: fit a router on texts, and ask it."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import FileError, MismatchError
from . import _output as output
from ._command import Command, group
from ._texts import examples_of, lines_of, named_texts

if TYPE_CHECKING:
    from rich.console import Console

_LEARNED_ONLY = {"hidden": "--hidden", "temperature": "--temperature", "top_k": "--top-k"}


@group("route", example='lorafold route ask router "SELECT name FROM users"')
def route() -> None:
    """Choose adapters for texts: fit a router, ask it."""


@route.command("fit", cls=Command, example="lorafold route fit texts -o router")
@click.argument("sources", nargs=-1, required=True, metavar="TEXTS...")
@click.option("-o", "--output", "target", required=True, metavar="ROUTER", help="Folder to write.")
@click.option(
    "--kind",
    type=click.Choice(["centroid", "learned"]),
    default="centroid",
    help="How (centroid by default).",
)
@click.option("--encoder", default="ngrams", help="ngrams (default), or a sentence-transformer.")
@click.option("--lines", type=click.IntRange(min=1), default=1, help="Lines of an example (1).")
@click.option("--none", "nothing", metavar="FILE", help="Texts that no adapter is for.")
@click.option("--error", type=float, default=0.05, help="Share of wrong among the routed (0.05).")
@click.option("--always", is_flag=True, help="Abstain from nothing, instead of --error.")
@click.option("--hidden", type=int, help="Width of a learned router's hidden layer (64).")
@click.option("--temperature", type=float, help="Of a learned router's softmax (1).")
@click.option("--top-k", type=int, help="Adapters of a learned router's mixes (all).")
@click.option("--seed", type=int, default=0, help="Of a learned router.")
@click.option("--overwrite", is_flag=True, help="Replace what is at ROUTER.")
def fit(
    sources: tuple[str, ...],
    target: str,
    kind: str,
    encoder: str,
    lines: int,
    nothing: str | None,
    error: float,
    always: bool,
    seed: int,
    overwrite: bool,
    **options: Any,
) -> None:
    """Fit a router on example texts.

    TEXTS are files NAME.txt with an example a line, folders of these, or .jsonl files with "name"
    and "text" in every line. Held-out examples say when to abstain: so that of what is routed no
    more than --error goes to a wrong adapter.
    """
    from ..files.remote.place import place_of
    from ..files.replacing import check_replaceable
    from ..route import CentroidRouter, LearnedRouter
    from ..route.store import ROUTER

    given = {name: value for name, value in options.items() if value is not None}
    if given and kind == "centroid":
        raise click.UsageError(f"{_LEARNED_ONLY[next(iter(given))]} is for --kind learned")
    check_replaceable(place_of(target), ROUTER, overwrite, target)
    examples: dict[str | None, list[str]] = {}
    for source in sources:
        _read(examples, Path(source), lines)
    if nothing is not None:
        of_nothing: dict[str | None, list[str]] = {}
        _read(of_nothing, Path(nothing), lines)
        examples.setdefault(None, []).extend(itertools.chain(*of_nothing.values()))
    share = None if always else error
    router: Any
    with output.progress("fitting") as advance:
        if kind == "centroid":
            router = CentroidRouter.fit(examples, encoder, share)
        else:
            router = LearnedRouter.fit(
                examples, encoder, error=share, seed=seed, progress=advance, **given
            )
    router.save(target, overwrite=overwrite)
    found = _facts(router, target, kind, examples)
    output.report(found, lambda out: _show_fit(out, found))


@route.command("ask", cls=Command, example='lorafold route ask router "SELECT name FROM users"')
@click.argument("router", metavar="ROUTER")
@click.argument("texts", nargs=-1, required=True, metavar="TEXT...")
@click.option("--encoder", help="Another than the router was fitted with.")
def ask(router: str, texts: tuple[str, ...], encoder: str | None) -> None:
    """Say which adapters texts want, and why.

    A TEXT that is - stands for the lines of stdin.
    """
    from ..route import ArrowRouter, load

    opened = load(router, encoder)
    if isinstance(opened, ArrowRouter):
        raise MismatchError(
            f"{router} weighs tokens inside a model, and can't be asked about texts"
        )
    asked = [line for text in texts for line in (_stdin() if text == "-" else [text])]
    rows = [
        {
            "text": text,
            "mix": e.mix,
            "score": e.score,
            "threshold": e.threshold,
            "nearest": [{"name": name, "score": score} for name, score in e.nearest],
        }
        for text, e in zip(asked, opened.explain(asked), strict=True)
    ]
    output.report({"router": router, "texts": rows}, lambda out: _show_asked(out, rows))


# Reading texts


def _read(examples: dict[str | None, list[str]], path: Path, lines: int) -> None:
    """Add the examples of a file, or of the files of a folder, to those there are."""
    if os.path.isdir(path):
        files = sorted(p for p in path.iterdir() if p.suffix in (".txt", ".jsonl"))
        if not files:
            raise FileError(f"{path}: there is no .txt or .jsonl file in it")
        for file in files:
            _read(examples, file, lines)
    elif path.suffix == ".jsonl":
        for name, text in named_texts(path):
            examples.setdefault(name, []).append(text)
    else:
        examples.setdefault(path.stem, []).extend(examples_of(path, lines))


def _stdin() -> list[str]:
    return [line for line in lines_of(sys.stdin.read()) if line.strip()]


# Reports


def _facts(router: Any, target: str, kind: str, examples: Any) -> dict[str, Any]:
    from ..route import CentroidRouter

    c = router.calibration
    overlaps = router.overlaps() if isinstance(router, CentroidRouter) else []
    return {
        "router": target,
        "router_kind": kind,
        "encoder": router.encoder_name,
        "names": list(router.names),
        "examples": sum(len(texts) for texts in examples.values()),
        "calibration": None if c is None else c.record(),
        "overlaps": [
            {"a": o.a, "b": o.b, "cosine": o.cosine, "confused": o.confused} for o in overlaps
        ],
        "accuracy": None if kind == "centroid" else router.training_run.accuracy,
    }


def _show_fit(out: Console, d: dict[str, Any]) -> None:
    c = d["calibration"]
    threshold = None
    if c is not None:
        threshold = "none is reached" if c["threshold"] is None else f"{c['threshold']:.3f}"
    output.facts(
        out,
        [
            ("router", d["router"]),
            ("kind", d["router_kind"]),
            ("encoder", d["encoder"]),
            ("adapters", output.count(len(d["names"]))),
            ("examples", output.count(d["examples"])),
            ("held-out accuracy", None if d["accuracy"] is None else output.percent(d["accuracy"])),
            ("threshold", threshold),
            ("held out", None if c is None else output.count(c["heldout"], "example")),
            ("routed", None if c is None else output.percent(c["routed"])),
            ("of these wrong", None if c is None else output.percent(c["wrong"])),
        ],
    )
    if d["overlaps"]:
        output.say(out, "")
        rows = [
            (o["a"], o["b"], f"{o['cosine']:.3f}", output.percent(o["confused"]))
            for o in d["overlaps"]
        ]
        output.table(
            out, ["domain…", "overlaps with…", ">cosine", ">confused"], rows, most=output.MOST
        )


def _show_asked(out: Console, rows: Iterable[dict[str, Any]]) -> None:
    def mix(found: dict[str, float] | None) -> str:
        if found is None:
            return "none"
        return ", ".join(n if w == 1 else f"{n} {w:.3f}" for n, w in found.items())

    output.table(
        out,
        ["text…", "adapters", ">score", "nearest…"],
        [
            (
                row["text"],
                mix(row["mix"]),
                f"{row['score']:.3f}",
                ", ".join(f"{near['name']} {near['score']:.3f}" for near in row["nearest"]),
            )
            for row in rows
        ],
    )
