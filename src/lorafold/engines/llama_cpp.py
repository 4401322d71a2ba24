"""llama.cpp: its own GGUF files, and PEFT folders after its converter, convert_lora_to_gguf.py.

The loader is run through xllamacpp 2026.10; the converter reads r of each tensor's shape and
lora_alpha of the config, and ends at any tensor that is no factor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..files.formats.gguf.base import gguf_base
from .finding import Finding, convert, factors_of, told
from .look import Look
from .peft_folder import base_of, form_findings, merge_into, plain_scale, wrapped_names

_FACTOR = re.compile(r".*\.(lora_[AB]\.weight|lora_embedding_[AB])$|.*\.base_layer\.weight$")


def findings(look: Look) -> Iterator[Finding]:
    """What llama.cpp does with a file."""
    if look.form == "gguf":
        yield from _gguf(look)
        return
    found = list(form_findings(look, "llama.cpp's converter"))
    yield from found
    if found or look.config is None:
        return
    again = convert(look.path, "gguf", "--base", base_of(look))
    yield Finding(
        "converter",
        "loads",
        "llama.cpp itself reads GGUF: this is what its converter would make of the folder",
        remedy=again,
    )
    strange = [key for key in look.tensors if _FACTOR.fullmatch(key) is None]
    kept = [key for key in strange if "_layernorm" in key or ".norm" in key]
    strange = [key for key in strange if key not in kept]
    if strange:
        dora = any(key.endswith("lora_magnitude_vector") for key in strange)
        yield Finding(
            "dora" if dora else "tensors",
            "refuses",
            f"the converter ends at what is no factor: {told(strange)}",
            modules=tuple(strange),
            remedy=merge_into(look),
        )
    yield from wrapped_names(look, "the converter")
    if look.file is not None:
        ranks = {path: shape[2] for path, shape in look.file.shapes.items()}
        applied = {path: plain_scale(look.config, rank) for path, rank in ranks.items()}
        wrong = factors_of(applied, look.scales)
        if wrong:
            name = "rslora" if look.config.get("use_rslora") else "patterns"
            yield Finding(
                name,
                "misreads",
                "the converter writes lora_alpha alone, and llama.cpp divides it by each tensor's "
                "own rank",
                wrong,
                tuple(wrong),
                again,
            )
    yield from _tied(look)


def _gguf(look: Look) -> Iterator[Finding]:
    """What the loader does with a GGUF file."""
    there = look.values.get("general.architecture")
    kind = None if look.base is None else gguf_base(look.base.path).architecture.name
    if kind is not None and kind != there:
        yield Finding(
            "architecture",
            "refuses",
            f"the base is of the architecture {kind!r}, and the adapter of {there!r}",
        )
    elif look.error is not None and look.base is not None:
        yield Finding("file", "refuses", look.error)
    norms = [key for key in look.tensors if key.endswith("_norm.weight")]
    if norms:
        yield Finding(
            "norms",
            "ignores",
            f"the loader passes over norms ({told(norms)})",
            modules=tuple(norms),
        )
    yield from _tied(look)


def _tied(look: Look) -> Iterator[Finding]:
    layouts = {} if look.file is None else look.file.layouts
    found = [path for path, layout in layouts.items() if layout.kind == "embedding"]
    head = [path for path in look.scales if path.endswith("lm_head")]
    if look.form == "gguf":
        found = [key for key in look.tensors if key == "token_embd.weight.lora_a"]
        head = [key for key in look.tensors if key == "output.weight.lora_a"]
    if look.tied is None:
        if found and look.base is None:
            yield Finding(
                "tied_embedding",
                "loads",
                "on a base with one weight for embedding and output layer the process would abort "
                f"at {found[0]!r}: give base= to know whether it is one",
                modules=tuple(found),
            )
        return
    if found:
        yield Finding(
            "tied_embedding",
            "aborts",
            "the base has one weight for embedding and output layer: an assertion in ggml fails at "
            f"the update of {found[0]!r}, and ends the process",
            modules=tuple(found),
        )
    if head:
        yield Finding(
            "tied_head",
            "refuses",
            f"the base has no tensor of its own for {head[0]!r}, which shares the embedding's",
            modules=tuple(head),
        )
