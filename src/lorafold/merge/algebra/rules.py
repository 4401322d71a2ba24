"""Rules that act entry by entry: drop some, elect a sign, and take a weighted sum.

One record says all of them, as in mergekit's generalised task arithmetic. Whatever the space, an
entry is a number x_i of each adapter, with weight w_i:

    keep      all | the largest | random ones | the middle, without outliers | by their rank
    elect     drop who is not of the sign of Σ w·x
    divide    nothing | by Σ |w| of those kept | by Σ w of those kept

TIES: Yadav et al. 2023 (arXiv:2306.01708). DARE: Yu et al. 2024 (arXiv:2311.03099). DELLA: Deep et
al. 2024 (arXiv:2406.11617). Breadcrumbs: Davari & Belilovsky 2024 (arXiv:2312.06795). Task
arithmetic: Ilharco et al. 2023 (arXiv:2212.04089).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ...errors import MismatchError
from .core import NOISE

Draw = Callable[[int, Sequence[int]], Tensor]  # adapter, shape → uniform numbers in [0, 1)


@dataclass(frozen=True)
class Rule:
    """What becomes of the entries of all adapters.

    Args:
        keep: "magnitude": the share `density` that is largest in size; "random": each with
            probability `density`; "middle": as magnitude, but the share `gamma` of the largest
            goes first; "ranked": with probability density ± epsilon, by its rank in its row.
        elect: keep of each entry only who has the sign of Σ w·x.
        divide: "kept": by Σ |w| of who was kept; "signed": by Σ w of who was kept (all of them,
            where no sign is elected).
        rescale: make up for what is dropped: "probability": x / its probability; "sum": so that
            Σ |x| stays.
    """

    keep: Literal["all", "magnitude", "random", "middle", "ranked"] = "all"
    elect: bool = False
    divide: Literal["no", "kept", "signed"] = "no"
    rescale: Literal["no", "probability", "sum"] = "no"
    gamma: float = 0.01
    epsilon: float = 0.15

    @property
    def sums(self) -> bool:
        """Whether it is the weighted sum and no more."""
        return self.keep == "all" and not self.elect and self.divide == "no"

    def check(self, density: float) -> None:
        """Refuse an epsilon that would make a probability of less than 0 or more than 1.

        Raises:
            MismatchError: naming both.
        """
        low, high = density - self.epsilon, density + self.epsilon
        if self.keep == "ranked" and density < 1 and (low <= 0 or high >= 1):
            raise MismatchError(
                f"epsilon must leave density ± epsilon within (0, 1), found density {density:g} "
                f"and epsilon {self.epsilon:g}"
            )


RULES = {
    "linear": Rule(),
    "magnitude": Rule("magnitude"),
    "ties": Rule("magnitude", elect=True, divide="kept"),
    "dare": Rule("random", rescale="probability"),
    "dare_ties": Rule("random", elect=True, divide="kept", rescale="probability"),
    "della": Rule("ranked", elect=True, divide="kept", rescale="probability"),
    "breadcrumbs": Rule("middle"),
}


def combined(
    rule: Rule,
    entries: Iterable[Tensor | None],
    weights: Sequence[float],
    densities: Sequence[float],
    draw: Draw,
) -> Tensor | None:
    """The rule applied to all entries.

    Args:
        entries: each adapter's, all of one shape; None is zero. One is asked for at a time.
        weights, densities: each adapter's.
        draw: the random numbers of an adapter.

    Returns:
        A tensor of their shape; None where all are None.

    Raises:
        MismatchError: entries that their dtype can't hold.
    """
    kept = (
        (w, sparsified(rule, _finite(x), density, partial(draw, i)))
        for i, (x, w, density) in enumerate(zip(entries, weights, densities, strict=True))
        if x is not None and w != 0
    )
    if rule.elect:
        return _elected(rule.divide, kept)
    total: Tensor | None = None
    for w, x in kept:
        total = w * x if total is None else total.add_(x, alpha=w)
    if rule.divide == "no" or total is None:
        return total
    divisor = sum(weights) if rule.divide == "signed" else sum(map(abs, weights))
    return total if abs(divisor) < 1e-8 else total / divisor


def _finite(x: Tensor) -> Tensor:
    """Entries that their dtype could hold: of those beyond it, none is the largest."""
    if not (bool(x.sum().isfinite()) or bool(x.isfinite().all())):
        raise MismatchError(f"an update has entries that are too large for {x.dtype}")
    return x


def _elected(divide: str, kept: Iterable[tuple[float, Tensor]]) -> Tensor | None:
    """Σ w·x over those of the sign of Σ w·x, divided as the rule says."""
    sides: list[tuple[Tensor, Tensor]] = []  # above zero and below: Σ |w·x|, Σ of their weights
    for w, x in kept:
        if not sides:
            sides = [(torch.zeros_like(x), torch.zeros_like(x)) for _ in range(2)]
        over = x.clamp_min(0)
        for (total, shares), part in zip(
            sides[:: 1 if w > 0 else -1], (over, over - x), strict=True
        ):
            total.add_(part, alpha=abs(w))
            shares.add_(part.sign_(), alpha=w if divide == "signed" else abs(w))
    if not sides:
        return None
    (above, shares_above), (below, shares_below) = sides
    # Rounding elects no sign: neither an entry's own, nor that of the sums it came from.
    size = above + below
    plus = (above.add(size.add_(size.mean()), alpha=NOISE) >= below).to(above)
    total = torch.lerp(-below, above, plus)  # exact at 0 and 1, in an eighth of the time of `where`
    if divide == "no":
        return total
    shares = torch.lerp(shares_below, shares_above, plus)
    return total.div_(shares.add_(shares == 0))


def sparsified(
    rule: Rule, x: Tensor, density: float, draw: Callable[[Sequence[int]], Tensor]
) -> Tensor:
    """What an adapter keeps of its entries x, scaled up where the rule says so."""
    if rule.keep == "all" or density >= 1:
        return x
    if rule.keep == "magnitude":
        kept = _largest(x, density)
    elif rule.keep == "middle":
        kept = x * _middle(x, density, rule.gamma)
    else:
        chance = _chances(x, density, rule)
        kept = x * (draw(x.shape).to(x) < chance)
        if rule.rescale == "probability":
            return kept / chance
    if rule.rescale == "sum":
        before, after = x.abs().sum(), kept.abs().sum()
        if before > 1e-7 and after > 1e-7:
            kept *= before / after
    return kept


def _chances(x: Tensor, density: float, rule: Rule) -> Tensor | float:
    """The probability with which each entry is kept."""
    if rule.keep == "random":
        return density
    rule.check(density)
    rows = x.reshape(-1, x.shape[-1])
    ranks = rows.abs().argsort(1).argsort(1).to(x)
    share = ranks / max(1, rows.shape[1] - 1) if rows.shape[1] > 1 else ranks + 0.5
    return (density - rule.epsilon + 2 * rule.epsilon * share).reshape(x.shape)


def _count(share: float, numbers: int) -> int:
    # 1/49 of 49² entries is 49 of them, whatever floating point makes of it.
    return int(share * numbers * (1 + 1e-12))


def _largest(x: Tensor, density: float) -> Tensor:
    """Of x the share `density` of entries that is largest in size, and those as large as the last.

    Selecting one value takes a quarter of the time that `topk` does, numpy's a third of torch's.
    """
    size, kept = x.abs(), _count(density, x.numel())
    if kept == 0:
        return torch.zeros_like(x)
    at = x.numel() - kept
    if size.device.type == "cpu":
        last = np.partition(size.numpy().ravel(), at)[at]
    else:
        last = size.flatten().kthvalue(at + 1).values.cpu().numpy()
    below = float(np.nextafter(last, np.zeros_like(last)))
    return torch.nn.functional.hardshrink(x, below)  # a third of the time of a mask and a product


def _middle(x: Tensor, density: float, gamma: float) -> Tensor:
    """A mask of the share `density` below the share `gamma` of the largest entries."""
    kept = _count(density, x.numel())
    outliers = min(_count(gamma, x.numel()), x.numel() - kept)
    order = x.abs().flatten().argsort(descending=True)
    mask = torch.zeros(x.numel(), dtype=torch.bool, device=x.device)
    mask[order[outliers : outliers + kept]] = True
    return mask.reshape(x.shape)
