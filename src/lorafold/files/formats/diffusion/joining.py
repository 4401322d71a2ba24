"""Updates of several modules as that of the one weight which keeps them: the way back of `cutting`.

Where all have the same A, it is theirs together and their B's lie below each other. Else the A's
lie below each other, and B is block-diagonal. Both are exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ....errors import MismatchError
from ....lowrank import LowRank
from ..baking import scaled
from .flux import Piece


def joined(
    parts: Mapping[int, LowRank], pieces: Sequence[Piece]
) -> tuple[LowRank, list[int] | None]:
    """The update of a fused weight.

    Args:
        parts: {index of the piece: its update}; one that is not there has none.
        pieces: all modules that are in the weight.

    Returns:
        It, with the scale that all parts have or 1; and the ranks of all parts, one after the other
        in A, or None where A is of all of them.

    Raises:
        MismatchError: the parts' shapes are not those of one weight.
    """
    spans = [piece.shares or (0, 1, 1) for piece in pieces]
    unit = _unit(parts, pieces)
    scales = {u.scale for u in parts.values()}
    scale = scales.pop() if len(scales) == 1 else None
    A = {k: u.A for k, u in parts.items()}
    B = {k: u.B if scale is not None else scaled(u.B, u.scale) for k, u in parts.items()}
    B = {k: _swapped(t) if pieces[k].swapped else t for k, t in B.items()}
    first = next(iter(A.values()))
    shared = len(A) == len(pieces) and all(torch.equal(t, first) for t in A.values())
    if shared:
        whole = torch.cat([B[k] for k in range(len(pieces))])
        return LowRank(first, whole, 1.0 if scale is None else scale), None
    order = sorted(A)
    ranks = [A[k].shape[0] if k in A else 0 for k in range(len(pieces))]
    stacked = torch.cat([A[k] for k in order])
    dtype = torch.cat([B[k][:1, :1] for k in order]).dtype
    whole = torch.zeros(unit * spans[-1][2], sum(ranks), dtype=dtype, device=stacked.device)
    for k in order:
        start = sum(ranks[:k])
        rows = slice(unit * spans[k][0], unit * spans[k][1])
        whole[rows, start : start + ranks[k]] = B[k].to(dtype)
    return LowRank(stacked, whole, 1.0 if scale is None else scale), ranks


def _unit(parts: Mapping[int, LowRank], pieces: Sequence[Piece]) -> int:
    """How many rows a share has."""
    found: dict[tuple[int, int], str] = {}
    for k, u in parts.items():
        first, last, _ = pieces[k].shares or (0, 1, 1)
        unit, rest = divmod(u.shape[0], last - first)
        if rest or (pieces[k].swapped and unit % 2):
            raise MismatchError(f"{pieces[k].path!r} has {u.shape[0]} rows, which FLUX's have not")
        found[unit, u.shape[1]] = pieces[k].path
    if len(found) > 1:
        (one, a), (other, b) = list(found.items())[:2]
        raise MismatchError(
            f"{a!r} and {b!r} are one weight in FLUX's first code, and their shapes are of two: "
            f"{one[0]} rows in a share and {one[1]} columns, and {other[0]} and {other[1]}"
        )
    return next(iter(found))[0]


def _swapped(t: Tensor) -> Tensor:
    return torch.cat(t.chunk(2)[::-1])
