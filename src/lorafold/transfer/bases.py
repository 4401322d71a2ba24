"""A base as a user gives it, a folder, a model or a state dict: its names, shapes and weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import MismatchError
from ..files.base import Weights, read_base
from ..naming import Base


@dataclass(frozen=True, eq=False)
class Tensors:
    """The tensors of a base.

    Args:
        keys: all names. named: from the names that an adapter asks for to a `Base`.
        read: one tensor; not to be written to. One of a folder comes from the disk.
    """

    keys: tuple[str, ...]
    named: Callable[[Iterable[str]], Base]
    read: Callable[[str], Tensor]


def tensors_of(base: Any) -> Tensors:
    """The tensors of a folder, a safetensors file, a model or a state dict.

    Raises:
        FileError: nothing to read there.
        MismatchError: it is none of these.
    """
    if isinstance(base, str | os.PathLike):
        weights = Weights(read_base(base))
        return Tensors(tuple(weights.files.entries), weights.files.named, weights.read)
    state = base if isinstance(base, Mapping) else getattr(base, "state_dict", dict)()
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        state = {}
    if not state:
        raise MismatchError(
            f"a base is a folder, a safetensors file, a model or a state dict, found {base!r:.60}"
        )
    return Tensors(tuple(state), lambda asked: Base.of_state(state, asked), state.__getitem__)


def name_of_base(base: Any) -> str | None:
    """What a config may call a base by: its path, or what transformers has loaded it from."""
    if isinstance(base, str | os.PathLike):
        return os.fspath(base)
    name = getattr(base, "name_or_path", None)
    return name if isinstance(name, str) and name else None
