"""A directory or file at a URL: written on this machine, then put there, file after file.

A store can't exchange two folders in one step. So the file that makes the folder what it is (an
adapter's config) comes last, and of one that is replaced it goes first: who reads meanwhile gets an
error, and never a mixture. A process that is killed in between leaves what is no adapter, to be
written again.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from ...errors import FileError
from ..replacing import FileKind, Kind, check_apart, check_replaceable, is_free
from .place import UrlPath


def appearing_at(
    url: UrlPath,
    kind: Kind,
    sources: Iterable[str | os.PathLike[str] | None],
    overwrite: bool,
) -> Iterator[Path]:
    """The staging directory of `atomic.new_directory`; what follows puts it at the URL.

    Raises:
        FileError: as there. OSError: as `asking.ask`.
    """
    check_apart(url, sources)
    check_replaceable(url, kind, overwrite, url)
    with tempfile.TemporaryDirectory(prefix="lorafold-") as scratch:
        staging = Path(scratch, "new")
        staging.mkdir()
        yield staging
        check_replaceable(url, kind, overwrite, url)  # something may have come meanwhile
        _put(staging, url, kind)


def file_appearing_at(
    url: UrlPath,
    kind: FileKind,
    sources: Iterable[str | os.PathLike[str] | None],
    overwrite: bool,
) -> Iterator[Path]:
    """Where `atomic.new_file` has a file written; what follows puts it at the URL, in one step.

    Raises:
        FileError: as there. OSError: as `asking.ask`.
    """
    check_apart(url, sources)
    check_replaceable(url, kind, overwrite, url)
    with tempfile.TemporaryDirectory(prefix="lorafold-") as scratch:
        new = Path(scratch, f"new{kind.ending}")
        yield new
        check_replaceable(url, kind, overwrite, url)  # something may have come meanwhile
        url.upload(new)


def _put(staging: Path, url: UrlPath, kind: Kind) -> None:
    fresh = is_free(url)
    old = [] if fresh else list(_owned(url, kind))
    new = _files(staging)
    for name in kind.marked:
        if name in new and (url / name).is_file() and not kind.owns(url / name):
            del new[name]  # somebody's own
    order = sorted(new, key=lambda name: (name == kind.last, name))
    put: list[str] = []
    try:
        if kind.last in old:
            (url / kind.last).unlink()
        for name in order:
            put.append(name)
            (url / name).upload(new[name])
    except BaseException:
        for name in put if fresh else ():
            with contextlib.suppress(OSError, FileError):
                (url / name).unlink()
        raise
    for name in old:
        if name not in new:
            (url / name).unlink()


def _files(top: Path) -> dict[str, Path]:
    """Name within a folder → path, of all files in it."""
    found = (path for path in top.rglob("*") if path.is_file())
    return {path.relative_to(top).as_posix(): path for path in found}


def _owned(url: UrlPath, kind: Kind) -> Iterator[str]:
    """The files there that are of the kind's own, by their names within the folder."""
    for path in url.iterdir():
        if kind.owns(path):
            if path.is_file():
                yield path.name
            else:
                yield from (f"{path.name}/{name}" for name in _below(path))


def _below(folder: UrlPath) -> Iterator[str]:
    for path in folder.iterdir():
        if path.is_file():
            yield path.name
        else:
            yield from (f"{path.name}/{name}" for name in _below(path))
