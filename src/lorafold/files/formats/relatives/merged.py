"""Merged layers of loralib and of PEFT before 0.3: some of a fused layer's blocks are updated.

    <module>.lora_A (k·r, in)                      of the k blocks that are, one below the other
    <module>.lora_B (k·o, r) or (k·o, r, 1)

`enable_lora` in the config, [true, false, true] of query, key and value, says which of the n blocks
of the weight's rows (n·o, in) those are. Block by block: rows g·r … of A and g·o … of B are the
update of the g-th of them, with the scale α/r. As one update that is A itself and a B (n·o, k·r) of
blocks, zero elsewhere.

Source: https://github.com/microsoft/LoRA, `loralib/layers.py: MergedLinear`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ....errors import MismatchError
from ..reading import Shape

_FIELD = "enable_lora"


def blocks_of(config: Mapping[str, Any] | None) -> tuple[bool, ...]:
    """Which blocks of its layers a config says are updated; none where it says nothing of blocks.

    Raises:
        MismatchError: it is no list of true and false, or none of them is.
    """
    said = (config or {}).get(_FIELD)
    if said is None:
        return ()
    if not isinstance(said, list) or not all(type(x) is bool for x in said) or not any(said):
        raise MismatchError(f"{_FIELD} in the config must list true and false, found {said!r:.80}")
    return tuple(said)


def of_one_update(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the same updates, each as one of rank k·r.

    Raises:
        MismatchError: as `blocks_of`.
    """
    blocks = blocks_of(config)
    if not blocks:
        return config
    k = sum(blocks)
    kept = {key: value for key, value in config.items() if key not in (_FIELD, "merge_weights")}
    return {**kept, "r": k * config["r"], "lora_alpha": k * config["lora_alpha"]}


def merged_shape(key: str, A: Shape, B: Shape, blocks: tuple[bool, ...]) -> Shape:
    """The shape (n·o, k·r) of the one B that a B of blocks stands for.

    Raises:
        MismatchError: it is none.
    """
    k = sum(blocks)
    plain = len(A) == 2 and len(B) in (2, 3) and all(n == 1 for n in B[2:])
    if not plain or A[0] != k * B[1] or B[0] % k:
        raise MismatchError(
            f"{key!r} is {B}, and A {A}: with {k} of {len(blocks)} blocks ({_FIELD}) A would be "
            f"({k}·r, in) and B ({k}·o, r)"
        )
    return (B[0] // k * len(blocks), A[0])


def looks_merged(A: Shape, B: Shape) -> bool:
    """Whether two factors may be those of blocks."""
    plain = len(A) == 2 and len(B) in (2, 3) and all(n == 1 for n in B[2:])
    return plain and A[0] > B[1] and A[0] % B[1] == 0 and B[0] % (A[0] // B[1]) == 0


def merged_factor(B: Tensor, blocks: tuple[bool, ...]) -> Tensor:
    """The B (n·o, k·r) of a B (k·o, r) or (k·o, r, 1)."""
    B = B.flatten(1)
    k, r = sum(blocks), B.shape[1]
    o = len(B) // k
    whole = B.new_zeros(len(blocks) * o, k * r)
    for g, j in enumerate(j for j, is_updated in enumerate(blocks) if is_updated):
        whole[j * o : (j + 1) * o, g * r : (g + 1) * r] = B[g * o : (g + 1) * o]
    return whole
