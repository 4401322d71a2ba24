"""kohya-ss's files and LyCORIS's: one flat name for a module, and what is behind its last dot.

    lora_down (r, in, …), lora_up (out, r, 1, …)        ΔW = α/r · up down
    lora_mid (r, r, kh, kw), with a down of 1×1         the same, its down contracted with mid
    hada_w1_a (out, r), hada_w1_b (r, in), hada_w2_…    LoHa: ΔW = α/r · (w1a w1b) ∘ (w2a w2b)
    hada_t1, hada_t2 (r, r, kh, kw)                     with them w1a is (r, out), contracted alike
    lokr_w1 or lokr_w1_a, _b; lokr_w2 or …, lokr_t2     LoKr: ΔW = α/r · w1 ⊗ w2; 1 · for two full
    alpha                                               α; r where there is none
    dora_scale (out, 1, …) or (1, in, …)                DoRA's magnitudes, of rows or of columns
    diff, diff_b, w_norm, b_norm                        whole differences, carried as extras

Products of factors are factors. A Hadamard product has the row-wise Kronecker product of its left
factors and the column-wise one of its right ones (Khatri–Rao): (w1a w1b) ∘ (w2a w2b) = B A with
B[o, (j, k)] = w1a[o, j] w2a[o, k]. A Kronecker product has those of each side: (P Q) ⊗ (R S) =
(P ⊗ R)(Q ⊗ S), where a full w is I w or w I, the smaller of both. So nothing is decomposed or
rounded, except once to float32, in which products of narrower numbers are exact.
(LyCORIS: Yeh et al. 2024, arXiv 2309.14859.)
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ....errors import FileError, MismatchError
from ....lowrank import LowRank, from_svd, kept_directions
from ....parts import LINEAR, PREFIX, Layout
from ....words import some_of, warn
from ..alphas import Alphas, alpha_keys, header_says
from ..foreign import DIFFERENCE, foreign
from ..reading import (
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
from .names import is_flat_name, paths_of

_KEY = re.compile(
    r"(?P<name>.+)\.(?:(?P<plain>lora_(?:down|up|mid))(?:\.weight)?"
    r"|(?P<product>hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)))"
)
_CARRIED = re.compile(r".+\.(?:alpha|dora_scale|diff|diff_b|w_norm|b_norm)")
_PEFT = re.compile(r"\.lora_(?:embedding_)?[AB](?:\.|$)")
_MAGNITUDE, _DORA = ".lora_magnitude_vector", ".dora_scale"
_FULL = "lokr_w1", "lokr_w2"


def _claims(source: Source) -> bool:
    return any(is_flat_name(key) or _KEY.fullmatch(key) for key in source.tensors)


def _found(source: Source) -> Found:
    names = dict.fromkeys(m["name"] for m in map(_KEY.fullmatch, source.tensors) if m is not None)
    paths = paths_of(names)
    tensors = kohya_keys(source.tensors, paths)
    # kohya-ss's resizing writes this in the place of a number, and each module's α beside it.
    told = {key: text for key, text in source.metadata.items() if text != "Dynamic"}
    shapes = shapes_of(tensors)
    beside = alpha_keys(shapes)
    numbers = numbers_at(source, beside, tensors)
    alphas = Alphas(source.alpha, header_says(told, source.where)[0], numbers)
    plan, config = kohya_plan(shapes, alphas, source.where, source.tolerance)
    if source.has_config:
        raise MismatchError(
            f"{source.where}: its tensors are in the form of kohya-ss, which says its scales "
            "itself, and there is an adapter_config.json as PEFT's have: remove the config, or "
            "give the tensors alone"
        )
    return Found(
        plan,
        {**config, **source.origin()},
        tensors,
        {path: name for name, path in paths.items()},
        by_numbers=bool(beside),
    )


def _factors(tensors: Sequence[Tensor], slot: Slot) -> tuple[Tensor, Tensor]:
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


def kohya_factors(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A (r, in) or (r, in, kh, kw), and B (out, r, …) of what a file holds for one module.

    Args:
        tensors: {key: tensor}; those of products, and of three factors, come in float32 at least.
    """
    t = {_what(key): value for key, value in tensors.items()}
    if "lora_down" in t and "lora_mid" not in t:
        return t["lora_down"], t["lora_up"]
    dtype = _wide(functools.reduce(common_dtype, (value.dtype for value in t.values())))
    t = {what: value.double() for what, value in t.items()}
    if "lora_mid" in t:
        A, B = _contracted(t["lora_mid"], t["lora_down"].flatten(1)), t["lora_up"]
    elif "hada_w1_a" in t:
        A, B = _hadamard(*(_pair(t, f"hada_w{n}", f"hada_t{n}") for n in (1, 2)))
    else:
        A, B = _kronecker(*(_pair(t, f"lokr_w{n}", f"lokr_t{n}") for n in (1, 2)))
    return A.to(dtype), B.to(dtype)


