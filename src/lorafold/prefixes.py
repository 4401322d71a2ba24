"""What the rank prefixes of an adapter mean: where it was trained to run, and how strong there.

That is the adapter's own, and its config says so beside PEFT's fields, which ignores it: `nested`,
the ranks of its training, and `rank_scaling`, by which power of r/k a prefix of k of r ranks is
multiplied. Neither is there where prefixes are whatever the factors' gauge makes of them. What
gives the factors another gauge leaves both out; to be kept, they need the factors as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, TypeAlias

from .errors import MismatchError

NESTED, SCALING = "nested", "rank_scaling"
_INIT = "init_lora_weights"  # some readers refuse what is not True
POWERS = {"constant": 0.0, "linear": 1.0, "sqrt": 0.5}


Scaling: TypeAlias = Literal["constant", "linear", "sqrt"]


def check_scaling(value: Any) -> str:
    """The name of a rule, or a `MismatchError`."""
    if not isinstance(value, str) or value not in POWERS:
        raise MismatchError(f"{SCALING} must be one of {', '.join(POWERS)}; found {value!r}")
    return value


@dataclass(frozen=True)
class Prefixes:
    """The rank prefixes of an adapter.

    Args:
        ranks: that it was trained to run at, ascending; none where it was trained at its own.
        scaling: "constant", "sqrt" or "linear": a prefix k of r is multiplied by (r/k)^p, p = 0, ½
            or 1.

    Raises:
        MismatchError: ranks that are no ascending whole numbers, another rule.
    """

    ranks: tuple[int, ...] = ()
    scaling: str = "constant"

    def __post_init__(self) -> None:
        ranks = self.ranks
        if not isinstance(ranks, list | tuple) or not all(
            isinstance(k, Integral) and not isinstance(k, bool) and k >= 1 for k in ranks
        ):
            raise MismatchError(f"{NESTED} must list ranks of at least 1, found {ranks!r}")
        if sorted(set(ranks)) != list(ranks):
            raise MismatchError(f"{NESTED} must be in ascending order, found {ranks!r}")
        object.__setattr__(self, "ranks", tuple(int(k) for k in ranks))
        check_scaling(self.scaling)

    @classmethod
    def of(cls, config: Mapping[str, Any], scaling: str | None = None) -> Prefixes:
        """What a config says, or under another rule."""
        return cls(config.get(NESTED) or (), scaling or config.get(SCALING) or "constant")

    @property
    def plain(self) -> bool:
        """Whether nothing was said of them."""
        return not self.ranks and self.power == 0

    @property
    def power(self) -> float:
        """p."""
        return POWERS[self.scaling]

    def said(self) -> dict[str, Any]:
        """What a config says of them; nothing of plain ones."""
        said: dict[str, Any] = {NESTED: list(self.ranks)} if self.ranks else {}
        return {**said, SCALING: self.scaling} if self.power else said

    def factor(self, have: int, k: int) -> float:
        """What a prefix of k of `have` ranks is multiplied by."""
        return float((have / k) ** self.power)

    def shares(self, have: int) -> list[float]:
        """The weight of each of `have` ranks in the mean of all prefixes' updates.

        Σ_{k: r_k ≥ i} (r / r_k)^p / K for rank i, so that one product runs them all at once.
        """
        ranks = [min(k, have) for k in self.ranks]
        return [sum(self.factor(have, k) for k in ranks if k > i) / len(ranks) for i in range(have)]

    def cut(self, rank: int) -> Prefixes:
        """Those of the prefix of a rank."""
        if not self.ranks:
            return self
        return Prefixes((*(k for k in self.ranks if k < rank), rank), self.scaling)


def regauged(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of factors in another gauge, which are no longer as they were initialised."""
    kept = {key: value for key, value in config.items() if key not in (NESTED, SCALING)}
    return {**kept, _INIT: True} if _INIT in kept else kept
