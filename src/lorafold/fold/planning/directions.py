"""Where a stack lies: the leading directions of its sides, and its updates in their coordinates.

The best basis for one side of updates ΔW_i = B_i A_i, weighted w_i, is the leading eigenvectors of
G = Σ w_i ΔW_i ΔW_iᵀ (Eckart–Young on the unfolded stack). G is never formed where the side is long:
a seeded Gaussian start is multiplied by it block by block, as B_i (A_i A_iᵀ) B_iᵀ Q (Halko,
Martinsson & Tropp 2011), and Q, which spans the product and is a little wider than what is wanted,
becomes the coordinates. QᵀB_i is all that is kept of an update's side, and the rest happens in
there without looking at the stack again: the spectrum (Rayleigh–Ritz on QᵀGQ), sharing of both
sides (Tucker-2: HOSVD start, De Lathauwer et al. 2000, then a few alternating sweeps, HOOI), and
what coded bases will miss. A sketch that turns out too narrow is multiplied again and widened.

What a sketch bounds, and in which direction: the Ritz values θ_k (as shares of the total) never
exceed the eigenvalues that they stand for. So of the tail beyond R directions

    least = Σ_{k>R} θ_k  ≤  the best possible  ≤  1 − Σ_{k≤R} θ_k = tail,

where `tail` is what the directions found do miss; both are equal where nothing was sketched. For a
pair of sides the squared error then obeys, whatever the sketch has missed,

    max(least_out, least_in) ≤ best possible ≤ achieved ≤ tail_out + tail_in.

Given up: where a side has more than 2,048 coordinates and the stack more columns than that, no more
than 528 directions are found; what a basis of more could hold is left to residuals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...collection.batch import Factors, even_gauge, power_of_two
from ...collection.stack import Stack
from ..coding.bases import Basis

_WHOLE = 1024  # a side of no more coordinates, or columns in all, is not sketched
_WIDTHS = (64, 256, 528)  # of a sketch and its widenings
_DIAGONALISED = 2048  # coordinates or columns of which the widest sketch gives way to the whole
_MARGIN = 16  # directions beyond those that are wanted
_KEPT_BLOCKS = 16  # coordinates that take no more bytes than so many blocks are kept
_SWEEPS = 4
_FAR = 20  # powers of two from 1 where a factor's norm is far from it

Key = tuple[str, int]  # side "U" or "V", and which partition of the adapters
Groups = Mapping[int, Basis]


class Wish(Protocol):
    """What decides how far to look; energies are shares of the total, strongest first."""

    most: int | None  # directions wanted at most, where that is known

    def settled(self, missed: float) -> bool:
        """Whether a share that a sketch misses is too small to matter."""

    def enough(self, energies: np.ndarray, further: int) -> bool:
        """Whether more directions, at most `further` and none stronger, would not help."""

    def needed(self, energies: np.ndarray) -> int:
        """How many of the directions may be used."""


@dataclass(frozen=True)
class Spectrum:
    """Leading directions of a side.

    Args:
        directions: (d, K) orthonormal, strongest first; those that may be used.
        energies: (≥ K,) share of the weighted squared norm that each carries, float64.
        seen: share of all that was looked at; 1 where that is the whole side.
    """

    directions: Tensor
    energies: np.ndarray
    seen: float

    def tail(self, rank: int) -> float:
        """Share of the squared norm that the first `rank` directions miss."""
        return max(0.0, 1.0 - float(self.energies[:rank].sum()))

    def least(self, rank: int) -> float:
        """A share that any `rank` directions miss."""
        return max(0.0, self.seen - float(self.energies[:rank].sum()))


@dataclass(frozen=True)
class _Piece:
    """A block of the stack: factors whose float32 products are good."""

    rows: np.ndarray
    factors: Factors
    grams: _Grams


@dataclass(frozen=True)
class _Grams:
    """Grams (n, r, r) float64 of a block's factors, each divided by a power of two that puts its
    norm near 1 where it is far from it: products of three factors are held by float32 then.

    Args:
        left: BᵀB. right: A Aᵀ. as_read: whether they are those of the factors as read.
        units: the powers of two (n,) of B and A; None where all are 1.
    """

    left: Tensor
    right: Tensor
    as_read: bool
    units: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, left: Tensor, right: Tensor, as_read: bool) -> _Grams:
        b, a = (power_of_two(G.diagonal(0, 1, 2).sum(1).sqrt()) for G in (left, right))
        if not bool((torch.stack([b, a]).log2().abs() > _FAR).any()):
            return cls(left, right, as_read)
        b, a = (x.clamp(2.0**-126, 2.0**126) for x in (b, a))
        left, right = (G / unit[:, None, None] ** 2 for G, unit in ((left, b), (right, a)))
        return cls(left, right, as_read, (b, a))

    def divided(self, f: Factors) -> Factors:
        """The factors that these are the Grams of."""
        if self.units is None:
            return f
        b, a = (unit.to(f.B.dtype)[:, None, None] for unit in self.units)
        return Factors(f.members, f.B / b, f.A / a)

    @property
    def square(self) -> Tensor | float:
        """(n,) by what squared norms were divided."""
        return 1.0 if self.units is None else (self.units[0] * self.units[1]) ** 2


@dataclass(frozen=True)
class Inside:
    """A block of the stack in the coordinates of the spans.

    Args:
        rows: of the stack. grams: of its factors.
        coordinates: (partition, group) → the block's rows in that group, and (n', r, w): BᵀQ, A Q.
    """

    rows: np.ndarray
    grams: _Grams
    coordinates: Mapping[tuple[Key, int], tuple[np.ndarray, Tensor]]


class Spans:
    """The spans of a stack's sides, for each group of adapters that is to share one.

    Args:
        stack: the updates. weights: (N,) w by row.
        wanted: (side, number) → (N,) group of each row, −1 for rows that keep their own side.
        wish: how far to look.
        exact: Grams of the factors in float64, as tolerances below 1 % need them.

    Attributes:
        spectra: as `wanted`: group → spectrum.
    """

    def __init__(
        self,
        stack: Stack,
        weights: np.ndarray,
        wanted: Mapping[Key, np.ndarray],
        wish: Wish,
        exact: bool = False,
    ) -> None:
        self._stack, self._weights, self._exact = stack, weights, exact
        self._grams: list[_Grams] = []
        room = _KEPT_BLOCKS * stack.block_bytes
        self._keep_grams = 16 * len(stack) * int(stack.ranks.max()) ** 2 <= room
        self._searches = {
            (key, int(g)): _Search(stack, key[0], groups == g, wish)
            for key, groups in wanted.items()
            for g in np.unique(groups[groups >= 0])
        }
        while todo := [s for s in self._searches.values() if not s.done]:
            left = room - sum(s.nbytes for s in self._searches.values() if s.done)
            for s in todo:
                s.begin(left / len(todo))
            for piece in self._pieces():
                w = self._weights_of(piece.rows, piece.grams)
                for s in todo:
                    s.use(piece, w)
            for s in todo:
                s.advance()
        self.spectra: dict[Key, dict[int, Spectrum]] = {key: {} for key in wanted}
        for (key, g), s in self._searches.items():
            self.spectra[key][g] = s.spectrum

    def _pieces(self) -> Iterator[_Piece]:
        start = 0
        for k, read in enumerate(self._stack.factors()):
            rows = np.arange(start, start + len(read.members))
            start += len(rows)
            if k < len(self._grams):
                grams = self._grams[k]
                f = read if grams.as_read else even_gauge(read, self._exact)[0]
            else:
                f, left, right, as_read = even_gauge(read, self._exact)
                grams = _Grams.of(left, right, as_read)
                if self._keep_grams:
                    self._grams.append(grams)
            yield _Piece(rows, grams.divided(f), grams)

    def _weights_of(self, rows: np.ndarray, grams: _Grams) -> Tensor:
        """(n,) weights of updates as their Grams have them."""
        return torch.as_tensor(self._weights[rows], device=grams.left.device) * grams.square

    def inside(self, keys: Sequence[Key]) -> Iterator[Inside]:
        """The blocks in the coordinates of some partitions."""
        chosen = {k: s for k, s in self._searches.items() if k[0] in keys}
        if self._keep_grams and all(s.kept for s in chosen.values()):
            start = 0
            for number, grams in enumerate(self._grams):
                rows = np.arange(start, start + len(grams.left))
                start += len(rows)
                found = {k: s.coordinates[number] for k, s in chosen.items()}
                yield Inside(rows, grams, found)
            return
        for piece in self._pieces():
            found = {k: s.projected(piece) for k, s in chosen.items()}
            yield Inside(piece.rows, piece.grams, found)

    def tucker(self, keys: tuple[Key, Key], ranks: tuple[int, int]) -> tuple[Tensor, Tensor, float]:
        """HOOI on one basis for everybody on either side, in the coordinates of their spans.

        One step of orthogonal iteration a side and sweep: from the HOSVD start that moves nearly as
        far as an eigendecomposition.

        Returns:
            U (out, R_U), V (in, R_V) orthonormal, and the share of the squared norm that they keep.
        """
        spectra = [self.spectra[key][0] for key in keys]
        like = spectra[0].directions
        start = [
            torch.eye(s.directions.shape[1], dtype=like.dtype, device=like.device)[:, :rank]
            for s, rank in zip(spectra, ranks, strict=True)
        ]
        own = start
        for _ in range(_SWEEPS):
            for side in range(2):
                own[side] = self._improved(keys, side, own)
        kept = total = 0.0
        for block, w, *both in self._weighted(keys):
            P, Q = ((X @ x).double() for X, x in zip(both, own, strict=True))
            kept += float((((P @ P.mT) * (Q @ Q.mT)).sum((1, 2)) * w).sum())
            total += float(((block.grams.left * block.grams.right).sum((1, 2)) * w).sum())
        U, V = (s.directions @ x for s, x in zip(spectra, own, strict=True))
        return U, V, kept / total if total > 0 else 1.0

    def _improved(self, keys: tuple[Key, Key], side: int, own: Sequence[Tensor]) -> Tensor:
        Z = torch.zeros_like(own[side])
        for _, w, *both in self._weighted(keys):
            X, Y = both[side], both[1 - side]
            K = (Y @ own[1 - side]).double()
            step = ((K @ K.mT) * w[:, None, None]).to(X.dtype) @ (X @ own[side])
            Z.addmm_(X.flatten(0, 1).T, step.flatten(0, 1))
        Q: Tensor = torch.linalg.qr(Z)[0]
        return Q

    def _weighted(self, keys: tuple[Key, Key]) -> Iterator[tuple[Inside, Tensor, Tensor, Tensor]]:
        """The blocks, their weights, and the coordinates of everybody's left and right sides."""
        for block in self.inside(keys):
            w = self._weights_of(block.rows, block.grams)
            (_, X), (_, Y) = (block.coordinates[key, 0] for key in keys)
            yield block, w, X, Y

    def missed(self, U: tuple[Key, Groups] | None, V: tuple[Key, Groups] | None) -> np.ndarray:
        """(N,) squared norm that coded bases miss of each update.

        A guess for planning: what an update has outside of its span counts as missed, though bases
        leave their span a little by being rounded.

        Args:
            U, V: partition, and the basis of each of its groups; None for a side that is own.
        """
        sides = [s for s in (U, V) if s is not None]
        inner = {
            (key, g): self.spectra[key][g].directions.T @ basis.columns
            for key, bases in sides
            for g, basis in bases.items()
        }
        tails = np.zeros(len(self._stack))
        for block in self.inside([key for key, _ in sides]):
            grams, of = [], block.grams
            for side, own in ((U, of.left), (V, of.right)):
                held = own.clone()
                for g, basis in side[1].items() if side is not None else ():
                    assert side is not None
                    index, X = block.coordinates[side[0], g]
                    if not len(index):
                        continue
                    K = (X @ inner[side[0], g]).double()
                    at = torch.as_tensor(index, device=held.device)
                    held[at] = K @ basis.solved(K.mT)
                grams.append(held)
            lost = (of.left * of.right - grams[0] * grams[1]).sum((1, 2)) * of.square
            tails[block.rows] = lost.clamp_min(0).cpu().numpy()
        return tails


