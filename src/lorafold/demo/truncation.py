"""Truncated SVD in float16, the plain way to make an adapter smaller, in its best form.

Directions are kept over all modules by energy per byte (Eckart and Young 1936, with a price), and
only their numbers are counted, two bytes each, without a file around them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapter import Adapter
from ..lowrank import LowRank, from_svd

Svd = dict[str, tuple[Tensor, Tensor, Tensor]]


def svd_of(adapter: Adapter) -> Svd:
    """Module path → U, S, Vh of its update."""
    return {path: u.svd() for path, u in adapter.items()}


def truncated(svd: Svd, *, error: float | None = None, nbytes: float | None = None) -> Adapter:
    """The best truncation in float16: directions over all modules by energy per byte.

    Args:
        svd: of every module. error: keep the fewest bytes within this relative error.
        nbytes: or as much as fits, two bytes a number; at least one direction.
    """
    steps = [
        (float(s) ** 2, U.shape[0] + Vh.shape[1], path)
        for path, (U, S, Vh) in svd.items()
        for s in S.double().tolist()
    ]
    steps.sort(key=lambda step: -step[0] / step[1])
    left = sum(energy for energy, _, _ in steps)
    allowed = 0.0 if error is None else error**2 * left
    ranks: dict[str, int] = {}
    used = 0
    for energy, width, path in steps:
        if nbytes is None and left <= allowed:
            break
        # Within a module energies fall, so that each prefix is taken in order. What does not fit
        # is passed over, for a narrower module may fit.
        if nbytes is not None and ranks and used + 2 * width > nbytes:
            continue
        ranks[path] = ranks.get(path, 0) + 1
        used += 2 * width
        left -= energy
    return Adapter({path: _cut(*svd[path], rank) for path, rank in ranks.items()})


def _cut(U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> LowRank:
    return from_svd(U[:, :rank], S[:rank], Vh[:rank]).to(dtype=torch.float16)
