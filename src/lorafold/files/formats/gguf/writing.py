"""Adapters for llama.cpp: one GGUF file, the scale in B and no α, each module of its own rank.

llama.cpp divides an α by the rank of each pair of tensors, so that one α is right for one rank
alone; without any it multiplies by nothing. Everything is float32 unless asked otherwise: factors
in half precision move log-probabilities by 1e-3. Experts of one layer are one pair of tensors, the
smaller ranks among them padded with zeros, which the file names, and reading takes away again.

An adapter does not say what architecture it is for, so the base is needed: its folder, with
config.json at least. Where safetensors files lie beside it, names and shapes are checked by them.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....adapter import Adapter
from ....errors import MismatchError, RefusedError
from ....lowrank import LowRank
from ....naming import kind
from ....parts import extra_kind, extra_places, refusal_reason
from ....words import some_of
from ...base import Weights
from ..baking import FLOATS, Part, on_checkpoint, padded, scaled
from ..registry import Written
from .architectures import PERMUTED, Architecture, gguf_package, heads_of, names_of, permuted
from .base import GgufBase, gguf_base
from .reading import BASE_MODEL, METADATA, RANKS, USED

_EXPERT = re.compile(r"(?P<owner>.+\.experts)\.(?P<e>\d+)\.(?P<name>\w+)")
_COUNTS = ("num_local_experts", "num_experts")  # what configs call the number of experts
_FUSED = ".experts.gate_up_proj"
_KEPT = ("general.", "adapter.")  # keys of other writers that are kept as they are
_PEFT = "save it with format='peft'"


@dataclass(frozen=True)
class _Target:
    """A part by llama.cpp's name of its module, and which of the experts in it."""

    part: Part
    name: str
    expert: int | None


def gguf_form(
    adapter: Adapter,
    *,
    base: Any = None,
    base_model: str | None = None,
    dtype: torch.dtype | None = None,
) -> Written:
    """What `save(format="gguf")` writes.

    Args:
        adapter: what to write.
        base: its base: a folder with its config.json, a model, or its configuration; by default
            the adapter's `base_model`, if that is a folder.
        base_model: its name.
        dtype: of the factors; float32 by default.

    Raises:
        RefusedError: a part that GGUF has no place for, by name.
        MismatchError: no base, one that does not fit, or an architecture that was not tried.
        MissingExtraError: the package gguf is not there.
    """
    reason = refusal_reason(adapter.config, adapter.extras)
    if reason is not None:
        raise RefusedError(f"GGUF can't hold the adapter: {reason}")
    dtype = dtype or torch.float32
    if dtype not in FLOATS:
        raise MismatchError(f"llama.cpp does not read {dtype}: give dtype=torch.float32")
    if base is None and adapter.base_model and os.path.isdir(adapter.base_model):
        base = adapter.base_model
    if base is None:
        raise MismatchError(
            "a GGUF file names its architecture, which an adapter does not say: give base=, the "
            "base's folder"
        )
    known = gguf_base(base)
    arch = known.architecture
    _check_plain(adapter, known)
    targets = [_target(part, arch, known) for part in _parts(adapter, known)]
    if not targets:
        raise MismatchError("the adapter has no update to write")
    tensors, ranks = _tensors(targets, arch, known, dtype)
    metadata = {RANKS: json.dumps(ranks)} if ranks else {}
    name = base_model or adapter.base_model
    if name:
        metadata[BASE_MODEL] = name
    return Written(tensors, metadata, write=functools.partial(write_gguf, arch.name))


