"""`lorafold train`: an adapter from a base and a file of examples."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import MismatchError
from . import _output as output
from ._command import BAD_INPUT, CheckFailed, command, settings

if TYPE_CHECKING:
    from rich.console import Console

    from ..train.job.dialects import Config
    from ..train.job.recipe import Recipe

DEMO = "demo"


class Interrupted(click.ClickException):
    """Ctrl-C was heard, and a checkpoint written."""

    exit_code = BAD_INPUT


def _pairs(ctx: click.Context, param: click.Parameter, given: Any) -> dict[str, str] | None:
    found: dict[str, str] = {}
    for text in given:
        what, equals, called = text.partition("=")
        if not (what and equals and called) or what in found:
            raise click.BadParameter(f"{text!r} is not WHAT=COLUMN", ctx, param)
        found[what] = called
    return found or None


def _numbers(ctx: click.Context, param: click.Parameter, given: Any) -> list[float] | None:
    if given is None:
        return None
    try:
        return [float(v) if "." in v or "e" in v.lower() else int(v) for v in given.split(",")]
    except ValueError as e:
        raise click.BadParameter(f"{given!r} is not numbers with commas", ctx, param) from e


def _option(name: str, text: str, **how: Any) -> Callable[[Any], Any]:
    return click.option(f"--{name}", help=text, **how)


_OPTIONS = [
    _option("data", "Examples: .jsonl, .json, .csv, .tsv, .parquet or .txt.", multiple=True),
    click.option("-o", "--output", metavar="OUT", help="The folder to make."),
    _option("eval", "Examples to measure on, and to stop by.", multiple=True, metavar="FILE"),
    _option("held-out", "Share of the data for that, without --eval (1/8).", type=float),
    _option("config", "Options in a YAML file; those given here win.", metavar="FILE"),
    _option(
        "columns",
        "What a column is, by another name; repeatable.",
        multiple=True,
        metavar="WHAT=COLUMN",
        callback=_pairs,
    ),
    _option("lines", "Lines of a .txt that make an example (1).", type=int),
    _option("rank", "r of every module (16).", type=int),
    _option("alpha", "α (twice the rank).", type=float),
    _option("targets", "Modules, with commas (all linear ones).", metavar="NAMES"),
    _option("exclude", "Modules to leave out, with commas.", metavar="NAMES"),
    _option("layers", "A band of the depth, as 0.5,1.", metavar="LO,HI", callback=_numbers),
    _option("dropout", "Of the adapter's input (0).", type=float),
    _option("rslora", "Scale α/√r.", is_flag=True, default=None),
    _option("nested", "Ranks to run at, as 1,2,4,8.", metavar="RANKS", callback=_numbers),
    _option("init", "kaiming, orthogonal, pissa or pissa_niter_N."),
    _option("epochs", "How often the data is seen (3).", type=float),
    _option("steps", "Steps of the optimiser, instead.", type=int),
    _option("batch", "Examples at once (8).", type=int),
    _option("accumulate", "Batches a step (1).", type=int),
    _option("lr", "Learning rate (2e-4).", type=float),
    _option("schedule", "How it falls: cosine, linear or constant."),
    _option("warmup", "Steps, or a share of them below 1 (0.03).", type=float),
    _option("betas", "Adam's, as .9,.95.", metavar="B1,B2", callback=_numbers),
    _option("weight-decay", "AdamW's (0).", type=float),
    _option("clip", "Largest norm of a gradient (1).", type=float),
    _option("lora-plus", "Learning rate of B over that of A (1).", type=float),
    _option("max-length", "Tokens of an example (what the base takes, ≤ 1024).", type=int),
    _option("packing/--no-packing", "Several examples in one row.", default=None),
    _option("train-on-prompts", "Learn the prompts, too.", is_flag=True, default=None),
    _option("bf16/--no-bf16", "Compute in bfloat16 (where a GPU can).", default=None),
    _option("gradient-checkpointing", "Less memory, more time.", is_flag=True, default=None),
    _option("quantize", "The base: nf4 (QLoRA), fp4 or int8."),
    _option("patience", "Evaluations without a better loss; 0: go on (3).", type=int),
    _option("eval-every", "Steps between evaluations (a tenth of all).", type=int),
    _option("chat-template", "Instead of the base's own.", metavar="FILE"),
    _option("seed", "Of everything that is drawn (0).", type=int),
    _option("cpu", "Use no GPU.", is_flag=True, default=None),
    _option("resume", "Go on from the last checkpoint in OUT.", is_flag=True),
    _option("overwrite", "Replace what is at OUT.", is_flag=True),
]


def _all_options(function: Any) -> Any:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@command(
    "train",
    example="lorafold train demo --data texts/poems.txt --steps 10 --lr 5e-3 -o poems",
)
@click.argument("base", required=False)
@_all_options
def train(
    base: str | None, config: str | None, resume: bool, overwrite: bool, **given: Any
) -> None:
    """Train an adapter on examples, and measure what it gains on those held out.

    BASE is a folder of a language model, or 'demo', the packaged one. An example is a text, or
    messages, or a prompt and its completion, of which the prompt is not learned. A column
    'adapter' names whose each example is: all are trained at once, each to OUT/NAME. Ctrl-C writes
    a checkpoint; -o OUT --resume goes on from it. Exit status 1 where the loss is no number.
    """
    from ..train.job.run import Stopped, run
    from ..train.job.stopping import DivergedError

    said = {k: v for k, v in {"base": base, **given}.items() if v not in (None, ())}
    recipe, base_model, file = _recipe(said, config, resume)
    folder, named = _base(recipe.base)
    try:
        with output.progress("training") as advance:
            found = run(
                recipe,
                folder=folder,
                base_model=base_model or named,
                resume=resume,
                overwrite=overwrite,
                progress=advance,
                told=lambda: click.echo("stopping after this step; again: at once", err=True),
            )
    except DivergedError as e:
        raise CheckFailed(str(e)) from e
    if isinstance(found, Stopped):
        raise Interrupted(
            f"stopped after step {found.step}, with a checkpoint; to go on: "
            f"lorafold train -o {_quoted(recipe.output)} --resume"
        )
    if file is not None:
        found["config"] = {"renamed": dict(file.renamed), "unused": list(file.idle)}
    output.report(found, lambda out: _show(out, found))


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)


def _recipe(
    given: dict[str, Any], config: str | None, resume: bool
) -> tuple[Recipe, str | None, Config | None]:
    """What to do, what its base is called, and what a config file said."""
    from ..train.job.dialects import read_config
    from ..train.job.recipe import Recipe
    from ..train.job.run import resumed

    file = None if config is None else read_config(config)
    if not resume:
        return Recipe.of({**(file.options if file else {}), **given}), None, file
    out = given.pop("output", None) or (file and file.options.get("output"))
    if not out:
        raise click.UsageError("give -o, where the run is to resume from")
    recipe, base_model = resumed(out)
    changed = given.keys() - {"steps", "epochs", "patience", "eval_every", "cpu"}
    known = recipe.to_dict()
    other = sorted(k for k in changed if k not in ("base", "data", "eval") and given[k] != known[k])
    if other:
        raise MismatchError(
            f"{other[0]}= is another than the run was begun with: resume goes on as it was begun, "
            "but for steps, epochs, patience and how often it evaluates"
        )
    kept = {
        k: v for k, v in given.items() if k in ("steps", "epochs", "patience", "eval_every", "cpu")
    }
    return recipe.with_(**kept), base_model, file


def _base(text: str) -> tuple[Path, str | None]:
    """The folder of a base, and what an adapter's config calls it where that is no path."""
    from ..demo.model import base_dir

    if text == DEMO and not os.path.exists(text):
        return base_dir(), "lorafold/demo-base"
    if not os.path.isdir(text):
        raise MismatchError(
            f"no such folder: {text!r}; BASE is the folder of a model, or 'demo' (one on the Hub "
            "is fetched with: hf download ID --local-dir DIR)"
        )
    return Path(text), None


