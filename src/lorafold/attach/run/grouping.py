"""Rows by slot: how a batch with many adapters runs in eager mode.

A compiled graph must not depend on who runs, so it gathers each row's factors. Where that is known,
the rows are put in the order of the slots instead, and the factors are read once, where they are:
copying them costs more than multiplying with them. A range of slots with about as many rows each is
one pair of batched products; otherwise each adapter has a pair of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from ...thin import threads

Entry = tuple[int, int]  # slot, row · K + position in the row's mix
_WASTE = 2  # places in the batched products for each entry, at most
_THIN = 1 << 19  # multiplications of a product that a second thread makes no faster


class Grouping:
    """What runs in a batch, by slot.

    Args:
        entries: what runs. rows, width: of the selection. w: by group, the weights (L, rows, K · R)
            of all layers.

    Attributes:
        dense: whether it is one pair of batched products. w: by group, (L, places, R).
    """

    def __init__(
        self, entries: Sequence[Entry], rows: int, width: int, w: Mapping[str, Tensor]
    ) -> None:
        entries = sorted(entries)
        counts = [(slot, len(list(same))) for slot, same in groupby(entries, lambda e: e[0])]
        self.rows, self.first = rows, counts[0][0] if counts else 0
        self.span = counts[-1][0] - self.first + 1 if counts else 0
        each = max((count for _, count in counts), default=0)
        self.dense = self.span * each <= _WASTE * len(entries)
        self.places = self.span * each if self.dense else len(entries)
        self.segments: list[tuple[int, int, int]] = []
        where: list[int] = []
        for slot, count in counts:
            start = len(where)
            self.segments.append((slot, start, start + count))
            begin = (slot - self.first) * each if self.dense else start
            where += range(begin, begin + count)
        target = [at // width for _, at in entries]
        source = [0] * self.places  # where nobody is, row 0 is multiplied, and dropped
        for place, row in zip(where, target, strict=True):
            source[place] = row
        self.full = self.places == len(entries)
        self.in_order = self.places == rows and source == list(range(rows))
        # Where each row runs one adapter, the place of its change: reading from there is faster
        # than adding to each row from where it comes.
        once = dict(zip(target, where, strict=True))
        self.each_once = len(entries) == rows == len(once)
        device = next(iter(w.values())).device if w else None
        self.source, self.where, self.target, self.place, at = (
            torch.tensor(values, dtype=torch.int64, device=device)
            for values in (
                source,
                where,
                target,
                [once[row] for row in range(rows)] if self.each_once else [],
                [at for _, at in entries],
            )
        )
        self.w = {group: self._placed(weights, width, at) for group, weights in w.items()}

    def _placed(self, w: Tensor, width: int, at: Tensor) -> Tensor:
        found = w.view(len(w), self.rows * width, -1).index_select(1, at)
        if self.full:
            return found
        return w.new_zeros(len(w), self.places, found.shape[2]).index_copy(1, self.where, found)

    def added(self, y: Tensor, x: Tensor, A: Tensor, Bt: Tensor, w: Tensor) -> Tensor:
        """y plus each row's own mix.

        Args:
            y: (rows, n, out). x: (rows, n, in). A: (slots, R, in). Bt: (slots, R, out).
            w: (places, R), of one layer.
        """
        if not self.segments:
            return y
        thin = x.device.type == "cpu" and self.places * x[0].numel() * A.shape[1] <= _THIN
        with threads(1 if thin else None):
            return self._added(y, x, A, Bt, w)

    def _added(self, y: Tensor, x: Tensor, A: Tensor, Bt: Tensor, w: Tensor) -> Tensor:
        xs = x if self.in_order else x.index_select(0, self.source)
        if not self.dense:
            return self._onto(y, self._one_by_one(xs, A, Bt, w))
        slots = slice(self.first, self.first + self.span)
        # This way round many tokens take a processor half the time.
        h = torch.bmm(A[slots], xs.reshape(self.span, -1, x.shape[2]).mT).mT
        h = (h.reshape(self.places, x.shape[1], -1) * w[:, None]).to(h.dtype).reshape(h.shape)
        if self.in_order and y.dtype == h.dtype:
            return torch.baddbmm(y.reshape(self.span, -1, y.shape[2]), h, Bt[slots]).view(y.shape)
        return self._onto(y, torch.bmm(h, Bt[slots]).view(self.places, x.shape[1], -1))

    def _onto(self, y: Tensor, delta: Tensor) -> Tensor:
        """y plus the changes (places, n, out)."""
        if self.each_once:
            return y + delta.index_select(0, self.place).to(y.dtype)
        if not self.full:
            delta = delta.index_select(0, self.where)
        return y.index_add(0, self.target, delta.to(y.dtype))

    def _one_by_one(self, xs: Tensor, A: Tensor, Bt: Tensor, w: Tensor) -> Tensor:
        """The change of each entry, in their order."""
        h = torch.cat([F.linear(xs[a:b], A[slot]) for slot, a, b in self.segments])
        h = (h * w[:, None]).to(h.dtype)
        return torch.cat([h[a:b] @ Bt[slot] for slot, a, b in self.segments])
