"""The architectures whose requests are known to run as each alone, and what a base has room for.

A family is here because a test runs it (tests/serve/test_families.py), in rows and packed. Others
are refused by name: recurrent states, encoder-decoders and positions that are biases of the scores
do not lie in rows of a dense cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import RefusedError

FULL, SLIDING = "full_attention", "sliding_attention"
# Model type → whether it takes a mask for each kind of layer.
FAMILIES: Mapping[str, bool] = {
    "llama": False,
    "qwen2": True,
    "qwen3": True,
    "mistral": False,
    "gemma2": True,
    "gemma3_text": True,
    "phi3": False,
    "gpt2": False,
    "gpt_neox": False,
    "opt": False,
    "mixtral": False,
}
# Those that run packed, too: their attention is one that continuous batching has.
PACKED = tuple(kind for kind in FAMILIES if kind != "gemma2")
ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert", "mpnet")
BEHIND_PADDING = ("roberta", "xlm-roberta", "mpnet")  # positions begin behind its token's number
# Rotary positions that depend on the longest row of a batch, beyond what they began with.
_BY_BATCH = ("dynamic", "longrope")


def check_family(config: Any) -> None:
    """Raise a `RefusedError` for a base whose rows aren't known to run as each alone."""
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise RefusedError(
            f"bases of the type {kind!r} are not served by rows; those that are: "
            f"{', '.join(FAMILIES)}"
        )


def check_packed(config: Any) -> None:
    """Raise a `RefusedError` for a base that isn't known to run packed."""
    check_family(config)
    if config.model_type not in PACKED:
        raise RefusedError(
            f"bases of the type {config.model_type!r} are not served packed; those that are: "
            f"{', '.join(PACKED)}; give engine='rows'"
        )


def windows_of(config: Any) -> dict[str, int | None]:
    """The window of each kind of layer, as `masks` takes it."""
    window = getattr(config, "sliding_window", None)
    if FAMILIES[config.model_type]:
        kinds = getattr(config, "layer_types", None) or [FULL]
        return {FULL: None, **({SLIDING: window} if SLIDING in kinds else {})}
    return {"": window}


def context_of(config: Any) -> int:
    """Tokens that a base takes, at positions that don't depend on who runs beside it."""
    context = int(getattr(config, "max_position_embeddings", 0) or 2048)
    rotary = getattr(config, "rope_parameters", None) or {}
    scaled = [rotary, *(r for r in rotary.values() if isinstance(r, Mapping))]
    for r in scaled:
        first = r.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        if r.get("rope_type") in _BY_BATCH and first:
            context = min(context, int(first))
    return context


def vocabulary_of(model: Any) -> int:
    """Tokens that a base knows: rows of its embedding."""
    return int(model.get_input_embeddings().weight.shape[0])
