"""What stands at the head of a GGUF file, parsed with care.

A file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), all little-endian:

    "GGUF", u32 version, u64 number of tensors, u64 number of values
    per value: text key, u32 type, the value; a text is a u64 length and UTF-8
    per tensor: text name, u32 number of dimensions, u64 each (the fastest first), u32 type, u64
    offset, from where the data begin: the end of the head, up to the next multiple of
    `general.alignment` (32)

The head has no length of its own: it is read in pieces as it goes, up to a bound. No count in it is
believed before as many bytes are there. A whole model says so in its first values, and long arrays
(of its tokens) are of models alone, so that neither is read to its end.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ....errors import FileError
from ...disk.header import ENOUGH, ITEM_BYTES, Entry, disguise

Read = Callable[[int, int], bytes | bytearray]  # (start, length) -> those bytes

MAGIC = b"GGUF"
_MOST = 8 << 20  # bytes of a head: one of all tensors that are read has 5 MB
_MOST_TENSORS, _MOST_VALUES = 1 << 16, 1 << 12  # adapters have thousands, and tens
_PIECE = 64 << 10  # bytes that are read at once
_LONGEST_TEXT = 1 << 20  # bytes
_LONGEST_NAME = 1 << 10  # bytes of a key or a tensor's name; llama.cpp takes 64
_LONGEST_ARRAY = 1 << 12
_MOST_DIMENSIONS = 4
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_NUMBERS |= {12: "d"}
_TEXT, _ARRAY = 8, 9

_IS_ADAPTER = b"general.type" + struct.pack("<IQ", _TEXT, 7) + b"adapter"

# Types of tensors that are read, by GGUF's number; of q8_0, 34 bytes hold 32 numbers.
CODES = {0: "F32", 1: "F16", 30: "BF16"}
Q8_0, Q8_0_NUMBERS, Q8_0_BYTES = 8, 32, 34
_OTHERS = {2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K"}
_OTHERS |= {13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 28: "F64"}


@dataclass(frozen=True)
class Head:
    """A file's head.

    Args:
        values: {key: value}; arrays are lists.
        entries: {tensor: where it lies}; one of q8_0 as its bytes.
        shapes: {tensor: shape, as numpy and torch have it: the fastest dimension last}.
    """

    values: Mapping[str, Any]
    entries: Mapping[str, Entry]
    shapes: Mapping[str, tuple[int, ...]]


def read_head(read: Read, size: int, where: str) -> Head:
    """Parse the head of an adapter's file of `size` bytes.

    Raises:
        FileError: no GGUF file or a damaged one, a whole model, a version or type that is not
            read; naming the file and the key.
    """
    cursor = _Cursor(read, size, where)
    start = read(0, min(size, ENOUGH))
    if start[:4] != MAGIC:
        says = disguise(start)
        raise FileError(f"{where} is {says or 'no GGUF file: it does not begin like one'}")
    version, tensors, values = struct.unpack("<IQQ", cursor.take(24)[4:])
    if version not in (2, 3):
        big = "big-endian, which" if version & 0xFFFF == 0 else f"of version {version}, which"
        raise FileError(f"{where} is a GGUF file {big} is not read: those of versions 2 and 3 are")
    for count, most, what in (
        (tensors, _MOST_TENSORS, "tensors"),
        (values, _MOST_VALUES, "values"),
    ):
        if count > most:
            raise cursor.wrong(f"{count:,} {what}, and no adapter has more than {most:,}")
    found: dict[str, Any] = {}
    for _ in range(values):
        key = cursor.text(_LONGEST_NAME)
        if key in found:
            raise cursor.wrong(f"the key {key!r:.80} appears twice")
        found[key] = cursor.value(key)
        if key == "general.type" and found[key] != "adapter":
            raise not_an_adapter(where, found[key])
    infos: dict[str, tuple[int, tuple[int, ...], int]] = {}
    for _ in range(tensors):
        name = cursor.text(_LONGEST_NAME)
        if name in infos:
            raise cursor.wrong(f"the tensor {name!r:.80} appears twice")
        infos[name] = cursor.tensor(name)
    data = _aligned(cursor.at, found, cursor)
    entries = _placed(infos, data, found, cursor)
    return Head(found, entries, {name: shape for name, (_, shape, _) in infos.items()})


def not_an_adapter(where: str, kind: Any) -> FileError:
    """The error of a GGUF file that is something else."""
    if kind is None or kind == "model":
        return FileError(
            f"{where} is a whole model of llama.cpp's, no adapter: give its adapter's file"
        )
    return FileError(f"{where} is a GGUF file of the type {kind!r:.40}, no adapter")


def may_be_adapter(start: bytes) -> bool:
    """Whether a file that begins so may be one: it says so, or is no GGUF file, which is told."""
    return not start.startswith(MAGIC) or _IS_ADAPTER in start


class _Cursor:
    """Where the head is read, and what has been read of the file so far."""

    def __init__(self, read: Read, size: int, where: str) -> None:
        self._read, self._size, self._where = read, size, where
        self._buffer = bytearray()
        self.at = 0

    def take(self, n: int) -> bytes:
        """The next n bytes."""
        end = self.at + n
        if end > self._size:
            raise self.cut_off()
        if end > _MOST:
            raise self.wrong(f"its head has more than {_MOST:,} bytes, which no adapter's has")
        if end > len(self._buffer):
            there = len(self._buffer)
            self._buffer += self._read(there, min(max(_PIECE, end - there), self._size - there))
        found = bytes(self._buffer[self.at : end])
        self.at = end
        return found

    def number(self, form: str) -> Any:
        """One number, as `struct` calls it."""
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def text(self, longest: int) -> str:
        """One text."""
        n = self.number("Q")
        if n > longest:
            raise self.wrong(f"a text of {n:,} bytes")
        try:
            return self.take(n).decode()
        except UnicodeDecodeError as e:
            raise self.wrong(f"a text that is no UTF-8 ({e.reason})") from e

    def value(self, key: str) -> Any:
        """One value with its type before it."""
        kind = self.number("I")
        if kind != _ARRAY:
            return self._of_type(kind, key)
        kind, n = self.number("I"), self.number("Q")
        if kind == _ARRAY:
            raise self.wrong(f"{key!r:.80} holds arrays of arrays")
        if n > _LONGEST_ARRAY:
            if key.startswith("tokenizer."):
                raise not_an_adapter(self._where, None)
            raise self.wrong(f"{key!r:.80} holds {n:,} values, which no adapter has")
        if kind == _TEXT:
            return [self._of_type(kind, key) for _ in range(n)]
        form = self._form(kind, key)
        return list(struct.unpack(f"<{n}{form}", self.take(n * struct.calcsize(f"<{form}"))))

    def _of_type(self, kind: int, key: str) -> Any:
        return self.text(_LONGEST_TEXT) if kind == _TEXT else self.number(self._form(kind, key))

    def _form(self, kind: int, key: str) -> str:
        if kind not in _NUMBERS:
            raise self.wrong(f"{key!r:.80} has a value of the type {kind}, which is unknown")
        return _NUMBERS[kind]

    def tensor(self, name: str) -> tuple[int, tuple[int, ...], int]:
        """Type, shape and offset of one tensor."""
        n = self.number("I")
        if not 1 <= n <= _MOST_DIMENSIONS:
            raise self.wrong(f"the tensor {name!r:.80} has {n} dimensions")
        sizes = struct.unpack(f"<{n}Q", self.take(8 * n))
        if 0 in sizes or math.prod(sizes) >= 2**60:
            raise self.wrong(f"the tensor {name!r:.80} has the impossible shape {sizes}")
        kind, offset = self.number("I"), self.number("Q")
        if kind not in CODES and kind != Q8_0:
            what = _OTHERS.get(kind, f"number {kind}")
            raise self.wrong(
                f"the tensor {name!r:.80} is of the type {what}; F32, F16, BF16 and Q8_0 are read"
            )
        if kind == Q8_0 and sizes[0] % Q8_0_NUMBERS:
            raise self.wrong(
                f"the tensor {name!r:.80} is of Q8_0, and its rows of {sizes[0]} are no multiple "
                f"of {Q8_0_NUMBERS}"
            )
        return kind, sizes[::-1], offset

    def check_inside(self, name: str, end: int) -> None:
        """Raise where a tensor ends beyond the file."""
        if end > self._size:
            raise FileError(
                f"{self._where}: {name!r:.80} reaches to byte {end}, but the file ends after "
                f"{self._size}: it is cut off; fetch it again"
            )

    def wrong(self, what: str) -> FileError:
        """The error of a head that says what it can't."""
        return FileError(f"{self._where}: the file is damaged, or not llama.cpp's: {what}")

    def cut_off(self) -> FileError:
        """That of a file that ends too early."""
        return FileError(
            f"{self._where}: the file ends after {self._size} bytes, within its head: it is cut "
            "off, or damaged; fetch it again"
        )


