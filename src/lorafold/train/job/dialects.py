"""A config file's keys: our own, and those of axolotl and LLaMA-Factory that mean the same.

A key of theirs is turned into ours, or is said to be without effect here (where logs go, how many
processes read), or is refused by name: nothing that would change the result is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import LorafoldError, MismatchError, MissingExtraError, UnknownNameError
from ...merge.yaml_tables import Table, tables_in
from ...words import did_you_mean, one_line
from .recipe import OPTIONS, checked

Ours = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """What a file says.

    Args:
        options: by our names. renamed: {their key: ours}. idle: keys that change nothing here.
    """

    options: Ours
    renamed: Mapping[str, str]
    idle: tuple[str, ...]


def read_config(path: str) -> Config:
    """The options in a YAML file (pyyaml must be there).

    Raises:
        FileError: it can't be read, or is no YAML. MissingExtraError: there is no pyyaml.
        UnknownNameError: a key that is nobody's, naming it and the nearest of ours.
        MismatchError: one that can't be honoured, or says what another says otherwise.
    """
    try:
        found = tables_in(Path(path))
    except MissingExtraError:
        raise MissingExtraError(
            "config files are YAML, and pyyaml is not there: pip install 'lorafold[train]'"
        ) from None
    if not isinstance(found, Table):
        raise MismatchError(f"{path}: must hold options and their values, found {one_line(found)}")
    options: Ours = {}
    said: dict[str, str] = {}
    idle = []
    for key, value in found.items():
        try:
            ours = _ours(str(key), value, found)
            mine = {name: checked(name, one) for name, one in ours.items()}
        except LorafoldError as e:
            raise type(e)(f"{path}: {found.at(key)}{e}") from e
        if not mine and _is_idle(str(key).replace("-", "_"), value):
            idle.append(str(key))
        for name, one in mine.items():
            if name in options and options[name] != one:
                raise MismatchError(
                    f"{path}: {found.at(key)}{key} and {said[name]} say different things of {name}"
                )
            options[name], said[name] = one, str(key)
    return Config(options, {k: n for n, k in said.items() if k != n}, tuple(idle))


def _ours(key: str, value: Any, whole: Mapping[Any, Any]) -> Ours:
    """A key and its value as options of ours."""
    name = key.replace("-", "_")
    if name in OPTIONS:
        unset = value is None or (name, value) == ("bf16", "auto")
        return {} if unset else {name: _split(name, value)}
    if name in _THEIRS:
        return {} if value is None else _THEIRS[name](key, value, whole)
    if _IDLE.fullmatch(name) or value is None or value is False:
        return {}
    raise UnknownNameError(f"there is no option {key!r}; {did_you_mean(name, OPTIONS)}")


def _is_idle(name: str, value: Any) -> bool:
    """Whether it says something that has no effect here."""
    another = name in ("optimizer", "optim") and value != "adamw_torch"
    return value not in (None, False) and (another or _IDLE.fullmatch(name) is not None)


def _split(name: str, value: Any) -> Any:
    if name in ("betas", "layers", "nested") and isinstance(value, str):
        try:
            return [float(v) if "." in v else int(v) for v in value.split(",")]
        except ValueError:
            raise MismatchError(f"{name} must be numbers, found {one_line(value)}") from None
    return value


# Theirs: from (key, value, all of the file) to options of ours.

Turn = Callable[[str, Any, Mapping[Any, Any]], Ours]


def _same(name: str, **special: Any) -> Turn:
    """Our option of another name; some of its values are others' words."""

    def turn(key: str, value: Any, whole: Mapping[Any, Any]) -> Ours:
        if isinstance(value, str) and value in special:
            return {} if special[value] is None else {name: special[value]}
        return {name: _split(name, value)}

    return turn


def _unless(name: str, *unset: Any) -> Turn:
    """Our option, where their value is none that means "not set"."""

    def turn(key: str, value: Any, whole: Mapping[Any, Any]) -> Ours:
        return {} if value in unset else {name: value}

    return turn


