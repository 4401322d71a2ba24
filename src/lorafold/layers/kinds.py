"""The kinds of layer that take an update, and the two products each is made of.

For every kind ΔW x is `up(down(x))`: `down` goes to the r numbers per position, `up` to the layer's
output. For a linear layer these are x Aᵀ and h Bᵀ; an embedding picks columns of A; a convolution
with (r, in/1 · kernel) as its kernel is followed by one of size 1.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RefusedError
from ..parts import Layout
from .storage import is_quantized, weight_of


class Kind(Protocol):
    """How one kind of layer is updated.

    Attributes:
        channel: the axis of h and of the output that holds the r or out numbers.
        plain: whether h is x Aᵀ and the change h Bᵀ.
    """

    channel: int
    plain: bool

    def dims(self, layer: Any) -> tuple[int, int]:
        """(out, in) of the layer's update."""
        ...

    def down(self, layer: Any, x: Tensor, A: Tensor) -> Tensor:
        """h of x for A (k, in)."""
        ...

    def up(self, layer: Any, h: Tensor, B: Tensor) -> Tensor:
        """The output's change for B (out, k)."""
        ...

    def added(self, layer: Any, y: Tensor, h: Tensor, Bt: Tensor, coefficient: float) -> Tensor:
        """y plus coefficient times the change for Bt (k, out)."""
        ...

    def rows_down(self, layer: Any, x: Tensor, A: Tensor, ids: Tensor) -> Tensor:
        """h (rows, n, K · R) of x (rows · m, ...) for A (slots, R, in), the slots ids (rows, K)."""
        ...

    def rows_up(self, layer: Any, y: Tensor, h: Tensor, Bt: Tensor) -> Tensor:
        """y (rows · m, ...) plus the change for Bt (rows, K · R, out)."""
        ...


class _Linear:
    channel = -1
    plain = True

    def dims(self, layer: Any) -> tuple[int, int]:
        return int(layer.out_features), int(layer.in_features)

    def down(self, layer: Any, x: Tensor, A: Tensor) -> Tensor:
        return F.linear(x.to(A.dtype), A)

    def up(self, layer: Any, h: Tensor, B: Tensor) -> Tensor:
        return F.linear(h, B)

    def added(self, layer: Any, y: Tensor, h: Tensor, Bt: Tensor, coefficient: float) -> Tensor:
        if y.dtype != h.dtype:
            return y + (coefficient * (h @ Bt)).to(y.dtype)
        flat, h = y.reshape(-1, y.shape[-1]), h.reshape(-1, len(Bt))
        in_place = not torch.is_grad_enabled() and Bt.dtype == h.dtype  # not so under autocast
        if in_place and layer._swapped.forward is nn.Linear.forward:
            # Nobody else has this output, and copying it takes longer than adding to it.
            return flat.addmm_(h, Bt, alpha=coefficient).view(y.shape)
        return torch.addmm(flat, h, Bt, alpha=coefficient).view(y.shape)

    def rows_down(self, layer: Any, x: Tensor, A: Tensor, ids: Tensor) -> Tensor:
        return torch.bmm(x.to(A.dtype).reshape(len(ids), -1, x.shape[-1]), of_rows(A, ids).mT)

    def rows_up(self, layer: Any, y: Tensor, h: Tensor, Bt: Tensor) -> Tensor:
        flat = y.reshape(len(Bt), -1, y.shape[-1])
        if flat.dtype == h.dtype:
            return torch.baddbmm(flat, h, Bt).view(y.shape)
        return (flat + torch.bmm(h, Bt).to(y.dtype)).view(y.shape)


class _Conv1D(_Linear):  # transformers' linear layer with the weight stored (in, out)
    def dims(self, layer: Any) -> tuple[int, int]:
        return int(layer.weight.shape[1]), int(layer.weight.shape[0])


class _Embedding(_Linear):
    plain = False

    def dims(self, layer: Any) -> tuple[int, int]:
        return int(layer.embedding_dim), int(layer.num_embeddings)

    def down(self, layer: Any, x: Tensor, A: Tensor) -> Tensor:
        h: Tensor = F.embedding(x, A.mT, layer.padding_idx) * _embed_scale(layer, A)
        return h

    def rows_down(self, layer: Any, x: Tensor, A: Tensor, ids: Tensor) -> Tensor:
        tokens = x.reshape(len(ids), -1)  # only their columns are read
        h = A.mT[ids[:, None, :], tokens[:, :, None]]  # (rows, n, K, R)
        scaled: Tensor = h.flatten(2) * _embed_scale(layer, A)
        return scaled


def _embed_scale(layer: Any, like: Tensor) -> Any:
    """The factor by which some models' embeddings multiply what they look up."""
    scale = getattr(layer, "embed_scale", None)
    return scale.to(like.dtype) if isinstance(scale, Tensor) else 1.0 if scale is None else scale


