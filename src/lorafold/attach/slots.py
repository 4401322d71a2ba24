"""Which adapters are on the model's device: the same slot at every layer, the oldest leaves.

The factors themselves are in each layer's banks; this holds the tables of what a slot means (rank
and scale at each layer) and who is in it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

import torch

from ..adapter import Adapter
from ..errors import MismatchError
from ..lowrank import LowRank
from .bank import Bank
from .controls import Table
from .patch import Patch

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
