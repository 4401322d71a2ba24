"""How a weight relates to its 2-D update, and adding the one to the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .errors import MismatchError
from .lowrank import LowRank


@dataclass(frozen=True)
class Layout:
    """How a module's weight, and its factors in a file, relate to the 2-D update (out, in).

    Args:
        kind: "linear": the weight is (out, in), or (in, out) where the layer stores it transposed.
            "embedding": the update is (dim, vocab), the weight (vocab, dim).
            "conv": the weight is (out, *kernel), flattened to (out, in) here.
            "expert": one slice of a 3-D parameter (experts, ·, ·).
        kernel: for "conv", the weight's shape without `out`.
        parameter: the name of the parameter of the module that is updated.
        stem: the module's name in the file where it differs from the path.
        expert: (index, count) of the slice, for "expert".
        transposed: for "expert", the slice is stored (in, out).
    """

    kind: Literal["linear", "embedding", "conv", "expert"] = "linear"
    kernel: tuple[int, ...] = ()
    parameter: str = "weight"
    stem: str | None = None
    expert: tuple[int, int] | None = None
    transposed: bool = False


LINEAR = Layout()


def add_updates(
    state: dict[str, Tensor],
    modules: Mapping[str, LowRank],
    layouts: Mapping[str, Layout],
    transposed: bool,
) -> None:
    """Add every update to its weight, where there is one.

    Args:
        state: changed in place: its tensors are replaced, never written to.
        modules: {module path: update}.
        layouts: {module path: Layout}; plain linear where none is given.
        transposed: linear layers store (in, out) (`fan_in_fan_out`), where shapes don't tell.

    Raises:
        MismatchError: an update does not fit its weight.
    """
    keys = {p: k for p in modules if (k := weight_key(state, p, layouts.get(p, LINEAR)))}
    shapes = {p: tuple(state[k].shape) for p, k in keys.items()}
    flips = orientations(modules, layouts, shapes, transposed)
    for key in {k for p, k in keys.items() if layouts.get(p, LINEAR).kind == "expert"}:
        state[key] = state[key].clone()  # once, and not for every expert
    for p, key in keys.items():
        layout = layouts.get(p, LINEAR)
        if layout.kind == "expert":
            _add_expert(state[key], modules[p], layout, flips[p], key)
        else:
            state[key] = added(state[key], modules[p], layout, flips[p], key)


def weight_key(state: Mapping[str, Tensor], path: str, layout: Layout) -> str | None:
    """The state dict's key of the weight that the module at `path` updates; None if not there."""
    if layout.kind == "expert":
        path = path.rpartition("[")[0] if path.endswith("]") else path
        return path if path in state else None
    name = f"{path}.{layout.parameter}" if path else layout.parameter
    return name if name in state else None


def added(W: Tensor, u: LowRank, layout: Layout, transposed: bool, key: str) -> Tensor:
    """W + ΔW in W's shape and dtype, summed in float32 at least.

    Args:
        W: the weight, not changed.
        transposed: the layer stores (in, out) (`fan_in_fan_out`); decides only where both fit.

    Raises:
        MismatchError: the update does not fit the weight, or the weight is not floating point.
    """
    if layout.kind == "expert":
        result = W.clone()
        _add_expert(result, u, layout, transposed or layout.transposed, key)
        return result
    _, delta = dense_for(W, u, layout, transposed, key)
    return (W.to(delta.dtype) + delta).to(W.dtype)


def dense_for(
    W: Tensor, u: LowRank, layout: Layout, transposed: bool, key: str
) -> tuple[Tensor, Tensor]:
    """What of W an update changes, and ΔW in that shape.

    Args:
        transposed: it is stored (in, out); decides only where both fit.

    Returns:
        W itself or an expert's slice of it (a view), and ΔW, float32 at least.

    Raises:
        MismatchError: the update does not fit the weight, or the weight is not floating point.
    """
    if not W.is_floating_point():
        raise MismatchError(f"{key!r} is {W.dtype}: dequantise it before adding an update")
    part, count = W, None
    if layout.expert is not None:
        index, count = layout.expert
        part = W[index] if W.ndim == 3 and index < len(W) else W
    flipped = tuple(part.shape) == u.shape[::-1]
    delta = u.dense().to(W.device)
    if layout.kind == "conv":
        delta = delta.reshape(u.shape[0], *layout.kernel)
    elif layout.kind == "embedding" or (flipped and (transposed or u.shape[0] != u.shape[1])):
        delta = delta.T
    # A 2-D weight is one expert.
    slices = () if count is None or (W.ndim != 3 and count == 1) else (count,)
    expected = (*slices, *delta.shape)
    if tuple(W.shape) != expected:
        raise MismatchError(f"{key!r} has shape {tuple(W.shape)}, the update fits {expected}")
    return part, delta


def _add_expert(W: Tensor, u: LowRank, layout: Layout, transposed: bool, key: str) -> None:
    """Add the update to its slice of W (experts, ·, ·) in place."""
    part, delta = dense_for(W, u, layout, transposed, key)
    part.copy_(part.to(delta.dtype) + delta)


def orientations(
    modules: Mapping[str, LowRank],
    layouts: Mapping[str, Layout],
    weights: Mapping[str, tuple[int, ...]],
    transposed: bool,
) -> dict[str, bool]:
    """Whether each module's weight is stored (in, out).

    A square weight fits both ways. Its kin of another shape shows which one is meant, where the
    config doesn't: it has one `fan_in_fan_out` for all layers, and none for experts.

    Args:
        modules: {module path: update}.
        layouts: {module path: Layout}; plain linear where none is given.
        weights: {module path: shape of its weight}, of those that are there.
        transposed: the config's `fan_in_fan_out`.
    """
    found: dict[tuple[str, str], bool] = {}
    for p, weight in weights.items():
        layout, shape = layouts.get(p, LINEAR), modules[p].shape
        if layout.kind in ("linear", "expert") and shape[0] != shape[1]:
            found[_kin(p, layout)] = weight[-2:] != shape
    result = {}
    for p in weights:
        layout = layouts.get(p, LINEAR)
        default = layout.transposed if layout.kind == "expert" else transposed
        result[p] = found.get(_kin(p, layout), default)
    return result


def _kin(path: str, layout: Layout) -> tuple[str, str]:
    """What layers stored alike have in common: the last name, or the module of the experts."""
    parts = path.split(".")
    return layout.kind, ".".join(parts[:-1]) if layout.kind == "expert" else parts[-1]
