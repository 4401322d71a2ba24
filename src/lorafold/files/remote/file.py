"""A file of a store, opened: read by ranges as it was then, or it is an error.

A store has no open files. What tells a file from another of its name (an ETag, a version, the time
of its last change) is asked for when it is opened, and again after it was read; S3 says with the
bytes themselves whose they are.
"""

from __future__ import annotations

import io
import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ...errors import FileError
from ..disk.header import MAX_HEADER
from ..disk.held import ChangedError, Held
from .place import UrlPath, place_of

_GAP = 1 << 16  # bytes between two ranges that are rather read than left out
_PIECE = 1 << 23  # bytes asked for at once
_TOGETHER = 8  # pieces asked for at the same time
_START = 1 << 16  # bytes that are read with the first of them: most headers are shorter
_BLOCK, _BLOCKS = 1 << 18, 256  # of shards: what small reads read, and how many are kept
_blocks: OrderedDict[tuple[int, int], bytes] = OrderedDict()  # of all shards: (which, where) each
_lock = threading.Lock()
_count = itertools.count()

Ranges = Callable[[list[tuple[int, int]]], list[bytes]]  # what reads them
Part = tuple[int, memoryview]  # where it begins in the file, and where it goes


class UrlFile:
    """A file of a store, as `Held` is one of this machine.

    Args:
        place: its URL.

    Attributes:
        path: what it is called in messages. size: bytes of it.

    Raises:
        OSError, FileError: as `asking.ask`.
    """

    def __init__(self, place: UrlPath) -> None:
        self.place, self.path = place, str(place)
        self._state = place.state()
        self.size: int = place_size(self._state)
        self._start: bytes | None = None
        self._tags = True  # whether the store says with bytes whose they are, as far as is known

    def __enter__(self) -> UrlFile:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_start": None}  # to be read where it is needed

    @property
    def version(self) -> tuple[object, ...]:
        """Its size, and what the store says of its state."""
        return self._state

    def file(self) -> UrlFile:
        """What is read: this."""
        return self

    def check(self) -> None:
        """Raise a `ChangedError` where what was read is not of the file that was opened."""
        if not self._tags and not self.is_there():
            raise self._changed()

    def _changed(self) -> ChangedError:
        return ChangedError(f"{self.path}: the file was changed since it was opened; open it again")

    def _ranges(self, ranges: list[tuple[int, int]]) -> list[bytes]:
        tagged = self.place.read_tagged(ranges) if self._tags else None
        if tagged is None:
            self._tags = False
            return self.place.read_ranges(ranges)
        if any(tag != self._state[1] for _, tag in tagged):
            raise self._changed()
        return [data for data, _ in tagged]

    def is_there(self) -> bool:
        """Whether its URL still leads to it, unchanged."""
        try:
            return self.place.state() == self._state
        except FileNotFoundError:
            return False

    def read(self) -> bytes:
        """All of it, which `check` or `is_there` says to be right.

        Raises:
            OSError, FileError: as `asking.ask`.
        """
        return self._ranges([(0, self.size)])[0] if self.size else b""

    def stream(self) -> io.BytesIO:
        """All of it, to be read as a file of its own.

        Raises:
            ChangedError: as `check`. OSError, FileError: as `asking.ask`.
        """
        found = self.read()
        self.check()
        return io.BytesIO(found)

    def begin(self) -> None:
        """Read and keep where it begins: what safetensors has for its header, or a little more.

        Raises:
            OSError, FileError: as `asking.ask`.
        """
        start = bytearray(min(_START, self.size))
        _fill_whole(self._ranges, 0, start)
        length = 8 + int.from_bytes(start[:8], "little")
        if len(start) < length <= min(8 + MAX_HEADER, self.size):
            rest = bytearray(length - len(start))
            _fill_whole(self._ranges, len(start), rest)
            start += rest
        self._start = bytes(start)

    def read_into(self, parts: Iterable[Part]) -> bool:
        """Fill memory with parts of the file, neighbours together; False where it ends before.

        Raises:
            ChangedError: as `check`. OSError, FileError: as `asking.ask`.
        """
        wanted = sorted(((start, view) for start, view in parts if len(view)), key=lambda p: p[0])
        if wanted and wanted[-1][0] + len(wanted[-1][1]) > self.size:
            return False
        try:
            if self._start is None and wanted and wanted[0][0] < _START:
                self.begin()
            _fill(self._ranges, [part for part in wanted if not self._from_start(*part)])
        except (OSError, EOFError) as e:
            if not self.is_there():  # one that is shorter by now is told as what it is
                raise self._changed() from e
            if isinstance(e, EOFError):
                return False
            raise
        return True

    def _from_start(self, begin: int, view: memoryview) -> bool:
        if self._start is None or begin + len(view) > len(self._start):
            return False
        view[:] = self._start[begin : begin + len(view)]
        return True


