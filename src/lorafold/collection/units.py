"""Updates of one module at norm 1, all their cosines by stacked Grams, and their sketches.

⟨ΔW_i, ΔW_j⟩ = Σ (B_iᵀ B_j) ∘ (A_i A_jᵀ): with the factors of many updates side by side, two matrix
products give all the blocks at once, O(N² r² (out + in)) for N updates. The norms are taken out
first (in float64), so that float32 products serve whatever the sizes; a gauge in which factors are
far larger than their product is left first.

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
from .batch import even_gauge, joined_factors

WIDTH = 48  # of each of the two sketches: together as good as one of 68
_TILE = 512  # directions a side of one tile of a Gram, so that what comes of it stays in the cache


@dataclass(frozen=True)
class Units:
    """Some adapters' updates at one module, all of one rank: ΔW_i = norms_i · left_iᵀ right_i.

    Args:
        members: (n,) positions of the adapters in the collection.
        norms: (n,) float64 ‖ΔW_i‖.
        left: (n, r, out), right: (n, r, in), float32; the product is of norm 1, or 0 where the
            norm is.
    """

    members: np.ndarray
    norms: np.ndarray
    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """Directions of each."""
        return int(self.left.shape[1])

    def tiles(self) -> list[slice]:
        """Rows in runs of about `_TILE` directions."""
        step = max(1, _TILE // self.rank)
        return [slice(lo, lo + step) for lo in range(0, len(self.members), step)]


def units_of(members: Sequence[int], updates: Iterable[LowRank], path: str = "") -> list[Units]:
    """Updates of one shape at norm 1, a batch for each rank.

    Args:
        path: the module, for messages.

    Raises:
        MismatchError: a norm that no float holds.
    """
    by_rank: dict[int, list[tuple[int, LowRank]]] = {}
    for i, u in zip(members, updates, strict=True):
        by_rank.setdefault(u.rank, []).append((i, u))
    return [_batch(of_rank, path) for of_rank in by_rank.values()]


def _batch(found: Sequence[tuple[int, LowRank]], path: str) -> Units:
    members = np.array([i for i, _ in found])
    parts = [(u.B, u.A, u.scale) for _, u in found]
    given = joined_factors(members, parts, parts[0][0].device)
    if not bool(torch.isfinite(given.B.amax() + given.B.amin() + given.A.amax() + given.A.amin())):
        raise MismatchError(f"module {path!r} has an update that is too large for float32")
    f, G_B, G_A, _ = even_gauge(given, exact=False)
    norms = _norms(G_B, G_A)
    if not bool((torch.isfinite(norms) & (norms > 0)).all()):
        # A float32 square may have gone beyond what it holds, or below.
        f, G_B, G_A, _ = even_gauge(given)
        norms = _norms(G_B, G_A)
    b = G_B.diagonal(0, 1, 2).sum(1).sqrt()
    left = _scaled(f.B.mT, _inverse(b))
    return Units(members, norms.cpu().numpy(), left, _scaled(f.A, b * _inverse(norms)))


def _norms(G_B: Tensor, G_A: Tensor) -> Tensor:
    norms: Tensor = (G_B * G_A).sum((1, 2)).clamp_min(0).sqrt()
    return norms


def _scaled(X: Tensor, c: Tensor) -> Tensor:
    """c_i X_i, contiguous, in one pass."""
    result = torch.empty(X.shape, dtype=X.dtype, device=X.device)
    torch.mul(X, c.to(X.dtype)[:, None, None], out=result)
    return result


def _inverse(x: Tensor) -> Tensor:
    inverse: Tensor = torch.where(x > 0, 1 / x.clamp_min(torch.finfo(x.dtype).tiny), 0.0)
    return inverse


def add_inner_products(
    total: np.ndarray,
    xs: Sequence[Units],
    ys: Sequence[Units],
    wanted: np.ndarray | None = None,
) -> None:
    """Add ⟨ΔW_i, ΔW_j⟩ at one module to (i, j) and (j, i) of an array, for i in `xs`, j in `ys`.

    Args:
        total: (N, N) float64. xs, ys: one list twice, or two that have no member in common.
        wanted: (N, N) pairs to compute; those that lie in a tile with one are too. All where None.
    """
    same = xs is ys
    for p, x in enumerate(xs):
        for q, y in enumerate(ys):
            if same and q < p:
                continue
            for rows in x.tiles():
                for columns in y.tiles():
                    if same and p == q and columns.start < rows.start:
                        continue
                    i, j = x.members[rows], y.members[columns]
                    if wanted is not None and not wanted[np.ix_(i, j)].any():
                        continue
                    found = _cosines(x, rows, y, columns)
                    found *= x.norms[rows, None] * y.norms[None, columns]
                    total[np.ix_(i, j)] += found
                    if not same or p != q or rows != columns:
                        total[np.ix_(j, i)] += found.T


def _cosines(x: Units, rows: slice, y: Units, columns: slice) -> np.ndarray:
    """(n, m) float64 cosines of one tile."""
    n, m = len(x.members[rows]), len(y.members[columns])
    products = [
        s[rows].flatten(0, 1) @ t[columns].flatten(0, 1).T
        for s, t in ((x.left, y.left), (x.right, y.right))
    ]
    square = products[0].mul_(products[1]).view(n, x.rank, m, y.rank)
    return square.sum((1, 3)).double().cpu().numpy()


class Sketch:
    """Two independent two-sided sketches of updates at one module.

    Args:
        shape: (out, in). path: the module. seed: of the draw.
    """

    def __init__(self, shape: tuple[int, int], path: str, seed: int) -> None:
        digest = hashlib.sha256(f"{seed}\0{path}".encode("utf-8", "surrogatepass")).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        self._left, self._right = (_projection(d, generator) for d in shape)

    def of(self, x: Units) -> tuple[Tensor, Tensor]:
        """The sketches of updates at norm 1, (n, w·w') each."""
        left, right = (
            (t @ P.to(t.device)).view(*t.shape[:2], 2, -1)
            for t, P in ((x.left, self._left), (x.right, self._right))
        )
        first, second = ((left[:, :, k].mT @ right[:, :, k]).flatten(1) for k in range(2))
        return first, second


def _projection(d: int, generator: torch.Generator) -> Tensor:
    """(d, 2w): two projections side by side; where d is no more than w they lose nothing."""
    if d <= WIDTH:
        return torch.eye(d).repeat(1, 2)
    drawn: Tensor = torch.randn(d, 2 * WIDTH, generator=generator) / WIDTH**0.5
    return drawn
