"""Shared sides: orthonormal bases that many updates at one module have in common (Tucker-2).

ΔW_i ≈ U Σ_i Vᵀ, each side a basis in common or the update's own. `spans` finds the directions;
here they are coded as bases, and updates are put into the coordinates of what was coded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...collection.batch import Factors
from .rows import LEFT_SEED, RIGHT_SEED, code_rows, read_rows, rounded_coefficients, write_rows

SEEDS = {"U": LEFT_SEED, "V": RIGHT_SEED}
_TOGETHER = 1 << 22  # numbers of bases that are coded together


class Basis:
    """A shared side as stored: unit columns, nearly orthonormal (they were rounded).

    Args:
        columns: (d, R) float32.
        record: the bytes to be written; none where the library holds them already.
        fresh: how many of the last columns `record` decodes to.
        side: "U" or "V" where `record` decodes to all columns, which then can be let go.
    """

    def __init__(self, columns: Tensor, record: bytes, fresh: int, side: str = "") -> None:
        self.record, self.fresh = record, fresh
        self.rank = int(columns.shape[1])
        self._columns: Tensor | None = columns
        self._side, self._d, self._device = side, int(columns.shape[0]), columns.device
        self._gram: Tensor | None = None
        self._factored: tuple[Tensor, Tensor] | None = None

    @property
    def columns(self) -> Tensor:
        """(d, R) float32, decoded again after a `release`."""
        columns = self._columns  # a thread may let go of them meanwhile
        if columns is None:
            columns = read_basis(self.record, self._d, self._side, self._device).columns
            self._columns = columns
        return columns

    def release(self) -> None:
        """Keep the record only, which is several times smaller."""
        if self._side:
            self._columns = self._gram = self._factored = None

    def __lorafold_key__(self) -> Any:
        return self.record, self.fresh, self._side, self._d

    def __getstate__(self) -> dict[str, Any]:
        if not self._side:
            return self.__dict__
        return {**self.__dict__, "_columns": None, "_gram": None, "_factored": None}

    def coordinates(self, X: Tensor) -> Tensor:
        """Least-squares coordinates (n, R, r) of the columns of X (n, d, r)."""
        return self.solved((self.columns.T @ X).double()).to(X.dtype)

    def solved(self, X: Tensor) -> Tensor:
        """The Gram's inverse times X (n, R, r) float64; the Gram is factored once."""
        factored = self._factored
        if factored is None:
            LU, pivots, singular = torch.linalg.lu_factor_ex(self.gram())
            if bool(singular):
                reason = "the columns of a basis are not independent"
                raise torch.linalg.LinAlgError(reason)  # type: ignore[attr-defined]
            factored = self._factored = LU, pivots
        n, R, r = X.shape
        found: Tensor = torch.linalg.lu_solve(*factored, X.mT.reshape(n * r, R).T)
        return found.T.view(n, r, R).mT

    def gram(self) -> Tensor:
        """(R, R) float64 inner products of the columns."""
        gram = self._gram
        if gram is None:
            wide = self.columns.double()
            gram = self._gram = wide.T @ wide
        return gram


class Bases:
    """As many bases of one width as a batch has rows: to each row its own.

    Args:
        bases: one a row.
    """

    def __init__(self, bases: Sequence[Basis]) -> None:
        self._bases = list(bases)
        self.rank = self._bases[0].rank
        self._gram: Tensor | None = None

    def take(self, rows: np.ndarray) -> Bases:
        """Those of some of the rows."""
        if len(rows) == len(self._bases):
            return self  # rows ascend: it is all of them
        return Bases([self._bases[k] for k in rows.tolist()])

    @property
    def columns(self) -> Tensor:
        """(n, d, R) float32."""
        return torch.stack([b.columns for b in self._bases])

    def coordinates(self, X: Tensor) -> Tensor:
        """Least-squares coordinates (n, R, r) of the columns of X (n, d, r)."""
        products = [b.columns.T @ x for b, x in zip(self._bases, X, strict=True)]
        found: Tensor = torch.linalg.solve(self.gram(), torch.stack(products).double())
        return found.to(X.dtype)

    def gram(self) -> Tensor:
        """(n, R, R) float64 inner products of the columns."""
        if self._gram is None:
            self._gram = torch.stack([b.gram() for b in self._bases])
        return self._gram


