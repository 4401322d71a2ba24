"""The kinds of layer that take an update, one record each, and the products that one is made of.

For every kind ΔW x is `up(down(x))`: `down` goes to the r numbers per position, `up` to the layer's
output. For a linear layer these are x Aᵀ and h Bᵀ; an embedding picks columns of A; a convolution
with (r, in/1 · kernel) as its kernel is followed by one of size 1. How the weight is stored is
another table's: `storage.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RefusedError
from ..parts import Layout
from .storage import storage_of, weight_of
from .swap import base_class
from .table import Table


def gathered(A: Tensor, ids: Tensor) -> Tensor:
    """The slots ids (rows, K) of A (slots, R, d), one below the other: (rows, K · R, d)."""
    return A.index_select(0, ids.flatten()).view(len(ids), -1, A.shape[2])


# Linear layers


def _linear_down(layer: Any, x: Tensor, A: Tensor) -> Tensor:
    return F.linear(x.to(A.dtype), A)


def _linear_up(layer: Any, h: Tensor, B: Tensor) -> Tensor:
    return F.linear(h, B)


def _linear_added(layer: Any, y: Tensor, h: Tensor, Bt: Tensor, coefficient: float) -> Tensor:
    if y.dtype != h.dtype:
        return y + (coefficient * (h @ Bt)).to(y.dtype)
    flat, h = y.reshape(-1, y.shape[-1]), h.reshape(-1, len(Bt))
    in_place = not torch.is_grad_enabled() and Bt.dtype == h.dtype  # not so under autocast
    if in_place and base_class(layer).forward is nn.Linear.forward:
        # Nobody else has this output, and copying it takes longer than adding to it.
        return flat.addmm_(h, Bt, alpha=coefficient).view(y.shape)
    return torch.addmm(flat, h, Bt, alpha=coefficient).view(y.shape)


def _linear_rows_down(layer: Any, x: Tensor, A: Tensor, ids: Tensor) -> Tensor:
    return torch.bmm(x.to(A.dtype).reshape(len(ids), -1, x.shape[-1]), gathered(A, ids).mT)


def _linear_rows_up(layer: Any, y: Tensor, h: Tensor, Bt: Tensor) -> Tensor:
    flat = y.reshape(len(Bt), -1, y.shape[-1])
    if flat.dtype == h.dtype:
        return torch.baddbmm(flat, h, Bt).view(y.shape)
    return (flat + torch.bmm(h, Bt).to(y.dtype)).view(y.shape)


@dataclass(frozen=True, eq=False)
class LayerKind:
    """How one kind of layer is updated.

    A new kind is one record, given to `KINDS.register`. What is not given is as for a linear layer.

    Args:
        name: its own among the kinds.
        mine: whether a layer is of this kind.
        dims: (out, in) of a layer's update.
        refusal: why a layer of this kind takes no update all the same, or None.
        layout: how the layer's weight relates to its update.
        transposed: the weight is stored (in, out).
        linear: h is x Aᵀ and the change h Bᵀ, x and y ending in in and out. "all-linear" means it.
        plain: whether a layer computes x Wᵀ + bias and nothing else, so that another linear layer
            can take its place.
        channel: the axis of h and of the output that holds the r or out numbers.
        down: h of (layer, x, A (k, in)). up: the output's change for (layer, h, B (out, k)).
        added: y plus coefficient times the change, for (layer, y, h, Bᵀ (k, out), coefficient).
        rows_down: h (rows, n, K · R) of (layer, x (rows · m, ...), A (slots, R, in), the slots ids
            (rows, K)).
        rows_up: y (rows · m, ...) plus the change, for (layer, y, h, Bᵀ (rows, K · R, out)).

    Not for: experts, whose routing hides the rows (`attach` has them as sites of their own), and
    how a weight is stored (`Storage`).

    Examples:
        >>> from lorafold.layers import kinds
        >>> kind = kinds.LayerKind(
        ...     name="scaled linear",
        ...     mine=lambda layer: type(layer).__name__ == "ScaledLinear",
        ...     dims=lambda layer: tuple(layer.weight.shape),
        ... )
        >>> with kinds.KINDS.including(kind):  # KINDS.register(kind), for good
        ...     kinds.KINDS.named("scaled linear") is kind
        True
    """

    name: str
    mine: Callable[[Any], bool]
    dims: Callable[[Any], tuple[int, int]]
    refusal: Callable[[Any], str | None] = lambda layer: None
    layout: Callable[[Any], Layout] = lambda layer: Layout()
    transposed: bool = False
    linear: bool = True
    plain: Callable[[Any], bool] = lambda layer: False
    channel: int = -1
    down: Callable[[Any, Tensor, Tensor], Tensor] = _linear_down
    up: Callable[[Any, Tensor, Tensor], Tensor] = _linear_up
    added: Callable[[Any, Tensor, Tensor, Tensor, float], Tensor] = _linear_added
    rows_down: Callable[[Any, Tensor, Tensor, Tensor], Tensor] = _linear_rows_down
    rows_up: Callable[[Any, Tensor, Tensor, Tensor], Tensor] = _linear_rows_up

    def __reduce__(self) -> Any:  # one object a kind, also in copies and pickles
        return _named, (self.name,)

    def size(self, layer: Any) -> int:
        """Numbers in a layer's weight."""
        return math.prod(self.dims(layer))

    def turned(self, W: Tensor) -> Tensor:
        """A weight as it is stored from one that is (out, in), or the other way round."""
        return W.T if self.transposed else W

    def matrix(self, layer: Any, path: str = "") -> Tensor:
        """A layer's weight as (out, in) float32, dequantised where it is quantised.

        Raises:
            RefusedError: it can't be read, naming it.
        """
        return self.turned(weight_of(layer, path).float()).reshape(self.dims(layer))


