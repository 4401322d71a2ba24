"""The form `flat`: a mean and k directions of the flattened factors, k numbers a side.

With x_i = vec(A_i) (and the same for scale · B_i) the N×N Gram of the centred x_i gives both the
directions and every loading; no (N, D) matrix is ever decomposed. It describes adapters in one
gauge well (one run's checkpoints, small steps from one start), and nothing else: a change of gauge
that leaves ΔW alone changes every x_i.

Where that is too much, of many adapters or long rows, a few directions are found without a Gram:
every x_i goes into a Gaussian mixture of all (Halko, Martinsson & Tropp 2011), and what spans the
mixtures is multiplied once more by Σ x_i x_iᵀ. Three passes, in which an x_i meets no other.

Given up: adapters of several ranks or gauges, and weights that make small updates count as much as
large ones: the squares that the directions keep are those of factors, not of ΔW.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...collection.batch import Factors, held_by_float32, power_of_two
from ...collection.stack import Stack
from ..coding.bits import bits_for_error
from ..coding.flat_part import FlatSide, code_flat_rows, flattened

_PIECE = 1 << 20  # numbers in a piece of the columns
_BLOCKS = 16  # rows of a side that take no more bytes than so many blocks are held at once
_FEW = 64  # and so many in any case
_GRAM = 1024  # rows that have a Gram
_WIDEST = 512  # a sketch, of directions that nobody has counted
_MARGIN = 16  # directions of a sketch beyond those that are wanted


@dataclass(frozen=True)
class FlatSpectrum:
    """One side's directions.

    Args:
        mean: (D,). directions: (K, D) orthonormal rows. energies: (K,) squared singular values.
        total: Σ‖x_i‖² over the stack, mean included. count: N.
        loadings: (N, K) of every adapter; None where the directions were sketched.
        missed: share of the total that a sketch misses.
        unit: a power of two; all the others are of the x_i divided by it.
    """

    mean: Tensor
    directions: Tensor
    energies: np.ndarray
    total: float
    count: int
    loadings: np.ndarray | None = None
    missed: float = 0.0
    unit: float = 1.0


def flat_spectra(
    stack: Stack, most: int | None = None, every: bool = False
) -> dict[str, FlatSpectrum]:
    """The leading directions of either flattened side, "A" and "B".

    Args:
        most: directions wanted at most; those that matter, or as many as memory allows, when None.
        every: all of them, whatever they take.
    """
    n, found = len(stack), {}
    sketches: list[_Sketch] = []
    for side in "AB":
        rows = _Rows(stack, side)
        room = max(_FEW, _BLOCKS * stack.block_bytes // (4 * rows.length))
        if every or (n <= _GRAM and (n <= room or stack.stays)):
            found[side] = _whole(rows, n - 1 if most is None else min(most, n - 1))
        else:
            wanted = min(room, _WIDEST) if most is None else most
            sketches.append(_Sketch(rows, min(wanted + _MARGIN, rows.length, n - 1), wanted))
    while sketches:
        start = 0
        for f in stack.factors():
            for sketch in sketches:
                sketch.use(sketch.rows.of(f), start)
            start += len(f.members)
        for sketch in sketches:
            sketch.advance()
        found |= {s.rows.side: s.spectrum for s in sketches if s.spectrum is not None}
        sketches = [s for s in sketches if s.spectrum is None]
    return found


class _Rows:
    """The flattened factors x_i of a stack, in units in which float32 holds their squares.

    Args:
        stack, side: whose.
    """

    def __init__(self, stack: Stack, side: str) -> None:
        self._stack, self.side, self._rank = stack, side, int(stack.ranks.max())
        self.length = self._rank * stack.shape[0 if side == "B" else 1]
        self.unit = 1.0

    def __len__(self) -> int:
        return len(self._stack)

    def __iter__(self) -> Iterator[Tensor]:
        """(n, D) of each block, in order."""
        return map(self.of, self._stack.factors())

    def of(self, f: Factors) -> Tensor:
        """(n, D) of a block."""
        X = flattened(f, self.side, self._rank)
        return X if self.unit == 1 else X / self.unit

    def fit(self, top: float) -> None:
        """Take a power of two near the largest number, `top`, as the unit."""
        size = torch.tensor(top, dtype=torch.float64)
        self.unit = float(power_of_two(size).clamp(2.0**-126, 2.0**126))


def _whole(rows: _Rows, most: int) -> FlatSpectrum:
    """Directions and loadings from the Gram of rows that are held at once."""
    parts = list(rows)
    gram, center = _gram_by_columns(parts)
    total = _total(gram, center)
    if not bool(held_by_float32(total)):
        rows.fit(max(float(X.abs().max()) for X in parts))
        parts = [X / rows.unit for X in parts]
        gram, center = _gram_by_columns(parts)
        total = _total(gram, center)
    values, vectors = (t.numpy()[..., ::-1] for t in torch.linalg.eigh(gram.cpu()))
    values, vectors = values[:most], vectors[:, :most]
    alive = _alive(values)
    values, vectors = values[alive], vectors[:, alive]
    mix = torch.as_tensor((vectors / np.sqrt(values)).T, dtype=torch.float32).to(center)
    directions = center.new_zeros(len(values), len(center))
    at, work = 0, None
    for X in parts:
        if work is None or work.shape != X.shape:
            work = torch.empty_like(X)  # a fresh one for each block costs more than the product
        directions.addmm_(mix[:, at : at + len(X)], torch.sub(X, center, out=work))
        at += len(X)
    return FlatSpectrum(
        center,
        directions,
        values.copy(),
        float(total),
        len(rows),
        vectors * np.sqrt(values),
        unit=rows.unit,
    )


def _alive(values: np.ndarray) -> np.ndarray:
    """Float32 products leave noise of about 1e-7 of the largest; nothing below is a direction."""
    alive: np.ndarray = values > 1e-7 * max(float(values.max(initial=0.0)), 1e-300)
    return alive


def _total(gram: Tensor, center: Tensor) -> Tensor:
    return gram.trace() + len(gram) * center.double().square().sum()


class _Sketch:
    """The leading directions from what spans mixtures of the rows: passes of `use`, and `advance`
    after each, until there is a `spectrum`. What a pass takes of a block is added up.

    Args:
        rows: the side. width: mixtures. most: directions wanted at most.
    """

    def __init__(self, rows: _Rows, width: int, most: int) -> None:
        self.rows, self._width, self._most = rows, width, most
        self.spectrum: FlatSpectrum | None = None
        self._sum = self._center = self._weights = self._span = torch.empty(0)
        self._total = self._top = 0.0
        # Functions, as methods of its own would be a cycle, and its tensors wait for it.
        self._step: Callable[[_Sketch, Tensor, int], None] = _Sketch._mix

    def use(self, X: Tensor, start: int) -> None:
        """One block (n, D), and its first row's number."""
        self._step(self, X, start)

    def _mix(self, X: Tensor, start: int) -> None:
        # Drawn by where the block begins: the same, whoever takes it.
        generator = torch.Generator().manual_seed(start)
        drawn = torch.randn(len(X), self._width, generator=generator).to(X)
        if not start:
            self._sum = X.new_zeros(X.shape[1], self._width)
            self._center, self._weights = X.new_zeros(X.shape[1]), X.new_zeros(self._width)
            self._total = self._top = 0.0
        self._sum.addmm_(X.T, drawn)
        self._center += X.sum(0)
        self._weights += drawn.sum(0)
        self._total += float(X.double().square().sum())
        self._top = max(self._top, float(X.abs().max()))

    def _multiply(self, X: Tensor, start: int) -> None:
        centred = X - self._center
        self._sum.addmm_(centred.T, centred @ self._span)

    def _project(self, X: Tensor, start: int) -> None:
        C = ((X - self._center) @ self._span).double()
        self._sum.addmm_(C.T, C)

    def advance(self) -> None:
        """Take the sums of a pass."""
        if self._step == _Sketch._mix:
            total = torch.tensor(self._total)
            if self.rows.unit == 1 and self._top > 0 and not bool(held_by_float32(total)):
                self.rows.fit(self._top)
                return  # the same pass in other units
            self._center /= len(self.rows)
            self._sum -= self._center[:, None] * self._weights
        if self._step == _Sketch._project:
            self.spectrum = self._found(self._sum)
            return
        self._span = torch.linalg.qr(self._sum)[0]
        if self._step == _Sketch._mix:
            self._sum, self._step = torch.zeros_like(self._span), _Sketch._multiply
        else:
            like = self._span.new_zeros(self._width, self._width, dtype=torch.float64)
            self._sum, self._step = like, _Sketch._project

    def _found(self, inside: Tensor) -> FlatSpectrum:
        values, vectors = torch.linalg.eigh(inside.cpu())
        energies = values.flip(0).numpy()[: self._most]
        # Beside the mean, what is below float32's digits is no direction either.
        energies = energies[_alive(energies) & (energies > 1e-13 * self._total)]
        kept = vectors.flip(1)[:, : len(energies)].to(self._span)
        count, size = len(self.rows), self._total
        missed = size - count * float(self._center.double().square().sum()) - energies.sum()
        return FlatSpectrum(
            self._center,
            (self._span @ kept).T.contiguous(),
            energies,
            size,
            count,
            missed=max(0.0, float(missed)) / max(size, 1e-300),
            unit=self.rows.unit,
        )


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
    length = 2.0 ** math.frexp(math.sqrt(s.total / s.count))[1] if s.total > 0 else 1.0
    directions = s.directions[torch.as_tensor(kept - 1, device=s.mean.device)]
    rows = torch.cat([s.mean[None] * s.unit, directions * (length * s.unit)])
    coded = code_flat_rows(rows, np.concatenate([levels[:1], levels[kept]]), side)
    if s.loadings is None or (levels[kept] < 32).any():
        return coded
    loadings = s.loadings[:, kept - 1] / length
    known = torch.as_tensor(loadings, dtype=torch.float32, device=s.mean.device)
    return FlatSide(coded.rows, coded.record, known, side)


def _levels(s: FlatSpectrum, budget: float) -> np.ndarray:
    """Bits of the mean and of each direction within a share of Σ‖x_i‖²; if a sketch misses more,
    that is left to residuals.
    """
    budget = max(budget - s.missed, budget / 2)
    mean = s.count * float((s.mean.double() ** 2).sum())
    energies = np.concatenate([[mean], s.energies]) / max(s.total, 1e-300)
    cost = np.full(len(energies), s.directions.shape[1] / 8)
    return bits_for_error(energies, cost, np.zeros(len(energies), bool), budget)


def predicted_nbytes(s: FlatSpectrum, budget: float) -> float:
    """Bytes of a side within a budget, as `coded_side` will find, without coding it."""
    return float(_levels(s, budget).sum()) * s.directions.shape[1] / 8
