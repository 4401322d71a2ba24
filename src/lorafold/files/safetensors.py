"""The safetensors format: headers parsed with care and written, tensors read by their byte range.

A file (https://github.com/huggingface/safetensors): eight bytes, the little-endian length N of the
header; N bytes of JSON, {key: {dtype, shape, data_offsets}}, trailing spaces allowed; then the
data, without holes. A tensor is read into memory of its own and never mapped: mapped pages count
as the process's memory, and a mapping per adapter would hold one descriptor each. A file is open
only while it is being read, so ten thousand adapters need no more descriptors than one.

A header that promises anything other than what the file holds is refused before data is touched.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from typing import Any, TypeGuard

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import FileError
from .disk.held import Descriptor, open_regular

MAX_HEADER = 100_000_000  # bytes; the reference implementation reads no more
_LONGEST_KEY = 10_000  # letters, of a key and so of a module's path
_LONGEST_ENTRY = 4096  # letters, of what a header says of one tensor
_LONGEST_WIDE = 16 << 20  # bytes of a header with letters beyond ASCII
_METADATA = "__metadata__"
_SPACES, _BLANK = " \t\r\n", (" ", "\t", "\r", "\n")
_MAX_DIMENSIONS = 64  # of a numpy array, which a tensor is read through

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
_CODES = {dtype: name for name, dtype in DTYPES.items()}

Path = str | os.PathLike[str]
Opened = FileIO | Descriptor


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: its dtype, shape, and the bytes [start, stop) of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def code(self) -> str:
        """The dtype, as safetensors calls it (`F32`, `BF16`, …)."""
        return _CODES[self.dtype]


# How other files begin that get the name of one: what they are, and what to do.
_DISGUISES = (
    (
        b"version https://git-lfs.github.com/",
        "a pointer of git-LFS, not the file itself: fetch it (git lfs pull)",
    ),
    (b"<!doctype", "a page of HTML, not the file: fetch it again, from where it can be downloaded"),
    (b"<html", "a page of HTML, not the file: fetch it again, from where it can be downloaded"),
    (b"<?xml", "an XML text, not the file: fetch it again, from where it can be downloaded"),
    (b"gguf", "a GGUF file of llama.cpp, which is not read"),
    (b"pk\x03\x04", "a ZIP file, most likely one of PyTorch's: its name should end in .bin"),
    (b"\x1f\x8b", "compressed with gzip: unpack it first"),
)
_ENOUGH = 64  # bytes that show which


def disguise(start: bytes | bytearray) -> str | None:
    """What a file is that has another's name, by how it begins; None where nothing is known."""
    start = bytes(start[:_ENOUGH]).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return next((says for begin, says in _DISGUISES if start.startswith(begin)), None)


