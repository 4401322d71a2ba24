"""How far an adapter moves predictions from where they were, and a price on too much of it.

The reverse divergence KL(π ‖ π₀) of each token, over the whole vocabulary, or over the K tokens
that π₀ finds likeliest and one bucket of all others. The bucket matters: a divergence of the K
alone, renormalised, is 0 for a model that gives half of everything to tokens outside of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import MismatchError

Aggregate: TypeAlias = Literal["mean", "rmse", "p95", "max"]
AGGREGATES = get_args(Aggregate)


def token_kl(logits: Tensor, reference: Tensor, top: int | None = None) -> Tensor:
    """KL(π ‖ π₀) of each position, nats, (…).

    Args:
        logits: (…, vocabulary) of π. reference: the same of π₀.
        top: K, to compare the reference's K likeliest tokens and the rest as one; None compares
            all.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    p, q = (F.log_softmax(x.to(wide), -1) for x in (logits, reference))
    if top is not None and top < p.shape[-1]:
        at = q.topk(top, -1).indices
        p, q = (_with_others(x, at) for x in (p, q))
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)


def _with_others(logp: Tensor, at: Tensor) -> Tensor:
    """The chosen tokens' log probabilities, and that of all others together."""
    kept = logp.gather(-1, at)
    others = logp.scatter(-1, at, -torch.inf).logsumexp(-1, keepdim=True)
    # Where nothing is left outside, its logarithm is −∞: a floor below any real one instead.
    return torch.cat([kept, others.clamp_min(torch.finfo(logp.dtype).min / 2)], -1)


def aggregated(kl: Tensor, how: str) -> Tensor:
    """One number of a vector of tokens' divergences; 0 of none."""
    if not kl.numel():
        return kl.sum()
    if how == "mean":
        return kl.mean()
    if how == "rmse":
        # The root's slope at 0 is none: as at the start, where nothing has moved.
        square = kl.square().mean()
        return torch.where(square > 0, square.clamp_min(torch.finfo(kl.dtype).tiny).sqrt(), square)
    if how == "p95":
        return torch.quantile(kl, 0.95)
    return kl.max()


@dataclass(frozen=True)
class KLBarrier:
    """A price λ · max(0, KL − hinge): free up to the hinge, so that it is a barrier and no pull.

    Args:
        lambda_: λ. hinge: nats that cost nothing.
        aggregate: of tokens: "mean", "rmse" (the root of the mean square: few tokens that moved
            much count more), "p95" (their 95th percentile) or "max".
        top: K of `token_kl`; None for the whole vocabulary.

    Raises:
        MismatchError: an option out of range, naming it.
    """

    lambda_: float = 0.3
    hinge: float = 0.5
    aggregate: Aggregate = "rmse"
    top: int | None = None

    def __post_init__(self) -> None:
        for name in ("lambda_", "hinge"):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not 0 <= value < 1e9
            ):
                raise MismatchError(f"{name} must be a number of at least 0, found {value!r}")
        if self.aggregate not in AGGREGATES:
            raise MismatchError(
                f"aggregate must be one of {', '.join(AGGREGATES)}; found {self.aggregate!r}"
            )
        if self.top is not None and (not isinstance(self.top, int) or self.top < 1):
            raise MismatchError(f"top must be a whole number of at least 1, found {self.top!r}")

    def __call__(self, kl: Tensor) -> Tensor:
        """The price of tokens' divergences (tokens,)."""
        return self.lambda_ * (aggregated(kl, self.aggregate) - self.hinge).clamp_min(0)
