"""Tinker's adapters: PEFT's folder, with one name and one layout of its own.

    …model.unembed_tokens.lora_A.weight            the output layer, `lm_head`
    …mlp.experts.w1.lora_A.weight (E, r, in)       all experts of a layer; w1 gate, w2 down, w3 up
    …mlp.experts.w1.lora_B.weight (E, out, r)

A side that all experts share has one entry along the first axis. A projection that the model does
not have may be there without a number in it. Here each expert is a module by the name that a
checkpoint has for it, `mlp.experts.3.gate_proj`. (Not of GPT-OSS, whose parameters of all experts
interleave gate and up, so that nothing has the place of one.)

Source: tinker-cookbook, `weights/_merge.py` and `_merge_utils.py`, as of 2026.
"""

from __future__ import annotations

import math
import re

from torch import Tensor

from ....errors import MismatchError
from ..reading import Shape

_UNEMBED = re.compile(r"(?:model\.)?unembed_tokens(?=\.lora_[AB]\b)")
_EXPERTS = re.compile(r"(?P<owner>(?:.+\.)?experts)\.(?P<name>w[123]|(?:gate|up|down)_proj)")
_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def plain_head(key: str) -> str:
    """A key with the name that models have for the output layer.

    Examples:
        >>> plain_head("base_model.model.model.unembed_tokens.lora_A.weight")
        'base_model.model.lm_head.lora_A.weight'
    """
    return _UNEMBED.sub("lm_head", key)


def is_of_experts(stem: str, shape: Shape) -> bool:
    """Whether a factor is of all experts of a layer."""
    return len(shape) == 3 and _EXPERTS.fullmatch(stem) is not None


def is_placeholder(stem: str, shape: Shape) -> bool:
    """Whether a factor stands for a projection of experts that the model does not have."""
    return is_of_experts(stem, shape) and math.prod(shape) == 0


def experts_of(stem: str, A: Shape, B: Shape) -> list[str] | None:
    """The paths of the experts that two factors are of; None where they are of none.

    Raises:
        MismatchError: shapes that do not fit together.
    """
    if not is_of_experts(stem, A):
        return None
    counts = {A[0], B[0]}
    if len(B) != 3 or A[1] != B[2] or len(counts - {1}) > 1:
        raise MismatchError(
            f"{stem!r}: A {A} and B {B} are no factors of experts, (experts, r, in) and "
            "(experts, out, r)"
        )
    if counts == {1}:
        raise MismatchError(
            f"{stem!r}: A {A} and B {B} are both shared, so how many experts there are is not known"
        )
    match = _EXPERTS.fullmatch(stem)
    assert match is not None
    name = _NAMES.get(match["name"], match["name"])
    return [f"{match['owner']}.{e}.{name}" for e in range(max(counts))]


def factors_of_expert(A: Tensor, B: Tensor, e: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) of one expert, copied; of a side that is shared, that.

    Args:
        A: (E, r, in) or (1, r, in). B: (E, out, r) or (1, out, r). e: which.
    """
    a, b = (t[e if len(t) > 1 else 0].clone() for t in (A, B))
    return a, b
