"""A seeded rotation that makes the coordinates of a vector look Gaussian, and its inverse.

With `H` the Hadamard matrix of size p (entries ±1, `H Hᵀ = p I`) and `s` a vector of random signs,

    y = H (s ⊙ x) / √p,        x = s ⊙ (H y) / √p.

Every coordinate of y is a sum of all coordinates of x under random signs, so that one codebook,
made for the normal distribution, fits every vector (Ailon and Chazelle 2009, "The fast
Johnson-Lindenstrauss transform"; Tseng et al. 2024, QuIP#, arXiv:2402.04396). H exists for powers
of two only. For any other length d, with p the largest power of two below it, the first p
coordinates are rotated, then the last p with signs of their own: both maps are orthogonal, so
their product is.

The rotation is part of a file format, therefore it is the same for ever:

- The sign of coordinate i in stage t (0, and 1 for the second of two) is the top bit of
  `mix(mix(seed + (t + 1) γ) + (i + 1) γ)` modulo 2⁶⁴, where mix and γ are those of splitmix64
  (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"); a set bit is -1.
- H is applied by additions and subtractions in a fixed order, coordinates far apart first. So the
  result is the same bit for bit on every machine and device, alone or in a batch.

What is only rounded to codes afterwards needs no such care: `quick_rotate` multiplies by Kronecker
factors of H, which takes a quarter of the time and rounds as shapes and library please.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# splitmix64: the step between states, and the two multipliers of its mixing function.
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))

# On the CPU rows pass in blocks that stay in the cache. Above this many elements torch would also
# split each addition (of half a block) over threads, whose meeting costs more than the addition on
# shared cores. So many rows there are in a block at least.
_CPU_BLOCK = 1 << 16
_DEVICE_BLOCK = 1 << 24
_ROWS = 16
# Of products: how many elements a block has; below this length additions are as fast; the sizes of
# factors of H that are.
_CPU_PRODUCTS = 1 << 17
_SHORT = 64
_LAST, _OTHERS = 32, 16


def rotate(x: Tensor, seed: int) -> Tensor:
    """The rotation of every vector along the last axis.

    Args:
        x: `(..., d)`, float32 or float64, d ≥ 1, on any device; it is not changed.
        seed: 0 ≤ seed < 2⁶⁴; names the rotation.

    Returns:
        `(..., d)`, a new tensor of the same type and device, detached from any graph.

    Raises:
        TypeError: x is of another type.
        ValueError: x has no axis, its last axis is empty or the seed is out of range.

    Examples:
        >>> x = torch.tensor([3.0, 4.0])
        >>> round(float(rotate(x, seed=0).norm()), 4)
        5.0
    """
    return _apply(x, seed, inverse=False)


def unrotate(y: Tensor, seed: int) -> Tensor:
    """What `rotate` with the same seed made y from, up to rounding.

    Args:
        y: `(..., d)`, float32 or float64, d ≥ 1, on any device; it is not changed.
        seed: the one given to `rotate`.

    Returns:
        `(..., d)`, a new tensor of the same type and device, detached from any graph.

    Raises:
        TypeError: y is of another type.
        ValueError: y has no axis, its last axis is empty or the seed is out of range.

    Examples:
        >>> x = torch.tensor([3.0, 4.0, 5.0])
        >>> bool(torch.allclose(unrotate(rotate(x, seed=7), seed=7), x))
        True
    """
    return _apply(y, seed, inverse=True)


def quick_rotate(x: Tensor, seed: int, out: Tensor | None = None) -> Tensor:
    """`rotate` by matrix products, up to rounding; what is read back must not depend on it.

    Args:
        x, seed: as for `rotate`. out: a contiguous tensor for the result; a new one if not given.

    Returns:
        As `rotate`.

    Raises:
        TypeError, ValueError: as `rotate`.
    """
    # In a lower precision the products would not be up to rounding.
    if torch.get_float32_matmul_precision() != "highest" or x.shape[-1:].numel() < _SHORT:
        return _apply(x, seed, inverse=False, out=out)
    return _apply(x, seed, inverse=False, stage_of=_stage_of_products, out=out)


def _apply(
    x: Tensor,
    seed: int,
    *,
    inverse: bool,
    stage_of: Callable[..., None] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    stage_of = stage_of or functools.partial(_stage, inverse=inverse)
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"a rotation needs float32 or float64, not {x.dtype}: convert first")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"a rotation needs vectors along the last axis, not shape {tuple(x.shape)}"
        )
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"the seed of a rotation lies in [0, 2**64), not {seed}")
    d = x.shape[-1]
    size = 1 << (d.bit_length() - 1)
    with torch.no_grad():
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
        rows_in, rows_out = x.reshape(-1, d), y.view(-1, d)
        if size == d:
            stage_of(rows_in, rows_out, _signs(size, seed, 0, x.dtype, x.device))
            return y
        parts = slice(0, size), slice(d - size, d)
        alone = slice(0, d - size) if inverse else slice(size, d)  # by the first of the two stages
        rows_out[:, alone] = rows_in[:, alone]
        source = rows_in
        for stage in (1, 0) if inverse else (0, 1):
            here, signs = parts[stage], _signs(size, seed, stage, x.dtype, x.device)
            stage_of(source[:, here], rows_out[:, here], signs)
            source = rows_out
    return y


@lru_cache(maxsize=32)
def _signs(size: int, seed: int, stage: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The signs of one stage over √size: `(size,)`, shared by all calls, never written to."""
    index = np.arange(1, size + 1, dtype=np.uint64)
    start = np.array([seed], dtype=np.uint64)
    step = np.full(1, _GAMMA)
    words = _mix(_mix(start + np.uint64(stage + 1) * step) + index * step)
    negative = torch.from_numpy((words >> np.uint64(63)).astype(np.float64))
    return ((1 - 2 * negative) / math.sqrt(size)).to(device, dtype)


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The mixing function of splitmix64. Arrays only: numpy warns when a scalar wraps around."""
    z = (z ^ (z >> np.uint64(30))) * _MIX[0]
    z = (z ^ (z >> np.uint64(27))) * _MIX[1]
    return z ^ (z >> np.uint64(31))


def _stage(x: Tensor, y: Tensor, signs: Tensor, inverse: bool) -> None:
    """Write `H (s ⊙ x)` or `s ⊙ (H x)` for all rows of x `(n, p)` to y `(n, p)`, maybe x itself.

    The signs `(p,)` bring the factor 1/√p with them.
    """
    count, size = x.shape
    room = _CPU_BLOCK if x.device.type == "cpu" else _DEVICE_BLOCK
    rows = min(count, max(_ROWS, room // size))
    for start in range(0, count, max(rows, 1)):
        part = x[start : start + rows]
        first, steps, last = _steps(size, len(part), x.dtype, x.device)
        if inverse:
            first.copy_(part.T)
        else:
            torch.mul(part.T, signs[:, None], out=first)
        for one, other, above, below in steps:
            torch.add(one, other, out=above)
            torch.sub(one, other, out=below)
        if inverse:
            torch.mul(last.T, signs, out=y[start : start + rows])
        else:
            y[start : start + rows] = last.T


_Steps = tuple[Tensor, list[tuple[Tensor, Tensor, Tensor, Tensor]], Tensor]


def _steps(size: int, rows: int, dtype: torch.dtype, device: torch.device) -> _Steps:
    """Buffers: where rows come in, the halves that each step adds and where to, where they go out.

    In them coordinates come first and rows last, so that an addition runs over neighbours, however
    near its coordinates are. Small ones are kept, a thread its own: to make them takes as long as
    the additions.
    """
    if device.type == "cpu" and size * rows <= 2 * _CPU_BLOCK:
        return _kept_steps(size, rows, dtype, device, threading.get_ident())
    return _new_steps(size, rows, dtype, device)


def _new_steps(size: int, rows: int, dtype: torch.dtype, device: torch.device) -> _Steps:
    with torch.inference_mode(False):  # elsewhere they could not be written to
        now, other = torch.empty(2, size, rows, dtype=dtype, device=device)
        first, steps, half = now, [], size // 2
        while half:
            shape = (size // (2 * half), 2, half * rows)
            old, new = now.view(shape), other.view(shape)
            steps.append((old[:, 0], old[:, 1], new[:, 0], new[:, 1]))
            now, other = other, now
            half //= 2
    return first, steps, now


@lru_cache(maxsize=16)
def _kept_steps(
    size: int, rows: int, dtype: torch.dtype, device: torch.device, _thread: int
) -> _Steps:
    return _new_steps(size, rows, dtype, device)


def _stage_of_products(x: Tensor, y: Tensor, signs: Tensor) -> None:
    """`_stage` forwards: H is a Kronecker product of small ones, each an axis of its own."""
    count, size = x.shape
    room = _CPU_PRODUCTS if x.device.type == "cpu" else _DEVICE_BLOCK
    rows = min(count, max(1, room // size))
    buffers = x.new_empty(2, size * rows)
    last = min(size, _LAST)
    for start in range(0, count, max(rows, 1)):
        here = slice(start, start + rows)
        now, other = (b[: size * len(x[here])] for b in buffers)
        torch.mul(x[here], signs, out=now.view(-1, size))
        H, after = _hadamard(last, x.dtype, x.device), last
        torch.mm(now.view(-1, last), H, out=other.view(-1, last))
        while after < size:
            now, other = other, now
            H = _hadamard(min(size // after, _OTHERS), x.dtype, x.device)
            old, new = (b.view(-1, len(H), after) for b in (now, other))
            torch.bmm(H.expand(len(old), -1, -1), old, out=new)
            after *= len(H)
        y[here] = other.view(-1, size)


@lru_cache(maxsize=32)
def _hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """H of this size, shared by all calls, never written to."""
    H = torch.ones(1, 1, dtype=dtype, device=device)
    while len(H) < size:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H
