"""What stands at the head of a safetensors file, parsed with care and written; no torch in it.

A header that promises anything other than what the file holds is refused before data is touched.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from ...errors import FileError

if TYPE_CHECKING:
    import torch

MAX_HEADER = 100_000_000  # bytes; the reference implementation reads no more
_LONGEST_KEY = 10_000  # letters, of a key and so of a module's path
_LONGEST_ENTRY = 4096  # letters, of what a header says of one tensor
_LONGEST_WIDE = 16 << 20  # bytes of a header with letters beyond ASCII
METADATA = "__metadata__"
_SPACES, _BLANK = " \t\r\n", (" ", "\t", "\r", "\n")
_MAX_DIMENSIONS = 64  # of a numpy array, which a tensor is read through

# Codes of dtypes: what numpy and torch call them.
DTYPE_NAMES = {
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
_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "C64": 8}
_CODES = {name: code for code, name in DTYPE_NAMES.items()}
ITEM_BYTES = {
    code: _BYTES.get(code) or (int(code[1:]) // 8 if code[1:].isdigit() else 1)
    for code in DTYPE_NAMES
}  # U8 and I64 say it, the others not named take one byte

Path = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: its dtype, shape, and the bytes [start, stop) of the file.

    Args:
        code: the dtype, as safetensors calls it (`F32`, `BF16`, …).
    """

    code: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> torch.dtype:
        """The same as torch has it."""
        import torch

        found: torch.dtype = getattr(torch, DTYPE_NAMES[self.code])
        return found


# How other files begin that get the name of one: what they are, and what to do.
_DISGUISES = (
    (
        b"version https://git-lfs.github.com/",
        "a pointer of git-LFS, not the file itself: fetch it (git lfs pull)",
    ),
    (b"<!doctype", "a page of HTML, not the file: fetch it again, from where it can be downloaded"),
    (b"<html", "a page of HTML, not the file: fetch it again, from where it can be downloaded"),
    *(
        (start, "what a server says instead of the file: fetch it again, with the right to")
        for start in (b'{"error', b"entry not found", b"repository not found", b"invalid username")
    ),
    (b"<?xml", "an XML text, not the file: fetch it again, from where it can be downloaded"),
    (b"gguf", "a GGUF file of llama.cpp's: its name should end in .gguf"),
    (b"pk\x03\x04", "a ZIP file, most likely one of PyTorch's: its name should end in .bin"),
    (b"\x1f\x8b", "compressed with gzip: unpack it first"),
)
ENOUGH = 64  # bytes that show which


def disguise(start: bytes | bytearray) -> str | None:
    """What a file is that has another's name, by how it begins; None where nothing is known."""
    start = bytes(start[:ENOUGH]).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return next((says for begin, says in _DISGUISES if start.startswith(begin)), None)


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
            if key == METADATA:
                metadata = {} if value is None else value  # mlx-lm writes null
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
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    metadata: Mapping[str, str] | None,
    where: Path,
    room: int = 0,
) -> bytes:
    """A file up to its first tensor: the length, and the JSON padded to a multiple of 8 bytes.

    Args:
        tensors: (key, code of the dtype, shape), in the order of the bytes.
        metadata: None to write none.
        where: the file, for messages.
        room: the least that is returned, in bytes; a multiple of 8.

    Raises:
        FileError: it is longer than any reader takes.
    """
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at = 0
    for key, code, shape in tensors:
        stop = at + math.prod(shape) * ITEM_BYTES[code]
        entries[key] = {"dtype": code, "shape": list(shape), "data_offsets": [at, stop]}
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
    if key == METADATA and text[at : at + 1] == "{":
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
    if not isinstance(name, str) or name not in DTYPE_NAMES:
        raise FileError(f"{where}: {key!r} has the dtype {name!r:.80}, which is unknown")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise FileError(f"{where}: {key!r} has the impossible shape {shape!r:.80}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FileError(f"{where}: {key!r} has the impossible byte range {offsets!r:.80}")
    expected = math.prod(shape) * ITEM_BYTES[name]
    if offsets[1] - offsets[0] != expected:
        raise FileError(
            f"{where}: {key!r} is {name} of shape {tuple(shape)!r:.80}, which takes {expected} "
            f"bytes, but has {offsets[1] - offsets[0]}"
        )
    return Entry(name, tuple(shape), data + offsets[0], data + offsets[1])


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    # `True` is an int to Python, and 2⁶³ is none to torch, not even in a product without the zeros.
    if not isinstance(values, list) or not all(type(v) is int and v >= 0 for v in values):
        return False
    product: int = math.prod(v for v in values if v)
    return product < 2**63


# Arrays as bytes


def stored(array: Any, where: str) -> tuple[str, tuple[int, ...], memoryview]:
    """Code of the dtype, shape, and the bytes, little-endian in row-major order, of an array.

    Args:
        array: numpy's or torch's.

    Raises:
        FileError: of a type or layout that the format does not have.
    """
    torch = sys.modules.get("torch")  # who has a tensor has imported it
    if torch is not None and isinstance(array, torch.Tensor):
        return _stored_tensor(array, where)
    import numpy as np

    if not isinstance(array, np.ndarray | np.generic):
        raise FileError(f"{where}: expected an array or a tensor, found {type(array).__name__}")
    array = np.asarray(array)
    code = _CODES.get(array.dtype.name)
    if code is None:
        raise FileError(f"{where}: {array.dtype} can't be stored in safetensors")
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    flat = np.ascontiguousarray(array).reshape(-1)
    return code, array.shape, flat.view(np.uint8).data


def _stored_tensor(array: torch.Tensor, where: str) -> tuple[str, tuple[int, ...], memoryview]:
    import torch

    code = _CODES.get(str(array.dtype).removeprefix("torch."))
    if code is None or array.layout != torch.strided or array.is_meta:
        kind = "meta" if array.is_meta else f"{array.dtype}, {array.layout}"
        raise FileError(f"{where}: a tensor of {kind} can't be stored in safetensors")
    flat = array.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    flat = flat.as_strided(flat.shape, (1,))  # one element may come with any stride
    return code, tuple(array.shape), flat.view(torch.uint8).numpy().data
