"""Paused ranks stay as they are while an optimiser steps.

A prefix of rank k gives the ranks beyond it no gradient, but weight decay and momentum move them
all the same. The guard takes what is paused, parameters and the optimiser's state, before each step
and puts it back after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from .selection import ranks_at

if TYPE_CHECKING:
    from .state import Core

Ledger: TypeAlias = "dict[str, list[int]]"


class Pauses:
    """Which ranks of the trained adapters have not run since an optimiser's last step."""

    def __init__(self) -> None:
        # For each optimiser: key → the largest prefix of each layer since it stepped; first, since
        # any of them did.
        self._ledgers: list[Ledger] = [{}]

    def open(self) -> Ledger:
        """What has run since an optimiser's last step, from now on."""
        self._ledgers.append(dict(self._ledgers[0]))
        return self._ledgers[-1]

    def close(self, ledger: Ledger) -> None:
        """An optimiser is no longer guarded."""
        self._ledgers = [known for known in self._ledgers if known is not ledger]

    def note(self, live: Core) -> None:
        """Take down what the selection in use has run, before another takes its place."""
        if not live.board.have_run() or live._selection is None:
            return
        paths = list(live.patches)
        for row in live._selection.rows:
            ranks = ranks_at(row.rank, paths)
            for name, c in row.mix:
                key = live._sources[name].key if name in live._sources else None
                if c == 0 or key is None:
                    continue
                for ledger in self._ledgers:
                    old = ledger.get(key, [0] * len(paths))
                    ledger[key] = [max(a, b) for a, b in zip(old, ranks, strict=True)]

    def forget(self, key: str) -> None:
        """A trained adapter has gone."""
        for ledger in self._ledgers:
            ledger.pop(key, None)

    def paused(self, live: Core, ledger: Ledger) -> Iterator[tuple[nn.Parameter, Any]]:
        """Parameters, each with the index of its entries that have not run."""
        self.note(live)
        for key in live._trained:
            ran = ledger.get(key, [0] * len(live.patches))
            for patch in live.patches.values():
                if key in patch.fresh and ran[patch.index] < patch.trained(key).rank:
                    yield from patch.trained(key).paused(ran[patch.index])

    def stepped(self, live: Core, ledger: Ledger) -> None:
        """An optimiser has stepped: what runs from here on counts for its next step."""
        self.note(live)
        ledger.clear()
        self._ledgers[0].clear()


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


def guarded(live: Core, optimizer: torch.optim.Optimizer) -> Guard:
    """See `Live.guard`."""
    ledger = live.pauses.open()
    held: list[tuple[nn.Parameter, Any, Tensor, dict[str, Tensor]]] = []

    def before(*_: Any) -> None:
        held.clear()
        for parameter, index in live.pauses.paused(live, ledger):
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
        live.pauses.stepped(live, ledger)

    return Guard(
        [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)],
        lambda: live.pauses.close(ledger),
    )
