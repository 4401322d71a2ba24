"""Kept rounds as one dial.

Round k trains ΔW_k beside what is kept of the rounds before, everything at one strength c:

    W + c · (c₁ ΔW₁ + … + c_{k−1} ΔW_{k−1} + ΔW_k),

so that the two signs stay each other's mirror, c = 0 is the pristine base, and all rounds together
are one update of the weights, which is what is written.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ...adapter import Adapter
from ...attach import Live
from ...errors import MismatchError


def proportional(c: Tensor) -> Tensor:
    """For `Live.gate`: what is kept runs at the strength c (rows, K) of what is current."""
    return c.sum(-1)


def joined_rounds(live: Live, more: Mapping[str, float] | None = None) -> Adapter:
    """All that is kept as one plain adapter, Σ c ΔW: exact, of the ranks' sum.

    Args:
        live: the handle; adapters count as they are now. more: {name: c} of others to add.

    Raises:
        MismatchError: nothing is kept.

    Not for: a smaller one, which `resize(tolerance=…)` makes of it.
    """
    total: Adapter | None = None
    for name, c in {**live.kept, **(more or {})}.items():
        part = c * live.adapter(name)
        total = part if total is None else total + part
    if total is None:
        raise MismatchError("nothing is kept: live.keep(name, c) makes a round of an adapter")
    return total


def rescale(live: Live, c: float) -> None:
    """Multiply the strength of all that is kept, so that c is 1 from now on."""
    for name, before in live.kept.items():
        live.keep(name, c * before)


def named(number: int) -> str:
    """What the round of a number, from 0, is called."""
    return f"round{number + 1}"
