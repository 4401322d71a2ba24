"""MLX's adapters: `adapters.safetensors` and `adapter_config.json` in a folder, as mlx-lm has them.

    <path>.lora_a (in, r), .lora_b (r, out)             ΔW = scale · (a b)ᵀ
    <path>.lora_a (vocab, r), .lora_b (r, dim)          of an embedding: the update is (dim, vocab)
    <path>.lora_a (E, r, in), .lora_b (E, out, r)       of E experts, also with a (E·r, in)
    <path>.m (out,)                                     DoRA's magnitudes

The config's `lora_parameters` have one rank and one `scale`, which is the whole factor; an `alpha`
beside it means nothing. Experts that are one module there, `mlp.switch_mlp.gate_proj`, are one each
here, under the names of a checkpoint, `mlp.experts.3.gate_proj`.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ....errors import FileError, MismatchError
from ....naming import Base
from ....parts import LINEAR, PREFIX, Layout
from ....words import some_of, warn
from ...config import json_object
from ..reading import (
    RANKS,
    Format,
    Found,
    Plan,
    Slot,
    Source,
    Tensors,
    common_dtype,
    scaling_of,
    shapes_of,
)

_T = TypeVar("_T")
_Pair = dict[str, str]  # {"a", "b": key}

_KEY = re.compile(r"(?P<path>.+)\.(?:lora_(?P<side>[ab])|(?P<m>m))")
MAGNITUDE = ".lora_magnitude_vector"
_SWITCH = re.compile(r"(?P<owner>.+)\.switch_mlp\.(?P<name>gate_proj|up_proj|down_proj)")
# What checkpoints of Mixtral call them, whose experts are a `block_sparse_moe`.
MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def _claims(source: Source) -> bool:
    return any(match["side"] for key in source.tensors if (match := _KEY.fullmatch(key)))


def _found(source: Source) -> Found:
    tensors = mlx_keys(source.tensors, source.where)
    said, where = source.config(), source.where
    plan, config = mlx_plan(shapes_of(tensors), said, source.alpha, where, source.metadata)
    return Found(plan, {**config, **source.origin(RANKS)}, tensors)


def mlx_keys(tensors: Mapping[str, _T], where: str) -> dict[str, _T]:
    """Tensors under the keys that `mlx_plan` takes: those of magnitudes as PEFT has them.

    Raises:
        MismatchError: two keys that are one.
    """
    found: dict[str, _T] = {}
    for key, value in tensors.items():
        path = key.removesuffix(".m")
        is_magnitude = path != key and f"{path}.lora_a" in tensors
        name = f"{PREFIX}{path}{MAGNITUDE}" if is_magnitude else key
        if name in found or (is_magnitude and name in tensors):
            raise MismatchError(f"{where}: {key!r} and {name!r} are the same tensor; keep one")
        found[name] = value
    return found


def _factors(tensors: Sequence[Tensor], slot: Slot) -> tuple[Tensor, Tensor]:
    """Contiguous copies.

    Raises:
        MismatchError: what the header says is padding is not zero.
    """
    a, b = tensors
    if slot.part is None:
        A, B = a.T, b.T
    else:
        e, count = slot.part
        A, B = a.reshape(count, -1, a.shape[-1])[e], b[e]
    if bool(A[slot.rank :].any()) or bool(B[:, slot.rank :].any()):
        raise MismatchError(
            f"its rank is not the {slot.rank} that {RANKS!r} in the header says: remove that"
        )
    A, B = A[: slot.rank], B[:, : slot.rank]
    # So that one expert, or what was cut off, does not keep all of them alive.
    return A.clone(memory_format=torch.contiguous_format), B.clone(
        memory_format=torch.contiguous_format
    )


def mlx_plan(
    tensors: Tensors,
    said: Mapping[str, Any] | None,
    alpha: float | None,
    where: str,
    metadata: Mapping[str, str] | None = None,
) -> tuple[Plan, dict[str, Any]]:
    """What an MLX file holds, and a config that says the same in PEFT's words.

    Args:
        tensors: {key: (dtype, shape)}, the keys as `mlx_keys` gives them.
        said: its config; None where there is none.
        alpha: α, where there is no config; its rank is then the factors' own.
        where: the file, for messages.
        metadata: of its header.

    Raises:
        FileError: no scale, or a config of another kind.
        MismatchError: naming file and key: a factor without the other, shapes that do not fit, or
            experts of which it is not known how a checkpoint calls them.
    """
    pairs, others = _pairs(tensors, where)
    dora = sorted(key for key in others if key.endswith(MAGNITUDE))
    rank, scale, config = _configured(said, alpha, where)
    _check_dora(dora, pairs, said, where)
    embedding = Base({f"{path}.weight": ((), None) for path in pairs}).embedding()
    smaller = _ranks(metadata or {}, where)
    slots: dict[str, Slot] = {}
    for path, pair in pairs.items():
        is_embedding = f"{path}.weight" == embedding
        if is_embedding and dora:
            raise MismatchError(f"{where}: DoRA of the embedding {path!r} is not read")
        layout = Layout("embedding") if is_embedding else LINEAR
        try:
            found = _slots(path, pair, tensors, layout)
            for name, slot in found.items():
                if rank is not None and slot.rank != rank:
                    raise MismatchError(f"its rank is {slot.rank}, and the config says {rank}")
                factor = (alpha or 0.0) / slot.rank if scale is None else scale
                if name in slots:
                    raise MismatchError(f"{name!r} is in the file twice; keep one")
                own = min(smaller.get(name, slot.rank), slot.rank)
                slots[name] = replace(slot, scale=factor, rank=own)
        except MismatchError as e:
            raise MismatchError(f"{where}: module {path!r}: {e}") from e
    if embedding is not None and not any(path.endswith("lm_head") for path in pairs):
        warn(
            f"{where}: {embedding.removesuffix('.weight')!r} is of the embedding alone here; MLX "
            "applies it to the output layer as well where the base has one weight for both"
        )
    config |= {"use_dora": True} if dora else {}
    config |= {} if scale is None else scaling_of(slots.values())
    return Plan(slots, tuple(others)), config


def _pairs(tensors: Tensors, where: str) -> tuple[dict[str, _Pair], list[str]]:
    pairs: dict[str, _Pair] = {}
    others = []
    for key, (dtype, shape) in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or match["side"] is None:
            others.append(key)
            continue
        if not dtype.is_floating_point:
            raise MismatchError(f"{where}: {key!r} must be floating point, found {dtype}")
        if len(shape) not in (2, 3) or 0 in shape:
            raise MismatchError(
                f"{where}: {key!r} has shape {shape}, a factor has two dimensions or three, and no "
                "empty one"
            )
        pairs.setdefault(match["path"], {})[match["side"]] = key
    for path, pair in pairs.items():
        if len(pair) == 1:
            (there,) = pair.values()
            other = "a" if "b" in pair else "b"
            raise MismatchError(
                f"{where}: {there!r} has no partner {path}.lora_{other}: the file is incomplete"
            )
    return pairs, others


def _configured(
    said: Mapping[str, Any] | None, alpha: float | None, where: str
) -> tuple[int | None, float | None, dict[str, Any]]:
    """Rank and scale as the config says them, and what else it says that is of the adapter."""
    if said is None:
        if alpha is None:
            raise FileError(
                f"{where}: there is no adapter_config.json beside it, so the scale is unknown; "
                "give alpha= (MLX's scale times the rank)"
            )
        return None, None, {}
    if alpha is not None:
        raise MismatchError(f"{where}: there is a config, which has its scale; leave out alpha=")
    parameters = said.get("lora_parameters")
    kind = said.get("fine_tune_type", "lora")
    if not isinstance(parameters, Mapping) or kind not in ("lora", "dora"):
        raise FileError(
            f"{where}: its tensors are MLX's, but adapter_config.json is not one of MLX's LoRA "
            f"(fine_tune_type 'lora' or 'dora', and lora_parameters): correct it"
        )
    scale = _number(parameters, "scale", where)
    rank = parameters.get("rank")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int)):
        raise FileError(f"{where}: 'rank' in lora_parameters must be a whole number, found {rank}")
    config: dict[str, Any] = {}
    if isinstance(said.get("model"), str):
        config["base_model_name_or_path"] = said["model"]
    if parameters.get("dropout"):
        config["lora_dropout"] = _number(parameters, "dropout", where)
    return rank, scale, config


def _ranks(metadata: Mapping[str, str], where: str) -> dict[str, int]:
    """{module: rank} of those that lorafold has padded."""
    if RANKS not in metadata:
        return {}
    found = json_object(metadata[RANKS], f"{where}: {RANKS} in the header")
    if not all(type(rank) is int and rank >= 1 for rank in found.values()):
        raise FileError(f"{where}: {RANKS} in the header must give whole numbers")
    return found


def _number(parameters: Mapping[str, Any], name: str, where: str) -> float:
    value = parameters.get(name)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is None or not number or not abs(value) <= sys.float_info.max:
        why = "; it is the whole factor of the update, α / rank" if name == "scale" else ""
        raise FileError(
            f"{where}: {name!r} in the config's lora_parameters must be a number, found "
            f"{value!r:.40}{why}"
        )
    return float(value)


def _check_dora(
    dora: list[str], pairs: Mapping[str, _Pair], said: Mapping[str, Any] | None, where: str
) -> None:
    have = {key.removeprefix(PREFIX).removesuffix(MAGNITUDE) for key in dora}
    is_dora = bool(dora) if said is None else said.get("fine_tune_type") == "dora"
    lacking = [path for path in pairs if (path in have) != is_dora]
    if lacking:
        has = "no magnitudes (.m)" if is_dora else "magnitudes (.m), which are DoRA's"
        raise MismatchError(
            f"{where}: {some_of(lacking)} {'has' if len(lacking) == 1 else 'have'} {has}: correct "
            "the fine_tune_type in its config, or the file is incomplete"
        )


def _slots(path: str, pair: _Pair, tensors: Tensors, layout: Layout) -> dict[str, Slot]:
    """The modules that a pair stands for: one, or one for each expert; of scale 1."""
    keys = (pair["a"], pair["b"])
    a, b = (tensors[key][1] for key in keys)
    dtype = common_dtype(*(tensors[key][0] for key in keys))
    if len(b) == 2:
        if len(a) != 2 or a[1] != b[0]:
            raise MismatchError(f"lora_a {a} and lora_b {b} are no factors of one update")
        shape = (b[1], a[0])
        return {path: Slot(*keys, shape, b[0], 1.0, layout, dtype, form="mlx")}
    count, out, rank = b
    if math.prod(a[:-1]) != count * rank or (len(a) == 3 and a[0] != count):
        raise MismatchError(f"lora_a {a} and lora_b {b} are no factors of one update")
    return {
        name: Slot(*keys, (out, a[-1]), rank, 1.0, layout, dtype, form="mlx", part=(e, count))
        for e, name in enumerate(_experts(path, count))
    }


def _experts(path: str, count: int) -> list[str]:
    """What a checkpoint calls the experts of a module of MLX's.

    Raises:
        MismatchError: that is not known.
    """
    match = _SWITCH.fullmatch(path)
    if match is None:
        raise MismatchError("it has experts, and how a checkpoint calls those is not known here")
    owner, name = match["owner"], match["name"]
    if owner.endswith("block_sparse_moe"):
        name = MIXTRAL[name]
    return [f"{owner}.experts.{e}.{name}" for e in range(count)]


MLX = Format("mlx", "MLX", _claims, _found, _factors)