class UrlDescriptor:
    """A shard on a store, which never changes but may go; small reads are in blocks that are kept.

    Args:
        place: its URL.

    Attributes:
        name: what it is called in messages.
    """

    def __init__(self, place: UrlPath) -> None:
        self._place = place
        self.name = str(place)
        self._number = next(_count)
        self._ahead: dict[int, bytes] = {}
        try:
            self._size = place.size()
        except FileNotFoundError as e:
            raise FileError(f"shard {self.name} is missing") from e
        except OSError as e:
            raise FileError(f"shard {self.name} can't be read: {e.strerror}") from e

    def called(self, name: str) -> None:
        """Say what to call it."""
        self.name = name

    def size(self) -> int:
        """Bytes of the file."""
        return self._size

    def ahead(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Read several ranges [start, stop) at the same time, which are then asked for by these."""
        there = ((start, stop) for start, stop in ranges if 0 <= start < stop <= self._size)
        rooms = [(start, bytearray(stop - start)) for start, stop in there]
        if self._read([(start, memoryview(room)) for start, room in rooms]):
            self._ahead = {start: bytes(room) for start, room in rooms}

    def read_into(self, target: memoryview, offset: int) -> bool:
        """Fill `target` from `offset` on; False when the file ends before."""
        known = self._ahead.get(offset)
        if known is not None and len(known) == len(target):
            target[:] = known
            return True
        if offset + len(target) > self._size:
            return False
        if len(target) >= _BLOCK:
            return self._read([(offset, target)])
        while len(target):
            at, skipped = divmod(offset, _BLOCK)
            block = self._block(at)
            if block is None:
                return False
            part = block[skipped : skipped + len(target)]
            target[: len(part)] = part
            target, offset = target[len(part) :], offset + len(part)
        return True

    def _block(self, at: int) -> bytes | None:
        key = self._number, at
        with _lock:
            if key in _blocks:
                _blocks.move_to_end(key)
                return _blocks[key]
        room = bytearray(min(_BLOCK, self._size - at * _BLOCK))
        if not self._read([(at * _BLOCK, memoryview(room))]):
            return None
        with _lock:
            found = _blocks[key] = bytes(room)
            while len(_blocks) > _BLOCKS:
                _blocks.popitem(last=False)
        return found

    def _read(self, parts: Sequence[Part]) -> bool:
        try:
            _fill(self._place.read_ranges, sorted(parts, key=lambda part: part[0]))
        except FileNotFoundError as e:
            raise gone(f"shard {self.name}") from e
        except EOFError:
            return False
        except OSError as e:
            raise FileError(f"shard {self.name} can't be read: {e.strerror}") from e
        return True

    def __deepcopy__(self, memo: dict[int, object]) -> UrlDescriptor:
        return self


def gone(what: str) -> FileError:
    """What to say of a library's file that was there when that was opened."""
    return FileError(
        f"{what} is gone: the library was changed since it was opened, longer ago than its old "
        "files are kept; open it again"
    )


def held(path: str | os.PathLike[str]) -> Held | UrlFile:
    """A file of this machine or of a store, opened.

    Raises:
        OSError: it can't be, or is none. FileError: as `asking.ask`.
    """
    place = place_of(path)
    return UrlFile(place) if isinstance(place, UrlPath) else Held(place)


def place_size(state: tuple[object, ...]) -> int:
    """The bytes that a file's state says it has."""
    size = state[0]
    assert isinstance(size, int)
    return size


def _fill_whole(read: Ranges, start: int, room: bytearray) -> None:
    _fill(read, [(start, memoryview(room))] if room else [])


def _fill(read: Ranges, wanted: Sequence[Part]) -> None:
    """Fill parts, by their order in the file, from as few ranges as it takes.

    Raises:
        EOFError: the file ends before. OSError, FileError: as `asking.ask`.
    """
    pieces = _pieces(wanted)
    for k in range(0, len(pieces), _TOGETHER):
        some = pieces[k : k + _TOGETHER]
        for (start, stop), data in zip(some, read(some), strict=True):
            if len(data) < stop - start:
                raise EOFError
            for begin, view in wanted:
                first, last = max(begin, start), min(begin + len(view), stop)
                if first < last:
                    view[first - begin : last - begin] = data[first - start : last - start]


def _pieces(wanted: Sequence[Part]) -> list[tuple[int, int]]:
    """The ranges to ask for: near ones together, and long ones in several."""
    joined: list[tuple[int, int]] = []
    for begin, view in wanted:
        end = begin + len(view)
        if joined and begin - joined[-1][1] <= _GAP:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return [
        (start, min(start + _PIECE, stop))
        for begin, stop in joined
        for start in range(begin, stop, _PIECE)
    ]
