"""diffusers' files: three generations of names, all of them paths of its modules with dots.

Their keys are `keys`'; all are brought to those of the third, which is PEFT's, and read as such.

The part of the pipeline before a path may be missing where the file is of one model. The scale is
what `lora_adapter_metadata` in the header says, or an α beside the factors, else 1 at any rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from ....errors import MismatchError
from ....parts import PREFIX
from ...peft_keys import make_plan
from ..alphas import Alphas, alpha_keys, by_part, common_config, header_says
from ..peft import PEFT
from ..reading import Format, Found, Plan, Slot, Source, Stored, numbers_at, scaling_of, shapes_of
from .keys import (
    OLDER,
    OWNED,
    THIRD,
    is_comfy_name,
    is_of_diffusers,
    owner_of,
    path_in,
    third_generation,
)
from .names import with_text_model


def _claims(source: Source) -> bool:
    older = any(OLDER.fullmatch(key) and is_of_diffusers(key) for key in source.tensors)
    if older or source.has_config:
        return older
    if any(map(is_of_diffusers, source.tensors)):
        return True
    # A language model may have such a part, too: its adapter says no scale.
    if source.alpha is not None or any(map(is_comfy_name, source.tensors)):
        return False
    owned = any(OWNED.match(key) and THIRD.fullmatch(key) for key in source.tensors)
    return owned and header_says(source.metadata, source.where) == (None, None)


def _found(source: Source) -> Found:
    where = source.where
    if source.has_config:
        raise MismatchError(
            f"{where}: its tensors are in a form of diffusers, which says its scales itself, and "
            "there is an adapter_config.json as PEFT's have: remove the config, or give the "
            "tensors alone"
        )
    tensors = _renamed(source.tensors, third_generation, where)
    owner = owner_of(path for key in tensors if (path := path_in(key)) is not None)
    header, inside = header_says(source.metadata, where)
    parts = {} if inside is None else by_part(inside, where)
    if owner is not None:
        tensors = _renamed(tensors, lambda key: f"{owner}.{key}", where)
        parts = {owner: parts[""]} if parts.keys() == {""} else parts
    shapes = shapes_of(tensors)
    beside = alpha_keys(shapes)
    numbers = numbers_at(source, beside, tensors)
    alphas = Alphas(source.alpha, header, numbers, parts, of_rank=True)
    plan = make_plan(shapes, None, alphas, where)
    for path in plan.slots:
        if f"{path}.alpha" in plan.extra_keys:
            dtype, shape = shapes[f"{path}.alpha"]
            raise MismatchError(
                f"{where}: α of {path!r} must be one number, found {dtype} of shape {shape}"
            )
    plan, tensors, names = _canonical(plan, tensors, where)
    config = common_config(parts.values()) or scaling_of(plan.slots.values())
    return Found(plan, {**config, **source.origin()}, tensors, names, by_numbers=bool(beside))


def _renamed(
    tensors: Mapping[str, Stored], name: Callable[[str], str], where: str
) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for key, stored in tensors.items():
        twin = found.setdefault(name(key), stored)
        if twin is not stored:
            raise MismatchError(f"{where}: {twin.key!r} and {key!r} are the same tensor; keep one")
    return found


def _canonical(
    plan: Plan, tensors: Mapping[str, Stored], where: str
) -> tuple[Plan, dict[str, Stored], dict[str, str]]:
    """All under the paths that an image model's have here; and those that the file has."""
    slots: dict[str, Slot] = {}
    names: dict[str, str] = {}
    for path, slot in plan.slots.items():
        new = with_text_model(path)
        if new in slots:
            raise MismatchError(f"{where}: {names[new]!r} and {path!r} are one module; keep one")
        slots[new], names[new] = slot, path
    renamed = {key: with_text_model(key.removeprefix(PREFIX)) for key in plan.extra_keys}
    extras = {key: new if new != key.removeprefix(PREFIX) else key for key, new in renamed.items()}
    moved = {extras.get(key, key): stored for key, stored in tensors.items()}
    return replace(plan, slots=slots, extra_keys=tuple(extras.values())), moved, names


DIFFUSERS = Format("diffusers", "diffusers", _claims, _found, PEFT.factors)
