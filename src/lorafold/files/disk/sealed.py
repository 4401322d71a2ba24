"""A whole file of tensors in memory, and seals on what files say.

A seal is a digest of the header's own values and of all tensors, beside them in the header: a state
that a later step goes on from must be what was written, to the last bit. Files of other formats are
sealed from beside, by their lengths and checksums.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...adapter import combined_digest, tensor_digest
from ...errors import FileError, MismatchError
from ..config import json_object
from ..peft_keys import check_gathered
from ..safetensors import header_bytes, is_finite, open_file, parse_header, read_tensors
from .held import open_regular

_SEAL = "sha256"  # of all the rest


def read_whole(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """A file's metadata and its tensors.

    Raises:
        FileError: it can't be read. MismatchError: NaN or infinity in it, or what was not gathered.
    """
    with open_file(path) as f:
        header, size = header_bytes(f, path)
        entries, metadata = parse_header(header, size, path)
        check_gathered(((key, entry.shape) for key, entry in entries.items()), os.fspath(path))
        tensors = dict(zip(entries, read_tensors(f, entries.items(), path), strict=True))
    for key, t in tensors.items():
        if not is_finite(t):
            raise MismatchError(f"{os.fspath(path)}: {key!r} holds NaN or infinity")
    return metadata, tensors


def read_sealed(path: str | os.PathLike[str], key: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header, JSON under `key` of the metadata, and the tensors of a file with a seal.

    Raises:
        FileError: it can't be read, or is not what was written. MismatchError: as `read_whole`.
    """
    metadata, tensors = read_whole(path)
    header = json_object(metadata.get(key, "{}"), f"{os.fspath(path)}: its header {key!r}")
    check_seal(path, header, tensors)
    return header, tensors


def with_seal(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A header, of values that JSON has, with a digest of it and of the tensors."""
    header = json.loads(json.dumps(header))  # as it will be read: texts for keys
    text = json.dumps({k: v for k, v in header.items() if k != _SEAL}, sort_keys=True)
    parts = [tensor_digest(key, t) for key, t in tensors.items()]
    return {**header, _SEAL: combined_digest([hashlib.sha256(text.encode()).digest(), *parts])}


def check_seal(
    path: str | os.PathLike[str], header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Raise a `FileError` where they are not what was written."""
    if header != with_seal(header, tensors):
        raise FileError(f"{path}: what it holds is not what was written: it is damaged")


def sums_of(folder: Path, names: Iterable[str]) -> dict[str, list[Any]]:
    """{name: its bytes and their SHA-256} of files in a folder, as `check_sums` takes it.

    Raises:
        FileError: one can't be read.
    """
    return {name: _sum(folder / name, None) for name in names}


def check_sums(folder: Path, told: Mapping[str, Any], remedy: str = "it is damaged") -> None:
    """Raise a `FileError` where a file is not what it was; one of another length is not read."""
    for name, sums in told.items():
        if _sum(folder / name, sums[0] if isinstance(sums, list) and sums else None) != sums:
            raise FileError(f"{folder / name} is not what was written: {remedy}")


def _sum(path: Path, size: object) -> list[Any]:
    """The bytes of a file, and their SHA-256, unless they are not so many."""
    found = hashlib.sha256()
    try:
        with open(open_regular(path), "rb") as file:
            length = os.fstat(file.fileno()).st_size
            while size in (None, length) and (part := file.read(1 << 20)):
                found.update(part)
    except OSError as e:
        raise FileError(f"{path}: {e.strerror or e}") from e
    return [length, found.hexdigest()]
