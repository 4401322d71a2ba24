"""Paths that are URLs, with as much of pathlib's ways as finding, reading and writing files needs.

`s3://bucket/adapters/sql` is a file or a folder on a store that fsspec knows (the extra `remote`).
A store has neither links nor renames, and a folder is there as long as a file is in it. What has no
`scheme://` is a path, whatever colons are in it.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import glob
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias, TypeVar

from ...errors import FileError
from .asking import ask, is_s3

P = TypeVar("P")
T = TypeVar("T")

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_AT_ONCE = 16  # folders that are looked into at the same time
# What fsspec's stores call the state of a file: it changes with what is in it.
_STATES = (
    *("ETag", "etag", "generation", "VersionId", "md5Hash", "content_md5"),
    *("LastModified", "last_modified", "updated", "mtime", "modified", "created"),
)


def everywhere(path: Place | str) -> str:
    """The path as it is read from whatever directory is the current one."""
    return os.fspath(path) if is_url(path) else os.path.abspath(path)


def is_url(path: object) -> bool:
    """Whether it is a URL, and no path of this machine's."""
    return isinstance(path, UrlPath) or (
        isinstance(path, str | os.PathLike)
        and isinstance(text := os.fspath(path), str)
        and _SCHEME.match(text) is not None
    )


def place_of(path: str | os.PathLike[str]) -> Place:
    """The path, as one of this machine or of a store.

    Raises:
        FileError: a URL that must not be used: with a password in it.
    """
    if isinstance(path, UrlPath | Path):
        return path
    return UrlPath(os.fspath(path)) if is_url(path) else Path(path)


def local(path: str | os.PathLike[str]) -> Path:
    """A path of this machine.

    Raises:
        FileError: it is a URL.
    """
    place = place_of(path)
    if isinstance(place, UrlPath):
        raise FileError(f"{place} is a URL: what this makes stays on this machine, give a path")
    return place


def new_place(path: str | os.PathLike[str]) -> UrlPath:
    """A URL where something is to be written.

    Raises:
        FileError: it is the root of a store.
    """
    place = place_of(path)
    assert isinstance(place, UrlPath)
    if not place.name:
        raise FileError(f"{place} is the root of a store, not a place to write to")
    return place


def is_file(path: Path | UrlPath) -> bool:
    """Whether a file is there; of what no file can be called (a NUL in it) that is none."""
    return path.is_file() if isinstance(path, UrlPath) else os.path.isfile(path)