@contextlib.contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Tell what the system, or the safetensors library, says of a file as a `FileError`.

    Args:
        path: what is named where they don't name the file.
    """
    try:
        yield
    except OSError as e:
        raise FileError(f"{e.filename or os.fspath(path)}: {e.strerror or e}") from e
    except SafetensorError as e:
        raise FileError(f"{os.fspath(path)}: {e}") from e


# Reading a file


def open_file(path: Path) -> FileIO:
    """The file, unbuffered, for reading.

    Raises:
        FileError: it can't be opened.
    """
    try:
        return FileIO(open_regular(path))
    except OSError as e:
        raise FileError(f"{os.fspath(path)}: {e.strerror or e}") from e


def header_bytes(file: Opened, path: Path) -> tuple[bytearray, int]:
    """The header's JSON, not yet parsed, and the size of the file.

    Raises:
        FileError: the file is empty, cut off, or no safetensors file.
    """
    size = os.fstat(file.fileno()).st_size
    start = _read(file, 0, min(_ENOUGH, size), path)
    says = disguise(start)
    if says is not None:
        raise FileError(f"{os.fspath(path)} is {says}")
    length = header_length(start[:8], size, path)
    return _read(file, 8, length, path), size


def read_entries(path: Path) -> dict[str, Entry]:
    """What the header of the file says of each tensor.

    Raises:
        FileError: as `header_bytes` and `parse_header`.
    """
    with open_file(path) as f:
        header, size = header_bytes(f, path)
    return parse_header(header, size, path)[0]


def read_tensors(file: Opened, wanted: Iterable[tuple[str, Entry]], path: Path) -> list[Tensor]:
    """The tensors at those entries, each in memory of its own.

    Raises:
        FileError: the file ends too early (it changed since its header was read).
    """
    result = []
    for key, entry in wanted:
        t, view = room(entry)
        _fill(file, entry.start, view, f"{path}: {key!r}")
        result.append(t)
    return result


def room(entry: Entry) -> tuple[Tensor, memoryview]:
    """A tensor of the entry's dtype and shape, and its bytes, to be filled."""
    flat = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
    return flat.view(entry.dtype).reshape(entry.shape), flat.numpy().data


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file, with the permissions that any new file has here.

    Args:
        tensors: on the CPU, contiguous, no two sharing memory.
        path: the file, in a folder that nobody else writes to.
        metadata: what the header says beside.
    """
    from safetensors.torch import save_file

    number = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    mode = os.fstat(number).st_mode
    os.close(number)
    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    os.chmod(path, stat.S_IMODE(mode))  # the library's own are for the owner alone


# Headers


def header_length(start: bytes | bytearray, size: int, where: Path) -> int:
    """The length of the JSON, from the first eight bytes of a file of `size` bytes.

    Raises:
        FileError: the file is empty, cut off, or no safetensors file.
    """
    if size < 8:
        raise FileError(f"{where}: {size} bytes are too few for a safetensors file; fetch it again")
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER:
        raise FileError(
            f"{where}: the header claims {length} bytes, which no safetensors file has; "
            "the file is damaged or of another format"
        )
    if 8 + length > size:
        raise FileError(
            f"{where}: the header takes {length} bytes, but the file ends after {size}: "
            f"it is cut off (more than {8 + length} bytes expected, {size} found); fetch it again"
        )
    return length


def parse_header(
    header: bytes | bytearray, size: int, where: Path
) -> tuple[dict[str, Entry], dict[str, str]]:
    """What a header says of each tensor, checked against the file's size; and its metadata.

    Returns:
        {key: entry} in the order of the bytes, and the `__metadata__`.

    Raises:
        FileError: naming the file and the key: no JSON, keys twice, a dtype or shape that is
            none, ranges that overlap, leave holes, or reach beyond the end.
    """
    data = end = 8 + len(header)
    found: dict[str, Entry] = {}
    metadata: Any = {}
    try:
        # What no encoder writes could not be written again: a lone surrogate, spelled \ud800.
        for key, value in _members(_decoded(header)):
            if key == _METADATA:
                metadata = value
            else:
                found[sys.intern(key)] = _entry(key, value, data, where)
    except FileError:
        raise
    except (ValueError, RecursionError) as e:
        raise FileError(f"{where}: the header is not valid JSON ({e})") from e
    if not isinstance(metadata, dict):
        raise FileError(f"{where}: __metadata__ in the header must map texts to texts")
    found = dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)))
    for key, entry in found.items():
        if entry.start != end:
            what = "overlap" if entry.start < end else "leave a hole after"
            raise FileError(f"{where}: the bytes of {key!r} {what} those before it")
        end = entry.stop
        if end > size:
            whole = max(entry.stop for entry in found.values())
            raise FileError(
                f"{where}: {key!r} reaches to byte {end}, but the file ends after {size}: "
                f"it is cut off ({whole} bytes expected, {size} found); fetch it again"
            )
    if end != size:
        raise FileError(f"{where}: {size - end} bytes after the last tensor belong to none")
    return found, metadata


def header_of(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str] | None,
    where: Path,
    room: int = 0,
) -> bytes:
    """A file up to its first tensor: the length, and the JSON padded to a multiple of 8 bytes.

    Args:
        tensors: (key, dtype, shape), in the order of the bytes.
        metadata: None to write none.
        where: the file, for messages.
        room: the least that is returned, in bytes; a multiple of 8.

    Raises:
        FileError: it is longer than any reader takes.
    """
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at = 0
    for key, dtype, shape in tensors:
        stop = at + math.prod(shape) * dtype.itemsize
        entries[key] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    if len(text) > MAX_HEADER:
        raise FileError(
            f"{where}: a header of {len(text):,} bytes exceeds the {MAX_HEADER:,} of the format; "
            "use several files"
        )
    length = max(room - 8, -(-len(text) // 8) * 8)
    return length.to_bytes(8, "little") + text.ljust(length)


def _decoded(header: bytes | bytearray) -> str:
    if len(header) > _LONGEST_WIDE and not header.isascii():
        raise ValueError("so long a one is ASCII")  # or takes four times its bytes
    return header.decode("utf-8").strip(_SPACES)


def _members(text: str) -> Iterator[tuple[str, Any]]:
    """(key, value) of a header, one after another, so that no more grows than was looked at."""
    at = yield from _object(text, 0, _header_value)
    if at != len(text):
        raise ValueError(f"something follows it at letter {at}")


def _object(
    text: str, at: int, read: Callable[[str, str, int], tuple[Any, int]]
) -> Generator[tuple[str, Any], None, int]:
    """The members of an object; returns where it ends."""
    if text[at : at + 1] != "{":
        raise ValueError("it must be a JSON object")
    keys: set[str] = set()
    at = _skipped(text, at + 1)
    closed = text[at : at + 1] == "}"
    while not closed:
        if text[at : at + 1] != '"':
            raise ValueError(f"no key at letter {at}")
        key, at = _decoder.raw_decode(text, at)
        key.encode()  # raises a ValueError where it is no Unicode
        if len(key) > _LONGEST_KEY:
            raise ValueError(f"the key {key[:40]!r}… has {len(key):,} letters")
        if key in keys:
            raise ValueError(f"the key {key!r} appears twice")
        keys.add(key)
        at = _skipped(text, at)
        if text[at : at + 1] != ":":
            raise ValueError(f"no ':' at letter {at}")
        value, at = read(key, text, _skipped(text, at + 1))
        yield key, value
        at = _skipped(text, at)
        closed = text[at : at + 1] == "}"
        if not closed and text[at : at + 1] != ",":
            raise ValueError(f"no ',' at letter {at}")
        at = at if closed else _skipped(text, at + 1)
    return at + 1


def _header_value(key: str, text: str, at: int) -> tuple[Any, int]:
    if key == _METADATA and text[at : at + 1] == "{":
        texts: dict[str, str] = {}
        members = _object(text, at, _text_value)
        while True:
            try:
                name, value = next(members)
            except StopIteration as e:
                return texts, e.value
            texts[name] = value
    value, end = _decoder.raw_decode(text[at : at + _LONGEST_ENTRY])
    return value, at + end


def _text_value(key: str, text: str, at: int) -> tuple[str, int]:
    if text[at : at + 1] != '"':
        raise ValueError("__metadata__ must map texts to texts")
    value, end = _decoder.raw_decode(text, at)
    value.encode()
    return value, end


def _skipped(text: str, at: int) -> int:
    while text[at : at + 1] in _BLANK:
        at += 1
    return at


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        key.encode()
        if key in result:
            raise ValueError(f"the key {key!r} appears twice")
        result[key] = value
    return result


_decoder = json.JSONDecoder(object_pairs_hook=_no_twins)


def _entry(key: str, value: Any, data: int, where: Path) -> Entry:
    if not isinstance(value, dict):
        raise FileError(f"{where}: the header's entry for {key!r} must be an object")
    name, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    dtype = DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        late = name in _NAMES if isinstance(name, str) else False
        why = f"which torch {torch.__version__} does not have yet" if late else "which is unknown"
        raise FileError(f"{where}: {key!r} has the dtype {name!r:.80}, {why}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise FileError(f"{where}: {key!r} has the impossible shape {shape!r:.80}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FileError(f"{where}: {key!r} has the impossible byte range {offsets!r:.80}")
    expected = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != expected:
        raise FileError(
            f"{where}: {key!r} is {name} of shape {tuple(shape)!r:.80}, which takes {expected} "
            f"bytes, but has {offsets[1] - offsets[0]}"
        )
    return Entry(dtype, tuple(shape), data + offsets[0], data + offsets[1])


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    # `True` is an int to Python, and 2⁶³ is none to torch, not even in a product without the zeros.
    if not isinstance(values, list) or not all(type(v) is int and v >= 0 for v in values):
        return False
    product: int = math.prod(v for v in values if v)
    return product < 2**63


def _read(file: Opened, start: int, length: int, path: Path) -> bytearray:
    buffer = bytearray(length)
    _fill(file, start, memoryview(buffer), str(path))
    return buffer


def _fill(file: Opened, start: int, view: memoryview, what: str) -> None:
    try:
        while len(view):  # one read gives at most 2 GiB on Linux
            # At a place of its own, as several threads may read.
            n = _read_at(file.fileno(), view, start)
            if not n:
                raise FileError(f"{what} ends too early: the file is cut off or was changed")
            view, start = view[n:], start + n
    except OSError as e:
        raise FileError(f"{what} can't be read: {e.strerror or e}") from e


def _read_at(number: int, view: memoryview, start: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(number, [view], start)
    part = os.pread(number, len(view), start)
    view[: len(part)] = part
    return len(part)


# Tensors as bytes


def stored(array: Any, where: str) -> tuple[torch.dtype, tuple[int, ...], memoryview]:
    """Dtype, shape, and the bytes, little-endian in row-major order, of an array or a tensor.

    Raises:
        FileError: of a type or layout that the format does not have.
    """
    if not isinstance(array, Tensor):
        return _stored_array(array, where)
    if array.dtype not in _CODES or array.layout != torch.strided or array.is_meta:
        kind = "meta" if array.is_meta else f"{array.dtype}, {array.layout}"
        raise FileError(f"{where}: a tensor of {kind} can't be stored in safetensors")
    flat = array.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    flat = flat.as_strided(flat.shape, (1,))  # one element may come with any stride
    return array.dtype, tuple(array.shape), flat.view(torch.uint8).numpy().data


def _stored_array(array: Any, where: str) -> tuple[torch.dtype, tuple[int, ...], memoryview]:
    if not isinstance(array, np.ndarray | np.generic):
        raise FileError(f"{where}: expected an array or a tensor, found {type(array).__name__}")
    array = np.asarray(array)
    dtype = getattr(torch, array.dtype.name, None)
    if dtype not in _CODES:
        raise FileError(f"{where}: {array.dtype} can't be stored in safetensors")
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    flat = np.ascontiguousarray(array).reshape(-1)
    return dtype, array.shape, flat.view(np.uint8).data
