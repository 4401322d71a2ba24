"""What is active, as tensors that are rewritten in place.

For a selection of `rows` rows, each a mix of at most K adapters, every layer sees the slots
`ids (rows, K)` and, for each group of banks, one weight per row and rank: the coefficient times the
adapter's scale, zero beyond the rank prefix. These live in one tensor over all layers, so that a
switch is a few copies whatever the depth, and a compiled graph, which sees the same tensors again,
needs no new compilation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..selection import Row, Selection, TokenMix, ranks_at
from .bank import Table
from .grouping import Entry, Grouping
from .packed import Blocks, Packed, Segments

KEPT = "kept"  # the key of the background among the trained adapters
Item: TypeAlias = tuple[int, float, int]  # slot, coefficient, rank
# Of a uniform selection at one layer: by group; and (key, coefficient, rank) of what is trained.
Items: TypeAlias = tuple[dict[str, list[Item]], list[tuple[str, float, int]]]
Rule: TypeAlias = Callable[..., Tensor]  # `TokenMix.weights`


@dataclass
class ActiveAt:
    """What one layer sees: views into `Active`, and in eager mode what of it applies here."""

    active: Active
    index: int
    ids: Tensor
    on: Tensor
    w: dict[str, Tensor] = field(default_factory=dict)
    trained_w: dict[str, Tensor] = field(default_factory=dict)
    numbers: tuple[Tensor, ...] = ()

    def gathered(self, rows: Tensor) -> ActiveAt:
        """The same of other rows: some of these, in any order."""
        return ActiveAt(
            self.active,
            self.index,
            self.ids[rows],
            self.on[rows],
            {group: w[rows] for group, w in self.w.items()},
            {key: w[rows] for key, w in self.trained_w.items()},
        )

    def weighed(self, x: Tensor) -> dict[str, Tensor]:
        """By group, what each token of inputs x (T, in) gets of the mix: (1, T, K · R)."""
        if self.active.rule is None or not self.w:
            return {}
        numbers, w = self.numbers, self.w
        if x.requires_grad:  # the next choice is written there, before the backward pass maybe
            numbers = tuple(t.clone() for t in numbers)
            w = {group: t.clone() for group, t in w.items()}
        share = self.active.rule(x, *numbers)[:, :, None]
        return {
            group: (share * t.view(share.shape[1], -1)).flatten(1)[None] for group, t in w.items()
        }

    def rows_of(self, key: str) -> Tensor | None:
        """The rows that a trainable adapter runs in, on its device; None where that is all of them,
        or where only the device knows.
        """
        w = self.trained_w[key]
        if self.active.packed is None:
            return self.active.rows_of(key, w.device)
        if w.device.type != "cpu":
            return None
        found = (w != 0).any(1).nonzero()[:, 0]
        return found if len(found) < len(w) else None

    @property
    def ranks(self) -> int:
        """Rows of factors that each row's mix has here."""
        return sum(w.shape[1] for w in self.w.values())

    @property
    def runs(self) -> bool:
        """Whether any adapter changes anything here."""
        return self.active.runs()[self.index]

    @property
    def items(self) -> dict[str, list[Item]]:
        """By group, (slot, coefficient, rank) of a uniform selection."""
        return self.active.items()[self.index][0]

    @property
    def trained(self) -> list[tuple[str, float, int]]:
        """(key, coefficient, rank) of the trainable adapters of a uniform selection."""
        return self.active.items()[self.index][1]


