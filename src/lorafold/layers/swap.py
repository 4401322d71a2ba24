"""Attaching a module: its class is swapped for a cached subclass, and it gets one child.

The subclass runs `super().forward(...)` and hands the result to the child, `module.lorafold`, which
adds what is active. The base's parameters keep their names; detaching gives back the class and
takes the child away.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import RefusedError

CHILD = "lorafold"


class Swapped:
    """Mixed into the class of every attached module; `lorafold` is its child."""

    lorafold: Any
    _swapped: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A class made at run time can't be found by name, so copies and pickles rebuild it.
        return _empty, (type(self).__mro__[1], self._swapped), self.__getstate__()


class Attached(Swapped):
    """A module whose child changes what it gives."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y = super().forward(*args, **kwargs)  # type: ignore[misc]
        return self.lorafold(self, y, *args, **kwargs)


def _empty(mixin: type, base: type) -> Any:
    cls: Any = attached_class(mixin, base)
    return cls.__new__(cls)


@functools.cache
def attached_class(mixin: Any, base: Any) -> type:
    """The subclass that attached modules of a class get."""
    names = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "_swapped": base,
    }
    return type(base.__name__, (mixin, base), names)


def swap_in(layer: nn.Module, child: nn.Module, path: str, mixin: type[Swapped] = Attached) -> None:
    """Attach: give a module its child and its class.

    Raises:
        RefusedError: it is attached already, or has a module of that name.
    """
    refuse_attached(layer, path)
    layer.add_module(CHILD, child)
    cls, base = mixin, type(layer)  # type: Any, Any
    layer.__class__ = attached_class(cls, base)


def refuse_attached(layer: nn.Module, path: str) -> None:
    """Raise a `RefusedError` where a module can't get a child."""
    if isinstance(layer, Swapped):
        raise RefusedError(f"module {path!r} is attached already: detach that first")
    if CHILD in vars(layer)["_modules"]:
        raise RefusedError(f"module {path!r} has a child named {CHILD!r} of its own")


def base_class(layer: nn.Module) -> Any:
    """The class of a module, without what attaching made of it."""
    return layer._swapped if isinstance(layer, Swapped) else type(layer)


def rebase(layer: Any, cls: Any) -> None:
    """Give a module another class; what is attached to it stays."""
    layer.__class__ = attached_class(type(layer).__mro__[1], cls) if is_attached(layer) else cls


def is_attached(layer: nn.Module) -> bool:
    """Whether something is attached to this module itself."""
    return isinstance(layer, Swapped)


def swap_out(layer: Any) -> None:
    """Detach: the module as it was."""
    layer.__class__ = layer._swapped
    delattr(layer, CHILD)


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of a model, as `named_modules` has them, without what is attached."""
    seen: set[nn.Module] = set()
    left = [("", model)]
    while left:
        path, module = left.pop()
        if module in seen:
            continue
        seen.add(module)
        yield path, module
        children = [(f"{path}.{n}" if path else n, m) for n, m in module.named_children()]
        left += reversed([child for child in children if child[0].rpartition(".")[2] != CHILD])


def device_of(layer: nn.Module) -> torch.device:
    """Where a layer's tensors are."""
    return next(iter([*layer.parameters(), *layer.buffers()])).device


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first argument of a call of a layer, given by position or by name."""
    if args:
        return args[0]
    names = [name for name in ("input", "x") if name in kwargs]  # torch's, transformers' Conv1D's
    return kwargs[names[0]] if names else next(iter(kwargs.values()))


def plain_copy(layer: nn.Module) -> nn.Module:
    """A copy of a module as it is without anything attached."""
    return copy.deepcopy(_without_children(layer))


def _without_children(module: nn.Module) -> nn.Module:
    twin: Any = copy.copy(module)
    vars(twin)["_modules"] = {
        name: None if child is None else _without_children(child)
        for name, child in vars(module)["_modules"].items()
        if name != CHILD
    }
    if isinstance(module, Swapped):
        twin.__class__ = module._swapped
    return twin  # type: ignore[no-any-return]
