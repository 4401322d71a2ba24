"""A base in fewer bits, to attach to and to train on: QLoRA (arXiv 2305.14314).

The layers stay the objects that they are, with their names, hooks and biases: each one's class
becomes that of a quantised linear layer, and its weight is exchanged. `dequantize` goes back to the
class that it had, with the rounded weight. All layers are quantised before the first is changed.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from ..errors import MismatchError, RefusedError
from ..layers.kinds import KINDS, LayerKind, is_linear
from ..layers.misread import misread
from ..layers.sites import place_at
from ..layers.storage import Origin, is_quantized, storage_of, weight_of
from ..layers.swap import base_modules, is_attached, rebase
from ..layers.targets import ALL_LINEAR, DEFAULT_EXCLUDE, Target, as_targets, found_layers
from .footprint import (
    Footprint,
    LayerFootprint,
    bytes_in_16_bits,
    layer_footprint,
    model_bytes,
    output_of,
    relative,
)
from .formats import FLOATS, Choice, Kind, chosen, fits, package_of, quantized_linear, whole_groups

_ORIGIN = "quantized_from"  # where a layer keeps what it was
_INTERNAL = frozenset(vars(nn.Module()))


def quantize_base(
    model: nn.Module,
    bits: Literal[4, 8] = 4,
    kind: Kind | None = None,
    group_size: int | Literal["row"] | None = None,
    double_quant: bool = False,
    compute_dtype: torch.dtype | None = None,
    targets: Any = ALL_LINEAR,
    exclude: Any = DEFAULT_EXCLUDE,
    *,
    inputs: Any = None,
) -> Footprint:
    """Quantise the linear layers of a model in place; attach to it afterwards.

    Args:
        model: float32, bfloat16 or float16, on a CPU or a GPU, or a linear layer by itself.
        bits: 4 or 8.
        kind: for 4 bits "nf4" (the default) or "fp4"; for 8 "int8" (the default), which rounds the
            inputs too, or "int8_weight_only". The last needs torchao, the others bitsandbytes.
        group_size: weights that share a scale: 32, 64 (the default), 128, … 4096 at 4 bits, "row"
            for "int8", 32, 64 (the default), 128, 256 or "row" for "int8_weight_only".
        double_quant: quantise the scales as well, to 8 bits (4 bits only).
        compute_dtype: in which products are computed (4 bits only); that of the weights when None.
        targets, exclude: which layers; as for `LoRA`.
        inputs: what to run the model with, before and after, to state the error of its output: its
            argument, a tuple of them, or a mapping of keywords.

    Returns:
        Bytes before and after, and the errors; `print` gives a table.

    Raises:
        MismatchError: what is not supported, with what is; numbers that are not finite; groups that
            bitsandbytes reads wrongly on this processor, with those that fit.
        RefusedError: adapters are attached, or a layer can't be quantised.
        MissingExtraError: the package is not installed. The model is unchanged then.

    Not for: embeddings and convolutions, which stay as they are, nor a model with adapters attached
    (detach, quantise, attach).

    Examples:
        >>> import torch, lorafold as lf
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> footprint = lf.quantize_base(model)  # nf4, groups of 64
        >>> footprint.layers[0].before, footprint.layers[0].codes
        (8192, 1024)
        >>> live = lf.attach(model, lf.LoRA(rank=8, targets="0"))
    """
    choice = chosen(bits, kind, group_size, double_quant, compute_dtype)
    package_of(choice)
    layers = _checked(model, as_targets(targets, "targets"), as_targets(exclude, "exclude"), choice)
    before, half = model_bytes(model), bytes_in_16_bits(model)
    output = None if inputs is None else output_of(model, inputs)
    made = {path: _quantized(path, layer, choice) for path, layer in layers.items()}
    for path, (new, _) in made.items():
        _become(layers[path], new)
    footprint = _footprint(choice, layers, [footprint for _, footprint in made.values()])
    footprint = replace(footprint, before=before, in_16_bits=half)
    footprint = replace(footprint, after=model_bytes(model))
    if output is None:
        return footprint
    return replace(footprint, forward_error=relative(output_of(model, inputs), output))


def dequantize(x: nn.Module) -> nn.Module:
    """Give quantised layers their float class and weight back, in place; also under adapters.

    What rounding lost stays lost: the weight is the one that is stored, codes × scales. A bias
    comes back to the bit.

    Args:
        x: a quantised layer, or a model that has some.

    Returns:
        x itself.

    Raises:
        MismatchError: nothing in it is quantised. RefusedError: a layer that can't be read; nothing
            is changed then.

    Not for: a part of a model whose adapters train elsewhere in it: give the whole model, so that
    the new weights rest as the others do.

    Examples:
        >>> import torch, lorafold as lf
        >>> layer = torch.nn.Linear(64, 32)
        >>> _ = lf.quantize_base(layer)
        >>> lf.dequantize(layer).weight.dtype
        torch.float32
    """
    found = {path: m for path, m in base_modules(x) if is_quantized(m)}
    if not found:
        raise MismatchError("nothing here is quantised")
    for path, layer in found.items():
        if not is_linear(layer):
            raise RefusedError(f"module {path!r} is a {type(layer).__name__}, not a linear layer")
        weight_of(layer, path)
    site: Any = next((m.lorafold for m in x.modules() if is_attached(m)), None)
    for layer in found.values():
        old, new = _restore(layer, vars(layer).get(_ORIGIN) or _foreign(x, layer))
        if site is not None:  # an adapter may train: the base must not
            site.weight_exchanged(old, new)
    return x


def _checked(
    model: nn.Module, targets: Iterable[Target], exclude: Iterable[Target], choice: Choice
) -> dict[str, Any]:
    """{path: layer} of what is to be quantised; all of it can be."""
    if any(is_attached(module) for module in model.modules()):
        raise RefusedError(
            "adapters are attached to this model: quantise first and attach then (live.detach(), "
            "lf.quantize_base, lf.attach)"
        )
    layers, users = found_layers(model, targets, exclude), _users(model)
    for path, layer in layers.items():
        _check(model, path, layer, users, choice)
    return layers


def _own(layer: nn.Module) -> dict[str, nn.Parameter]:
    return dict(layer.named_parameters(recurse=False))


def _users(model: nn.Module) -> Mapping[int, list[str]]:
    """Which modules hold each parameter, by its id."""
    users: dict[int, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        for p in module.parameters(recurse=False):
            users[id(p)].append(path)
    return users


def _check(
    model: nn.Module, path: str, layer: Any, users: Mapping[int, list[str]], choice: Choice
) -> None:
    place = place_at(model, path)
    if is_quantized(layer):
        raise RefusedError(
            f"module {path!r} is quantised already: lf.dequantize it first, or leave it out "
            "(exclude=)"
        )
    if not place.kind.plain(layer) or "weight" not in _own(layer):
        raise RefusedError(
            f"module {path!r} is a {type(layer).__name__}, which is no plain linear layer: leave "
            "it out (exclude=)"
        )
    weight = layer.weight
    others = [p for p in users[id(weight)] if p != path]
    if others:
        raise RefusedError(
            f"module {path!r} shares its weight with {others[0]!r}, which would be taken apart: "
            "leave it out (exclude=)"
        )
    if weight.is_meta:
        raise RefusedError(f"module {path!r} has no weight yet (device 'meta'): load it first")
    if weight.dtype not in FLOATS:
        raise MismatchError(
            f"module {path!r} has a weight of {weight.dtype}: convert the model to float32, "
            "bfloat16 or float16 first"
        )
    reason = fits(place.dims, choice)
    if reason:
        raise MismatchError(f"module {path!r} can't be quantised: {reason}")
    largest = float(weight.detach().abs().max())
    if not math.isfinite(largest):
        raise MismatchError(f"the weight of module {path!r} has numbers that are not finite")
    if choice.kind == "int8" and largest > torch.finfo(torch.float16).max:
        raise MismatchError(
            f"the weight of module {path!r} has {largest:g}, and kind 'int8' goes through float16: "
            "take kind='int8_weight_only'"
        )


def _quantized(path: str, layer: Any, choice: Choice) -> tuple[nn.Linear, LayerFootprint]:
    """The layer that another one becomes, and what that does to its weight.

    Raises:
        MismatchError: on this processor, it would compute with another weight.
    """
    W = _kind(layer).turned(layer.weight.detach()).contiguous()
    new = quantized_linear(W, choice)
    wrong = misread(new)
    if wrong:
        raise MismatchError(
            f"module {path!r} can't be quantised: its rows of {W.shape[1]} in groups of "
            f"{choice.group_size} are read wrongly by bitsandbytes on this processor ({wrong:.0%} "
            f"off): {whole_groups(W.shape[1], choice)}"
        )
    dense = weight_of(new, path)
    probe = copy.deepcopy(new).eval()  # a first forward leaves traces on an 8-bit layer
    return new, layer_footprint(path, W, probe, dense)


def _footprint(
    choice: Choice, layers: Mapping[str, Any], footprints: list[LayerFootprint]
) -> Footprint:
    """The report, but for what concerns the whole model."""
    first = layers[footprints[0].path]
    return Footprint(
        tuple(footprints),
        choice.format.bits,
        choice.kind,
        choice.group_size,
        choice.double_quant,
        getattr(first, "compute_dtype", None),
        storage_of(first).parts(first).scales.dtype,
    )


def _become(layer: Any, new: Any) -> None:
    """Make a layer what `new` is, and keep what it was."""
    bias: Any = _own(layer).get("bias")
    dtype = getattr(new, "compute_dtype", None)
    converted = bias is not None and dtype is not None and bias.dtype != dtype
    added = {name: value for name, value in vars(new).items() if name not in _INTERNAL}
    vars(layer)[_ORIGIN] = Origin(
        type(layer),
        layer.weight.dtype,
        layer.weight.requires_grad,
        bias if converted else None,
        frozenset(added) - frozenset(vars(layer)),
        frozenset(new._load_state_dict_pre_hooks),
    )
    vars(layer).update(added)
    layer._load_state_dict_pre_hooks.update(new._load_state_dict_pre_hooks)
    layer.weight = new.weight
    if converted:
        # The layer would do so itself at its first forward, in the parameter that was given.
        of_dtype = nn.Parameter(bias.detach().to(dtype), bias.requires_grad)
        layer.register_parameter("bias", of_dtype)
    layer.__class__ = type(new)


def _kind(layer: Any) -> LayerKind:
    kind = KINDS.find(layer)
    assert kind is not None  # it was found linear
    return kind


def _restore(layer: Any, origin: Origin) -> tuple[nn.Parameter, nn.Parameter]:
    """Make a quantised layer what it was, with the weight that it has; the old one and the new."""
    W = _kind(layer).turned(weight_of(layer)).to(origin.dtype)
    for name in origin.names:
        vars(layer).pop(name, None)
    for key in origin.hooks:
        layer._load_state_dict_pre_hooks.pop(key, None)
    vars(layer).pop(_ORIGIN, None)
    rebase(layer, origin.cls)
    W = _kind(layer).turned(W).contiguous()
    old, layer.weight = layer.weight, nn.Parameter(W, origin.requires_grad)
    if origin.bias is not None:
        layer.register_parameter("bias", origin.bias)
    return old, layer.weight


def _foreign(model: nn.Module, layer: Any) -> Origin:
    """What a layer was that something else has quantised."""
    origin = storage_of(layer).origin(layer)
    others = (p for _, m in base_modules(model) for p in m.parameters(recurse=False))
    dtype = origin.dtype or next((p.dtype for p in others if p.dtype in FLOATS), torch.float32)
    return replace(origin, dtype=dtype)
