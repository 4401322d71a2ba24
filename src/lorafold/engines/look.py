"""A file as other programs see it: its keys, header and config as they are, and what they mean."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from ..errors import FileError, LorafoldError
from ..files import AdapterFile, open_adapter
from ..files.base import BaseFiles, read_base
from ..files.config import json_object, read_text
from ..files.find import GGUF_SUFFIX, Location, in_library, locate
from ..files.formats.alphas import alpha_keys
from ..files.formats.diffusion.bases import by_base
from ..files.formats.foreign import may_hold_adapter
from ..files.formats.gguf.header import read_head
from ..files.formats.readers import format_of
from ..files.formats.reading import Source, Stored, shapes_of
from ..files.remote.place import size_of
from ..files.safetensors import (
    header_bytes,
    open_place,
    parse_header,
    read_range,
    read_tensors,
)

_OF_IMAGES = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")


@dataclass(frozen=True)
class Look:
    """An adapter's files before any of it is taken for what it means.

    Args:
        path: as it was given.
        place: where its files are.
        form: the name of the format that they are in. said: what messages call it.
        tensors: {key: what is stored there}.
        metadata: of the header. values: of a GGUF file's.
        config: what adapter_config.json says; None where there is none.
        alphas: {module's name in the file: α}, of tensors of one number.
        file: the adapter as it is read here; None where it can't be, which `error` says.
        error: why it can't be read here.
        base: the base's folder, where one is given, of what is no image model's.
    """

    path: str
    place: Location
    form: str
    said: str
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None
    values: Mapping[str, Any] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    file: AdapterFile | None = None
    error: str | None = None
    base: BaseFiles | None = None

    @property
    def scales(self) -> Mapping[str, float]:
        """{module: the right factor}; none where it can't be read here."""
        return {} if self.file is None else self.file.scales

    @property
    def is_of_images(self) -> bool:
        """Whether it is of an image model, by the paths of its modules."""
        return any(path.startswith(_OF_IMAGES) for path in self.scales)

    @cached_property
    def tied(self) -> tuple[str, str] | None:
        """(output layer, embedding) of the base that are one weight; None where they are two, or
        no base is given.
        """
        if self.base is None:
            return None
        asked = [] if self.file is None else list(self.file.parts.names())
        return self.base.named([*asked, "lm_head.weight"]).tied


def look(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    alpha: float | None = None,
    revision: str | None = None,
) -> Look:
    """Read the header and the config of an adapter's files.

    Args:
        path: a folder or file.
        base: the base's folder.
        alpha: α, for a file that does not say its own.
        revision: a branch, tag or commit, for a Hub id.

    Raises:
        FileError: nothing there, no adapter's file, or one that others do not read as it is.
        MismatchError: an image model's, which does not fit the base.
    """
    if in_library(os.fsdecode(path)) is not None:
        raise FileError(
            f"{path} lies in a library, which other programs do not read: write it first, "
            "`lorafold convert LIB:NAME -o OUT --to peft`, and check that"
        )
    place = locate(path, revision=revision, allow_pickle=True)
    if place.weights.suffix == ".bin":
        raise FileError(
            f"{place.weights} is a pickle, which is not looked into here: write it as safetensors "
            "first, `lorafold convert IN -o OUT --to peft --allow-pickle`, and check that"
        )
    opened, error = None, None
    try:
        opened = open_adapter(path, alpha=alpha, base=base, revision=revision)
    except LorafoldError as e:
        error = str(e)
        if not may_hold_adapter(place.weights):
            raise
    files = None
    if base is not None and opened is not None and opened.names:
        by_base(opened.load(), opened.names, base)  # a pipeline, which says no more than names
    elif base is not None:
        files = read_base(base)
    if place.weights.suffix == GGUF_SUFFIX:
        found = _of_gguf(os.fspath(path), place)
    else:
        found = _of_safetensors(os.fspath(path), place)
    return replace(found, file=opened, error=error, base=files)


def _of_gguf(path: str, place: Location) -> Look:
    where = str(place.weights)
    with open_place(place.weights) as file:
        head = read_head(
            lambda at, n: read_range(file, at, n, where), size_of(place.weights), where
        )
    tensors = {k: Stored(k, e.dtype, head.shapes[k]) for k, e in head.entries.items()}
    return Look(path, place, "gguf", "llama.cpp", tensors, {}, None, head.values)


def _of_safetensors(path: str, place: Location) -> Look:
    with open_place(place.weights) as file:
        raw, size = header_bytes(file, place.weights)
        entries, metadata = parse_header(raw, size, str(place.weights))
        tensors = {key: Stored(key, e.dtype, e.shape) for key, e in entries.items()}
        keys = alpha_keys(shapes_of(tensors))
        numbers = read_tensors(file, [(k, entries[k]) for k in keys.values()], place.weights)
    text = None if place.config is None else read_text(place.config)
    nothing = torch.empty(0)  # what the numbers are does not say in what form they are
    where = str(place.weights)
    source = Source(tensors, where, lambda _: [], lambda *_: nothing, metadata, text)
    form = format_of(source)
    config = None if text is None else json_object(text, str(place.config))
    alphas = {name: float(number) for name, number in zip(keys, numbers, strict=True)}
    return Look(path, place, form.name, form.said, tensors, metadata, config, {}, alphas)
