"""The active adapter of a model that PEFT runs: a `PeftModel`, or transformers' with adapters."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn

from ...errors import MismatchError, MissingExtraError


def running_parts(model: nn.Module) -> tuple[dict[str, Tensor], Any]:
    """The state dict of its active adapter, as `save_pretrained` would write it, and its config.

    Embeddings that were resized come along where the base is a folder, which says what they were.

    Raises:
        MismatchError: it has no adapter of PEFT's, or more than one is active.
        MissingExtraError: PEFT is not there.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or not configs:
        raise MismatchError(
            f"this {type(model).__name__} has no adapter of PEFT's; one that lorafold attached is "
            "lf.Live.of(model).adapter(name)"
        )
    active: Any = getattr(model, "active_adapters", ())  # transformers' is a method
    names = list(active() if callable(active) else active)
    if len(names) != 1:
        raise MismatchError(
            f"{len(names)} adapters of the model are active: choose one (model.set_adapter(name))"
        )
    try:
        from peft import get_peft_model_state_dict
    except ImportError as e:
        raise MissingExtraError("a model of PEFT takes PEFT: pip install peft") from e
    (name,) = names
    base = getattr(configs[name], "base_model_name_or_path", None)
    # Whether the vocabulary was resized is asked of the base's own config; not of the Hub's.
    whole: Any = "auto" if base and os.path.isdir(base) else False
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=whole)
    return tensors, configs[name]
