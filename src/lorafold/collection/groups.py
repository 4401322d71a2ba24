"""Which adapters started from the same factors.

Two adapters trained from one initial A keep nearly the same row space at every module; two of
different seeds overlap only as chance has it. With orthonormal bases Q of the row spaces the
overlap is o = ‖Q_iᵀ Q_j‖²_F / r (r the smaller rank); chance gives r/d, so

    (o − r/d) / (1 − r/d) > 0.25

marks a pair, and connected pairs make a group. The same on the column spaces finds shared B.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .batch import gram
from .stack import Stack

THRESHOLD = 0.25
_WIDTH = 256  # longer vectors are folded down to this many coordinates
_PROBES = 2  # modules looked at
_PIECE = 2048  # directions a side of one piece of the overlap matrix


def probes(count: int, most: int) -> list[int]:
    """Up to `most` evenly spaced numbers out of 0 … count − 1."""
    if count <= most:
        return list(range(count))
    return sorted({round(k * (count - 1) / (most - 1)) for k in range(most)})


def init_groups(stacks: Sequence[Stack], count: int, side: str) -> np.ndarray:
    """Groups of adapters whose A (side "V") or B (side "U") span nearly the same space.

    Args:
        stacks: all modules; a few evenly spaced ones are looked at.
        count: adapters in the collection.

    Returns:
        (count,) group number, −1 for adapters that are alone; groups are numbered by their first
        member.
    """
    score = _Pairs(count)
    for j in probes(len(stacks), _PROBES):
        score.add(*_directions(stacks[j], side))
    return score.groups()


def _directions(stack: Stack, side: str) -> tuple[np.ndarray, list[Tensor], int]:
    """Members, an orthonormal basis (m, r_i) for each, and the dimension m that chance is for."""
    d = stack.shape[0 if side == "U" else 1]
    m = min(d, _WIDTH)
    bases: list[Tensor] = []
    for f in stack.factors():
        X = f.B if side == "U" else f.A.mT
        if d > m:
            X = _folded(X, m)
        lam, W = torch.linalg.eigh(gram(X))
        live = lam > 1e-8 * lam[:, -1:].clamp_min(1e-300)
        Q = X @ (W / lam.clamp_min(1e-300).sqrt()[:, None, :]).to(X.dtype)
        bases += [Q[i, :, keep].float() for i, keep in enumerate(live)]
    stack.forget()
    return stack.members, bases, m


def _folded(X: Tensor, m: int) -> Tensor:
    """(n, d, r) → (n, m, r): shuffled coordinates with random signs, summed m at a time.

    A count sketch (Charikar et al. 2002): it keeps the geometry of a few directions and costs one
    pass.
    """
    d = X.shape[1]
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(d, generator=generator).to(X.device)
    signs = (2 * torch.randint(2, (d,), generator=generator) - 1).to(X)
    shuffled = X[:, order] * signs[:, None]
    shuffled = torch.nn.functional.pad(shuffled, (0, 0, 0, -d % m))
    return shuffled.reshape(len(X), -1, m, X.shape[2]).sum(1)


class _Pairs:
    """At how many of the modules looked at each pair overlaps; connected pairs make groups.

    Kin are all pairs of a group, so which ones overlap is kept as bits: a row for each adapter, one
    for each later adapter.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._agree: list[np.ndarray] = []  # (count, ⌈count / 8⌉) for each module
        self._looks = np.zeros(count, np.int64)

    def add(self, members: np.ndarray, bases: list[Tensor], m: int) -> None:
        keep = [k for k, Q in enumerate(bases) if Q.shape[1]]
        members = members[keep]
        bases = [bases[k] for k in keep]
        if not bases:
            return
        self._looks[members] += 1
        ranks = np.array([Q.shape[1] for Q in bases])
        top = int(ranks.max())
        whole = torch.stack([torch.nn.functional.pad(Q, (0, top - Q.shape[1])) for Q in bases])
        agree = np.zeros((self._count, -(-self._count // 8)), np.uint8)
        size = max(1, _PIECE // top)
        for lo in range(0, len(whole), size):
            left = whole[lo : lo + size].permute(1, 0, 2).reshape(whole.shape[1], -1)
            near = np.zeros((left.shape[1] // top, self._count), bool)
            for lo2 in range(lo, len(whole), size):
                right = whole[lo2 : lo2 + size].permute(1, 0, 2).reshape(whole.shape[1], -1)
                square = (left.T @ right).square_().reshape(-1, top, right.shape[1] // top, top)
                o = square.sum((1, 3)).cpu().numpy()
                r = np.minimum(ranks[lo : lo + size, None], ranks[None, lo2 : lo2 + size])
                chance = np.minimum(r / m, 0.999)
                near[:, members[lo2 : lo2 + size]] = (o / r - chance) / (1 - chance) > THRESHOLD
            agree[members[lo : lo + size]] = np.packbits(near, axis=1)
        self._agree.append(agree)

    def groups(self) -> np.ndarray:
        first = np.arange(self._count)  # member of each one's group
        for i in range(self._count):
            # A pair counts where it agrees at most of the modules that both were seen at.
            counts = sum(np.unpackbits(a[i], count=self._count).astype(int) for a in self._agree)
            near = np.flatnonzero(2 * counts > np.minimum(self._looks[i], self._looks))
            found = np.unique(first[near[near > i]])
            if len(found) and (found != first[i]).any():
                found = np.union1d(found, first[i])
                first[np.isin(first, found)] = found[0]
        numbers = np.full(self._count, -1, np.int64)
        firsts, sizes = np.unique(first, return_counts=True)
        for number, one in enumerate(firsts[sizes > 1]):
            numbers[first == one] = number
        return numbers
