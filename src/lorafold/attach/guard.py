"""Paused ranks stay as they are while an optimiser steps.

A prefix of rank k gives the ranks beyond it no gradient, but weight decay and momentum move them
all the same. The guard takes what is paused, parameters and the optimiser's state, before each step
and puts it back after it. What has not run at all has its gradient (of zeros, at most) taken away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import MismatchError
from .run.board import Board
from .selection import Selection, ranks_at
from .sources import Source, Trained

# Of each trained adapter the largest prefix of each layer that has run, by key and path.
Runs: TypeAlias = "dict[str, dict[str, int]]"


class Pauses:
    """Which ranks of the trained adapters have not run since an optimiser's last step.

    Args:
        board, sources: of the model.
    """

    def __init__(self, board: Board, sources: Mapping[str, Source]) -> None:
        self._board, self._sources = board, sources
        self._shown: Selection | None = None
        self._runs: list[Runs] = [{}]  # one an optimiser; first, since any of them stepped

    def open(self) -> Runs:
        """What has run since an optimiser's last step, from now on."""
        self._runs.append({key: dict(ran) for key, ran in self._runs[0].items()})
        return self._runs[-1]

    def close(self, runs: Runs) -> None:
        """An optimiser is no longer guarded."""
        self._runs = [known for known in self._runs if known is not runs]

    def note(self) -> None:
        """Take down what the selection that is shown has run."""
        if not self._board.have_run() or self._shown is None:
            return
        for row in self._shown.rows:
            for name, c in row.mix:
                source = self._sources.get(name)
                if c == 0 or not isinstance(source, Trained):
                    continue
                paths = list(source.fresh)
                for path, k in zip(paths, ranks_at(row.rank, paths), strict=True):
                    for runs in self._runs:
                        ran = runs.setdefault(source.key, {})
                        ran[path] = max(ran.get(path, 0), k)

    def show(self, selection: Selection | None) -> None:
        """Another selection takes the place of the one that was shown; that is noted before."""
        self._shown = selection

    def forget(self, source: Source) -> None:
        """An adapter has gone."""
        if isinstance(source, Trained):
            for runs in self._runs:
                runs.pop(source.key, None)

    def paused(self, runs: Runs) -> Iterator[tuple[nn.Parameter, Any]]:
        """Parameters, each with the index of its entries that have not run; None for all."""
        self.note()
        for source in self._sources.values():
            if not isinstance(source, Trained):
                continue
            ran = runs.get(source.key, {})
            if not any(ran.values()):
                yield from ((p, None) for p in source.parameters())
                continue
            for path, fresh in source.fresh.items():
                if not ran.get(path):
                    yield from ((p, None) for p in fresh.parameters())
                elif ran[path] < fresh.rank:
                    yield from fresh.paused(ran[path])

    def stepped(self, runs: Runs) -> None:
        """An optimiser has stepped: what runs from here on counts for its next step."""
        self.note()
        runs.clear()
        self._runs[0].clear()


@dataclass
class Guard:
    """Hooks on an optimiser; `remove` takes them off."""

    handles: list[Any]
    close: Callable[[], None]

    def remove(self) -> None:
        """Let the optimiser go."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.close()


def guarded(pauses: Pauses, optimizer: torch.optim.Optimizer) -> Guard:
    """See `Live.guard`."""
    if not hasattr(optimizer, "register_step_pre_hook"):
        raise MismatchError(f"guard takes a torch optimiser, not a {type(optimizer).__name__}")
    runs = pauses.open()
    held: list[tuple[nn.Parameter, Any, Tensor, dict[str, Tensor]]] = []

    def before(*_: Any) -> None:
        held.clear()
        for parameter, index in pauses.paused(runs):
            if index is None:  # optimisers pass over what has no gradient, counts of steps included
                parameter.grad = None
                continue
            state = optimizer.state.get(parameter, {})
            kept = {
                key: value[index].clone()
                for key, value in state.items()
                if isinstance(value, Tensor) and value.shape == parameter.shape
            }
            held.append((parameter, index, parameter.detach()[index].clone(), kept))

    def after(*_: Any) -> None:
        with torch.no_grad():
            for parameter, index, value, kept in held:
                parameter[index] = value
                for key, now in optimizer.state.get(parameter, {}).items():
                    if isinstance(now, Tensor) and now.shape == parameter.shape:
                        now[index] = kept.get(key, 0)  # what came with this step begins at 0
        held.clear()
        pauses.stepped(runs)

    return Guard(
        [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)],
        lambda: pauses.close(runs),
    )
