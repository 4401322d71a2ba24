"""How far what a target predicts is from what the adapter should make of it.

    tokens    both bases have the same ones: KL(goal ‖ target) of the next token
    spans     other tokens, causal models: of the text between two places where tokens of both end,
              whether it is what the text has: p log(p/q) + (1 − p) log((1 − p)/(1 − q)) of the
              chance p that it should have, and the target's q
    vectors   encoders, other tokens or no head: KL as for tokens, of which texts each is most like
              (`judge_vectors.py`)
    states    anything else: ½‖h_t − (h_t⁰ + M (h_s' − h_s))‖² of the last hidden
              states, M the ridge regression of the target's on the source's

What is asked for is the change that the adapter makes, so one that does nothing asks for nothing.
With s and s' what the source predicts without and with it, that change is a way from s to s' on
which as much as possible stays where it is,

    x stays with chance k(x) = min(1, s'(x)/s(x)),  what leaves arrives at y by (s'(y) − s(y))₊

and the goal is where this way leads from the bare target's t: t k + Σ_x t(x) (1 − k(x)) · (s' − s)₊
/ Σ (s' − s)₊, which is s' where t = s. (Ratios, t s'/s, go wrong where the bases disagree: what the
adapter makes likely is then made so twice.)

All is summed over the tokens of both that end together. Spans see no more of what is predicted than
whether it is what the text has, but that is seen whatever the tokens are; mapped states would lose
most of the effect (on the demo's bases an adapter that was fitted to these kept .10 of its lift
while its states looked right). The share of the divergence that an update takes away foretells how
much of the adapter's lift it keeps.

Source: of the way, the maximal coupling, as in Leviathan et al., Fast inference from transformers
via speculative decoding (2022), arXiv:2211.17192.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import MismatchError
from ...lowrank import LowRank
from ..align.bases import Base
from ..align.batches import Batch, Input
from ..align.covariances import Moments, moments_of
from ..align.recording import adapted, run
from .judge_vectors import anchors, likeness
from .maps import ridge

Modules = Mapping[str, LowRank]
Goal = Callable[[Batch], Tensor]

_REMEMBERED = 1 << 30  # bytes of goals that are kept rather than made again
_SURE = 1e-6  # a chance is never nearer to 0 or 1


@dataclass(frozen=True, eq=False)
class Judge:
    """The two bases, the adapter, and by what predictions are compared.

    Args:
        source, target: bases. adapter: {path in the source: update}.
        by: "tokens", "spans", "vectors" or "states". between: M (d_s, d_t), for states.
        others: what `judge_vectors.anchors` gave for either base, for vectors.
    """

    source: Base
    target: Base
    adapter: Modules
    by: str
    between: Tensor | None = None
    others: tuple[Tensor, Tensor] | None = None

    def goal(self, batch: Batch) -> Tensor:
        """What the target should say: what it says, changed as the adapter changes the source."""
        with torch.no_grad():
            before = self._said(self.source, batch.source)
            with adapted(self.source.model, self.adapter):
                after = self._said(self.source, batch.source)
            base = self._said(self.target, batch.target)
            if self.between is not None:
                change = (after - before).double()
                return base + (change @ self.between.to(change.device)).to(base)
            if self.by == "spans":
                base, before, after = map(_both, (base, before, after))
                return _carried(base, before, after)[:, 0]
            return _carried(base, before, after)

    def said(self, batch: Batch) -> Tensor:
        """What the target says: log-probabilities (n, tokens) or (texts, others), log-chances
        (spans,), or the last hidden states (n, d_t).
        """
        return self._said(self.target, batch.target)

    def _said(self, base: Base, given: Input) -> Tensor:
        ids, mask, rows = (x.to(base.device) for x in (given.ids, given.mask, given.rows))
        found: Tensor
        if self.others is not None:
            found = likeness(base, given, self.others[base is self.target])
        elif self.by == "states":
            found = run(base.model, ids, mask, ())[0].flatten(0, 1)[rows]
        else:
            scores = run(base.model, ids, mask).logits.float().log_softmax(-1)
            by_token = self.by == "tokens"
            found = scores.flatten(0, 1)[rows] if by_token else _spans(scores, ids, rows)
        if not bool(found.isfinite().all()):
            raise MismatchError(
                f"what the {base.side} predicts on these texts is NaN or infinite: run that base "
                "in a type of larger range (bfloat16 or float32)"
            )
        return found

    def distance(self, goal: Tensor, said: Tensor) -> Tensor:
        """The divergence of the two, summed."""
        if self.by == "states":
            return (said - goal).square().sum() / 2
        if self.by == "spans":
            goal, said = _both(goal), _both(said)
        return (goal.exp() * (goal - said)).sum()

    def value(self, modules: Modules, batches: Sequence[Batch], goal: Goal | None = None) -> float:
        """The divergence of the target with these updates, a pair of tokens.

        Args:
            goal: of a batch, where it is remembered.
        """
        total, count = 0.0, 0
        with torch.no_grad():
            for batch in batches:
                wanted = self.goal(batch) if goal is None else goal(batch)
                with adapted(self.target.model, modules):
                    total += float(self.distance(wanted, self.said(batch)))
                count += batch.count
        return total / max(count, 1)


def remembered(judge: Judge) -> Goal:
    """`Judge.goal`, each batch's made once as far as they fit into a GiB."""
    kept: dict[int, tuple[Batch, Tensor]] = {}  # with the batch, so that its id stays its own
    room = _REMEMBERED

    def goal(batch: Batch) -> Tensor:
        nonlocal room
        if id(batch) in kept:
            return kept[id(batch)][1]
        found = judge.goal(batch)
        if found.nbytes <= room:
            kept[id(batch)], room = (batch, found), room - found.nbytes
        return found

    return goal


def judge_of(source: Base, target: Base, adapter: Modules, batches: Sequence[Batch]) -> Judge:
    """The judge of an adapter, with M fitted on these batches where it is needed."""
    heads = _head(source.model), _head(target.model)
    if None not in heads:
        same = dict(source.vocabulary) == dict(target.vocabulary)
        if same and len(heads[0].weight) == len(heads[1].weight):
            return Judge(source, target, adapter, "tokens")
        if "decoder" in source.depth and "decoder" in target.depth:
            return Judge(source, target, adapter, "spans")
    if all("decoder" not in base.depth for base in (source, target)):
        given = [batch.source for batch in batches], [batch.target for batch in batches]
        others = anchors(source, given[0]), anchors(target, given[1])
        return Judge(source, target, adapter, "vectors", others=others)
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


def _carried(base: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Where the least way from `before` to `after` leads from `base`; log-chances (n, outcomes)."""
    change = after - before
    leaving = -change.clamp_max(0).expm1() * base.exp()
    arriving = (after.exp() * -(-change.clamp_min(0)).expm1()).double()
    tiny = torch.finfo(torch.float32).tiny
    shares = arriving / arriving.sum(-1, keepdim=True).clamp_min(tiny)
    found = (base.exp() - leaving).double() + leaving.double().sum(-1, keepdim=True) * shares
    return found.clamp_min(tiny).log().to(base)


def _both(chance: Tensor) -> Tensor:
    """(n, 2): the log-chances that it is so, and that it is not."""
    p = chance.exp().clamp(_SURE, 1 - _SURE)
    return torch.stack([p.log(), torch.log1p(-p)], 1)
