"""The form `flat`: a mean and k directions of the flattened factors, k numbers a side.

With x_i = vec(A_i) (and the same for scale · B_i) the N×N Gram of the centred x_i gives both the
directions and every loading; no (N, D) matrix is ever decomposed. It describes adapters in one
gauge well (one run's checkpoints, small steps from one start), and nothing else: a change of gauge
that leaves ΔW alone changes every x_i.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...collection.batch import Factors
from ...collection.stack import Stack
from ..coding.bits import bits_for_error
from ..coding.rows import (
    code_rows,
    joined,
    read_rows,
    rounded_coefficients,
    without_values,
    write_rows,
)

_ROWS = 32
_PIECE = 1 << 20  # numbers in a piece of the columns
_SEEDS = {"A": 3, "B": 2}
# kind, basis, rank, loadings of A and of B, 1 where they are float32, the largest of A and of B
_HEAD = struct.Struct("<BHHHHBff")
_KIND = 3


@dataclass(frozen=True)
class FlatSpectrum:
    """One side's directions and every adapter's loadings.

    Args:
        mean: (D,). directions: (K, D) orthonormal rows. energies: (K,) squared singular values.
        loadings: (N, K). total: Σ‖x_i‖² over the stack, mean included.
    """

    mean: Tensor
    directions: Tensor
    energies: np.ndarray
    loadings: np.ndarray
    total: float


class FlatSide:
    """One side as stored: row 0 the mean, then unit directions.

    Args:
        rows: (1 + k, D) float32 as decoded. record: the bytes, or none.
        known: (N, k) loadings by row of the stack, where the directions were not rounded.
        side: "A" or "B" where `record` decodes to the rows, which then can be let go.
    """

    def __init__(
        self, rows: Tensor, record: bytes, known: Tensor | None = None, side: str = ""
    ) -> None:
        self.record, self.known = record, known
        self.count = len(rows) - 1  # directions beside the mean
        self._rows: Tensor | None = rows
        self._side, self._d, self._device = side, int(rows.shape[1]), rows.device

    @property
    def rows(self) -> Tensor:
        """(1 + k, D) float32, decoded again after a `release`."""
        if self._rows is None:
            self._rows = read_side(self.record, self._d, self._side, self._device).rows
        return self._rows

    def release(self) -> None:
        """Keep the record only."""
        if self._side:
            self._rows = None

    def loadings(self, X: Tensor, rows: np.ndarray | None = None) -> Tensor:
        """Least-squares loadings (n, k) of the flattened factors X (n, D).

        Args:
            rows: (n,) which rows of the fitted stack they are.
        """
        if self.known is not None and rows is not None:
            return self.known[torch.as_tensor(rows, device=X.device)]
        D = self.rows[1:]
        if not len(D):
            return X.new_zeros(len(X), 0)
        wide = D.double() @ D.double().T if D.shape[1] < 4096 else (D @ D.T).double()
        found: Tensor = torch.linalg.solve(wide, ((X - self.rows[0]) @ D.T).double().T)
        return found.T.to(X.dtype)

    def rebuilt(self, loadings: Tensor) -> Tensor:
        """(n, D) from loadings (n, k)."""
        return torch.addmm(self.rows[0], loadings, self.rows[1:])


def flattened(f: Factors, side: str) -> Tensor:
    """(n, r·in) of A or (n, out·r) of B, row-major as in the file."""
    return (f.A if side == "A" else f.B).reshape(len(f.members), -1)


def flat_spectrum(stack: Stack, side: str, most: int | None = None) -> FlatSpectrum:
    """The leading directions of one flattened side.

    Args:
        most: directions wanted at most; all N − 1 when None.
    """
    n = len(stack)
    gram, center = _centred_gram(stack, side)
    values, vectors = (t.numpy()[..., ::-1] for t in torch.linalg.eigh(gram.cpu()))
    most = n - 1 if most is None else min(most, n - 1)
    values, vectors = values[:most], vectors[:, :most]
    # Float32 products leave noise of about 1e-7 of the largest; nothing below it is a direction.
    alive = values > 1e-7 * max(float(values.max(initial=0.0)), 1e-300)
    values, vectors = values[alive], vectors[:, alive]
    mix = torch.as_tensor((vectors / np.sqrt(values)).T, dtype=torch.float32).to(center)
    directions = center.new_zeros(len(values), len(center))
    at, work = 0, None
    for f in stack.factors():
        X = flattened(f, side)
        if work is None or work.shape != X.shape:
            work = torch.empty_like(X)  # a fresh one for each block costs more than the product
        directions.addmm_(mix[:, at : at + len(X)], torch.sub(X, center, out=work))
        at += len(X)
    total = float(gram.trace()) + n * float(center.double().square().sum())
    return FlatSpectrum(center, directions, values.copy(), vectors * np.sqrt(values), total)


def _centred_gram(stack: Stack, side: str) -> tuple[Tensor, Tensor]:
    """The N×N float64 Gram of the flattened factors less their mean, and the mean (D,)."""
    kept = stack.kept()
    if kept is not None:
        return _gram_by_columns([flattened(f, side) for f in kept])
    n, at = len(stack), 0
    center = torch.stack([flattened(f, side).sum(0) for f in stack.factors()]).sum(0) / n
    gram = torch.zeros(n, n, dtype=torch.float64, device=center.device)
    for f in stack.factors():
        X, there = flattened(f, side) - center, 0
        for g in stack.factors():
            if there >= at:
                Y = X if there == at else flattened(g, side) - center
                gram[at : at + len(X), there : there + len(Y)] = X @ Y.T
            there += len(g.members)
        at += len(X)
    return gram.triu() + gram.triu(1).T, center


def _gram_by_columns(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The same of factors in memory, a few thousand columns of all of them at a time.

    A piece holds every adapter, so its own mean is the mean; and it stays in the cache, where a
    centred copy of everything would pass through memory once more.
    """
    n, D = sum(len(X) for X in parts), parts[0].shape[1]
    center = parts[0].new_empty(D)
    gram = torch.zeros(n, n, dtype=torch.float64, device=center.device)
    width = max(256, _PIECE // n)
    piece = center.new_empty(n, min(width, D))
    half = -(-n // 2)
    for a in range(0, D, width):
        X = piece if a + width <= D else center.new_empty(n, D - a)
        torch.cat([part[:, a : a + width] for part in parts], out=X)
        torch.mean(X, 0, out=center[a : a + width])
        X -= center[a : a + width]
        gram[:half] += X[:half] @ X.T
        gram[half:, half:] += X[half:] @ X[half:].T  # the fourth quarter follows by symmetry
    gram[half:, :half] = gram[:half, half:].T
    return gram, center


def coded_side(
    s: FlatSpectrum,
    side: str,
    *,
    count: int | None = None,
    bits: int | None = None,
    budget: float | None = None,
) -> FlatSide:
    """A side coded at `count` directions and `bits` each, or within `budget`.

    Args:
        budget: allowed share of Σ‖x_i‖², for dropping and rounding together.
    """
    if budget is not None:
        levels = _levels(s, budget)
    else:
        assert bits is not None
        keep = len(s.energies) if count is None else min(count, len(s.energies))
        levels = np.where(np.arange(len(s.energies) + 1) <= keep, bits, 0)
    kept = np.flatnonzero(levels[1:] > 0) + 1
    rows = torch.cat([s.mean[None], s.directions[torch.as_tensor(kept - 1, device=s.mean.device)]])
    coded = code_flat_rows(rows, np.concatenate([levels[:1], levels[kept]]), side)
    if (levels[kept] < 32).any():
        return coded
    known = torch.as_tensor(s.loadings[:, kept - 1], dtype=torch.float32, device=s.mean.device)
    return FlatSide(coded.rows, coded.record, known, side)


def _levels(s: FlatSpectrum, budget: float) -> np.ndarray:
    """Bits of the mean and of each direction within a share of Σ‖x_i‖²."""
    mean = len(s.loadings) * float((s.mean.double() ** 2).sum())
    energies = np.concatenate([[mean], s.energies]) / max(s.total, 1e-300)
    cost = np.full(len(energies), s.directions.shape[1] / 8)
    return bits_for_error(energies, cost, np.zeros(len(energies), bool), budget)


def predicted_nbytes(s: FlatSpectrum, budget: float) -> float:
    """Bytes of a side within a budget, as `coded_side` will find, without coding it."""
    return float(_levels(s, budget).sum()) * s.directions.shape[1] / 8


def code_flat_rows(rows: Tensor, levels: np.ndarray, side: str) -> FlatSide:
    """Code row 0 (the mean, at its own length) and unit rows; a dropped mean becomes zero."""
    levels = np.maximum(levels, 1)
    coded, lengths = [], []
    for at in range(0, len(rows), _ROWS):  # a few at a time: coding takes several times their size
        some = rows[at : at + _ROWS]
        part = code_rows(some, levels[at : at + _ROWS], _SEEDS[side])
        lengths.append(some.double().norm(dim=1) / part.hat.double().norm(dim=1).clamp_min(1e-300))
        coded.append(without_values(part))
    c = rounded_coefficients(torch.cat(lengths).cpu().numpy(), levels)
    record = write_rows([joined(coded)], np.arange(len(rows)), c)
    return read_side(record, rows.shape[1], side, rows.device)


def read_side(
    record: bytes, d: int, side: str, device: torch.device | str | None = None
) -> FlatSide:
    """Decode a flat side of rows of length d."""
    (rows,), c, _ = read_rows(record, 0, [d], [_SEEDS[side]], device)
    return FlatSide(rows * c[:, None], record, side=side)


@dataclass(frozen=True)
class FlatParts:
    """Flat parts of a block: their records, and the factors they decode to.

    Args:
        records: n byte strings. B: (n, out, r), A: (n, r, in) as decoded.
    """

    records: list[bytes]
    B: Tensor
    A: Tensor


def code_parts(
    f: Factors, A: FlatSide, B: FlatSide, number: int, wide: bool, rows: np.ndarray | None = None
) -> FlatParts:
    """Project a block on the coded sides.

    Args:
        number: the basis's number at its module. wide: keep loadings in float32.
        rows: (n,) which rows of the fitted stack the block is, where it is of that stack.
    """
    kind = torch.float32 if wide else torch.float16
    r = f.A.shape[1]
    tops, loads, rebuilt = [], [], []
    for side, name in ((A, "A"), (B, "B")):
        x = side.loadings(flattened(f, name), rows)
        top = x.abs().amax(1, keepdim=True) if side.count else x.new_zeros(len(x), 1)
        relative = (x / top.clamp_min(1e-30)).to(kind)
        tops.append(top[:, 0].tolist())
        loads.append(relative.cpu().numpy())
        rebuilt.append(side.rebuilt(relative.to(x.dtype) * top))
    records = [
        _HEAD.pack(_KIND, number, r, A.count, B.count, wide, tops[0][i], tops[1][i])
        + loads[0][i].tobytes()
        + loads[1][i].tobytes()
        for i in range(len(f.members))
    ]
    return FlatParts(records, rebuilt[1].reshape(f.B.shape), rebuilt[0].reshape(f.A.shape))


def part_nbytes(A: FlatSide, B: FlatSide, wide: bool) -> int:
    """Bytes of one adapter's flat part."""
    return _HEAD.size + (4 if wide else 2) * (A.count + B.count)


def decode_part(
    record: bytes,
    start: int,
    shape: tuple[int, int],
    basis: Callable[[str, int, int], Tensor],
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor, int]:
    """Left (out, r) and right (r, in) factors of a flat part, and where it ends."""
    _, number, r, k_A, k_B, wide, *tops = _HEAD.unpack_from(record, start)
    start += _HEAD.size
    kind = np.dtype(np.float32 if wide else np.float16)
    sides = []
    for name, k, top in zip("AB", (k_A, k_B), tops, strict=True):
        loads = np.frombuffer(record, kind, k, start).astype(np.float32) * np.float32(top)
        start += k * kind.itemsize
        rows = basis(name, number, r)  # (1 + k, r·in) or (1 + k, out·r)
        sides.append(torch.addmv(rows[0], rows[1 : k + 1].T, torch.from_numpy(loads).to(device)))
    out, inner = shape
    return sides[1].reshape(out, r), sides[0].reshape(r, inner), start
