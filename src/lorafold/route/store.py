"""A router on disk: `router.json` with all that has a name, `router.safetensors` with the numbers.

The JSON holds the checksum of the numbers. A directory appears whole or not at all, and nothing in
it is code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as tensors_from
from safetensors.torch import save as as_safetensors
from torch import Tensor

from ..errors import FileError
from ..files.atomic import new_directory
from ..files.config import json_value, read_text
from ..files.disk.held import read_regular
from ..files.remote.place import Place, is_file, place_of
from ..files.replacing import Kind
from ..files.safetensors import read_entries

NAME, NUMBERS = "router.json", "router.safetensors"
VERSION = 1
ROUTER = Kind(
    "a router",
    lambda path: is_file(path / NAME),
    re.compile(f"{re.escape(NAME)}|{re.escape(NUMBERS)}"),
)

Record = dict[str, Any]
_MISSING = object()  # of no type that is asked for: not the same as null


def write(
    path: str | os.PathLike[str],
    record: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    overwrite: bool,
) -> None:
    """Make a router's directory.

    Raises:
        FileError: something is at `path`, and `overwrite` is False or it is no router.
    """
    own = {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}
    numbers = as_safetensors(own, {"format": "pt"})
    full = {"lorafold_router": VERSION, **record, "sha256": hashlib.sha256(numbers).hexdigest()}
    with new_directory(path, ROUTER, overwrite=overwrite) as staging:
        (staging / NUMBERS).write_bytes(numbers)
        text = json.dumps(full, indent=2, allow_nan=False)
        (staging / NAME).write_text(text + "\n", encoding="utf-8")


def read(path: str | os.PathLike[str], kind: str | None = None) -> tuple[Fields, dict[str, Tensor]]:
    """What `write` wrote.

    Args:
        kind: that it must be; any when None.

    Raises:
        FileError: no router, one of another kind or of a later version, or a damaged one.
    """
    folder = place_of(path)
    if not os.fspath(path) or not is_file(folder / NAME):
        raise FileError(f"{os.fspath(path) or repr('')} is not a router: there is no {NAME} in it")
    where = folder / NAME
    fields = Fields(json_value(read_text(where), where), where)
    version = fields.get("lorafold_router", int)
    if version != VERSION:
        raise FileError(f"{where}: version {version} is not one that is read here ({VERSION})")
    if kind is not None and fields.get("kind", str) != kind:
        raise FileError(f"{where}: it is a router of the kind {fields.get('kind', str)!r}")
    read_entries(folder / NUMBERS)  # before all of it is in memory, that it is as long as it says
    try:
        numbers = read_regular(folder / NUMBERS)
    except OSError as e:
        raise FileError(f"{folder / NUMBERS}: {e.strerror or e}") from e
    if hashlib.sha256(numbers).hexdigest() != fields.get("sha256", str):
        raise FileError(f"{folder / NUMBERS}: its checksum is not the one in {NAME}; save it anew")
    try:
        return fields, tensors_from(numbers)
    except SafetensorError as e:
        raise FileError(f"{folder / NUMBERS}: no safetensors file ({e})") from e


class Fields:
    """The fields of a record, each asked for by name and type."""

    def __init__(self, record: Any, where: Place) -> None:
        if not isinstance(record, dict):
            raise FileError(f"{where}: must hold a JSON object, found a {type(record).__name__}")
        self._record, self.where = record, where

    def get(self, name: str, *types: Any) -> Any:
        """A field of one of these types; None is `type(None)`, and no number is a bool.

        Raises:
            FileError: it is not there, or of another type.
        """
        value = self._record.get(name, _MISSING)
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise FileError(
                f"{self.where}: {name!r} is missing or of the wrong type: {value!r:.80}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise FileError(f"{self.where}: {name!r} is not finite")
        return value

    def number(self, name: str) -> float:
        """A field that is a number, whole or not.

        Raises:
            FileError: it is not there, or none that a float can be.
        """
        value = self.get(name, float, int)
        try:
            return float(value)
        except OverflowError:
            raise FileError(f"{self.where}: {name!r} is too large a number") from None

    def inner(self, name: str) -> Fields | None:
        """The fields of an object in it; None where it is null."""
        value = self.get(name, dict, type(None))
        return None if value is None else Fields(value, self.where)

    def names(self) -> tuple[str, ...]:
        """The names that are routed to."""
        names = self.get("names", list)
        if not names or not all(isinstance(n, str) and n for n in names):
            raise FileError(f"{self.where}: 'names' must be a list of texts")
        if len(set(names)) < len(names):
            raise FileError(f"{self.where}: 'names' has one twice")
        return tuple(names)

    def counts(self, name: str, width: int) -> list[list[int]]:
        """A list of lists of so many whole numbers."""
        rows: list[list[int]] = self.get(name, list)
        for row in rows:
            fits = isinstance(row, list) and len(row) == width
            if not fits or not all(type(n) is int and n >= 0 for n in row):
                raise FileError(f"{self.where}: {name!r} must hold lists of {width} whole numbers")
        return rows
