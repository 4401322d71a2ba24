"""Which way of steering wins most of a trait at equal KL from the base, and at what cost beside it?

Traits of the packaged byte-level base: prose in upper case against lower case (a style that it
never writes), words in brackets against words said twice (rules that it was pretrained to follow
from examples). Every way has a strength, which is set so that the mean KL from the base, over both
answers of the same held-out pairs, is the same; then its effect is measured, at both signs:

- dial: one adapter by `lf.train.steer`;
- prompting: three examples before the prompt, the strength weighs the difference of the
  predictions with and without them (1 is plain prompting, which is told apart, too);
- vector: the difference of mean activations, chosen minus rejected, added behind the layer that
  does best on pairs for training;
- arithmetic: an adapter fine-tuned on the chosen answers minus one on the rejected;
- null: a random adapter, every module of the dial's norm.

The effect is the margin of chosen over rejected, nats a token, beyond the base's, towards the side
that the sign asks for; the share of pairs whose asked-for answer becomes the likelier, and the
share of greedy text that has the trait. The cost is NLL on other text, and repetition.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from _common import arguments, report
from torch import Tensor, nn

import lorafold as lf
from lorafold.demo.model import base_dir, data_dir
from lorafold.train.steering.calibrate import At, strength_at
from lorafold.train.steering.pairs import Pair, pairs_of
from lorafold.train.steering.sweep import Point, Scales
from lorafold.train.steering.tokens import Tokens, batch_of, batches, encoded, logits_of

QUESTION = "steering at equal KL: one dial, prompting, a vector, adapters' arithmetic, and noise"
LEVELS = (0.1, 0.3)  # nats a token
TRAIN, HELD, TEXTS, TOKENS, EXAMPLES = 64, 12, 6, 12, 3
STEPS, BATCH, RANK, LR = 20, 4, 8, 5e-3


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=3)


# Traits


@dataclass(frozen=True)
class Trait:
    """Pairs for training and held out, and how much of the chosen side a text has (0 to 1)."""

    name: str
    train: list[Pair]
    held: list[Pair]
    score: Callable[[str], float]

    @staticmethod
    def of(name: str, rows: list[dict[str, str]], score: Callable[[str], float]) -> Trait:
        pairs = pairs_of({r["prompt"]: r for r in rows}.values())
        random.Random(0).shuffle(pairs)
        return Trait(name, pairs[HELD : HELD + TRAIN], pairs[:HELD], score)


def upper_case() -> Trait:
    """Prose, its words in upper or in lower case."""
    rows = []
    for line in packaged("telegram"):
        words = line.removesuffix(" STOP").lower().split()
        if len(words) > 5:
            rest = " ".join(words[2:])[:20]
            prompt = " ".join(words[:2]) + " "
            rows.append({"prompt": prompt, "chosen": rest.upper(), "rejected": rest})

    def score(text: str) -> float:
        letters = [c for c in text if c.isalpha()]
        return sum(c.isupper() for c in letters) / max(len(letters), 1)

    return Trait.of("upper case", rows, score)


def in_brackets() -> Trait:
    """A word to be put in brackets, or to be said twice."""
    words = dict.fromkeys(line.partition(" -> ")[0] for line in packaged("uppercase"))
    rows = [
        {"prompt": f"{w} -> ", "chosen": f"({w})\n", "rejected": f"{w} {w}\n"}
        for w in words
        if 4 <= len(w) <= 8
    ]
    return Trait.of("brackets", rows, lambda text: float(text.startswith("(")))


def packaged(name: str) -> list[str]:
    """Lines that neither the base nor the packaged adapters were trained on."""
    return (data_dir() / "heldout" / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def other_texts() -> list[str]:
    """Text that has nothing to do with either trait: help screens, HTML, code."""
    found = []
    for name in ("argparse_help", "html_help", "tkinter_code"):
        text = "\n".join(packaged(name))
        found += [text[k : k + 160] for k in range(0, 160 * TEXTS // 3, 160)]
    return found


# Ways


class Prompted(nn.Module):
    """A model that reads examples first, weighed by a strength; below 0 those of the other side."""

    def __init__(self, model: nn.Module, chosen: list[int], rejected: list[int]) -> None:
        super().__init__()
        self.inner, self.prefixes, self.strength = model, (chosen, rejected), 0.0

    @contextlib.contextmanager
    def at(self, c: float) -> Iterator[None]:
        before, self.strength = self.strength, c
        try:
            yield
        finally:
            self.strength = before

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> dict[str, Tensor]:
        plain = {"input_ids": input_ids, "attention_mask": attention_mask}
        plain["position_ids"] = (attention_mask.cumsum(1) - 1).clamp_min(0)
        base = logits_of(self.inner, plain).log_softmax(-1)
        if self.strength == 0:
            return {"logits": base}
        ids = torch.tensor(self.prefixes[int(self.strength < 0)]).expand(len(input_ids), -1)
        mask = torch.cat([torch.ones_like(ids), attention_mask], 1)
        given = {"input_ids": torch.cat([ids, input_ids], 1), "attention_mask": mask}
        given["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        shown = logits_of(self.inner, given)[:, ids.shape[1] :].log_softmax(-1)
        return {"logits": base + abs(self.strength) * (shown - base)}

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, **_: Any
    ) -> Tensor:
        for _step in range(max_new_tokens):
            new = self(input_ids, attention_mask)["logits"][:, -1].argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, new], 1)
            attention_mask = torch.cat([attention_mask, torch.ones_like(new)], 1)
        return input_ids


def prompted(model: nn.Module, tokenizer: Any, trait: Trait, seed: int) -> Prompted:
    """Examples of either side, the same prompts."""
    some = random.Random(seed).sample(trait.train, EXAMPLES)
    texts = (
        "".join(f"{p.prompt}{getattr(p, side).rstrip()}\n" for p in some)
        for side in ("chosen", "rejected")
    )
    return Prompted(model, *(tokenizer(text)["input_ids"] for text in texts))


def vectors(model: Any, pairs: list[Tokens]) -> list[Tensor]:
    """Behind each layer, the mean over answers' tokens of chosen, minus that of rejected."""
    batch, means = batch_of(pairs), {}
    for side, given in batch.items():
        there = given["labels"] != -100
        with torch.no_grad():
            ids, mask = given["input_ids"], given["attention_mask"]
            out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        means[side] = [h[there].mean(0) for h in out.hidden_states[1:-1]]
    return [a - b for a, b in zip(means["chosen"], means["rejected"], strict=True)]


