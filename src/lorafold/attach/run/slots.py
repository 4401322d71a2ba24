"""Which adapters are on the model's device: the same slot at every layer, the oldest leaves.

The factors themselves are in each layer's banks; this holds the tables of what a slot means (rank
and scale at each layer) and who is in it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...adapter import Adapter
from ...errors import MismatchError, RefusedError
from ...layers.kinds import CONV1D, LINEAR
from ...layers.swap import device_of
from ...lowrank import LowRank
from .bank import Bank, SharedBank
from .patch import Patch

if TYPE_CHECKING:
    from ..state import Core


OWN = "own"  # the group of updates with both sides their own
BY_ITSELF = 64  # slots that are made as adapters come, when no number was asked for


class Slots:
    """Slots of one model.

    Args:
        reserved: how many; None to make them as adapters come.
        rank: ranks that a slot has room for in the group `OWN`. dtype: of the factors.

    Attributes:
        tables: by group. places: name → slot, the least recently used first.
        fixed_rank, fixed_dtype: these were asked for, and stay when more adapters come.
    """

    def __init__(self, reserved: int | None, rank: int, dtype: torch.dtype) -> None:
        self.limit = reserved or BY_ITSELF
        self.capacity = reserved or 0
        self.rank, self.dtype = rank, dtype
        self.fixed_rank = self.fixed_dtype = False
        self.tables: dict[str, Table] = {}
        self.places: OrderedDict[str, int] = OrderedDict()

    def group(self, name: str, width: int, layers: int) -> Table:
        """The table of a group, made at its first use."""
        if name not in self.tables:
            self.tables[name] = Table.empty(width, self.capacity, layers)
        return self.tables[name]

    def make_room(self, patches: Mapping[str, Patch], count: int) -> bool:
        """Slots for `count` adapters, as far as the limit allows; whether anything grew."""
        wanted = self.capacity
        while wanted < min(count, self.limit):
            wanted = min(self.limit, max(count, 2 * wanted))
        layers = len(patches)
        grown = wanted != self.capacity
        self.capacity = wanted
        for table in self.tables.values():
            if table.ranks.shape != (wanted, layers):
                table.grow(wanted, layers)
                grown = True
        for patch in patches.values():
            for bank in patch.banks.values():
                assert isinstance(bank, Bank)
                if len(bank.A) != wanted or bank.A.dtype != self.dtype:
                    bank.grow(wanted, self.dtype)
                    grown = True
        return grown

    def own_bank(self, patch: Patch, device: torch.device) -> Bank:
        """A layer's bank for updates with both sides their own, made at its first use."""
        if OWN not in patch.banks:
            patch.banks[OWN] = Bank(
                patch.kind,
                patch.dims,
                self.capacity,
                self.rank,
                device=device,
                dtype=self.dtype,
            )
        return patch.bank(OWN)

    def take(self, name: str, wanted: Iterable[str]) -> int:
        """A slot for an adapter that has none: a free one, or the least recently used one's.

        Args:
            wanted: names that must stay.
        """
        free = set(range(self.capacity)) - set(self.places.values())
        if free:
            slot = min(free)
        else:
            staying = set(wanted)
            leaver = next((n for n in self.places if n not in staying), None)
            if leaver is None:
                raise MismatchError(
                    f"{len(staying)} adapters at once do not fit in {self.capacity} slots: attach "
                    "with a larger slots="
                )
            slot = self.places.pop(leaver)
        self.clear(slot)
        self.places[name] = slot
        return slot

    def clear(self, slot: int) -> None:
        """Nothing is in a slot."""
        for table in self.tables.values():
            for column in (table.ranks, table.first, table.scales):
                column[slot] = 0

    def write(self, slot: int, adapter: Adapter, patches: Mapping[str, Patch]) -> None:
        """Copy an adapter's factors into a slot."""
        for path, u in adapter.modules.items():
            if path in patches:
                self.write_update(slot, OWN, patches[path], u)

    def write_update(self, slot: int, group: str, patch: Patch, u: LowRank, first: int = 0) -> None:
        """Copy one update into a slot.

        Args:
            first: ranks of the same adapter in other groups that come before.
        """
        patch.bank(group).write(slot, u)
        table = self.tables[group]
        table.ranks[slot, patch.index] = u.rank
        table.first[slot, patch.index] = first
        table.scales[slot, patch.index] = u.scale


_GROUPS = {(True, True): "both", (False, True): "in", (True, False): "out", (False, False): OWN}


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

    def grow(self, slots: int, layers: int) -> None:
        """Room for more; what is there stays."""
        for name in ("ranks", "first", "scales"):
            old = getattr(self, name)
            new = old.new_zeros(slots, layers)
            new[: old.shape[0], : old.shape[1]] = old
            setattr(self, name, new)
