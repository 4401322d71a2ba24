"""Vectors to few bits and back: what every stored factor, basis and core goes through.

A row x is rotated (its coordinates become Gaussian), rounded to a Lloyd–Max codebook of 2^b
levels, rotated back and scaled by least squares: x ≈ s q with s = ⟨x, q⟩ / ⟨q, q⟩ and expected
error D(b) ‖x‖². A *pair* (u, v) with one strength σ is coded as c q_u q_vᵀ, c = σ s_u s_v, at one
number of bits for both: expected error σ² (1 − (1 − D)²). Rows at 16 and 32 bits are floats.

The byte layout is described in docs/formats.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...collection.batch import power_of_two
from ...errors import FileError
from .bits import LEVELS
from .codebook import dequantise, round_into
from .packing import pack, unpack
from .rotation import quick_rotate, unrotate

_CODE_OF = {bits: code for code, bits in enumerate(LEVELS)}
_FLOATS = {16: np.float16, 32: np.float32}
_HEAD = struct.Struct("<HBf")  # count, 1 where coefficients are float32, largest coefficient
_KINDS = np.dtype(np.float16), np.dtype(np.float32)
# The two numbers of bits that a byte names; none where there is no such code.
_LEVELS_OF = [
    tuple(LEVELS[c] if c < len(LEVELS) else -1 for c in (b & 15, b >> 4)) for b in range(256)
]
LEFT_SEED, RIGHT_SEED = 0, 1


@dataclass(frozen=True)
class CodedRows:
    """Rows as they will be read back.

    Args:
        bits: (m,) bits a number, each one of `LEVELS`.
        codes: (m, d) uint8, filled where bits is 1 … 8.
        floats: (m, d) float32 on the CPU, filled where bits is 16 or 32; None where no row is.
        hat: (m, d) what decoding gives, before the scale.
        scale: (m,) float64 least-squares scale of each row.
    """

    bits: np.ndarray
    codes: np.ndarray
    floats: np.ndarray | None
    hat: Tensor
    scale: Tensor


def code_rows(X: Tensor, bits: np.ndarray, seed: int) -> CodedRows:
    """Code each row of X at its own number of bits.

    Args:
        X: (m, d) float32. bits: (m,) of `LEVELS`. seed: of the rotation.
    """
    m, d = X.shape
    if ((bits > 0) & (bits <= 8)).all():  # none is moved from where it is
        turned = turned_rows(X, bits, seed)[1]
        return replace(turned, hat=unrotate(turned.hat, seed))
    codes = np.zeros((m, d), np.uint8)
    floats: np.ndarray | None = None
    hat = torch.zeros_like(X)
    scale = torch.zeros(m, dtype=torch.float64, device=X.device)
    rows = np.flatnonzero((bits > 0) & (bits <= 8))
    if len(rows):
        index = torch.as_tensor(rows, device=X.device)
        _, some = turned_rows(X[index], bits[rows], seed)
        codes[rows], scale[index] = some.codes, some.scale
        hat[index] = unrotate(some.hat, seed)
    for level in _FLOATS:
        rows = np.flatnonzero(bits == level)
        if not len(rows):
            continue
        index = torch.as_tensor(rows, device=X.device)
        # Their numbers are near 1, like a codebook's: half precision holds nothing far from it.
        wide = X[index].double()
        unit = power_of_two(wide.norm(dim=1) / math.sqrt(d))
        q = (wide / unit[:, None]).to(X.dtype)
        q = q.half().to(X.dtype) if level == 16 else q
        if floats is None:
            floats = np.zeros((m, d), np.float32)
        floats[rows] = q.cpu().numpy()
        hat[index] = q
        scale[index] = unit
    return CodedRows(bits, codes, floats, hat, scale)


def turned_rows(
    X: Tensor, bits: np.ndarray, seed: int, room: Tensor | None = None
) -> tuple[Tensor, CodedRows]:
    """Rows of at most 8 bits rotated, and coded as by `code_rows` but not rotated back.

    Args:
        X, bits, seed: as for `code_rows`. room: (2, m, d), where both are put if it is given.
    """
    turned, hat = X.new_empty(2, *X.shape) if room is None else room
    quick_rotate(X, seed, turned)
    codes = torch.empty(X.shape, dtype=torch.uint8, device=X.device)
    scale = round_into(turned, bits, codes, hat).double()
    return turned, CodedRows(bits, codes.cpu().numpy(), None, hat, scale)


def without_values(coded: CodedRows) -> CodedRows:
    """What `write_rows` needs of coded rows, without the values that they decode to."""
    return replace(coded, hat=coded.hat.new_zeros(0, coded.hat.shape[1]))  # a slice would keep all


def joined(parts: Sequence[CodedRows]) -> CodedRows:
    """Rows that were coded a few at a time, as one."""
    d = parts[0].codes.shape[1]
    floats = [
        np.zeros((len(p.bits), d), np.float32) if p.floats is None else p.floats for p in parts
    ]
    return CodedRows(
        np.concatenate([p.bits for p in parts]),
        np.concatenate([p.codes for p in parts]),
        None if all(p.floats is None for p in parts) else np.concatenate(floats),
        torch.cat([p.hat for p in parts]),
        torch.cat([p.scale for p in parts]),
    )


def write_rows(sides: Sequence[CodedRows], rows: np.ndarray, coefficients: np.ndarray) -> bytes:
    """Bytes of some rows of one or two sides that share bits and coefficients.

    Args:
        sides: one `CodedRows` (a basis) or two (pairs), with equal bits.
        rows: which rows, in the order in which they are to be read back; bits > 0.
        coefficients: (k,) one for each, as rounded by `rounded_coefficients`.
    """
    bits = sides[0].bits[rows]
    wide = needs_float32(bits)
    top = float(np.abs(coefficients).max(initial=0.0))
    relative = (coefficients / top if top > 0 else coefficients).astype(
        np.float32 if wide else np.float16
    )
    levels = pack(np.array([_CODE_OF[int(b)] for b in bits], np.uint8), 4)
    parts = [_HEAD.pack(len(rows), wide, top), bytes(levels), relative.tobytes()]
    for level in _descending(bits):
        chosen = rows[bits == level]
        if level <= 8:
            stream = np.concatenate([side.codes[chosen].reshape(-1) for side in sides])
            parts.append(bytes(pack(stream, level)))
        else:
            for side in sides:
                assert side.floats is not None
                parts.append(side.floats[chosen].astype(_FLOATS[level]).tobytes())
    return b"".join(parts)


@dataclass(frozen=True)
class Written:
    """Rows that `write_rows` wrote into a record, by their head.

    Args:
        data: the record. dims: length of a row on each side. bits: of each row.
        kind: of the coefficients. top: the largest of them. start: where they begin.
        levels: (bits, which rows have them), in the order of the codes. end: where these end.
    """

    data: bytes
    dims: Sequence[int]
    bits: list[int]
    kind: np.dtype[Any]
    top: float
    start: int
    levels: list[tuple[int, list[int]]]
    end: int


def written_at(data: bytes, start: int, dims: Sequence[int]) -> Written:
    """What a record has from `start` on, nothing decoded.

    Raises:
        FileError: it ends too early.
    """
    early = FileError("a record of the library ends too early")
    if start + _HEAD.size > len(data):
        raise early
    count, wide, top = _HEAD.unpack_from(data, start)
    start += _HEAD.size
    codes = data[start : start + (count + 1) // 2]
    start += len(codes)
    bits = [level for code in codes for level in _LEVELS_OF[code]][:count]
    levels = [(b, [k for k, x in enumerate(bits) if x == b]) for b in sorted({*bits} - {0})[::-1]]
    if min(bits, default=0) < 0:
        raise FileError("a record of the library has rows of no known number of bits")
    kind = _KINDS[wide != 0]
    end = start + count * kind.itemsize
    for level, chosen in levels:
        end += (len(chosen) * sum(dims) * level + 7) // 8
    if len(bits) < count or end > len(data):
        raise early
    return Written(data, dims, bits, kind, top, start, levels, end)


def read_rows(
    data: bytes,
    start: int,
    dims: Sequence[int],
    seeds: Sequence[int],
    device: torch.device | str | None = None,
) -> tuple[list[Tensor], Tensor, int]:
    """The inverse of `write_rows`.

    Args:
        data: the record. start: where the rows begin. dims: length of a row on each side.

    Returns:
        [(k, d) float32 for each side], coefficients (k,) float32, and where the rows end.
    """
    written = written_at(data, start, dims)
    [(sides, coefficients)] = read_together([written], seeds, device)
    return sides, coefficients, written.end


def read_together(
    written: Sequence[Written],
    seeds: Sequence[int],
    device: torch.device | str | None = None,
    scales: Callable[[Tensor], Sequence[Tensor]] | None = None,
) -> list[tuple[list[Tensor], Tensor]]:
    """Rows of many records, decoded together: each number is as if its record were read alone.

    Codes of one number of bits are unpacked and looked up at once, rows of one length rotated back
    at once: small ones cost a few operations each, and not a few dozen.

    Args:
        seeds: of each side's rotation.
        scales: coefficients → what each side's rows are multiplied by; by nothing where None.

    Returns:
        For each, views of what is shared: [(k, d) float32 for each side], coefficients (k,)
        float32.
    """
    for w in written:
        if 0 in w.bits:  # none is written, and they would be large for their bytes
            raise FileError("a record of the library has rows of 0 bits")
    sides = _Sides(seeds)
    firsts = [[sides.place(s, d, len(w.bits)) for s, d in enumerate(w.dims)] for w in written]
    sides.begin()
    at = [w.start + len(w.bits) * w.kind.itemsize for w in written]
    for level in sorted({level for w in written for level, _ in w.levels}, reverse=True):
        pieces = []
        for k, w in enumerate(written):
            for chosen in (chosen for here, chosen in w.levels if here == level):
                pieces.append((w.data, at[k], len(chosen) * sum(w.dims), k, chosen))
                at[k] += (pieces[-1][2] * level + 7) // 8
        for (*_, k, chosen), numbers in zip(pieces, _numbers(level, pieces), strict=True):
            start = 0
            for s, d in enumerate(written[k].dims):
                stop = start + len(chosen) * d
                sides.fill(s, d, firsts[k][s], chosen, numbers[start:stop], level <= 8)
                start = stop
    coefficients = [
        np.frombuffer(w.data, w.kind, len(w.bits), w.start).astype(np.float32) * np.float32(w.top)
        for w in written
    ]
    c = torch.from_numpy(np.concatenate(coefficients)).to(device)
    sides.turn_back(device)
    starts = np.cumsum([0, *(len(w.bits) for w in written)]).tolist()
    for s, scale in enumerate(scales(c) if scales else ()):
        sides.scale(
            s,
            [(w.dims[s], scale[a:b]) for w, a, b in zip(written, starts, starts[1:], strict=False)],
        )
    found, start = [], 0
    for w, first in zip(written, firsts, strict=True):
        count = len(w.bits)
        rows = [sides.rows(s, d, first[s], count) for s, d in enumerate(w.dims)]
        found.append((rows, c[start : start + count]))
        start += count
    return found


def _numbers(level: int, pieces: Sequence[tuple[bytes, int, int, Any, Any]]) -> list[np.ndarray]:
    """float32 numbers of streams of one number of bits, each (data, start, count, …)."""
    if level > 8:
        return [
            np.frombuffer(data, _FLOATS[level], count, start).astype(np.float32)
            for data, start, count, *_ in pieces
        ]
    # Eight codes fill `level` bytes: streams are unpacked as one, each from a byte that begins so.
    groups = [-(-count // 8) for _, _, count, *_ in pieces]
    stream = b"".join(
        data[start : start + (count * level + 7) // 8].ljust(level * some, b"\0")
        for (data, start, count, *_), some in zip(pieces, groups, strict=True)
    )
    codes = torch.from_numpy(unpack(stream, level, 8 * sum(groups)))
    numbers = dequantise(codes, level).numpy()
    ends = 8 * np.cumsum([0, *groups])
    return [numbers[end : end + p[2]] for end, p in zip(ends.tolist(), pieces, strict=False)]


class _Sides:
    """Rows of many records by their side and length: room for all, filled, then rotated back.

    Args:
        seeds: of each side's rotation.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._seeds = seeds
        self._counts: dict[tuple[int, int], int] = {}
        self._filled: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        self._turned: dict[tuple[int, int], Tensor] = {}

    def place(self, side: int, d: int, count: int) -> int:
        """Keep room for rows; the first one's number."""
        first = self._counts.get((side, d), 0)
        self._counts[side, d] = first + count
        return first

    def begin(self) -> None:
        """Make the room, which is all filled: rows, and whether each was rotated."""
        for (side, d), count in self._counts.items():
            self._filled[side, d] = np.empty((count, d), np.float32), np.zeros(count, bool)

    def fill(
        self, side: int, d: int, first: int, chosen: list[int], numbers: np.ndarray, rotated: bool
    ) -> None:
        """Some of a record's rows, whose first one is number `first`."""
        rows, turned = self._filled[side, d]
        where: Any = slice(first + chosen[0], first + chosen[-1] + 1)
        if where.stop - where.start != len(chosen):
            where = first + np.array(chosen)
        rows[where], turned[where] = numbers.reshape(-1, d), rotated

    def turn_back(self, device: torch.device | str | None) -> None:
        """Undo the rotation of those that were rotated."""
        for (side, d), (rows, turned) in self._filled.items():
            X = torch.from_numpy(rows).to(device)
            if turned.all():
                X = unrotate(X, self._seeds[side])
            elif turned.any():
                index = torch.as_tensor(np.flatnonzero(turned), device=device)
                X[index] = unrotate(X[index], self._seeds[side])
            self._turned[side, d] = X

    def scale(self, side: int, parts: Sequence[tuple[int, Tensor]]) -> None:
        """Multiply a side's rows, in their places' order, by (d, (k,) numbers) of each record."""
        by_length: dict[int, list[Tensor]] = {}
        for d, numbers in parts:
            by_length.setdefault(d, []).append(numbers)
        for d, numbers_of in by_length.items():
            self._turned[side, d] *= torch.cat(numbers_of)[:, None]

    def rows(self, side: int, d: int, first: int, count: int) -> Tensor:
        """(count, d) of one record."""
        return self._turned[side, d][first : first + count]


