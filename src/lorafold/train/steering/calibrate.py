"""The strength at which an adapter moves text by so much and no more.

f(c) is the 95th percentile of KL(π_c ‖ π₀) over the tokens of greedy continuations under c. It
grows nearly as a power of c while little has moved, so that regula falsi on log f against log c
(with Illinois' halving, against an end that never moves) needs a few evaluations where bisection
needs many.

Source: Dowell & Jarratt, A modified regula falsi method for computing the root of an equation
(1971), BIT 11.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from ...attach import Live
from ...errors import MismatchError
from ...layers.modes import evaluating
from ...words import Table
from .barrier import aggregated, token_kl
from .tokens import Text, continued, logits_of

# From a strength to a block in which the model runs with it; at 0 it is the base.
At: TypeAlias = "Callable[[float], AbstractContextManager[Any]]"

MOST = 12  # evaluations
CLOSE = 0.05


@dataclass(frozen=True)
class Calibration(Table):
    """What `calibrate_c` found.

    Args:
        c: the strength. kl: f(c) there, nats. tried: (c, f(c)) in order. converged: whether f(c) is
            within 5 % of what was asked for. stopped: whether the text failed its own check
            before.
    """

    c: float
    kl: float
    tried: tuple[tuple[float, float], ...]
    converged: bool
    stopped: bool = False

    def __float__(self) -> float:
        return self.c

    def rows(self) -> list[dict[str, Any]]:
        """What was tried, in order: c and the divergence there."""
        return [{"c": c, "kl": kl} for c, kl in self.tried]

    def _title(self) -> str:
        stop = "the text failed its check" if self.stopped else "no closer"
        said = "" if self.converged else f" ({stop})"
        return f"c = {self.c:.4g}, KL {self.kl:.4g}{said}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def calibrate_c(
    live: Live,
    prompts: Any,
    kl: float = 1.0,
    *,
    name: str | None = None,
    tokens: int = 32,
    start: float = 1.0,
    canary: Callable[[Tensor], bool] | None = None,
) -> Calibration:
    """The c at which the 95th percentile of the tokens' KL along greedy continuations is `kl`.

    Args:
        live: the handle of a model that generates (transformers').
        prompts: (B, T) token numbers, or a mapping with `input_ids` and `attention_mask`, padded on
            the left.
        kl: nats. name: of the adapter; the only one attached when None.
        tokens: of each continuation. start: the first c tried; its sign is the direction.
        canary: is shown the continuations (B, tokens) at each c; False says that the text is no
            good, and the largest c that passed is the result.

    Raises:
        MismatchError: an adapter that does nothing, options out of range.

    Not for: what a trait gains by it, which a score of your own measures.
    """
    own = the_only(live) if name is None else name
    given = dict(prompts) if hasattr(prompts, "keys") else {"input_ids": prompts}

    def at(c: float) -> tuple[Tensor, float]:
        text, moved = moved_text(live.model, lambda c: live.use(own, c=c), c, given, tokens)
        return text.tokens, float(aggregated(moved, "p95"))

    return strength_at(at, kl, start, canary)


def moved_text(
    model: nn.Module, at: At, c: float, prompts: Mapping[str, Tensor], tokens: int
) -> tuple[Text, Tensor]:
    """Greedy continuations at c, and the KL of each of their tokens from c = 0, (tokens,)."""
    with evaluating(model):
        with at(c):
            text = continued(model, prompts, tokens)
            now = logits_of(model, text.given)
        with at(0.0):
            base = logits_of(model, text.given)
    return text, text.predicted(token_kl(now, base))


def strength_at(
    f: Callable[[float], tuple[Tensor, float]],
    target: float,
    start: float = 1.0,
    canary: Callable[[Tensor], bool] | None = None,
) -> Calibration:
    """The c at which a divergence that grows with |c| is `target`, on the side of `start`.

    Args:
        f: from c to what the canary is shown, and the divergence. target: nats.

    Raises:
        MismatchError: it is 0 at any c, or options out of range.
    """
    if not target > 0 or not math.isfinite(target) or start == 0 or not math.isfinite(start):
        raise MismatchError(f"kl must be above 0 and start not 0, found {target!r} and {start!r}")
    tried: list[tuple[float, float]] = []
    sign, passed = math.copysign(1.0, start), 0.0

    def of(size: float) -> float | None:
        nonlocal passed
        shown, found = f(sign * size)
        tried.append((sign * size, found))
        if canary is not None and not canary(shown):
            return None
        passed = max(passed, size)
        return found

    low, high, stopped = _bracket(of, abs(start), target)
    while not stopped and low and high and len(tried) < MOST and not _near(tried[-1][1], target):
        size = _between(low, high)
        found = of(size)
        if found is None:
            stopped = True
        elif found < target:
            low, high = (size, math.log(found / target), 0), (high[0], _half(high), high[2] + 1)
        else:
            low, high = (low[0], _half(low), low[2] + 1), (size, math.log(found / target), 0)
    if stopped:
        here = next((v for c, v in tried if abs(c) == passed), 0.0)
        return Calibration(sign * passed, here, tuple(tried), _near(here, target), True)
    c, here = min(tried, key=lambda one: abs(math.log(max(one[1], 1e-300) / target)))
    return Calibration(c, here, tuple(tried), _near(here, target))


_End = tuple[float, float, int]  # c, log f(c) / kl as it counts, and how often it stayed


def _bracket(
    f: Callable[[float], float | None], size: float, kl: float
) -> tuple[_End | None, _End | None, bool]:
    """Strengths on both sides of the target, by steps that follow the power seen so far."""
    low: _End | None = None
    high: _End | None = None
    before: tuple[float, float] | None = None
    for _ in range(MOST - 2):
        found = f(size)
        if found is None:
            return low, high, True
        if found == 0:
            if size > 1e6:
                raise MismatchError("the adapter moves no token of these continuations, at any c")
            size *= 16
            continue
        if _near(found, kl):
            break
        end = (size, math.log(found / kl), 0)
        if found < kl:
            low = end if low is None or size > low[0] else low
        else:
            high = end if high is None or size < high[0] else high
        if low and high:
            break
        power = 2.0  # of a divergence, near 0
        if before is not None:
            power = math.log(found / before[1]) / math.log(size / before[0])
        before = size, found
        step = (kl / found) ** (1 / min(max(power, 0.2), 2.0))
        size *= min(max(step * (1.2 if found < kl else 0.8), 1 / 32), 32)
    return low, high, False


def _between(low: _End, high: _End) -> float:
    """Where a straight line in logarithms meets the target."""
    a, b = math.log(low[0]), math.log(high[0])
    share = low[1] / (low[1] - high[1])
    return math.exp(a + min(max(share, 0.02), 0.98) * (b - a))


def _half(end: _End) -> float:
    return end[1] / 2 if end[2] >= 1 else end[1]


def _near(found: float, kl: float) -> bool:
    return abs(found / kl - 1) <= CLOSE


def the_only(live: Live) -> str:
    if len(live.names) != 1:
        raise MismatchError(f"say which adapter is meant by name=; there are {live.names}")
    return live.names[0]
