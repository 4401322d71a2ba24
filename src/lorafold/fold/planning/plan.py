"""The plan of one module: its form, and the sides that its adapters share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..coding.bases import Basis
from ..coding.flat_part import FlatSide
from ..coding.record import Coded


@dataclass(frozen=True)
class Shared:
    """One side shared by groups of adapters.

    Args:
        groups: (N,) by row of the stack: the group's number, −1 where the side is the adapter's
            own.
        bases: group number → basis.
    """

    groups: np.ndarray
    bases: dict[int, Basis]


@dataclass(frozen=True)
class FlatBases:
    """Both flattened sides of a module."""

    A: FlatSide
    B: FlatSide
    wide: bool


@dataclass(frozen=True)
class ModulePlan:
    """How one module is stored.

    Args:
        form: its name. U, V: shared sides; None where own. flat: the flat bases.
        energy: (N, K) squared norms of the components that may be coded; widths: (K,) numbers each.
        nbytes: predicted, bases and records.
        certificate: bounds of the squared error of the shared sides.
        squares: (N,) squared norms, for flat. parts: of all N the flat parts, measured; None where
            these are made when they are written.
        rate: average bits of a number in the components, where bases take a part of the average.
    """

    form: str
    energy: np.ndarray
    widths: np.ndarray
    nbytes: float
    U: Shared | None = None
    V: Shared | None = None
    flat: FlatBases | None = None
    certificate: dict[str, Any] | None = None
    squares: np.ndarray | None = None
    parts: Coded | None = None
    rate: float | None = None

    def bare(self) -> ModulePlan:
        """What coding needs of it."""
        return replace(self, energy=self.energy[:0])

    def release(self) -> None:
        """Keep the bases as the bytes that will be written, until they are needed."""
        for shared in (self.U, self.V):
            for basis in shared.bases.values() if shared else ():
                basis.release()
        if self.flat is not None:
            self.flat.A.release()
            self.flat.B.release()


def side_pairs(
    rows: np.ndarray, U: Shared | None, V: Shared | None
) -> dict[tuple[int, int], np.ndarray]:
    """Positions within a block by the pair of groups (−1 for an own side) they use."""
    pairs: dict[tuple[int, int], list[int]] = {}
    for k, row in enumerate(rows.tolist()):
        key = (int(U.groups[row]) if U else -1, int(V.groups[row]) if V else -1)
        pairs.setdefault(key, []).append(k)
    return {key: np.array(members) for key, members in pairs.items()}


def basis_at(shared: Shared | None, group: int) -> Basis | None:
    """The basis of a group; None for an own side."""
    return None if shared is None or group < 0 else shared.bases[group]
