"""An average number of bits over bases and cores together.

A column of a basis is used by many adapters, a component of a core by one. All of them compete for
the same bytes, each with the energy that it carries: what the columns get decides what is left for
the cores on average. Bases at the average itself, and cores at it too, would lose up to 45 % more
at the same bytes (2.5 bits, adapters that share both sides), or take twice the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..coding.bits import bits_for_bytes


@dataclass(frozen=True)
class Columns:
    """The columns that one basis may have.

    Args:
        length: d. users: (N,) True for the rows that would use it.
        energy: (K,) of each direction, strongest first: shares of the users' norms, summed.
    """

    length: int
    users: np.ndarray
    energy: np.ndarray


def averaged_bits(
    average: float,
    bases: Sequence[Columns],
    S: np.ndarray,
    own: np.ndarray,
    keep_all: bool = False,
) -> tuple[list[np.ndarray], float]:
    """Bits of each basis's columns, and what is left for the cores, on average.

    Args:
        average: packed bits for each number of bases and cores together.
        bases: those of either side. S: (N, r) singular values by row.
        own: (N,) numbers of a component on sides that stay the row's own.
        keep_all: every column gets a bit at least; otherwise those of no use are dropped.

    Returns:
        [(K,) bits of each basis's columns], average bits of a number of the cores.
    """
    norms = (S**2).sum(1, keepdims=True)
    cores = np.divide(S**2, norms, out=np.zeros_like(S), where=norms > 0)
    live = [b.energy > 0 for b in bases]
    fixed = [np.zeros(len(b.energy), bool) for b in bases]  # to one bit
    while True:
        energy, widths = _components(bases, [int(on.sum()) for on in live], cores, own)
        numbers = float(((energy > 0) * widths).sum())
        columns = sum(b.length * int(on.sum()) for b, on in zip(bases, live, strict=True))
        budget = average * (columns + numbers)
        budget -= sum(b.length * int(one.sum()) for b, one in zip(bases, fixed, strict=True))
        free = [on & ~one for on, one in zip(live, fixed, strict=True)]
        levels = _allotted(bases, free, energy, widths, budget)
        unused = [f & (bits == 0) for f, bits in zip(free, levels, strict=True)]
        if not any(u.any() for u in unused):
            break
        for k, u in enumerate(unused):
            if keep_all:
                fixed[k] |= u
            else:
                live[k] &= ~u
                if not live[k].any():  # a side has one column at least
                    live[k][:1] = fixed[k][:1] = True
    spent = sum(b.length * int(bits.sum()) for b, bits in zip(bases, levels, strict=True))
    rate = max(0.0, budget - spent) / numbers if numbers > 0 else 0.0
    return [np.where(one, 1, bits) for one, bits in zip(fixed, levels, strict=True)], rate


def _components(
    bases: Sequence[Columns], ranks: Sequence[int], cores: np.ndarray, own: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Energies (N, r) of the components that cores on bases of these ranks have, and numbers each.

    A core has no more components than a side has columns.
    """
    widths, most = own.astype(float), np.full(len(cores), cores.shape[1])
    for basis, rank in zip(bases, ranks, strict=True):
        widths = widths + rank * basis.users
        most = np.where(basis.users, np.minimum(most, rank), most)
    return cores * (np.arange(cores.shape[1]) < most[:, None]), widths[:, None]


def _allotted(
    bases: Sequence[Columns],
    free: Sequence[np.ndarray],
    energy: np.ndarray,
    widths: np.ndarray,
    budget: float,
) -> list[np.ndarray]:
    """Bits of the free columns, 0 elsewhere, where these and the components share a budget."""
    singles = [b.energy[f] for b, f in zip(bases, free, strict=True)]
    count = sum(len(e) for e in singles)
    lengths = [np.full(len(e), b.length) for b, e in zip(bases, singles, strict=True)]
    bits = bits_for_bytes(
        np.concatenate([*singles, energy.ravel()]),
        np.concatenate([*lengths, np.broadcast_to(widths, energy.shape).ravel()]) / 8,
        np.arange(count + energy.size) >= count,
        max(budget, 0.0) / 8,
    )
    levels, at = [], 0
    for f in free:
        found = np.zeros(len(f), np.int64)
        found[f] = bits[at : at + int(f.sum())]
        at += int(f.sum())
        levels.append(found)
    return levels