def is_dir(path: Path | UrlPath) -> bool:
    """Whether a folder is there."""
    return path.is_dir() if isinstance(path, UrlPath) else os.path.isdir(path)


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether something is there, a link that leads to something too."""
    return place_of(path).exists() if is_url(path) else os.path.exists(path)


def size_of(path: Path | UrlPath) -> int:
    """Bytes of a file."""
    return path.size() if isinstance(path, UrlPath) else path.stat().st_size


class UrlPath:
    """A file or folder on a store, by its URL.

    Args:
        url: as it is given.
        known: what is known of it and of what lies in it, so that it is asked for once; None to
            ask each time.

    Raises:
        FileError: a password is in it, or it is one of this machine's files.
    """

    __slots__ = ("_known", "url")

    def __init__(self, url: str, known: _Known | None = None) -> None:
        match = _SCHEME.match(url)
        assert match is not None
        start, rest = match[0], url[match.end() :]
        if "@" in (owner := rest.partition("/")[0]) and ":" in owner.rpartition("@")[0]:
            raise FileError(
                f"{start}…@{owner.rpartition('@')[2]}: a password in a URL ends up in logs: give "
                "it in the environment, or in fsspec's configuration"
            )
        if start.lower() == "file://":
            raise FileError(f"{url}: give the path itself, without file://")
        self.url = start.lower() + rest.rstrip("/")
        self._known = known

    def __str__(self) -> str:
        if self.url.startswith("http"):  # a signature may follow
            return self.url.partition("?")[0]
        return self.url

    def __repr__(self) -> str:
        return f"UrlPath({str(self)!r})"

    def __fspath__(self) -> str:
        return self.url

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UrlPath) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __lt__(self, other: UrlPath) -> bool:
        return self.url < other.url

    def __reduce__(self) -> tuple[Any, ...]:
        return UrlPath, (self.url,)

    def __truediv__(self, name: str | os.PathLike[str]) -> UrlPath:
        between = "" if self.url.endswith("/") else "/"
        return UrlPath(f"{self.url}{between}{os.fspath(name)}", self._known)

    # Names

    @property
    def name(self) -> str:
        """The last component."""
        return str(self).partition("://")[2].rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> UrlPath:
        """The folder that it lies in; the store's root lies in itself."""
        start, _, rest = self.url.partition("://")
        folder, slash, _ = rest.rpartition("/")
        return UrlPath(f"{start}://{folder}", self._known) if slash else self

    def with_name(self, name: str) -> UrlPath:
        return self.parent / name

    def holds(self, other: UrlPath) -> bool:
        """Whether the other lies in it, or is it."""
        return other.url == self.url or other.url.startswith(f"{self.url.rstrip('/')}/")

    # What is there

    def at_once(self) -> UrlPath:
        """The same, asking once for each folder: what it says of them is of one moment, about."""
        return UrlPath(self.url, _Known(self.url))

    def info(self) -> Mapping[str, Any] | None:
        """What the store says of it; None where nothing is there.

        Raises:
            FileError: it can't be asked for.
        """
        if self._known is None:
            return _info(self.url, str(self))
        return self._known.info(self)

    def exists(self) -> bool:
        return self.info() is not None

    def is_file(self) -> bool:
        return (self.info() or {}).get("type") == "file"

    def is_dir(self) -> bool:
        return (self.info() or {}).get("type") == "directory"

    def size(self) -> int:
        """Bytes of a file."""
        found = self.state()[0]
        assert isinstance(found, int)
        return found

    def state(self) -> tuple[object, ...]:
        """The size, and what tells the file from another of its name; asked for now.

        Raises:
            OSError: there is no such file, or it can't be asked for. FileError: as `ask`.
        """
        found = ask(self.url, str(self), lambda fs, path: fs.info(path))
        if found["type"] != "file":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(self))
        if found.get("size") is None:
            raise OSError(errno.ENOTSUP, "the store does not say how long it is", str(self))
        return (int(found["size"]), *(str(found.get(field)) for field in _STATES))

    def names(self) -> list[str]:
        """Names of the files in a folder; none where it is not there."""
        return [name for name, info in self._children().items() if info["type"] == "file"]

    def sizes(self) -> dict[str, int]:
        """{name: bytes} of the files in a folder."""
        found = self._children().items()
        return {name: int(info["size"]) for name, info in found if info["type"] == "file"}

    def iterdir(self) -> Iterator[UrlPath]:
        """What is in a folder; nothing where it is not there."""
        for name in self._children():
            yield self / name

    def glob(self, pattern: str) -> Iterator[UrlPath]:
        """What is in a folder, and has a name like this."""
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def _children(self) -> Mapping[str, Mapping[str, Any]]:
        if self._known is None:
            return _children(self.url, str(self))
        return self._known.children(self)

    # Bytes

    def read_bytes(self, check: Callable[[int], None] = lambda size: None) -> bytes:
        """All of a file.

        Args:
            check: is called with its size before it is read, and may raise.

        Raises:
            OSError, FileError: as `ask`.
        """
        size = self.size()
        check(size)
        if not size:
            return b""
        # From its start, to wherever it ends by then: s3fs would ask for the size once more.
        found: bytes = ask(self.url, str(self), lambda fs, path: fs.cat_file(path, start=0))
        return found

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self.read_bytes().decode(encoding, errors)

    def read_ranges(self, ranges: list[tuple[int, int]]) -> list[bytes]:
        """The bytes [start, stop) of a file, for each of them; at the same time, where it can be.

        Raises:
            OSError, FileError: as `ask`; or the store does not give ranges.
        """
        starts, stops = [start for start, _ in ranges], [stop for _, stop in ranges]

        def read(fs: Any, path: str) -> list[bytes]:
            if len(ranges) == 1:
                return [fs.cat_file(path, start=starts[0], end=stops[0])]
            found: list[bytes] = fs.cat_ranges(
                [path] * len(ranges), starts, stops, on_error="raise"
            )
            return found

        found = ask(self.url, str(self), read)
        self._check_lengths(ranges, found)
        return found

    def read_tagged(self, ranges: list[tuple[int, int]]) -> list[tuple[bytes, str]] | None:
        """The same, each with the ETag of the file that it is of; None where a store has no such.

        Raises:
            OSError, FileError: as `read_ranges`.
        """
        found = ask(self.url, str(self), lambda fs, path: _tagged(fs, path, ranges))
        if found is not None:
            self._check_lengths(ranges, [data for data, _ in found])
        return found

    def _check_lengths(self, ranges: list[tuple[int, int]], found: list[bytes]) -> None:
        for (start, stop), data in zip(ranges, found, strict=True):
            if len(data) > stop - start:
                raise OSError(
                    errno.ENOTSUP,
                    f"the store gives no ranges of files: it sent {len(data):,} bytes where "
                    f"{stop - start:,} were asked for; fetch the folder, and give its path",
                    str(self),
                )

    def write_bytes(self, data: bytes) -> None:
        """Put a file there, in place of what has its name.

        Raises:
            OSError, FileError: as `ask`.
        """
        ask(self.url, str(self), lambda fs, path: fs.pipe_file(path, data))

    def upload(self, path: Path) -> None:
        """Put the content of a file of this machine there.

        Raises:
            OSError, FileError: as `ask`.
        """
        ask(self.url, str(self), lambda fs, key: fs.put_file(str(path), key))

    def unlink(self) -> None:
        """Remove a file; nothing happens where it is not there.

        Raises:
            OSError, FileError: as `ask`.
        """

        with contextlib.suppress(FileNotFoundError):
            ask(self.url, str(self), lambda fs, path: fs.rm_file(path))


