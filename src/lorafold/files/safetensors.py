"""Reading single tensors of a safetensors file by their byte range.

The format (https://github.com/huggingface/safetensors): eight bytes, the little-endian length N of
the header; N bytes of JSON, {key: {dtype, shape, data_offsets}}; then the data, without holes.
A tensor is read into memory of its own and never mapped: mapped pages count as the process's
memory, and a mapping per adapter would hold one descriptor each. A file is open only while it is
being read, so ten thousand adapters need no more descriptors than one.

A header that promises anything other than what the file holds is refused before data is touched.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from io import FileIO
from typing import Any

import torch
from torch import Tensor

from ..errors import FileError

# What the reference implementation accepts; a longer header is damage, not an adapter.
_MAX_HEADER = 100_000_000

_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
# Older releases of torch lack some of the 8-bit types.
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, torch_name)
    for name, torch_name in _NAMES.items()
    if hasattr(torch, torch_name)
}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: its dtype, shape, and the bytes [start, stop) of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def open_file(path: str | os.PathLike[str]) -> FileIO:
    """The file, unbuffered, for reading.

    Raises:
        FileError: it can't be opened.
    """
    try:
        return open(path, "rb", buffering=0)
    except OSError as e:
        raise FileError(f"{os.fspath(path)}: {e.strerror or e}") from e


def header_bytes(file: FileIO, path: str | os.PathLike[str]) -> tuple[bytes, int]:
    """The header's JSON, not yet parsed, and the size of the file.

    Raises:
        FileError: the file is empty, cut off, or no safetensors file.
    """
    size = os.fstat(file.fileno()).st_size
    start = _read(file, 0, min(8, size), path)
    if size < 8:
        raise FileError(f"{path}: {size} bytes are too few for a safetensors file; fetch it again")
    length = int.from_bytes(start, "little")
    if length > _MAX_HEADER:
        raise FileError(
            f"{path}: the header claims {length} bytes, which no safetensors file has; "
            "the file is damaged or of another format"
        )
    if 8 + length > size:
        raise FileError(
            f"{path}: the header takes {length} bytes, but the file ends after {size}: "
            "it is cut off; fetch it again"
        )
    return _read(file, 8, length, path), size


def entries(header: bytes, size: int, path: str | os.PathLike[str]) -> dict[str, Entry]:
    """What a safetensors header says of each tensor, checked against the size of the file.

    Raises:
        FileError: naming the file and the key: no JSON, keys twice, a dtype or shape that is
            none, ranges that overlap, leave holes, or reach beyond the end.
    """
    try:
        parsed = json.loads(header.decode("utf-8"), object_pairs_hook=_no_twins)
    except (ValueError, RecursionError) as e:
        raise FileError(f"{path}: the header is not valid JSON ({e})") from e
    if not isinstance(parsed, dict):
        raise FileError(f"{path}: the header must be a JSON object, found a {_kind(parsed)}")
    parsed.pop("__metadata__", None)
    data = 8 + len(header)
    found = {key: _entry(key, value, data, path) for key, value in parsed.items()}
    end = data
    for key, entry in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise FileError(f"{path}: the bytes of {key!r} do not follow those before it")
        end = entry.stop
        if end > size:
            raise FileError(
                f"{path}: {key!r} reaches to byte {end}, but the file ends after {size}: "
                "it is cut off; fetch it again"
            )
    if end != size:
        raise FileError(f"{path}: {size - end} bytes after the last tensor belong to none")
    return found


def read_tensors(
    file: FileIO, wanted: Iterable[tuple[str, Entry]], path: str | os.PathLike[str]
) -> list[Tensor]:
    """The tensors at those entries, each in memory of its own.

    Raises:
        FileError: the file ends too early (it changed since its header was read).
    """
    result = []
    for key, entry in wanted:
        t = torch.empty(entry.shape, dtype=entry.dtype)
        if t.numel():
            view = t.reshape(-1).view(torch.uint8).numpy().data
            _fill(file, entry.start, view, f"{path}: {key!r}")
        result.append(t)
    return result


def _entry(key: str, value: Any, data: int, path: str | os.PathLike[str]) -> Entry:
    if not isinstance(value, dict):
        raise FileError(f"{path}: the header's entry for {key!r} must be an object")
    name: Any = value.get("dtype")
    shape: Any = value.get("shape")
    offsets: Any = value.get("data_offsets")
    dtype = DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise FileError(f"{path}: {key!r} has the unknown dtype {name!r}")
    if not _are_sizes(shape):
        raise FileError(f"{path}: {key!r} has the impossible shape {shape!r}")
    if not (_are_sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise FileError(f"{path}: {key!r} has the impossible byte range {offsets!r}")
    expected = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != expected:
        raise FileError(
            f"{path}: {key!r} is {name} of shape {tuple(shape)}, which takes {expected} bytes, "
            f"but has {offsets[1] - offsets[0]}"
        )
    return Entry(dtype, tuple(shape), data + offsets[0], data + offsets[1])


def _are_sizes(values: Any) -> bool:
    # `True` is an int to Python, and 2⁶³ is none to torch.
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twin = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twin!r} appears twice")
    return {sys.intern(k): v for k, v in result.items()}


def _kind(value: Any) -> str:
    return type(value).__name__


def _read(file: FileIO, start: int, length: int, path: str | os.PathLike[str]) -> bytes:
    buffer = bytearray(length)
    _fill(file, start, memoryview(buffer), str(path))
    return bytes(buffer)


def _fill(file: FileIO, start: int, view: memoryview, what: str) -> None:
    try:
        file.seek(start)
        done = 0
        while done < len(view):  # one read gives at most 2 GiB on Linux
            n = file.readinto(view[done:])
            if not n:
                raise FileError(f"{what} ends too early: the file is cut off or was changed")
            done += n
    except OSError as e:
        raise FileError(f"{what} can't be read: {e.strerror or e}") from e