def _named(name: str) -> LayerKind:
    return KINDS.named(name)


# transformers' linear layer with the weight stored (in, out)


def _conv1d_class(layer: Any) -> type | None:
    names = (c for c in type(layer).__mro__ if c.__name__ == "Conv1D")
    return next(names, None) if hasattr(layer, "nf") else None


# Embeddings


def _embedding_refusal(layer: nn.Embedding) -> str | None:
    if layer.max_norm is not None:
        return "renormalises its rows (max_norm): attach elsewhere"
    if type(layer).forward is not nn.Embedding.forward and not hasattr(layer, "embed_scale"):
        return (
            f"is a {type(layer).__name__}, whose forward looks up something else than its input: "
            "merge the adapter instead (adapter.apply_to)"
        )
    return None


def _embedding_down(layer: Any, x: Tensor, A: Tensor) -> Tensor:
    h: Tensor = F.embedding(x, A.mT, layer.padding_idx) * _embed_scale(layer, A)
    return h


def _embedding_rows_down(layer: Any, x: Tensor, A: Tensor, ids: Tensor) -> Tensor:
    tokens = x.reshape(len(ids), -1)  # only their columns are read
    h = A.mT[ids[:, None, :], tokens[:, :, None]]  # (rows, n, K, R)
    scaled: Tensor = h.flatten(2) * _embed_scale(layer, A)
    return scaled


def _embed_scale(layer: Any, like: Tensor) -> Any:
    """The factor by which some models' embeddings multiply what they look up."""
    scale = getattr(layer, "embed_scale", None)
    return scale.to(like.dtype) if isinstance(scale, Tensor) else 1.0 if scale is None else scale


# Convolutions


def _conv_refusal(layer: Any) -> str | None:
    if layer.groups != 1:
        return "is a grouped convolution, whose update is not one product B A: leave it out"
    return None


def _conv_down(layer: Any, x: Tensor, A: Tensor) -> Tensor:
    return _conv(layer, x, A.reshape(-1, layer.in_channels, *layer.kernel_size), 1)


def _conv_up(layer: Any, h: Tensor, B: Tensor) -> Tensor:
    return torch.movedim(torch.movedim(h, 1, -1) @ B.mT, -1, 1)


def _conv_added(layer: Any, y: Tensor, h: Tensor, Bt: Tensor, coefficient: float) -> Tensor:
    delta = coefficient * _conv_up(layer, h, Bt.mT)
    return y + delta.to(y.dtype)