def adding(model: Any, layer: int, vector: Tensor) -> At:
    """A vector added behind a layer, c times."""

    @contextlib.contextmanager
    def at(c: float) -> Iterator[None]:
        def hook(_: Any, __: Any, out: Any) -> Any:
            first = out[0] if isinstance(out, tuple) else out
            moved = first + c * vector
            return (moved, *out[1:]) if isinstance(out, tuple) else moved

        handle = model.model.layers[layer].register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    return at


def best_vector(model: Any, tokenizer: Any, train: list[Tokens]) -> tuple[At, int]:
    """The layer whose vector wins most on pairs for training, both signs, at the higher level."""
    scales = Scales(tokenizer, train[:8], None, TOKENS, None)
    found = []
    for layer, vector in enumerate(vectors(model, train[:32])):
        at, gained = adding(model, layer, vector), 0.0
        for sign in (1.0, -1.0):
            c = level_of(model, at, scales, LEVELS[-1], sign)
            gained += 0.0 if c is None else sign * scales.margin(model, at, c)
        found.append((gained, layer, at))
    _, layer, at = max(found, key=lambda one: one[0])
    return at, layer


def fine_tuned(model: Any, train: list[Tokens], side: str, seed: int) -> lf.Adapter:
    """A plain adapter, trained on one side's answers."""
    live = lf.attach(model, lf.LoRA(rank=RANK, alpha=2 * RANK, seed=seed))
    optimizer = torch.optim.Adam(live.parameters(), LR)
    rows = batches(train, BATCH, seed)
    for step in range(STEPS):
        batch = batch_of(next(rows))[side]
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - step / STEPS)
        optimizer.step()
    adapter = live.adapter("default")
    live.detach()
    return adapter


def random_like(adapter: lf.Adapter, seed: int) -> lf.Adapter:
    """Random factors of the same ranks, every module of the same norm."""
    g = torch.Generator().manual_seed(seed)
    made = {}
    for path, u in adapter.items():
        A, B = (torch.randn(t.shape, generator=g) for t in (u.A, u.B))
        new = lf.LowRank(A, B)
        made[path] = (u.norm() / new.norm()) * new
    return lf.Adapter(made)


# Measuring


def level_of(model: nn.Module, at: At, scales: Scales, kl: float, start: float) -> float | None:
    """The strength of a mean KL, on the side of `start`; None where it is not met within 5 %."""
    found = strength_at(lambda c: (torch.zeros(0), scales.kl(model, at, c)), kl, start)
    return found.c if found.converged else None