# For people


def _show(out: Console, d: Mapping[str, Any]) -> None:
    data, losses = d["data"], [row["loss"] for row in d["losses"] if "loss" in row]
    best = f", step {d['best_step']} kept" if d["best_step"] not in (None, d["steps"]) else ""
    ended = "" if d["ended"] == "whole" else ", stopped as the held-out loss rose"
    rows = f"{output.count(data['train'], 'row')} ({output.count(data['tokens'], 'token')})"
    one = next(iter(d["adapters"].values())) if len(d["adapters"]) == 1 else None
    output.facts(
        out,
        [
            ("written", output.listed(d["places"].values())),
            ("base", d["base"]),
            ("data", f"{rows}, {output.count(data['held_out'])} more held out"),
            ("too long", _too_long(d)),
            ("steps", f"{d['steps']} ({output.digits(d['epochs'])} epochs){best}{ended}"),
            ("loss", f"{losses[0]:.3f} → {losses[-1]:.3f}" if losses else None),
            ("rank", None if one is None else f"{one['rank']}, ‖ΔW‖ {output.digits(one['norm'])}"),
            ("held out", None if one is None else _gain(one["held_out"])),
        ],
    )
    if one is None:
        columns = ["adapter", ">rows", ">rank", ">‖ΔW‖", ">base", ">adapter", ">lift"]
        output.say(out)
        output.table(out, columns, [_row(name, a) for name, a in d["adapters"].items()])
        output.say(out, "base, adapter, lift: nats a token on what was held out")
    for text in d["said"]:
        output.say(out, f"note: {text}")
    if d.get("config", {}).get("unused"):
        output.say(out, f"note: without effect here: {output.listed(d['config']['unused'])}")
    if settings().verbose:
        cells = [
            (r["step"], *(f"{r[k]:.4f}" if k in r else None for k in ("loss", "held_out")))
            for r in d["losses"]
        ]
        output.say(out)
        output.table(out, [">step", ">loss", ">held out"], cells)


def _too_long(d: Mapping[str, Any]) -> str | None:
    cut, dropped = (sum(d["data"][key].values()) for key in ("cut", "dropped"))
    if not cut:
        return None
    left = f"; {dropped} of them left out, as nothing to be learned remained" if dropped else ""
    return f"{output.count(cut, 'row')} cut at {d['max_length']} tokens{left}"


def _gain(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "not measured"
    lift = found["lift"]
    return (
        f"{found['base']:.3f} nats a token for the base, {found['adapter']:.3f} with the adapter: "
        f"{lift:.3f} less ({lift / math.log(2):.3f} bits)"
    )


def _row(name: str, a: Mapping[str, Any]) -> list[object]:
    found = a["held_out"]
    numbers = [None] * 3 if found is None else [found[k] for k in ("base", "adapter", "lift")]
    shown = (None if v is None else f"{v:.3f}" for v in numbers)
    return [name, a["rows"], a["rank"], output.digits(a["norm"]), *shown]
