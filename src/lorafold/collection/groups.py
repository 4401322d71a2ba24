"""Which adapters started from the same factors.

Two adapters trained from one initial A keep nearly the same row space at every module; two of
different seeds overlap only as chance has it. With orthonormal bases Q of the row spaces the
overlap is o = ‖Q_iᵀ Q_j‖²_F / r (r the smaller rank); chance gives s/d (s the larger), so

    (o − s/d) / (1 − s/d) > 0.25

marks a pair, and connected pairs make a group. The same on the column spaces finds shared B.

Every adapter is compared with a sample of bounded size, all of them where they are few: not each
with each. So a group of which none is in the sample is not found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..scale.engine import Engine, Task
from .batch import gram
from .stack import Stack

THRESHOLD = 0.25
_WIDTH = 256  # longer vectors are folded down to this many coordinates
_PROBES = 2  # modules looked at
_PIECE = 1024  # directions a side of one piece of the overlap matrix
_SAMPLE = 1 << 14  # directions of the adapters that all are compared with


def probes(count: int, most: int) -> list[int]:
    """Up to `most` evenly spaced numbers out of 0 … count − 1."""
    if count <= most:
        return list(range(count))
    return sorted({round(k * (count - 1) / (most - 1)) for k in range(most)})


def init_groups(
    stacks: Sequence[Stack], count: int, side: str, engine: Engine | None = None
) -> np.ndarray:
    """Groups of adapters whose A (side "V") or B (side "U") span nearly the same space.

    Args:
        stacks: all modules; a few evenly spaced ones are looked at.
        count: adapters in the collection. engine: who looks.

    Returns:
        (count,) group number, −1 for adapters that are alone; groups are numbered by their first
        member.
    """
    looked_at = [stacks[j] for j in probes(len(stacks), _PROBES)]
    rank = max((int(stack.ranks.max()) for stack in looked_at), default=1)
    sample = np.array(probes(count, max(2, _SAMPLE // rank)), np.int64)
    tasks = [Task(f"module {stack.path!r}", (stack, side, count, sample)) for stack in looked_at]
    return _groups(count, list((engine or Engine()).map(look, tasks)), sample)


@dataclass(frozen=True)
class _Bases:
    """Orthonormal bases of some adapters' sides.

    Args:
        members: (n,). Q: (n, m, r), with zeros for missing directions. ranks: (n,).
    """

    members: np.ndarray
    Q: Tensor
    ranks: np.ndarray

    def of(self, members: np.ndarray) -> _Bases:
        """Those of them that are among these."""
        rows = np.flatnonzero(np.isin(self.members, members))
        return _Bases(self.members[rows], self.Q[torch.as_tensor(rows)], self.ranks[rows])

    def pieces(self) -> Iterator[_Bases]:
        """A few at a time."""
        size = max(1, _PIECE // self.Q.shape[2])
        for lo in range(0, len(self.members), size):
            here = slice(lo, lo + size)
            yield _Bases(self.members[here], self.Q[here], self.ranks[here])

    def side_by_side(self) -> Tensor:
        """(m, n·r)."""
        return self.Q.permute(1, 0, 2).flatten(1)

    def near(self, others: _Bases) -> np.ndarray:
        """(n, n') which of them overlap by more than the threshold."""
        m, r = self.Q.shape[1:]
        square = (self.side_by_side().T @ others.side_by_side()).square_()
        o = square.view(len(self.Q), r, len(others.Q), -1).sum((1, 3)).cpu().numpy()
        smaller = np.minimum(self.ranks[:, None], others.ranks).clip(1)
        larger = np.maximum(self.ranks[:, None], others.ranks)
        chance = larger / m
        # Of what spans the whole space nothing is known.
        near: np.ndarray = (o / smaller - chance > THRESHOLD * (1 - chance)) & (larger < m)
        return near


def _bases(stack: Stack, side: str) -> Iterator[_Bases]:
    """Block by block; vectors longer than `_WIDTH` are folded down."""
    rank = int(stack.ranks.max())
    for f in stack.factors():
        X = f.B if side == "U" else f.A.mT
        if X.shape[1] > _WIDTH:
            X = _folded(X, _WIDTH)
        lam, W = torch.linalg.eigh(gram(X))
        live = lam > 1e-8 * lam[:, -1:].clamp_min(1e-300)
        Q = X @ (W * (live / lam.clamp_min(1e-300).sqrt())[:, None, :]).to(X.dtype)
        Q = torch.nn.functional.pad(Q.float(), (0, rank - Q.shape[2]))
        yield _Bases(f.members, Q, live.sum(1).cpu().numpy())


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


@dataclass(frozen=True)
class Look:
    """Which adapters overlap at one module.

    Kin are all pairs of a group, so which ones overlap is kept as bits.

    Args:
        agree: (count, ⌈T / 8⌉) bits, of each with each of a sample of T. there: (count,) whether it
            has a direction there.
    """

    agree: np.ndarray
    there: np.ndarray


def look(stack: Stack, side: str, count: int, sample: np.ndarray) -> Look:
    """Compare the adapters at a module.

    Args:
        count: adapters. sample: (T,) positions of those that all are compared with, ascending.
    """
    found = [b.of(sample) for b in _bases(stack, side)]
    whole = _Bases(
        np.concatenate([b.members for b in found]),
        torch.cat([b.Q for b in found]),
        np.concatenate([b.ranks for b in found]),
    )
    everyone = len(whole.members) == len(stack)
    agree = np.zeros((count, -(-len(sample) // 8)), np.uint8)
    there = np.zeros(count, bool)
    for block in [whole] if everyone else _bases(stack, side):
        there[block.members] = block.ranks > 0
        for some in block.pieces():
            near = np.zeros((len(some.members), len(sample)), bool)
            for others in whole.pieces():
                columns = np.searchsorted(sample, others.members)
                near[:, columns] = some.near(others)
            agree[some.members] = np.packbits(near, axis=1)
    stack.forget()
    return Look(agree, there)


def _groups(count: int, looks: Sequence[Look], sample: np.ndarray) -> np.ndarray:
    """(count,) numbers as `init_groups` gives them: connected pairs are one group, and a pair
    counts where it agrees at most of the modules that both were seen at.
    """
    seen = np.zeros(count, np.int64)  # at how many of the modules
    for one in looks:
        seen += one.there
    first = np.arange(count)  # member of each one's group
    for i in range(count):
        counts = sum(np.unpackbits(one.agree[i], count=len(sample)).astype(int) for one in looks)
        near = sample[np.flatnonzero(2 * counts > np.minimum(seen[i], seen[sample]))]
        found = np.unique(first[near])
        if len(found) and (found != first[i]).any():
            found = np.union1d(found, first[i])
            first[np.isin(first, found)] = found[0]
    numbers = np.full(count, -1, np.int64)
    firsts, sizes = np.unique(first, return_counts=True)
    for number, one in enumerate(firsts[sizes > 1]):
        numbers[first == one] = number
    return numbers
