"""What any reader of a PEFT folder sees in it: the words that vLLM, llama.cpp and PEFT share."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from ..files.config import CONFIG_NAME
from .finding import Finding, convert, told
from .look import Look

_WRAPPED = re.compile(
    r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^module\.|\.model\.module\."
)


def plain_scale(config: Mapping[str, Any], rank: int | None = None) -> float:
    """α/r as a config says it for all modules; of a rank of its own where one is given."""
    return float(config["lora_alpha"]) / float(rank or config["r"])


def rooted_scale(config: Mapping[str, Any]) -> float:
    """The same, or α/√r with use_rslora."""
    root = math.sqrt if config.get("use_rslora") else float
    return float(config["lora_alpha"]) / root(float(config["r"]))


def base_of(look: Look) -> str:
    """The base's folder: the one that is given, the adapter's own, or a word to fill in."""
    own = (look.config or {}).get("base_model_name_or_path")
    if look.base is not None:
        return os.fspath(look.base.path)
    return own if isinstance(own, str) and os.path.isdir(own) else "BASE"


def merge_into(look: Look) -> str:
    """The command line that puts all of an adapter into its base."""
    return shlex.join(["lorafold", "merge-into", base_of(look), look.path, "-o", "merged"])


def form_findings(look: Look, reader: str) -> Iterator[Finding]:
    """Whether the files are a PEFT folder at all.

    It is one where nothing is yielded.
    """
    if look.form != "peft":
        yield Finding(
            "form",
            "refuses",
            f"{reader} reads PEFT's folders; this is in the form of {look.said}",
            remedy=None if look.is_of_images and reader != "PEFT" else convert(look.path, "peft"),
        )
    elif look.config is None:
        alpha = () if look.error is None else ("--alpha", "ALPHA")
        yield Finding(
            "no_config",
            "refuses",
            f"{reader} takes r and α from {CONFIG_NAME}, and there is none",
            remedy=convert(look.path, "peft", *alpha),
        )


def wrapped_names(look: Look, reader: str) -> Iterator[Finding]:
    """Keys with what wrapped the model when it was saved: no module is found by them."""
    wrapped = [key for key in look.tensors if _WRAPPED.search(key)]
    if wrapped:
        yield Finding(
            "wrapped_names",
            "ignores",
            f"{reader} finds no module by {told(wrapped)}: these updates have no effect",
            modules=tuple(wrapped),
            remedy=convert(look.path, "peft"),
        )
