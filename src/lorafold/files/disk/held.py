"""Files that stay what they were when they were opened, wherever their paths lead by now.

A path is no file: an overwrite gives it to another one at any moment, between two reads of one
adapter, too. So a file is opened once and kept open. Not all of ten thousand can be: the ones that
were opened longest ago are closed, and when such a file is opened again it must be the same, by its
inode, size and time of change.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import weakref
from collections import deque
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any

from ...errors import FileError
from ..remote.place import UrlPath, is_url, place_of

_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
_MOST = 64  # files kept open: systems allow a process 256 and more
_AT_ONCE = 1 << 30  # bytes: Linux reads 2 GiB at most
_kept: deque[weakref.ref[Held]] = deque()
_lock = threading.Lock()


class ChangedError(FileError):
    """A file is no longer the one that was opened."""


def open_regular(path: str | os.PathLike[str]) -> int:
    """The descriptor of a file, for reading; links are followed, where that leads to a file.

    Raises:
        OSError: it can't be opened, or is a directory, a device, or a FIFO (which one would wait
            for).
    """
    try:
        number = os.open(path, _FLAGS)
    except ValueError as e:  # a NUL in it, or what is no Unicode
        raise OSError(errno.EINVAL, "no file can have such a name", os.fspath(path)) from e
    mode = os.fstat(number).st_mode
    if stat.S_ISREG(mode):
        return number
    os.close(number)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise OSError(errno.EINVAL, "no regular file, but a FIFO, socket or device", os.fspath(path))


def read_regular(
    path: str | os.PathLike[str], check: Callable[[int], None] = lambda size: None
) -> bytes:
    """All of a file, of this machine or of a store.

    Args:
        check: is called with its size before it is read, and may raise.

    Raises:
        OSError: as `open_regular`, or it can't be read. FileError: as `remote.asking.ask`.
    """
    if is_url(path):
        place = place_of(path)
        assert isinstance(place, UrlPath)
        return place.read_bytes(check)
    with open(open_regular(path), "rb") as file:
        check(os.fstat(file.fileno()).st_size)
        return file.read()


class Descriptor:
    """An open file, closed when nobody holds this any more: never under a running read."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def fileno(self) -> int:
        """Its number."""
        return self.number

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.number)  # `os` itself may be gone by then, at the end of the process


class Held:
    """A file that was opened, and is read as it was then.

    Args:
        path: the file.

    Attributes:
        size: bytes of it.

    Raises:
        OSError: as `open_regular`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._place = os.path.abspath(self.path)  # also where this directory is not the current one
        opened = Descriptor(open_regular(path))
        self._status: tuple[int, ...] = _status(os.fstat(opened.number))
        self.size = self._status[-2]
        self._opened: Descriptor | None = opened
        _keep(self)

    def __reduce__(self) -> tuple[Any, ...]:
        # Devices and inodes have other numbers on another machine.
        return _elsewhere, (self.path, self._place, self._status[2:])

    def file(self) -> Descriptor:
        """The open file, as it was.

        Raises:
            ChangedError: it was written to since, or closed meanwhile and is another one by now.
            FileError: it can't be opened again.
        """
        opened = self._opened
        again = opened is None
        if opened is None:
            try:
                opened = Descriptor(open_regular(self._place))
            except OSError as e:
                raise ChangedError(f"{self.path} can't be opened again: {e.strerror or e}") from e
        if _status(os.fstat(opened.number))[-len(self._status) :] != self._status:
            raise ChangedError(
                f"{self.path}: the file was changed since it was opened; open it again"
            )
        if again:
            self._opened = opened
            _keep(self)
        return opened

    def read(self) -> bytes:
        """All of it.

        Raises:
            ChangedError, FileError: as `file`. OSError: it can't be read.
        """
        number = self.file().number
        found = b""
        while part := os.pread(number, _AT_ONCE, len(found)):
            found += part
        self.file()
        return found

    @property
    def place(self) -> Path:
        """Its path."""
        return Path(self.path)

    @property
    def version(self) -> tuple[int, ...]:
        """Its size and time of change (ns)."""
        return self._status[-2:]

    def check(self) -> None:
        """Raise a `ChangedError` where it is no longer what was opened."""
        self.file()

    def stream(self) -> BufferedReader:
        """All of it, to be read as a file of its own."""
        return open(os.dup(self.file().number), "rb")

    def is_there(self) -> bool:
        """Whether its path still leads to it, unchanged."""
        try:
            return _status(os.stat(self.path))[-len(self._status) :] == self._status
        except OSError:
            return False

    def let_go(self) -> None:
        """Close it when no read is running; the next one opens it again."""
        self._opened = None


def _elsewhere(path: str, place: str, status: tuple[int, ...]) -> Held:
    """A file that another process has opened, of this size and time of change."""
    held = Held.__new__(Held)
    held.path, held._place, held._status, held._opened = path, place, status, None
    held.size = status[0]
    return held


def _status(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _keep(held: Held) -> None:
    with _lock:
        _kept.append(weakref.ref(held))
        while len(_kept) > _MOST:
            oldest = _kept.popleft()()
            if oldest is not None:
                oldest.let_go()
