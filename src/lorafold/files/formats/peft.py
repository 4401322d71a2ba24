"""PEFT's own format: its keys and its config make the plan (`peft_keys`), its tensors are factors.

A file that no other format claims is taken for one, so what it is not is said here as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...errors import MismatchError
from ..config import checked
from ..peft_keys import is_factor, make_plan, plain_keys
from .alphas import Alphas, alpha_keys, by_part, common_config, header_says
from .diffusion.keys import is_of_images
from .reading import Format, Found, Slot, Source, numbers_at, shapes_of
from .relatives.merged import blocks_of, merged_factor, of_one_update
from .relatives.tinker import factors_of_expert


def _claims(source: Source) -> bool:
    if not any(map(is_factor, source.tensors)):
        return False
    return source.has_config or not any(map(is_of_images, source.tensors))


def _found(source: Source) -> Found:
    alphas, config = _said(source)
    tensors, config = plain_keys(source.tensors, config, source.where)
    shapes = shapes_of(tensors)
    beside = alpha_keys(shapes)
    alphas = replace(alphas, modules=numbers_at(source, beside, tensors))
    try:
        blocks = blocks_of(config)
    except MismatchError as e:
        raise MismatchError(f"{source.config_place or source.where}: {e}") from e
    config = None if config is None else of_one_update(config)
    plan = make_plan(shapes, config, alphas, source.where, blocks)
    kept = common_config(alphas.parts.values()) if config is None else config
    return Found(plan, {**kept, **source.origin()}, tensors, by_numbers=bool(beside))


def _said(source: Source) -> tuple[Alphas, dict[str, Any] | None]:
    """What is said of α, and the config: that in the header, where there is no other."""
    if source.has_config:
        source.refuse_alpha("there is a config, which has its own α")
    config = source.config()
    config = None if config is None else checked(config, source.config_place)
    header, inside = header_says(source.metadata, source.where)
    parts = {} if inside is None else by_part(inside, source.where)
    if config is None and parts.keys() == {""}:
        config = parts[""]
        source.refuse_alpha("there is a config, which has its own α")
    alphas = Alphas(source.alpha, header, parts=parts)
    if config is not None:
        try:
            alphas.check_header(config)
        except MismatchError as e:
            raise MismatchError(f"{source.where}: {e}") from e
    return alphas, config


def _factors(tensors: Sequence[Tensor], slot: Slot) -> tuple[Tensor, Tensor]:
    A, B = tensors
    if slot.part is not None:
        return factors_of_expert(A, B, slot.part[0])
    if slot.blocks:
        return A, merged_factor(B, slot.blocks)
    if slot.layout.expert is not None:
        e, count = slot.layout.expert
        if count > 1:
            # Contiguous copies, so that one expert does not keep all of them alive.
            A = A[e * slot.rank : (e + 1) * slot.rank].clone()
            B = B[:, e::count].contiguous()
    return A.flatten(1), B.flatten(1)


PEFT = Format("peft", "PEFT", _claims, _found, _factors)
