"""The base that is served: its model, how it reads and writes, and the engine that runs it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import FileError, MismatchError, MissingExtraError
from ..quantize import quantize_base
from .adapters import Attachments
from .engine import Engine, Limits
from .run.encoder import EncoderEngine, pooling_of
from .run.families import (
    BEHIND_PADDING,
    ENCODERS,
    check_family,
    check_packed,
    context_of,
    vocabulary_of,
)
from .run.packed import PackedEngine
from .run.rows import RowsEngine
from .words import Words, read_words

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZED: dict[str, dict[str, Any]] = {
    "nf4": {"bits": 4, "kind": "nf4"},
    "fp4": {"bits": 4, "kind": "fp4"},
    "int8": {"bits": 8, "kind": "int8"},
}
ENGINES = ("rows", "packed")
_SHARE = 0.5  # of the free memory that the cache may take, where its size isn't said


@dataclass(frozen=True)
class Base:
    """A base, ready to run.

    Args:
        name: that requests call it by. engine: runs it. words: how it reads and writes.
        attachments: its adapters. encoder: whether it gives vectors, and no texts.
    """

    name: str
    engine: Engine
    words: Words
    attachments: Attachments
    encoder: bool


@dataclass(frozen=True)
class Room:
    """How much is run at once.

    Args:
        rows: requests. length: tokens of each; what the base takes, at most 4,096, when None.
        adapters: different ones. waiting: requests in the queue.
    """

    rows: int | None = None
    length: int | None = None
    adapters: int | None = None
    waiting: int = 256


def read_base(
    folder: str | os.PathLike[str],
    name: str,
    *,
    dtype: str = "auto",
    quantize: str | None = None,
    device: str | None = None,
    engine: str = "rows",
    room: Room = Room(),
    template: str | None = None,
) -> Base:
    """A base in a folder, on a device, with its engine.

    Args:
        folder: of a model of transformers: a causal language model, or an encoder.
        name: that requests call it by.
        dtype: "float32", "bfloat16", "float16"; "auto" is as it is stored, but float32 where a
            processor would compute in float16.
        quantize: "nf4", "fp4" or "int8". device: a GPU where there is one, when None.
        engine: "rows", or "packed": continuous batching in pages, for a GPU with flash attention.
        room: how much is run at once. template: a chat template of its own.

    Raises:
        FileError: no model that transformers can load. RefusedError: an architecture that isn't
            served. MismatchError: options out of range. MissingExtraError: no transformers.
    """
    path = Path(folder)
    for label, value, known in (
        ("dtype", dtype, ("auto", *DTYPES)),
        ("quantize", quantize, (None, *QUANTIZED)),
        ("engine", engine, ENGINES),
    ):
        if value not in known:
            named = ", ".join(str(k) for k in known if k is not None)
            raise MismatchError(f"{label} must be one of {named}; found {value!r}")
    transformers = _transformers()
    config = _config(path, transformers)
    encoder = config.model_type in ENCODERS
    packed = engine == "packed"
    _check_kind(config, encoder, packed)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision = _dtype(dtype, config, device)
    attention = _attention(transformers, precision, device) if packed else None
    model = _model(path, config, transformers, precision, encoder, attention)
    model.to(device)
    if quantize is not None:
        quantize_base(model, **QUANTIZED[quantize])
    words = read_words(path, model, transformers, template)
    limits = _limits(model, room, encoder or packed, device)
    attachments = Attachments(model, limits.adapters, model.dtype)
    made: Engine
    if encoder:
        made = EncoderEngine(model, attachments, limits, pooling_of(path))
    elif packed:
        fitting = min(limits.rows, _rows_that_fit(model.config, model, limits.length, device))
        made = PackedEngine(model, attachments, limits, fitting * limits.length)
    else:
        made = RowsEngine(model, attachments, limits)
    return Base(name, made, words, attachments, encoder)


def _check_kind(config: Any, encoder: bool, packed: bool) -> None:
    if encoder and packed:
        raise MismatchError(
            f"the packed engine runs language models, and {config.model_type!r} is an encoder: "
            "leave engine= out"
        )
    if packed:
        check_packed(config)
    elif not encoder:
        check_family(config)


def _attention(transformers: Any, dtype: torch.dtype, device: str) -> str | None:
    """Flash attention where it is installed and can be used; None for what any device has."""
    half = dtype in (torch.float16, torch.bfloat16)
    if torch.device(device).type == "cuda" and half:
        for version in (3, 2):
            if getattr(transformers.utils, f"is_flash_attn_{version}_available")():
                return f"flash_attention_{version}"
    return None


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as e:
        raise MissingExtraError(
            "serving takes transformers, which is not there: pip install 'lorafold[serve]'"
        ) from e
    return transformers


def _config(folder: Path, transformers: Any) -> Any:
    if not (folder / "config.json").is_file():
        raise FileError(
            f"{folder} is no base: a base is a folder with config.json, weights and tokenizer; one "
            "on the Hub is fetched with `hf download ID --local-dir DIR`"
        )
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # a damaged file can raise anything
        text = str(e).strip().splitlines() or [type(e).__name__]
        raise FileError(f"{folder}: transformers can't read its config: {text[0]}") from e


def _dtype(asked: str, config: Any, device: str) -> torch.dtype:
    if asked != "auto":
        return DTYPES[asked]
    stored = getattr(config, "dtype", None) or torch.float32
    slow = stored == torch.float16 and torch.device(device).type == "cpu"
    return torch.float32 if slow or stored not in DTYPES.values() else stored


def _model(
    folder: Path,
    config: Any,
    transformers: Any,
    dtype: torch.dtype,
    encoder: bool,
    attention: str | None,
) -> Any:
    kind = transformers.AutoModel if encoder else transformers.AutoModelForCausalLM
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        model = kind.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            attn_implementation=attention or ("eager" if capped else "sdpa"),
        )
    except Exception as e:  # a damaged folder can raise anything
        text = str(e).strip().splitlines() or [type(e).__name__]
        raise FileError(f"{folder}: transformers can't load a model from it: {text[0]}") from e
    finally:
        if shown:
            bars.enable_progress_bar()
    return model.eval()


def _limits(model: Any, room: Room, shared: bool, device: str) -> Limits:
    config, context = model.config, context_of(model.config)
    if config.model_type in BEHIND_PADDING:
        context -= (config.pad_token_id or 0) + 1
    if room.length is not None and room.length > context:
        raise MismatchError(f"max_len= asks for {room.length} tokens, and the base takes {context}")
    length = room.length or min(context, 4096)
    fitting = 64 if shared else _rows_that_fit(config, model, length, device)
    rows = room.rows or min(64, fitting)
    adapters = room.adapters or max(64, rows)
    for label, value in (("max_rows", rows), ("max_len", length), ("max_queue", room.waiting)):
        if value < 1:
            raise MismatchError(f"{label} must be at least 1, not {value}")
    return Limits(length, vocabulary_of(model), rows, adapters, room.waiting)


def _rows_that_fit(config: Any, model: Any, length: int, device: str) -> int:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = 2 * config.num_hidden_layers * heads * size * length * model.dtype.itemsize
    if torch.device(device).type == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, int(_SHARE * free // row))
