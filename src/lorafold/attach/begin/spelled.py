"""What other libraries call the options of a fresh adapter, and PEFT's configs as these options."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ...errors import MismatchError
from ...files.config import checked, plain
from ...layers.targets import ALL_LINEAR, Target
from ...parts import saved_modules
from ...words import did_you_mean

_SAME = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rslora"}
_OTHERS = {
    **_SAME,
    "target_modules": "targets",
    "exclude_modules": "exclude",
    "init_lora_weights": "init",
    "layers_to_transform": "layers",
    "lora_rank": "rank",
    "rank_alpha": "alpha",
    "target": "targets",
    "calibration_data": "calibration",
    "selection": "select",
}
# Of a PEFT config, what says nothing of a fresh adapter, or is read below.
_READ = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules"),
    *("init_lora_weights", "rank_pattern", "alpha_pattern", "modules_to_save", "peft_type"),
    *("task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"),
    *("fan_in_fan_out", "peft_version", "runtime_config"),
}


def check_options(kind: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise a `MismatchError` for a keyword that a specification has not, with the one it has."""
    known = list(known)
    for name in given:
        if name not in known:
            ours = _OTHERS.get(name)
            hint = f"it is {ours}= here" if ours in known else did_you_mean(name, known)
            raise MismatchError(f"{kind} has no option {name}=; {hint}")


def from_peft(config: Any) -> dict[str, Any]:
    """The options of `LoRA` that a config of PEFT's means.

    Raises:
        MismatchError: something in it that `LoRA` has not, by name.
    """
    said = checked(plain(config), "the config")
    usual = {} if isinstance(config, Mapping) else plain(type(config)())
    for name in said.keys() - _READ:
        if said[name] not in (usual.get(name), None, False, "none") and said[name] not in ([], {}):
            raise MismatchError(
                f"the config's {name}={said[name]!r} is not for lorafold.LoRA: train it with PEFT, "
                "and attach the result"
            )
    targets = said.get("target_modules")
    if not targets:
        raise MismatchError(
            "the config has no target_modules, which PEFT would choose by the architecture: give "
            "it some"
        )
    everything = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    heads = saved_modules({"task_type": said.get("task_type")})
    exclude = _ends(said.get("exclude_modules"))
    # PEFT's are the ends of names, within a component too; and one of a task's heads is there.
    named = [name for name in said.get("modules_to_save") or () if name not in heads]
    whole = [re.compile(rf"{re.escape(name)}\Z") for name in named]
    whole += [re.compile(rf"({'|'.join(heads)})\Z")] if heads else []
    return {
        **{ours: said[theirs] for theirs, ours in _SAME.items() if theirs in said},
        "targets": ALL_LINEAR if everything else _whole(targets),
        "exclude": (*exclude, "lm_head", *heads) if everything else exclude,
        "init": _init(said.get("init_lora_weights", True)),
        "rank_pattern": _patterns(said.get("rank_pattern")),
        "alpha_pattern": _patterns(said.get("alpha_pattern")),
        "modules_to_save": tuple(whole),
    }


def _end(pattern: str) -> str:
    return rf"^(?:.*\.)?(?:{pattern})\Z"


def _whole(targets: str | list[str]) -> tuple[Target, ...]:
    """PEFT's string is a regular expression of a whole name, its list has the ends of names."""
    return (re.compile(rf"^(?:{targets})\Z"),) if isinstance(targets, str) else tuple(targets)


def _ends(excluded: str | list[str] | None) -> tuple[Target, ...]:
    """As patterns: PEFT excludes modules of these names, and not what lies within."""
    if isinstance(excluded, str):
        return _whole(excluded)
    return tuple(re.compile(_end(re.escape(name))) for name in excluded or ())


def _patterns(found: Mapping[str, Any] | None) -> dict[Target, Any]:
    return {re.compile(_end(key)): value for key, value in (found or {}).items()}


def _init(found: Any) -> str:
    if found is True:
        return "kaiming"
    if isinstance(found, str) and re.fullmatch(r"orthogonal|pissa(_niter_\d+)?", found):
        return found
    raise MismatchError(
        f"the config's init_lora_weights={found!r} is not for lorafold.LoRA, whose init= is "
        "'kaiming' (PEFT's True), 'orthogonal' or 'pissa'"
    )
