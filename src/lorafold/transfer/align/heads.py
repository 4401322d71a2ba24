"""Which head of the source a head of the target is paired with.

A head's channels mean nothing apart: a map that mixes heads fits better and breaks what they do. So
heads are paired one to one where they are most alike, the sum of their CKAs largest (the Hungarian
method), and mapped head by head. Query heads are paired by what they ask and what they read; a key
and value head goes with the query heads that it serves: with grouped queries its partners are the
key and value heads of those query heads' partners, one or several.

Source: Kuhn, The Hungarian Method for the Assignment Problem (1955).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import MissingExtraError
from .covariances import Moments, cka


def channels(heads: int, width: int) -> list[Tensor]:
    """The channels of each head. width: of all of them together."""
    return list(torch.arange(width).view(heads, -1))


def likeness(m: Moments, source: int, target: int) -> Tensor:
    """(target heads, source heads): the CKA of their channels.

    Args:
        m: of a side that consists of heads. source, target: how many.
    """
    of_s, of_t = channels(source, len(m.s)), channels(target, len(m.t))
    rows = [[cka(m.part(s, t)) for s in of_s] for t in of_t]
    return torch.tensor(rows, dtype=torch.float64)


def assigned(alike: Tensor) -> dict[int, int]:
    """{head of the target: head of the source}, no head twice, with the largest sum.

    Raises:
        MissingExtraError: scipy is not there.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise MissingExtraError(
            "pairing heads takes scipy: pip install 'lorafold[transfer]'"
        ) from None
    rows, columns = linear_sum_assignment(alike.numpy(), maximize=True)
    return dict(zip(map(int, rows), map(int, columns), strict=True))


def served(
    heads: dict[int, int], source: tuple[int, int], target: tuple[int, int]
) -> dict[int, list[int]]:
    """{key and value head of the target: those of the source}, from the pairs of query heads.

    Args:
        heads: {query head of the target: of the source}.
        source, target: (query heads, key and value heads).
    """
    group_s, group_t = source[0] // source[1], target[0] // target[1]
    found: dict[int, set[int]] = {}
    for t, s in heads.items():
        found.setdefault(t // group_t, set()).add(s // group_s)
    return {t: sorted(of) for t, of in found.items()}
