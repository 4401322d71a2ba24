"""The formats that a base can be quantised to, and the layers that compute with them.

Every format scales a group of neighbouring weights of one row by their largest magnitude (in
bitsandbytes' 4 bits, groups run on from one row to the next):

- "nf4": 4 bits, whose levels are quantiles of a normal distribution (QLoRA, arXiv 2305.14314).
- "fp4": 4 bits, floating point.
- "int8": 8 bits by rows; in evaluation the inputs are rounded to 8 bits too (LLM.int8(), arXiv
  2208.07339).
- "int8_weight_only": 8 bits by groups; nothing but the weights is rounded.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import MismatchError, MissingExtraError
from ..words import one_of

ROW = "row"  # a group size: all of a row
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Format:
    """One format.

    Args:
        bits: per weight, scales apart. package: whose layers they are. extra: of ours, for it.
        sizes: of groups that it knows, the default one first.
    """

    bits: int
    package: str
    extra: str
    sizes: tuple[int | str, ...]


_FOUR = (64, 32, 128, 256, 512, 1024, 2048, 4096)
Kind: TypeAlias = Literal["nf4", "fp4", "int8", "int8_weight_only"]
FORMATS: dict[Kind, Format] = {
    "nf4": Format(4, "bitsandbytes", "qlora", _FOUR),
    "fp4": Format(4, "bitsandbytes", "qlora", _FOUR),
    "int8": Format(8, "bitsandbytes", "qlora", (ROW,)),
    "int8_weight_only": Format(8, "torchao", "torchao", (64, 32, 128, 256, ROW)),
}


@dataclass(frozen=True)
class Choice:
    """A format with its options, checked.

    Args:
        kind: of `FORMATS`. group_size: weights that share a scale, or "row".
        double_quant: the scales are quantised as well.
        compute_dtype: in which products are computed; None for that of the weights.
    """

    kind: Kind
    group_size: int | Literal["row"]
    double_quant: bool
    compute_dtype: torch.dtype | None

    @property
    def format(self) -> Format:
        """What the kind means."""
        return FORMATS[self.kind]


def chosen(
    bits: Any, kind: Any, group_size: Any, double_quant: bool, compute_dtype: torch.dtype | None
) -> Choice:
    """The options of `quantize_base`, checked.

    Raises:
        MismatchError: something that is not supported, with what is.
    """
    kinds = [k for k, f in FORMATS.items() if f.bits == bits]
    if not kinds:
        known = sorted({f.bits for f in FORMATS.values()})
        raise MismatchError(f"bits must be {one_of(known)}, found {bits!r}")
    kind = kinds[0] if kind is None else kind
    if kind not in kinds:
        raise MismatchError(f"kind must be {one_of(kinds)} at {bits} bits, found {kind!r}")
    sizes = FORMATS[kind].sizes
    group_size = sizes[0] if group_size is None else group_size
    if group_size not in sizes or isinstance(group_size, bool | float):
        others = {k: FORMATS[k].sizes for k in kinds if group_size in FORMATS[k].sizes}
        also = f" (or kind={next(iter(others))!r})" if others else ""
        raise MismatchError(
            f"group_size must be {one_of(_sorted(sizes))} for kind {kind!r}{also}, found "
            f"{group_size!r}"
        )
    if bits == 8 and (double_quant or compute_dtype is not None):
        option = "double_quant" if double_quant else "compute_dtype"
        raise MismatchError(f"{option}= is for 4 bits only: leave it out, or take bits=4")
    if compute_dtype not in (None, *FLOATS):
        names = [str(d).removeprefix("torch.") for d in FLOATS]
        raise MismatchError(f"compute_dtype must be {one_of(names)}, found {compute_dtype!r}")
    return Choice(kind, group_size, bool(double_quant), compute_dtype)


def package_of(choice: Choice) -> Any:
    """The package whose layers a format needs.

    Raises:
        MissingExtraError: it is not installed.
    """
    needed = choice.format
    try:
        return importlib.import_module(needed.package)
    except ImportError as e:
        raise MissingExtraError(
            f"kind {choice.kind!r} needs {needed.package}: pip install 'lorafold[{needed.extra}]'"
        ) from e


def quantized_linear(W: Tensor, choice: Choice) -> nn.Linear:
    """A linear layer without bias that holds W (out, in) quantised, on W's device."""
    W = W.detach().contiguous()
    if choice.kind == "int8":
        return _eight_bits(W, choice)
    if choice.kind == "int8_weight_only":
        return _weight_only(W, choice)
    return _four_bits(W, choice)


def _four_bits(W: Tensor, choice: Choice) -> nn.Linear:
    bnb = package_of(choice)
    codes, state = bnb.functional.quantize_4bit(
        W,
        blocksize=choice.group_size,
        compress_statistics=choice.double_quant,
        quant_type=choice.kind,
    )
    layer = bnb.nn.Linear4bit(
        W.shape[1],
        W.shape[0],
        bias=False,
        compute_dtype=choice.compute_dtype or W.dtype,
        compress_statistics=choice.double_quant,
        quant_type=choice.kind,
        device="meta",
    )
    layer.weight = bnb.nn.Params4bit(
        codes,
        requires_grad=False,
        quant_state=state,
        blocksize=choice.group_size,
        compress_statistics=choice.double_quant,
        quant_type=choice.kind,
        bnb_quantized=True,
    )
    layer.quant_state = state
    # Where a CPU has AVX512-BF16, evaluation would round scales and products to bfloat16, for good.
    layer.support_avx512bf16_for_cpu = False
    built: nn.Linear = layer
    return built


def _eight_bits(W: Tensor, choice: Choice) -> nn.Linear:
    bnb = package_of(choice)
    layer = bnb.nn.Linear8bitLt(
        W.shape[1], W.shape[0], bias=False, has_fp16_weights=False, device="meta"
    )
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(W.half())
    layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, CB=codes, SCB=scales)
    built: nn.Linear = layer
    return built


def _weight_only(W: Tensor, choice: Choice) -> nn.Linear:
    package_of(choice)
    ao: Any = importlib.import_module("torchao.quantization")
    size = choice.group_size
    groups = ao.PerRow() if size == ROW else ao.PerGroup(size)
    layer = _empty_linear(W)
    layer.weight = nn.Parameter(W, requires_grad=False)
    ao.quantize_(layer, ao.Int8WeightOnlyConfig(granularity=groups))
    built = _empty_linear(W)  # without what it puts on the instance
    built.weight = layer.weight
    return built


def _empty_linear(W: Tensor) -> nn.Linear:
    return nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")


def fits(shape: tuple[int, int], choice: Choice) -> str | None:
    """Why a weight (out, in) can't be quantised so; None where it can."""
    size = choice.group_size
    if choice.format.package == "torchao" and isinstance(size, int) and shape[1] % size:
        sizes = whole_groups(shape[1], choice)
        return f"its rows of {shape[1]} are no whole groups of {size}: {sizes}"
    return None if math.prod(shape) else "it is empty"


def whole_groups(width: int, choice: Choice) -> str:
    """What to do about rows of this width: other group sizes of the format that divide it."""
    others = [s for s in choice.format.sizes if s != choice.group_size]
    whole = [s for s in others if s == ROW or width % int(s) == 0]
    if not whole:
        return "leave it out (exclude=), or take bits=8"
    return f"group_size {one_of(_sorted(whole))}"


def _sorted(sizes: Iterable[int | str]) -> list[int | str]:
    return sorted(sizes, key=lambda size: (isinstance(size, str), size))
