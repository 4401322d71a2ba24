"""Looking at what others overwrite meanwhile: once more, where the path led elsewhere by the end.

What is found in two steps may be of two states: a config of the one and tensors of the other, or
nothing, in the moment between two renames. Whether that was so is seen by the file or directory at
the path, which is held open for as long as the look takes: the number of an inode that nobody holds
is soon another's, and clocks of file systems tick in milliseconds.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ...errors import FileError
from ..remote.place import is_url
from .held import ChangedError

_T = TypeVar("_T")
_PATIENCE = 2.0  # seconds in which some look is to fall between two overwrites
_PAUSES = 0.001, 0.02  # seconds after the first look in vain, and at most


class Standing:
    """What is at a path now; closed by `close`.

    Args:
        path: a file, a folder, or nothing; of what is no path of this machine there is nothing.
    """

    def __init__(self, path: Any) -> None:
        is_local = isinstance(path, str | os.PathLike) and not is_url(path)
        self._path, self._open = path if is_local else None, -1
        self._at_first = self._status()
        if self._path is not None and self._at_first is not None:
            try:
                self._open = os.open(self._path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
            except OSError:  # on Windows, every directory
                return
            found = os.fstat(self._open)
            self._at_first = found.st_dev, found.st_ino, found.st_mtime_ns

    def _status(self) -> tuple[int, int, int] | None:
        if self._path is None:
            return None
        try:
            found = os.stat(self._path)
        except (OSError, ValueError):
            return None
        if not (stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)):
            return None  # to open a device may do something
        return found.st_dev, found.st_ino, found.st_mtime_ns

    def is_same(self) -> bool:
        """Whether the same is there, and no name in it is new or gone."""
        return self._status() == self._at_first

    def is_there(self) -> bool:
        """Whether the same is there, if other names in it."""
        now = self._status()
        return (now and now[:2]) == (self._at_first and self._at_first[:2])

    def close(self) -> None:
        """Hold it no longer."""
        if self._open >= 0:
            os.close(self._open)


def settled(path: Any, look: Callable[[Standing], _T]) -> _T:
    """What a look at a path finds, made again where it failed and another was there by its end.

    Args:
        path: what may be overwritten meanwhile; of a URL, errors alone say that it was.
        look: is given what is at the path, and raises a `ChangedError` where it saw two states.

    Raises:
        FileError, OSError: the look's own, where all was the same, or after two seconds.
    """
    end, pause = None, _PAUSES[0]
    while True:
        standing = Standing(path)
        try:
            return look(standing)
        except (FileError, OSError) as e:
            changed = isinstance(e, ChangedError) or not standing.is_same()
            if not changed and not (is_url(path) and isinstance(e, FileNotFoundError)):
                raise
            now = time.monotonic()
            end = now + _PATIENCE if end is None else end
            if now >= end:
                raise
        finally:
            standing.close()
        time.sleep(pause)
        pause = min(2 * pause, _PAUSES[1])
