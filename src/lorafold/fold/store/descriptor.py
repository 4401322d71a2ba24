"""An open file that many hold: closed with the last of them, never under a running read.

Systems allow a process a thousand open files or so, and a thousand readers of one library have the
same ones.
"""

from __future__ import annotations

import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable

from ...errors import FileError
from ...files.atomic import CREATE_FLAGS
from ...files.disk.held import open_regular

_known: weakref.WeakValueDictionary[tuple[int, int, str], Descriptor] = (
    weakref.WeakValueDictionary()
)
_lock = threading.Lock()


class Descriptor:
    """A file's descriptor, and what to call it in messages.

    It is closed when the last reader lets go of this object: its number could by then belong to
    another file.
    """

    def __init__(self, number: int, name: str) -> None:
        self.number = number
        self.name = name

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> Descriptor:
        """A file that is there; the same object for all who have it open, however many they are.

        Raises:
            FileError: it is missing, or can't be opened.
        """
        try:
            opened = cls(open_regular(path), str(path))
            status = os.fstat(opened.number)
            with _lock:
                return _known.setdefault((status.st_dev, status.st_ino, opened.name), opened)
        except FileNotFoundError as e:
            raise FileError(f"shard {path} is missing") from e
        except OSError as e:
            raise FileError(f"shard {path} can't be read: {e.strerror}") from e

    @classmethod
    def new(cls, path: str | os.PathLike[str] | None) -> Descriptor:
        """A file that is not there yet, or one without a name, in memory."""
        if path is not None:
            return cls(os.open(path, CREATE_FLAGS, 0o666), str(path))
        if hasattr(os, "memfd_create"):
            return cls(os.memfd_create("shard"), "in memory")
        with tempfile.TemporaryFile() as file:  # Linux alone has files in memory
            return cls(os.dup(file.fileno()), "in memory")

    def __deepcopy__(self, memo: dict[int, object]) -> Descriptor:
        return self  # a copy would close the descriptor, too

    def __reduce__(self) -> str:
        raise TypeError(f"shard {self.name} is an open file, which can't be pickled")

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.number)  # `os` itself may be gone by then, at the end of the process

    def rename(self, old: str | os.PathLike[str], new: str | os.PathLike[str]) -> None:
        """Give the file another name, in place of what has that."""
        os.replace(old, new)
        self.name = str(new)

    def called(self, name: str) -> None:
        """Say what to call the file after its folder has another name."""
        self.name = name

    def ahead(self, ranges: Iterable[tuple[int, int]]) -> None:
        """What is read next; nothing is gained by knowing that of a file of this machine."""

    def size(self) -> int:
        """Bytes of the file as it is now."""
        return os.fstat(self.number).st_size

    def read_into(self, target: memoryview, offset: int) -> bool:
        """Fill `target` from `offset` on; False when the file ends before."""
        while len(target):
            try:
                count = _read_at(self.number, target, offset)
            except OSError as e:
                raise FileError(f"shard {self.name} can't be read: {e.strerror}") from e
            if count == 0:
                return False
            target, offset = target[count:], offset + count
        return True


def _read_at(descriptor: int, target: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [target], offset)
    part = os.pread(descriptor, len(target), offset)
    target[: len(part)] = part
    return len(part)
