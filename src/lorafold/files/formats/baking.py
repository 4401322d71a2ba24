"""Adapters for a reader that knows less: a checkpoint's names, the scale in B, one rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...adapter import Adapter
from ...errors import MismatchError, RefusedError
from ...lowrank import LowRank
from ...naming import Base
from ...placing import placed
from ...words import some_of

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Part:
    """One update by its name in a checkpoint, and its path in the adapter."""

    name: str
    update: LowRank
    path: str


def on_checkpoint(adapter: Adapter, base: Base, where: str, reader: str) -> Iterator[Part]:
    """The updates by the names that a checkpoint has for them; one may go into several tensors.

    Args:
        adapter: whose updates.
        base: the checkpoint's names and shapes, asked for the adapter's. where: it, for messages.
        reader: who is written for, too.

    Raises:
        MismatchError: a module that is not there, or of another shape.
        RefusedError: one that is a part of a tensor, or a convolution.
    """
    plan = placed(adapter.parts, base)
    for misfit in plan.wrong.values():
        raise MismatchError(misfit.says)
    lost = [path for path in adapter.modules if path in plan.unplaced]
    if lost:
        raise MismatchError(f"{some_of(lost)}: {plan.unplaced[lost[0]]} ({where})")
    for spot in plan.spots:
        if spot.what != "update":
            continue
        u, is_embedding = adapter[spot.part], spot.layout.kind == "embedding"
        for piece in spot.pieces:
            name = piece.key.removesuffix(".weight")
            if piece.is_part or name == piece.key or spot.layout.kind == "conv":
                raise RefusedError(
                    f"{reader} has no place for {spot.part!r}, which is in {piece.key!r} of "
                    f"{where}: save it with format='peft'"
                )
            A, B = (u.B.T, u.A.T) if spot.turned and not is_embedding else (u.A, u.B)
            if piece.rows is not None:
                B = B[slice(*piece.rows)]
            yield Part(name, LowRank(A.contiguous(), B.contiguous(), u.scale), spot.part)


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
