"""Writing adapters in PEFT's format.

What to write follows from the adapter alone. Where the rank and scale of every module are what its
config says, tensors and config are written as they are. Otherwise the scale is baked into B and
α = r: plain LoRA, which every reader understands alike. Modules that PEFT cannot keep apart (the
experts of one parameter, the two projections of a MultiheadAttention) share one rank, the smaller
ones padded with zeros.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ..adapter import ORIGIN, Adapter
from ..errors import MismatchError, RefusedError
from ..lowrank import LowRank
from ..parts import PREFIX, extra_kind, lora_bias_path, scaling
from ..prefixes import Prefixes
from ..roles.roles import Tables
from ..words import one_line, warn
from .atomic import new_directory, new_file
from .config import (
    CARD,
    CARD_MARK,
    CONFIG_NAME,
    DIFFUSERS_NAME,
    MLX_NAME,
    PORTABLE_NAME,
    RECORD_NAME,
    STATE_NAME,
    WEIGHTS_NAME,
    as_json,
    plain,
)
from .find import is_adapter
from .formats.baking import padded, scaled
from .formats.portable import portable_form
from .formats.registry import FORMATS, Written, writer
from .opening import is_adapter_file
from .peft_keys import OUT_PROJ_TIMES, parameter_order, stem_scaling
from .peft_targets import exact_pattern, finds_module, parameters_of
from .replacing import FileKind, Kind
from .safetensors import save_tensors

T = TypeVar("T")


_FILES = (
    *(CONFIG_NAME, WEIGHTS_NAME, PORTABLE_NAME, MLX_NAME, DIFFUSERS_NAME, STATE_NAME, RECORD_NAME),
)

ADAPTER = Kind(
    "an adapter",
    is_adapter,
    re.compile("|".join(map(re.escape, _FILES))),
    marked={CARD: CARD_MARK},
    last=CONFIG_NAME,
)

# What PEFT writes for a plain LoRA; a config that is already there keeps its own values.
_DEFAULTS: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": None,
    "base_model_name_or_path": None,
    "revision": None,
    "auto_mapping": None,
    "inference_mode": True,
    "r": 1,
    "lora_alpha": 1,
    "lora_dropout": 0.0,
    "target_modules": None,
    "exclude_modules": None,
    "target_parameters": None,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "layer_replication": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "use_rslora": False,
    "use_dora": False,
}

# What described how the factors came about; a rewritten adapter has other factors.
_ORIGINS = ("eva_config", "corda_config", "lora_ga_config", "monteclora_config")


def save(
    adapter: Adapter,
    path: str | os.PathLike[str],
    *,
    format: Literal[  # noqa: A002
        "peft", "portable", "mlx", "gguf", "kohya", "diffusers", "comfy"
    ] = "peft",
    pad: bool = False,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    base_model: str | None = None,
    base: Any = None,
    tables: Tables = (),
) -> None:
    """Write an adapter, whole or not at all: as PEFT reads it, by roles, or for another program.

    An adapter as it was loaded comes out bit for bit, with every field of its config. One whose
    ranks or scales changed is written with the scale baked into B, α = r, and modules of other
    ranks named in `rank_pattern`.

    `format="portable"` names the updates by what their modules do (`lf.roles`): `lf.load` gives
    the adapter back bit for bit, and `lf.load(path, base=…)` puts it on another architecture of
    the same shapes.

    Not for: a training run that is to go on (`Live.save`), many adapters in few bytes (`fold`), or
    a whole model (`merge_into_weights`).

    Args:
        adapter: what to write.
        path: the directory to make, of this machine or a URL; the file, for formats that are one.
        format: "peft", "portable", "mlx": mlx-lm's folder, of one rank, a scale that all modules
            share kept and others in B; "gguf": a file for llama.cpp, every scale in B, of float32
            unless `dtype` is given; or one for an image model: "kohya" (kohya-ss's names, one
            rank), "diffusers", "comfy" (ComfyUI's names), each with the scales in B. What one has
            no place for is refused by name.
        pad: zero-pad all modules to one rank and write no patterns, the form that PEFT, vLLM and
            llama.cpp's converter agree on.
        overwrite: replace the adapter at `path`; other files in its folder stay.
        dtype: of the factors; by default their own (float32 where baking the scale would round).
        base_model: name or path of the base; by default the adapter's.
        base: for "portable", the base itself (a model, its configuration or folder), which says
            how fused modules pack their parts; by default `base_model`, if that is a folder. For
            "mlx" the base's folder: needed for embeddings and experts, and checked where given.
            For "gguf" the base's folder, a model, or its configuration: always needed. For image
            models the UNet, transformer or pipeline's folder: needed where the modules do not tell
            SD 1 from XL, and checked where given.
        tables: for "portable", of modules whose roles are not known; see `lf.roles`.

    Raises:
        FileError: something is at `path` and `overwrite` is False, or it is no adapter.
        RefusedError: a change was asked of an adapter that ΔW algebra is refused for, or a format
            that has no place for a part of it.
        MismatchError: modules that can't be in one file, an option of another format, modules
            without a role, or not in the base.
    """
    if format == "portable":
        if pad:
            raise MismatchError("pad= is for format='peft': a portable file has no patterns")
        named, metadata = portable_form(
            adapter, dtype=dtype, base_model=base_model, base=base, tables=tables
        )
        with new_directory(path, ADAPTER, overwrite=overwrite) as staging:
            save_tensors(_separate(named), staging / PORTABLE_NAME, metadata=metadata)
        return
    if format in FORMATS:
        if pad or tables:
            raise MismatchError(f"pad= and tables= are not for format={format!r}")
        form = writer(format)(adapter, base=base, base_model=base_model, dtype=dtype)
        _write(form, path, format, adapter.config.get(ORIGIN, {}), overwrite)
        return
    if format != "peft":
        known = ", ".join(map(repr, ("peft", "portable", *FORMATS)))
        raise MismatchError(f"format must be one of {known}, found {one_line(format)}")
    if base is not None or tables:
        raise MismatchError("base= and tables= are for other formats than 'peft'")
    tensors, config = peft_form(adapter, pad=pad, dtype=dtype, base_model=base_model)
    with new_directory(path, ADAPTER, overwrite=overwrite) as staging:
        write_form(staging, tensors, config)


def target_kind(format: str) -> Kind | FileKind:  # noqa: A002
    """What `save` writes of a format: a folder, or one file."""
    ending = FORMATS[format].ending if format in FORMATS else None
    if ending is None:
        return ADAPTER
    return FileKind(f"an adapter in the form of {format}", ending, is_adapter_file)


def _write(
    form: Written,
    path: str | os.PathLike[str],
    name: str,
    origin: Mapping[str, Any],
    overwrite: bool,
) -> None:
    """Write what the writer of a format gave."""
    kind = target_kind(name)
    tensors = _separate(form.tensors)
    metadata = {**origin.get("metadata", {}), **form.metadata}
    write = form.write or save_tensors
    if isinstance(kind, FileKind):
        if "record" in origin:
            warn(f"{path} is one file: the record of the adapter's dial is not in it")
        with new_file(path, kind, overwrite=overwrite) as staging:
            write(tensors, staging, metadata)
        return
    assert form.file is not None
    with new_directory(path, kind, overwrite=overwrite) as staging:
        write(tensors, staging / form.file, metadata)
        _write_beside(staging, origin)
        (staging / CONFIG_NAME).write_text(as_json(form.config), encoding="utf-8")


def write_form(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write what `peft_form` gave into a folder that is there."""
    config = dict(config)
    origin = config.pop(ORIGIN, {})
    try:
        text = as_json(plain(config))
    except TypeError as e:
        raise MismatchError(f"the adapter's config can't be written as JSON: {e}") from e
    metadata = {"format": "pt", **origin.get("metadata", {})}
    save_tensors(_separate(tensors), folder / WEIGHTS_NAME, metadata=metadata)
    _write_beside(folder, origin)
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")


def _write_beside(folder: Path, origin: Mapping[str, str]) -> None:
    """The model card and the record of a dial, where there are such."""
    if "card" in origin:
        (folder / CARD).write_text(f"{origin['card']}\n{CARD_MARK}\n", encoding="utf-8")
    if "record" in origin:
        (folder / RECORD_NAME).write_text(origin["record"], encoding="utf-8")


def peft_form(
    adapter: Adapter,
    *,
    pad: bool = False,
    dtype: torch.dtype | None = None,
    base_model: str | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and config that `save` writes."""
    config = dict(adapter.config)
    base = base_model or adapter.base_model
    if base and base != config.get("base_model_name_or_path"):
        config["base_model_name_or_path"] = base
    modules, extras = dict(adapter.modules), dict(adapter.extras)
    if pad or not _as_configured(adapter):
        if adapter.refusal is not None:
            raise RefusedError(f"the adapter can only be saved as it was loaded: {adapter.refusal}")
        modules, ranks = _baked(adapter, pad)
        _check_prefixes(adapter, modules)
        extras = _baked_biases(extras, config)
        config = _rewritten(config, ranks)
    if not config or "peft_type" not in config:
        config = {**_DEFAULTS, **config}
    if dtype is not None:
        modules = {p: _told(p, u.to, dtype=dtype) for p, u in modules.items()}
    tensors = _factor_tensors(adapter, modules)
    twice = sorted(tensors.keys() & extras.keys())
    if twice:
        raise MismatchError(f"{twice[0]!r} is both a module's factor and an extra; drop the extra")
    if not modules and adapter.refusal is None:  # a variant's own tensors are its reader's
        config = _with_saved_modules(config, extras)
    return {**tensors, **extras}, _retargeted(config, adapter)


def _with_saved_modules(config: dict[str, Any], extras: Iterable[str]) -> dict[str, Any]:
    """A config that says what the tensors are, of an adapter that has nothing else.

    Raises:
        MismatchError: one that lies in no module, and would not be read.
    """
    names = dict.fromkeys(str(name) for name in config.get("modules_to_save") or [])
    for key in extras:
        if extra_kind(key, config) == "unknown":
            module, _, _ = key.removeprefix(PREFIX).rpartition(".")
            if not module:
                raise MismatchError(
                    f"{key!r} alone is no adapter: the name of a module's tensor ends in .weight, "
                    ".bias or the like"
                )
            names[module.rpartition(".")[2]] = None
    return {**config, "modules_to_save": list(names)} if names else config


def _check_prefixes(adapter: Adapter, padded: Mapping[str, LowRank]) -> None:
    """Refuse padding that would change how strong rank prefixes are."""
    changed = [p for p, u in adapter.modules.items() if padded[p].rank != u.rank]
    if changed and Prefixes.of(adapter.config).power:
        raise RefusedError(
            "the adapter's rank prefixes are scaled by its ranks (rank_scaling), and "
            f"{changed[0]!r} would be padded to another: leave out pad=, or save adapter.nested()"
        )


def _as_configured(adapter: Adapter) -> bool:
    """Whether the config gives every module the rank and scale it has."""
    if "r" not in adapter.config or "lora_alpha" not in adapter.config:
        return not adapter.modules
    groups: Counter[str] = Counter()
    for p, u in adapter.modules.items():
        layout = adapter.layout(p)
        if (u.rank, u.scale) != stem_scaling(adapter.config, layout, p):
            return False
        if layout.expert is not None:
            groups[layout.group(p)] += 1
    # An expert that is missing has to be filled in, which is no longer the file as it was.
    return all(groups[k] == n for k, n in _expert_counts(adapter).items())


def _expert_counts(adapter: Adapter) -> dict[str, int]:
    counts: dict[str, int] = {}
    for p in adapter.modules:
        layout = adapter.layout(p)
        if layout.expert is None:
            continue
        key = layout.group(p)
        if counts.setdefault(key, layout.expert[1]) != layout.expert[1]:
            raise MismatchError(f"the modules of {key!r} disagree on the number of experts")
    return counts


def _baked(adapter: Adapter, pad: bool) -> tuple[dict[str, LowRank], dict[str, int]]:
    """Modules of scale 1, padded to one rank per pattern key; and those ranks."""
    ranks: dict[str, int] = {}
    for p, u in adapter.modules.items():
        key = adapter.layout(p).group(p)
        ranks[key] = max(ranks.get(key, 1), u.rank)
    if pad and ranks:
        ranks = dict.fromkeys(ranks, max(ranks.values()))
    modules = {}
    for p, u in adapter.modules.items():
        layout = adapter.layout(p)
        scale = u.scale / OUT_PROJ_TIMES if layout.is_out_proj else u.scale
        modules[p] = padded(u.A, _told(p, scaled, u.B, scale), ranks[layout.group(p)])
    return modules, ranks


def _told(path: str, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """What a function makes of a module, which an error is said to be of."""
    try:
        return function(*args, **kwargs)
    except MismatchError as e:
        raise MismatchError(f"module {path!r}: {e}") from e


def _baked_biases(extras: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """LoRA biases times the scale that the config gave them, which is 1 from now on."""
    result = dict(extras)
    for key, value in extras.items():
        if extra_kind(key, config) == "lora bias":
            result[key] = scaled(value, scaling(config, lora_bias_path(key))[1])
    return result


def _rewritten(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    """The config of the baked modules: α = r, patterns only where ranks differ."""
    new = {**_DEFAULTS, **config}
    # The most frequent rank is the rule, the rest are the exceptions.
    r = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    # A bare path is matched as the end of a name, so it would also hit other modules.
    patterns = {"^" + re.escape(key): rank for key, rank in ranks.items() if rank != r}
    new.update(r=r, lora_alpha=r, rank_pattern=patterns, alpha_pattern=dict(patterns))
    new.update(use_rslora=False, init_lora_weights=True)
    if new.get("loftq_config"):
        new["loftq_config"] = {}
    new.update({field: None for field in _ORIGINS if new.get(field)})
    return new


def _retargeted(config: dict[str, Any], adapter: Adapter) -> dict[str, Any]:
    """The config, with targets that find every module of the adapter."""
    modules: list[str] = []
    parameters: list[str] = []
    for p in adapter.modules:
        layout = adapter.layout(p)
        key = layout.group(p)
        (parameters if layout.kind == "expert" else modules).append(key)
    new = dict(config)
    if not all(finds_module(config, m) for m in modules):
        pattern = exact_pattern(dict.fromkeys(modules))
        new.update(target_modules=pattern, exclude_modules=None)
        new.update(layers_to_transform=None, layers_pattern=None)
    elif not modules and parameters and config.get("target_modules") is None:
        new["target_modules"] = []  # None would mean PEFT's own choice for the architecture
    parameters = list(dict.fromkeys(parameters))
    owners = {name.rpartition(".")[0] for name in parameters}
    named = {f"{owner}.{name}" for owner in owners for name in parameters_of(config, owner)}
    # One named too many would nest PEFT's wrappers, and so the keys, in another way.
    if named != set(parameters):
        new["target_parameters"] = parameters
    return new


def _factor_tensors(adapter: Adapter, modules: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """{file key: factor}, experts joined."""
    tensors: dict[str, Tensor] = {}
    stems = _wrapper_stems(adapter)
    experts: dict[str, list[tuple[int, LowRank]]] = {}
    for p, u in modules.items():
        layout = adapter.layout(p)
        if layout.expert is not None:
            experts.setdefault(layout.group(p), []).append((layout.expert[0], u))
            continue
        stem, A, B = PREFIX + (layout.stem or p), u.A, u.B
        if layout.kind == "embedding":
            tensors[f"{stem}.lora_embedding_A"], tensors[f"{stem}.lora_embedding_B"] = A, B
            continue
        if layout.kind == "conv":
            A = A.reshape(-1, *layout.kernel)
            B = B.reshape(*B.shape, *[1] * (len(layout.kernel) - 1))
        tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = A, B
    counts = _expert_counts(adapter)
    for key, parts in experts.items():
        A, B = _joined(dict(parts), counts[key])
        stem = PREFIX + stems[key]
        tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = A, B
    return tensors


def _joined(experts: Mapping[int, LowRank], count: int) -> tuple[Tensor, Tensor]:
    """A (E·r, in) and B (out, E·r) of one parameter; experts that are not there are zero."""
    some = next(iter(experts.values()))
    none = LowRank(torch.zeros_like(some.A), torch.zeros_like(some.B))
    parts = [experts.get(e, none) for e in range(count)]
    # The expert varies slowest in A's rows and fastest in B's columns.
    return torch.cat([u.A for u in parts]), torch.stack([u.B for u in parts], 2).flatten(1)


def _wrapper_stems(adapter: Adapter) -> dict[str, str]:
    """{parameter: stem in the file}: PEFT nests the wrappers of one module's parameters."""
    owners: dict[str, dict[str, int]] = {}
    for p in adapter.modules:
        layout = adapter.layout(p)
        if layout.kind == "expert":
            owner, _, name = layout.group(p).rpartition(".")
            depth = (layout.stem or "").removeprefix(owner).count(".base_layer")
            owners.setdefault(owner, {})[name] = depth
    stems = {}
    for owner, depths in owners.items():
        names = list(depths)
        if len(set(depths.values())) == len(names):
            order = sorted(names, key=lambda name: -depths[name])  # as they were in the file
        else:
            order = parameter_order(names)
        for outside, name in enumerate(reversed(order)):
            stems[f"{owner}.{name}"] = owner + ".base_layer" * outside
    return stems


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, no two sharing memory, as the format wants them."""
    seen: set[int] = set()
    result = {}
    for key, tensor in tensors.items():
        t = tensor.detach().cpu().contiguous()
        storage = t.untyped_storage()
        shared = storage.data_ptr() in seen or storage.nbytes() != t.nbytes
        result[key] = t.clone() if shared else t
        seen.add(result[key].untyped_storage().data_ptr())
    return result
