"""Groups of what is near, from a matrix of cosines.

Complete linkage: two clusters merge while even their least similar members are near, so that what
a threshold promises holds for every pair of a cluster. A connected component of near pairs that is
a clique is a cluster already, which is what duplicates are; others are merged step by step, along
chains of nearest neighbours (Murtagh 1983), O(n²) for a component of n.
"""

from __future__ import annotations

import numpy as np


def components(near: np.ndarray) -> list[np.ndarray]:
    """The connected components of a symmetric (N, N) relation, in the order of their first."""
    left = np.ones(len(near), bool)
    found = []
    while left.any():
        inside = np.zeros(len(near), bool)
        new = np.array([left.argmax()])
        while len(new):
            inside[new] = True
            new = np.flatnonzero(near[new].any(0) & ~inside)
        left &= ~inside
        found.append(np.flatnonzero(inside))
    return found


def linked(similarity: np.ndarray, threshold: float) -> list[np.ndarray]:
    """Clusters by complete linkage, largest first; all pairs of one reach the threshold.

    Args:
        similarity: (N, N) symmetric.
    """
    near = similarity >= threshold
    found: list[np.ndarray] = []
    for group in components(near):
        block = near[np.ix_(group, group)]
        if (block | np.eye(len(group), dtype=bool)).all():
            found.append(group)
        else:
            inner = _chained(similarity[np.ix_(group, group)], threshold)
            found += [group[members] for members in inner]
    return sorted(found, key=lambda g: (-len(g), g[0]))


def _chained(similarity: np.ndarray, threshold: float) -> list[np.ndarray]:
    """Complete linkage of one component, by chains of nearest neighbours."""
    s = similarity.copy()
    np.fill_diagonal(s, -np.inf)
    members = [[i] for i in range(len(s))]
    waiting = set(range(len(s)))
    done: list[int] = []
    chain: list[int] = []
    while waiting:
        if not chain:
            chain.append(min(waiting))
        top = chain[-1]
        nearest = int(s[top].argmax())
        if len(chain) > 1 and s[top, chain[-2]] == s[top, nearest]:
            nearest = chain[-2]  # of equals, the one that ends the chain
        if s[top, nearest] < threshold:  # and it will never be nearer
            done.append(top)
        elif len(chain) < 2 or nearest != chain[-2]:
            chain.append(nearest)
            continue
        else:
            members[nearest] += members[top]
            s[nearest] = s[:, nearest] = np.minimum(s[nearest], s[top])
            s[nearest, nearest] = -np.inf
            chain.pop()
        # It is alone, or part of its neighbour: no longer anybody's neighbour.
        s[top] = s[:, top] = -np.inf
        waiting.discard(top)
        chain.pop()
    return [np.sort(members[k]) for k in done]
