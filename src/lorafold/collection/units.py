"""Updates of one module side by side: all their inner products by stacked Grams, and sketches.

⟨ΔW_i, ΔW_j⟩ = Σ (B_iᵀ B_j) ∘ (A_i A_jᵀ): with the factors of many updates side by side, two matrix
products give all the blocks at once, O(N² r² (out + in)) for N updates. Scales stay out of the
products (in float64), and factors that float32 products would not serve (of extreme size, or far
larger than their product) are put into another gauge first.

The sketch of an update is P ΔW Q with Gaussian P (w, out) and Q (in, w): w² numbers whose inner
products are those of the updates in the mean (Johnson & Lindenstrauss 1984, on either side). All at
a module have the same P and Q, drawn from a seed and the module's name; each module has its own, so
that errors average out over modules. There are two independent sketches: their mean is what is
used, and half their difference says how far that is off.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import MismatchError
from ..lowrank import LowRank
from .batch import Factors, even_gauge

WIDTH = 45  # of each of the two sketches: together as good as one of 64
_TILE = 1024  # directions a side of one tile of a Gram
_MODEST = 1e6  # norms of factors between this and its inverse have products that float32 holds
_CANCELS = 1e3  # (‖B‖ ‖A‖ / ‖B A‖)² above which float32 products lose too much


@dataclass(frozen=True)
class Units:
    """Some adapters' updates at one module, all of one rank: ΔW_i = scales_i · B_i A_i.

    Args:
        members: (n,) positions of the adapters in the collection.
        scales: (n,) float64. norms: (n,) float64 ‖ΔW_i‖. squares: (n,) ‖ΔW_i ΔW_iᵀ‖, which is
            ‖ΔW_i‖² for a single direction, and less the more directions there are.
        B: (out, n·r), A: (n·r, in), float32: the factors side by side.
    """

    members: np.ndarray
    scales: np.ndarray
    norms: np.ndarray
    squares: np.ndarray
    B: Tensor
    A: Tensor

    @property
    def rank(self) -> int:
        """Directions of each."""
        return self.A.shape[0] // len(self.members)

    def factors(self) -> Factors:
        """The same as a batch, the scales left out."""
        return _batch(self.members, self.B, self.A)

    def tiles(self) -> list[tuple[slice, slice]]:
        """Members, and their directions, in runs of about `_TILE` directions."""
        r, count = self.rank, len(self.members)
        step = max(1, _TILE // r)
        runs = ((lo, min(count, lo + step)) for lo in range(0, count, step))
        return [(slice(lo, hi), slice(lo * r, hi * r)) for lo, hi in runs]


def units_of(members: Sequence[int], updates: Iterable[LowRank], path: str = "") -> list[Units]:
    """Updates of one shape side by side, together those of one rank.

    Args:
        path: the module, for messages.

    Raises:
        MismatchError: one that float32 can't hold.
    """
    by_rank: dict[int, list[tuple[int, LowRank]]] = {}
    for i, u in zip(members, updates, strict=True):
        by_rank.setdefault(u.rank, []).append((i, u))
    return [_side_by_side(of_rank, path) for of_rank in by_rank.values()]


def _side_by_side(found: Sequence[tuple[int, LowRank]], path: str) -> Units:
    members = np.array([i for i, _ in found])
    scales = np.array([u.scale for _, u in found])
    device = found[0][1].A.device
    B = torch.cat([u.B.to(device) for _, u in found], 1).float()
    A = torch.cat([u.A.to(device) for _, u in found]).float()
    f = _batch(members, B, A)
    G_B, G_A = ((X.mT @ X).double() for X in (f.B, f.A.mT))
    if not _served(G_B, G_A):
        b, a = (X.abs().amax((1, 2)).double() for X in (f.B, f.A))
        if not bool(torch.isfinite(b + a).all()):
            raise MismatchError(f"module {path!r} has an update that is too large for float32")
        scales = scales * (a * b).cpu().numpy()
        B_root, A_root = _inverse_root(b), _inverse_root(a)
        f = Factors(members, f.B * B_root * B_root, f.A * A_root * A_root)
        f, G_B, G_A, _ = even_gauge(f)
        B, A = f.B.permute(1, 0, 2).flatten(1), f.A.flatten(0, 1)
    norms = (G_B * G_A).sum((1, 2)).clamp_min(0).sqrt().cpu().numpy()
    M = G_B @ G_A  # M's eigenvalues are σ²
    squares = (M * M.mT).sum((1, 2)).clamp_min(0).sqrt().cpu().numpy()
    return Units(members, scales, norms * np.abs(scales), squares * scales**2, B, A)


def _batch(members: np.ndarray, B: Tensor, A: Tensor) -> Factors:
    """Factors side by side as (n, out, r) and (n, r, in), nothing copied."""
    n, (out, _), (_, inner) = len(members), B.shape, A.shape
    return Factors(members, B.view(out, n, -1).permute(1, 0, 2), A.view(n, -1, inner))


def _served(G_B: Tensor, G_A: Tensor) -> bool:
    """Whether float32 products of factors with these Grams hold what they should."""
    b, a = (G.diagonal(0, 1, 2).sum(1) for G in (G_B, G_A))
    low, high = _MODEST**-2, _MODEST**2
    good = (b > low) & (b < high) & (a > low) & (a < high)
    return bool((good & (a * b <= _CANCELS * (G_B * G_A).sum((1, 2)))).all())


def _inverse_root(x: Tensor) -> Tensor:
    """1/√x (0 of 0) in float32, to be multiplied with a batch; float32 lacks 1/x of the least x."""
    inverse = torch.where(x > 0, x.clamp_min(torch.finfo(x.dtype).tiny).rsqrt(), 0.0)
    return inverse.float()[:, None, None]


def add_inner_products(
    total: np.ndarray,
    xs: Sequence[Units],
    ys: Sequence[Units],
    wanted: np.ndarray | None = None,
    places: np.ndarray | None = None,
) -> None:
    """Add ⟨ΔW_i, ΔW_j⟩ at one module to (i, j) and (j, i) of an array, for i in `xs`, j in `ys`.

    Args:
        total: (n, N) float64. xs, ys: one list twice, or two that have no member in common; all
            members of `xs` have rows, and either all of `ys` or none.
        wanted: (N, N) pairs to compute; those that lie in a tile with one are too. All where None.
        places: member → its column, and its row if there are so many; itself where None.
    """
    same = xs is ys
    at = np.arange(total.shape[1]) if places is None else places
    left, right = ([(x, *tile) for x in zs for tile in x.tiles()] for zs in (xs, ys))
    for p, (x, rows, here) in enumerate(left):
        for y, columns, there in right[p if same else 0 :]:
            i, j = x.members[rows], y.members[columns]
            if wanted is not None and not wanted[np.ix_(i, j)].any():
                continue
            square = (x.B[:, here].T @ y.B[:, there]).mul_(x.A[here] @ y.A[there].T)
            blocks = square.view(len(i), x.rank, len(j), y.rank).sum((1, 3))
            found = blocks.double().cpu().numpy()
            found *= x.scales[rows, None] * y.scales[None, columns]
            i, j = at[i], at[j]
            total[np.ix_(i, j)] += found
            if not (same and x is y and rows == columns) and j[0] < len(total):
                total[np.ix_(j, i)] += found.T


class Sketch:
    """Two independent two-sided sketches of updates at one module.

    Args:
        shape: (out, in). path: the module. seed: of the draw.
    """

    def __init__(self, shape: tuple[int, int], path: str, seed: int) -> None:
        digest = hashlib.sha256(f"{seed}\0{path}".encode("utf-8", "surrogatepass")).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        self._left, self._right = (_projection(d, generator) for d in shape)
        self.drawn = sum(d > WIDTH for d in shape)  # sides on which something is lost

    @property
    def size(self) -> int:
        """Numbers in one sketch."""
        return self._left.shape[1] // 2 * (self._right.shape[1] // 2)

    def of(self, x: Units) -> tuple[Tensor, Tensor]:
        """The sketches of B A, without the scales: (n, w·w') each."""
        n, P, Q = len(x.members), self._left.to(x.B.device), self._right.to(x.A.device)
        left = (P.T @ x.B).view(2, -1, n, x.rank).permute(0, 2, 1, 3)
        right = (x.A @ Q).view(n, x.rank, 2, -1).permute(2, 0, 1, 3)
        first, second = (left[k].matmul(right[k]).flatten(1) for k in range(2))
        return first, second


def _projection(d: int, generator: torch.Generator) -> Tensor:
    """(d, 2w): two projections side by side; where d is no more than w they lose nothing."""
    if d <= WIDTH:
        return torch.eye(d, dtype=torch.float32).repeat(1, 2)
    drawn: Tensor = torch.randn(d, 2 * WIDTH, generator=generator, dtype=torch.float32) / WIDTH**0.5
    return drawn