def _only(*right: Any) -> Turn:
    """What must have one of these values, and means nothing further."""

    def turn(key: str, value: Any, whole: Mapping[Any, Any]) -> Ours:
        if value not in right:
            shown = " or ".join(one_line(v) for v in right)
            raise MismatchError(f"{key} must be {shown} here, found {one_line(value)}")
        return {}

    return turn


def _when(option: Ours) -> Turn:
    """Options that a true value means."""

    def turn(key: str, value: Any, whole: Mapping[Any, Any]) -> Ours:
        if not isinstance(value, bool):
            raise MismatchError(f"{key} must be true or false, found {one_line(value)}")
        return dict(option) if value else {}

    return turn


def _inverse(name: str) -> Turn:
    return lambda key, value, whole: {name: not value}


def _adapter(key: str, value: Any, whole: Mapping[Any, Any]) -> Ours:
    _only("lora", "qlora")(key, value, whole)
    if value == "lora" or whole.get("load_in_8bit"):
        return {}
    return {"quantize": "nf4"}


def _bits(key: str, value: Any, whole: Mapping[Any, Any]) -> Ours:
    _only(4, 8)(key, value, whole)
    return {"quantize": str(whole.get("quantization_type") or "nf4") if value == 4 else "int8"}


def _beta(key: str, value: Any, whole: Mapping[Any, Any]) -> Ours:
    pair = whole.get("adam_beta1"), whole.get("adam_beta2")
    return {"betas": [0.9 if pair[0] is None else pair[0], 0.999 if pair[1] is None else pair[1]]}


def _pissa(key: str, value: Any, whole: Mapping[Any, Any]) -> Ours:
    count = whole.get("pissa_iter")
    fast = isinstance(count, int) and count > 0
    return {"init": f"pissa_niter_{count}" if fast else "pissa"} if value else {}


def _start(key: str, value: Any, whole: Mapping[Any, Any]) -> Ours:
    if isinstance(value, bool):
        return {"init": "kaiming"} if value else {}
    return {"init": value}


def _share(key: str, value: Any, whole: Mapping[Any, Any]) -> Ours:
    if isinstance(value, int | float) and value >= 1:
        raise MismatchError(f"{key} must be a share of the data here, below 1, found {value}")
    return {"held_out": value}


def _adamw(key: str, value: Any, whole: Mapping[Any, Any]) -> Ours:
    if not re.fullmatch(r"(paged_)?adamw\w*", str(value)):
        raise MismatchError(f"{key}: only AdamW is here, found {one_line(value)}")
    return {}


def _files(name: str) -> Turn:
    """Data sets: texts, or tables with a path."""

    def turn(key: str, value: Any, whole: Mapping[Any, Any]) -> Ours:
        if isinstance(value, str):
            return {name: [v.strip() for v in value.split(",")]}
        if not isinstance(value, list):
            raise MismatchError(f"{key} must be files, found {one_line(value)}")
        found: list[Any] = []
        columns: dict[str, str] = {}
        for one in value:
            path, named = _file(key, one)
            found.append(path)
            columns |= named
        return {name: found} | ({"columns": columns} if columns else {})

    return turn


def _file(key: str, one: Any) -> tuple[str, dict[str, str]]:
    if isinstance(one, str):
        return one, {}
    if not isinstance(one, Mapping) or not isinstance(one.get("path"), str):
        raise MismatchError(f"{key} must be files, each with its path:, found {one_line(one)}")
    kind = one.get("type")
    if kind not in (None, "completion", "chat_template"):
        raise MismatchError(
            f"{key}: type {one_line(kind)} is not read here: write rows with a text, with "
            "messages, or with prompt and completion, and leave type: out"
        )
    columns = {"text": one.get("field"), "messages": one.get("field_messages")}
    left = [k for k, v in one.items() if v is not None and k not in _OF_A_FILE]
    if left:
        raise MismatchError(f"{key}: {left[0]!r} of a file can't be honoured; leave it out")
    return one["path"], {k: v for k, v in columns.items() if v is not None}


_OF_A_FILE = ("path", "type", "field", "field_messages", "ds_type", "split")

