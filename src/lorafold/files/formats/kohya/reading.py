"""kohya-ss's files and LyCORIS's: one flat name for a module, and what is behind its last dot.

    lora_down (r, in, …), lora_up (out, r, 1, …)        ΔW = α/r · up down
    lora_mid (r, r, kh, kw), with a down of 1×1         the same, its down contracted with mid
    hada_w1_a (out, r), hada_w1_b (r, in), hada_w2_…    LoHa: ΔW = α/r · (w1a w1b) ∘ (w2a w2b)
    hada_t1, hada_t2 (r, r, kh, kw)                     with them w1a is (r, out), contracted alike
    lokr_w1 or lokr_w1_a, _b; lokr_w2 or …, lokr_t2     LoKr: ΔW = α/r · w1 ⊗ w2; 1 · for two full
    alpha                                               α; r where there is none
    dora_scale (out, 1, …) or (1, in, …)                DoRA's magnitudes, of rows or of columns
    diff, diff_b, w_norm, b_norm                        whole differences, carried as extras

What of it are products is `products`'.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ....errors import FileError, MismatchError
from ....parts import LINEAR, PREFIX, Layout
from ....words import some_of, warn
from ..alphas import Alphas, alpha_keys, header_says
from ..diffusion.cutting import cut_to, own_ranks, said_ranks
from ..diffusion.flux import Piece
from ..diffusion.keys import OWNED, is_comfy_name
from ..diffusion.names import is_flat_name, pieces_of
from ..foreign import DIFFERENCE, foreign
from ..reading import (
    RANKS,
    Format,
    Found,
    Plan,
    Shape,
    Slot,
    Source,
    Stored,
    Tensors,
    common_dtype,
    numbers_at,
    scaling_of,
    shapes_of,
)
from .keys import KEY, parsed, wide
from .products import kohya_cut, kohya_factors

_CARRIED = re.compile(r".+\.(?:alpha|dora_scale|diff|diff_b|w_norm|b_norm)")
_PEFT = re.compile(r"\.lora_(?:embedding_)?[AB](?:\.|$)")
_MAGNITUDE, _DORA = ".lora_magnitude_vector", ".dora_scale"
_FULL = "lokr_w1", "lokr_w2"


@dataclass(frozen=True)
class Grammar:
    """How a format of this family calls its modules.

    Args:
        said: what messages call the format.
        pattern: of a factor's key; `keys.parsed` takes it.
        flat: the flat name of one in a file, as kohya-ss would have it.
    """

    said: str
    pattern: re.Pattern[str]
    flat: Callable[[str], str]

    def pieces(self, names: Iterable[str], whole: Collection[str]) -> dict[str, tuple[Piece, ...]]:
        """{name in a file: the modules that it means}; see `pieces_of`."""
        flat = {name: self.flat(name) for name in names}
        found = pieces_of(flat.values(), {flat[name] for name in whole if name in flat})
        return {
            name: (Piece(name),) if found[to] == (Piece(to),) else found[to]
            for name, to in flat.items()
        }


def _claims(source: Source) -> bool:
    return any(
        is_flat_name(key) or ((found := parsed(key, KEY)) is not None and not _is_others(*found))
        for key in source.tensors
    )


def _is_others(name: str, what: str) -> bool:
    """Whether a factor with dots in its name is one of ComfyUI's, or a plain one of diffusers'."""
    return is_comfy_name(name) or (what.startswith("lora") and OWNED.match(name) is not None)


def found_by(source: Source, grammar: Grammar) -> Found:
    """What a file of this family holds."""
    names = dict.fromkeys(f[0] for key in source.tensors if (f := parsed(key, grammar.pattern)))
    whole = [key.removesuffix(_DORA) for key in source.tensors if key.endswith(_DORA)]
    pieces = grammar.pieces(names, whole)
    tensors = kohya_keys(source.tensors, {n: p[0].path for n, p in pieces.items() if len(p) == 1})
    # kohya-ss's resizing writes this in the place of a number, and each module's α beside it.
    told = {key: text for key, text in source.metadata.items() if text != "Dynamic"}
    shapes = shapes_of(tensors)
    beside = alpha_keys(shapes)
    numbers = numbers_at(source, beside, tensors)
    alphas = Alphas(source.alpha, header_says(told, source.where)[0], numbers)
    plan, config, looked = kohya_plan(source, shapes, alphas, pieces, grammar)
    if source.has_config:
        raise MismatchError(
            f"{source.where}: its tensors are in the form of {grammar.said}, which says its "
            "scales itself, and there is an adapter_config.json as PEFT's have: remove the config, "
            "or give the tensors alone"
        )
    named = {piece.path: name for name, parts in pieces.items() for piece in parts}
    return Found(
        plan,
        {**config, **source.origin(RANKS)},
        tensors,
        {path: named[path] for path in plan.slots},
        by_numbers=bool(beside) or looked,
    )


def factors_of(tensors: Sequence[Tensor], slot: Slot) -> tuple[Tensor, Tensor]:
    parts = dict(zip(slot.keys, tensors, strict=True))
    if slot.tolerance is None:
        A, B = kohya_factors(parts)
        return A.flatten(1), B.flatten(1)
    u = kohya_cut(parts, slot.tolerance).to(dtype=slot.dtype)
    return u.A, u.B


def kohya_keys(tensors: Mapping[str, Stored], paths: Mapping[str, str]) -> dict[str, Stored]:
    """Tensors under the keys that `kohya_plan` takes: magnitudes of rows as PEFT has them.

    Args:
        tensors: as the file has them.
        paths: {name in the file: module path}.
    """
    found: dict[str, Stored] = {}
    for key, value in tensors.items():
        path = paths.get(key.removesuffix(_DORA)) if key.endswith(_DORA) else None
        n, *rest = value.shape or (1,)
        if path is None or n == 1 or set(rest) != {1}:
            found[key] = value
        else:
            shape = (n,) if len(rest) == 1 else (1, n, *rest[1:])
            found[f"{PREFIX}{path}{_MAGNITUDE}"] = replace(value, shape=shape)
    return found


def kohya_plan(
    source: Source,
    tensors: Tensors,
    alphas: Alphas,
    pieces: Mapping[str, tuple[Piece, ...]],
    grammar: Grammar,
) -> tuple[Plan, dict[str, Any], bool]:
    """What a file holds, a config of what its scales do not say, and whether factors were read.

    Args:
        source: the file.
        tensors: {key: (dtype, shape)}, the keys as `kohya_keys` gives them.
        alphas: what is said of α.
        pieces: {name in the file: the modules that it means}.

    Raises:
        FileError: an algorithm that is not read, factors of PEFT beside these, or a product of
            full rank; naming file and key.
        MismatchError: naming file and module: a factor that is missing, shapes that do not fit,
            or two names of one module.
    """
    where, tolerance = source.where, source.tolerance
    found: dict[str, dict[str, str]] = {}
    others = []
    for key in tensors:
        key_says = parsed(key, grammar.pattern)
        if key_says is None:
            others.append(key)
        elif found.setdefault(key_says[0], {}).setdefault(key_says[1], key) != key:
            raise MismatchError(f"{where}: {key!r} is there twice, with .weight and without")
    _check_others(others, found, where)
    own = {name: t for name, t in alphas.modules.items() if f"{name}.alpha" in tensors}
    alphas = replace(alphas, modules=own)
    smaller = said_ranks(source)
    slots: dict[str, Slot] = {}
    looked = False
    for name, parts in found.items():
        try:
            slot = _slot(name, parts, tensors, alphas)
            slot = _checked_rank(slot, name, parts, where, tolerance)
            ranks = smaller.get(name)
            if ranks is None and pieces[name][0].index[1] > 1 and _is_plain(parts):
                ranks, read = own_ranks(source, parts["lora_up"], slot, pieces[name])
                looked = looked or read
            for path, part in cut_to(slot, pieces[name], ranks).items():
                if slots.setdefault(path, part) is not part:
                    raise MismatchError(f"it is another name of {path!r}, which the file has too")
        except MismatchError as e:
            raise MismatchError(f"{where}: module {name!r}: {e}") from e
    cut = [path for path, slot in slots.items() if slot.tolerance is not None]
    if cut:
        warn(
            f"{where}: {some_of(cut)} multiplied to full rank: cut, with a relative error of at "
            f"most {tolerance:g} in each"
        )
    used = {f"{name}.alpha" for name in found}
    dora = [key for key in others if key.endswith((_DORA, _MAGNITUDE))]
    _check_magnitudes(dora, tensors, slots, where)
    extras = tuple(key for key in others if key not in used)
    config: dict[str, Any] = {"use_dora": True} if dora else {}
    return Plan(slots, extras), config | scaling_of(slots.values()), looked


def _is_plain(parts: Mapping[str, str]) -> bool:
    return parts.keys() == {"lora_down", "lora_up"}


def _checked_rank(
    slot: Slot, name: str, parts: Mapping[str, str], where: str, tolerance: float | None
) -> Slot:
    """The slot, of one that has to be cut with the tolerance to cut it to.

    Raises:
        FileError: it has to be cut, and no tolerance is given.
    """
    if slot.rank < min(slot.shape) or "lora_down" in parts:
        return slot
    if tolerance is None:
        raise FileError(
            f"{where}: the factors of module {name!r} multiply to the rank {slot.rank}, "
            f"and its weight is {slot.shape[0]}×{slot.shape[1]}, so this is no update of "
            "low rank: cut it to a relative error (`lf.load(path, tolerance=0.01)`, "
            "`lorafold convert IN -o OUT --to peft --tolerance 0.01`), or "
            f"{DIFFERENCE}"
        )
    return replace(slot, tolerance=tolerance)


def _check_others(others: Iterable[str], found: Mapping[str, Any], where: str) -> None:
    left = [key for key in others if not _CARRIED.fullmatch(key)]
    told = foreign(left)
    if told is not None:
        raise FileError(f"{where}: {told}")
    peft = next((key for key in left if _PEFT.search(key)), None)
    if peft is not None:
        raise FileError(
            f"{where}: it holds factors of kohya-ss's form ({some_of(found, 1)}) and of PEFT's "
            f"({peft!r:.120}); one file holds one adapter"
        )
    unknown = next((key for key in left if is_flat_name(key)), None)
    if unknown is not None:
        raise FileError(
            f"{where}: this has an algorithm of LyCORIS ({unknown!r:.120}) which is not read: "
            f"{DIFFERENCE}"
        )


def _check_magnitudes(
    dora: Iterable[str], tensors: Tensors, slots: Mapping[str, Slot], where: str
) -> None:
    for key in dora:
        path = key.removeprefix(PREFIX).removesuffix(_MAGNITUDE)
        slot = slots.get(path)
        shape = tensors[key][1]
        if slot is not None and max(shape) != slot.shape[0]:
            raise MismatchError(
                f"{where}: 'dora_scale' of {path!r} has {max(shape)} magnitudes, and its update "
                f"{slot.shape[0]} rows"
            )


def _slot(name: str, parts: Mapping[str, str], tensors: Tensors, alphas: Alphas) -> Slot:
    """One module, by the shapes of what is there of it."""
    _check_whole(parts)
    for key in parts.values():
        kind, shape = tensors[key]
        if not kind.is_floating_point:
            raise MismatchError(f"{key!r} must be floating point, found {kind}")
        if len(shape) < 2 or 0 in shape:
            raise MismatchError(f"{key!r} has shape {shape}, which is none of a factor")
    shapes = {what: tensors[key][1] for what, key in parts.items()}
    dtype = functools.reduce(common_dtype, (tensors[key][0] for key in parts.values()))
    if not _is_plain(parts):
        dtype = wide(dtype)
    try:
        A, B = kohya_factors({key: _empty(tensors[key]) for key in parts.values()})
    except RuntimeError as e:  # torch's, of shapes that can't be multiplied
        raise MismatchError(f"its factors do not fit together: {shapes}") from e
    if A.shape[0] != B.shape[1] or B[0, 0].numel() != 1:
        raise MismatchError(f"its factors do not fit together: {shapes}")
    scale = 1.0
    dim = _dim(shapes)
    told = tensors.get(f"{name}.alpha")
    if told is not None and name not in alphas.modules:
        raise MismatchError(f"its α must be one number, found {told[0]} of shape {told[1]}")
    if dim is not None and alphas.known(name):
        scale = alphas.of(name, dim) / dim
    layout = LINEAR if A.ndim == 2 else Layout("conv", kernel=tuple(A.shape[1:]))
    first, second, *more = parts.values()
    shape = (B.shape[0], A[0].numel())
    return Slot(
        first, second, shape, len(A), scale, layout, dtype, form="kohya", others=tuple(more)
    )


def _check_whole(parts: Mapping[str, str]) -> None:
    """Refuse a module of which something is missing."""
    have = set(parts)
    needed: set[str] = set()
    if any(what.startswith("lora") for what in have):
        needed |= {"lora_down", "lora_up"}
    if any(what.startswith("hada") for what in have):
        needed |= {f"hada_w{n}_{side}" for n in (1, 2) for side in "ab"}
        needed |= {"hada_t1", "hada_t2"} if have & {"hada_t1", "hada_t2"} else set()
    if any(what.startswith("lokr") for what in have):
        for w in _FULL:
            needed |= {w} if w in have else {f"{w}_a", f"{w}_b"}
    strange = sorted(have - needed - {"lora_mid", "lokr_t2"})
    if len({what[:4] for what in have}) > 1 or strange:
        raise MismatchError(f"it has {some_of(sorted(parts))} at once")
    missing = sorted(needed - have)
    if missing:
        raise MismatchError(f"it has no {missing[0]}: the file is incomplete")


def _dim(shapes: Mapping[str, Shape]) -> int | None:
    """What α is divided by; None where the update has no α: both sides of a LoKr are full."""
    for what in ("lora_down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if what in shapes:
            return shapes[what][0]
    return None


def _empty(said: tuple[torch.dtype, Shape]) -> Tensor:
    return torch.empty(said[1], dtype=said[0], device="meta")


_GRAMMAR = Grammar("kohya-ss", KEY, str)


def _found(source: Source) -> Found:
    return found_by(source, _GRAMMAR)


KOHYA = Format("kohya", "kohya-ss", _claims, _found, factors_of)
