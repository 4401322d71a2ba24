"""Quantised linear layers: which ones they are, their weight as numbers, and what they store.

The scales of bitsandbytes' 4-bit layers are in the weight's `quant_state`, those of its 8-bit
layers in the weight's `SCB` until the first forward and in the layer's `state` from then on, those
of torchao inside the tensor.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RefusedError


def is_quantized(layer: nn.Module) -> bool:
    """Whether the layer's weight is stored in fewer bits than it is used in."""
    weight = getattr(layer, "weight", None)
    if weight is None:
        return False
    return hasattr(weight, "quant_state") or hasattr(weight, "SCB") or is_torchao(weight)


def is_torchao(weight: Any) -> bool:
    """Whether it is one of torchao's quantised tensors."""
    return type(weight.data).__module__.startswith("torchao") and hasattr(weight, "dequantize")


def weight_of(layer: Any, path: str = "") -> Tensor:
    """The weight of a quantised linear layer, (out, in), as numbers.

    Raises:
        RefusedError: a kind of quantisation that can't be read, naming it.
    """
    weight = layer.weight
    if is_torchao(weight):
        dense: Tensor = weight.dequantize()
        return dense.detach()
    if getattr(weight, "quant_state", None) is not None:
        import bitsandbytes.functional as F

        codes, state = _unpacked(weight)
        state.dtype = torch.float32
        dense = F.dequantize_4bit(codes, state)
        return dense.detach()
    scales = row_scales(layer)
    if scales is not None and weight.dtype == torch.int8:
        scaled: Tensor = weight.data.float() * (scales.view(-1, 1) / 127)
        return scaled
    if weight.is_floating_point():  # not quantised yet: bitsandbytes does it on the way to a device
        found: Tensor = weight.detach()
        return found
    raise RefusedError(
        f"the weight of {path or type(layer).__name__!r} is quantised in a way that can't be read "
        "here: load the model in floats"
    )


def row_scales(layer: Any) -> Tensor | None:
    """The scales (out,) of an 8-bit layer of bitsandbytes, 127 times too large; None elsewhere."""
    for holder in (layer.weight, getattr(layer, "state", None)):
        scales = getattr(holder, "SCB", None)
        if isinstance(scales, Tensor):
            return scales
    return None


def float_dtype(layer: Any) -> torch.dtype | None:
    """The dtype that the weight had before, where the layer knows it."""
    weight = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        found: torch.dtype = getattr(state, "original_dtype", state.dtype)
        return found
    dtype: torch.dtype = weight.dtype
    return dtype if dtype.is_floating_point else None


def stored(layer: Any) -> tuple[Tensor, list[Tensor], Tensor]:
    """What a quantised layer keeps of its weight: the codes, all else, and of that the scales."""
    weight = layer.weight
    if is_torchao(weight):
        codes, *rest = (getattr(weight, name) for name in weight.__tensor_flatten__()[0])
        return codes, rest, rest[0]
    state = getattr(weight, "quant_state", None)
    if state is not None:
        parts = [state.absmax, state.code, getattr(state, "offset", None)]
        inner = getattr(state, "state2", None)
        if inner is not None:
            parts += [inner.absmax, inner.code]
        return weight.data, [t for t in parts if isinstance(t, Tensor)], state.absmax
    scales = row_scales(layer)
    if scales is not None:
        return weight.data, [scales], scales
    return weight.data, [], weight.data.new_empty(0)


def _unpacked(weight: Any) -> tuple[Tensor, Any]:
    """Codes in the order of the weight, and a copy of their state.

    On a processor with AVX512-BF16, bitsandbytes' first forward in evaluation reorders the codes,
    and keeps the scales as bfloat16, transposed.
    """
    state = copy.copy(weight.quant_state)
    if not getattr(state, "packing_format_for_cpu", False):
        return weight.data, state
    import bitsandbytes.functional as F

    absmax = state.absmax.T.reshape(-1).float()
    state.original_nested = False  # its scales are in absmax by now, and need not be coded again
    codes, state = F._convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax, state.nested = absmax, False
    return codes, state
