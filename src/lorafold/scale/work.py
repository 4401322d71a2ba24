"""The work directory: tasks and finished results as files, named by the keys of their inputs.

    work.json       which run the directory belongs to
    <key>.task      a function and its inputs, while it is to be run
    <key>.done      its result: a pickle, then bytes that are read in ranges
    <key>.shared    what many tasks use

A result is there under its name when it is whole. So a run that was killed goes on where it was:
what is finished is found, and what was half written has another name. All but work.json end in the
SHA-256 of what is before: a machine that fell may have left a part, and a disk another bit.

Pickles are read from this directory: it must be one that only those write who may run code here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import secrets
import struct
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import FileError

_RUN = "work.json"
_FORMAT = "lorafold-work"
_HEAD = struct.Struct("<Q")
_SEAL, _AT_ONCE = 32, 1 << 20  # bytes: of a SHA-256, and of a file
_SHARED_KEPT = 64  # of what tasks share, in a worker


class Pieces:
    """A result that is long: a value, and bytes that are read in ranges.

    Args:
        value: to be pickled. data: the bytes.
    """

    def __init__(self, value: Any, data: Iterable[bytes]) -> None:
        self.value, self.data = value, list(data)

    def read(self, start: int, stop: int) -> bytes:
        """A range of the bytes."""
        return b"".join(self.data)[start:stop]


class Filed:
    """The same, whose bytes stay in a file.

    Args:
        value: what was pickled. path: the file. begin: where in it the bytes begin.
    """

    def __init__(self, value: Any, path: Path, begin: int) -> None:
        self.value, self._path, self._begin = value, path, begin

    def read(self, start: int, stop: int) -> bytes:
        """A range of the bytes."""
        with open(self._path, "rb") as file:
            file.seek(self._begin + start)
            found = file.read(stop - start)
        if len(found) < stop - start:
            raise FileError(f"{self._path} was cut: fold again, which makes it anew")
        return found


class Shared:
    """Something that many tasks use, read by each worker once.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def get(self) -> Any:
        """It."""
        return _shared(self._path)

    def __lorafold_key__(self) -> str:
        return os.path.basename(self._path)


@lru_cache(_SHARED_KEPT)
def _shared(path: str) -> Any:
    _check(Path(path))
    with open(path, "rb") as file:
        return pickle.load(file)


class WorkDirectory:
    """A directory of tasks and results.

    Args:
        path: the directory; it is made if it is not there.
        run: what says which run it belongs to; a directory of another one is refused.

    Raises:
        FileError: it is no directory, belongs to another run, or holds other files.
    """

    def __init__(self, path: str | os.PathLike[str], run: str | None = None) -> None:
        self.path = Path(os.path.abspath(path))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            names = [] if run is None else os.listdir(self.path)
        except OSError as e:
            raise FileError(f"{self.path} can't be a work directory: {e.strerror or e}") from e
        if run is not None:
            self._claim(names, run)

    def _claim(self, names: list[str], run: str) -> None:
        mine = {"format": _FORMAT, "run": run}
        if _RUN not in names:
            if names:
                raise FileError(
                    f"{self.path} is no work directory, and not empty: give an empty one"
                )
            self._replace(self.path / _RUN, [json.dumps(mine).encode()], seal=False)
            return
        try:
            found = json.loads((self.path / _RUN).read_bytes())
        except (OSError, ValueError) as e:
            raise FileError(f"{self.path / _RUN} can't be read: {e}") from e
        if found != mine:
            raise FileError(
                f"{self.path} is the work directory of another run, of other adapters or options: "
                "give another directory, or delete it"
            )

    def put_task(self, key: str, function: Any, inputs: tuple[Any, ...]) -> None:
        """Write a task for whoever runs it."""
        self._replace(self.path / f"{key}.task", [pickle.dumps((function, inputs))])

    def task(self, key: str) -> tuple[Any, tuple[Any, ...]]:
        """A task's function and inputs."""
        _check(self.path / f"{key}.task")
        with open(self.path / f"{key}.task", "rb") as file:
            function, inputs = pickle.load(file)
        return function, inputs

    def drop_task(self, key: str) -> None:
        """It is done."""
        with contextlib.suppress(OSError):
            os.unlink(self.path / f"{key}.task")

    def finish(self, key: str, result: Any) -> None:
        """Write a task's result."""
        long = isinstance(result, Pieces)
        head = pickle.dumps((long, result.value if long else result))
        data = result.data if long else []
        self._replace(self.path / f"{key}.done", [_HEAD.pack(len(head)), head, *data])

    def is_done(self, key: str) -> bool:
        """Whether a task's result is there."""
        return (self.path / f"{key}.done").exists()

    def result(self, key: str) -> Any:
        """A task's result; `Filed` for what was given as `Pieces`.

        Raises:
            FileError: it is not what was written; it is removed then.
        """
        path = self.path / f"{key}.done"
        _check(path)
        with open(path, "rb") as file:
            (size,) = _HEAD.unpack(file.read(_HEAD.size))
            long, value = pickle.loads(file.read(size))
        return Filed(value, path, _HEAD.size + size) if long else value

    def share(self, key: str, value: Any) -> Shared:
        """Write what many tasks use."""
        path = self.path / f"{key}.shared"
        if not path.exists():
            self._replace(path, [pickle.dumps(value)])
        return Shared(os.fspath(path))

    def _replace(self, path: Path, data: list[bytes], *, seal: bool = True) -> None:
        # Not `replace_file`: what a crash of the machine loses is made again, and a flush of each
        # of ten thousand files costs more.
        fresh, found = self.path / f".{secrets.token_hex(8)}.tmp", hashlib.sha256()
        try:
            with open(fresh, "wb") as file:
                for part in data:
                    file.write(part)
                    found.update(part)
                file.write(found.digest() if seal else b"")
            os.replace(fresh, path)
        except OSError as e:
            with contextlib.suppress(OSError):
                os.unlink(fresh)
            raise FileError(f"{path} can't be written: {e.strerror or e}") from e


def _check(path: Path) -> None:
    """Remove a file that is not what was written, so that it is made anew.

    Raises:
        FileError: it is not, or can't be read.
    """
    found = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            left = os.fstat(file.fileno()).st_size - _SEAL
            while left > 0 and (part := file.read(min(left, _AT_ONCE))):
                found.update(part)
                left -= len(part)
            if left == 0 and file.read() == found.digest():
                return
    except OSError as e:
        raise FileError(f"{path} can't be read: {e.strerror or e}") from e
    with contextlib.suppress(OSError):
        os.unlink(path)
    raise FileError(f"{path} is not what was written: run it again, which makes it anew")
