"""An adapter of an image model under the names of a base's own modules.

A base is one model, whose paths have no part of a pipeline before them, or several. It may be
diffusers', or keep FLUX's weights or a UNet's as their first code does: ComfyUI's files are so.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ....adapter import Adapter
from ....errors import FileError, MismatchError, RefusedError
from ....lowrank import LowRank
from ....naming import Shape
from ....parts import LINEAR, PREFIX, Layout
from ....roles.names import weights_in
from ....words import some_of
from .flux import Piece, flux_pieces, to_flux
from .joining import joined
from .keys import MODEL, OWNED, PARTS
from .names import LYCORIS, OWNERS, of_sgm, parted, to_sgm

_PIPELINE = "model_index.json"  # of a folder with the models of a pipeline
# How the modules of a UNet or transformer are called where it is in something else.
_INSIDE = ("", "unet.", "transformer.", MODEL, f"model.{MODEL}")


def modules_of(base: Any) -> dict[str, Shape | None]:
    """{module path: shape of its weight} of a base: a model, a folder of one or of a pipeline.

    Raises:
        FileError, MismatchError: as `weights_in`.
    """
    if not isinstance(base, str | os.PathLike) or not os.path.isfile(Path(base) / _PIPELINE):
        return weights_in(base)
    folders = [part for part in PARTS if os.path.isdir(Path(base) / part)]
    if not folders:
        raise FileError(f"{base} has a {_PIPELINE}, and none of {', '.join(PARTS)}")
    return {
        f"{part}.{path}": shape
        for part in folders
        for path, shape in weights_in(Path(base) / part).items()
    }


def by_base(adapter: Adapter, names: Mapping[str, str], base: Any) -> Adapter:
    """The adapter under the names of the base's modules.

    Args:
        adapter: as it was read.
        names: {module path: its name in the file}.
        base: a model, its configuration or folder, that of a pipeline, or module paths. Those of
            several models have theirs before them: `unet.`, `text_encoder.`, `text_encoder_2.`.

    Raises:
        MismatchError: names that no module of the base is meant by, or several; all named. Or it
            has other shapes.
        RefusedError: something beside an update that the base keeps in one weight with others.
    """
    shapes = modules_of(base)
    on = matched(adapter, names, shapes)
    updates = {there: adapter[path] for path, there in on.moved.items()}
    for whole, parts in on.fused.items():
        updates[whole] = u = _joined(adapter, parts)
        _check_shape(whole, u, LINEAR, shapes)
    fused = {path for parts in on.fused.values() for path in parts}
    return replace(
        adapter,
        modules=updates,
        extras=_extras(adapter, on.moved, fused),
        layouts={on.moved[path]: layout for path, layout in on.layouts.items() if layout != LINEAR},
    )


@dataclass(frozen=True)
class Matched:
    """Where the modules of an adapter are in a base.

    Args:
        moved: {module path: the base's}.
        fused: {the base's path: {module path: which piece of it}}.
        layouts: {module path: Layout}, of those in `moved`.
    """

    moved: Mapping[str, str]
    fused: Mapping[str, Mapping[str, Piece]]
    layouts: Mapping[str, Layout]


def matched(
    adapter: Adapter, names: Mapping[str, str], shapes: Mapping[str, Shape | None]
) -> Matched:
    """Where the modules are; see `by_base`.

    Args:
        shapes: of `modules_of`.

    Raises:
        MismatchError: names that no module of the base is meant by, or other shapes.
    """
    modules: dict[str, list[str]] = {}
    for path in shapes:
        modules.setdefault(_flat(path), []).append(path)
    moved: dict[str, str] = {}
    fused: dict[str, dict[str, Piece]] = {}
    taken: set[str] = set()
    lost = []
    for path, name in names.items():
        found = next((modules[s] for s in _spellings(path, name) if s in modules), [])
        whole, piece = _fused(path, modules) if not found else (None, None)
        if whole is not None and piece is not None:
            fused.setdefault(whole, {})[path] = piece
        elif len(found) != 1 or found[0] in taken:
            lost.append(name)
        else:
            moved[path] = found[0]
            taken.add(found[0])
    if lost:
        raise MismatchError(
            f"no module of the base, or more than one, is meant by {some_of(lost)}; a base of "
            "several models is given as a list of all their modules, with 'unet.', "
            "'text_encoder.' and 'text_encoder_2.' before them"
        )
    layouts = {}
    for path, there in moved.items():
        u = adapter[path]
        layouts[path] = _layout(adapter.layout(path), u.shape, shapes[there])
        _check_shape(there, u, layouts[path], shapes)
    return Matched(moved, fused, layouts)


def _flat(path: str) -> str:
    return path.replace(".", "_")


def _spellings(path: str, name: str) -> list[str]:
    """What a base's module may be called, flattened; the surest first."""
    owned = OWNED.match(path)
    if owned is not None:
        rest = path[owned.end() :]
        starts = (f"{owned[1]}.", *(("",) if owned[1].startswith("text") else _INSIDE))
        return [_flat(start + r) for r in _rests(owned[1], rest) for start in starts]
    model, rest = parted(_flat(name))
    if not model:
        return list(dict.fromkeys(_flat(start + name.removeprefix(MODEL)) for start in _INSIDE))
    rests = [rest]
    if model == "lora_unet_":
        rests += [other] if (other := of_sgm(rest)) is not None else []
    elif model != LYCORIS:
        rests.append(rest.removeprefix("text_model_"))
    inside = _INSIDE if model in ("lora_unet_", "lora_transformer_", LYCORIS) else ("",)
    own = [] if model == LYCORIS else [f"{OWNERS[model]}."]
    return [_flat(start) + r for start in (*own, *inside) for r in rests]


def _rests(owner: str, rest: str) -> Iterable[str]:
    """What a module may be called within its model."""
    yield rest
    if owner.startswith("text_encoder"):
        yield rest.removeprefix("text_model.")  # which newer releases leave out
    elif owner == "unet":
        levels: tuple[Collection[int], ...] = ((), range(8))
        yield from (name for bare in levels if (name := to_sgm(rest, bare)) is not None)
    elif (found := to_flux(f"transformer.{rest}")) is not None and not found[1].is_cut:
        yield found[0]


def _fused(path: str, modules: Mapping[str, list[str]]) -> tuple[str | None, Piece | None]:
    """The module of the base that keeps this with others, or with its halves exchanged."""
    found = to_flux(path)
    if found is None or not found[1].is_cut:
        return None, None
    for start in _INSIDE:
        there = modules.get(_flat(start + found[0]), ())
        if len(there) == 1:
            return there[0], found[1]
    return None, None


def _joined(adapter: Adapter, parts: Mapping[str, Piece]) -> LowRank:
    path = next(iter(parts))
    found = to_flux(path)
    assert found is not None
    pieces = flux_pieces(_flat(found[0])) or ()
    update, _ = joined({piece.index[0]: adapter[p] for p, piece in parts.items()}, pieces)
    return update


def _layout(layout: Layout, shape: tuple[int, int], weight: Shape | None) -> Layout:
    """That of a convolution, where the file had its kernel flattened."""
    if layout != LINEAR or weight is None or len(weight) < 3 or weight[0] != shape[0]:
        return layout
    conv = Layout("conv", kernel=tuple(weight[1:]))
    return conv if shape[1] == math.prod(weight[1:]) else layout


def _check_shape(path: str, u: LowRank, layout: Layout, shapes: Mapping[str, Shape | None]) -> None:
    weight = shapes[path]
    if weight is not None and weight not in layout.shapes(*u.shape):
        raise MismatchError(
            f"{path!r} is {'×'.join(map(str, weight))} in the base, and its update "
            f"{u.shape[0]}×{u.shape[1]}: they do not fit"
        )


def _extras(adapter: Adapter, moved: Mapping[str, str], fused: Collection[str]) -> dict[str, Any]:
    extras = {}
    for key, t in adapter.extras.items():
        path, dot, what = key.removeprefix(PREFIX).rpartition(".")
        if path in fused:
            raise RefusedError(f"{key!r} has no place where {path!r} is in one weight with others")
        is_ours = key.startswith(PREFIX) and path in moved
        extras[f"{PREFIX}{moved[path]}{dot}{what}" if is_ours else key] = t
    return extras
