"""How far a target with an update is from predicting what the source with its adapter predicts.

The divergence KL(source with adapter ‖ target), summed over the tokens of both that end together,
of the distributions of the next token. Where both bases have the same tokens, the source's is what
it says. Else it is the target's own head on what its last hidden state h_t would be with the
adapter's effect in it, h_t + M (h_s' − h_s), M the ridge regression of the one base's last hidden
states on the other's. A model without a head is judged by that state itself, ½‖h − goal‖².

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


@dataclass(frozen=True, eq=False)
class Judge:
    """The two bases, the adapter, and what stands between their predictions.

    Args:
        source, target: bases. adapter: {path in the source: update}.
        between: M (d_s, d_t); None where both have the same tokens.
    """

    source: Base
    target: Base
    adapter: Modules
    between: Tensor | None = None

    def goal(self, batch: Batch) -> Tensor:
        """What the target should say at the paired tokens: (n, tokens) of log-probabilities, or
        (n, d_t), the hidden state of a model without a head.
        """
        with torch.no_grad():
            with adapted(self.source.model, self.adapter):
                after = _said(self.source, batch.source, hidden=self.between is not None)
            if self.between is None:
                return after.float().log_softmax(-1)
            before = _said(self.source, batch.source, hidden=True)
            base = _said(self.target, batch.target, hidden=True)
            change = (after - before).double() @ self.between.to(after.device)
            found = base + change.to(base)
            head = _head(self.target.model)
            return found if head is None else head(found).float().log_softmax(-1)

    def said(self, batch: Batch) -> Tensor:
        """What the target says at the paired tokens, as `goal` has it."""
        hidden = _head(self.target.model) is None
        found = _said(self.target, batch.target, hidden=hidden)
        return found if hidden else found.float().log_softmax(-1)

    def distance(self, goal: Tensor, said: Tensor) -> Tensor:
        """The divergence of the two, summed over their tokens."""
        if _head(self.target.model) is None:
            return (said - goal).square().sum() / 2
        return (goal.exp() * (goal - said)).sum()

    def drawn(self, said: Tensor, generator: torch.Generator) -> Tensor:
        """A number whose gradients are, in square, the curvature of `distance` on average."""
        if _head(self.target.model) is None:
            noise = torch.randn(said.shape, generator=generator).to(said)
            return (said * noise).sum()
        chance = said.detach().exp().cpu()
        token = torch.multinomial(chance, 1, generator=generator)[:, 0].to(said.device)
        return torch.nn.functional.nll_loss(said, token, reduction="sum")

    def value(self, modules: Modules, batches: Sequence[Batch]) -> float:
        """The divergence of the target with these updates, a token."""
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
    if _same_tokens(source, target):
        return Judge(source, target, adapter)
    sums: Moments | None = None
    with torch.no_grad():
        for batch in batches:
            x_s = _said(source, batch.source, hidden=True)
            x_t = _said(target, batch.target, hidden=True)
            m = moments_of(x_s, x_t)
            sums = m if sums is None else sums + m
    assert sums is not None
    return Judge(source, target, adapter, ridge(sums.centred()).forward)


def _same_tokens(source: Base, target: Base) -> bool:
    heads = _head(source.model), _head(target.model)
    if None in heads or dict(source.vocabulary) != dict(target.vocabulary):
        return False
    return len({len(head.weight) for head in heads if head is not None}) == 1


def _head(model: nn.Module) -> Any:
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def _said(base: Base, given: Input, *, hidden: bool) -> Tensor:
    """(n, tokens) scores or (n, d) last hidden states, at the paired tokens."""
    ids, mask, rows = (x.to(base.device) for x in (given.ids, given.mask, given.rows))
    found = run(base.model, ids, mask, ())[0] if hidden else run(base.model, ids, mask).logits
    flat: Tensor = found.flatten(0, 1)[rows]
    return flat
