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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ...collection.batch import Factors, held_by_float32, power_of_two
from ...collection.stack import Stack
from ..coding.bits import bits_for_error
from ..coding.codebook import DISTORTION
from ..coding.flat_part import FlatSide, code_flat_rows, flattened
from .plan import FlatBases

_PIECE = 1 << 20  # numbers in a piece of the columns
_BLOCKS = 16  # rows of a side that take no more bytes than so many blocks are held at once
_FEW = 64  # and so many in any case
_GRAM = 1024  # rows that have a Gram
_WIDEST = 512  # a sketch, of directions that nobody has counted
_MARGIN = 16  # directions of a sketch beyond those that are wanted
_LEFT = np.array([DISTORTION.get(bits, np.nan) for bits in range(max(DISTORTION) + 1)])


@dataclass(frozen=True)
class FlatSpectrum:
    """One side's directions.

    Args:
        mean: (D,). energies: (K,) squared singular values.
        directions: which of the K → so many orthonormal rows of length D, in a fresh tensor.
        squares: (N,) ‖x_i‖², mean included; their mean where the directions were sketched.
        loadings: (N, K) of every adapter; None where the directions were sketched.
        missed: share of Σ‖x_i‖² that a sketch misses.
        unit: a power of two; all the others are of the x_i divided by it.
    """

    mean: Tensor
    energies: np.ndarray
    directions: Callable[[np.ndarray], Tensor]
    squares: np.ndarray
    loadings: np.ndarray | None = None
    missed: float = 0.0
    unit: float = 1.0

    @property
    def total(self) -> float:
        """Σ‖x_i‖²; never 0."""
        return max(float(self.squares.sum()), 1e-300)

    @cached_property
    def shares(self) -> np.ndarray:
        """(1 + K,) of Σ‖x_i‖²: the mean's, and the directions'."""
        mean = len(self.squares) * float(self.mean.double().square().sum())
        found: np.ndarray = np.concatenate([[mean], self.energies]) / self.total
        return found

    @property
    def norms(self) -> np.ndarray:
        """(N,) squared norms of the factors themselves."""
        return self.squares * self.unit**2

    def lost(self, levels: np.ndarray) -> np.ndarray:
        """(2, N) what coding at these levels is expected to miss of those: noise, which is alike
        everywhere, and what is missed of the directions themselves.
        """
        n = len(self.squares)
        own = self.energies[None] / n if self.loadings is None else self.loadings**2
        left = _LEFT[levels]
        noise = self.total / n * self.shares[0] * left[0] + own @ (left * (1 - left))[1:]
        rest = self.total / n * self.missed + own @ left[1:] ** 2
        return np.stack([np.broadcast_to(x, n) for x in (noise, rest)]) * self.unit**2


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
    gram, center, squares = _gram_by_columns(parts)
    if not bool(held_by_float32(squares.sum())):
        rows.fit(max(float(X.abs().max()) for X in parts))
        parts = [X / rows.unit for X in parts]
        gram, center, squares = _gram_by_columns(parts)
    values, vectors = (t.numpy()[..., ::-1] for t in torch.linalg.eigh(gram.cpu()))
    values, vectors = values[:most], vectors[:, :most]
    alive = _alive(values)
    values, vectors = values[alive], vectors[:, alive]
    mix = torch.as_tensor((vectors / np.sqrt(values)).T, dtype=torch.float32).to(center)

    def directions(kept: np.ndarray) -> Tensor:
        found, some = center.new_empty(len(kept), len(center)), mix[torch.as_tensor(kept)]
        for here, X in _columns(parts):
            found[:, here] = some @ X.sub_(center[here])
        return found

    own = vectors * np.sqrt(values)
    return FlatSpectrum(
        center, values.copy(), directions, squares.cpu().numpy(), own, unit=rows.unit
    )


def _alive(values: np.ndarray) -> np.ndarray:
    """Float32 products leave noise of about 1e-7 of the largest; nothing below is a direction."""
    alive: np.ndarray = values > 1e-7 * max(float(values.max(initial=0.0)), 1e-300)
    return alive


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
        drawn = torch.randn(len(X), self._width, generator=generator, dtype=torch.float32).to(X)
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
            total = torch.tensor(self._total, dtype=torch.float64)
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
        span = (self._span @ vectors.flip(1)[:, : len(energies)].to(self._span)).T
        count, size = len(self.rows), self._total
        missed = size - count * float(self._center.double().square().sum()) - energies.sum()
        return FlatSpectrum(
            self._center,
            energies,
            lambda kept: span[torch.as_tensor(kept, device=span.device)],
            np.full(count, size / count),
            missed=max(0.0, float(missed)) / max(size, 1e-300),
            unit=self.rows.unit,
        )


