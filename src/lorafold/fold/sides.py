"""Shared sides: orthonormal bases that many updates at one module have in common (Tucker-2).

ΔW_i ≈ U Σ_i Vᵀ over a stack, each update weighted 1/‖ΔW_i‖². With one side shared the best basis
is the leading eigenvectors of Σ ΔW_iᵀ ΔW_i (Eckart–Young on the unfolded stack). With both shared
those eigenvectors are the start (HOSVD, De Lathauwer et al. 2000) and a few alternating sweeps
(HOOI) improve it; the squared error then obeys

    max(tail_out, tail_in) ≤ best possible ≤ achieved ≤ tail_out + tail_in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .coder import LEFT_SEED, RIGHT_SEED, code_rows, read_rows, rounded_coefficients, write_rows
from .stack import Block, decompose, squared_norms

_EXACT = 2048  # largest min(d, columns) whose Gram is diagonalised outright
_WIDEST = 512  # most directions that a sketch looks for
SEEDS = {"U": LEFT_SEED, "V": RIGHT_SEED}

Columns = Callable[[], Iterator[Tensor]]


@dataclass(frozen=True)
class Spectrum:
    """Leading directions of a stack's side.

    Args:
        directions: (d, K) orthonormal, strongest first.
        energies: (K,) share of the (weighted) squared norm that each carries, float64; they sum
            to at most 1.
    """

    directions: Tensor
    energies: np.ndarray

    def tail(self, rank: int) -> float:
        """Share of the squared norm beyond the first `rank` directions."""
        return max(0.0, 1.0 - float(self.energies[:rank].sum()))


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

    @property
    def columns(self) -> Tensor:
        """(d, R) float32, decoded again after a `release`."""
        if self._columns is None:
            self._columns = read_basis(self.record, self._d, self._side, self._device).columns
        return self._columns

    def release(self) -> None:
        """Keep the record only, which is several times smaller."""
        if self._side:
            self._columns = None

    def coordinates(self, X: Tensor) -> Tensor:
        """Least-squares coordinates (n, R, r) of the columns of X (n, d, r)."""
        found: Tensor = torch.linalg.solve(self.gram(), (self.columns.T @ X).double())
        return found.to(X.dtype)

    def gram(self) -> Tensor:
        """(R, R) float64 inner products of the columns."""
        if self._gram is None:
            wide = self.columns.double()
            self._gram = wide.T @ wide
        return self._gram


class Bases:
    """As many bases of one width as a batch has rows: to each row its own.

    Args:
        bases: one a row.
    """

    def __init__(self, bases: Sequence[Basis]) -> None:
        self._bases = list(bases)
        self.rank = self._bases[0].rank
        self._gram: Tensor | None = None

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


def leading_directions(columns: Columns, d: int, count: int, most: int) -> Spectrum:
    """Leading left singular directions of a wide stack of columns.

    Exact by one Gram where the smaller side is at most 2048; otherwise subspace iteration with a
    seeded Gaussian sketch (Halko, Martinsson & Tropp 2011), three passes over the columns.

    Args:
        columns: gives the (d, m) float32 pieces, afresh at each call.
        d: length of a column. count: number of columns. most: directions wanted at most.
    """
    most = min(most, d, count)
    if count <= min(d, _EXACT):
        Y = torch.cat(list(columns()), 1)
        values, vectors = torch.linalg.eigh(Y.double().T @ Y.double())
        total = float(values.clamp_min(0).sum())
        values, vectors = values.flip(0)[:most], vectors.flip(1)[:, :most]
        alive = values > 1e-12 * values[:1].clamp_min(1e-300)
        values, vectors = values[alive], vectors[:, alive]
        directions = Y @ (vectors / values.sqrt()).to(Y.dtype)
    elif d <= _EXACT:
        C = sum_of_products(columns())
        # Eigenvalues below 1e-7 of the largest are rounding in the products already.
        values, vectors = torch.linalg.eigh(C.float())
        values = values.double()
        total = float(values.clamp_min(0).sum())
        values, directions = values.flip(0)[:most], vectors.flip(1)[:, :most]
        alive = values > 1e-7 * values[:1].clamp_min(1e-300)
        values, directions = values[alive], directions[:, alive]
    else:
        return _sketched(columns, d, min(most, _WIDEST))
    shares = values.clamp_min(0).cpu().numpy() / total if total > 0 else np.zeros(0)
    return Spectrum(directions[:, : len(shares)], shares)


def sum_of_products(pieces: Iterable[Tensor]) -> Tensor:
    """Σ Y Yᵀ over the pieces, (d, d) float64; products in float32, summed in float64."""
    total: Tensor | None = None
    for Y in pieces:
        product = (Y @ Y.T).double()
        total = product if total is None else total.add_(product)
    assert total is not None
    return total


def _sketched(columns: Columns, d: int, most: int) -> Spectrum:
    width = min(d, most + 16)
    generator = torch.Generator().manual_seed(0)
    Q = torch.randn(d, width, generator=generator)
    total = 0.0
    Q_last, quotient = Q, Q.new_zeros(0, 0)
    for _ in range(3):
        Z: Tensor | None = None
        total = 0.0
        for Y in columns():
            Q = Q.to(Y)
            piece = Y @ (Y.T @ Q)
            Z = piece if Z is None else Z.add_(piece)
            total += float((Y.double() ** 2).sum())
        assert Z is not None
        quotient = Q.double().T @ Z.double()  # the last pass's Rayleigh quotient
        Q_last, Q = Q, torch.linalg.qr(Z)[0]
    values, vectors = torch.linalg.eigh((quotient + quotient.T) / 2)
    directions = Q_last @ vectors.flip(1)[:, :most].to(Q_last.dtype)
    shares = values.flip(0)[:most].clamp_min(0).cpu().numpy() / total if total > 0 else np.zeros(0)
    return Spectrum(directions[:, : len(shares)], shares)


def side_columns(blocks: Iterable[Block], weights: np.ndarray, side: str) -> Iterator[Tensor]:
    """The weighted columns √w_i U_i S_i (or V_i S_i) of each block, (d, n·r).

    Args:
        weights: w by position in the collection.
    """
    for block in blocks:
        X = block.U if side == "U" else block.V
        w = torch.as_tensor(np.sqrt(weights[block.members]), device=X.device)
        Y = X * (block.S * w[:, None]).to(X.dtype)[:, None, :]
        yield Y.permute(1, 0, 2).reshape(Y.shape[1], -1)


def alternate(
    blocks: Callable[[], Iterator[Block]],
    weights: np.ndarray,
    U: Tensor,
    V: Tensor,
    sweeps: int = 4,
) -> tuple[Tensor, Tensor, float]:
    """HOOI: improve a pair of shared sides in turn, by one step of orthogonal iteration each.

    A full eigendecomposition in every sweep finds the same fixed point and costs O(d³); from the
    HOSVD start one multiplication by Σ Y Yᵀ, applied factored, moves nearly as far.

    Args:
        blocks: the stack's blocks, afresh at each call. weights: w by position.
        U: (out, R_U), V: (in, R_V) orthonormal starts.

    Returns:
        U, V and the share of the weighted squared norm that they keep.
    """

    def improved(side: str, own: Tensor, other: Tensor) -> Tensor:
        Z = torch.zeros_like(own)
        for block in blocks():
            X, Y = (block.U, block.V) if side == "U" else (block.V, block.U)
            w = torch.as_tensor(np.sqrt(weights[block.members]), device=X.device)
            K = (Y.mT @ other).double() * (block.S * w[:, None])[:, :, None]  # (n, r, R)
            inside = (K @ K.mT).to(X.dtype) @ (X.mT @ own)
            Z += (X @ inside).sum(0)
        Q: Tensor = torch.linalg.qr(Z)[0]
        return Q

    kept = 0.0
    for _ in range(sweeps):
        U = improved("U", U, V)
        V = improved("V", V, U)
    total = 0.0
    for block in blocks():
        w = torch.as_tensor(weights[block.members], device=U.device)
        X, Y = (U.T @ block.U) * block.S.to(U.dtype)[:, None, :], V.T @ block.V
        kept += float((squared_norms(X, Y.mT) * w).sum())
        total += float(((block.S**2).sum(1) * w).sum())
    return U, V, kept / total if total > 0 else 1.0


def basis_of(directions: Tensor, levels: np.ndarray, side: str) -> Basis:
    """Code the columns of `directions` (d, K) at `levels` bits; those at 0 are dropped."""
    rows = np.flatnonzero(levels > 0)
    X = directions.T[torch.as_tensor(rows, device=directions.device)].contiguous()
    coded = code_rows(X, np.asarray(levels)[rows], SEEDS[side])
    norms = coded.hat.double().norm(dim=1).clamp_min(1e-300)
    c = rounded_coefficients((1 / norms).cpu().numpy(), coded.bits)
    record = write_rows([coded], np.arange(len(rows)), c)
    return read_basis(record, directions.shape[0], side, directions.device)


def read_basis(record: bytes, d: int, side: str, device: torch.device | str | None = None) -> Basis:
    """Decode a basis of columns of length d."""
    (rows,), c, _ = read_rows(record, 0, [d], [SEEDS[side]], device)
    return Basis((rows * c[:, None]).T.contiguous(), record, len(rows), side)


def projected(block: Block, U: Side, V: Side) -> tuple[Tensor, Tensor]:
    """Factors (n, du, r), (n, r, dv) of each update's core in the coordinates of the shared sides.

    A side that is None is the update's own: du = out, dv = in.
    """
    S = block.S.to(block.U.dtype)[:, None, :]
    left = (block.U if U is None else U.coordinates(block.U)) * S
    right = block.V if V is None else V.coordinates(block.V)
    return left, right.mT


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


def residual(block: Block, left: Tensor, right: Tensor, U: Side, V: Side) -> tuple[Tensor, Tensor]:
    """Factors (n, out, k), (n, k, in) of what the shared sides miss.

    Args:
        left, right: the core's factors from `projected`.
    """
    own_left = block.U * block.S.to(block.U.dtype)[:, None, :]
    if U is None:
        assert V is not None
        return own_left, block.V.mT - right @ V.columns.mT
    if V is None:
        return own_left - U.columns @ left, block.V.mT
    B = torch.cat([own_left, -(U.columns @ left)], 2)
    return B, torch.cat([block.V.mT, right @ V.columns.mT], 1)


def core_svd(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular pairs of a core: P (n, du, k), S (n, k), Q (n, dv, k)."""
    return decompose(left, right)
