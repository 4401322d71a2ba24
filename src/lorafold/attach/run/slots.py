"""Which adapters are on the model's device: the same slot at every layer, the oldest leaves.

The factors themselves are in each layer's banks, which nobody else makes, fills or grows; beside
them are the tables of what a slot means (rank and scale at each layer) and who is in it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...errors import MismatchError, RefusedError
from ...lowrank import LowRank
from .bank import Bank, Table
from .patch import Patch

OWN = "own"  # the group of updates with both sides their own
BY_ITSELF = 64  # slots that are made as adapters come, when no number was asked for


class Slots:
    """Slots of one model.

    Args:
        reserved: how many; None to make them as adapters come.
        rank: ranks that a slot has room for in the group `OWN`; None where that grows as adapters
            come. dtype: of the factors.
        fixed_rank, fixed_dtype: these were asked for, and stay when more adapters come.

    Attributes:
        patches: path → layer that takes updates, in the order of the tables' columns.
        tables: by group. places: name → slot, the least recently used first.
        version: another one whenever a bank or a table was made or grew.
    """

    def __init__(
        self,
        reserved: int | None,
        rank: int | None,
        dtype: torch.dtype,
        *,
        fixed_rank: bool = False,
        fixed_dtype: bool = False,
    ) -> None:
        self.limit = reserved or BY_ITSELF
        self.capacity = reserved or 0
        self.dtype = dtype
        self._rank, self._fixed_rank, self._fixed_dtype = rank, fixed_rank, fixed_dtype
        self.patches: dict[str, Patch] = {}
        self.tables: dict[str, Table] = {}
        self.places: OrderedDict[str, int] = OrderedDict()
        self._used: set[int] = set()  # slots in which something may be left
        self.version = 0

    def join(self, patch: Patch) -> None:
        """One more layer takes updates."""
        self.patches[patch.path] = patch

    def check_rank(self, name: str, rank: int) -> None:
        """Raise a `MismatchError` for an adapter that slots will have no room for."""
        if self._rank is not None and rank > self._rank and not self._open:
            raise MismatchError(
                f"adapter {name!r} has rank {rank}, and the slots have room for {self._rank}: "
                f"attach with max_rank={rank}"
            )

    def widen(self, rank: int, dtype: torch.dtype) -> None:
        """Have room for adapters of this rank and dtype, as far as these were left open."""
        if self._rank is not None and self._open:
            self._rank = max(self._rank, rank)
        if not self._fixed_dtype:
            self.dtype = torch.promote_types(self.dtype, dtype)

    @property
    def asked_dtype(self) -> torch.dtype | None:
        """The dtype that was asked for; None where it follows from the adapters."""
        return self.dtype if self._fixed_dtype else None

    @property
    def _open(self) -> bool:
        """Whether nothing has fixed the rank yet."""
        return not self.tables and not self._fixed_rank

    def make_room(self, count: int) -> None:
        """Slots for `count` adapters, as far as the limit allows."""
        wanted = self.capacity
        while wanted < min(count, self.limit):
            wanted = min(self.limit, max(count, 2 * wanted))
        grown, self.capacity = wanted != self.capacity, wanted
        size = (wanted, len(self.patches))
        for table in self.tables.values():
            if table.ranks.shape != size:
                table.grow(*size)
                grown = True
        for patch in self.patches.values():
            for group in patch.banks:
                bank = patch.bank(group)
                if len(bank.A) != wanted or bank.A.dtype != self.dtype:
                    bank.grow(wanted, self.dtype)
                    grown = True
        self.version += grown

    def own_banks(self, paths: Iterable[str]) -> None:
        """Have banks at some layers for updates with both sides their own."""
        self._table(OWN, self._rank or 1)
        for path in paths:
            if path in self.patches:
                self._bank(self.patches[path], OWN, None, None)

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
        self._clear(slot)
        if slot in self._used:
            for patch in self.patches.values():
                for group in patch.banks:
                    patch.bank(group).clear(slot)
        self._used.add(slot)
        self.places[name] = slot
        return slot

    def touch(self, name: str) -> None:
        """An adapter is used now."""
        self.places.move_to_end(name)

    def release(self, name: str) -> None:
        """Nothing of an adapter is in a slot."""
        slot = self.places.pop(name, None)
        if slot is not None:
            self._clear(slot)

    def _clear(self, slot: int) -> None:
        for table in self.tables.values():
            for column in (table.ranks, table.first, table.scales):
                column[slot] = 0

    def write(
        self,
        slot: int,
        path: str,
        u: LowRank,
        U: Tensor | None = None,
        V: Tensor | None = None,
        first: int = 0,
    ) -> None:
        """Copy one update into a slot.

        Args:
            u: the update, in coordinates of the sides that are given.
            U: (out, R_U) sides that many adapters share, or None. V: (in, R_V) or None.
            first: ranks of the same adapter in other groups that come before.

        Raises:
            MismatchError: the slots' dtype can't hold how large its numbers are.
        """
        self._check_held(path, u)
        group, patch = GROUPS[U is not None, V is not None], self.patches[path]
        table = self._table(group, max(u.rank, 1))
        if u.rank > table.width:
            table.widen(u.rank)
            self.version += 1
            for other in self.patches.values():
                if group in other.banks:
                    other.bank(group).grow(self.capacity, self.dtype, table.width)
        self._bank(patch, group, U, V).write(slot, u)
        table.ranks[slot, patch.index] = u.rank
        table.first[slot, patch.index] = first
        table.scales[slot, patch.index] = u.scale

    def _check_held(self, path: str, u: LowRank) -> None:
        most = torch.finfo(self.dtype).max
        if any(torch.finfo(t.dtype).max > most for t in (u.A, u.B)):
            largest = max(float(t.detach().abs().max()) for t in (u.A, u.B))
            if largest > most:
                name = str(self.dtype).removeprefix("torch.")
                raise MismatchError(
                    f"module {path!r}: the adapter has numbers up to {largest:.3g}, which {name} "
                    "can't hold: attach with dtype=torch.bfloat16 or torch.float32"
                )

    def _table(self, group: str, width: int) -> Table:
        if group not in self.tables:
            self.tables[group] = Table.empty(width, self.capacity, len(self.patches))
            self.version += 1
        return self.tables[group]

    def _bank(self, patch: Patch, group: str, U: Tensor | None, V: Tensor | None) -> Bank:
        if group in patch.banks:
            return patch.bank(group)
        if group != OWN and not patch.kind.linear:
            raise RefusedError(
                f"module {patch.path!r} of the library shares its sides, which only linear "
                "layers run: fold it with form='svd', or attach library[name]"
            )
        width = self.tables[group].width
        options: Any = {"device": patch.device, "dtype": self.dtype}
        patch.banks[group] = Bank(patch.kind, patch.dims, self.capacity, width, U=U, V=V, **options)
        self.version += 1
        return patch.bank(group)


GROUPS = {(True, True): "both", (False, True): "in", (True, False): "out", (False, False): OWN}