def _columns(parts: list[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Some columns of all rows at a time, copied to where the last ones were: they stay in the
    cache, where a centred copy of everything would pass through memory once more.
    """
    n, D = sum(len(X) for X in parts), parts[0].shape[1]
    width = min(D, max(256, _PIECE // n))
    piece = parts[0].new_empty(n, width)
    for a in range(0, D, width):
        here = slice(a, min(a + width, D))
        X = piece if a + width <= D else piece.new_empty(n, D - a)
        yield here, torch.cat([part[:, here] for part in parts], out=X)


def _gram_by_columns(parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The Gram (N, N) of centred rows, their mean (D,), and (N,) ‖x_i‖² with it in float64."""
    n, D = sum(len(X) for X in parts), parts[0].shape[1]
    center = parts[0].new_empty(D)
    gram = torch.zeros(n, n, dtype=torch.float64, device=center.device)
    squares = gram.new_zeros(n)
    half = -(-n // 2)
    for here, X in _columns(parts):
        torch.mean(X, 0, out=center[here])  # of every row: it is the mean
        X.sub_(center[here])
        squares += X @ center[here]
        gram[:half] += X[:half] @ X.T
        gram[half:, half:] += X[half:] @ X[half:].T  # the fourth quarter follows by symmetry
    gram[half:, :half] = gram[:half, half:].T
    squares = 2 * squares + gram.diagonal() + center.double().square().sum()
    return gram, center, squares.clamp_min(0)


def levels_at(s: FlatSpectrum, count: int | None, bits: int) -> np.ndarray:
    """So many bits of the mean and of each direction, 0 of those beyond a count."""
    place = np.arange(len(s.energies) + 1)
    return np.where(place <= (len(place) if count is None else count), bits, 0)


@dataclass(frozen=True)
class Way:
    """Bits of both sides, and what is expected of them.

    Args:
        levels: side → bits of the mean and of each direction.
        nbytes: of the sides and all loadings.
        missed: (2, N) squared norms, of noise and of the rest.
    """

    levels: dict[str, np.ndarray]
    nbytes: float
    missed: np.ndarray


def ways_within(
    spectra: Mapping[str, FlatSpectrum], squares: np.ndarray, rank: int, budgets: Sequence[float]
) -> list[Way]:
    """For each share of Σ‖ΔW_i‖² the fewest bits that are expected to miss no more of it; if
    sketches miss more, that is left to residuals.

    What rounding misses of B is the same in all its columns, and A makes ‖A‖² / r of it; so it does
    of the rest, it is assumed.

    Args:
        squares: (N,) ‖ΔW_i‖², not all 0. rank: of the factors.
    """
    A, B = spectra["A"], spectra["B"]
    # ‖ΔW‖ is at most ‖B‖ ‖A‖: what was lost to rounding must not say otherwise.
    even = max(1.0, float((A.norms * B.norms).sum() / squares.sum())) / rank
    shares = np.asarray(budgets) / even
    energy = np.concatenate([s.shares for s in (A, B)])
    cost = np.concatenate([np.full(len(s.shares), len(s.mean) / 8) for s in (A, B)])
    left = np.maximum(shares - A.missed - B.missed, shares / 2)
    bits = bits_for_error(np.tile(energy, (len(left), 1)), cost, False, left)
    bits[:, [0, len(A.shares)]] = np.maximum(bits[:, [0, len(A.shares)]], 1)
    found = []
    for one in bits:
        of_A, of_B = np.split(one, [len(A.shares)])
        missed = (A.norms * B.lost(of_B) + B.norms * A.lost(of_A)) / rank
        nbytes = cost @ one + 2 * len(squares) * np.count_nonzero(one)
        found.append(Way({"A": of_A, "B": of_B}, float(nbytes), missed))
    return found


def coded_sides(
    spectra: Mapping[str, FlatSpectrum], levels: Mapping[str, np.ndarray], wide: bool = False
) -> FlatBases:
    """Both sides coded; `wide`: loadings will be kept in float32."""
    A, B = (coded_side(spectra[side], side, levels[side]) for side in "AB")
    return FlatBases(A, B, wide)


def coded_side(s: FlatSpectrum, side: str, levels: np.ndarray) -> FlatSide:
    """A side coded at these bits of the mean and of each direction, 0 of those left out."""
    kept = np.flatnonzero(levels[1:] > 0)
    # A direction is as long as a typical x_i: a power of two, so that 32 bits lose nothing.
    length = 2.0 ** math.frexp(math.sqrt(s.total / len(s.squares)))[1]
    rows = torch.cat([s.mean[None] * s.unit, s.directions(kept).mul_(length * s.unit)])
    coded = code_flat_rows(rows, levels[np.r_[0, kept + 1]], side)
    if s.loadings is None or (levels[kept + 1] < 32).any():
        return coded
    known = torch.as_tensor(s.loadings[:, kept] / length, dtype=torch.float32)
    return FlatSide(coded.rows, coded.record, known.to(s.mean.device), side)
