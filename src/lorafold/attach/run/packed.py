"""Packed batches: sequences end to end along the second axis, rows of lengths of their own.

Where the lengths are known (eager, on a processor), the tokens of each adapter are a segment that
is multiplied with its factors where they are. A graph must not depend on them: there the tokens are
cut into blocks of a fixed size, none of two rows, and each block gathers the factors of its row. A
row wastes less than a block, so ⌈T / size⌉ + rows blocks are enough whatever the lengths.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import MismatchError
from .grouping import Entry


@dataclass(frozen=True)
class Blocks:
    """Tokens in blocks of one row each.

    Args:
        row: (blocks,) whose each is. source: (blocks · size,) the tokens in them.
        place: (T,) where each token lies in them.
    """

    row: Tensor
    source: Tensor
    place: Tensor
    size: int


class Packed:
    """The lengths of packed rows, as tensors that are rewritten in place.

    The last row is the base's, for the tokens that nobody has.

    Args:
        rows: of the tensors, the base's included. devices: where they are needed.

    Attributes:
        total: tokens of all rows. sequences: rows that have any.
    """

    def __init__(self, rows: int, devices: Iterable[torch.device]) -> None:
        self.lengths = {
            device: torch.zeros(rows, dtype=torch.int64, device=device)
            for device in dict.fromkeys([torch.device("cpu"), *devices])
        }
        self.total = self.sequences = 0
        self._known: dict[tuple[torch.device, int, bool], Tensor] = {}

    def set(self, lengths: Sequence[int]) -> None:
        """These are the rows' lengths, in order."""
        self.total, self.sequences = sum(lengths), sum(length > 0 for length in lengths)
        values = next(iter(self.lengths.values())).new_zeros(len(self._on(torch.device("cpu"))))
        values[: len(lengths)] = torch.tensor(lengths)
        for tensor in self.lengths.values():
            tensor.copy_(values)
        self._known.clear()

    def _on(self, device: torch.device, one: bool = False) -> Tensor:
        found = self.lengths.get(device)
        lengths = self.lengths[torch.device("cpu")].to(device) if found is None else found
        return lengths.clamp(max=1) if one else lengths

    def check(self, tokens: int, device: torch.device) -> None:
        """Raise where the lengths are more than the tokens; in a graph, when it runs."""
        if torch.compiler.is_compiling():  # what is looked at here, it is compiled again for
            enough = self._on(device).sum() <= tokens
            torch._assert_async(enough, f"lengths= add up to more than the {tokens} tokens")
        elif self.total > tokens:
            raise MismatchError(f"lengths= add up to {self.total}, the batch has {tokens} tokens")

    def row_of(self, device: torch.device, tokens: int, one: bool) -> Tensor:
        """(T,) the row of each token; `one`: of each of as many tokens as there are sequences."""
        if torch.compiler.is_compiling():
            return self._row_of(device, tokens, one)
        key = (device, tokens, one)
        if key not in self._known:
            self._known[key] = self._row_of(device, tokens, one)
        return self._known[key]

    def _row_of(self, device: torch.device, tokens: int, one: bool) -> Tensor:
        ends = self._on(device, one).cumsum(0)
        at = torch.arange(tokens, device=device)
        return torch.searchsorted(ends, at, right=True).clamp(max=len(ends) - 1)

    def blocks(self, device: torch.device, tokens: int, one: bool, size: int) -> Blocks:
        """The tokens in blocks."""
        lengths = self._on(device, one)
        last, count = len(lengths) - 1, -(-tokens // size) + len(lengths) - 1
        each = (lengths + size - 1) // size
        ends = each.cumsum(0)
        first, start = ends - each, lengths.cumsum(0) - lengths
        block = torch.arange(count, device=device)
        row = torch.searchsorted(ends, block, right=True).clamp(max=last)
        within = (block - first[row])[:, None] * size + torch.arange(size, device=device)
        source = (start[row][:, None] + within).clamp(0, tokens - 1).flatten()
        of = self.row_of(device, tokens, one)
        at = torch.arange(tokens, device=device) - start[of]
        place = ((first[of] + at // size) * size + at % size).clamp(0, count * size - 1)
        return Blocks(row, source, place, size)


def block_size(tokens: int, rows: int, ranks: int) -> int:
    """The power of two at which copying factors and multiplying padding cost about the same.

    Blocks of size b read (T / b + rows) · ranks rows of factors and T + rows · b of inputs.
    """
    best = ranks * tokens / rows
    return 1 << max(0, round(best).bit_length() // 2)


class Segments:
    """What runs in a packed batch, as segments of one adapter each.

    Args:
        entries: what runs. lengths: of the rows. width: of the selection.
        w: by group, the weights (L, rows, K · R) of all layers.

    Attributes:
        rows: of the inputs, which are (1, T). w: by group, (L, entries, R).
    """

    rows = 1

    def __init__(
        self,
        entries: Sequence[Entry],
        lengths: Sequence[int],
        width: int,
        w: Mapping[str, Tensor],
    ) -> None:
        starts = [0, *accumulate(lengths)]
        entries = [e for e in entries if lengths[e[1] // width]]
        by_row = sorted(entries, key=lambda e: e[1])
        runs = [slot for slot, _ in groupby(by_row, lambda e: e[0])]
        # In the order of the rows nothing is copied; several short ones of a slot are.
        entries = by_row if len(runs) <= 2 * len(set(runs)) else sorted(entries)
        spans = [range(starts[at // width], starts[at // width + 1]) for _, at in entries]
        ends = [0, *accumulate(len(span) for span in spans)]
        self.segments: list[tuple[int, int, int]] = []
        for slot, same in groupby(range(len(entries)), lambda i: entries[i][0]):
            own = list(same)
            self.segments.append((slot, ends[own[0]], ends[own[-1] + 1]))
        source = [t for span in spans for t in span]
        self.tokens = len(source)
        self.in_order = source == list(range(len(source)))
        device = next(iter(w.values())).device if w else None
        at, self.source = (
            torch.tensor(values, dtype=torch.int64, device=device)
            for values in ([at for _, at in entries], source)
        )
        each = torch.tensor([len(span) for span in spans], dtype=torch.int64, device=device)
        self.entry = torch.repeat_interleave(each)
        self.w = {
            group: t.reshape(len(t), t.shape[1] * width, -1).index_select(1, at)
            for group, t in w.items()
        }

    def added(self, y: Tensor, x: Tensor, A: Tensor, Bt: Tensor, w: Tensor) -> Tensor:
        """y plus each row's own mix.

        Args:
            y: (1, T, out). x: (1, T, in). A: (slots, R, in). Bt: (slots, R, out).
            w: (entries, R), of one layer.
        """
        if not self.segments:
            return y
        x, flat = x[0], y[0]
        xs = x if self.in_order else x.index_select(0, self.source)
        h = torch.cat([F.linear(xs[a:b], A[slot]) for slot, a, b in self.segments])
        h = (h * w.index_select(0, self.entry)).to(h.dtype)
        if self.in_order and flat.dtype == h.dtype:
            parts = [torch.addmm(flat[a:b], h[a:b], Bt[slot]) for slot, a, b in self.segments]
            return torch.cat([*parts, flat[self.tokens :]])[None]
        delta = torch.cat([h[a:b] @ Bt[slot] for slot, a, b in self.segments]).to(y.dtype)
        return flat.index_add(0, self.source, delta)[None]
