"""Banks: the factors of many adapters at one layer, in fixed slots.

A is kept as (slots, R, in) and B transposed, as (slots, R, out): the rows of both are the ranks, so
that a rank prefix is a view, and the batched products of a decode step read them in order. Ranks
that an adapter doesn't have carry the weight 0, and a slot is cleared for its next adapter.

A shared bank holds a library's cores: A (slots, R, in) in coordinates of V, B in those of U, and
every row of the batch goes through the same V and U. δ = U B_i A_i Vᵀ x costs one product with V
and one with U for the whole batch, however many adapters there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layers.kinds import LayerKind, gathered
from ...lowrank import LowRank
from .grouping import Grouping
from .packed import Segments

Item = tuple[int, float, int]  # slot, coefficient, rank


class Bank(nn.Module):
    """The adapters' factors at one layer, or a library's cores between the sides that it shares.

    Args:
        kind: of the layer. dims: (out, in) of its updates. slots: how many. rank: rows in each.
        U: (out, R_U) shared sides, or None where the side is each adapter's own. V: (in, R_V).
    """

    A: Tensor
    Bt: Tensor
    U: Tensor | None
    V: Tensor | None

    def __init__(
        self,
        kind: LayerKind,
        dims: tuple[int, int],
        slots: int,
        rank: int,
        *,
        device: Any,
        dtype: torch.dtype,
        U: Tensor | None = None,
        V: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.shared = kind, U is not None or V is not None
        out, inner = (
            d if side is None else side.shape[1] for d, side in zip(dims, (U, V), strict=True)
        )
        options: Any = {"device": device, "dtype": dtype}
        self.register_buffer("A", torch.zeros(slots, rank, inner, **options), persistent=False)
        self.register_buffer("Bt", torch.zeros(slots, rank, out, **options), persistent=False)
        self.register_buffer("U", U, persistent=False)
        self.register_buffer("V", V, persistent=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots and sides."""
        return sum(t.nbytes for t in self.buffers())

    def write(self, slot: int, u: LowRank) -> None:
        """Put an update into a slot; its scale is kept elsewhere."""
        self.A[slot, : u.rank].copy_(u.A)
        self.Bt[slot, : u.rank].copy_(u.B.mT)

    def clear(self, slot: int) -> None:
        """Zeros in a slot: products with what is left may overflow, and 0 · ∞ is no number."""
        self.A[slot].zero_()
        self.Bt[slot].zero_()

    def read(self, slot: int, rank: int, scale: float) -> LowRank:
        """A copy of what is in a slot."""
        return LowRank(self.A[slot, :rank].clone(), self.Bt[slot, :rank].mT.clone(), scale)

    def grow(self, slots: int, dtype: torch.dtype, rank: int | None = None) -> None:
        """More slots, a wider dtype, or room for a larger rank; what is there stays."""
        for name in ("A", "Bt"):
            old = getattr(self, name)
            new = old.new_zeros(slots, rank or old.shape[1], old.shape[2], dtype=dtype)
            new[: len(old), : old.shape[1]] = old
            setattr(self, name, new)
        self.U = None if self.U is None else self.U.to(dtype)
        self.V = None if self.V is None else self.V.to(dtype)

    def uniform(self, layer: Any, y: Tensor, x: Tensor, items: Sequence[Item]) -> Tensor:
        """y plus the whole batch's mix."""
        if self.shared:
            z = self._coordinates(x)
            parts = [c * F.linear(z, self.A[slot, :k]) @ self.Bt[slot, :k] for slot, c, k in items]
            return self._out(y, sum(parts[1:], parts[0])) if parts else y
        for slot, coefficient, k in items:
            h = self.kind.down(layer, x, self.A[slot, :k])
            y = self.kind.added(layer, y, h, self.Bt[slot, :k], coefficient)
        return y

    def rows(self, layer: Any, y: Tensor, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        """y plus each row's own mix.

        Args:
            y, x: (rows · m, ...). ids: (rows, K) slots.
            w: (rows, 1 or n, K · R) weights of the ranks.
        """
        h = self.kind.rows_down(layer, self._coordinates(x) if self.shared else x, self.A, ids)
        if h.requires_grad:
            w = w.clone()  # the next choice is written there, before the backward pass maybe
        h = (h * w).to(h.dtype)
        if self.shared:
            return self._out(y, torch.bmm(h, gathered(self.Bt, ids)))
        return self.kind.rows_up(layer, y, h, gathered(self.Bt, ids))

    def grouped(self, y: Tensor, x: Tensor, by: Grouping | Segments, w: Tensor) -> Tensor:
        """The same for a kind whose h is x Aᵀ, with the rows in the order of the slots.

        Args:
            w: (places, R), of `by`.
        """
        x = self._coordinates(x) if self.shared else x.to(self.A.dtype)
        x = x.reshape(by.rows, -1, x.shape[-1])
        if self.shared:
            core = x.new_zeros(*x.shape[:2], self.Bt.shape[2])
            return self._out(y, by.added(core, x, self.A, self.Bt, w))
        shaped = y.reshape(by.rows, -1, y.shape[-1])
        return by.added(shaped, x, self.A, self.Bt, w).view(y.shape)

    def _coordinates(self, x: Tensor) -> Tensor:
        """x in those of V."""
        x = x.to(self.A.dtype)
        return x if self.V is None else x @ self.V

    def _out(self, y: Tensor, core: Tensor) -> Tensor:
        """y plus what has coordinates in U."""
        delta = core if self.U is None else F.linear(core, self.U)
        return y + delta.to(y.dtype).view(y.shape)


@dataclass
class Table:
    """What each slot of a group holds at each layer.

    Args:
        width: R, ranks a slot has room for.
        ranks: (slots, L) ranks there are; 0 where the adapter lacks the module.
        first: (slots, L) ranks of the same adapter that come before, in other groups.
        scales: (slots, L) the updates' scales.
    """

    width: int
    ranks: Tensor
    first: Tensor
    scales: Tensor

    @classmethod
    def empty(cls, width: int, slots: int, layers: int) -> Table:
        size = (slots, layers)
        whole = torch.zeros(size, dtype=torch.int64)
        return cls(width, whole, whole.clone(), torch.zeros(size, dtype=torch.float64))

    def widen(self, rank: int) -> None:
        """Room for a rank, to the next power of two."""
        self.width = 1 << (rank - 1).bit_length()

    def grow(self, slots: int, layers: int) -> None:
        """Room for more; what is there stays."""
        for name in ("ranks", "first", "scales"):
            old = getattr(self, name)
            new = old.new_zeros(slots, layers)
            new[: old.shape[0], : old.shape[1]] = old
            setattr(self, name, new)
