"""The state of a model with adapters attached, and what its layers are shown of it.

`Live`, the handle, is this and the verbs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import MismatchError, UnknownNameError
from ..layers.modes import outside_inference_mode
from ..lowrank import LowRank
from ..words import did_you_mean
from .guard import Pauses
from .run.active import Controls
from .run.board import Board
from .run.experts import Experts
from .run.factors import Fresh
from .run.patch import Patch
from .run.slots import Slots
from .run.whole import Whole
from .running import Gate, gates_of
from .selection import EVERYTHING, Rank, Row, Selection, ranks_at
from .sources import Source

if TYPE_CHECKING:
    from .sources import Sides


MOST_SIZES = 64  # of selections whose tensors are remembered


class Core:
    """Sources, slots and the selection; `Live` is the only class of this.

    Attributes:
        model: the model. patches: path → what is added to each layer.
        kept: {name: c} of what runs in the background.
        detached: whether `detach` was called.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: Slots,
        scaling: Callable[[float], float],
    ) -> None:
        self.model, self.slots = model, slots
        self.board = Board(self, model, self._refresh, self.summed)
        self.experts: dict[str, Experts] = {}
        self.saved: dict[str, Whole] = {}
        self.detached = False
        self._scaling = scaling
        self._sources: dict[str, Source] = {}
        self._trained: dict[str, tuple[Tensor, Tensor]] = {}  # key → ranks (L,), scales (L,)
        self._selection: Selection | None = None
        self._controls: dict[tuple[int, int], Controls] = {}
        self._controls_of = -1  # the version of the slots that they were made for
        self._merged: tuple[Row, dict[tuple[str, str], nn.Parameter | None]] | None = None
        self.pauses = Pauses()
        self.kept: dict[str, float] = {}
        self.background: dict[str, dict[str, LowRank]] = {}  # what is kept, as it was then
        self._gate: Gate = "current"
        self.sides: Sides | None = None  # of an attached library

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_controls": {}}

    @property
    def patches(self) -> dict[str, Patch]:
        """Path → what is added to each layer."""
        return self.slots.patches

    @property
    def merged(self) -> dict[str, float]:
        """{name: c} of what is merged into the weights now."""
        return {} if self._merged is None else dict(self._merged[0].mix)

    def layer(self, path: str) -> Any:
        """The attached layer at a path."""
        return self.model.get_submodule(path) if path else self.model

    def update(self, name: str, path: str) -> LowRank | None:
        """An adapter's update at one layer; None where it has none there."""
        source = self._source(name)
        if source.adapter is not None:
            return source.adapter.modules.get(path)
        if source.library is not None:
            try:
                return source.library.update(name, path)
            except UnknownNameError:
                return None
        fresh = self.fresh_at(name, path)
        return None if fresh is None else fresh.update()

    def fresh_at(self, name: str, path: str) -> Fresh | None:
        """A trained adapter's factors at one layer; None where it has none there."""
        key, patch = self._source(name).key, self.patches.get(path)
        return patch.trained(key) if patch and key and key in patch.fresh else None

    def shape_at(self, name: str, path: str) -> tuple[int, float] | None:
        """(rank, scale) of an adapter at one layer; None where it has none there."""
        found = self.fresh_at(name, path) or self.update(name, path)
        return None if found is None else (found.rank, found.scale)

    def trained_modules(self, name: str) -> dict[str, Fresh]:
        """{path: factors} of a trained adapter.

        Raises:
            UnknownNameError: no such name. MismatchError: it is not trained.
        """
        key = self._source(name).key
        if key is None:
            raise MismatchError(f"{name!r} is not trained; attach it with trainable=True")
        return {path: p.trained(key) for path, p in self.patches.items() if key in p.fresh}

    def summed(self, path: str, row: Row) -> LowRank | None:
        """What a mix adds to one layer's weight; None for nothing."""
        total: LowRank | None = None
        for name, c in row.mix:
            u = self.update(name, path)
            if u is None or c == 0:
                continue
            k = _prefix(row.rank, path, u.rank)
            if k == 0:
                continue
            part = c * self._scaling(u.rank / k) * (u if k == u.rank else u.prefix(k))
            total = part if total is None else total + part
        return total

    def _source(self, name: str) -> Source:
        self._check_attached()
        try:
            return self._sources[name]
        except (KeyError, TypeError):
            raise UnknownNameError(
                f"no adapter {name!r} is attached; {did_you_mean(str(name), self._sources)}"
            ) from None

    def _check_attached(self) -> None:
        if self.detached:
            raise MismatchError("this handle was detached: attach again")

    def running(self) -> Selection | None:
        """The selection that the layers run: without what is merged; None for nothing."""
        if self._selection is None or self._merged is None:
            return self._selection
        return self._selection.without(self.merged)

    @outside_inference_mode
    def _show(self, selection: Selection | None) -> None:
        """Make a checked selection the one that runs."""
        self.pauses.note(self)
        running = selection if selection is not None else Selection((Row(),))
        gates = self._gates(selection)
        if self._merged is not None:
            running = running.without(self.merged)
        # Adapters at c = 0 are shown as well: for a compiled graph that is no other graph.
        if not running.uniform or any(row.mix for row in running.rows) or any(gates):
            try:
                self._load(running)
            except BaseException:
                if selection is not self._selection:  # what runs may have left its slots
                    self._show(self._selection)
                raise
            controls = self._sized(len(running.rows), running.width)
            keys = {name: s.key for name, s in self._sources.items() if s.key is not None}
            paths = list(self.patches)
            controls.set(running, self.slots.places, keys, gates, self._scaling, paths)
            for patch in self.patches.values():
                patch.show(controls.layers[patch.index])
        else:
            for patch in self.patches.values():
                patch.show(None)
        self._selection = selection
        self.board.show(self.running())

    def _gates(self, selection: Selection | None) -> list[float]:
        """How much of the background each row gets: none where the base was asked for."""
        if not self.kept:
            return [0.0] * (1 if selection is None else len(selection.rows))
        if selection is None:
            return [float(self._gate == "always")]
        gates = gates_of(self._gate, selection)
        return [g if row.mix else 0.0 for g, row in zip(gates, selection.rows, strict=True)]

    def _refresh(self) -> None:
        """Show the selection anew: layers came, or moved to another device."""
        self._controls.clear()
        self._show(self._selection)

    def _load(self, selection: Selection) -> None:
        """Have every adapter of a selection in a slot."""
        wanted = [n for n in dict.fromkeys(selection.names) if self._sources[n].key is None]
        if len(wanted) > self.slots.limit:
            raise MismatchError(
                f"{len(wanted)} adapters at once do not fit in {self.slots.limit} slots: attach "
                "with a larger slots="
            )
        for name in wanted:
            if name not in self.slots.places:
                slot = self.slots.take(name, wanted)
                try:
                    self._write(slot, name)
                except BaseException:
                    self.slots.release(name)  # half of it may be there
                    raise
            self.slots.touch(name)

    def _write(self, slot: int, name: str) -> None:
        source = self._sources[name]
        with torch.no_grad():
            if source.adapter is not None:
                for path, u in source.adapter.modules.items():
                    if path in self.patches:
                        self.slots.write(slot, path, u)
            elif source.library is not None:
                from .sources import write_library_adapter

                write_library_adapter(self, slot, name, source.library)

    def _weight_dtype(self) -> torch.dtype:
        """Float32, or wider where factors are."""
        dtype = torch.promote_types(torch.float32, self.slots.dtype)
        for patch in self.patches.values():
            for p in patch.fresh.parameters():
                dtype = torch.promote_types(dtype, p.dtype)
        return dtype

    def _sized(self, rows: int, width: int) -> Controls:
        size = (rows, width)
        if self._controls_of != self.slots.version:  # banks came or grew
            self._controls.clear()
            self._controls_of = self.slots.version
        if size in self._controls:
            self._controls[size] = self._controls.pop(size)  # the last used goes last
        else:
            if len(self._controls) >= MOST_SIZES:
                del self._controls[next(iter(self._controls))]
            patches = list(self.patches.values())
            members = {g: [g in p.banks for p in patches] for g in self.slots.tables}
            members |= {key: [key in p.fresh for p in patches] for key in self._trained}
            devices = [p.device for p in patches]
            self._controls[size] = Controls(
                rows,
                width,
                self.slots.tables,
                self._trained,
                members,
                devices,
                self._weight_dtype(),
            )
        return self._controls[size]


def _prefix(rank: Rank, path: str, have: int) -> int:
    k = ranks_at(rank, [path])[0]
    return have if k == EVERYTHING else min(k, have)
