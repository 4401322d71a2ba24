"""The modes that torch runs in: evaluation for a while, and never inference mode.

What `torch.inference_mode()` makes can't be written to outside of it, nor trained with. Whoever
switches adapters inside it must find the handle usable afterwards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation without gradients; each module has its mode back afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def called(model: nn.Module, inputs: Any) -> Any:
    """What a model gives for its argument, a tuple or list of them, or a mapping of keywords."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def outside_inference_mode(function: Callable[P, R]) -> Callable[P, R]:
    """The function, run without gradients and outside inference mode where that is on."""

    @functools.wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return outside
