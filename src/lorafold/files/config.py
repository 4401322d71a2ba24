"""`adapter_config.json`: reading it, checking that it is a LoRA's, and making it plain JSON."""

from __future__ import annotations

import dataclasses
import enum
import json
import os
from collections.abc import Mapping
from typing import Any

from ..errors import FileError, MismatchError
from ..words import warn
from .disk.header import disguise
from .disk.held import read_regular
from .remote.place import Place, is_file

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
MLX_NAME = "adapters.safetensors"  # the file of weights of mlx-lm
DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"  # the one that diffusers writes
PORTABLE_NAME = "portable.safetensors"  # by roles, lorafold's own
SUBSPACE_NAME = "subspace_meta.json"  # of a vLoRA folder
LIBRARY_NAME = "library.json"
_LONGEST = 64 << 20  # bytes of a config, or an index of tensors
STATE_NAME = "training_state.safetensors"  # beside an adapter, where its training goes on
RECORD_NAME = "steering.json"  # beside an adapter, what was measured of it along its dial

CARD = "README.md"  # a model card
CARD_MARK = "<!-- Written by lorafold, and replaced with the adapter. -->"  # its last line then

CHECKPOINTS, RECIPE_NAME = "checkpoints", "recipe.json"  # of a training run, and how it goes on


def read_text(path: Place, raw: bytes | None = None) -> str:
    """The file's text.

    Args:
        path: the file. raw: what is in it, where that is read already.

    Raises:
        FileError: it can't be read, is not UTF-8, or is another file under its name.
    """
    try:
        if raw is None:
            raw = read_regular(path, lambda size: check_length(path, size))
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise FileError(f"{path}: not UTF-8 text ({e})") from e
    except OSError as e:
        raise FileError(f"{path}: {e.strerror or e}") from e
    says = disguise(text[:100].encode())
    if says is not None:
        raise FileError(f"{path} is {says}")
    return text


def read_card(folder: Place) -> str | None:
    """The model card in an adapter's folder, or None; one that can't be read is warned of."""
    if not is_file(folder / CARD):
        return None
    try:
        text = read_text(folder / CARD)
    except FileError as e:
        warn(f"the model card is left out: {e}")
        return None
    return text.rstrip().removesuffix(CARD_MARK).rstrip() or None


def check_length(path: Place, size: int) -> None:
    """Raise a `FileError` where so many bytes can be no config, nor an index of tensors."""
    if size > _LONGEST:
        raise FileError(f"{path}: {size:,} bytes are too many for a config")


def parsed(text: str, where: str | os.PathLike[str]) -> dict[str, Any]:
    """The config in a JSON text, checked as `checked` does.

    Raises:
        FileError: not JSON, not an object, or not a LoRA's.
    """
    return checked(json_object(text, where), where)


def json_object(text: str, where: str | os.PathLike[str]) -> dict[str, Any]:
    """The object that a JSON text holds.

    Raises:
        FileError: it is none, says a key twice, or nests more than it says: each `{}` takes 30
            times its bytes.
    """
    found = json_value(text, where)
    if not isinstance(found, dict):
        raise FileError(f"{where}: must hold a JSON object, found a {type(found).__name__}")
    return found


def json_value(text: str, where: str | os.PathLike[str]) -> Any:
    """What a JSON text holds, whatever that is.

    Raises:
        FileError: it is none, says a key twice, or nests more than it says.
    """
    if not text.strip():
        raise FileError(f"{where}: the file is empty; fetch it again")
    if text.count("{") + text.count("[") > 10_000 + len(text) // 16:
        raise FileError(f"{where}: not valid JSON of its kind: brackets without end")
    try:
        return json.loads(text, object_pairs_hook=_no_twins)
    except (ValueError, RecursionError) as e:
        raise FileError(f"{where}: not valid JSON ({e})") from e


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r:.80} appears twice")
    return found


def as_json(value: Any) -> str:
    """A value as a file of JSON has it, for people to read.

    Letters are as they are, but where a text has half of one, which UTF-8 does not have: JSON's
    escapes do.

    Raises:
        TypeError: it holds what JSON does not have.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    return text + "\n"


def checked(config: dict[str, Any], where: str | os.PathLike[str]) -> dict[str, Any]:
    """The config, if it is one of a LoRA adapter with a rank and α.

    Raises:
        FileError: another method, or r or lora_alpha missing; naming file and field.
    """
    if "lora_parameters" in config or "fine_tune_type" in config:
        if config.get("fine_tune_type") == "full":
            raise FileError(
                f"{where}: MLX has fine-tuned the whole model here, which makes no adapter: take "
                "its difference, `lorafold extract BASE MODEL -o OUT`"
            )
        raise FileError(
            f"{where}: this is MLX's config, and the tensors beside it are not MLX's (….lora_a, "
            "….lora_b)"
        )
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise FileError(
            f"{where}: peft_type is {kind!r}, but only LORA adapters are read; "
            "convert it to LoRA first (newer releases of PEFT have convert_to_lora)"
        )
    for field in ("r", "lora_alpha"):
        value = config.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise FileError(
                f"{where}: {field!r} must be a number, found {value!r}: write into the config what "
                "it was in training"
            )
    for field in ("target_parameters", "modules_to_save"):
        value = config.get(field) or []
        if not isinstance(value, list | str) or not all(isinstance(name, str) for name in value):
            raise FileError(f"{where}: {field!r} must be a list of names, found {value!r:.80}")
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(field) or {}, dict):
            raise FileError(f"{where}: {field!r} must be an object, found {config[field]!r}")
    return config


def plain(config: Any) -> dict[str, Any]:
    """A config given in memory as what JSON would hold: PEFT's own object, or a mapping.

    Raises:
        MismatchError: neither of them.
    """
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise MismatchError(
            f"config must be a mapping or a LoraConfig, not {type(config).__name__}"
        )
    return {str(key): _plain(value) for key, value in config.items()}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(_plain(v) for v in value)
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