def matching(pattern: UrlPath) -> list[UrlPath]:
    """What a pattern of a glob matches, sorted; hidden names by no wildcard."""
    start, _, rest = pattern.url.partition("://")
    parts = rest.split("/")
    fixed = next(k for k, part in enumerate(parts) if glob.has_magic(part))
    root = UrlPath(f"{start}://{'/'.join(parts[:fixed])}").at_once()
    found = sorted(dict.fromkeys(_matching(root, parts[fixed:])))
    list(concurrently(lambda path: path.is_dir() and path.names(), found))  # which is asked next
    return found


def concurrently(
    function: Callable[[P], T],
    items: Sequence[P],
    place: Callable[[P], object] = lambda item: item,
) -> Iterator[T]:
    """What a function gives of each item, in their order; at the same time where they are at URLs.

    Args:
        place: of an item: a `UrlPath` where it waits for a store.
    """
    if len(items) < 2 or not any(isinstance(place(item), UrlPath) for item in items):
        yield from map(function, items)
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        yield from pool.map(function, items)


def _matching(folder: UrlPath, parts: list[str]) -> Iterator[UrlPath]:
    if not parts:
        yield folder
        return
    first, *rest = parts
    if not glob.has_magic(first):
        if rest or (folder / first).exists():
            yield from _matching(folder / first, rest)
        return
    if first == "**":
        yield from _matching(folder, rest)
    for path in folder.iterdir():
        if path.name.startswith(".") and not first.startswith("."):
            continue
        if first == "**" and path.is_dir():
            yield from _matching(path, parts)
        elif fnmatch.fnmatchcase(path.name, first) and (not rest or path.is_dir()):
            yield from _matching(path, rest)


def _tagged(fs: Any, path: str, ranges: list[tuple[int, int]]) -> list[tuple[bytes, str]] | None:
    if not is_s3(fs):
        return None
    import asyncio

    bucket, key, _ = fs.split_path(path)

    async def one(start: int, stop: int) -> tuple[bytes, str]:
        span = f"bytes={start}-{stop - 1}"
        answer = await fs._call_s3("get_object", Bucket=bucket, Key=key, Range=span)
        try:
            return await answer["Body"].read(), str(answer.get("ETag"))
        finally:
            answer["Body"].close()

    async def several() -> list[tuple[bytes, str]]:
        return await asyncio.gather(*(one(start, stop) for start, stop in ranges))

    # In the loop that all file systems of fsspec's share.
    return asyncio.run_coroutine_threadsafe(several(), fs.loop).result()


def _info(url: str, shown: str) -> Mapping[str, Any] | None:
    try:
        with _looking():
            found: Mapping[str, Any] = ask(url, shown, lambda fs, path: fs.info(path))
    except FileNotFoundError:
        return None
    return found


@contextlib.contextmanager
def _looking() -> Iterator[None]:
    """Nobody who looks whether a path is there expects an error of the system's."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as e:
        raise FileError(f"{e.filename}: {e.strerror}") from e


def _children(url: str, shown: str) -> dict[str, Mapping[str, Any]]:
    """Name → what the store says of it."""

    def listed(fs: Any, path: str) -> dict[str, Mapping[str, Any]]:
        try:
            entries = fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        found = {}
        for entry in entries:
            folder, _, name = entry["name"].rstrip("/").rpartition("/")
            if name and folder.strip("/") == path.strip("/"):  # a marker of the folder is not in it
                found[name] = entry
        return found

    with _looking():
        return dict(sorted(ask(url, shown, listed).items()))


class _Known:
    """What a store has said of a folder and what is in it."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._here: Mapping[str, Any] | None = None
        self._asked = False
        self._folders: dict[str, dict[str, Mapping[str, Any]]] = {}

    def info(self, path: UrlPath) -> Mapping[str, Any] | None:
        if path.url != self._root and path.url.startswith(self._root):
            return self.children(path.parent).get(path.name)
        if path.url != self._root:
            return _info(path.url, str(path))
        if not self._asked:
            self._here, self._asked = _info(path.url, str(path)), True
        return self._here

    def children(self, folder: UrlPath) -> dict[str, Mapping[str, Any]]:
        if folder.url not in self._folders:
            self._folders[folder.url] = _children(folder.url, str(folder))
        return self._folders[folder.url]


Place: TypeAlias = Path | UrlPath
