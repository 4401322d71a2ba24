"""Where every module of an adapter goes, from shapes alone: given ones, or a base's own.

Shapes are given by module path or by pattern, as in PEFT's `rank_pattern`: a regular expression
that must match the end of the path, from a dot on. A base is read by its headers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

from ..adapter import Adapter
from ..errors import MismatchError
from ..lowrank import LowRank
from ..parts import Layout
from ..roles import recognised
from ..roles.names import config_of
from ..words import did_you_mean, one_line
from .bases import tensors_of
from .job import Place

Shape = tuple[int, int]

_TURNED = {"gpt2", "imagegpt", "openai-gpt", "decision_transformer"}  # weights are (in, out)


def shape_of(value: Any, what: str = "shape") -> Shape:
    """(out, in), checked.

    Raises:
        MismatchError: no pair of whole numbers of at least 1.
    """
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        whole = (isinstance(n, Integral) and not isinstance(n, bool) for n in value)
        if all(whole) and min(value) >= 1:
            return int(value[0]), int(value[1])
    raise MismatchError(f"{what} must be (out, in), whole numbers above 0, found {one_line(value)}")


def places_given(adapter: Adapter, shape: Any) -> dict[str, Place]:
    """Each module's place under the shapes that a user gave; those not named stay as they are.

    Raises:
        MismatchError: no {path or pattern: (out, in)}, one that names no module, or that doesn't
            suit its layer.
    """
    if not isinstance(shape, Mapping) or not shape:
        raise MismatchError(
            f"shape must be {{module path or pattern: (out, in)}} for an adapter, found "
            f"{one_line(shape)}; '.*' stands for every module"
        )
    shapes = {str(key): shape_of(value, f"shape of {key!r}") for key, value in shape.items()}
    for pattern in shapes:
        if not any(_matches(pattern, path) for path in adapter.modules):
            hint = did_you_mean(pattern, adapter.modules)
            raise MismatchError(f"shape: {pattern!r} matches none of the modules; {hint}")
    places = {}
    for path, u in adapter.modules.items():
        named = [path] if path in shapes else [k for k in shapes if _matches(k, path)]
        new = shapes[named[0]] if named else u.shape
        places[path] = _place(path, path, u, adapter.layout(path), new)
    return places


def _matches(pattern: str, path: str) -> bool:
    try:
        return path == pattern or re.match(rf"(.*\.)?({pattern})$", path) is not None
    except re.error as e:
        raise MismatchError(f"shape: {pattern!r} is no regular expression: {e}") from e


def places_in(adapter: Adapter, target: Any) -> tuple[dict[str, Place], dict[str, str]]:
    """Each module's place in a base, by its name or else by its role, and why others have none.

    Raises:
        FileError: no base can be read there.
        MismatchError: it is none, or no module has a place.
    """
    tensors = tensors_of(target)
    base = tensors.named(adapter.parts.names())
    others = _by_role(adapter, target, tensors.keys)
    places, without = {}, {}
    for path, u in adapter.modules.items():
        layout, new = adapter.layout(path), path
        held = base.find(layout.weight_name(path))
        if held is None and path in others:
            new = others[path]
            held = base.find(f"{new}.weight")
        shape = None if held is None else _shape_in(held.shape, u, layout, adapter)
        if held is None:
            without[path] = _missing(path)
        elif not held.dtype.is_floating_point:
            without[path] = "the base keeps it quantised: give one in floats, or shape="
        elif shape is None:
            without[path] = f"the base stores it as {held.shape}"
        else:
            places[path] = _place(path, new, u, layout, shape)
    if not places:
        first, why = next(iter(without.items()))
        raise MismatchError(
            f"none of the {len(without)} modules has a counterpart in the target, e.g. {first!r}: "
            f"{why}"
        )
    return places, without


def _missing(path: str) -> str:
    role = recognised([path])[0].get(path)
    if role is not None and role.expert is not None:
        return (
            "one expert by itself, and the base has no module for it: experts that are kept in "
            "one parameter are not taken apart or put together"
        )
    return "not in the base, nor its role"


def _by_role(adapter: Adapter, target: Any, keys: Iterable[str]) -> dict[str, str]:
    """{path: that of its role in the target}, of linear layers of models of two kinds.

    Fused weights have no counterpart in split ones: only the effect, which plain resizings don't
    keep, would tell which part goes where. Nor have those that are stored transposed.
    """
    if adapter.config.get("fan_in_fan_out") or config_of(target).get("model_type") in _TURNED:
        return {}
    mine, _ = recognised(p for p in adapter.modules if adapter.layout(p).kind == "linear")
    paths = (key.removesuffix(".weight") for key in keys if key.endswith(".weight"))
    theirs = {role: path for path, role in recognised(paths)[0].items()}
    return {path: theirs[role] for path, role in mine.items() if role in theirs}


def _shape_in(weight: tuple[int, ...], u: LowRank, layout: Layout, adapter: Adapter) -> Any:
    """(out, in) of an update of a weight; None where it is no weight of that kind."""
    if layout.kind == "conv" and len(weight) == len(layout.kernel) + 1:
        return weight[0], math.prod(weight[1:])
    if len(weight) != (3 if layout.kind == "expert" else 2):
        return None
    turned = {
        "embedding": True,
        "expert": layout.transposed,
        "linear": bool(adapter.config.get("fan_in_fan_out")),
    }[layout.kind]
    return weight[:-3:-1] if turned else weight[-2:]


def _place(path: str, new: str, u: LowRank, layout: Layout, shape: Any) -> Place:
    if layout.kind == "conv":
        taps = math.prod(layout.kernel[1:])
        if shape[1] % taps:
            raise MismatchError(
                f"{path!r} is a convolution of {taps} numbers an input channel: {shape[1]} columns "
                "are no whole number of channels"
            )
        layout = replace(layout, kernel=(shape[1] // taps, *layout.kernel[1:]))
    return Place(new, (int(shape[0]), int(shape[1])), layout)
