"""`lorafold steer`: pairs of answers into an adapter whose strength is a dial."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import FileError, LorafoldError, MissingExtraError
from . import _output as output
from ._command import command
from ._texts import texts_of

if TYPE_CHECKING:
    from rich.console import Console

    from ..train.steering.options import Options
    from ..train.steering.steer import Run

RANKS = {"lora": 8, "pissa": 64}
_BARRIER = ("lambda_", "hinge", "aggregate", "top")


@command("steer", example="lorafold steer demo --pairs pairs.jsonl -o dial")
@click.argument("base", metavar="BASE")
@click.option("--pairs", required=True, metavar="FILE", help="Rows of prompt, chosen, rejected.")
@click.option("-o", "--output", "target", required=True, metavar="OUT", help="Adapter to write.")
@click.option("--rounds", type=int, default=1, help="Rounds of training (1).")
@click.option(
    "--kind", type=click.Choice(list(RANKS)), default="lora", help="lora (default), pissa."
)
@click.option("--rank", "ranks", type=int, multiple=True, help="Of all rounds; or once for each.")
@click.option("--target", "targets", multiple=True, help="Modules (all linear); repeatable.")
@click.option("--steps", type=int, default=100, help="Of a round, at most (100).")
@click.option("--batch", type=int, default=8, help="Pairs of a step (8).")
@click.option("--lr", type=float, help="Learning rate (0.005; 0.02 for pissa).")
@click.option("--cap", type=float, default=1.0, help="Margin pushed for, nats a token (1).")
@click.option(
    "--lambda", "lambda_", type=float, default=0.3, help="Price of KL above --hinge (0.3)."
)
@click.option("--hinge", type=float, default=0.5, help="KL that is free, nats (0.5).")
@click.option("--aggregate", default="rmse", help="Of tokens' KL: mean, rmse (default), p95, max.")
@click.option("--top", type=int, help="KL over the K likeliest tokens and the rest as one.")
@click.option(
    "--reference",
    type=click.Choice(["base", "kept"]),
    default="base",
    help="KL and margin are from the base (default), or from the rounds before.",
)
@click.option("--kl", type=float, default=1.0, help="KL of greedy text that c = 1 is set to (1).")
@click.option("--heldout", type=float, default=0.2, help="Share of the prompts held out (0.2).")
@click.option("--every", type=int, default=10, help="Steps between looks at these (10).")
@click.option("--patience", type=int, default=3, help="Looks without gain that end a round (3).")
@click.option("--tokens", type=int, default=32, help="Tokens of greedy text (32).")
@click.option("--texts", metavar="FILE", help="Unrelated texts, for the NLL: .txt, or .jsonl.")
@click.option("--lines", type=click.IntRange(min=1), default=1, help="Lines of such a text (1).")
@click.option("--tolerance", type=float, help="Bound on each module's error; else all is exact.")
@click.option("--seed", type=int, default=0, help="Of the factors, the batches and the split.")
@click.option("--device", help="Where the base runs.")
@click.option("--resume", is_flag=True, help="Go on with what an interrupted run has left.")
@click.option("--overwrite", is_flag=True, help="Replace what is at OUT.")
def steer(
    base: str,
    pairs: str,
    target: str,
    texts: str | None,
    lines: int,
    device: str | None,
    resume: bool,
    overwrite: bool,
    **options: Any,
) -> None:
    """Train a dial from pairs of answers.

    BASE is the folder of a model, or demo, the packaged one. Each round is trained against KL from
    the base, calibrated, and kept; OUT is all of them as one adapter, beside the table of what it
    does along c (README.md, steering.json).
    """
    from ..files.remote.place import local
    from ..files.replacing import check_apart, check_replaceable
    from ..files.save import ADAPTER
    from ..train.steering.pairs import read_pairs
    from ..train.steering.state import load_run
    from ..train.steering.steer import Run

    check_replaceable(local(target), ADAPTER, overwrite, target)
    check_apart(target, [None if base == "demo" else base, pairs, texts])
    asked = _asked(options)
    rows, others = read_pairs(pairs), [] if texts is None else texts_of(texts, lines)
    model, tokenizer = _opened(base, device)
    run = Run(model, tokenizer, rows, asked)
    left = Path(f"{Path(target)}.unfinished")
    if resume:
        load_run(run, left)
    with output.progress("steering") as advance:
        _go(run, left, advance)
        try:
            facts = _written(run, base, target, others, overwrite, advance)
        except KeyboardInterrupt:
            raise LorafoldError(f"interrupted while measuring; {_on(left)}") from None
    shutil.rmtree(left)
    output.report({"path": target, **facts}, lambda out: _show(out, target, facts))


def _asked(given: Mapping[str, Any]) -> Options:
    from ..attach import LoRA, PiSSA
    from ..train.steering.barrier import KLBarrier
    from ..train.steering.options import Options

    o = dict(given)
    barrier = KLBarrier(**{name: o.pop(name) for name in _BARRIER})
    kind, ranks, targets = o.pop("kind"), o.pop("ranks"), o.pop("targets")
    if len(ranks) not in (0, 1, o["rounds"]):
        raise click.UsageError(f"--rank is given {len(ranks)} times, for {o['rounds']} rounds")
    own: dict[str, Any] = {"targets": list(targets)} if targets else {}
    kinds: list[Any] = []
    for rank in ranks or (RANKS[kind],):
        lora = kind == "lora"
        kinds.append(LoRA(rank=rank, alpha=2 * rank, **own) if lora else PiSSA(rank=rank, **own))
    lr = o.pop("lr")
    rate = lr if lr is not None else 0.005 if kind == "lora" else 0.02
    return Options(**o, kind=kinds, barrier=barrier, lr=rate)


def _opened(base: str, device: str | None) -> tuple[Any, Any]:
    """Model, in float32, and tokenizer."""
    from ..collection.limits import torch_device
    from ..demo.model import base_dir

    try:
        import torch
        import transformers
    except ImportError as e:
        raise MissingExtraError("steer takes transformers: pip install 'lorafold[train]'") from e
    where = torch_device(device)
    folder = base_dir() if base == "demo" and not os.path.exists(base) else Path(base)
    if not os.path.isfile(folder / "config.json"):
        raise FileError(f"{base} is not a base: no config.json is in it; give a model's folder")
    try:
        made: Any = transformers.AutoModelForCausalLM
        model = made.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # a damaged folder can raise anything
        text = str(e).strip().splitlines() or [type(e).__name__]
        raise FileError(f"{base}: transformers can't load it: {text[0]}") from e
    return model.eval().to(where or "cpu"), tokenizer


def _go(run: Run, left: Path, advance: output.Advance) -> None:
    """Train; where that is interrupted, keep what there is and say how to go on."""
    from ..train.job.stopping import Interrupts
    from ..train.steering.state import save_run

    with Interrupts(lambda: click.echo("stopping after this step", err=True)) as interrupts:
        ended = run.go(advance, lambda: interrupts.asked)
    now, number = run.now, len(run.done)
    save_run(run, left)  # before it is measured, too, which takes a while
    if not ended:
        at = f"behind round {number}" if now is None else f"in round {number + 1}, step {now.step}"
        raise LorafoldError(f"interrupted {at}; {_on(left)}")


def _on(left: Path) -> str:
    return f"what was trained is kept in {left}: the same command with --resume goes on"


def _written(
    run: Run, base: str, target: str, texts: list[str], overwrite: bool, advance: output.Advance
) -> dict[str, Any]:
    """Measure the dial and write it with what was measured; the facts."""
    from ..files import save
    from ..train.steering.card import facts_of, told
    from ..train.steering.sweep import Scales, swept

    dial = run.finished()
    scales = Scales.of(run.model, run.tokenizer, run.held, texts, run.options.tokens)
    found = swept(run.model, lambda c: dial.live.use("dial", c=c), scales, progress=advance)
    facts = facts_of(run, dial, found)
    name = "lorafold/demo-base" if base == "demo" else base
    save(told(dial.adapter, facts, name), target, overwrite=overwrite)
    return facts


def _show(out: Console, target: str, d: Mapping[str, Any]) -> None:
    from ..train.steering.card import COLUMNS, cells, strength

    pairs, points = d["pairs"], d["sweep"]["points"]
    output.table(out, [f">{name}" for name in COLUMNS], map(cells, points))
    output.say(out, f"\nNLL of {d['sweep']['nll_of']}; {strength(d)}\n")
    said = [
        f"{r['name']}: rank {r['rank']}, {r['steps']} steps, best at {r['best']}"
        for r in d["rounds"]
    ]
    cut, dropped = pairs["cut"], pairs["left_out"]
    middle = len(points) // 2
    output.facts(
        out,
        [
            ("written", target),
            ("rank", d["rank"]),
            ("rounds", "; ".join(said)),
            ("pairs", f"{pairs['trained']:,} trained on, {pairs['held_out']:,} held out"),
            ("too long", f"{output.count(cut, 'prompt')} lost the beginning" if cut else None),
            (
                "left out",
                f"{output.count(dropped, 'pair')} with longer answers" if dropped else None,
            ),
            *(
                (f"text at {points[at]['c']:g}", points[at]["text"])
                for at in (middle - 2, middle, middle + 2)
            ),
        ],
    )
