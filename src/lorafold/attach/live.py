"""The handle of a model with adapters attached.

It owns the slots and the selection; the layers' children only look up what is active. Whatever is
asked is checked first, so that an error leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..errors import MismatchError, UnknownNameError, did_you_mean
from ..lowrank import LowRank
from .controls import Controls
from .experts import ExpertsPatch, refuse_rows
from .fresh import Fresh
from .guard import Guard, Pauses, guarded
from .keeping import Gate, checked_gate, gates_of, rebuild
from .patch import Patch
from .saved import SavedPatch, saved_extras
from .selection import Row, Selection, parsed
from .slots import Slots
from .source import Source
from .swap import Swapped, swap_out
from .using import Using

if TYPE_CHECKING:
    from .library import Sides
    from .summary import Summary


class Live:
    """Adapters on a running model; made by `lf.attach`.

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
        self.patches: dict[str, Patch] = {}
        self.experts: dict[str, ExpertsPatch] = {}
        self.saved: dict[str, SavedPatch] = {}
        self.detached = False
        self._scaling = scaling
        self._sources: dict[str, Source] = {}
        self._trained: dict[str, tuple[Tensor, Tensor]] = {}  # key → ranks (L,), scales (L,)
        self._frozen: list[tuple[nn.Parameter, bool]] | None = None
        self._selection: Selection | None = None
        self._controls: dict[tuple[int, int], Controls] = {}
        self._stale = False
        self._merged: tuple[Row, dict[tuple[str, str], nn.Parameter | None]] | None = None
        self.pauses = Pauses()
        self.kept: dict[str, float] = {}
        self._gate: Gate = "current"
        self.sides: Sides | None = None  # of an attached library

    @staticmethod
    def of(model: nn.Module) -> Live:
        """The handle of an attached model, of a copy of one too.

        Raises:
            MismatchError: nothing is attached to it.
        """
        for module in model.modules():
            if isinstance(module, Swapped):
                found: Live = module.lorafold.live
                return found
        raise MismatchError("nothing is attached to this model")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_controls": {}, "_stale": True}

    def __repr__(self) -> str:
        state = "detached" if self.detached else f"{len(self.patches)} layers"
        return f"Live({state}, {len(self._sources)} adapters)"

    # What there is

    @property
    def names(self) -> list[str]:
        """The attached adapters' names, in the order in which they came."""
        return list(self._sources)

    @property
    def active(self) -> dict[str, float] | list[dict[str, float]]:
        """What runs now: {name: c} for the whole batch, or a list of these for its rows."""
        selection = self._selection or Selection((Row(),))
        rows = [dict(row.mix) if row.on else {} for row in selection.rows]
        return rows[0] if selection.uniform else rows

    def adapter(self, name: str) -> Adapter:
        """An attached adapter: the one that was given, or a copy of a trained one as it is now.

        Raises:
            UnknownNameError: no such name.
        """
        source = self._source(name)
        if source.adapter is not None:
            return source.adapter
        if source.library is not None:
            return source.library[name]
        assert source.key is not None
        modules = {path: fresh.update() for path, fresh in self.trained_modules(name).items()}
        return Adapter(modules, saved_extras(self, name), source.config or {})

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

    def summary(self) -> Summary:
        """What is attached where, and how large it is; `print` gives a table."""
        from .summary import summarized

        self._check_attached()
        return summarized(self)

    def trained_modules(self, name: str) -> dict[str, Fresh]:
        """{path: factors} of a trained adapter.

        Raises:
            UnknownNameError: no such name. MismatchError: it is not trained.
        """
        key = self._source(name).key
        if key is None:
            raise MismatchError(f"{name!r} is not trained; attach it with trainable=True")
        return {path: p.trained(key) for path, p in self.patches.items() if key in p.fresh}

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained adapters' parameters."""
        for patch in self.patches.values():
            yield from patch.fresh.parameters()
        for name, source in self._sources.items():
            for saved in self.saved.values() if source.key is not None else ():
                if name in saved.keys:
                    yield from saved.copy_of(name).parameters()

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

    # What runs

    def use(self, what: Any = None, *, c: Any = None, rank: Any = None) -> Using:
        """Choose what runs: from now on, or in a `with` block.

        Args:
            what: a name; {name: weight} for several at once; None for the base; or a list with
                one of these for each row of the batch, which must be a multiple of its length
                (row i then serves as many consecutive entries).
            c: the dial: the model runs with W + c · ΔW. A number, or one for each row; 1 when None.
            rank: run the first k ranks only, of each module the ranks it has; {target: k} for some
                modules; or one for each row. 0 is the base.

        Returns:
            A context that gives the earlier choice back when it is left.

        Raises:
            UnknownNameError: a name that is not attached. MismatchError: anything else that is
                wrong with the choice; what runs is unchanged then.
        """
        self._check_attached()
        selection = parsed(what, c, rank, self._sources)
        for row in selection.rows:
            self._check_rank(row)
        refuse_rows(selection, self.experts, self)
        if self._merged is not None and (
            selection.names & set(self.merged) or not all(row.mix for row in selection.rows)
        ):
            raise MismatchError(
                f"{', '.join(map(repr, self.merged))} is merged into the weights, where no dial "
                "reaches it: unmerge() first"
            )
        before = self._selection
        self._show(selection)
        return Using(self, before)

    def running(self) -> Selection | None:
        """The selection that the layers run: without what is merged; None for nothing."""
        if self._selection is None or self._merged is None:
            return self._selection
        return self._selection.without(self.merged)

    def uniform_row(self) -> Row | None:
        """The mix that runs for the whole batch; None for the base, or for rows."""
        selection = self.running()
        if selection is None or not selection.uniform or not selection.on:
            return None
        return selection.rows[0]

    def _check_rank(self, row: Row) -> None:
        most = max((self._sources[name].rank for name, _ in row.mix), default=None)
        ranks = row.rank.values() if isinstance(row.rank, Mapping) else [row.rank]
        for k in ranks:
            if k is not None and most is not None and k > most:
                raise MismatchError(
                    f"rank {k} is above that of every module; the largest is {most}"
                )

    def _show(self, selection: Selection | None) -> None:
        """Make a checked selection the one that runs."""
        self.pauses.note(self)
        running = selection if selection is not None else Selection((Row(),))
        gates = self._gates(selection)
        if self._merged is not None:
            running = running.without(self.merged)
        if running.on or any(gates):
            self._load(running)
            controls = self._sized(len(running.rows), running.width)
            keys = {name: s.key for name, s in self._sources.items() if s.key is not None}
            paths = list(self.patches)
            controls.set(running, self.slots.places, keys, gates, self._scaling, paths)
            for patch in self.patches.values():
                patch.now = controls.layers[patch.index]
        else:
            for patch in self.patches.values():
                patch.now = None
        self._selection, self._stale = selection, False

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
                    del self.slots.places[name]  # half of it may be there
                    raise
            self.slots.places.move_to_end(name)

    def forget_controls(self) -> None:
        """Banks came or grew: the tensors of selections are made anew."""
        self._controls.clear()

    def _write(self, slot: int, name: str) -> None:
        source = self._sources[name]
        with torch.no_grad():
            if source.adapter is not None:
                self.slots.write(slot, source.adapter, self.patches)
            elif source.library is not None:
                from .library import write_library_adapter

                write_library_adapter(self, slot, name, source.library)

    def _sized(self, rows: int, width: int) -> Controls:
        size = (rows, width)
        if size not in self._controls:
            patches = list(self.patches.values())
            members = {g: [g in p.banks for p in patches] for g in self.slots.tables}
            members |= {key: [key in p.fresh for p in patches] for key in self._trained}
            self._controls[size] = Controls(
                rows, width, self.slots.tables, self._trained, members, [p.device for p in patches]
            )
        return self._controls[size]

    # Training

    def guard(self, optimizer: torch.optim.Optimizer) -> Guard:
        """Hold still what a rank prefix pauses, weight decay and momentum notwithstanding.

        Args:
            optimizer: of this handle's parameters.

        Returns:
            The hooks; `remove()` takes them off.
        """
        self._check_attached()
        return guarded(self, optimizer)

    # Kept rounds

    @property
    def gate(self) -> Gate:
        """When the background runs: "current" (where a current adapter has c ≠ 0), "always", or a
        function of the rows' coefficients (rows, K) that gives a factor for each row.
        """
        return self._gate

    @gate.setter
    def gate(self, gate: Gate) -> None:
        self._gate = checked_gate(gate)
        self._show(self._selection)

    def keep(self, name: str, c: float = 1.0) -> None:
        """Make an adapter part of the background, at coefficient c, as it is now.

        It no longer runs as a current adapter unless it is asked for again.

        Raises:
            UnknownNameError: no such name.
        """
        self._source(name)
        (row,) = parsed(name, c, None, self._sources).rows
        self.kept[name] = row.mix[0][1]
        rebuild(self)
        if self._selection is not None:
            self._selection = self._selection.without([name])
        self._refresh()

    def drop(self, name: str) -> None:
        """Take an adapter out of the background; it stays attached.

        Raises:
            UnknownNameError: it is not kept.
        """
        if name not in self.kept:
            raise UnknownNameError(f"{name!r} is not kept; {did_you_mean(str(name), self.kept)}")
        del self.kept[name]
        rebuild(self)
        self._refresh()

    # Merging

    def merge(self, what: Any = None, *, c: Any = None, rank: Any = None, keep: bool = True) -> int:
        """Merge a mix into the weights; what else is in use stays so.

        Args:
            what, c, rank: as for `use`, for the whole batch; what runs now when None.
            keep: keep the weights as they were, for `unmerge`. False is final: the adapters become
                part of the base, and are no longer attached.

        Returns:
            Bytes of the weights that are kept.

        Raises:
            MismatchError: something is merged already. RefusedError: a quantised weight.
        """
        from .merging import merge_into

        self._check_attached()
        return merge_into(self, what, c=c, rank=rank, keep=keep)

    def unmerge(self) -> None:
        """Put the weights back that `merge` replaced, to the bit.

        Raises:
            MismatchError: nothing is merged.
        """
        from .merging import unmerge_from

        self._check_attached()
        unmerge_from(self)

    def verify(self, *args: Any, **kwargs: Any) -> float:
        """The largest difference between the attached and the merged model's output.

        A large one tells of a model that reads a weight directly, past its layer.

        Args:
            args, kwargs: what the model is called with, in evaluation mode.
        """
        from .merging import verified

        self._check_attached()
        return verified(self, args, kwargs)

    # Coming and going

    def add(
        self, adapter: Any, name: str, *, replace: bool = False, trainable: bool = False
    ) -> None:
        """Attach one more.

        Args:
            adapter: as for `lf.attach`. name: its name.
            replace: take the place of the adapter of that name.
            trainable: train it.

        Raises:
            MismatchError: the name is taken, shapes differ, or its rank is above the slots'.
        """
        from .attaching import add_to

        self._check_attached()
        add_to(self, adapter, name, replace=replace, trainable=trainable)

    def remove(self, name: str) -> None:
        """Let go of an adapter; where it was in use, the base runs.

        Raises:
            UnknownNameError: no such name.
        """
        source = self._source(name)
        if name in self.merged:
            raise MismatchError(f"{name!r} is merged into the weights: unmerge() first")
        if name in self.kept:
            self.drop(name)
        if self._selection is not None:
            self._show(self._selection.without([name]))
        for saved in self.saved.values():
            saved.drop(name)
        del self._sources[name]
        slot = self.slots.places.pop(name, None)
        if slot is not None:
            self.slots.clear(slot)
        if source.key is not None:
            for patch in self.patches.values():
                if source.key in patch.fresh:
                    del patch.fresh[source.key]
            del self._trained[source.key]
            self.pauses.forget(source.key)
            self._refresh()

    def detach(self) -> nn.Module:
        """Give the model back as it was: classes, names, bits, and what requires gradients.

        Returns:
            The model. The handle is of no more use.
        """
        self._check_attached()
        if self._merged is not None:
            self.unmerge()
        for path in [*self.patches, *self.experts, *self.saved]:
            swap_out(self.layer(path))
        for parameter, required in self._frozen or ():
            parameter.requires_grad_(required)
        self.patches, self.experts, self.saved = {}, {}, {}
        self._sources, self._trained = {}, {}
        self._controls.clear()
        self.detached = True
        return self.model
