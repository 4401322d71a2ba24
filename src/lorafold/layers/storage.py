"""The ways to store a layer's weight, one record each: as numbers, or in fewer bits.

The scales of bitsandbytes' 4-bit layers are in the weight's `quant_state`, those of its 8-bit
layers in the weight's `SCB` until the first forward and in the layer's `state` from then on, those
of torchao inside the tensor. What a layer computes is another table's: `kinds.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RefusedError
from .swap import base_class
from .table import Table


@dataclass(frozen=True)
class Parts:
    """What a layer keeps of its weight: codes, all else that they need, and of that the scales."""

    codes: Tensor
    rest: tuple[Tensor, ...]
    scales: Tensor


@dataclass(frozen=True)
class Origin:
    """What a layer was before it was quantised.

    Args:
        cls: its class. dtype: of its weight, None where nothing tells.
        requires_grad: of its weight.
        bias: as it was, where it had to be converted.
        names: attributes, and hooks: ids of load hooks, that quantising added.
    """

    cls: type
    dtype: torch.dtype | None
    requires_grad: bool = False
    bias: nn.Parameter | None = None
    names: frozenset[str] = frozenset()
    hooks: frozenset[int] = frozenset()


def _own_dtype(layer: Any) -> torch.dtype | None:
    dtype: torch.dtype = layer.weight.dtype
    return dtype if dtype.is_floating_point else None


@dataclass(frozen=True, eq=False)
class Storage:
    """One way to store the weight of a layer.

    A new one is one record, given to `STORAGES.register`.

    Args:
        name: its own among them.
        mine: whether a layer's weight is stored so.
        read: the weight's numbers, in the shape that the layer's kind says; None where they can't
            be read.
        parts: what is kept.
        dtype: which the weight had before, where the layer knows it.
        origin: what the layer was, for one that something else than `quantize_base` quantised.
        called: what people call it at a layer: "nf4", or a dtype; its name where None.
        quantized: whether it takes fewer bits than it is used in. A change of such a weight is
            rounded again: nothing is merged into it.
        kernel: the numbers that the layer computes with, where a kernel of its own reads the parts.

    Not for: what a layer computes with its weight (`LayerKind`), nor for quantising
    (`lf.quantize_base`).
    """

    name: str
    mine: Callable[[Any], bool]
    read: Callable[[Any], Tensor | None]
    parts: Callable[[Any], Parts]
    dtype: Callable[[Any], torch.dtype | None] = _own_dtype
    origin: Callable[[Any], Origin] = lambda layer: Origin(base_class(layer), None)
    quantized: bool = True
    called: Callable[[Any], str] | None = None
    kernel: Callable[[Any], Tensor] | None = None


# Floats


def _floats(layer: Any) -> Tensor | None:
    found: Tensor = layer.weight.detach()
    return found if found.is_floating_point() else None


def _bare_parts(layer: Any) -> Parts:
    data = layer.weight.data
    return Parts(data, (), data.new_empty(0))


# bitsandbytes


def _theirs(layer: Any) -> Origin:
    """A linear layer, without what bitsandbytes puts on its own."""
    dtype = storage_of(layer).dtype(layer)
    own = [c for c in type(layer).__mro__ if c.__module__.startswith("bitsandbytes")]
    if not own:
        return Origin(nn.Linear, dtype)
    cls: Any = own[-1]
    fresh, plain = cls(1, 1, bias=False, device="meta"), nn.Linear(1, 1, device="meta")
    of_fresh = {getattr(h, "hook", h) for h in fresh._load_state_dict_pre_hooks.values()}
    hooks = layer._load_state_dict_pre_hooks.items()
    return Origin(
        nn.Linear,
        dtype,
        names=frozenset(vars(fresh)) - frozenset(vars(plain)),
        hooks=frozenset(key for key, h in hooks if getattr(h, "hook", h) in of_fresh),
    )


def _read_4bit(layer: Any) -> Tensor | None:
    """Codes × scales."""
    if layer.weight.quant_state is None:  # it is quantised on the way to a device
        return _floats(layer)
    codes, state = _unpacked(layer.weight)
    count, bytes_ = state.shape.numel(), codes.detach().reshape(-1).view(torch.uint8)
    table, byte = state.code.to(bytes_.device, torch.float32), torch.arange(256).to(bytes_.device)
    pairs = torch.stack([table[byte >> 4], table[byte & 15]], 1)  # what each byte stands for
    # As one number each, they are copied eight times faster.
    values = torch.view_as_complex(pairs).index_select(0, bytes_.int())
    values = torch.view_as_real(values).view(-1)[:count]
    return _scaled(values, _scales_4bit(state), state.blocksize).view(state.shape)


def _scales_4bit(state: Any) -> Tensor:
    """The scales (groups,), which may be coded themselves."""
    if not state.nested:
        scales: Tensor = state.absmax.float()
        return scales
    inner = state.state2
    values = inner.code.float()[state.absmax.int()]
    nested: Tensor = _scaled(values, inner.absmax.float(), inner.blocksize) + state.offset
    return nested


def _scaled(values: Tensor, scales: Tensor, group: int) -> Tensor:
    """Each value times the scale of its group; the last group may be shorter."""
    whole = len(values) // group * group
    values[:whole].view(-1, group).mul_(scales[: whole // group, None])
    if whole < len(values):
        values[whole:].mul_(scales[-1])
    return values


def _kernel_4bit(layer: Any) -> Tensor:
    import bitsandbytes.functional as F

    codes, state = _unpacked(layer.weight)
    state.dtype = torch.float32
    dense: Tensor = F.dequantize_4bit(codes, state)
    return dense.detach()


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


def _parts_4bit(layer: Any) -> Parts:
    state = layer.weight.quant_state
    if state is None:
        return _bare_parts(layer)
    rest = [state.absmax, state.code, getattr(state, "offset", None)]
    inner = getattr(state, "state2", None)
    if inner is not None:
        rest += [inner.absmax, inner.code]
    return Parts(layer.weight.data, tuple(t for t in rest if isinstance(t, Tensor)), state.absmax)


def _dtype_4bit(layer: Any) -> torch.dtype | None:
    state = layer.weight.quant_state
    if state is None:
        return _own_dtype(layer)
    found: torch.dtype = getattr(state, "original_dtype", state.dtype)
    return found


def _row_scales(layer: Any) -> Tensor | None:
    """The scales (out,) of an 8-bit layer, 127 times too large; None until it is quantised."""
    for holder in (layer.weight, getattr(layer, "state", None)):
        scales = getattr(holder, "SCB", None)
        if isinstance(scales, Tensor):
            return scales
    return None


def _read_8bit(layer: Any) -> Tensor | None:
    scales = _row_scales(layer)
    if scales is None or layer.weight.dtype != torch.int8:
        return _floats(layer)
    scaled: Tensor = layer.weight.data.float() * (scales.view(-1, 1) / 127)
    return scaled


def _parts_8bit(layer: Any) -> Parts:
    scales = _row_scales(layer)
    if scales is None:
        return _bare_parts(layer)
    return Parts(layer.weight.data, (scales,), scales)


# torchao


def _is_torchao(layer: Any) -> bool:
    data = layer.weight.data
    return type(data).__module__.startswith("torchao") and hasattr(data, "dequantize")


def _read_torchao(layer: Any) -> Tensor:
    dense: Tensor = layer.weight.dequantize()
    return dense.detach()


def _parts_torchao(layer: Any) -> Parts:
    weight = layer.weight
    codes, *rest = (getattr(weight, name) for name in weight.__tensor_flatten__()[0])
    return Parts(codes, tuple(rest), rest[0])


BNB4 = Storage(
    name="bitsandbytes, 4 bits",
    mine=lambda layer: hasattr(layer.weight, "quant_state"),
    read=_read_4bit,
    parts=_parts_4bit,
    dtype=_dtype_4bit,
    origin=_theirs,
    called=lambda layer: str(getattr(layer.weight.quant_state, "quant_type", "4 bits")),
    kernel=_kernel_4bit,
)
BNB8 = Storage(
    name="bitsandbytes, 8 bits",
    mine=lambda layer: hasattr(layer.weight, "SCB"),
    read=_read_8bit,
    parts=_parts_8bit,
    origin=_theirs,
    called=lambda layer: "int8",
)
TORCHAO = Storage(
    name="torchao",
    mine=_is_torchao,
    read=_read_torchao,
    parts=_parts_torchao,
    origin=lambda layer: Origin(nn.Linear, _own_dtype(layer), names=frozenset({"extra_repr"})),
)
FLOAT = Storage(
    name="floats",
    mine=lambda layer: True,
    read=_floats,
    parts=_bare_parts,
    quantized=False,
    called=lambda layer: str(layer.weight.dtype).removeprefix("torch."),
)
STORAGES = Table(BNB4, BNB8, TORCHAO, FLOAT)


def storage_of(layer: Any) -> Storage:
    """How a layer's weight is stored; as floats where it has none."""
    found = STORAGES.find(layer) if getattr(layer, "weight", None) is not None else None
    return FLOAT if found is None else found


def stored_as(layer: nn.Module) -> str:
    """How a layer's weight is stored, in a word: "nf4", "int8", or its dtype."""
    storage = storage_of(layer)
    return storage.name if storage.called is None else storage.called(layer)


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer's weight is stored in fewer bits than it is used in."""
    return storage_of(layer).quantized


def weight_of(layer: Any, path: str = "") -> Tensor:
    """The weight's numbers, in the shape that the layer's kind says.

    Raises:
        RefusedError: a kind of quantisation that can't be read, naming it.
    """
    found = storage_of(layer).read(layer)
    if found is None:
        raise RefusedError(
            f"the weight of {path or type(layer).__name__!r} is quantised in a way that can't be "
            "read here: load the model in floats"
        )
    return found
