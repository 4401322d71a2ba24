"""Where in a model an adapter's modules go, checked before anything is attached."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..adapter import Adapter
from ..errors import MismatchError, RefusedError
from ..extras import extra_kind
from .bank import check_dims
from .kinds import Kind, kind_of
from .swap import CHILD, Swapped

if TYPE_CHECKING:
    from .live import Live


@dataclass(frozen=True)
class Place:
    """A layer that takes updates."""

    layer: nn.Module
    kind: Kind
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
    if isinstance(layer, Swapped):
        raise RefusedError(f"module {path!r} is attached already: detach that first")
    if CHILD in layer._modules:
        raise RefusedError(f"module {path!r} has a child named {CHILD!r} of its own")
    parent, _, _ = path.rpartition(".")
    if path and isinstance(model.get_submodule(parent), nn.MultiheadAttention):
        raise RefusedError(
            f"module {path!r} is part of an nn.MultiheadAttention, which reads its weight "
            "directly: leave it out (exclude=), or merge the adapter (adapter.apply_to)"
        )
    kind = kind_of(layer, path)
    return Place(layer, kind, kind.dims(layer))


def places_of(live: Live, name: str, adapter: Adapter) -> dict[str, Place]:
    """{path: place} of an adapter's modules, experts left out.

    Raises:
        MismatchError: none of the modules is in the model, or a shape differs.
        RefusedError: ΔW algebra would be wrong, a layer takes no update, or the adapter carries
            tensors that would not be run.
    """
    if adapter.refusal is not None:
        raise RefusedError(f"adapter {name!r}: {adapter.refusal}")
    model, there = live.model, dict(live.model.named_modules())
    paths = [p for p in adapter if adapter.layout(p).kind != "expert"]
    missing = [p for p in paths if p not in there]
    if paths and len(missing) == len(paths):
        raise MismatchError(
            f"none of the {len(paths)} modules of adapter {name!r} is in the model: it has "
            f"{paths[0]!r}, the model e.g. {_like(there, paths[0])!r}"
        )
    if missing:
        warnings.warn(
            f"{len(missing)} modules of adapter {name!r} are not in the model: "
            f"{', '.join(map(repr, missing[:5]))}",
            stacklevel=4,
        )
    found = {p: place_at(model, p, live.patches) for p in paths if p in there}
    for path, place in found.items():
        check_dims(path, place.dims, adapter[path])
    return found


def _like(there: Mapping[str, Any], path: str) -> str:
    """A linear layer of the model, the one named most like the path if there is any."""
    leaf = path.rpartition(".")[2]
    linear = [p for p, m in there.items() if isinstance(m, nn.Linear)] or list(there)
    return next((p for p in linear if p.rpartition(".")[2] == leaf), linear[0])


def refuse_extras(name: str, extras: Iterable[str], config: Mapping[str, Any]) -> None:
    """Raise a `RefusedError` for extra tensors that would not be run."""
    for key in extras:
        kind = extra_kind(key, config)
        if kind != "training state":
            raise RefusedError(
                f"adapter {name!r} carries {key!r} ({kind}), which does not run from a library: "
                "attach library[name] itself, or apply it to the weights (adapter.apply_to)"
            )
