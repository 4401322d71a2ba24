"""Where in a model an adapter's modules go, checked before anything is attached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import MismatchError, RefusedError
from .kinds import LayerKind, kind_of
from .swap import refuse_attached


@dataclass(frozen=True)
class Place:
    """A layer that takes updates."""

    layer: nn.Module
    kind: LayerKind
    dims: tuple[int, int]


def place_at(model: nn.Module, path: str, known: Mapping[str, Any] | None = None) -> Place:
    """The layer at a path.

    Args:
        known: patches of layers that the same handle has attached already.

    Raises:
        RefusedError: it takes no update, or lies in a MultiheadAttention; naming it.
    """
    layer = model.get_submodule(path) if path else model
    if known is not None and path in known:
        return Place(layer, known[path].kind, known[path].dims)
    refuse_attached(layer, path)
    parent, _, _ = path.rpartition(".")
    if path and isinstance(model.get_submodule(parent), nn.MultiheadAttention):
        raise RefusedError(
            f"module {path!r} is part of an nn.MultiheadAttention, which reads its weight "
            "directly: leave it out (exclude=), or merge the adapter (adapter.apply_to)"
        )
    kind = kind_of(layer, path)
    return Place(layer, kind, kind.dims(layer))


def check_dims(path: str, dims: tuple[int, int], shape: tuple[int, int]) -> None:
    """Raise a `MismatchError` where an update of a shape does not fit a layer."""
    if shape != dims:
        raise MismatchError(
            f"module {path!r} takes updates of shape {dims}, not {shape}: it belongs to "
            "another base"
        )
