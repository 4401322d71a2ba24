"""What a run of steering is asked for, checked as a whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...attach import LoRA, PiSSA
from ...errors import MismatchError
from ...words import one_of
from .barrier import KLBarrier
from .loss import REFERENCES, Reference


@dataclass(frozen=True)
class Options:
    """See `steer`.

    Raises:
        MismatchError: one out of range, naming it.
    """

    kind: Any = field(default_factory=lambda: LoRA(rank=8, alpha=16))
    rounds: int = 1
    steps: int = 100
    batch: int = 8
    lr: float = 5e-3
    c: float = 1.0
    cap: float = 1.0
    barrier: KLBarrier = field(default_factory=KLBarrier)
    reference: Reference = "base"
    kl: float | None = 1.0
    heldout: float = 0.2
    every: int = 10
    patience: int = 3
    tokens: int = 32
    tolerance: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rounds", "steps", "batch", "every", "patience", "tokens"):
            _check_whole(getattr(self, name), name)
        for name in ("lr", "c", "cap"):
            _check_positive(getattr(self, name), name)
        for name in ("kl", "tolerance"):
            if getattr(self, name) is not None:
                _check_positive(getattr(self, name), name)
        if not isinstance(self.heldout, float) or not 0 < self.heldout < 1:
            raise MismatchError(f"heldout must lie between 0 and 1, found {self.heldout!r}")
        if self.reference not in REFERENCES:
            raise MismatchError(f"reference must be {one_of(REFERENCES)}, found {self.reference!r}")
        if not isinstance(self.barrier, KLBarrier):
            raise MismatchError(f"barrier must be a KLBarrier, found {self.barrier!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise MismatchError(f"seed must be a whole number, found {self.seed!r}")
        kinds = self.kinds
        if len(kinds) not in (1, self.rounds):
            raise MismatchError(f"kind has {len(kinds)} specifications for {self.rounds} rounds")
        for kind in kinds:
            _check_kind(kind)

    @property
    def kinds(self) -> Sequence[Any]:
        """The specifications: one for all rounds, or one each."""
        return self.kind if isinstance(self.kind, list | tuple) else (self.kind,)

    def spec(self, number: int) -> LoRA | PiSSA:
        """What the round of a number begins with; seeded, so that it begins so again."""
        kinds = self.kinds
        found: LoRA | PiSSA = kinds[number if len(kinds) > 1 else 0]
        return found if found.seed is not None else replace(found, seed=self.seed + number)

    def facts(self) -> dict[str, Any]:
        """As JSON has it."""
        names = ("rounds", "steps", "batch", "lr", "c", "cap", "reference", "kl", "heldout")
        found = {name: getattr(self, name) for name in (*names, "every", "patience", "seed")}
        b = self.barrier
        found["barrier"] = {
            "lambda": b.lambda_,
            "hinge": b.hinge,
            "aggregate": b.aggregate,
            "top": b.top,
        }
        specs = [self.spec(n) for n in range(self.rounds)]
        found["kinds"] = [{"kind": type(spec).__name__, "rank": spec.rank} for spec in specs]
        return found


def _check_kind(kind: Any) -> None:
    if not isinstance(kind, LoRA | PiSSA):
        raise MismatchError(f"kind must be a LoRA or a PiSSA, found {kind!r}")
    if kind.modules_to_save:
        raise MismatchError("modules_to_save= trains modules whole, which no dial runs backwards")
    if isinstance(kind, LoRA) and kind.dropout:
        raise MismatchError(
            "dropout= would count as movement in KL from the base: leave it at 0, a dial is held "
            "back by its barrier"
        )


def _check_whole(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise MismatchError(f"{name} must be a whole number of at least 1, found {value!r}")


def _check_positive(value: Any, name: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise MismatchError(f"{name} must be a positive number, found {value!r}")
