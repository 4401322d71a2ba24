"""A library as its adapters run: between its shared sides, which lie on each layer's device."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...adapter import Adapter
from ...errors import MismatchError, RefusedError
from ...fold import Library
from ...fold.coding.record import StoredPart
from ...fold.contents import Contents
from ...fold.store.entries import AdapterEntry
from ...lowrank import LowRank
from ...parts import extra_kind
from ...prefixes import Prefixes
from .patch import Patch
from .slots import Slots

# For "U" and "V": all bases of a module side by side, (d, ΣR), and where each begins.
_Sides: TypeAlias = dict[str, tuple[Tensor | None, list[int]]]


class Shelf:
    """A library as it was when it was attached; what is changed in it later does not reach this.

    Args:
        library: the library. dtype: of its sides on the device. names: {a layer's path in the
            model: the library's name of it}. owned: {adapter: its extras that are the model's own}.
    """

    def __init__(
        self,
        library: Library,
        dtype: torch.dtype,
        names: Mapping[str, str],
        owned: Mapping[str, frozenset[str]],
    ) -> None:
        self._library, self._dtype, self._names = copy.copy(library), dtype, dict(names)
        self._modules, self._owned = library.contents.modules, dict(owned)
        self._known: dict[tuple[str, torch.device], _Sides] = {}

    def __deepcopy__(self, memo: Any) -> Shelf:
        return self  # it never changes

    def adapter(self, entry: AdapterEntry) -> Adapter:
        """An adapter, read back."""
        self._contents(entry)
        return self._library[entry.name]

    def prefixes(self, entry: AdapterEntry, scaling: str | None) -> Prefixes:
        """What an adapter's rank prefixes mean."""
        return Prefixes.of(self._contents(entry).config(entry.name), scaling)

    def update(self, entry: AdapterEntry, path: str) -> LowRank | None:
        """An adapter's update at one layer; None where it has none there."""
        part = self.part(entry, path)
        return None if part is None else self._contents(entry).update(entry.name, part)

    def part(self, entry: AdapterEntry, path: str) -> str | None:
        """What the library calls a layer; None where an adapter has no update there."""
        contents, name = self._contents(entry), self._names.get(path, path)
        j = contents.manifest.numbers.get(name)
        return None if j is None or not contents.record_size(j, entry) else name

    def refuse(self, entry: AdapterEntry) -> None:
        """Raise a `RefusedError` for an adapter that does not run from a library."""
        contents, name = self._contents(entry), entry.name
        if entry.refusal:
            raise RefusedError(f"adapter {name!r}: {entry.refusal}")
        for key in entry.extras:
            kind = extra_kind(key, contents.config(name))
            if kind != "training state" and key not in self._owned.get(name, ()):
                raise RefusedError(
                    f"adapter {name!r} carries {key!r} ({kind}), which does not run from a "
                    "library: attach library[name] itself, or apply it to the weights "
                    "(adapter.apply_to)"
                )

    def load(self, entry: AdapterEntry, slots: Slots, slot: int) -> None:
        """Read an adapter's parts into a slot."""
        contents = self._contents(entry)
        for path, patch in slots.patches.items():
            first = 0
            name = self._names.get(path, path)
            for (has_U, has_V), parts in _by_sides(contents.parts(entry.name, name)):
                sides = self._sides(contents, patch)
                u = _joined_core(parts, sides)
                U, V = sides["U"][0] if has_U else None, sides["V"][0] if has_V else None
                slots.write(slot, path, u, U, V, first)
                first += u.rank

    def _contents(self, entry: AdapterEntry) -> Contents:
        """What the library holds, which a pickle finds again by its path.

        Raises:
            MismatchError: it is no longer what was attached.
        """
        contents = self._library.contents
        same = contents.modules == self._modules
        if not same or contents.manifest.adapters.get(entry.name) != entry:
            raise MismatchError(
                f"the library at {self._library.path} was changed after the model that it is "
                f"attached to was pickled, and {entry.name!r} is not read from it: attach it again"
            )
        return contents

    def _sides(self, contents: Contents, patch: Patch) -> _Sides:
        key = patch.path, patch.device
        if key not in self._known:
            name = self._names.get(patch.path, patch.path)
            sides = contents.sides(contents.manifest.numbers[name])
            self._known[key] = {
                side: self._joined([b.columns for b in bases], patch.device)
                for side, bases in sides.items()
            }
        return self._known[key]

    def _joined(
        self, columns: list[Tensor], device: torch.device
    ) -> tuple[Tensor | None, list[int]]:
        starts = [0]
        for c in columns:
            starts.append(starts[-1] + c.shape[1])
        if not columns:
            return None, starts
        return torch.cat(columns, 1).to(device, self._dtype), starts


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


def _joined_core(parts: list[StoredPart], sides: _Sides) -> LowRank:
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
