"""The form `flat`: a mean and k directions of the flattened factors, k numbers a side.

With x_i = vec(A_i) (and the same for scale · B_i) the N×N Gram of the centred x_i gives both the
directions and every loading; no (N, D) matrix is ever decomposed. It describes adapters in one
gauge well (one run's checkpoints, small steps from one start), and nothing else: a change of gauge
that leaves ΔW alone changes every x_i.

Given up: adapters of several ranks or gauges, and weights that make small updates count as much as
large ones: the squares that the directions keep are those of factors, not of ΔW. And a Gram of N×N,
which 10,000 adapters still allow (800 MB).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...collection.batch import Factors, held_by_float32, power_of_two
from ...collection.stack import Stack
from ..coding.bits import bits_for_error
from ..coding.flat_part import FlatSide, code_flat_rows, flattened

_PIECE = 1 << 20  # numbers in a piece of the columns


@dataclass(frozen=True)
class FlatSpectrum:
    """One side's directions and every adapter's loadings.

    Args:
        mean: (D,). directions: (K, D) orthonormal rows. energies: (K,) squared singular values.
        loadings: (N, K). total: Σ‖x_i‖² over the stack, mean included.
        unit: a power of two; all the others are of the x_i divided by it.
    """

    mean: Tensor
    directions: Tensor
    energies: np.ndarray
    loadings: np.ndarray
    total: float
    unit: float = 1.0


def flat_spectrum(stack: Stack, side: str, most: int | None = None) -> FlatSpectrum:
    """The leading directions of one flattened side.

    Args:
        most: directions wanted at most; all N − 1 when None.
    """
    n, rank = len(stack), int(stack.ranks.max())
    unit = 1.0
    gram, center = _centred_gram(stack, side)
    total = _total(gram, center)
    if not bool(held_by_float32(total)):
        unit = _unit(stack, side)
        gram, center = _centred_gram(stack, side, unit)
        total = _total(gram, center)
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
        X = _divided(flattened(f, side, rank), unit)
        if work is None or work.shape != X.shape:
            work = torch.empty_like(X)  # a fresh one for each block costs more than the product
        directions.addmm_(mix[:, at : at + len(X)], torch.sub(X, center, out=work))
        at += len(X)
    loadings = vectors * np.sqrt(values)
    return FlatSpectrum(center, directions, values.copy(), loadings, float(total), unit)


def _total(gram: Tensor, center: Tensor) -> Tensor:
    return gram.trace() + len(gram) * center.double().square().sum()


def _unit(stack: Stack, side: str) -> float:
    """A power of two near the largest number of a side."""
    top = torch.stack([flattened(f, side).abs().max() for f in stack.factors()]).max()
    return float(power_of_two(top.double()).clamp(2.0**-126, 2.0**126))


def _divided(X: Tensor, unit: float) -> Tensor:
    return X if unit == 1 else X / unit


def _centred_gram(stack: Stack, side: str, unit: float = 1.0) -> tuple[Tensor, Tensor]:
    """The N×N float64 Gram of the flattened factors less their mean, and the mean (D,)."""
    whole, rank = stack.in_memory(), int(stack.ranks.max())
    if whole is not None:
        return _gram_by_columns([_divided(flattened(f, side, rank), unit) for f in whole])
    n, at = len(stack), 0

    def rows(f: Factors) -> Tensor:
        return _divided(flattened(f, side, rank), unit)

    center = torch.stack([rows(f).sum(0) for f in stack.factors()]).sum(0) / n
    gram = torch.zeros(n, n, dtype=torch.float64, device=center.device)
    for f in stack.factors():
        X, there = rows(f) - center, 0
        for g in stack.factors():
            if there >= at:
                Y = X if there == at else rows(g) - center
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
    # A direction is as long as a typical x_i: a power of two, so that 32 bits lose nothing.
    length = 2.0 ** math.frexp(math.sqrt(s.total / len(s.loadings)))[1] if s.total > 0 else 1.0
    directions = s.directions[torch.as_tensor(kept - 1, device=s.mean.device)]
    rows = torch.cat([s.mean[None] * s.unit, directions * (length * s.unit)])
    coded = code_flat_rows(rows, np.concatenate([levels[:1], levels[kept]]), side)
    if (levels[kept] < 32).any():
        return coded
    loadings = s.loadings[:, kept - 1] / length
    known = torch.as_tensor(loadings, dtype=torch.float32, device=s.mean.device)
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
