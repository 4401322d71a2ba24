"""From scores to tokens: each row by its own rules, and by draws of its own.

Every draw is one number u of the request's own generator, looked up in the cumulated probabilities
of its row; so nothing depends on who runs beside it, nor on the order of the rows. Rows that cut
(`top_k`, `top_p`) look at the likeliest few first: only where these are not enough is all sorted.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import LorafoldError
from ..engine import Sampling

_LEAST = -9999.0  # the log-probability of what can't be, as the protocol has it
_FEW = 256  # likeliest tokens that are looked at first
_UNSCORED = "the model's scores for this request are no finite numbers: a smaller c may do"


class UnscoredError(LorafoldError):
    """A request whose scores were no finite numbers."""

    def __init__(self) -> None:
        super().__init__(_UNSCORED)


@dataclass
class Draws:
    """What one request's choices depend on: its rules, its generator, and what it has chosen.

    Args:
        rules: as it was asked for.

    Attributes:
        chosen: how often each token was chosen. count: tokens chosen.
    """

    rules: Sampling
    chosen: Counter[int] = field(default_factory=Counter)
    count: int = 0

    def __post_init__(self) -> None:
        seed = self.rules.seed
        self._random = random.Random(
            int.from_bytes(os.urandom(16), "big") if seed is None else seed
        )

    def draw(self) -> float:
        """The next number in [0, 1)."""
        return self._random.random()

    def chose(self, token: int) -> None:
        """This token was chosen."""
        self.chosen[token] += 1
        self.count += 1

    def reason(self, token: int, most: int) -> str | None:
        """Why this token, which was chosen, is the last of at most so many; None where it isn't."""
        if token in self.rules.stop and self.count > self.rules.min_new:
            return "stop"
        return "length" if self.count >= most else None

    @property
    def changes(self) -> dict[int, float]:
        """What is added to the scores of tokens now."""
        r = self.rules
        found = dict(r.bias)
        if r.presence or r.frequency:
            for token, times in self.chosen.items():
                found[token] = found.get(token, 0.0) - r.presence - r.frequency * times
        if self.count < r.min_new:
            found |= dict.fromkeys(r.stop, -torch.inf)
        return found


