"""What a directory or file that is being written may take the place of, and what stays of it.

Only what is of the kind being written is replaced, and of that only the files that lorafold itself
writes. Whatever else lies there (a thesis, an optimiser's state) stays: it gets a second name, a
hard link, in the new directory before that takes the old one's place, so that it is never away.
Given up: file systems without hard links, where such a file is refused by name.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import FileError
from ..words import one_line
from .remote.place import Place, UrlPath, is_file, is_url, place_of, size_of


@dataclass(frozen=True)
class Kind:
    """What is written as a directory.

    Args:
        name: with its article, for messages: "an adapter".
        known: whether a directory (not an empty one), on this machine or a store, is one.
        files: pattern of the names of the files in it that lorafold writes.
        folders: pattern of the names of the folders in it that lorafold writes, with all of theirs.
        marked: {name: mark} of files that anyone may have written: one without the mark stays, and
            no other takes its place.
        last: the file that makes it one, where there is such: on a store it comes last.
    """

    name: str
    known: Callable[[Any], bool]
    files: re.Pattern[str]
    folders: re.Pattern[str] | None = None
    marked: Mapping[str, str] = field(default_factory=dict)
    last: str | None = None

    def owns(self, path: Place) -> bool:
        """Whether it is a file or folder of lorafold's writing."""
        if path.is_dir() and not (isinstance(path, Path) and path.is_symlink()):
            return self.folders is not None and self.folders.fullmatch(path.name) is not None
        mark = self.marked.get(path.name)
        if mark is not None and path.is_file():
            return mark in path.read_text(encoding="utf-8", errors="replace")
        return self.files.fullmatch(path.name) is not None


@dataclass(frozen=True)
class FileKind:
    """What is written as one file.

    Args:
        name: with its article, for messages: "an adapter of llama.cpp's".
        ending: of its name: ".gguf".
        known: whether a file (not an empty one), on this machine or a store, is one.
    """

    name: str
    ending: str
    known: Callable[[Any], bool]


def is_free(target: Place) -> bool:
    """Whether nothing is there, or an empty directory, which counts as nothing."""
    if isinstance(target, UrlPath):
        return not target.is_file() and not any(target.iterdir())
    if not os.path.lexists(target):
        return True
    try:
        return not target.is_symlink() and not os.listdir(target)
    except OSError:  # a file
        return False


def check_replaceable(
    target: Place, kind: Kind | FileKind, overwrite: bool, given: str | os.PathLike[str]
) -> None:
    """Check that what is of this kind may take the place of what is at `target`.

    Raises:
        FileError: it may not; the message calls it `given`.
    """
    if isinstance(kind, FileKind):
        _check_file_replaceable(target, kind, overwrite, given)
        return
    check_named(given)
    if isinstance(target, UrlPath):
        target = target.at_once()
    else:
        check_no_link(given)
    free, refusal = is_free(target), None
    if not target.is_dir():
        refusal = f"it is a file, not the folder of {kind.name}"
    elif not kind.known(target):
        names = sorted(path.name for path in target.iterdir())
        refusal = f"it is not {kind.name}: it holds {names[0]!r}" if names else None
    if not free and not overwrite:
        remedy = f", and {refusal}" if refusal else "; give overwrite=True to replace it"
        raise FileError(f"{given} exists already{remedy}")
    if not free and refusal:
        raise FileError(f"{given} won't be overwritten: {refusal}; name another folder")
    if isinstance(target, UrlPath):
        return
    here = Path.cwd()
    if os.path.lexists(target) and (here == target or target in here.parents):
        # Nearly always a slip, and it would pull the ground from under the caller's shell.
        raise FileError(f"{given} is or holds the current directory; it won't be overwritten")


def _check_file_replaceable(
    target: Place, kind: FileKind, overwrite: bool, given: str | os.PathLike[str]
) -> None:
    check_named(given)
    if isinstance(target, UrlPath):
        target = target.at_once()
    else:
        check_no_link(given)
    if target.is_dir():
        raise FileError(
            f"{given} is a folder, and {kind.name} is one file: name a file in it, such as "
            f"{target / target.name}{kind.ending}"
        )
    if target.suffix != kind.ending:
        raise FileError(
            f"{given} is no name of {kind.name}, which is one file whose name ends in "
            f"{kind.ending}: call it {given}{kind.ending}"
        )
    if not (target.exists() if isinstance(target, UrlPath) else os.path.lexists(target)):
        return
    of_kind = is_file(target) and (size_of(target) == 0 or kind.known(target))
    if not overwrite:
        remedy = "; give overwrite=True to replace it" if of_kind else f", and is not {kind.name}"
        raise FileError(f"{given} exists already{remedy}")
    if not of_kind:
        raise FileError(f"{given} won't be overwritten: it is not {kind.name}; name another file")


def check_no_link(given: str | os.PathLike[str]) -> None:
    """Check that what is to be written is no symbolic link: what that leads to is somebody's.

    Raises:
        FileError: it is one.
    """
    place = os.path.abspath(given)  # "x/" would be what the link leads to
    if os.path.islink(place):
        where = os.readlink(place)
        raise FileError(
            f"{given} is a symbolic link to {where}, and nothing is written through one: name "
            "what it leads to, or remove it"
        )


