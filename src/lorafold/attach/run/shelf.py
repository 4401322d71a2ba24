"""A library as its adapters run: between its shared sides, which lie on each layer's device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ...errors import MismatchError
from ...fold import Library
from ...fold.coding.record import StoredPart
from ...lowrank import LowRank
from .patch import Patch
from .slots import Slots


class Shelf:
    """An attached library.

    Args:
        library: the library. dtype: of its sides on the device.
    """

    def __init__(self, library: Library, dtype: torch.dtype) -> None:
        self.library, self._dtype = library, dtype
        self._known: dict[str, dict[str, tuple[Tensor | None, list[int]]]] = {}

    def ranks(self) -> dict[str, int]:
        """{name: the largest rank that it may have}."""
        entries = self.library.contents.manifest.adapters
        # What coding added (a residual part) may come on top of the file's own rank.
        return {name: 2 * max(entry.ranks, default=0) for name, entry in entries.items()}

    def load(self, name: str, slots: Slots, slot: int) -> None:
        """Read an adapter's parts into a slot."""
        for path, patch in slots.patches.items():
            first = 0
            for (has_U, has_V), parts in _by_sides(self.library.contents.parts(name, path)):
                sides = self._sides(patch)
                u = _joined_core(parts, sides)
                U, V = sides["U"][0] if has_U else None, sides["V"][0] if has_V else None
                slots.write(slot, path, u, U, V, first)
                first += u.rank

    def _sides(self, patch: Patch) -> dict[str, tuple[Tensor | None, list[int]]]:
        """For "U" and "V": all bases side by side, (d, ΣR), and where each begins."""
        if patch.path not in self._known:
            contents = self.library.contents
            sides = contents.sides(contents.manifest.numbers[patch.path])
            self._known[patch.path] = {
                side: self._joined([b.columns for b in bases], patch)
                for side, bases in sides.items()
            }
        return self._known[patch.path]

    def _joined(self, columns: list[Tensor], patch: Patch) -> tuple[Tensor | None, list[int]]:
        starts = [0]
        for c in columns:
            starts.append(starts[-1] + c.shape[1])
        if not columns:
            return None, starts
        return torch.cat(columns, 1).to(patch.device, self._dtype), starts


def slots_within(library: Library, nbytes: int, dtype: torch.dtype) -> int:
    """How many adapters fit in so many bytes, judged by the first one.

    Raises:
        MismatchError: not even one.
    """
    name = library.names[0]
    each = 0
    for m in library.contents.modules:
        for part in library.contents.parts(name, m.path):
            each += (part.left.numel() + part.right.numel()) * dtype.itemsize
    if nbytes < each:
        raise MismatchError(f"cache= of {nbytes} bytes holds no adapter: one takes {each}")
    return max(1, min(len(library), nbytes // max(each, 1)))


def _by_sides(parts: list[StoredPart]) -> Iterable[tuple[tuple[bool, bool], list[StoredPart]]]:
    found: dict[tuple[bool, bool], list[StoredPart]] = {}
    for part in parts:
        found.setdefault((part.U is not None, part.V is not None), []).append(part)
    return found.items()


def _joined_core(
    parts: list[StoredPart], sides: Mapping[str, tuple[Tensor | None, list[int]]]
) -> LowRank:
    """Parts between the same sides as one update in the joined coordinates."""
    lefts, rights = [], []
    for part in parts:
        lefts.append(part.scale * _placed(part.left, part.U, sides["U"]))
        rights.append(_placed(part.right.T, part.V, sides["V"]).T)
    return LowRank(torch.cat(rights), torch.cat(lefts, 1))


def _placed(X: Tensor, number: int | None, side: tuple[Tensor | None, list[int]]) -> Tensor:
    """Coordinates (R, k) in one basis as coordinates (ΣR, k) in all of them."""
    if number is None:
        return X
    starts = side[1]
    whole = X.new_zeros(starts[-1], X.shape[1])
    whole[starts[number] : starts[number] + len(X)] = X
    return whole