class Active:
    """The tensors of selections of one size.

    Args:
        rows, width: of the selections. packed: whether they are of packed rows.
        rule: how every token's weights are found; None where all get the same.
        tables: by group. trained: key → (L,) ranks of a trainable adapter, and its scales (L,).
        members: by group and key, which layers have it. devices: of each layer.
        dtype: of the weights.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        packed: bool,
        rule: Rule | None,
        tables: Mapping[str, Table],
        trained: Mapping[str, tuple[Tensor, Tensor]],
        members: Mapping[str, list[bool]],
        devices: list[torch.device],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.tables, self.trained, self.height, self.rule = tables, trained, rows, rule
        self._weighs: tuple[TokenMix, list[str]] | None = None
        self.packed = Packed(rows, devices) if packed else None
        self.uniform = self.all_on = False
        self._values: dict[str, Tensor] = {}  # what the tensors hold, in float64
        self._items: list[Items] | None = None
        self._runs: list[bool] | None = None
        self._grouped: dict[tuple[torch.device, bool], Grouping | Segments | None] = {}
        self._blocks: dict[tuple[torch.device, int, bool, int], Blocks] = {}
        self._rows: dict[tuple[str, torch.device], Tensor | None] = {}
        self._lengths: tuple[int, ...] = ()
        self._entries: list[Entry] = []
        layers, self._dtype = len(devices), dtype
        self._on_device: dict[torch.device, dict[str, Tensor]] = {}
        for device in dict.fromkeys(devices):
            options: Any = {"device": device, "dtype": dtype}
            self._on_device[device] = {
                "ids": torch.zeros(rows, width, dtype=torch.int64, device=device),
                "on": torch.zeros(rows, dtype=torch.bool, device=device),
                **{
                    f"w.{group}": torch.zeros(layers, rows, width * t.width, **options)
                    for group, t in tables.items()
                },
                **{
                    f"t.{key}": torch.zeros(layers, rows, int(ranks.max()), **options)
                    for key, (ranks, _) in trained.items()
                },
            }
        self.layers = [self._view(i, devices[i], members) for i in range(layers)]

    def _view(self, i: int, device: torch.device, members: Mapping[str, list[bool]]) -> ActiveAt:
        t = self._on_device[device]
        return ActiveAt(
            self,
            i,
            t["ids"],
            t["on"],
            {g: t[f"w.{g}"][i] for g in self.tables if members[g][i]},
            {
                key: t[f"t.{key}"][i][:, : int(ranks[i])]
                for key, (ranks, _) in self.trained.items()
                if members[key][i]
            },
        )

    def weighs(self, selection: Selection) -> bool:
        """Whether the numbers are here by which a selection weighs its tokens."""
        return self._weighs == (selection.tokens, selection.mixed)

    def weigh(self, selection: Selection, numbers: Sequence[tuple[Tensor, ...]]) -> None:
        """By these numbers, of every layer, a selection weighs its tokens."""
        for at, own in zip(self.layers, numbers, strict=True):
            if self._weighs is None:
                at.numbers = tuple(self._room(t, at.ids.device) for t in own)
            for here, t in zip(at.numbers, own, strict=True):
                here.copy_(t)
        assert selection.tokens is not None
        self._weighs = selection.tokens, selection.mixed

    def _room(self, like: Tensor, device: torch.device) -> Tensor:
        dtype = self._dtype if like.is_floating_point() else like.dtype
        return torch.empty_like(like, device=device, dtype=dtype)

    def set(
        self,
        selection: Selection,
        slots: Mapping[str, int],
        keys: Mapping[str, str],
        gates: list[float],
        powers: Mapping[str, float],
        paths: list[str],
    ) -> None:
        """Write a selection of this size.

        Args:
            slots: name → slot. keys: name → key of a trainable adapter.
            gates: (rows,) of the background. powers: name → p, a prefix k of r is multiplied by
                (r/k)^p. paths: of the layers.
        """
        self.uniform = selection.uniform and self.rule is None
        if self.packed is not None:  # the tensors have more rows than there are
            assert selection.lengths is not None
            self._lengths = selection.lengths
            self.packed.set(selection.lengths)
            more = self.height - len(selection.rows)
            selection = Selection((*selection.rows, *[Row()] * more), False)
            gates = [*gates, *[0.0] * more]
        on = [row.on or gate != 0 for row, gate in zip(selection.rows, gates, strict=True)]
        self.all_on = all(on)
        self._items = self._runs = None
        self._grouped.clear()
        self._blocks.clear()
        self._rows.clear()
        ids, c, self._entries = _mixes(selection, slots)
        power = _powers(selection, powers)
        ranks = _ranks(selection, paths)
        self._values = {
            "ids": ids,
            "on": torch.tensor(on),
            **{f"w.{g}": _weights(ids, c, t, ranks, power) for g, t in self.tables.items()},
        }
        for key, (have, scales) in self.trained.items():
            if key == KEPT:  # whole, by the gate
                whole = have[:, None].expand(-1, len(gates))
                self._values[f"t.{key}"] = _trained_weights(gates, have, scales, whole)
                continue
            mine = [name for name, own in keys.items() if own == key]
            own = [sum(c for name, c in row.mix if name in mine) for row in selection.rows]
            p = max((powers.get(name, 0.0) for name in mine), default=0.0)
            self._values[f"t.{key}"] = _trained_weights(own, have, scales, ranks, p)
        for tensors in self._on_device.values():
            for name, value in self._values.items():
                tensors[name].copy_(value)

    def items(self) -> list[Items]:
        """What applies at each layer for a uniform selection, in eager mode."""
        if self._items is None:
            self._items = self._find_items()
        return self._items

    def _find_items(self) -> list[Items]:
        found: list[Items] = [({}, []) for _ in self.layers]
        slots = self._values["ids"][0].tolist()
        for group, table in self.tables.items():
            w = self._values[f"w.{group}"][:, 0].view(len(found), len(slots), table.width)
            ks, cs = (w != 0).sum(-1).tolist(), w[..., :1].sum(-1).tolist()
            for at, k, c in zip(found, ks, cs, strict=True):
                if own := [item for item in zip(slots, c, k, strict=True) if item[2]]:
                    at[0][group] = own
        for key in self.trained:
            w = self._values[f"t.{key}"][:, 0]
            ks, cs = (w != 0).sum(-1).tolist(), w[:, :1].sum(-1).tolist()
            for at, k, c in zip(found, ks, cs, strict=True):
                if k:
                    at[1].append((key, c, k))
        return found

    def runs(self) -> list[bool]:
        """Whether any adapter changes anything, at each layer."""
        if self._runs is None:
            own = [v for name, v in self._values.items() if name.startswith(("w.", "t."))]
            found = torch.stack([(w != 0).flatten(1).any(1) for w in own]) if own else None
            self._runs = [False] * len(self.layers) if found is None else found.any(0).tolist()
        return self._runs

    def rows_of(self, key: str, device: torch.device) -> Tensor | None:
        """The rows that a trainable adapter runs in; None where that is all of them."""
        at = key, device
        if at not in self._rows:
            there = (self._values[f"t.{key}"] != 0).any(2).any(0)
            found = there.nonzero()[:, 0].to(device)
            self._rows[at] = found if len(found) < len(there) else None
        return self._rows[at]

    def grouped(self, device: torch.device, one: bool = False) -> Grouping | Segments | None:
        """What runs by slot, for layers on a device; None where gathering the factors is better.

        Args:
            one: of packed rows, one entry each, of those that have any.
        """
        key = (device, one)
        if key not in self._grouped:
            self._grouped[key] = self._find_grouped(self._on_device[device], device, one)
        return self._grouped[key]

    def _find_grouped(
        self, tensors: Mapping[str, Tensor], device: torch.device, one: bool
    ) -> Grouping | Segments | None:
        w = {group: tensors[f"w.{group}"] for group in self.tables}
        rows, width = tensors["ids"].shape
        # One by one is many small calls, which an accelerator waits for.
        if self.packed is not None:
            lengths = [min(length, 1) if one else length for length in self._lengths]
            return Segments(self._entries, lengths, width, w) if device.type == "cpu" else None
        by = Grouping(self._entries, rows, width, w)
        return by if by.dense or device.type == "cpu" else None

    def blocks(self, device: torch.device, tokens: int, one: bool, size: int) -> Blocks:
        """The tokens of packed rows in blocks."""
        assert self.packed is not None
        if torch.compiler.is_compiling():
            return self.packed.blocks(device, tokens, one, size)
        key = (device, tokens, one, size)
        if key not in self._blocks:
            self._blocks[key] = self.packed.blocks(device, tokens, one, size)
        return self._blocks[key]


def _mixes(selection: Selection, slots: Mapping[str, int]) -> tuple[Tensor, Tensor, list[Entry]]:
    """Slots (rows, K), coefficients (rows, K), and what of them runs."""
    width = selection.width
    ids, c = ([[zero] * width for _ in selection.rows] for zero in (0, 0.0))
    entries: list[Entry] = []
    for i, row in enumerate(selection.rows):
        for j, (name, value) in enumerate(row.mix):
            slot = slots.get(name)
            if slot is not None:
                ids[i][j], c[i][j] = slot, value
                if value != 0 and row.rank != 0:
                    entries.append((slot, i * width + j))
    return torch.tensor(ids), torch.tensor(c, dtype=torch.float64), entries


def _powers(selection: Selection, powers: Mapping[str, float]) -> Tensor | None:
    """By which power each entry's prefix is scaled, (rows, K); None where all are constant."""
    if not any(powers.values()):
        return None
    found = torch.zeros(len(selection.rows), selection.width, dtype=torch.float64)
    for i, row in enumerate(selection.rows):
        for j, (name, _) in enumerate(row.mix):
            found[i, j] = powers.get(name, 0.0)  # of none where c = 0
    return found


