"""The handle of a model with adapters attached: its verbs, each in one thread at a time.

Whatever is asked is checked first, so that an error leaves the model as it was. How a verb is done
stands in the files beside, and what it changes in `State`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

from ..adapter import Adapter
from ..errors import MismatchError
from ..layers.swap import Swapped
from .additions import Attachable, add_one
from .checkpoint import resume_trained, save_trained
from .choices import Choice
from .guard import Guard, guarded
from .merged import merge_into, unmerge_from, verified
from .running import BASE, Gate
from .selection import Mix, Selection, What
from .sources import Trained
from .state import State
from .summary import Summary, live_html, live_repr, summarized

P = ParamSpec("P")
R = TypeVar("R")


def _in_turn(verb: Callable[Concatenate[Live, P], R]) -> Callable[Concatenate[Live, P], R]:
    """A verb that waits for blocks of other threads, and asks for a handle that is attached."""

    @functools.wraps(verb)
    def waiting(self: Live, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._state.turns:
            self._state.check_attached()
            return verb(self, *args, **kwargs)

    return waiting


class Live:
    """Adapters on a running model; made by `lf.attach`.

    Threads take turns: a `with live.use(…)` block holds the model until it is left, and whatever
    else changes what runs waits for that.

    Not for: a model whose weights are to be changed for good, or written: `Adapter.apply_to` and
    `lorafold merge-into` need no handle.

    Attributes:
        model: the model.
    """

    def __init__(self, state: State) -> None:
        self._state, self.model = state, state.model
        state.board.belongs_to(self)

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
        return live_repr(self._state)

    def _repr_html_(self) -> str:
        return live_html(repr(self), self._state)

    def __dir__(self) -> list[str]:
        own = (n for n in super().__dir__() if n.endswith("__") or not n.startswith("_"))
        return [name for name in own if name != "of"]  # that is for who has no handle

    # What there is

    @property
    def detached(self) -> bool:
        """Whether `detach` was called: the handle is of no more use."""
        return self._state.detached

    @property
    def names(self) -> list[str]:
        """The attached adapters' names, in the order in which they came."""
        return list(self._state.sources)

    @property
    def trained(self) -> list[str]:
        """The names of those that are trained."""
        return [name for name, source in self._state.sources.items() if isinstance(source, Trained)]

    @property
    def active(self) -> dict[str, float] | list[dict[str, float]]:
        """What runs now: {name: c} for the whole batch, or a list of these for its rows."""
        selection = self._state.running.selection or BASE
        rows = [dict(row.mix) if row.on else {} for row in selection.rows]
        return rows[0] if selection.uniform else rows

    @property
    def merged(self) -> dict[str, float]:
        """{name: c} of what is merged into the weights now."""
        return self._state.running.merged_mix

    @property
    def kept(self) -> dict[str, float]:
        """{name: c} of what runs in the background."""
        return dict(self._state.running.kept)

    def adapter(self, name: str) -> Adapter:
        """An attached adapter: the one that was given, or a copy of a trained one as it is now.

        Raises:
            UnknownNameError: no such name.
        """
        self._state.check_attached()
        return self._state.source(name).adapter()

    @_in_turn
    def summary(self) -> Summary:
        """What is attached where, and how large it is; `print` gives a table."""
        return summarized(self._state)

    def parameters(self, name: str | None = None) -> Iterator[nn.Parameter]:
        """The parameters of the trained adapter of a name, or of all of them.

        Raises:
            UnknownNameError: no such name. MismatchError: it is not trained.
        """
        if name is not None:
            return self._state.trained(name).parameters()
        return (p for source in self._state.sources.values() for p in source.parameters())

    # What runs

    @_in_turn
    def use(
        self, what: What = None, *, c: Any = None, rank: Any = None, lengths: Any = None
    ) -> Using:
        """Choose what runs: from now on, or in a `with` block.

        Args:
            what: a name; {name: weight} for several at once; None for the base; or a list with
                one of these for each row of the batch. The first axis of the model's input must
                be a multiple of the list's length: each row is as many consecutive entries.
                Or a `TokenMix`, which weighs adapters for every token at every layer.
            c: the dial: the model runs with W + c · ΔW. A number, or one for each row; 1 when None.
            rank: run the first k ranks only, of each module the ranks it has; {target: k} for some
                modules; or one for each row. 0 is the base.
            lengths: of a packed batch, inputs (1, T) with several sequences end to end: how many
                consecutive entries each row is. What lies behind them is the base's.

        Returns:
            A context that gives the earlier choice back when it is left. Until then, other threads
            that choose, or change what is attached, wait.

        Raises:
            UnknownNameError: a name that is not attached. MismatchError: anything else that is
                wrong with the choice; what runs is unchanged then.
        """
        selection = Selection.of(what, c, rank, self._state.sources, lengths)
        self._state.running.check(selection)
        return Using(self, self._state, self._state.running.choose(selection))

    # Training

    @_in_turn
    def guard(self, optimizer: torch.optim.Optimizer) -> Guard:
        """Hold still what a rank prefix pauses, weight decay and momentum notwithstanding.

        Args:
            optimizer: of this handle's parameters.

        Returns:
            The hooks; `remove()` takes them off.
        """
        return guarded(self._state.running.pauses, optimizer)

    @_in_turn
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
            metadata: to keep with it, as JSON knows it; when None, what its checkpoint came with.
            overwrite: replace what is at `path`.

        Raises:
            UnknownNameError: no such name. MismatchError: it is not trained.
            FileError: something is at `path`.
        """
        name = self._state.only_trained() if name is None else name
        save_trained(self._state, name, path, metadata, overwrite)

    @_in_turn
    def resume(self, path: str | os.PathLike[str], name: str | None = None) -> dict[str, Any]:
        """Load what `save` wrote into a trained adapter of the same kind and targets.

        Args:
            path: the directory, a PEFT directory of plain LoRA, or a file with flat keys: `A.` and
                `B.<module>`, or `U.`, `S.`, `Vh.` and `delta_s.`, module dots written `__`.
            name: which; the only one when None.

        Returns:
            The metadata that was saved with it.

        Raises:
            MismatchError: another kind, other modules, or other shapes; nothing is changed then.
            FileError: nothing there that is read.
        """
        name = self._state.only_trained() if name is None else name
        return resume_trained(self._state, path, name)

    # Kept rounds

    @property
    def gate(self) -> Gate:
        """When the background runs: "current" (where a current adapter has c ≠ 0), "always", or a
        function of the rows' coefficients (rows, K) that gives a factor for each row.
        """
        return self._state.running.gate

    @gate.setter
    def gate(self, gate: Gate) -> None:
        with self._state.turns:
            self._state.check_attached()
            self._state.running.set_gate(gate)

    @_in_turn
    def keep(self, name: str, c: float = 1.0) -> None:
        """Make an adapter part of the background, at coefficient c, as it is now.

        It no longer runs as a current adapter unless it is asked for again.

        Raises:
            UnknownNameError: no such name. RefusedError: it holds more than updates of layers.
        """
        self._state.source(name)
        (row,) = Selection.of(name, c, None, self._state.sources).rows
        self._state.running.keep(name, row.mix[0][1])

    @_in_turn
    def drop(self, name: str) -> None:
        """Take an adapter out of the background; it stays attached.

        Raises:
            UnknownNameError: it is not kept.
        """
        self._state.running.drop(name)

    # Merging

    @_in_turn
    def merge(self, what: Mix = None, *, c: Any = None, rank: Any = None, keep: bool = True) -> int:
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
        return merge_into(self._state, what, c=c, rank=rank, keep=keep)

    @_in_turn
    def unmerge(self) -> None:
        """Put the weights back that `merge` replaced, to the bit.

        Raises:
            MismatchError: nothing is merged.
        """
        unmerge_from(self._state)

    @_in_turn
    def verify(self, *args: Any, **kwargs: Any) -> float:
        """The largest difference between the attached and the merged model's output.

        A large one tells of a model that reads a weight directly, past its layer.

        Args:
            args, kwargs: what the model is called with, in evaluation mode.
        """
        return verified(self._state, args, kwargs)

    # Coming and going

    @_in_turn
    def add(
        self, adapter: Attachable, name: str, *, replace: bool = False, trainable: bool = False
    ) -> None:
        """Attach one more.

        Args:
            adapter: as for `lf.attach`. name: its name.
            replace: take the place of the adapter of that name.
            trainable: train it.

        Raises:
            MismatchError: the name is taken, shapes differ, or its rank is above the slots'.
        """
        add_one(self._state, adapter, name, replace=replace, trainable=trainable)

    @_in_turn
    def remove(self, name: str) -> None:
        """Let go of an adapter; where it was in use, the base runs.

        Raises:
            UnknownNameError: no such name. MismatchError: it is merged.
        """
        self._state.remove(name)

    @_in_turn
    def detach(self) -> nn.Module:
        """Give the model back as it was: classes, names, bits, and what requires gradients.

        Returns: the model. The handle is of no more use.
        """
        if self.merged:
            unmerge_from(self._state)
        self._state.detach()
        return self.model


class Using:
    """What `use` returns: as a context it gives the earlier choice back when it is left."""

    def __init__(self, live: Live, state: State, choice: Choice) -> None:
        self._live, self._state, self._choice = live, state, choice
        self._blocks: list[ExitStack] = []
        choice.held_by(self)

    def __enter__(self) -> Live:
        with ExitStack() as block:
            block.enter_context(self._state.turns)
            block.enter_context(self._state.running.during(self._choice))
            self._blocks.append(block.pop_all())
        return self._live

    def __exit__(self, *_: object) -> None:
        self._blocks.pop().close()
