"""The handle of a model with adapters attached.

It owns the slots and the selection; the layers' children only look up what is active. Whatever is
asked is checked first, so that an error leaves the model as it was.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..adapter import Adapter
from ..errors import MismatchError, UnknownNameError
from ..layers.swap import Swapped
from ..layers.targets import matches, shown
from ..words import did_you_mean
from .guard import Guard, guarded
from .running import Gate, checked_gate, frozen_updates, rebuild, refuse_rows
from .selection import Row, Selection, parsed
from .sources import saved_extras
from .state import Core

if TYPE_CHECKING:
    from .summary import Summary


class Live(Core):
    """Adapters on a running model; made by `lf.attach`.

    Attributes:
        model: the model. patches: path → what is added to each layer.
        kept: {name: c} of what runs in the background.
        detached: whether `detach` was called.
    """

    @staticmethod
    def of(model: nn.Module) -> Live:
        """The handle of an attached model, of a copy of one too.

        Raises:
            MismatchError: nothing is attached to it.
        """
        for module in model.modules():
            if isinstance(module, Swapped):
                found: Live = module.lorafold.board.handle
                return found
        raise MismatchError("nothing is attached to this model")

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
        config = dict(source.config or {})
        whole = [path for path, saved in self.saved.items() if name in saved.keys]
        if whole:
            config["modules_to_save"] = whole
        kinds = {path: self.patches[path].kind for path in modules}
        if any(kind.linear and kind.transposed for kind in kinds.values()):
            config["fan_in_fan_out"] = True
        layouts = {p: kind.layout(self.layer(p)) for p, kind in kinds.items()}
        return Adapter(modules, saved_extras(self, name), config, layouts=layouts)

    def summary(self) -> Summary:
        """What is attached where, and how large it is; `print` gives a table."""
        from .summary import summarized

        self._check_attached()
        return summarized(self)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained adapters' parameters."""
        for patch in self.patches.values():
            yield from patch.fresh.parameters()
        for name, source in self._sources.items():
            for saved in self.saved.values() if source.key is not None else ():
                if name in saved.keys:
                    yield from saved.copy_of(name).parameters()

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
        refuse_rows(selection, self)
        if self._merged is not None:
            dialled = (name in self.merged for row in selection.rows for name, _ in row.mix)
            if any(dialled) or not all(row.mix for row in selection.rows):
                raise MismatchError(
                    "no dial reaches what is merged into the weights "
                    f"({', '.join(map(repr, self.merged))}): unmerge() first"
                )
        before = self._selection
        self._show(selection)
        return Using(self, before)

    def _check_rank(self, row: Row) -> None:
        if row.rank is None:
            return
        most = max((self._sources[name].rank for name, _ in row.mix), default=None)
        ranks = row.rank.values() if isinstance(row.rank, Mapping) else [row.rank]
        for target in row.rank if isinstance(row.rank, Mapping) else ():
            if not any(matches(target, path) for path in self.patches):
                raise MismatchError(f"rank= names {shown(target)}, which is no attached module")
        for k in ranks:
            if most is not None and k > most:
                raise MismatchError(
                    f"rank {k} is above that of every module; the largest is {most}"
                )

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

    def save(
        self,
        path: str | os.PathLike[str],
        name: str | None = None,
        *,
        metadata: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write a trained adapter: a PEFT directory, with the state to train on in a file beside.

        Args:
            path: the directory to make. name: which; the only one when None.
            metadata: what to keep with it, as JSON knows it; `resume` returns it.
            overwrite: replace what is at `path`.

        Raises:
            UnknownNameError: no such name. MismatchError: it is not trained.
            FileError: something is at `path`.
        """
        from .checkpoint import save_trained

        save_trained(self, path, self._only(name), metadata or {}, overwrite)

    def resume(self, path: str | os.PathLike[str], name: str | None = None) -> dict[str, Any]:
        """Load what `save` wrote into a trained adapter of the same kind and targets.

        Args:
            path: the directory, a PEFT directory of plain LoRA, or a file with the flat keys
                `A.<module>` and `B.<module>`, or `U.`, `S.`, `Vh.` and `delta_s.`, module dots
                written `__`. name: which; the only one when None.

        Returns:
            The metadata that was saved with it.

        Raises:
            MismatchError: another kind, other modules, or other shapes; nothing is changed then.
            FileError: nothing there that is read.
        """
        from .checkpoint import resume_trained

        return resume_trained(self, path, self._only(name))

    def _only(self, name: str | None) -> str:
        if name is not None:
            return name
        trained = [n for n, s in self._sources.items() if s.key is not None]
        if len(trained) != 1:
            raise MismatchError(f"say which: {len(trained)} adapters are trained here")
        return trained[0]

    # Kept rounds

    @property
    def gate(self) -> Gate:
        """When the background runs: "current" (where a current adapter has c ≠ 0), "always", or a
        function of the rows' coefficients (rows, K) that gives a factor for each row.
        """
        return self._gate

    @gate.setter
    def gate(self, gate: Gate) -> None:
        before, self._gate = self._gate, checked_gate(gate)
        try:
            self._show(self._selection)
        except BaseException:
            self._gate = before
            raise

    def keep(self, name: str, c: float = 1.0) -> None:
        """Make an adapter part of the background, at coefficient c, as it is now.

        It no longer runs as a current adapter unless it is asked for again.

        Raises:
            UnknownNameError: no such name. RefusedError: it holds more than updates of layers.
        """
        self._source(name)
        (row,) = parsed(name, c, None, self._sources).rows
        self.background[name] = frozen_updates(self, name)
        self.kept[name] = row.mix[0][1]
        rebuild(self)
        if self._selection is not None:
            self._selection = self._selection.left_by([name])
        self._refresh()

    def drop(self, name: str) -> None:
        """Take an adapter out of the background; it stays attached.

        Raises:
            UnknownNameError: it is not kept.
        """
        self._check_attached()
        if name not in self.kept:
            raise UnknownNameError(f"{name!r} is not kept; {did_you_mean(str(name), self.kept)}")
        del self.kept[name], self.background[name]
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
        from .merged import merge_into

        self._check_attached()
        return merge_into(self, what, c=c, rank=rank, keep=keep)

    def unmerge(self) -> None:
        """Put the weights back that `merge` replaced, to the bit.

        Raises:
            MismatchError: nothing is merged.
        """
        from .merged import unmerge_from

        self._check_attached()
        unmerge_from(self)

    def verify(self, *args: Any, **kwargs: Any) -> float:
        """The largest difference between the attached and the merged model's output.

        A large one tells of a model that reads a weight directly, past its layer.

        Args:
            args, kwargs: what the model is called with, in evaluation mode.
        """
        from .merged import verified

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
        from .additions import add_to

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
            self._show(self._selection.left_by([name]))
        for site in [*self.patches.values(), *self.experts.values(), *self.saved.values()]:
            site.drop(name)
        del self._sources[name]
        self.slots.release(name)
        if source.key is not None:
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
        for site in [*self.patches.values(), *self.experts.values(), *self.saved.values()]:
            site.leave()
        self.board.frozen.thaw()
        self.board.show(None)
        self.slots.patches.clear()
        self.experts, self.saved = {}, {}
        self._sources, self._trained = {}, {}
        self._controls.clear()
        self.detached = True
        return self.model


class Using:
    """What `use` returns: as a context it gives the earlier selection back when left."""

    def __init__(self, live: Live, before: Selection | None) -> None:
        self._live, self._before = live, before

    def __enter__(self) -> Live:
        return self._live

    def __exit__(self, *_: object) -> None:
        if self._live.detached:
            return
        before = self._before
        if before is not None:  # some of it may have been removed inside
            named = {name for row in before.rows for name, _ in row.mix}
            before = before.left_by(named - set(self._live.names))
        self._live._show(before)
