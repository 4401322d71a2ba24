"""Adapters of image models in kohya-ss's form, diffusers' and ComfyUI's: one file, scales in B.

kohya-ss says a scale for each module, and readers of its files (diffusers' for one) take it right
where it is the same for all of them. So smaller ranks are padded with zeros, and every `alpha` is
the rank, which is the factor 1. FLUX's files keep the rank of each, as joining makes them differ,
and their α's. diffusers' files say nothing of a scale, and ComfyUI's need not: it is 1.

The header of a file names what was padded, and the ranks of parts that were joined to one of FLUX's
weights; reading takes both apart again. It names the base, which the formats have no place for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ....adapter import Adapter
from ....errors import MismatchError, RefusedError
from ....lowrank import LowRank
from ....parts import LINEAR
from ..baking import padded, scaled
from ..reading import BASE_MODEL, RANKS
from ..registry import Written
from .flux import Piece, flux_pieces, to_flux
from .joining import joined
from .keys import ENCODERS, MODEL, OWNED
from .modules import Images, Module, images_of
from .names import is_flat_path, to_sgm


def kohya_form(
    adapter: Adapter,
    *,
    base: Any = None,
    base_model: str | None = None,
    dtype: torch.dtype | None = None,
) -> Written:
    """What `save(format="kohya")` writes.

    Args:
        adapter: what to write.
        base: the base of `by_base`; it tells SD 1 from XL where the modules do not.
        base_model: its name; by default the adapter's.
        dtype: of the factors; by default their own, and float32 where baking a scale would round.

    Raises:
        RefusedError: a part that the format has no place for, by name.
        MismatchError: a module that kohya-ss has no name for, or that does not fit the base.
    """
    images = images_of(adapter, "kohya-ss's form", base, dora=True, carries=True)
    modules, ranks = _named(images, _kohya_names(images), dtype)
    if not images.is_flux:
        rank = max(m.update.rank for m in modules.values())
        ranks |= {n: m.update.rank for n, m in modules.items() if m.update.rank < rank}
        modules = {name: _padded(m, rank) for name, m in modules.items()}
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        tensors |= _factors(name, module, ("lora_down", "lora_up"))
        tensors[f"{name}.alpha"] = torch.tensor(float(module.update.rank), dtype=torch.float32)
    return Written({**tensors, **images.carried}, _said(ranks, base_model or adapter.base_model))


def diffusers_form(
    adapter: Adapter,
    *,
    base: Any = None,
    base_model: str | None = None,
    dtype: torch.dtype | None = None,
) -> Written:
    """What `save(format="diffusers")` writes: the third generation, with nothing said of a scale.

    As `kohya_form`, but that DoRA has no place in it.
    """
    images = images_of(adapter, "diffusers' form", base, dora=False, carries=False)
    modules, _ = _named(images, _diffusers_name, dtype)
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        tensors |= _factors(name, module, ("lora_A", "lora_B"))
    return Written(tensors, _said({}, base_model or adapter.base_model))


def comfy_form(
    adapter: Adapter,
    *,
    base: Any = None,
    base_model: str | None = None,
    dtype: torch.dtype | None = None,
) -> Written:
    """What `save(format="comfy")` writes: ComfyUI's own names of the modules.

    As `kohya_form`, but with the ranks as they are.
    """
    images = images_of(adapter, "ComfyUI's form", base, dora=True, carries=False)
    modules, ranks = _named(images, _comfy_names(images), dtype)
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        tensors |= _factors(name, module, ("lora_down", "lora_up"))
    return Written(tensors, _said(ranks, base_model or adapter.base_model))


# Names: of one module, or of one and the piece of it that an update is


def _kohya_names(images: Images) -> Callable[[str], str | tuple[str, Piece] | None]:
    second = "lora_te3_" if images.is_flux else "lora_te2_"
    has_unet = any(module.path.startswith("unet.") for module in images.modules)
    several = images.is_flux or images.has_two_encoders or (has_unet and images.unet == "sdxl")
    encoders = {
        "text_encoder": "lora_te1_" if several else "lora_te_",
        "text_encoder_2": second,
        "text_encoder_3": "lora_te3_",
    }

    def name_of(path: str) -> str | tuple[str, Piece] | None:
        if is_flat_path(path):
            return path
        owned = OWNED.match(path)
        if owned is None:
            return None
        owner, rest = owned[1], path[owned.end() :]
        if owner in encoders:
            return encoders[owner] + _flat(rest)
        if owner == "transformer":
            found = to_flux(path)
            return None if found is None else (f"lora_unet_{_flat(found[0])}", found[1])
        sgm = to_sgm(rest) if images.unet == "sdxl" else rest
        return None if sgm is None else f"lora_unet_{_flat(sgm)}"

    return name_of


def _diffusers_name(path: str) -> str | None:
    return path if OWNED.match(path) else None


def _comfy_names(images: Images) -> Callable[[str], str | tuple[str, Piece] | None]:
    encoders = dict(ENCODERS)
    if images.is_flux:
        encoders["text_encoder_2"] = ENCODERS["text_encoder_3"]

    def name_of(path: str) -> str | tuple[str, Piece] | None:
        if path.startswith((MODEL, *ENCODERS.values())):
            return path
        owned = OWNED.match(path)
        if owned is None:
            return None
        owner, rest = owned[1], path[owned.end() :]
        if owner in encoders:
            return encoders[owner] + rest
        if owner == "transformer":
            found = to_flux(path)
            return None if found is None else (MODEL + found[0], found[1])
        # The one name in which they differ: whether a level has attentions before its upsampler.
        bare = (0,) if "upsamplers" in rest and images.unet == "sd1" else ()
        sgm = to_sgm(rest, bare)
        return None if sgm is None else MODEL + sgm

    return name_of


def _flat(path: str) -> str:
    return path.replace(".", "_")


def _named(
    images: Images,
    name_of: Callable[[str], str | tuple[str, Piece] | None],
    dtype: torch.dtype | None,
) -> tuple[dict[str, Module], dict[str, int | list[int]]]:
    """{name in the file: module of scale 1}, FLUX's joined; and the ranks of what was.

    Raises:
        MismatchError: modules without a name there; all named.
    """
    found: dict[str, Module] = {}
    parts: dict[str, dict[int, Module]] = {}
    lost = []
    for module in images.modules:
        name = name_of(module.path)
        if name is None:
            lost.append(module.path)
        elif isinstance(name, str):
            found[name] = module
        elif not name[1].is_cut:
            found[name[0]] = module
        else:
            parts.setdefault(name[0], {})[name[1].index[0]] = module
    if lost:
        raise MismatchError(
            f"there is no name for {', '.join(map(repr, lost[:4]))}{', …' if lost[4:] else ''} in "
            "this form: known are the modules of Stable Diffusion 1 and XL, of FLUX, and of their "
            "text encoders, as diffusers' pipelines call them"
        )
    ranks: dict[str, int | list[int]] = {}
    for name, group in parts.items():
        found[name], own = _joined(name, group)
        if own is not None:
            ranks[name] = own
    return {name: _baked(module, dtype) for name, module in found.items()}, ranks


def _joined(name: str, group: Mapping[int, Module]) -> tuple[Module, list[int] | None]:
    """The update of one of FLUX's weights, of what diffusers keeps in several.

    Raises:
        RefusedError: DoRA's, whose magnitudes are of the rows of each.
        MismatchError: parts that do not fit.
    """
    start = max(name.find("double_blocks"), name.find("single_blocks"), name.find("final_layer"))
    pieces = flux_pieces(_flat(name[start:]))
    assert pieces is not None
    dora = [module.path for module in group.values() if module.magnitudes is not None]
    if dora:
        raise RefusedError(f"{dora[0]!r} is DoRA's, and is a part of a weight in this form")
    update, ranks = joined({k: module.update for k, module in group.items()}, pieces)
    return Module(name, update, LINEAR), ranks


def _baked(module: Module, dtype: torch.dtype | None) -> Module:
    u = module.update
    try:
        baked = LowRank(u.A, scaled(u.B, u.scale))
        baked = baked if dtype is None else baked.to(dtype=dtype)
    except MismatchError as e:
        raise MismatchError(f"module {module.path!r}: {e}") from e
    return Module(module.path, baked, module.layout, module.magnitudes)


def _padded(module: Module, rank: int) -> Module:
    u = padded(module.update.A, module.update.B, rank)
    return Module(module.path, u, module.layout, module.magnitudes)


def _factors(name: str, module: Module, words: tuple[str, str]) -> dict[str, Tensor]:
    A, B = module.update.A, module.update.B
    ones: list[int] = []
    if module.layout.kind == "conv":
        ones = [1] * (len(module.layout.kernel) - 1)
        A, B = A.reshape(-1, *module.layout.kernel), B.reshape(*B.shape, *ones)
    tensors = {f"{name}.{words[0]}.weight": A, f"{name}.{words[1]}.weight": B}
    if module.magnitudes is not None:
        tensors[f"{name}.dora_scale"] = module.magnitudes.reshape(-1, 1, *ones)
    return tensors


def _said(ranks: Mapping[str, int | list[int]], name: str | None) -> dict[str, str]:
    told = {"format": "pt", **({RANKS: json.dumps(ranks, sort_keys=True)} if ranks else {})}
    return told | ({BASE_MODEL: name} if name else {})
