"""How far a target with an update is from predicting what the source with its adapter predicts.

    tokens    both bases have the same ones: KL(source with adapter ‖ target) of the next token
    spans     other tokens, causal models: of the text between two places where tokens of both end,
              the chance p that the source with its adapter gives it and the target's q,
              p log(p/q) + (1 − p) log((1 − p)/(1 − q))
    states    no head, or no causal model: ½‖h_t − (h_t⁰ + M (h_s' − h_s))‖² of the last hidden
              states, M the ridge regression of the target's on the source's

summed over the tokens of both that end together. Spans see no more of what is predicted than
whether it is what the text has, but that is seen whatever the tokens are; mapped states would lose
most of the effect (of a divergence of 1.4 nats .6 were left on the demo's bases, and an adapter
fitted to these kept .10 of its lift while its states looked right).

The share of it that an update takes away foretells how much of the adapter's lift it keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...lowrank import LowRank
from ..align.bases import Base
from ..align.batches import Batch, Input
from ..align.covariances import Moments, moments_of
from ..align.recording import adapted, run
from .maps import ridge

Modules = Mapping[str, LowRank]

_SURE = 1e-6  # a chance is never nearer to 0 or 1


@dataclass(frozen=True, eq=False)
class Judge:
    """The two bases, the adapter, and by what predictions are compared.

    Args:
        source, target: bases. adapter: {path in the source: update}.
        by: "tokens", "spans" or "states". between: M (d_s, d_t), for states.
    """

    source: Base
    target: Base
    adapter: Modules
    by: str
    between: Tensor | None = None

    def goal(self, batch: Batch) -> Tensor:
        """What the target should say: as `said`."""
        with torch.no_grad():
            with adapted(self.source.model, self.adapter):
                after = self._said(self.source, batch.source)
            if self.between is None:
                return after
            change = (after - self._said(self.source, batch.source)).double()
            base = self._said(self.target, batch.target)
            return base + (change @ self.between.to(change.device)).to(base)

    def said(self, batch: Batch) -> Tensor:
        """What the target says: log-probabilities (n, tokens), log-chances (spans,), or the last
        hidden states (n, d_t).
        """
        return self._said(self.target, batch.target)

    def _said(self, base: Base, given: Input) -> Tensor:
        ids, mask, rows = (x.to(base.device) for x in (given.ids, given.mask, given.rows))
        found: Tensor
        if self.by == "states":
            found = run(base.model, ids, mask, ())[0].flatten(0, 1)[rows]
            return found
        scores = run(base.model, ids, mask).logits.float().log_softmax(-1)
        return scores.flatten(0, 1)[rows] if self.by == "tokens" else _spans(scores, ids, rows)

    def distance(self, goal: Tensor, said: Tensor) -> Tensor:
        """The divergence of the two, summed."""
        if self.by == "states":
            return (said - goal).square().sum() / 2
        if self.by == "spans":
            goal, said = _both(goal), _both(said)
        return (goal.exp() * (goal - said)).sum()

    def drawn(self, said: Tensor, generator: torch.Generator) -> Tensor:
        """A number whose gradients are, in square, the curvature of `distance` on average."""
        if self.by == "states":
            noise = torch.randn(said.shape, generator=generator, device=said.device)
            return (said * noise).sum()
        said = _both(said) if self.by == "spans" else said
        token = torch.multinomial(said.detach().exp(), 1, generator=generator)[:, 0]
        return torch.nn.functional.nll_loss(said, token, reduction="sum")

    def value(self, modules: Modules, batches: Sequence[Batch]) -> float:
        """The divergence of the target with these updates, a pair of tokens."""
        total, count = 0.0, 0
        with torch.no_grad():
            for batch in batches:
                goal = self.goal(batch)
                with adapted(self.target.model, modules):
                    total += float(self.distance(goal, self.said(batch)))
                count += batch.count
        return total / max(count, 1)


def judge_of(source: Base, target: Base, adapter: Modules, batches: Sequence[Batch]) -> Judge:
    """The judge of an adapter, with M fitted on these batches where it is needed."""
    heads = _head(source.model), _head(target.model)
    if None not in heads:
        same = dict(source.vocabulary) == dict(target.vocabulary)
        if same and len(heads[0].weight) == len(heads[1].weight):
            return Judge(source, target, adapter, "tokens")
        if "decoder" in source.depth and "decoder" in target.depth:
            return Judge(source, target, adapter, "spans")
    sums: Moments | None = None
    own = [Judge(base, base, {}, "states") for base in (source, target)]
    with torch.no_grad():
        for batch in batches:
            sides = [Batch(given, given, batch.held) for given in (batch.source, batch.target)]
            m = moments_of(*(judge.said(side) for judge, side in zip(own, sides, strict=True)))
            sums = m if sums is None else sums + m
    assert sums is not None
    return Judge(source, target, adapter, "states", ridge(sums.centred()).forward)


def _head(model: nn.Module) -> Any:
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def _spans(scores: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    """The log-chance of the text between each two neighbouring rows of one text.

    Args:
        scores: (batch, length, tokens) log-probabilities. ids: (batch, length). rows: (n,).
    """
    each = scores[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].double()
    upto = torch.nn.functional.pad(each.cumsum(1), (1, 0)).flatten()[rows]
    text = rows // ids.shape[1]
    return (upto[1:] - upto[:-1])[text[1:] == text[:-1]].float()


def _both(chance: Tensor) -> Tensor:
    """(n, 2): the log-chances that it is so, and that it is not."""
    p = chance.exp().clamp(_SURE, 1 - _SURE)
    return torch.stack([p.log(), torch.log1p(-p)], 1)