def write_gguf(
    arch: str, tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]
) -> None:
    """Write an adapter's file.

    Args:
        arch: of the base, as llama.cpp calls it.
        tensors: on the CPU, contiguous, of float32, float16 or bfloat16.
        path: the file. metadata: what is said of it beside.
    """
    gguf = gguf_package()
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    for key, text in sorted(metadata.items()):
        is_kept = key.startswith((*_KEPT, METADATA)) and (
            key not in USED or key in (BASE_MODEL, RANKS)
        )
        writer.add_string(key if is_kept else METADATA + key, text)
    for key, t in tensors.items():
        if t.dtype == torch.bfloat16:  # which numpy does not have
            raw = t.view(torch.uint8).numpy()
            writer.add_tensor(key, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(key, t.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check_plain(adapter: Adapter, base: GgufBase) -> None:
    """Refuse what is no update of modules; PEFT's copy of the base's embedding is none either.

    Raises:
        RefusedError: by name.
    """
    beside = [key for key in adapter.extras if not _is_copy(key, adapter, base)]
    if beside:
        hint = ""
        if all(extra_kind(key, adapter.config) == "base weight" for key in beside):
            hint = " (and no copy of a weight in the base's folder)"
        raise RefusedError(
            f"GGUF has no place for {some_of(beside)}, which is no update of a module{hint}: "
            f"{_PEFT}"
        )
    if adapter.config.get("layer_replication"):
        raise RefusedError(
            "the adapter is for a model with its layers replicated (layer_replication), which "
            f"llama.cpp does not have: {_PEFT}"
        )


def _is_copy(key: str, adapter: Adapter, base: GgufBase) -> bool:
    """Whether an extra tensor is a weight of the base, as it is there."""
    if base.files is None or extra_kind(key, adapter.config) != "base weight":
        return False
    names = extra_places(key, adapter.config)
    weights = Weights(base.files, names)
    for name in names:
        held = weights.named.find(name)
        if held is not None and held.whole and held.pieces[0].key in weights:
            own = weights.read(held.pieces[0].key)
            return torch.equal(own.float(), adapter.extras[key].float())
    return False


def _parts(adapter: Adapter, base: GgufBase) -> Iterator[Part]:
    """The updates by the names of a checkpoint: the base's own, where its files are there."""
    if base.files is None or any(key.endswith(_FUSED) for key in base.files.entries):
        yield from _by_own_names(adapter)
    else:
        named = base.files.named(adapter.parts.names())
        yield from on_checkpoint(adapter, named, base.where, "GGUF")


def _by_own_names(adapter: Adapter) -> Iterator[Part]:
    for path, u in adapter.modules.items():
        layout = adapter.layout(path)
        plain = layout.kind in ("linear", "embedding") and layout.parameter == "weight"
        if plain and layout.stem is None:
            yield Part(path, u, path)
        elif layout.kind == "expert" and path.endswith(".weight"):  # a parameter that is no stack
            yield Part(path.removesuffix(".weight"), u, path)
        elif layout.expert is not None and not layout.transposed:
            owner, _, name = layout.group(path).rpartition(".")
            first = f"{owner}.{layout.expert[0]}"
            if name == "gate_up_proj" and len(u.B) % 2 == 0:
                half = len(u.B) // 2
                yield Part(f"{first}.gate_proj", LowRank(u.A, u.B[:half], u.scale), path)
                yield Part(f"{first}.up_proj", LowRank(u.A, u.B[half:], u.scale), path)
            else:
                yield Part(f"{first}.{name}", u, path)
        else:
            raise RefusedError(
                f"GGUF has no place for {path!r} (a convolution, or a part of an attention): "
                f"{_PEFT}"
            )


def _target(part: Part, arch: Architecture, base: GgufBase) -> _Target:
    """Where a part goes.

    Raises:
        RefusedError: nowhere.
    """
    match = _EXPERT.fullmatch(part.name)
    name = part.name if match is None else f"{match['owner']}.{match['name']}"
    there = names_of(arch).get(kind(name))
    is_experts = there is not None and there.endswith("_exps")
    if there is None or there not in arch.usual or is_experts != (match is not None):
        raise RefusedError(
            f"{part.path!r} is no module that llama.cpp is known to have of {arch.name}: {_PEFT}"
        )
    if there in ("token_embd", "output") and base.is_tied:
        raise RefusedError(
            f"{base.where} has one weight for embedding and output layer, of which llama.cpp can't "
            f"change one alone, as {part.path!r} does: {_PEFT}"
        )
    number = re.search(r"(?<![^.])\d+(?![^.])", name)
    full = there.replace("#", number[0]) if number else there
    return _Target(part, full, int(match["e"]) if match else None)


def _tensors(
    targets: list[_Target], arch: Architecture, base: GgufBase, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """{key: factor}, and the ranks of the experts that were padded."""
    tensors: dict[str, Tensor] = {}
    experts: dict[str, dict[int, LowRank]] = {}
    for target in targets:
        name = target.name
        try:
            u = _factors(target.part.update, dtype)
            if target.expert is not None:
                experts.setdefault(name, {})[target.expert] = u
                continue
            if f"{name}.weight.lora_a" in tensors:
                raise MismatchError(f"two modules of the adapter are {name!r}")
            B = u.B
            if arch.permuted and name.endswith(PERMUTED):
                B = permuted(B, heads_of(base.config, name, base.where))
        except MismatchError as e:
            raise MismatchError(f"module {target.part.path!r}: {e}") from e
        tensors[f"{name}.weight.lora_a"] = u.A.T if name == "token_embd" else u.A
        tensors[f"{name}.weight.lora_b"] = B
    ranks = {}
    said = next((base.config[f] for f in _COUNTS if isinstance(base.config.get(f), int)), 0)
    for name, group in experts.items():
        a, b, own = _stacked(group, max(said, 1 + max(group)))
        tensors[f"{name}.weight.lora_a"], tensors[f"{name}.weight.lora_b"] = a, b
        if len(set(own)) > 1:
            ranks[name] = own
    return tensors, ranks


def _factors(u: LowRank, dtype: torch.dtype) -> LowRank:
    """The update with its scale in B, of scale 1."""
    wide = LowRank(u.A.float(), u.B.double() if u.B.dtype == torch.float64 else u.B.float())
    B = scaled(wide.B, u.scale).float()
    return padded(wide.A, B, max(u.rank, 1)).to(dtype=dtype)


def _stacked(group: Mapping[int, LowRank], count: int) -> tuple[Tensor, Tensor, list[int]]:
    """(E, r, in), (E, out, r), and each expert's own rank; those that are not there are zero."""
    rank = max(u.rank for u in group.values())
    some = next(iter(group.values()))
    none = LowRank(torch.zeros_like(some.A[:1]), torch.zeros_like(some.B[:, :1]))
    own = [group.get(e, none) for e in range(count)]
    every = [padded(u.A, u.B, rank) for u in own]
    ranks = [u.rank for u in own]
    return torch.stack([u.A for u in every]), torch.stack([u.B for u in every]), ranks
