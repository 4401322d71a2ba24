"""Quantised linear layers: which ones they are, and their weight as numbers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import RefusedError


def is_quantized(layer: nn.Module) -> bool:
    """Whether the layer's weight is stored in fewer bits than it is used in."""
    weight = getattr(layer, "weight", None)
    if weight is None:
        return False
    return hasattr(weight, "quant_state") or hasattr(weight, "SCB") or _is_torchao(weight)


def weight_of(layer: Any, path: str = "") -> Tensor:
    """The weight of a quantised linear layer, (out, in), as numbers.

    Raises:
        RefusedError: a kind of quantisation that can't be read, naming it.
    """
    weight = layer.weight
    if _is_torchao(weight):
        dense: Tensor = weight.dequantize()
        return dense.detach()
    if getattr(weight, "quant_state", None) is not None:
        import bitsandbytes.functional as F

        dense = F.dequantize_4bit(weight.data, weight.quant_state)
        return dense.detach()
    if getattr(weight, "SCB", None) is not None:
        scaled: Tensor = weight.data.float() * weight.SCB.view(-1, 1) / 127
        return scaled
    raise RefusedError(
        f"the weight of {path or type(layer).__name__!r} is quantised in a way that can't be read "
        "here: run the model once, so that bitsandbytes quantises it, or load it in floats"
    )


def _is_torchao(weight: Any) -> bool:
    return type(weight.data).__module__.startswith("torchao") and hasattr(weight, "dequantize")