_THEIRS: dict[str, Turn] = {
    "base_model": _same("base"),
    "model_name_or_path": _same("base"),
    "datasets": _files("data"),
    "dataset": _files("data"),
    "test_datasets": _files("eval"),
    "eval_dataset": _files("eval"),
    "val_set_size": _share,
    "val_size": _share,
    "output_dir": _same("output"),
    "adapter": _adapter,
    "stage": _only("sft"),
    "finetuning_type": _only("lora"),
    "do_train": _only(True),
    "load_in_4bit": _when({"quantize": "nf4"}),
    "load_in_8bit": _when({"quantize": "int8"}),
    "quantization_bit": _bits,
    "quantization_type": _only("nf4", "fp4"),
    "quantization_method": _only("bnb", "bitsandbytes"),
    "lora_r": _same("rank"),
    "lora_rank": _same("rank"),
    "lora_alpha": _same("alpha"),
    "lora_dropout": _same("dropout"),
    "lora_target_modules": _same("targets", all="all-linear"),
    "lora_target": _same("targets", all="all-linear"),
    "lora_target_linear": _when({"targets": ["all-linear"]}),
    "peft_use_rslora": _same("rslora"),
    "use_rslora": _same("rslora"),
    "peft_use_dora": _only(False),
    "use_dora": _only(False),
    "peft_init_lora_weights": _start,
    "pissa_init": _pissa,
    "pissa_iter": lambda key, value, whole: {},
    "lora_modules_to_save": _only([]),
    "loraplus_lr_ratio": _same("lora_plus"),
    "num_epochs": _same("epochs"),
    "num_train_epochs": _same("epochs"),
    "max_steps": _unless("steps", -1, 0),
    "micro_batch_size": _same("batch"),
    "per_device_train_batch_size": _same("batch"),
    "gradient_accumulation_steps": _same("accumulate"),
    "learning_rate": _same("lr"),
    "lr_scheduler": _same("schedule", constant_with_warmup="constant"),
    "lr_scheduler_type": _same("schedule", constant_with_warmup="constant"),
    "warmup_steps": _same("warmup"),
    "warmup_ratio": _same("warmup"),
    "adam_beta1": _beta,
    "adam_beta2": _beta,
    "max_grad_norm": _same("clip"),
    "sequence_len": _same("max_length"),
    "cutoff_len": _same("max_length"),
    "sample_packing": _same("packing"),
    "neat_packing": _same("packing"),
    "train_on_inputs": _same("train_on_prompts"),
    "train_on_prompt": _same("train_on_prompts"),
    "disable_gradient_checkpointing": _inverse("gradient_checkpointing"),
    "bfloat16": _same("bf16"),
    "fp16": _only(False, "auto"),
    "early_stopping_patience": _same("patience"),
    "early_stopping_steps": _same("patience"),
    "eval_steps": _same("eval_every"),
    "chat_template_jinja": _same("chat_template"),
    "resume_from_checkpoint": _only(False),
    "optimizer": _adamw,
    "optim": _adamw,
}

# Where logs go, what is cached, who reads: nothing of it changes what comes out.
_IDLE = re.compile(
    r"wandb_\w+|mlflow_\w+|comet_\w+|swanlab_\w+|use_(tensorboard|wandb|swanlab|fast_tokenizer)"
    r"|logging_\w+|report_to|run_name|plot_loss|save_(steps|strategy|total_limit|only_model"
    r"|safetensors|first_step)|saves_per_epoch|evals_per_epoch|eval_strategy|do_eval"
    r"|(per_device_)?eval_batch_size|per_device_eval_batch_size|eval_sample_packing"
    r"|dataset_(prepared_path|processes|num_proc|dir|keep_in_memory)|dataloader_\w+"
    r"|preprocessing_(num_workers|batch_size)|overwrite_(cache|output_dir)|cache_dir"
    r"|model_type|tokenizer_type|strict|group_by_length|pad_to_sequence_len|tf32"
    r"|flash_attn|(flash|xformers|sdp|eager)_attention|attn_implementation|ddp_\w+"
    r"|lora_(mlp|qkv|o)_kernel|trust_remote_code|hub_model_id|template|local_rank|debug"
    r"|include_\w+|load_best_model_at_end|remove_unused_columns"
)