class _Search:
    """The span of one group's side: multiplied, projected and judged until it is wide enough."""

    def __init__(self, stack: Stack, side: str, mask: np.ndarray, wish: Wish) -> None:
        self.side, self.mask, self._wish = side, mask, wish
        self._d = stack.shape[0 if side == "U" else 1]
        self._ranks = int(stack.ranks[mask].max()), int(mask.sum())
        self._columns = int(np.minimum(stack.ranks[mask], min(stack.shape)).sum())
        self._limit = min(self._d, self._columns)  # no more directions than that
        self._generator = torch.Generator().manual_seed(0)
        self._device = stack.device
        self._Q: Tensor | None = None  # orthonormal (d, w); None is the identity
        self._sum: Tensor | None = None
        self._pieces: list[Tensor] = []
        self._total = 0.0
        self._multiplied = 0
        self._eager = wish.most is not None  # multiply twice before looking
        self._at = np.zeros(0, np.int64)
        # Named by the class: a method of its own would be a cycle, and its tensors wait for it.
        self._use: Callable[[_Search, Tensor, Tensor], None] = _Search._multiply
        self._widths = [w for w in _WIDTHS if w < self._limit] or [self._limit]
        if wish.most is not None:
            self._widths = [min(wish.most + _MARGIN, self._limit)]
        self._whole = self._limit <= _WHOLE
        self.done, self.kept = False, False
        self.coordinates: list[tuple[np.ndarray, Tensor]] = []
        self.spectrum: Spectrum
        if self._whole:
            self._take_whole()
        else:
            self._Q = self._random(self._widths.pop(0))

    def _random(self, width: int) -> Tensor:
        return torch.randn(self._d, width, generator=self._generator, dtype=torch.float32).to(
            self._device
        )

    def _take_whole(self) -> None:
        """The next pass has all coordinates, or looks at all columns to find them."""
        self._whole = True
        self._Q = None
        self._use = _Search._project if self._d <= self._columns else _Search._collect

    @property
    def nbytes(self) -> int:
        """Of the coordinates."""
        return sum(4 * X.numel() for _, X in self.coordinates)

    def begin(self, room: float) -> None:
        """Start a pass over the stack; coordinates may take `room` bytes."""
        self._sum, self._total, self._pieces, self.coordinates = None, 0.0, [], []
        width = self._d if self._Q is None else self._Q.shape[1]
        self.kept = self._use == _Search._project and (
            4 * width * self._ranks[0] * self._ranks[1] <= room
        )

    def use(self, piece: _Piece, weights: Tensor) -> None:
        """One block of the pass, and its weights (n,)."""
        grams = piece.grams
        index = np.flatnonzero(self.mask[piece.rows])
        if not len(index):
            if self.kept:
                self.coordinates.append((index, grams.left.new_zeros(0, 1, 1)))
            return
        at = torch.as_tensor(index, device=weights.device)
        w = weights[at]
        both = (grams.left[at] * grams.right[at]).sum((1, 2))
        self._total += float((both * w).sum())
        f = piece.factors.take(index)
        X = f.B.mT if self.side == "U" else f.A  # (n, r, d)
        other = grams.right if self.side == "U" else grams.left
        self._at = index
        self._use(self, X, other[at] * w[:, None, None])

    # What is done with the rows X (n, r, d) of a block; G (n, r, r) are the other side's Grams.

    def _multiply(self, X: Tensor, G: Tensor) -> None:
        assert self._Q is not None
        rows = X.reshape(-1, self._d)
        inner = (rows @ self._Q).view(*X.shape[:2], -1)
        product = (G.to(X.dtype) @ inner).flatten(0, 1)
        if self._sum is None:
            self._sum = torch.zeros_like(self._Q)
        self._sum.addmm_(rows.T, product)

    def _collect(self, X: Tensor, G: Tensor) -> None:
        self._pieces.append(X.reshape(-1, self._d))

    def _project(self, X: Tensor, G: Tensor) -> None:
        C = X if self._Q is None else X @ self._Q
        rows = C.reshape(-1, C.shape[2])
        if C.shape[2] <= _WIDTHS[-1]:
            rows = rows.double()
            product = rows.T @ (G @ C.double()).flatten(0, 1)
        else:
            product = (rows.T @ (G.to(C.dtype) @ C).flatten(0, 1)).double()
        self._sum = product if self._sum is None else self._sum.add_(product)
        if self.kept:
            self.coordinates.append((self._at, C))

    def projected(self, piece: _Piece) -> tuple[np.ndarray, Tensor]:
        """The block's rows of the group, and their coordinates in the directions."""
        index = np.flatnonzero(self.mask[piece.rows])
        f = piece.factors.take(index)
        return index, (f.B.mT if self.side == "U" else f.A) @ self.spectrum.directions

    # Between the passes

    def advance(self) -> None:
        """Decide what the next pass does, or that none is needed."""
        if self._use == _Search._collect:
            self._Q = torch.linalg.qr(torch.cat(self._pieces).T)[0]
            self._use = _Search._project
        elif self._use == _Search._multiply:
            assert self._sum is not None
            self._Q = torch.linalg.qr(self._sum)[0]
            self._multiplied += 1
            again = self._eager and self._multiplied < 2
            self._use = _Search._multiply if again else _Search._project
        else:
            self._judge()

    def _judge(self) -> None:
        energies, vectors = self._ritz()
        seen = 1.0 if self._whole else min(1.0, float(energies.sum()))
        if not self._whole and not self._wish.settled(1.0 - seen) and self._look_further(energies):
            return
        energies = energies[: self._wish.most]
        count = min(len(energies), self._wish.needed(energies) + _MARGIN)
        vectors = vectors[:, :count].float()
        self.coordinates = [(at, X @ vectors if len(at) else X) for at, X in self.coordinates]
        directions = vectors if self._Q is None else self._Q @ vectors
        self.spectrum = Spectrum(directions, energies, seen)
        self._Q = self._sum = None
        self.done = True

    def _look_further(self, energies: np.ndarray) -> bool:
        """Multiply once more, or widen, where that helps; False where it is enough."""
        if self._multiplied < 2:
            self._use = _Search._multiply
            return True
        small = self._limit <= _DIAGONALISED
        further = (self._limit if small else _WIDTHS[-1]) - len(energies)
        if self._wish.most is not None or self._wish.enough(energies, further):
            return False
        if self._widths:
            self._widen(self._widths.pop(0))
        elif small:
            self._take_whole()
        else:
            return False
        return True

    def _widen(self, width: int) -> None:
        assert self._Q is not None
        self._Q = torch.cat([self._Q, self._random(width - self._Q.shape[1])], 1)
        self._multiplied, self._eager = 0, True
        self._use = _Search._multiply

    def _ritz(self) -> tuple[np.ndarray, Tensor]:
        """Shares and directions in the span, strongest first, without those that are rounding."""
        assert self._sum is not None
        values, vectors = torch.linalg.eigh((self._sum + self._sum.T) / 2)
        values, vectors = values.flip(0), vectors.flip(1)
        noise = 1e-12 if len(values) <= _WIDTHS[-1] else 1e-7
        alive = values > noise * values[:1].clamp_min(1e-300)
        if not self._total > 0:
            alive[:] = False
        count = min(int(alive.sum()), self._limit)
        shares = values[:count].clamp_min(0).cpu().numpy() / (self._total or 1.0)
        return shares, vectors[:, :count]