def _conv_rows_down(layer: Any, x: Tensor, A: Tensor, ids: Tensor) -> Tensor:
    # One grouped convolution, a group for each row.
    A = gathered(A, ids)
    rows, k, m = len(A), A.shape[1], x.shape[0] // len(A)
    spatial = x.shape[2:]
    x = x.reshape(rows, m, -1, *spatial).transpose(0, 1).reshape(m, -1, *spatial)
    h = _conv(layer, x, A.reshape(rows * k, -1, *layer.kernel_size), rows)
    return h.reshape(m, rows, k, -1).permute(1, 0, 3, 2).reshape(rows, -1, k)


def _conv_rows_up(layer: Any, y: Tensor, h: Tensor, Bt: Tensor) -> Tensor:
    rows, m, out = len(Bt), y.shape[0] // len(Bt), y.shape[1]
    delta = torch.bmm(h, Bt).reshape(rows, m, -1, out).transpose(2, 3)
    return y + delta.reshape(y.shape).to(y.dtype)


def _conv(layer: Any, x: Tensor, kernel: Tensor, groups: int) -> Tensor:
    x, padding = x.to(kernel.dtype), layer.padding
    if layer.padding_mode != "zeros":
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = 0
    conv: Any = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[kernel.ndim]
    result: Tensor = conv(x, kernel, None, layer.stride, padding, layer.dilation, groups)
    return result


LINEAR = LayerKind(
    name="linear",
    mine=lambda layer: isinstance(layer, nn.Linear),
    dims=lambda layer: (int(layer.out_features), int(layer.in_features)),
    plain=lambda layer: type(layer).forward is nn.Linear.forward,
)
CONV1D = LayerKind(
    name="Conv1D",
    mine=lambda layer: _conv1d_class(layer) is not None,
    dims=lambda layer: (int(layer.weight.shape[1]), int(layer.weight.shape[0])),
    plain=lambda layer: type(layer).forward is vars(_conv1d_class(layer)).get("forward"),
    transposed=True,
)
EMBEDDING = LayerKind(
    name="embedding",
    mine=lambda layer: isinstance(layer, nn.Embedding),
    dims=lambda layer: (int(layer.embedding_dim), int(layer.num_embeddings)),
    refusal=_embedding_refusal,
    layout=lambda layer: Layout("embedding"),
    transposed=True,
    linear=False,
    down=_embedding_down,
    rows_down=_embedding_rows_down,
)
CONV = LayerKind(
    name="convolution",
    mine=lambda layer: isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d),
    dims=lambda layer: (
        int(layer.out_channels),
        int(layer.in_channels) * math.prod(layer.kernel_size),
    ),
    refusal=_conv_refusal,
    layout=lambda layer: Layout("conv", kernel=tuple(layer.weight.shape[1:])),
    linear=False,
    channel=1,
    down=_conv_down,
    up=_conv_up,
    added=_conv_added,
    rows_down=_conv_rows_down,
    rows_up=_conv_rows_up,
)
KINDS = Table(LINEAR, CONV1D, EMBEDDING, CONV)


def kind_of(layer: nn.Module, path: str) -> LayerKind:
    """The kind of a layer.

    Raises:
        RefusedError: a layer that takes no update, or whose effect would be wrong; naming it.
    """
    if "forward" in vars(layer):
        raise RefusedError(
            f"module {path!r} has a forward of its own on the instance (a hook of accelerate's, "
            "or a patch): remove it before attaching"
        )
    kind = KINDS.find(layer)
    if kind is None:
        raise RefusedError(
            f"module {path!r} is a {type(layer).__name__}, which takes no update; linear, Conv1D, "
            "embedding and convolution layers do"
        )
    reason = kind.refusal(layer)
    if reason:
        raise RefusedError(f"module {path!r} {reason}")
    return kind


def packed_sizes(model: nn.Module) -> dict[int, int]:
    """By the id of each quantised weight, the numbers that it stands for."""
    layers = ((m, KINDS.find(m)) for m in model.modules() if storage_of(m).quantized)
    return {id(m.weight): kind.size(m) for m, kind in layers if kind is not None}


def is_linear(layer: nn.Module) -> bool:
    """Whether "all-linear" means this layer."""
    kind = KINDS.find(layer)
    return kind is not None and kind.linear