def rounded_coefficients(c: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Coefficients as `read_rows` will give them: relative to the largest, in half precision
    unless a row is kept as floats.

    Args:
        c: (k,) or (n, k); rows of a 2-D array are separate records. bits: the same shape.
    """
    if c.ndim == 2:
        return (
            np.stack([rounded_coefficients(a, b) for a, b in zip(c, bits, strict=True)])
            if len(c)
            else c
        )
    live = bits > 0
    top = np.float32(np.abs(c[live]).max(initial=0.0))
    if not top > 0:
        return np.zeros_like(c)
    kind = np.float32 if needs_float32(bits) else np.float16
    with np.errstate(under="ignore"):
        return np.where(live, (c / float(top)).astype(kind).astype(np.float32) * top, 0.0).astype(
            np.float64
        )


def needs_float32(bits: np.ndarray) -> bool:
    """Whether coefficients are kept in float32: where any row is a float."""
    return bool((bits > 8).any())


def rows_nbytes(bits: np.ndarray, width: int) -> np.ndarray:
    """Bytes that `write_rows` takes for each record, without rounding up to whole bytes.

    Args:
        bits: (n, k), 0 for components that are left out. width: numbers a component.
    """
    kept = (bits > 0).sum(-1)
    size = np.where((bits > 8).any(-1), 4, 2)
    return np.asarray(_HEAD.size + kept / 2 + kept * size + bits.sum(-1) * width / 8)


def _descending(bits: np.ndarray) -> list[int]:
    return [int(b) for b in np.unique(bits)[::-1] if b > 0]
