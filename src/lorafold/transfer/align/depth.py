"""Which layer of the source a layer of the target is paired with.

`proportional`: the block that ends at the same share of the depth, so that the last meets the last.
`monotone`: by how alike their outputs are (linear CKA), in an order that never goes back: the best
sum over all non-decreasing paths, by dynamic programming.
"""

from __future__ import annotations

import torch
from torch import Tensor


def proportional(source: int, target: int) -> list[int]:
    """{layer of the target: layer of the source} by the share of the depth at which they end.

    Args:
        source, target: how many layers each has.
    """
    return [max(0, (2 * (k + 1) * source + target) // (2 * target) - 1) for k in range(target)]


def monotone(alike: Tensor) -> list[int]:
    """The non-decreasing assignment with the largest sum.

    Args:
        alike: (target layers, source layers), how alike each two are.
    """
    best, back = alike[0].clone(), []
    for row in alike[1:]:
        top, at = best.cummax(0)
        back.append(at)
        best = row + top
    path = [int(best.argmax())]
    for at in reversed(back):
        path.append(int(at[path[-1]]))
    return path[::-1]


def checked(given: list[int], source: int) -> bool:
    """Whether it names layers that are there."""
    return all(isinstance(k, int) and 0 <= k < source for k in given)


def likeness(cka: dict[tuple[int, int], float], target: int, source: int) -> Tensor:
    """(target, source) from {(layer of the target, layer of the source): CKA}."""
    table = torch.zeros(target, source, dtype=torch.float64)
    for (t, s), value in cka.items():
        table[t, s] = value
    return table