def _alignment(values: Mapping[str, Any], cursor: _Cursor) -> int:
    found = values.get("general.alignment", 32)
    if type(found) is not int or not 1 <= found <= 1 << 20 or found & (found - 1):
        raise cursor.wrong(f"'general.alignment' must be a power of two, found {found!r:.40}")
    return found


def _aligned(at: int, values: Mapping[str, Any], cursor: _Cursor) -> int:
    step = _alignment(values, cursor)
    return -(-at // step) * step


def _placed(
    infos: Mapping[str, tuple[int, tuple[int, ...], int]],
    data: int,
    values: Mapping[str, Any],
    cursor: _Cursor,
) -> dict[str, Entry]:
    """{tensor: its bytes}, none beyond the file's end and no two over each other."""
    found: dict[str, Entry] = {}
    end, step = data, _alignment(values, cursor)
    for name, (kind, sizes, offset) in sorted(infos.items(), key=lambda item: item[1][2]):
        count, shape = math.prod(sizes), sizes
        if kind == Q8_0:
            nbytes = count // Q8_0_NUMBERS * Q8_0_BYTES
            code, shape = "U8", (nbytes,)
        else:
            code = CODES[kind]
            nbytes = count * ITEM_BYTES[code]
        start = data + offset
        if offset % step or start < end:
            raise cursor.wrong(f"the bytes of {name!r:.80} lie over others, or at no {step} bytes")
        end = start + nbytes
        cursor.check_inside(name, end)
        found[name] = Entry(code, shape, start, end)
    return {name: found[name] for name in infos}
