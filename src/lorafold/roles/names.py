"""The paths of the modules that an update can go to: of a model, a state dict, a configuration."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FileError, MismatchError, MissingExtraError
from ..naming import Shape
from ..parts import PREFIX, plain_name
from ..words import one_line

_CONFIG_NAME, _ADAPTER_CONFIG = "config.json", "adapter_config.json"
_LONGEST = 64 << 20  # bytes of a configuration
_FLOATS = {"F64", "F32", "F16", "BF16"}
# What PEFT and lorafold put into a model for an adapter.
_OF_ADAPTERS = {
    *("lorafold", "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"),
    *("lora_magnitude_vector", "modules_to_save", "token_adapter"),
}
_WRAPPERS = {"base_layer", "original_module"}


def weights_in(x: Any) -> dict[str, Shape | None]:
    """The modules that a model, a configuration, a folder or names stand for.

    Returns:
        {module path: shape of its weight}; None where that is not known, or not what it computes
        with (a quantised weight).

    Raises:
        FileError: a path that holds no base.
        MismatchError: none of these.
        MissingExtraError: a configuration, and transformers is not installed.
    """
    if isinstance(x, nn.Module):
        return _of_tensors([*x.named_parameters(remove_duplicate=False), *x.named_buffers()])
    if isinstance(x, str | os.PathLike):
        return _of_path(Path(x))
    if is_config(x):
        return weights_in(_built(x))
    if isinstance(x, Mapping) and x and all(isinstance(value, Tensor) for value in x.values()):
        return _of_tensors(x.items())
    if isinstance(x, Iterable):
        names = list(x)
        if all(isinstance(name, str) for name in names):
            return dict.fromkeys(names)
    raise MismatchError(
        "roles are told from a model, its configuration, a folder with its files, an adapter, or "
        f"module paths; found {one_line(x)}"
    )


def is_config(x: Any) -> bool:
    """Whether this is a model's configuration: transformers' or the content of a config.json."""
    if isinstance(x, Mapping):
        return isinstance(x.get("model_type"), str) if "model_type" in x else False
    return hasattr(x, "model_type") and hasattr(x, "to_dict")


def config_of(x: Any) -> Mapping[str, Any]:
    """The configuration of a model, of a folder, or itself, as a mapping; {} where there is none.

    Raises:
        FileError: a config.json that is none.
    """
    if isinstance(x, str | os.PathLike):
        folder = Path(x) if os.path.isdir(x) else Path(x).parent
        return _read_config(folder / _CONFIG_NAME) if os.path.isfile(folder / _CONFIG_NAME) else {}
    found = x if is_config(x) else getattr(x, "config", None)
    if not isinstance(found, Mapping):
        to_dict = getattr(found, "to_dict", None)
        # What transformers works out itself (`num_key_value_heads`) is an attribute alone.
        found = {**to_dict(), **vars(found)} if to_dict is not None else {}
    return {
        key: config_of(value) if key.endswith("_config") and is_config(value) else value
        for key, value in found.items()
    }


def plain_path(name: str) -> str:
    """A path without what wraps a model, and without the end of a weight's name."""
    name = plain_name(name.removeprefix(PREFIX))
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    return name.removesuffix(".qweight").removesuffix(".weight")


def name_of(x: Any) -> str | None:
    """What a base is called: its folder, or what its configuration says."""
    if isinstance(x, str | os.PathLike):
        return os.fspath(x)
    return config_of(x).get("_name_or_path") or None


def _of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Shape | None]:
    return dict(_layers((n, tuple(t.shape), t.is_floating_point()) for n, t in tensors))


def _layers(tensors: Iterable[tuple[str, Shape, bool]]) -> Iterator[tuple[str, Shape | None]]:
    """Path and shape of what is a layer's weight or that of experts."""
    for name, shape, is_float in tensors:
        words = name.split(".")
        is_weight = words[-1] in ("weight", "qweight") and len(shape) >= 2
        is_experts = len(shape) == 3 and words[-2:-1] == ["experts"]
        if (is_weight or is_experts) and _OF_ADAPTERS.isdisjoint(words):
            yield plain_path(name), shape if is_float else None


def _built(config: Any) -> nn.Module:
    """The model of a configuration, without any memory for its weights."""
    try:
        import transformers
    except ImportError as e:
        raise MissingExtraError(
            "to tell the modules of a configuration takes transformers: pip install transformers, "
            "or give the model or its module paths"
        ) from e
    given = dict(config) if isinstance(config, Mapping) else config
    try:
        if isinstance(given, dict):
            given = transformers.AutoConfig.for_model(**given)
        named = getattr(transformers, (given.architectures or [""])[0] or "", None)
        if not (isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)):
            named = None  # a file's text: no other name of the package is called
        auto: tuple[Any, ...] = (
            transformers.AutoModelForSeq2SeqLM,  # before the decoder of one by itself
            transformers.AutoModelForSpeechSeq2Seq,
            transformers.AutoModelForCausalLM,
            transformers.AutoModelForMaskedLM,
            transformers.AutoModel,
        )
        first: Any = next((a for a in auto if type(given) in a._model_mapping), auto[-1])
        with torch.device("meta"):
            made: nn.Module = named(given) if named is not None else first.from_config(given)
    except Exception as e:  # a damaged configuration can raise anything
        why = " ".join(str(e).split())
        raise MismatchError(f"transformers makes no model of this configuration: {why}") from e
    return made


def _of_path(path: Path) -> dict[str, Shape | None]:
    from safetensors import SafetensorError, safe_open

    if os.path.isfile(path / _ADAPTER_CONFIG):
        raise FileError(f"{path} is an adapter, not a base: lorafold.load(path) reads it")
    if not os.path.exists(path):
        raise FileError(f"no such folder: {str(path)!r}")
    if config_of(path).get("model_type") is not None:
        try:
            return weights_in(_built(config_of(path)))
        except (MissingExtraError, MismatchError):
            pass  # the files' own names then
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise FileError(
            f"{path} holds neither safetensors files nor a {_CONFIG_NAME} that transformers knows"
        )
    found: dict[str, Shape | None] = {}
    for file in files:
        try:
            if not os.path.isfile(file):  # but a folder, or a FIFO that one would wait for
                raise FileError(f"{file} is no file")
            with safe_open(file, "pt") as f:
                slices = {key: f.get_slice(key) for key in f.keys()}  # noqa: SIM118
                found |= _layers(
                    (key, tuple(part.get_shape()), part.get_dtype() in _FLOATS)
                    for key, part in slices.items()
                )
        except (SafetensorError, OSError) as e:
            raise FileError(f"{file}: can't be read as safetensors ({e})") from e
    return found


def _read_config(path: Path) -> dict[str, Any]:
    try:
        if not os.path.isfile(path) or path.stat().st_size > _LONGEST:
            raise FileError(f"{path} is no configuration")
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileError:
        raise
    except (OSError, ValueError, RecursionError) as e:
        raise FileError(f"{path}: not valid JSON ({e})") from e
    if not isinstance(found, dict):
        raise FileError(f"{path}: must hold a JSON object")
    return found
