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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...collection.batch import power_of_two
from ...errors import FileError
from .bits import LEVELS
from .codebook import dequantise, quantise
from .packing import pack, unpack
from .rotation import rotate, unrotate

_CODE_OF = {bits: code for code, bits in enumerate(LEVELS)}
_FLOATS = {16: np.float16, 32: np.float32}
_HEAD = struct.Struct("<HBf")  # count, 1 where coefficients are float32, largest coefficient
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
    codes = np.zeros((m, d), np.uint8)
    floats: np.ndarray | None = None
    hat = torch.zeros_like(X)
    scale = torch.zeros(m, dtype=torch.float64, device=X.device)
    rounded = np.flatnonzero((bits > 0) & (bits <= 8))
    if len(rounded):
        turned = rotate(X[torch.as_tensor(rounded, device=X.device)], seed)
        for level in np.unique(bits[rounded]):
            here = np.flatnonzero(bits[rounded] == level)
            index = torch.as_tensor(here, device=X.device)
            c, s = quantise(turned[index], int(level))
            codes[rounded[here]] = c.cpu().numpy()
            turned[index] = dequantise(c, int(level), dtype=X.dtype)
            scale[torch.as_tensor(rounded[here], device=X.device)] = s.double()
        hat[torch.as_tensor(rounded, device=X.device)] = unrotate(turned, seed)
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
    bits, kind, top, start = _head(data, start)
    count = len(bits)
    if not bits.all():  # none is written, and they would be large for their bytes
        raise FileError("a record of the library has rows of 0 bits")
    relative = np.frombuffer(data, kind, count, start).astype(np.float32)
    start += count * kind.itemsize
    coefficients = torch.from_numpy(relative * np.float32(top)).to(device)
    sides = [torch.zeros(count, d, device=device) for d in dims]
    for level in _descending(bits):
        chosen = torch.as_tensor(np.flatnonzero(bits == level), device=device)
        numbers = len(chosen) * sum(dims)
        if level <= 8:
            size = (numbers * level + 7) // 8
            flat = torch.from_numpy(unpack(data[start : start + size], level, numbers)).to(device)
        else:
            size = numbers * level // 8
            flat = torch.from_numpy(
                np.frombuffer(data, _FLOATS[level], numbers, start).astype(np.float32)
            ).to(device)
        start += size
        at = 0
        for side, d in zip(sides, dims, strict=True):
            part = flat[at : at + len(chosen) * d].reshape(len(chosen), d)
            at += len(chosen) * d
            side[chosen] = dequantise(part, level) if level <= 8 else part
    rounded = torch.as_tensor(np.flatnonzero((bits > 0) & (bits <= 8)), device=device)
    if len(rounded):
        for side, seed in zip(sides, seeds, strict=True):
            side[rounded] = unrotate(side[rounded], seed)
    return sides, coefficients, start


def skipped_rows(data: bytes, start: int, dims: Sequence[int]) -> tuple[int, int]:
    """How many rows `read_rows` would give, and where they end."""
    bits, kind, _, start = _head(data, start)
    start += len(bits) * kind.itemsize
    for level in _descending(bits):
        start += (int((bits == level).sum()) * sum(dims) * level + 7) // 8
    return len(bits), start


def _head(data: bytes, start: int) -> tuple[np.ndarray, np.dtype[Any], float, int]:
    """Bits of every row, how coefficients are stored, the largest of them, and where they begin."""
    if start + _HEAD.size > len(data):
        raise FileError("a record of the library ends too early")
    count, wide, top = _HEAD.unpack_from(data, start)
    start += _HEAD.size
    size = (count + 1) // 2
    bits = np.array(LEVELS)[unpack(data[start : start + size], 4, count)]
    return bits, np.dtype(np.float32 if wide else np.float16), top, start + size


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
