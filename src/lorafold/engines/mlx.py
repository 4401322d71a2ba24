"""mlx-lm, `load_adapters`; measured with 0.32.2."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..files.config import MLX_NAME
from .finding import Finding, convert, told
from .look import Look

_NEEDED = ("rank", "scale", "dropout")
_BY_HAND = "write scale, α / rank, into lora_parameters of its adapter_config.json"
_BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)\.lora_[ab]$")


def findings(look: Look) -> Iterator[Finding]:
    """What mlx-lm does with a file."""
    again = convert(look.path, "mlx")
    if look.form != "mlx":
        yield Finding(
            "form",
            "refuses",
            f"mlx-lm reads its own folders; this is in the form of {look.said}",
            remedy=None if look.is_of_images else again,
        )
        return
    if look.place.weights.name != MLX_NAME:
        yield Finding(
            "file_name",
            "refuses",
            f"mlx-lm reads {MLX_NAME} in a folder, and this is {look.place.weights.name}",
            remedy=again,
        )
    if look.config is None:
        yield Finding(
            "no_config",
            "refuses",
            "mlx-lm reads adapter_config.json, and there is none",
            remedy=convert(look.path, "mlx", "--alpha", "ALPHA"),
        )
        return
    parameters = look.config.get("lora_parameters")
    parameters = parameters if isinstance(parameters, Mapping) else {}
    if "num_layers" not in look.config:
        older = "lora_layers, as older releases had" if "lora_layers" in look.config else "none"
        yield Finding(
            "lora_layers",
            "refuses",
            f"mlx-lm needs num_layers in the config, and there is {older}",
            remedy=again,
        )
    for name in _NEEDED:
        if name not in parameters:
            yield Finding(
                f"no_{name}",
                "refuses",
                f"mlx-lm needs {name!r} in lora_parameters",
                remedy=_BY_HAND if name == "scale" else again,
            )
    if "alpha" in parameters and "scale" in parameters:
        yield Finding(
            "alpha", "loads", "scale is the whole factor; the alpha beside it is not read"
        )
    yield from _ranks(look, parameters)
    yield from _blocks(look, parameters, again)
    yield from _embedding(look)


def _ranks(look: Look, parameters: Mapping[str, Any]) -> Iterator[Finding]:
    rank = parameters.get("rank")
    others = [
        key
        for key, stored in look.tensors.items()
        if key.endswith(".lora_b") and rank not in (stored.shape[0], stored.shape[-1])
    ]
    if rank is not None and others:
        yield Finding(
            "ranks",
            "refuses",
            f"mlx-lm has one rank, {rank} here, and {told(others)} has another",
            modules=tuple(others),
            remedy="correct the rank in its adapter_config.json, or train it again with one",
        )


def _blocks(look: Look, parameters: Mapping[str, Any], again: str) -> Iterator[Finding]:
    """Modules in blocks before the last num_layers, which keys that are no full paths miss."""
    count = {} if look.base is None else look.base.config
    layers = count.get("num_hidden_layers", count.get("n_layer"))
    n = look.config.get("num_layers") if look.config else None
    if not isinstance(layers, int) or not isinstance(n, int) or n <= 0:
        return
    keys = parameters.get("keys")
    whole = set(keys) if isinstance(keys, list) else set()
    missed = []
    for key in look.tensors:
        match = _BLOCK.search(key)
        if match and int(match[1]) < layers - n and key.rpartition(".")[0] not in whole:
            missed.append(key)
    if missed:
        yield Finding(
            "num_layers",
            "refuses",
            f"mlx-lm adapts the last {n} of {layers} blocks, and {told(missed)} is before them",
            modules=tuple(missed),
            remedy=again,
        )


def _embedding(look: Look) -> Iterator[Finding]:
    layouts = {} if look.file is None else look.file.layouts
    found = tuple(path for path, layout in layouts.items() if layout.kind == "embedding")
    if not found:
        return
    if look.tied is not None:
        yield Finding(
            "tied_embedding",
            "misreads",
            "the base has one weight for embedding and output layer, and mlx-lm applies the "
            f"update of {found[0]!r} to both",
            modules=found,
        )
    elif look.base is None:
        yield Finding(
            "tied_embedding",
            "loads",
            "on a base with one weight for embedding and output layer mlx-lm would apply the "
            f"update of {found[0]!r} to both: give base= to know whether it is one",
            modules=found,
        )
