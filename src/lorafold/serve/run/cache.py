"""The keys and values of running rows: one dense tensor a layer, each row at a position of its own.

A call says beforehand which rows it is for (`decode`, `prefill`), and gives the cache to the model
as its own kind: transformers asks a cache for no more than `update`, where the caller brings masks
and positions. What is read is a view, up to the longest row; what lies behind a row's own length is
masked, and finite: zero, or left by an earlier row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Masks: TypeAlias = "Tensor | dict[str, Tensor]"


class RowCache:
    """Keys and values of rows.

    Args:
        rows, length: how many, and tokens of each at most.
    """

    is_compileable = False  # transformers asks

    def __init__(self, rows: int, length: int) -> None:
        self._rows, self._length = rows, length
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._at: tuple[Tensor, Tensor] | None = None  # where decoding rows write
        self._first = self._start = self._end = 0

    def decode(self, positions: Tensor, end: int) -> None:
        """The next call is one token for each of the first rows, at positions (n,) below `end`."""
        self._at = torch.arange(len(positions), device=positions.device), positions
        self._end = end

    def prefill(self, first: int, start: int) -> None:
        """The next call is tokens of rows from the `first` on, all from position `start`."""
        self._at, self._first, self._start = None, first, start

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """What transformers would count positions from, which are given here."""
        return 0

    def update(
        self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep a layer's keys and values, and give all that the rows have.

        Args:
            k, v: (n, heads, tokens, size).
        """
        if layer_idx not in self._layers:
            self._layers[layer_idx] = self._made(k), self._made(v)
        K, V = self._layers[layer_idx]
        n = len(k)
        if self._at is not None:
            rows, positions = self._at
            K[rows, :, positions], V[rows, :, positions] = k[:, :, 0], v[:, :, 0]
            return K[:n, :, : self._end], V[:n, :, : self._end]
        own, end = slice(self._first, self._first + n), self._start + k.shape[2]
        K[own, :, self._start : end], V[own, :, self._start : end] = k, v
        if self._start == 0:
            return k, v
        return K[own, :, :end], V[own, :, :end]

    def _made(self, like: Tensor) -> Tensor:
        # Zeros: what is masked is multiplied by 0, and 0 · NaN is NaN.
        return like.new_zeros(self._rows, like.shape[1], self._length, like.shape[3])

    def move(self, source: int, target: int, length: int) -> None:
        """A row takes the place of another."""
        for pair in self._layers.values():
            for t in pair:
                t[target, :, :length] = t[source, :, :length]

    def clear(self, row: int) -> None:
        """Nothing is left of a row, whose numbers may not have been finite."""
        for pair in self._layers.values():
            for t in pair:
                t[row].zero_()

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(t.nbytes for pair in self._layers.values() for t in pair)


def masks(
    queries: Tensor, end: int, windows: Mapping[str, int | None], additive: torch.dtype | None
) -> Masks:
    """Which of the first `end` positions queries see: those up to their own, within a window.

    Args:
        queries: (n, q) positions. windows: kind of layer → its window, None for none; a single
            kind "" where the model takes one mask.
        additive: floats to be added to the scores, in this dtype; booleans when None.

    Returns:
        (n, 1, q, end), or one for each kind.
    """
    keys = torch.arange(end, device=queries.device)
    causal = keys <= queries[:, None, :, None]
    found: dict[str, Tensor] = {}
    for kind, window in windows.items():
        seen = causal
        if window is not None:
            seen = causal & (keys > queries[:, None, :, None] - window)
        if additive is not None:
            least = torch.finfo(additive).min
            zeros = torch.zeros(seen.shape, dtype=additive, device=seen.device)
            seen = zeros.masked_fill(~seen, least)
        found[kind] = seen
    return found.get("", found)


def padded(lists: Sequence[Sequence[int]], device: Any) -> Tensor:
    """Token lists as rows (n, longest), filled up behind their ends."""
    longest = max(map(len, lists))
    return torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in lists], device=device)
