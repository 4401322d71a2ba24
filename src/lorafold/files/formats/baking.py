"""Factors for a reader that knows one rank, or no scale: the scale in B, zeros up to the rank."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import MismatchError
from ...lowrank import LowRank


def scaled(t: Tensor, scale: float) -> Tensor:
    """scale · t, in t's dtype where no entry is rounded, else in float32 at least.

    Raises:
        MismatchError: float32 can't hold it.
    """
    if scale == 1:
        return t
    exact = t.double() * scale
    result = exact.to(t.dtype)
    if torch.equal(result.double(), exact):
        return result
    wide = exact.to(torch.promote_types(t.dtype, torch.float32))
    if not bool(wide.isfinite().all()):
        raise MismatchError(f"its scale of {scale:.3g} makes numbers that float32 can't hold")
    return wide


def padded(A: Tensor, B: Tensor, rank: int) -> LowRank:
    """The update B A with factors of a larger rank, the new rows and columns zero."""
    more = rank - A.shape[0]
    if more:
        A = torch.cat([A, A.new_zeros(more, A.shape[1])])
        B = torch.cat([B, B.new_zeros(B.shape[0], more)], 1)
    return LowRank(A, B)