def kohya_cut(tensors: Mapping[str, Tensor], tolerance: float) -> LowRank:
    """What LoHa or LoKr stands for before its scale, by the fewest directions within `tolerance`.

    The singular values of w1 ⊗ w2 are the products of theirs, so that each is decomposed alone.
    """
    t = {_what(key): value.double() for key, value in tensors.items()}
    if "hada_w1_a" in t:
        A, B = _hadamard(*(_pair(t, f"hada_w{n}", f"hada_t{n}") for n in (1, 2)))
        return LowRank(A.flatten(1), B).truncate(tolerance=tolerance)
    pairs = (_pair(t, f"lokr_w{n}", f"lokr_t{n}") for n in (1, 2))
    (U1, S1, V1), (U2, S2, V2) = (LowRank(A.flatten(1), B.flatten(1)).svd() for A, B in pairs)
    S, order = (S1[:, None] * S2).flatten().sort(descending=True)
    k = kept_directions(S, tolerance=tolerance)
    i, j = order[:k] // len(S2), order[:k] % len(S2)
    U = (U1[:, None, i] * U2[:, j]).flatten(0, 1)
    return from_svd(U, S[:k], (V1[i, :, None] * V2[j, None]).flatten(1))


def _what(key: str) -> str:
    match = _KEY.fullmatch(key)
    assert match is not None
    return match["plain"] or match["product"]


def _contracted(core: Tensor, down: Tensor) -> Tensor:
    return torch.einsum("ij...,jp->ip...", core, down)


def _pair(t: Mapping[str, Tensor], w: str, core: str) -> tuple[Tensor, Tensor]:
    """Right and left factor of one side of a product."""
    if w not in t:
        a, b = t[f"{w}_a"], t[f"{w}_b"]
        return (b, a) if core not in t else (_contracted(t[core], b), a.T)
    whole = t[w]
    flat = whole.flatten(1)
    out, inner = flat.shape
    if out <= inner:
        return whole, torch.eye(out, dtype=whole.dtype, device=whole.device)
    one = torch.eye(inner, dtype=whole.dtype, device=whole.device)
    return one.reshape(inner, *whole.shape[1:]), flat


def _hadamard(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    (A1, B1), (A2, B2) = first, second
    if A1.shape[1:] != A2.shape[1:] or len(B1) != len(B2):
        raise RuntimeError("the two sides of its product are of different sizes")
    return (A1[:, None] * A2).flatten(0, 1), (B1[:, :, None] * B2[:, None]).flatten(1)


def _kronecker(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    (A1, B1), (A2, B2) = ((A.contiguous(), B.contiguous()) for A, B in (first, second))
    return torch.kron(A1.reshape(*A1.shape, *[1] * (A2.ndim - A1.ndim)), A2), torch.kron(B1, B2)


def kohya_plan(
    tensors: Tensors, alphas: Alphas, where: str, tolerance: float | None = None
) -> tuple[Plan, dict[str, Any]]:
    """What a file holds, and a config of what its scales do not say.

    Args:
        tensors: {key: (dtype, shape)}, the keys as `kohya_keys` gives them.
        alphas: what is said of α.
        where: the file, for messages.
        tolerance: relative error of products of full rank, which are cut.

    Raises:
        FileError: an algorithm that is not read, factors of PEFT beside these, or a product of
            full rank; naming file and key.
        MismatchError: naming file and module: a factor that is missing, shapes that do not fit,
            or two names of one module.
    """
    found: dict[str, dict[str, str]] = {}
    others = []
    for key in tensors:
        match = _KEY.fullmatch(key)
        if match is None:
            others.append(key)
        elif found.setdefault(match["name"], {}).setdefault(_what(key), key) != key:
            raise MismatchError(f"{where}: {key!r} is there twice, with .weight and without")
    _check_others(others, found, where)
    own = {name: t for name, t in alphas.modules.items() if f"{name}.alpha" in tensors}
    alphas = replace(alphas, modules=own)
    paths = paths_of(found)
    slots: dict[str, Slot] = {}
    for name, parts in found.items():
        path = paths[name]
        try:
            slot = _slot(name, parts, tensors, alphas)
        except MismatchError as e:
            raise MismatchError(f"{where}: module {name!r}: {e}") from e
        if slot.rank >= min(slot.shape) and "lora_down" not in parts:
            if tolerance is None:
                raise FileError(
                    f"{where}: the factors of module {name!r} multiply to the rank {slot.rank}, "
                    f"and its weight is {slot.shape[0]}×{slot.shape[1]}, so this is no update of "
                    "low rank: cut it to a relative error (`lf.load(path, tolerance=0.01)`, "
                    "`lorafold convert IN -o OUT --to peft --tolerance 0.01`), or "
                    f"{DIFFERENCE}"
                )
            slot = replace(slot, tolerance=tolerance)
        if slots.setdefault(path, slot) is not slot:
            raise MismatchError(f"{where}: {name!r} is another name of {path!r}, which it has too")
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
    return Plan(slots, extras), config | scaling_of(slots.values())


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
    if parts.keys() != {"lora_down", "lora_up"}:
        dtype = _wide(dtype)
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


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What products are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _empty(said: tuple[torch.dtype, Shape]) -> Tensor:
    return torch.empty(said[1], dtype=said[0], device="meta")


KOHYA = Format("kohya", "kohya-ss", _claims, _found, _factors)
