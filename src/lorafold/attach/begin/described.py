"""What the config of a trained adapter says of the model: its name, its task, its targets.

PEFT's `AutoPeftModel…` classes find base and class by it, and people read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ...adapter import Adapter
from ...files.peft_targets import finds_module
from ...layers.swap import base_class, base_modules
from ...parts import saved_modules
from .places import plain_names

# The ends of transformers' names of classes; an encoder and decoder says so in its config.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def described(adapter: Adapter, model: nn.Module) -> Adapter:
    """The adapter, its config with what it lacks of the model that it was trained on."""
    config = dict(adapter.config)
    name = adapter.base_model or getattr(model, "name_or_path", None) or None
    if config.get("task_type") is None and config.get("auto_mapping") is None:
        config |= _class_said(model, config) if name else {}
    layouts = adapter.layouts.values()
    if config.get("target_modules") is None and all(x.kind != "expert" for x in layouts):
        config |= _targets(model, adapter.modules, config)
    return replace(adapter, config=config, base_model=name)


def _class_said(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """The task, or else the class, as `save_pretrained` of PEFT writes them."""
    cls = base_class(model)
    task = next((t for end, t in _TASKS.items() if cls.__name__.endswith(end)), None)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        task = "SEQ_2_SEQ_LM" if cls.__name__.endswith("ForConditionalGeneration") else task
    if task is not None and _heads_are_saved(model, task, config):
        return {"task_type": task}
    if not hasattr(model, "from_pretrained"):
        return {}
    mapping = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    return {"auto_mapping": mapping}


def _heads_are_saved(model: nn.Module, task: str, config: Mapping[str, Any]) -> bool:
    """Whether the adapter has whole what readers expect so in its kind of task."""
    heads = saved_modules({"task_type": task})
    saved = [str(name).rpartition(".")[2] for name in config.get("modules_to_save") or ()]
    there = {path.rpartition(".")[2] for path, _ in base_modules(model)}
    return all(head in saved for head in heads if head in there)


def _targets(
    model: nn.Module, paths: Iterable[str], config: Mapping[str, Any]
) -> dict[str, list[Any]]:
    """Targets as people write them, where they mean these modules and no others; else none."""
    wanted = set(paths)
    plain = plain_names(model)
    there = [plain[path] for path, _ in base_modules(model)]
    numbers = [next((int(x) for x in p.split(".") if x.isdecimal()), None) for p in wanted]
    names = {"target_modules": list(dict.fromkeys(p.rpartition(".")[2] for p in paths))}
    band: dict[str, list[Any]] = {
        "layers_to_transform": sorted({n for n in numbers if n is not None})
    }
    for found in (names, {**names, **band}):
        if {p for p in there if finds_module({**config, **found}, p)} == wanted:
            return found
    return {}
