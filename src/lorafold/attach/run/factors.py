"""Factors of one adapter at one layer, outside of slots: trainable ones, and the background's.

`Pair` runs s · B A x, or, where it began with part of the weight (PiSSA), s (B A − B₀ A₀) x with
the start frozen beside it, so that W is never altered. `Modulation` runs U (Δs ⊙ Vh x): the same
map as taking the directions out of W and putting U diag(S + Δs) Vh back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layers.kinds import LayerKind
from ...lowrank import LowRank
from ...prefixes import Prefixes


class Factors(nn.Module, ABC):
    """Factors of one adapter at one layer; see the three final classes.

    Attributes:
        rank: how many rows. scale: of the product. saved_as: what a checkpoint calls the kind.
    """

    saved_as = ""

    shares: Tensor | None  # of the ranks while training, where they are nested

    def __init__(self, kind: LayerKind, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("shares", None, persistent=False)
        self.kind, self.rank, self.scale, self.dropout = kind, rank, scale, dropout

    @abstractmethod
    def parts(self, k: int) -> list[tuple[Tensor, Tensor, Tensor | float]]:
        """(A (k, in), B (out, k), what h is multiplied by) whose products add up to ΔW / scale."""

    def update(self) -> LowRank:
        """A copy of the present update."""
        with torch.no_grad():
            parts = self.parts(self.rank)
            A = torch.cat([A for A, _, _ in parts])
            B = torch.cat([B * g for _, B, g in parts], 1)
            return LowRank(A.detach().clone(), B.detach().clone(), self.scale)

    @abstractmethod
    def paused(self, k: int) -> list[tuple[nn.Parameter, Any]]:
        """Each parameter with the index of its entries that a rank prefix k leaves out."""

    def uniform(self, layer: Any, y: Tensor, x: Tensor, coefficient: Any, k: int) -> Tensor:
        """y plus coefficient · B A x at rank prefix k; the scale is part of the coefficient."""
        x = self._dropped(x)
        shares = self.shares if self.training else None
        if shares is not None and k == self.rank:
            coefficient = coefficient * shares
        # Summed before they are added, so that a start cancels to the rounding of its own size.
        delta: Any = None
        for A, B, g in self.parts(k):
            h = _times(self.kind.down(layer, x, A), g * coefficient, self.kind)
            part = self.kind.up(layer, h, B)
            delta = part if delta is None else delta + part
        total: Tensor = y + delta.to(y.dtype)
        return total

    def rows(
        self, layer: Any, y: Tensor, x: Tensor, w: Tensor, only: Tensor | None = None
    ) -> Tensor:
        """y plus each row's own share; w (rows, r) weights of the ranks, scale included.

        Args:
            only: the rows whose weights are not all 0, where that is known: no other is run.
        """
        at = None
        if only is not None:
            if not len(only):
                return y
            n = y.shape[0] // len(w)
            at = (n * only[:, None] + torch.arange(n, device=only.device)).flatten()
            x, w = x[at], w[only]
        x = self._dropped(x)
        shares = self.shares if self.training else None
        if shares is not None:  # rows that run whole have a weight at the last rank
            w = torch.where(w[:, -1:] != 0, w * shares, w)
        weights = w.repeat_interleave(len(x) // len(w), 0)
        delta: Any = None
        for A, B, g in self.parts(self.rank):
            h = self.kind.down(layer, x, A)
            channel = self.kind.channel % h.ndim
            shape = [h.shape[0] if d == 0 else -1 if d == channel else 1 for d in range(h.ndim)]
            h = (_times(h, g, self.kind) * weights.view(shape)).to(h.dtype)
            part = self.kind.up(layer, h, B)
            delta = part if delta is None else delta + part
        delta = delta.to(y.dtype)
        total: Tensor = y + delta if at is None else y.index_add(0, at, delta)
        return total

    def _dropped(self, x: Tensor) -> Tensor:
        if self.dropout and self.training and x.is_floating_point():
            return F.dropout(x, self.dropout)
        return x


def _times(h: Tensor, g: Tensor | float, kind: LayerKind) -> Tensor:
    """h times a number, or a number a rank, in h's dtype."""
    if isinstance(g, Tensor):
        channel = kind.channel % h.ndim
        g = g.view([-1 if d == channel else 1 for d in range(h.ndim)])
    return (h * g).to(h.dtype)