def _weights(ids: Tensor, c: Tensor, table: Table, ranks: Tensor, power: Tensor | None) -> Tensor:
    """(L, rows, K · R) of the adapters in slots."""
    have = table.ranks[ids].permute(2, 0, 1)  # (L, rows, K)
    first = table.first[ids].permute(2, 0, 1)
    coefficient = c * table.scales[ids].permute(2, 0, 1)
    k = (ranks[:, :, None] - first).clamp_min(0).minimum(have)
    if power is not None:
        coefficient = coefficient * (have.double() / k.clamp_min(1)) ** power
    mask = torch.arange(table.width) < k[..., None]
    return (coefficient[..., None] * mask).flatten(2)


def _trained_weights(
    c: list[float],
    have: Tensor,
    scales: Tensor,
    ranks: Tensor,
    power: float = 0.0,
) -> Tensor:
    """(L, rows, r) of one trainable adapter."""
    have = have[:, None].expand(-1, len(c))
    k = ranks.minimum(have)
    given = torch.tensor(c, dtype=torch.float64)
    coefficient = given * scales[:, None]
    if power:
        coefficient = coefficient * (have.double() / k.clamp_min(1)) ** power
    return coefficient[..., None] * (torch.arange(int(have.max())) < k[..., None])


def _ranks(selection: Selection, paths: list[str]) -> Tensor:
    """The prefixes (L, rows), or (1, rows) where all layers run the same."""
    if not any(isinstance(row.rank, Mapping) for row in selection.rows):
        paths = paths[:1]
    found = [ranks_at(row.rank, paths) for row in selection.rows]
    return torch.tensor(found).T
