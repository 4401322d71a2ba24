"""One adapter's flat part: the loadings of its flattened factors on the mean and directions stored.

A side is row 0, the mean, and k directions, all of length r·in (A) or out·r (B). A direction has
about the norm of the flattened factors: so one scale does for all rows, and loadings are near 1,
whatever the size of the factors. A part holds k numbers a side, relative to the largest of them.
The byte layout is described in docs/formats.md.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...collection.batch import Factors, held_by_float32, power_of_two, sizes
from ...errors import FileError
from .rows import (
    code_rows,
    joined,
    read_rows,
    rounded_coefficients,
    without_values,
    write_rows,
)

_ROWS = 32  # coded at once
_SEEDS = {"A": 3, "B": 2}
# kind, basis, rank, loadings of A and of B, 1 where they are float32, the largest of A and of B
_HEAD = struct.Struct("<BHHHHBff")
_KIND = 3


class OtherLengthError(FileError):
    """A flat side's rows are of another length, as those of adapters of another rank are."""


class FlatSide:
    """One side as stored: row 0 the mean, then directions.

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
        self._inverse: tuple[Tensor, Tensor] | None = None

    @property
    def rows(self) -> Tensor:
        """(1 + k, D) float32, decoded again after a `release`."""
        rows = self._rows  # a thread may let go of them meanwhile
        if rows is None:
            rows = self._rows = read_side(self.record, self._d, self._side, self._device).rows
        return rows

    def release(self) -> None:
        """Keep the record only."""
        if self._side:
            self._rows = self._inverse = None

    def __lorafold_key__(self) -> Any:
        return self.record, self.known, self._side, self._d

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None, "_inverse": None} if self._side else self.__dict__

    def loadings(self, X: Tensor, rows: np.ndarray | None = None) -> Tensor:
        """Least-squares loadings (n, k) of the flattened factors X (n, D).

        Args:
            rows: (n,) which rows of the fitted stack they are.
        """
        if self.known is not None and rows is not None:
            return self.known[torch.as_tensor(rows, device=X.device)]
        if not self.count:
            return X.new_zeros(len(X), 0)
        unit, inverse = self._unit_and_inverse()
        D = self.rows[1:] if unit == 1 else self.rows[1:] / unit.to(X.dtype)
        found: Tensor = ((X - self.rows[0]) @ D.T).double() @ (inverse / unit)
        return found.to(X.dtype)

    def _unit_and_inverse(self) -> tuple[Tensor, Tensor]:
        """1, or where float32 has no squares of the directions a power of two near their largest
        number, and the inverse (k, k) of the Gram of the directions divided by it.
        """
        found = self._inverse
        if found is None:
            D = self.rows[1:]
            unit = torch.ones((), dtype=torch.float64, device=D.device)
            if not bool(held_by_float32(self.lengths.double() ** 2).all()):
                unit = power_of_two(D.abs().max().double())
                D = D / unit.to(D.dtype)
            wide = D.double() @ D.double().T if D.shape[1] < 4096 else (D @ D.T).double()
            # Rows of factors near the end of float32's range may vanish or be alike: no `solve`.
            found = self._inverse = unit, torch.linalg.pinv(wide, hermitian=True)
        return found

    @property
    def lengths(self) -> Tensor:
        """(k,) norms of the directions: loadings times these are those on unit directions."""
        found: Tensor = torch.linalg.vector_norm(self.rows[1:], dim=1, dtype=torch.float64)
        return found.to(self.rows.dtype)

    def rebuilt(self, loadings: Tensor) -> Tensor:
        """(n, D) from loadings (n, k)."""
        return torch.addmm(self.rows[0], loadings, self.rows[1:])


def code_flat_rows(rows: Tensor, levels: np.ndarray, side: str) -> FlatSide:
    """Code row 0 (the mean) and directions, each at the norm it has; they become what is read."""
    coded, lengths = [], []
    for at in range(0, len(rows), _ROWS):  # a few at a time: coding takes several times their size
        some, bits = rows[at : at + _ROWS], levels[at : at + _ROWS]
        part = code_rows(some, bits, _SEEDS[side])
        norms = (torch.linalg.vector_norm(x, dim=1, dtype=torch.float64) for x in (some, part.hat))
        lengths.append(next(norms) / next(norms).clamp_min(1e-300))
        some.copy_(part.hat)
        coded.append(without_values(part))
    c = rounded_coefficients(torch.cat(lengths).cpu().numpy(), levels)
    record = write_rows([joined(coded)], np.arange(len(rows)), c)
    rows *= torch.as_tensor(c, dtype=rows.dtype, device=rows.device)[:, None]
    return FlatSide(rows, record, side=side)


def read_side(
    record: bytes, d: int, side: str, device: torch.device | str | None = None
) -> FlatSide:
    """Decode a flat side of rows of length d.

    Raises:
        OtherLengthError: its rows are of another length.
    """
    other = OtherLengthError(f"a flat side of the library has no rows of length {d}")
    try:
        (rows,), c, end = read_rows(record, 0, [d], [_SEEDS[side]], device)
    except ValueError as e:
        raise other from e
    if end != len(record):
        raise other
    return FlatSide(rows * c[:, None], record, side=side)


def flattened(f: Factors, side: str, rank: int | None = None) -> Tensor:
    """(n, r·in) of A or (n, out·r) of B, row-major as in the file; zero-padded to a rank."""
    X = f.A if side == "A" else f.B
    if rank is not None and rank > f.A.shape[1]:
        short = rank - f.A.shape[1]
        X = torch.nn.functional.pad(X, (0, 0, 0, short) if side == "A" else (0, short))
    return X.reshape(len(f.members), -1)


@dataclass(frozen=True)
class FlatParts:
    """Flat parts of a block: their records, and the factors they decode to.

    Args:
        records: n byte strings, empty for zero updates. B: (n, out, r), A: (n, r, in) as decoded.
    """

    records: list[bytes]
    B: Tensor
    A: Tensor


def code_parts(
    f: Factors, A: FlatSide, B: FlatSide, number: int, wide: bool, rows: np.ndarray | None = None
) -> FlatParts:
    """Project a block on the coded sides; nothing for zero updates, which loadings would not keep.

    Args:
        number: the basis's number at its module. wide: keep loadings in float32.
        rows: (n,) which rows of the fitted stack the block is, where it is of that stack.
    """
    zero = sizes(f.A) * sizes(f.B) == 0
    if bool(zero.all()):  # and maybe of a lower rank
        return FlatParts([b""] * len(zero), torch.zeros_like(f.B), torch.zeros_like(f.A))
    kind = torch.float32 if wide else torch.float16
    r = f.A.shape[1]
    tops, loads, rebuilt = [], [], []
    for side, name in ((A, "A"), (B, "B")):
        x = side.loadings(flattened(f, name), rows)
        top = x.abs().amax(1, keepdim=True) if side.count else x.new_zeros(len(x), 1)
        relative = (x / torch.where(top > 0, top, 1.0)).to(kind)
        tops.append(top[:, 0].tolist())
        loads.append(relative.cpu().numpy())
        rebuilt.append(side.rebuilt(relative.to(x.dtype) * top))
    records = [
        _HEAD.pack(_KIND, number, r, A.count, B.count, wide, tops[0][i], tops[1][i])
        + loads[0][i].tobytes()
        + loads[1][i].tobytes()
        for i in range(len(f.members))
    ]
    parts = FlatParts(records, rebuilt[1].reshape(f.B.shape), rebuilt[0].reshape(f.A.shape))
    for k in np.flatnonzero(zero.cpu().numpy()).tolist():
        records[k] = b""
        parts.B[k] = parts.A[k] = 0
    return parts


def read_parts(records: list[bytes], f: Factors, A: FlatSide, B: FlatSide) -> tuple[Tensor, Tensor]:
    """B (n, out, r) and A (n, r, in) that the flat parts of f decode to; 0 where there is none."""
    left, right = torch.zeros_like(f.B), torch.zeros_like(f.A)
    sides, shape = {"A": A, "B": B}, (f.B.shape[1], f.A.shape[2])
    for k, record in enumerate(records):
        if record:
            found = decode_part(record, 0, shape, lambda side, *_: sides[side].rows, left.device)
            left[k], right[k], _ = found
    return left, right


def part_nbytes(A: FlatSide, B: FlatSide, wide: bool) -> int:
    """Bytes of one adapter's flat part."""
    return _HEAD.size + (4 if wide else 2) * (A.count + B.count)


def skipped_part(record: bytes, start: int) -> tuple[int, int]:
    """The rank of a flat part, and where it ends."""
    _, _, r, k_A, k_B, wide, *_ = _HEAD.unpack_from(record, start)
    return r, start + _HEAD.size + (4 if wide else 2) * (k_A + k_B)


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
