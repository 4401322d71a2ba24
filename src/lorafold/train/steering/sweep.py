"""What a dial does along its whole way, and what that costs: a row of figures for each strength.

Two points don't tell a dial: the base itself may lie on a ridge, from which both ways lead down,
and what is won at c = 1 may be lost at 2. Beside the trait there stand, at each c, how far
predictions moved, what became of text that has nothing to do with it, and whether the model repeats
itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ...attach import Live
from ...layers.modes import evaluating
from ..many import IGNORED
from .barrier import aggregated, token_kl
from .calibrate import At, moved_text, the_only
from .pairs import pairs_of
from .tokens import (
    SIDES,
    Tokens,
    batch_of,
    both_logits,
    context_of,
    device_of,
    encoded,
    filled,
    logits_of,
    mean_logp,
    predicted,
    prompts_for,
)

Progress: TypeAlias = "Callable[[int, int, str], None]"

STRENGTHS = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
ROWS, GRAM = 16, 4  # of a batch; tokens that count as repeated


@dataclass(frozen=True)
class Point:
    """A model at one strength; all but `text` are means over held-out pairs, nats a token.

    Args:
        c: the strength. margin: log π(chosen) − log π(rejected), beyond the base's. preferred:
            share of the pairs whose chosen answer is the likelier. kl: KL(π ‖ π₀) over both
            answers. kl_text: the 95th percentile of it over greedy continuations. nll: of text that
            has nothing to do with the trait. repeated: share of the continuations' runs of four
            tokens that were there before. score: what `score` gives the continuations, a mean;
            None without. text: the first continuation.
    """

    c: float
    margin: float
    preferred: float
    kl: float
    kl_text: float
    nll: float
    repeated: float
    score: float | None
    text: str


@dataclass(frozen=True)
class Sweep:
    """Points along a dial.

    Args:
        points: by c. nll_of: what the NLL is measured on, in words. pairs: how many were held out.
    """

    points: tuple[Point, ...]
    nll_of: str
    pairs: int

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    def at(self, c: float) -> Point:
        """The point nearest to a strength."""
        return min(self.points, key=lambda p: abs(p.c - c))

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"nll_of": self.nll_of, "pairs": self.pairs, "points": [asdict(p) for p in self]}


def sweep(
    live: Live,
    tokenizer: Any,
    pairs: Sequence[Any],
    *,
    strengths: Sequence[float] = STRENGTHS,
    name: str | None = None,
    texts: Sequence[str] = (),
    tokens: int = 32,
    score: Callable[[str], float] | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """Run an adapter at each strength on pairs that it has not seen.

    Args:
        live: the model's handle. tokenizer: of the model.
        pairs: `Pair`s, or rows with prompt, chosen and rejected. strengths: of c.
        name: of the adapter; the only one attached when None.
        texts: that have nothing to do with the trait, for the NLL; the pairs' prompts when empty.
        tokens: of a continuation. score: from a continuation to how much of the trait it has.
        progress: is called with (done, total, stage).

    Raises:
        MismatchError: rows that are no pairs; as `Live.use`.
    """
    own = the_only(live) if name is None else name
    held = encoded(pairs_of(pairs), tokenizer, context_of(live.model)).pairs
    scales = Scales.of(live.model, tokenizer, held, texts, tokens, score)
    return swept(live.model, lambda c: live.use(own, c=c), scales, strengths, progress)


def swept(
    model: nn.Module,
    at: At,
    scales: Scales,
    strengths: Sequence[float] = STRENGTHS,
    progress: Progress | None = None,
) -> Sweep:
    """The same of anything that has a strength."""
    points = []
    for n, c in enumerate(strengths):
        if progress is not None:
            progress(n, len(strengths), f"measuring at c = {c:g}")
        points.append(scales.point(model, at, c))
    return Sweep(tuple(points), scales.nll_of, len(scales.pairs))


@dataclass(frozen=True)
class Scales:
    """What a model is measured on, however it is steered.

    Args:
        tokenizer: of the model. pairs: held out. others: tokens of unrelated text, a row each; the
            prompts when None. tokens, score: see `sweep`.
    """

    tokenizer: Any
    pairs: Sequence[Tokens]
    others: Sequence[Sequence[int]] | None
    tokens: int
    score: Callable[[str], float] | None

    @staticmethod
    def of(
        model: nn.Module,
        tokenizer: Any,
        pairs: Sequence[Tokens],
        texts: Sequence[str],
        tokens: int,
        score: Callable[[str], float] | None = None,
    ) -> Scales:
        """The same, with texts as the model reads them: what fits the context."""
        rows = [tokenizer(text)["input_ids"][: context_of(model)] for text in texts]
        found = [row for row in rows if len(row) > 1] or None
        return Scales(tokenizer, pairs, found, tokens, score)

    @property
    def nll_of(self) -> str:
        """What the NLL is measured on, in words."""
        if self.others is None:
            return "the prompts"
        return f"{len(self.others)} other text{'' if len(self.others) == 1 else 's'}"

    def point(self, model: nn.Module, at: At, c: float) -> Point:
        """All figures at one strength."""
        margins, wins, kl = self._answers(model, at, c)
        prompts = prompts_for(model, self.pairs, self.tokens)
        text, moved = moved_text(model, at, c, prompts, self.tokens)
        rows = [row[there].tolist() for row, there in zip(text.tokens, text.written, strict=True)]
        written = [str(self.tokenizer.decode(row)) for row in rows]
        scored = None if self.score is None else [float(self.score(w)) for w in written]
        return Point(
            float(c),
            float(margins.mean()),
            float(wins.float().mean()),
            float(kl.mean()),
            float(aggregated(moved, "p95")),
            self._nll(model, at, c),
            repeated(rows),
            None if scored is None else sum(scored) / len(scored),
            written[0],
        )

    def kl(self, model: nn.Module, at: At, c: float) -> float:
        """The mean KL over both answers alone, nats a token."""
        return float(self._answers(model, at, c)[2].mean())

    def margin(self, model: nn.Module, at: At, c: float) -> float:
        """The mean margin gained alone, nats a token."""
        return float(self._answers(model, at, c)[0].mean())

    def _answers(self, model: nn.Module, at: At, c: float) -> tuple[Tensor, Tensor, Tensor]:
        """Of each pair the margin gained, and whether chosen is the likelier; KL of each token."""
        margins, wins, kls = [], [], []
        with evaluating(model):
            for k in range(0, len(self.pairs), ROWS):
                batch = batch_of(self.pairs[k : k + ROWS], device_of(model))
                with at(0.0):
                    base = both_logits(model, batch)
                with at(c):
                    now = both_logits(model, batch)
                before, after = (_margin(found, batch) for found in (base, now))
                margins.append(after - before)
                wins.append(after > 0)
                kls += [predicted(token_kl(now[s], base[s]), batch[s]["labels"]) for s in SIDES]
        return torch.cat(margins).cpu(), torch.cat(wins).cpu(), torch.cat(kls).cpu()

    def _nll(self, model: nn.Module, at: At, c: float) -> float:
        """Mean over all tokens of the unrelated rows but their first, nats."""
        rows = [p.prompt for p in self.pairs] if self.others is None else self.others
        rows = list(dict.fromkeys(tuple(row) for row in rows if len(row) > 1))
        total = count = 0.0
        with evaluating(model), at(c):
            for k in range(0, len(rows), ROWS):
                some = rows[k : k + ROWS]
                given = filled(some, [1] * len(some), device_of(model))
                there = (given["labels"][:, 1:] != IGNORED).sum(1)
                logp = mean_logp(logits_of(model, given), given["labels"])
                total -= float((logp * there).sum())
                count += float(there.sum())
        return total / max(count, 1.0)


def _margin(logits: Mapping[str, Tensor], batch: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """log π(chosen) − log π(rejected) of each pair, nats a token."""
    chosen, rejected = (mean_logp(logits[s], batch[s]["labels"]) for s in SIDES)
    return chosen - rejected


def repeated(rows: Sequence[Sequence[int]]) -> float:
    """The share of all runs of four tokens that stood in the same row before."""
    grams = again = 0
    for row in rows:
        found = Counter(tuple(row[k : k + GRAM]) for k in range(len(row) - GRAM + 1))
        grams += found.total()
        again += found.total() - len(found)
    return again / grams if grams else 0.0
