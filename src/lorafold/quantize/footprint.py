"""What quantising a base saved and what it cost: bytes, scales counted, and errors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import MismatchError
from ..layers.modes import called, evaluating
from ..layers.storage import storage_of
from ..layers.swap import CHILD, base_modules
from ..words import Table, aligned, html_table

PROBES = 64  # inputs that a layer's forward is measured with


class HasModel(Protocol):
    """A handle on a model, as `lf.attach` returns it."""

    @property
    def model(self) -> nn.Module:
        """The model."""
        ...


class HasFiles(Protocol):
    """Adapters that were files, as a `Library` is."""

    @property
    def nbytes(self) -> int:
        """Bytes that they take now."""
        ...

    @property
    def file_bytes(self) -> int:
        """Bytes of their files."""
        ...


@dataclass(frozen=True)
class LayerFootprint:
    """One quantised layer.

    Args:
        path: of the layer. shape: (out, in) of its weight.
        before: bytes of the weight as it was. codes: bytes of the quantised numbers.
        scales: bytes of all else that they need: scales, scales of scales, tables.
        groups: how many scales there are. norm: ‖W‖.
        weight_error: ‖Ŵ − W‖ / ‖W‖. forward_error: the same of the layer's output without its
            bias, for normally distributed inputs, against W in float32.
    """

    path: str
    shape: tuple[int, int]
    before: int
    codes: int
    scales: int
    groups: int
    norm: float
    weight_error: float
    forward_error: float

    @property
    def after(self) -> int:
        """Bytes of the weight as it is now."""
        return self.codes + self.scales


@dataclass(frozen=True)
class Footprint(Table):
    """What `quantize_base` did.

    Args:
        layers: one each. bits, kind, group_size, double_quant: as chosen.
        compute_dtype: in which products are computed; None for that of the inputs.
        scale_dtype: in which the scales are stored.
        before, after: bytes of the whole model, other modules and all scales counted.
        in_16_bits: bytes of the whole model as it was, with floats of 16 bits where they had more.
        forward_error: ‖ŷ − y‖ / ‖y‖ of the model's output for the inputs given; None without.
        adapters, files: bytes of adapters, and of the files that they were folded from; see
            `with_adapters`.

    Not for: the memory of activations, gradients and an optimiser.
    """

    layers: tuple[LayerFootprint, ...]
    bits: int
    kind: str
    group_size: int | str
    double_quant: bool
    compute_dtype: torch.dtype | None
    scale_dtype: torch.dtype
    before: int = 0
    after: int = 0
    in_16_bits: int = 0
    forward_error: float | None = None
    adapters: int = 0
    files: int = 0

    @property
    def ratio(self) -> float:
        """before / after, of the quantised weights."""
        return sum(x.before for x in self.layers) / sum(x.after for x in self.layers)

    @property
    def weight_error(self) -> float:
        """‖Ŵ − W‖ / ‖W‖ over all layers."""
        norm = math.hypot(*(x.norm for x in self.layers))
        wrong = math.hypot(*(x.norm * x.weight_error for x in self.layers))
        return wrong / norm if norm else 0.0

    @property
    def total(self) -> int:
        """Bytes of the base as it is now and of the adapters."""
        return self.after + self.adapters

    @property
    def plain(self) -> int:
        """Bytes of the base in 16 bits and of the adapters' files."""
        return self.in_16_bits + self.files

    @property
    def total_ratio(self) -> float:
        """plain / total: what quantising the base and folding the adapters save together."""
        return self.plain / max(self.total, 1)

    def with_adapters(self, adapters: HasModel | HasFiles) -> Footprint:
        """The same with adapters.

        Args:
            adapters: what `lf.attach` returned, of which counts what is attached by now: its
                factors, their starts, reserved slots. Or a library: its bytes, and those of the
                files that it was folded from, which `plain` counts.

        Raises:
            MismatchError: it is neither.
        """
        if isinstance(model := getattr(adapters, "model", None), nn.Module):
            return replace(self, adapters=adapter_bytes(model), files=0)
        nbytes, files = (getattr(adapters, name, None) for name in ("nbytes", "file_bytes"))
        if not isinstance(nbytes, int) or not isinstance(files, int):
            raise MismatchError(
                "with_adapters takes what lf.attach returned, or a library, found "
                f"{type(adapters).__name__}"
            )
        return replace(self, adapters=nbytes, files=files)

    def rows(self) -> list[dict[str, Any]]:
        """A record of each layer: all that `LayerFootprint` has, and `after`."""
        return [{**vars(layer), "after": layer.after} for layer in self.layers]

    def _repr_html_(self) -> str:
        return html_table(f"{self._options()}. {self._bytes()}", map(_cells, self.layers), _HEAD)

    def __str__(self) -> str:
        rows = [_HEAD, *map(_cells, self.layers)]
        before, codes, scales = (
            sum(getattr(layer, name) for layer in self.layers)
            for name in ("before", "codes", "scales")
        )
        sums = (f"{before:,}", f"{codes:,}", f"{scales:,}", f"{self.ratio:.2f}")
        rows.append(("total", "", *sums, f"{self.weight_error:.3%}", ""))
        return "\n".join([*aligned(rows), self._options(), self._bytes()])

    def _options(self) -> str:
        computes = "the dtype of the inputs" if self.compute_dtype is None else self.compute_dtype
        twice = ", themselves quantised" if self.double_quant else ""
        groups = "a row" if isinstance(self.group_size, str) else f"{self.group_size} weights"
        count = sum(layer.groups for layer in self.layers)
        return (
            f"{self.kind}, {self.bits} bits, one scale for {groups}: {count:,} scales in "
            f"{_name(self.scale_dtype)}{twice}; products in {_name(computes)}"
        )

    def _bytes(self) -> str:
        text = f"model {self.before:,} → {self.after:,} bytes"
        if self.adapters:
            text += f"; with adapters {self.after:,} + {self.adapters:,} = {self.total:,}"
        if self.files:
            text += (
                f", {self.total_ratio:.2f} times less than in 16 bits with their files, "
                f"{self.in_16_bits:,} + {self.files:,} = {self.plain:,}"
            )
        if self.forward_error is not None:
            text += f"; error of its output {self.forward_error:.3%}"
        return text