class _Conv:
    channel = 1
    plain = False

    def dims(self, layer: Any) -> tuple[int, int]:
        return int(layer.out_channels), int(layer.in_channels) * math.prod(layer.kernel_size)

    def down(self, layer: Any, x: Tensor, A: Tensor) -> Tensor:
        return self._conv(layer, x, A.reshape(-1, layer.in_channels, *layer.kernel_size), 1)

    def up(self, layer: Any, h: Tensor, B: Tensor) -> Tensor:
        return torch.movedim(torch.movedim(h, 1, -1) @ B.mT, -1, 1)

    def added(self, layer: Any, y: Tensor, h: Tensor, Bt: Tensor, coefficient: float) -> Tensor:
        delta = coefficient * self.up(layer, h, Bt.mT)
        return y + delta.to(y.dtype)

    def rows_down(self, layer: Any, x: Tensor, A: Tensor, ids: Tensor) -> Tensor:
        # One grouped convolution, a group for each row.
        A = of_rows(A, ids)
        rows, k, m = len(A), A.shape[1], x.shape[0] // len(A)
        spatial = x.shape[2:]
        x = x.reshape(rows, m, -1, *spatial).transpose(0, 1).reshape(m, -1, *spatial)
        h = self._conv(layer, x, A.reshape(rows * k, -1, *layer.kernel_size), rows)
        return h.reshape(m, rows, k, -1).permute(1, 0, 3, 2).reshape(rows, -1, k)

    def rows_up(self, layer: Any, y: Tensor, h: Tensor, Bt: Tensor) -> Tensor:
        rows, m, out = len(Bt), y.shape[0] // len(Bt), y.shape[1]
        delta = torch.bmm(h, Bt).reshape(rows, m, -1, out).transpose(2, 3)
        return y + delta.reshape(y.shape).to(y.dtype)

    def _conv(self, layer: Any, x: Tensor, kernel: Tensor, groups: int) -> Tensor:
        x, padding = x.to(kernel.dtype), layer.padding
        if layer.padding_mode != "zeros":
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
            padding = 0
        conv: Any = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[kernel.ndim]
        result: Tensor = conv(x, kernel, None, layer.stride, padding, layer.dilation, groups)
        return result


def of_rows(A: Tensor, ids: Tensor) -> Tensor:
    """The slots ids (rows, K) of A (slots, R, d), one below the other: (rows, K · R, d)."""
    return A.index_select(0, ids.flatten()).view(len(ids), -1, A.shape[2])


LINEAR, CONV1D, EMBEDDING, CONV = _Linear(), _Conv1D(), _Embedding(), _Conv()


def is_transposed(layer: nn.Module) -> bool:
    """Whether it is transformers' `Conv1D`, which stores its weight (in, out)."""
    return any(c.__name__ == "Conv1D" and hasattr(layer, "nf") for c in type(layer).__mro__)


def kind_of(layer: nn.Module, path: str) -> Kind:
    """The kind of a layer.

    Raises:
        RefusedError: a layer that takes no update, or whose effect would be wrong; naming it.
    """
    if "forward" in vars(layer):
        raise RefusedError(
            f"module {path!r} has a forward of its own on the instance (a hook of accelerate's, "
            "or a patch): remove it before attaching"
        )
    if isinstance(layer, nn.Linear):
        return LINEAR
    if is_transposed(layer):
        return CONV1D
    if isinstance(layer, nn.Embedding):
        if layer.max_norm is not None:
            raise RefusedError(
                f"module {path!r} renormalises its rows (max_norm): attach elsewhere"
            )
        if type(layer).forward is not nn.Embedding.forward and not hasattr(layer, "embed_scale"):
            raise RefusedError(
                f"module {path!r} is a {type(layer).__name__}, whose forward looks up something "
                "else than its input: merge the adapter instead (adapter.apply_to)"
            )
        return EMBEDDING
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if layer.groups != 1:
            raise RefusedError(
                f"module {path!r} is a grouped convolution, whose update is not one product B A: "
                "leave it out"
            )
        return CONV
    raise RefusedError(
        f"module {path!r} is a {type(layer).__name__}, which takes no update; linear, Conv1D, "
        "embedding and convolution layers do"
    )


def takes_update(layer: nn.Module) -> bool:
    """Whether "all-linear" means this layer."""
    return isinstance(layer, nn.Linear) or is_transposed(layer)


def is_layer(module: nn.Module) -> bool:
    """Whether it is of a type that takes updates, and not a container or a norm."""
    types = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return isinstance(module, types) or is_transposed(module)


def layout_of(layer: Any, kind: Kind) -> Layout:
    """How the layer's weight relates to its update."""
    if kind is EMBEDDING:
        return Layout("embedding")
    if kind is CONV:
        return Layout("conv", kernel=tuple(layer.weight.shape[1:]))
    return Layout()


def num_weights(layer: nn.Module, kind: Kind) -> int:
    """Numbers in the layer's weight."""
    return math.prod(kind.dims(layer))


def weight_matrix(layer: Any, kind: Kind) -> Tensor:
    """The layer's weight as (out, in) float32, dequantised where it is quantised."""
    out, inner = kind.dims(layer)
    W = weight_of(layer) if is_quantized(layer) else layer.weight.detach()
    W = W.float()
    if is_transposed(layer) or isinstance(layer, nn.Embedding):
        W = W.T
    return W.reshape(out, inner)
