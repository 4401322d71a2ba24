"""Paused ranks stay as they are while an optimiser steps.

A prefix of rank k gives the ranks beyond it no gradient, but weight decay and momentum move them
all the same. The guard takes what is paused, parameters and the optimiser's state, before each step
and puts it back after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .live import Live


@dataclass
class Guard:
    """Hooks on an optimiser; `remove` takes them off."""

    handles: list[Any]

    def remove(self) -> None:
        """Let the optimiser go."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def guarded(live: Live, optimizer: torch.optim.Optimizer) -> Guard:
    """See `Live.guard`."""
    held: list[tuple[nn.Parameter, Any, Tensor, dict[str, Tensor]]] = []

    def before(*_: Any) -> None:
        held.clear()
        for parameter, index in live.paused():
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
        live.stepped()

    return Guard(
        [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    )