Side = Basis | Bases | None  # the update's own where None


def basis_of(directions: Tensor, levels: np.ndarray, side: str) -> Basis:
    """Code the columns of `directions` (d, K) at `levels` bits; those at 0 are dropped."""
    return bases_of({0: directions}, {0: levels}, side)[0]


def bases_of(
    directions: Mapping[int, Tensor], levels: Mapping[int, np.ndarray], side: str
) -> dict[int, Basis]:
    """`basis_of` for each group; small ones are rotated and rounded together."""
    found: dict[int, Basis] = {}
    batch: list[int] = []
    for g in directions:
        batch.append(g)
        if sum(directions[k].numel() for k in batch) >= _TOGETHER:
            found |= _coded_bases(batch, directions, levels, side)
            batch = []
    return found | _coded_bases(batch, directions, levels, side)


def _coded_bases(
    groups: Sequence[int],
    directions: Mapping[int, Tensor],
    levels: Mapping[int, np.ndarray],
    side: str,
) -> dict[int, Basis]:
    if not groups:
        return {}
    kept = [np.flatnonzero(levels[g] > 0) for g in groups]
    X = torch.cat(
        [
            directions[g].T[torch.as_tensor(rows, device=directions[g].device)]
            for g, rows in zip(groups, kept, strict=True)
        ]
    )
    bits = np.concatenate(
        [np.asarray(levels[g])[rows] for g, rows in zip(groups, kept, strict=True)]
    )
    coded = code_rows(X, bits, SEEDS[side])
    lengths = (1 / coded.hat.double().norm(dim=1).clamp_min(1e-300)).cpu().numpy()
    found, at = {}, 0
    for g, rows in zip(groups, kept, strict=True):
        here = np.arange(at, at + len(rows))
        at += len(rows)
        c = rounded_coefficients(lengths[here], bits[here])
        columns = coded.hat[here] * torch.as_tensor(c, device=X.device).to(X.dtype)[:, None]
        record = write_rows([coded], here, c)
        found[g] = Basis(columns.T.contiguous(), record, len(rows), side)
    return found


def read_basis(record: bytes, d: int, side: str, device: torch.device | str | None = None) -> Basis:
    """Decode a basis of columns of length d."""
    (rows,), c, _ = read_rows(record, 0, [d], [SEEDS[side]], device)
    return Basis((rows * c[:, None]).T.contiguous(), record, len(rows), side)


def projected(f: Factors, U: Side, V: Side) -> tuple[Tensor, Tensor]:
    """Factors (n, du, r), (n, r, dv) of each update's core in the coordinates of the shared sides.

    A side that is None is the update's own: du = out, dv = in.
    """
    left = f.B if U is None else U.coordinates(f.B)
    return left, f.A if V is None else V.coordinates(f.A.mT).mT


def weighted_norms(left: Tensor, right: Tensor, U: Side, V: Side) -> Tensor:
    """‖U L R Vᵀ‖² of cores in the coordinates of the sides, (n,) float64, with nothing of size d.

    Args:
        left: (n, du, k). right: (n, k, dv).
    """
    sides = []
    for X, basis in ((left, U), (right.mT, V)):
        wide = X.double()
        sides.append(wide.mT @ (wide if basis is None else basis.gram() @ wide))
    return (sides[0] * sides[1]).sum((1, 2)).clamp_min(0)


def residual(f: Factors, left: Tensor, right: Tensor, U: Side, V: Side) -> tuple[Tensor, Tensor]:
    """Factors (n, out, k), (n, k, in) of what the shared sides miss.

    Args:
        left, right: the core's factors from `projected`.
    """
    if U is None:
        assert V is not None
        return f.B, f.A - right @ V.columns.mT
    if V is None:
        return f.B - U.columns @ left, f.A
    B = torch.cat([f.B, -(U.columns @ left)], 2)
    return B, torch.cat([f.A, right @ V.columns.mT], 1)
