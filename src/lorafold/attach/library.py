"""A library on a running model: its adapters stay in the coordinates of their shared sides.

δ = U B_i A_i Vᵀ x. Every layer holds the module's shared sides once, and slots for the cores
(A_i, B_i) of the adapters in use, which are read from the library when they are asked for. Parts of
an adapter whose sides are its own go to banks of their own, made when the first such part comes:
"both" sides shared, the "in" side (V) or the "out" side (U) only, or none ("own").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import MismatchError, RefusedError
from ..fold import Library
from ..fold.record import StoredPart
from ..lowrank import LowRank
from .bank import Bank, SharedBank
from .kinds import CONV1D, LINEAR
from .patch import Patch
from .places import Place, place_at, refuse_extras
from .slots import OWN
from .source import Source
from .swap import device_of

if TYPE_CHECKING:
    from .core import Core

_GROUPS = {(True, True): "both", (False, True): "in", (True, False): "out", (False, False): OWN}


def library_places(live: Core, library: Library) -> dict[str, Place]:
    """{path: place} of a library's modules.

    Raises:
        MismatchError: none of them is in the model, or a shape differs.
        RefusedError: a layer that takes no update, or experts.
    """
    there = {path for path, _ in live.model.named_modules()}
    modules = {m["path"]: m for m in library.modules}
    found: dict[str, Place] = {}
    for path, m in modules.items():
        if m.get("layout", {}).get("kind") == "expert":
            raise RefusedError(
                f"module {path!r} of the library is an expert's: attach its adapters one by one, "
                "lf.attach(model, {name: library[name]})"
            )
        if path not in there:
            continue
        place = place_at(live.model, path, live.patches)
        if place.dims != tuple(m["shape"]):
            raise MismatchError(
                f"module {path!r} takes updates of shape {place.dims}, the library's are "
                f"{tuple(m['shape'])}: it belongs to another base"
            )
        found[path] = place
    if not found:
        raise MismatchError(
            f"none of the library's {len(modules)} modules is in the model: it has "
            f"{next(iter(modules), None)!r}, the model e.g. {max(there, key=len)!r}"
        )
    return found


def library_sources(library: Library) -> dict[str, Source]:
    """A source for each of a library's adapters."""
    found = {}
    for name, entry in library.store.manifest["adapters"].items():
        ranks = entry["rank"]
        # What coding added (a residual part) may come on top of the file's own rank.
        rank = max(ranks) if isinstance(ranks, list) else ranks
        found[name] = Source(2 * rank, library=library)
    return found


def slots_within(library: Library, nbytes: int, dtype: torch.dtype) -> int:
    """How many adapters fit in so many bytes, judged by the first one.

    Raises:
        MismatchError: not even one.
    """
    name = library.names[0]
    each = 0
    for m in library.modules:
        for part in library.parts(name, m["path"]):
            each += (part.left.numel() + part.right.numel()) * dtype.itemsize
    if nbytes < each:
        raise MismatchError(f"cache= of {nbytes} bytes holds no adapter: one takes {each}")
    return max(1, min(len(library), nbytes // max(each, 1)))


class Sides:
    """The shared sides of a library's modules, each on its layer's device; read once.

    Args:
        library: the library. dtype: of the sides.
    """

    def __init__(self, library: Library, dtype: torch.dtype) -> None:
        self._library, self._dtype = library, dtype
        self._numbers = {m["path"]: j for j, m in enumerate(library.modules)}
        self._known: dict[str, dict[str, tuple[Tensor | None, list[int]]]] = {}

    def at(self, patch: Patch) -> dict[str, tuple[Tensor | None, list[int]]]:
        """For "U" and "V": all bases side by side, (d, ΣR), and where each begins."""
        if patch.path not in self._known:
            self._known[patch.path] = {
                side: self._joined([b.columns for b in bases], patch)
                for side, bases in self._library.sides(self._numbers[patch.path]).items()
            }
        return self._known[patch.path]

    def _joined(self, columns: list[Tensor], patch: Patch) -> tuple[Tensor | None, list[int]]:
        starts = [0]
        for c in columns:
            starts.append(starts[-1] + c.shape[1])
        if not columns:
            return None, starts
        return torch.cat(columns, 1).to(patch.device, self._dtype), starts


def write_library_adapter(live: Core, slot: int, name: str, library: Library) -> None:
    """Read an adapter's parts from its library into a slot.

    Raises:
        RefusedError: it is stored exactly because ΔW algebra would be wrong for it, or carries
            tensors that would not be run.
    """
    refuse_adapter(library, name)
    assert live.sides is not None
    for path, patch in live.patches.items():
        first = 0
        for group, parts in _by_group(library.parts(name, path)).items():
            u = _joined_core(parts, patch, live.sides.at(patch))
            _make_room(live, patch, group, u.rank)
            live.slots.write_update(slot, group, patch, u, first)
            first += u.rank


def refuse_adapter(library: Library, name: str) -> None:
    """Raise a `RefusedError` for an adapter that can't be run from its library."""
    entry: Mapping[str, Any] = library.entry(name)
    if entry.get("refusal"):
        raise RefusedError(f"adapter {name!r}: {entry['refusal']}")
    refuse_extras(name, entry.get("extras", {}), library.config(name))


def _by_group(parts: list[StoredPart]) -> dict[str, list[StoredPart]]:
    found: dict[str, list[StoredPart]] = {}
    for part in parts:
        found.setdefault(_GROUPS[part.U is not None, part.V is not None], []).append(part)
    return found


def _joined_core(
    parts: list[StoredPart], patch: Patch, sides: Mapping[str, tuple[Tensor | None, list[int]]]
) -> LowRank:
    """Parts of one group as one update in the joined coordinates."""
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


def _make_room(live: Core, patch: Patch, group: str, rank: int) -> None:
    """Have a layer's bank of a group, with room for a rank; made when it is first needed."""
    slots = live.slots
    table = slots.group(group, max(rank, 1), len(live.patches))
    if rank > table.width:
        table.width = 1 << (rank - 1).bit_length()
        live.forget_controls()
    assert live.sides is not None
    if group not in patch.banks:
        sides = live.sides.at(patch)
        U = sides["U"][0] if group in ("both", "out") else None
        V = sides["V"][0] if group in ("both", "in") else None
        if group == OWN:
            patch.banks[group] = Bank(
                patch.kind, patch.dims, slots.capacity, table.width,
                device=device_of(live.layer(patch.path)), dtype=slots.dtype,
            )  # fmt: skip
        else:
            if patch.kind is not LINEAR and patch.kind is not CONV1D:
                raise RefusedError(
                    f"module {patch.path!r} of the library shares its sides, which only linear "
                    "layers run: fold it with form='svd', or attach library[name]"
                )
            patch.banks[group] = SharedBank(patch.dims, slots.capacity, table.width, U, V)
        live.forget_controls()
    for other in live.patches.values():
        if group in other.banks and other.bank(group).A.shape[1] != table.width:
            other.bank(group).grow(slots.capacity, slots.dtype, table.width)
