"""Adapters for MLX: one rank, one scale, every module by its full path.

`keys` are full paths, which mlx-lm finds anywhere in a model, so that `num_layers` has no say.
Smaller ranks are padded with zeros; the header's metadata names them, and reading takes the zeros
away again. A scale that all modules share stays what it is; others go into B.

mlx-lm takes the names of a checkpoint, but for experts, which it joins: `mlp.experts.3.up_proj` is
the fourth of `mlp.switch_mlp.up_proj`. That holds for the architectures listed here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ....adapter import Adapter
from ....errors import MismatchError, RefusedError
from ....lowrank import LowRank
from ....parts import PREFIX, refusal_reason
from ....words import some_of
from ...base import BaseFiles, read_base
from ...config import MLX_NAME
from ..baking import FLOATS, Part, on_checkpoint, padded, scaled
from ..reading import RANKS
from ..registry import Written
from .reading import MAGNITUDE, MIXTRAL

# By `model_type`: of these mlx-lm's modules were compared with the checkpoints' tensors.
DENSE = (
    *("cohere", "ernie4_5", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "granite", "helium"),
    *("llama", "mistral", "nemotron", "olmo2", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3"),
    *("stablelm", "starcoder2"),
)
OF_EXPERTS = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
_COUNTS = ("num_local_experts", "num_experts")  # what their configs call the number of experts

_EXPERT = re.compile(r"(?P<owner>.+)\.experts\.(?P<e>\d+)\.(?P<name>\w+)")
_NAMES = {w: name for name, w in MIXTRAL.items()}
_USUAL = re.compile(r"model\.layers\.\d+\.(self_attn|mlp|block_sparse_moe)(\.\w+)+|lm_head")


def _place(name: str) -> tuple[str, int | None]:
    """MLX's module for a checkpoint's, and which of its experts."""
    match = _EXPERT.fullmatch(name)
    if match is None:
        return name, None
    last = _NAMES.get(match["name"], match["name"])
    return f"{match['owner']}.switch_mlp.{last}", int(match["e"])


def mlx_form(
    adapter: Adapter,
    *,
    base: Any = None,
    base_model: str | None = None,
    dtype: torch.dtype | None = None,
) -> Written:
    """What `save(format="mlx")` writes.

    Args:
        adapter: what to write.
        base: the base's folder, where its names, or whether it ties its weights, count.
        base_model: its name.
        dtype: of the factors; by default their own, and float32 where baking a scale would round.

    Raises:
        RefusedError: a part that MLX has no place for, by name.
        MismatchError: it does not fit the base, or a name that is not known there.
    """
    magnitudes = _magnitudes(adapter)
    files = None if base is None else read_base(base)
    parts = list(_named(adapter) if files is None else _placed(adapter, files))
    scales = {part.update.scale for part in parts}
    scale = scales.pop() if len(scales) == 1 else None
    rank = max(part.update.rank for part in parts)
    modules = {part.name: _factors(part, rank, scale, dtype) for part in parts}
    if magnitudes and any(_place(part.name)[1] is not None for part in parts):
        raise RefusedError("MLX has no DoRA of experts: save it with format='peft'")
    tensors = _tensors(parts, modules, files)
    if magnitudes:
        tensors |= {f"{part.name}.m": magnitudes[part.path] for part in parts}
    parameters = {
        "rank": rank,
        "scale": 1.0 if scale is None else scale,
        "dropout": float(adapter.config.get("lora_dropout") or 0.0),
        "keys": list(dict.fromkeys(key.rpartition(".")[0] for key in tensors)),
    }
    config: dict[str, Any] = {
        "fine_tune_type": "dora" if magnitudes else "lora",
        "num_layers": -1,
        "lora_parameters": parameters,
    }
    name = base_model or adapter.base_model
    if name:
        config["model"] = name
    smaller = {part.name: part.update.rank for part in parts if part.update.rank < rank}
    metadata = {"format": "mlx", **({RANKS: json.dumps(smaller)} if smaller else {})}
    return Written(tensors, metadata, MLX_NAME, config)


def _magnitudes(adapter: Adapter) -> dict[str, Tensor]:
    """DoRA's, by module.

    Raises:
        RefusedError: anything else beside the updates, or an adapter that is no W + scale · B A.
    """
    found = {
        key.removeprefix(PREFIX).removesuffix(".weight").removesuffix(MAGNITUDE): key
        for key in adapter.extras
        if key.removesuffix(".weight").endswith(MAGNITUDE)
    }
    others = [key for key in adapter.extras if key not in found.values()]
    if others:
        raise RefusedError(
            f"MLX has no place for {some_of(others)}, which is no update of a module: save it "
            "with format='peft'"
        )
    if adapter.config.get("layer_replication"):
        raise RefusedError(
            "the adapter is for a model with its layers replicated (layer_replication), which MLX "
            "does not have: save it with format='peft'"
        )
    reason = refusal_reason({**adapter.config, "use_dora": False}, ())
    if reason is not None:
        raise RefusedError(f"MLX can't hold the adapter: {reason}")
    linear = {p for p in adapter.modules if adapter.layout(p).kind == "linear"}
    if (found or adapter.config.get("use_dora")) and not found.keys() == adapter.modules.keys() == (
        linear
    ):
        raise RefusedError(
            "MLX has DoRA of all modules or of none, and of linear layers alone: save it with "
            "format='peft'"
        )
    return {path: adapter.extras[key] for path, key in found.items()}


def _named(adapter: Adapter) -> Iterator[Part]:
    """The updates by the names that they have, without a base."""
    for path, u in adapter.modules.items():
        layout = adapter.layout(path)
        if layout.kind == "embedding":
            raise RefusedError(
                f"MLX applies the update of {path!r} to the output layer as well where the base "
                "has one weight for both: give base= (its folder), which says whether it has"
            )
        if layout.kind == "expert":
            raise MismatchError(
                f"{path!r} is an expert in one parameter with others: give base= (its folder), "
                "which says what MLX calls it"
            )
        if layout.kind != "linear" or layout.parameter != "weight" or layout.stem is not None:
            raise RefusedError(
                f"MLX has no place for {path!r} (a convolution, or a part of an attention): save "
                "it with format='peft'"
            )
        if not _USUAL.fullmatch(path):
            raise MismatchError(
                f"{path!r} is no name that MLX is known to have: give base= (its folder), which "
                "says what MLX calls it"
            )
        yield Part(path, u, path)


def _placed(adapter: Adapter, files: BaseFiles) -> Iterator[Part]:
    """The updates by the names that a checkpoint has for them."""
    kind = files.config.get("model_type")
    if kind not in (*DENSE, *OF_EXPERTS):
        raise MismatchError(
            f"{files.path} is of the architecture {kind!r:.40}, of which it is not known what MLX "
            f"calls its modules; known are {', '.join((*DENSE, *OF_EXPERTS))}"
        )
    named = files.named(adapter.parts.names())
    for part in on_checkpoint(adapter, named, files.path, "MLX"):
        if named.tied is not None and f"{part.name}.weight" in named.tied:
            raise RefusedError(
                f"{files.path} has one weight for embedding and output layer, and MLX applies "
                f"the update of {part.path!r} to both: save it with format='peft'"
            )
        yield part


def _factors(part: Part, rank: int, scale: float | None, dtype: torch.dtype | None) -> LowRank:
    """Of the common rank and, where there is none in common, of scale 1."""
    u = part.update
    try:
        found = padded(u.A, u.B if scale is not None else scaled(u.B, u.scale), rank)
        if dtype is not None:
            found = found.to(dtype=dtype)
    except MismatchError as e:
        raise MismatchError(f"module {part.name!r}: {e}") from e
    strange = [t.dtype for t in (found.A, found.B) if t.dtype not in FLOATS]
    if strange:
        raise MismatchError(
            f"module {part.name!r}: MLX does not run {strange[0]}: give dtype=torch.float32"
        )
    return found


def _tensors(
    parts: list[Part], modules: Mapping[str, LowRank], files: BaseFiles | None
) -> dict[str, Tensor]:
    """{key: factor}, experts joined; those that the adapter does not have are zero."""
    tensors: dict[str, Tensor] = {}
    experts: dict[str, dict[int, LowRank]] = {}
    for part in parts:
        path, e = _place(part.name)
        u = modules[part.name]
        if e is not None:
            experts.setdefault(path, {})[e] = u
        else:
            tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"] = u.A.T, u.B.T
    config = {} if files is None else files.config
    said = next((config[field] for field in _COUNTS if isinstance(config.get(field), int)), 0)
    for path, group in experts.items():
        some = next(iter(group.values()))
        none = LowRank(torch.zeros_like(some.A), torch.zeros_like(some.B))
        every = [group.get(e, none) for e in range(max(said, 1 + max(group)))]
        tensors[f"{path}.lora_a"] = torch.stack([u.A for u in every])
        tensors[f"{path}.lora_b"] = torch.stack([u.B for u in every])
    return tensors