def check_named(target: str | os.PathLike[str]) -> None:
    """Check that a file system can have what is to be written under its name.

    Raises:
        FileError: no name, or letters that none can have.
    """
    text = os.fspath(target)
    if not text:  # which would be the working directory
        raise FileError("what to write has no name: an empty text is none")
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:
        encoded = b"\0"
    if b"\0" in encoded:
        raise FileError(f"{one_line(text)} is no name that a file can have: write elsewhere")


def check_apart(
    target: str | os.PathLike[str], sources: Iterable[str | os.PathLike[str] | None]
) -> None:
    """Check that what is about to be written is no source, holds none, and lies in none.

    Compared is what paths stand for and not how they are spelled: links, `..`, and upper and lower
    case where the file system takes them for one.

    Args:
        target: the directory to appear; it need not be there.
        sources: files and folders; what is not there is passed over.

    Raises:
        FileError: naming both.
    """
    check_named(target)
    sources = list(sources)
    urls = [place_of(source) for source in sources if source is not None and is_url(source)]
    if is_url(target):
        _check_urls_apart(place_of(target), urls)
        return
    place = Path(os.path.realpath(target))
    mine, around = _identity(place), {_identity(path) for path in (place, *place.parents)}
    for source in sources:
        for path in _stands_for(source):
            if _identity(path) in around:
                what = "is" if _identity(path) == mine else "lies in"
            elif mine != place and mine in map(_identity, path.parents):
                what = "holds"
            else:
                continue
            raise FileError(f"{target} {what} the source {source}: write elsewhere")


def _check_urls_apart(target: Place, sources: Iterable[Place]) -> None:
    for source in sources:
        if isinstance(target, UrlPath) and isinstance(source, UrlPath):
            if source.holds(target):
                what = "is" if source == target else "lies in"
            elif target.holds(source):
                what = "holds"
            else:
                continue
            raise FileError(f"{target} {what} the source {source}: write elsewhere")


def keep_others(old: Path, new: Path, kind: Kind) -> None:
    """Link what is in `old`, and not of lorafold's writing, into `new` under the same names.

    Raises:
        FileError: it can't be (the file system has no hard links); naming it.
    """
    for path in sorted(old.iterdir()):
        if kind.owns(path):
            continue
        twin = new / path.name
        try:
            if path.name in kind.marked and twin.exists() and not twin.samefile(path):
                twin.unlink()
            _link(path, twin)
        except OSError as e:
            raise FileError(
                f"{old} holds {path.name!r}, which can't be kept ({e.strerror or e}): move it, or "
                "write elsewhere"
            ) from e


def exchange(files: Mapping[Path, Path], aside: Path) -> None:
    """Give files their names, in folders that are made where they lack; all of them or none.

    Not for: what a process that is killed must leave of one state, which `new_directory` is for.

    Args:
        files: {file: what it takes the place of}, on one file system.
        aside: a folder there, for the old ones until all is done.

    Raises:
        OSError: one can't be moved.
    """
    done: list[tuple[Path, Path | None]] = []
    made: list[Path] = []
    try:
        for k, (file, target) in enumerate(files.items()):
            lacking = [p for p in target.parents if not os.path.lexists(p)]
            for folder in reversed(lacking):
                folder.mkdir()
                made.append(folder)
            old = aside / f".old{k}" if os.path.lexists(target) else None
            if old is not None:
                _spare(target, old)
            os.replace(file, target)
            done.append((target, old))
    except BaseException:
        for target, old in reversed(done):
            os.unlink(target) if old is None else os.replace(old, target)
        for folder in reversed(made):
            folder.rmdir()
        raise


def _spare(path: Path, twin: Path) -> None:
    """Give a file a second name, or a copy where the file system has no such."""
    try:
        os.link(path, twin)
    except OSError as e:
        if e.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        shutil.copyfile(path, twin)


def _link(source: Path, target: Path) -> None:
    """Give a file, or all files of a folder, a second name; what is newly written goes first."""
    if source.is_symlink():
        if not os.path.lexists(target):
            os.symlink(os.readlink(source), target)
    elif source.is_dir():
        fresh = not target.is_dir()
        if fresh:
            target.mkdir()
        for path in source.iterdir():
            _link(path, target / path.name)
        if fresh:
            shutil.copymode(source, target)
    elif not os.path.lexists(target):
        os.link(source, target)


def _stands_for(source: str | os.PathLike[str] | None) -> Iterator[Path]:
    """The source if it is there, and what the links in it lead to, as in the Hub's cache."""
    if source is None or not os.path.exists(source):
        return
    path = Path(os.path.realpath(source))
    yield path
    if path.is_dir():
        yield from (Path(os.path.realpath(p)) for p in path.iterdir() if p.is_symlink())


def _identity(path: Path) -> object:
    """What tells a file or folder from all others, however it is spelled."""
    try:
        status = os.stat(path)
    except OSError:
        return path
    return status.st_dev, status.st_ino
