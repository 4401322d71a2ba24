"""How a weight relates to its 2-D update, and adding the one to the other."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from .errors import MismatchError
from .lowrank import LowRank
from .parts import (
    LINEAR,
    Layout,
    base_names,
    extra_kind,
    extra_places,
    lora_bias_path,
    scaling,
    token_indices,
)


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


def apply_extras(
    state: dict[str, Tensor], extras: Mapping[str, Tensor], config: Mapping[str, Any]
) -> list[str]:
    """Put extra tensors into a base state dict, as PEFT's merge_and_unload does.

    Saved modules, biases and stored base weights replace the base's tensors; trained token rows
    replace rows; a LoRA bias is added with its module's scale. Tensors keep the base's dtype.

    Args:
        state: changed in place: its tensors are replaced, never written to.
        extras: {file key: tensor}.
        config: the adapter's configuration.

    Returns:
        The keys that had no place.

    Raises:
        MismatchError: a shape differs from the base's, or token indices are missing.
    """
    unused = []
    # Replacements first: a LoRA bias adds to the bias that the file itself may hold, and rows
    # go into the embedding that it may hold.
    order = {"lora bias": 1, "trained tokens": 1}
    kinds = {key: extra_kind(key, config) for key in extras}
    for key in sorted(extras, key=lambda key: order.get(kinds[key], 0)):
        kind, value = kinds[key], extras[key]
        if kind in ("dora magnitude", "grouped convolution"):
            placed = False
        elif kind == "training state":
            placed = True
        elif kind == "lora bias":
            placed = _add_lora_bias(state, key, value, config)
        elif kind == "trained tokens":
            placed = _set_token_rows(state, key, value, config)
        else:
            placed = _replace(state, key, value)
        if not placed:
            unused.append(key)
    return unused


def _replace(state: dict[str, Tensor], key: str, value: Tensor) -> bool:
    if "original_module" in key.split("."):
        return True  # the untrained twin of a saved module, which the saved one replaces
    for name in base_names(key):
        if name in state:
            _check_shape(key, tuple(value.shape), name, tuple(state[name].shape))
            state[name] = value.detach().to(state[name], copy=True)
            return True
    return False


def _add_lora_bias(
    state: dict[str, Tensor], key: str, value: Tensor, config: Mapping[str, Any]
) -> bool:
    for name in extra_places(key, config):
        bias = state.get(name)
        if bias is not None:
            _check_shape(key, tuple(value.shape), name, tuple(bias.shape))
            delta = value.float() * scaling(config, lora_bias_path(key))[1]
            state[name] = (bias.float() + delta.to(bias.device)).to(bias.dtype)
            return True
    return False


def _set_token_rows(
    state: dict[str, Tensor], key: str, value: Tensor, config: Mapping[str, Any]
) -> bool:
    (name,) = extra_places(key, config)
    path = name.removesuffix(".weight")
    old = state.get(name)
    if old is None:
        return False
    rows = token_indices(config, path)
    if len(rows) != value.shape[0] or max(rows, default=-1) >= old.shape[0]:
        raise MismatchError(
            f"{key!r} holds {value.shape[0]} token rows, but trainable_token_indices in the "
            f"config names {len(rows)} for {path!r} (which has {old.shape[0]} rows)"
        )
    new = old.clone()
    new[list(rows)] = value.to(new)
    for name, other in list(state.items()):
        # A tied output layer shares the embedding's memory, and follows it in PEFT too.
        if other is old or (
            other.data_ptr() == old.data_ptr() and other.shape == old.shape and old.numel()
        ):
            state[name] = new
    return True


def check_replicated(
    state: Mapping[str, Any], config: Mapping[str, Any], paths: Iterable[str]
) -> None:
    """Refuse a base without the replicated layers that the adapter was trained on.

    Its layer numbers count the replicas, so they would hit the wrong layers of the plain base.

    Raises:
        MismatchError: naming the numbers of layers.
    """
    ranges = config.get("layer_replication")
    stack = next((m[1] for p in paths if (m := re.match(r"(.*?\.|)\d+\.", p))), None)
    if not ranges or stack is None:
        return
    expected = sum(stop - start for start, stop in ranges)
    pattern = re.compile(rf"{re.escape(stack)}(\d+)\.")
    found = len({m[1] for key in state if (m := pattern.match(key))})
    if found != expected:
        raise MismatchError(
            f"the adapter belongs to {expected} layers (layer_replication {ranges}), the state "
            f"dict has {found} under {stack!r}: give that of the base with its layers replicated"
        )


def _check_shape(key: str, found: tuple[int, ...], name: str, expected: tuple[int, ...]) -> None:
    if found != expected:
        raise MismatchError(
            f"{key!r} has shape {found}, but {name!r} in the base has {expected}: "
            "resize the base (for example its vocabulary) as it was when the adapter was trained"
        )