_HEAD = ("layer", "weight", "before", "codes", "scales", "ratio", "error", "forward")


def _cells(layer: LayerFootprint) -> tuple[str, ...]:
    return (
        layer.path or "(the model)",
        f"{layer.shape[0]}×{layer.shape[1]}",
        f"{layer.before:,}",
        f"{layer.codes:,}",
        f"{layer.scales:,}",
        f"{layer.before / layer.after:.2f}",
        f"{layer.weight_error:.3%}",
        f"{layer.forward_error:.3%}",
    )


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's tensors without adapters; shared ones once, scales of codes included."""
    return _total(t for _, m in base_modules(model) for t in _tensors(m))


def bytes_in_16_bits(model: nn.Module) -> int:
    """Bytes of a model's tensors with floats of 16 bits where they have more."""
    tensors = [t for _, m in base_modules(model) for t in _tensors(m)]
    once = {(t.data_ptr(), t.nbytes): t for t in tensors}.values()
    return sum(
        t.nbytes // max(t.element_size() // 2, 1) if t.is_floating_point() else t.nbytes
        for t in once
    )


def adapter_bytes(model: nn.Module) -> int:
    """Bytes of the tensors of what is attached to a model."""
    return _total(t for m in _attached(model) for t in _tensors(m))


def _attached(model: nn.Module) -> Iterator[nn.Module]:
    return (m for path, m in model.named_modules() if CHILD in path.split("."))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    own: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    own |= dict(module.named_buffers(recurse=False))
    storage = storage_of(module)
    if storage.quantized:
        parts = storage.parts(module)
        own.pop("weight", None)
        yield from (parts.codes, *parts.rest)
    yield from own.values()


def _total(tensors: Iterator[Tensor]) -> int:
    return sum({(t.data_ptr(), t.nbytes): t.nbytes for t in tensors}.values())


def layer_footprint(path: str, W: Tensor, layer: nn.Module, dense: Tensor) -> LayerFootprint:
    """What became of one weight.

    Args:
        W: as it was, (out, in). layer: the quantised one, without a bias. dense: its weight.
    """
    parts = storage_of(layer).parts(layer)
    reference = W.detach().float()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(PROBES, W.shape[1], generator=g).to(W.device, W.dtype)
    with torch.no_grad():
        found = layer(x).float()
    return LayerFootprint(
        path,
        (W.shape[0], W.shape[1]),
        W.nbytes,
        parts.codes.nbytes,
        sum(t.nbytes for t in parts.rest),
        parts.scales.numel(),
        float(torch.linalg.vector_norm(reference)),
        relative(dense.float(), reference),
        relative(found, x.float() @ reference.T),
    )


def relative(found: Tensor, reference: Tensor) -> float:
    """‖found − reference‖ / ‖reference‖; 0 where both are 0."""
    norm = float(torch.linalg.vector_norm(reference.float()))
    difference = float(torch.linalg.vector_norm(found.float() - reference.float()))
    return difference / norm if norm else difference


def output_of(model: nn.Module, inputs: Any) -> Tensor:
    """The first floating point tensor that a model gives, in evaluation.

    Args:
        inputs: its argument, a tuple or list of them, or a mapping of keywords.
    """
    with evaluating(model):
        found = called(model, inputs)
    return next(t.clone() for t in _flat(found) if t.is_floating_point())


def _flat(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, Mapping | list | tuple):
        for part in x.values() if isinstance(x, Mapping) else x:
            yield from _flat(part)