def row_of(point: Point, base: Point, sign: float) -> dict[str, float]:
    """What a point is worth, towards the side of a sign."""
    asked = point.preferred if sign > 0 else 1 - point.preferred
    before = base.preferred if sign > 0 else 1 - base.preferred
    assert point.score is not None
    assert base.score is not None
    return {
        "margin": sign * point.margin,
        "won": asked - before,
        "in text": sign * (point.score - base.score),
        "NLL": point.nll - base.nll,
        "repeated": point.repeated - base.repeated,
        "kl": point.kl,
    }


def one(trait: Trait, seed: int) -> dict[str, Any]:
    """All ways of one trait and seed: {way: {level: {sign: row}}}."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_dir())
    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(base_dir(), dtype=torch.float32).eval()
    train = list(encoded(trait.train, tokenizer, 256).pairs)
    held = encoded(trait.held, tokenizer, 256).pairs
    scales = Scales.of(model, tokenizer, held, other_texts(), TOKENS, trait.score)
    shown = prompted(model, tokenizer, trait, seed)
    at, layer = best_vector(model, tokenizer, train)
    ways: dict[str, tuple[nn.Module, At]] = {
        "prompting": (shown, shown.at),
        "vector": (model, at),
    }
    arithmetic = {s: fine_tuned(model, train, s, seed) for s in ("chosen", "rejected")}
    kind = lf.LoRA(rank=RANK, alpha=2 * RANK)
    own: dict[str, Any] = {"steps": STEPS, "batch": BATCH, "every": 10, "lr": LR, "seed": seed}
    dial = lf.train.steer(model, tokenizer, trait.train, kind, **own)
    dial.live.detach()
    null = random_like(dial.adapter, seed)
    live = lf.attach(model, {"dial": dial.adapter, "null": null, **arithmetic})
    ways["dial"] = model, lambda c: live.use("dial", c=c)
    ways["arithmetic"] = model, lambda c: live.use({"chosen": c, "rejected": -c})
    ways["null"] = model, lambda c: live.use("null", c=c)
    base = scales.point(model, ways["dial"][1], 0.0)
    found: dict[str, Any] = {"layer": layer, "levels": {}}
    for name, (whole, way) in ways.items():
        for sign in (1.0, -1.0):
            c: float | None = None
            for kl in LEVELS:
                c = level_of(whole, way, scales, kl, c or sign)
                row = None if c is None else row_of(scales.point(whole, way, c), base, sign)
                found["levels"][f"{name}, {kl:g}, {sign:+.0f}"] = row
    plain = [row_of(scales.point(shown, shown.at, s), base, s) for s in (1.0, -1.0)]
    found["plain prompting"] = {k: statistics.mean(r[k] for r in plain) for k in plain[0]}
    return found


def main() -> None:
    args = arguments(QUESTION, options)
    traits = [upper_case(), in_brackets()]
    runs: dict[str, list[Any]] = {}
    for trait in traits:
        for seed in range(args.seeds):
            runs.setdefault(trait.name, []).append(one(trait, seed))
            print(f"{trait.name}, seed {seed}: done", file=sys.stderr, flush=True)
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    for name, found in runs.items():
        for way in ("dial", "prompting", "vector", "arithmetic", "null"):
            for kl in LEVELS:
                keys = [f"{way}, {kl:g}, {sign}" for sign in ("+1", "-1")]
                there = [r["levels"][k] for r in found for k in keys]
                rows.append(summary(name, way, kl, there))
        plain = [r["plain prompting"] for r in found]
        rows.append(
            summary(name, "plain prompting", statistics.mean(r["kl"] for r in plain), plain)
        )
        result[name] = {
            "pairs": {"train": TRAIN, "held": HELD},
            "layers": [r["layer"] for r in found],
            "runs": found,
        }
    result["rows"] = rows
    report(QUESTION, rows, result, args.save)


def summary(trait: str, way: str, kl: float, rows: list[dict[str, float] | None]) -> dict[str, Any]:
    """Means over seeds and signs of what met its level; the margin's spread over them."""
    there = [r for r in rows if r is not None]
    said: dict[str, Any] = {"trait": trait, "way": way, "KL": round(kl, 3), "met": len(there)}
    for name in ("margin", "won", "in text", "NLL", "repeated"):
        values = [r[name] for r in there]
        said[name] = statistics.mean(values) if values else None
        if name == "margin":
            said["±"] = statistics.stdev(values) if len(values) > 1 else None
    return said


if __name__ == "__main__":
    main()