class Choice(NamedTuple):
    """A token that was chosen; its log-probability and the likeliest ones', where asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sampled(scores: Tensor, draws: Sequence[Draws]) -> list[Choice | None]:
    """The next token of each row.

    Args:
        scores: (rows, vocabulary), the model's. draws: of each row; what it has chosen is noted.

    Returns:
        A choice each; None for a row whose scores are no finite numbers.
    """
    finite = scores.amax(1).isfinite().tolist()  # NaN and ∞ go through
    raw, scores = scores, _changed(scores, draws)
    tokens = scores.argmax(1)
    drawn = [i for i, d in enumerate(draws) if finite[i] and d.rules.temperature > 0]
    if drawn:
        at = torch.tensor(drawn, device=scores.device)
        rules = [draws[i].rules for i in drawn]
        u = [draws[i].draw() for i in drawn]
        tokens[at] = _drawn(scores[at].float(), rules, u)
    chosen = tokens.tolist()
    told = _logprobs(raw, draws, chosen, finite)
    found: list[Choice | None] = []
    for i, (d, token) in enumerate(zip(draws, chosen, strict=True)):
        if finite[i]:
            d.chose(token)
        found.append(Choice(token, *told.get(i, ())) if finite[i] else None)
    return found


def _changed(scores: Tensor, draws: Sequence[Draws]) -> Tensor:
    """The scores with what each row adds; the same tensor where none does."""
    changes = {i: change for i, d in enumerate(draws) if (change := d.changes)}
    if not changes:
        return scores
    rows = [i for i, change in changes.items() for _ in change]
    tokens = [token for change in changes.values() for token in change]
    values = [value for change in changes.values() for value in change.values()]
    at = tuple(torch.tensor(x, device=scores.device) for x in (rows, tokens))
    more = torch.tensor(values, dtype=torch.float32, device=scores.device)
    found: Tensor = scores.float().clone().index_put(at, more, accumulate=True)
    return found


def _drawn(scores: Tensor, rules: Sequence[Sampling], u: list[float]) -> Tensor:
    """A token of each row: where the share u of its probability is reached."""
    said = [r.temperature for r in rules]
    heat = torch.tensor(said, dtype=torch.float32, device=scores.device)
    heat = heat.clamp(min=torch.finfo(heat.dtype).tiny)  # as a float it may be 0
    # From the largest down, so that nothing overflows however cold it is.
    scores = (scores - scores.amax(1, keepdim=True)) / heat[:, None]
    cut = [i for i, r in enumerate(rules) if r.top_p < 1 or 0 < r.top_k < scores.shape[1]]
    whole = sorted(set(range(len(rules))) - set(cut))
    found = torch.empty(len(rules), dtype=torch.int64, device=scores.device)
    shares = torch.tensor(u, dtype=torch.float64, device=scores.device)
    if whole:
        at = torch.tensor(whole, device=scores.device)
        found[at] = _reached(scores[at].exp(), shares[at])
    if cut:
        at = torch.tensor(cut, device=scores.device)
        found[at] = _cut(scores[at], [rules[i] for i in cut], shares[at])
    return found


def _cut(scores: Tensor, rules: Sequence[Sampling], u: Tensor) -> Tensor:
    """A token of each row, of its likeliest alone."""
    vocabulary = scores.shape[1]
    ks = torch.tensor([r.top_k or vocabulary for r in rules], device=scores.device)
    ps = torch.tensor([r.top_p for r in rules], dtype=torch.float64, device=scores.device)
    few = min(vocabulary, max([_FEW, *(r.top_k for r in rules)]))
    all_of_it = scores.exp().sum(1, dtype=torch.float64)
    while True:
        best, tokens = scores.topk(few, dim=1)
        p = best.exp().double().masked_fill(torch.arange(few, device=u.device) >= ks[:, None], 0)
        # The share of what `top_k` leaves; of everything where it leaves all.
        total = torch.where(ks <= few, p.sum(1), all_of_it)
        before = p.cumsum(1) - p
        kept = before < (ps * total)[:, None]
        if few == vocabulary or not bool((kept[:, -1] & (ks > few)).any()):
            break
        few = vocabulary
    kept[:, 0] = True
    return tokens.gather(1, _reached(p * kept, u)[:, None])[:, 0]


def _reached(p: Tensor, u: Tensor) -> Tensor:
    """Where each row's cumulated weights first exceed the share u of their sum."""
    sums = p.double().cumsum(1)
    at = torch.searchsorted(sums, (u * sums[:, -1])[:, None], right=True)[:, 0]
    last = (sums < sums[:, -1:]).sum(1)  # the last that has a weight: rounding may pass it
    return at.minimum(last)


def _logprobs(
    scores: Tensor, draws: Sequence[Draws], chosen: Sequence[int], finite: Sequence[bool]
) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
    """Of the rows that ask for them: the chosen token's, and the likeliest with theirs."""
    wanted = [i for i, d in enumerate(draws) if d.rules.top is not None and finite[i]]
    if not wanted:
        return {}
    at = torch.tensor(wanted, device=scores.device)
    logs = scores[at].float().log_softmax(1).clamp(min=_LEAST)
    own = logs.gather(1, torch.tensor([[chosen[i]] for i in wanted], device=logs.device))
    best, tokens = logs.topk(max(draws[i].rules.top or 0 for i in wanted), dim=1)
    lists = zip(wanted, own[:, 0].tolist(), tokens.tolist(), best.tolist(), strict=True)
    return {
        i: (log, tuple(zip(ids[: draws[i].rules.top], values, strict=False)))
        for i, log, ids, values in lists
    }
