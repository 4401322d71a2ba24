"""The loss that makes a dial of an adapter.

For both signs s the margin that the adapter adds at s·c to the base's own,

    m_s = s · ([log π_{sc}(chosen) − log π_{sc}(rejected)] − [log π₀(chosen) − log π₀(rejected)]),

nats a token, is pushed up to a cap, (cap − m_s)₊, and no further: what is won already has no pull
left on the text. A barrier prices how far predictions move. The two signs pull at one adapter;
where their gradients oppose each other, `conflict_averse` finds the step that serves the worse one.

Source: Liu et al., Conflict-averse gradient descent for multi-task learning (2021),
arXiv:2110.14048.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ...attach import Live
from ...errors import MismatchError
from ...words import one_of
from ..many import the_trained
from .barrier import KLBarrier, token_kl
from .tokens import SIDES, both_logits, mean_logp, predicted

Reference: TypeAlias = Literal["base", "kept"]
REFERENCES = get_args(Reference)


@dataclass(frozen=True)
class Steering:
    """What one batch says of an adapter as a dial.

    Args:
        losses: of +c and −c, scalars with gradients. margins: m_+ and m_−, means over the pairs,
            nats a token. kl: KL(π_{±c} ‖ π₀) of every token that is predicted, both signs. nll: of
            the chosen at +c and of the rejected at −c, nats a token.
    """

    losses: tuple[Tensor, Tensor]
    margins: tuple[float, float]
    kl: Tensor
    nll: tuple[float, float]

    @property
    def loss(self) -> Tensor:
        """Both losses together."""
        return self.losses[0] + self.losses[1]


def steering_loss(
    model: nn.Module,
    live: Live,
    batch: Mapping[str, Mapping[str, Any]],
    c: float = 1.0,
    *,
    barrier: KLBarrier | None = None,
    cap: float = 1.0,
    name: str | None = None,
    reference: Reference = "base",
) -> Steering:
    """The loss of a batch of pairs at ±c; `backward()` of `.loss` trains the adapter.

    Args:
        model: gives `logits` (B, T, vocabulary). live: its handle.
        batch: {"chosen": what the model is called with, "rejected": the same}, each with
            `input_ids` (B, T) and `labels`, -100 where nothing is to be predicted.
        c: the strength. barrier: the price of movement. cap: nats a token that are pushed for.
        name: of the adapter; the only trained one when None.
        reference: "base", the model at c = 0: the pristine base, unless `live.gate` is "always";
            or "kept", what the gate lets run of the rounds that are kept, at c and at −c.

    Raises:
        MismatchError: a batch without these, or options out of range.

    Not for: one-sided training (an adapter for the chosen alone), which a plain loss does.
    """
    name = the_trained(live) if name is None else name
    barrier = KLBarrier() if barrier is None else barrier
    if not c > 0 or not cap > 0:
        raise MismatchError(f"c and cap must be above 0, found {c!r} and {cap!r}")
    if reference not in REFERENCES:
        raise MismatchError(f"reference must be {one_of(REFERENCES)}, found {reference!r}")
    for side in SIDES:
        if side not in batch or not {"input_ids", "labels"} <= set(batch[side]):
            raise MismatchError(f"the batch needs {side!r} with input_ids and labels")
    base: dict[str, Tensor] = {}
    before: dict[str, Tensor] = {}
    losses, margins, kls, nlls = [], [], [], []
    for sign, side in zip((1, -1), SIDES, strict=True):
        if not base or reference == "kept":
            still = {"c": 0} if reference == "base" else {"c": sign * c, "rank": 0}
            with torch.no_grad(), live.use(name, **still):
                base = both_logits(model, batch)
            before = {s: mean_logp(base[s], batch[s]["labels"]) for s in SIDES}
        with live.use(name, c=sign * c):
            now = both_logits(model, batch)
        logp = {s: mean_logp(now[s], batch[s]["labels"]) for s in SIDES}
        moved = {s: logp[s] - before[s] for s in SIDES}
        margin = sign * (moved["chosen"] - moved["rejected"])
        kl = torch.cat(
            [predicted(token_kl(now[s], base[s], barrier.top), batch[s]["labels"]) for s in SIDES]
        )
        losses.append((cap - margin).clamp_min(0).mean() + barrier(kl))
        margins.append(float(margin.detach().mean()))
        kls.append(kl.detach())
        nlls.append(-float(logp[side].detach().mean()))
    return Steering(
        (losses[0], losses[1]), (margins[0], margins[1]), torch.cat(kls), (nlls[0], nlls[1])
    )


def conflict_averse(gradients: Sequence[Sequence[Tensor]], radius: float = 0.5) -> list[Tensor]:
    """One step's gradient of two losses: near their mean, and best for the one it serves worse.

    g = g₀ + (radius ‖g₀‖ / ‖g_w‖) g_w, with g₀ the mean and g_w = w g₁ + (1 − w) g₂ such that
    ⟨g_w, g₀⟩ + radius ‖g₀‖ ‖g_w‖ is least over w in [0, 1].

    Args:
        gradients: of both losses, parameter by parameter. radius: in [0, 1); 0 is the mean.

    Returns:
        The gradient of each parameter.
    """
    if len(gradients) != 2 or not 0 <= radius < 1:
        raise MismatchError("conflict_averse takes the gradients of two losses, radius in [0, 1)")
    first, second = (list(g) for g in gradients)
    a, b, cross = (
        sum(float((x.double() * y.double()).sum()) for x, y in zip(p, q, strict=True))
        for p, q in ((first, first), (second, second), (first, second))
    )
    mean = math.sqrt(max((a + b + 2 * cross) / 4, 0.0))

    def length(w: float) -> float:
        return math.sqrt(max(w * w * a + (1 - w) ** 2 * b + 2 * w * (1 - w) * cross, 0.0))

    def objective(w: float) -> float:
        along = (w * (a + cross) + (1 - w) * (b + cross)) / 2
        return along + radius * mean * length(w)

    low, high = 0.0, 1.0  # the objective is convex
    for _ in range(60):
        left, right = (2 * low + high) / 3, (low + 2 * high) / 3
        low, high = (low, right) if objective(left) <= objective(right) else (left, high)
    w = (low + high) / 2
    more = radius * mean / length(w) if length(w) > 0 else 0.0
    return [
        (0.5 + more * w) * x + (0.5 + more * (1 - w)) * y
        for x, y in zip(first, second, strict=True)
    ]


def steer_backward(steering: Steering, live: Live, *, name: str | None = None) -> None:
    """`backward()` of both losses with conflict-averse gradients, added to what is there."""
    parameters = list(live.parameters(the_trained(live) if name is None else name))
    gradients = [
        torch.autograd.grad(loss, parameters, retain_graph=i == 0, allow_unused=True)
        for i, loss in enumerate(steering.losses)
    ]
    filled = [
        [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, own, strict=True)]
        for own in gradients
    ]
    for p, g in zip(parameters, conflict_averse(filled), strict=True):
        p.grad = g if p.grad is None else p.grad + g