class Pair(Factors):
    """s · B A, less its frozen start where there is one.

    Args:
        A: (r, in). B: (out, r). start: (A₀, B₀) that is subtracted.
        prefixes: what rank prefixes are to mean; trained at all of them where it names ranks.
    """

    saved_as = "lora"
    A0: Tensor | None
    B0: Tensor | None

    def __init__(
        self,
        kind: LayerKind,
        A: Tensor,
        B: Tensor,
        scale: float,
        dropout: float = 0.0,
        start: tuple[Tensor, Tensor] | None = None,
        prefixes: Prefixes | None = None,
    ) -> None:
        super().__init__(kind, len(A), scale, dropout)
        if prefixes is not None and prefixes.ranks:
            self.shares = torch.tensor(prefixes.shares(len(A)), device=A.device)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.register_buffer("A0", None if start is None else start[0])
        self.register_buffer("B0", None if start is None else start[1])

    def parts(self, k: int) -> list[tuple[Tensor, Tensor, Tensor | float]]:
        found: list[tuple[Tensor, Tensor, Tensor | float]] = [(self.A[:k], self.B[:, :k], 1.0)]
        if self.A0 is not None and self.B0 is not None:
            found.append((self.A0[:k], self.B0[:, :k], -1.0))
        return found

    def paused(self, k: int) -> list[tuple[nn.Parameter, Any]]:
        return [(self.A, slice(k, None)), (self.B, (slice(None), slice(k, None)))]


class Modulation(Factors):
    """U (Δs ⊙ Vh x) on chosen singular directions of the weight.

    Args:
        U: (out, r). S: (r,). Vh: (r, in). delta_s: (r,), the only thing that is trained.
        index: (r,) which of the weight's singular directions they are.

    Attributes:
        directions: how many the weight has. select: by which score they were chosen.
    """

    saved_as = "pissa"
    U: Tensor
    S: Tensor
    Vh: Tensor
    index: Tensor

    def __init__(
        self,
        kind: LayerKind,
        U: Tensor,
        S: Tensor,
        Vh: Tensor,
        delta_s: Tensor,
        index: Tensor,
        directions: int | None = None,
        select: str = "s_only",
    ) -> None:
        super().__init__(kind, len(S), 1.0)
        self.directions, self.select = directions or len(S), select
        for name, t in (("U", U), ("S", S), ("Vh", Vh), ("index", index)):
            self.register_buffer(name, t)
        self.delta_s = nn.Parameter(delta_s)

    def selected_by(self, select: str) -> None:
        """They were chosen by this score."""
        self.select = select

    @property
    def tail_depth(self) -> float:
        """How far from the top the directions are: 0 for the leading ones, 1 for the last ones.

        (mean index − (r − 1) / 2) / (k − r), k directions in all; 0 where all of them are chosen.
        """
        r, k = self.rank, self.directions
        if k == r:
            return 0.0
        return (float(self.index.double().mean()) - (r - 1) / 2) / (k - r)

    def parts(self, k: int) -> list[tuple[Tensor, Tensor, Tensor | float]]:
        return [(self.Vh[:k], self.U[:, :k], self.delta_s[:k])]

    def paused(self, k: int) -> list[tuple[nn.Parameter, Any]]:
        return [(self.delta_s, slice(k, None))]


class Kept(Factors):
    """Frozen updates that run in the background, as one pair of products; the gate is their weight.

    Args:
        updates: what runs, coefficients included; joined in the widest dtype.
    """

    A: Tensor
    B: Tensor

    def __init__(self, kind: LayerKind, updates: list[LowRank], device: Any) -> None:
        dtype = updates[0].B.dtype
        for u in updates:
            for t in (u.A, u.B):
                dtype = torch.promote_types(dtype, t.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        A = torch.cat([u.A.to(device, dtype) for u in updates])
        B = torch.cat([(u.scale * u.B.to(device, wide)).to(dtype) for u in updates], 1)
        super().__init__(kind, len(A), 1.0)
        self.register_buffer("A", A.detach().clone(), persistent=False)
        self.register_buffer("B", B.detach().clone(), persistent=False)

    def parts(self, k: int) -> list[tuple[Tensor, Tensor, Tensor | float]]:
        return [(self.A[:k], self.B[:, :k], 1.0)]

    def paused(self, k: int) -> list[tuple[nn.Parameter, Any]]:
        return []
