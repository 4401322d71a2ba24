"""The names that requests may ask for, and what each means now.

A name leads to an adapter of the library, or to one that was given or loaded by its path, which
comes first. The library may be changed by others while it is served: its manifest is looked at
before a name is resolved, and opened anew where it is another. What a name means is found once for
each state of it: an adapter is read, its digest taken, and from then on the digest is asked for.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..adapter import Adapter
from ..errors import FileError, LorafoldError, MismatchError, UnknownNameError
from ..files import load
from ..files.config import LIBRARY_NAME
from ..files.remote.place import UrlPath, is_url, place_of
from ..fold import Library
from ..prefixes import Prefixes
from ..words import did_you_mean, one_line
from .adapters import Pool, check_finite
from .naming import LONGEST

_LOOK = 0.5  # seconds between two looks at the manifest
_LOOK_AFAR = 10.0  # of a library on a store, which has to be asked


@dataclass(frozen=True)
class Entry:
    """A name that is served.

    Args:
        name: it. root: of whose content; a folder, or nothing for the library's.
    """

    name: str
    root: str | None = None


class Catalog(Mapping[str, Entry]):
    """What names mean.

    Args:
        library: folded adapters, or their path; None for none.
        adapters: {name: path} of more. base: its name, which no adapter may have.

    Raises:
        FileError: nothing there that is read. MismatchError: a name is taken.
    """

    def __init__(
        self,
        library: Library | str | os.PathLike[str] | None,
        adapters: Mapping[str, str | os.PathLike[str]],
        base: str,
    ) -> None:
        self.base = base
        self._lock = threading.RLock()
        self._library = library if isinstance(library, Library | None) else Library.open(library)
        self._seen: Any = self._manifest()
        self._looked = time.monotonic()
        self._paths: dict[str, str] = {}
        self._times: dict[str, int] = {}  # how often a name was loaded
        self._digests: dict[Any, str] = {}
        for name, path in adapters.items():
            self.add(name, path)

    # Names

    def __getitem__(self, name: str) -> Entry:
        if name in self._paths:
            return Entry(name, self._paths[name])
        if self._library is not None and name in self._library:
            return Entry(name)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        yield from list(self._paths)
        if self._library is not None:
            yield from (n for n in self._library.names if n not in self._paths and n != self.base)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self._paths or (
            self._library is not None and name != self.base and name in self._library
        )

    def unknown(self, name: str) -> UnknownNameError:
        """The error for a name that isn't there."""
        return UnknownNameError(
            f"the model {one_line(name)} does not exist; "
            f"{did_you_mean(name[:LONGEST], [self.base, *self])}"
        )

    # What they mean

    def hold(self, names: Mapping[str, float], pool: Pool) -> dict[str, float]:
        """{digest: weight} of names, each digest held in the pool until it is released.

        Raises:
            LorafoldError: what reading or attaching one says; nothing is held then.
        """
        found: dict[str, float] = {}
        held: list[str] = []
        try:
            for name, weight in names.items():
                digest = self._hold(name, pool)
                held.append(digest)
                found[digest] = found.get(digest, 0.0) + weight
        except BaseException:
            pool.release(held)
            raise
        pool.release(held[i] for i in range(len(held)) if held[i] in held[:i])  # once is enough
        return found

    def _hold(self, name: str, pool: Pool) -> str:
        with self._lock:
            meaning = self._meaning(name)
            digest = self._digests.get(meaning)
        adapter: Adapter | None = None
        if digest is None:
            adapter = self._read(name)
            digest = adapter.digest

        def read() -> Adapter:
            found = adapter or self._read(name)
            if found.digest != digest:
                raise FileError(f"{name!r} has changed while it was read: try again")
            return _prepared(found)

        try:
            pool.hold(digest, read)
        except LorafoldError:
            with self._lock:
                self._digests.pop(meaning, None)
            raise
        with self._lock:
            self._digests[meaning] = digest
        return digest

    def _meaning(self, name: str) -> Any:
        """Something that is equal as long as a name means the same."""
        if name in self._paths:
            return name, self._paths[name], self._times[name]
        library = self._library
        if library is None or name not in library:
            raise self.unknown(name)
        entry = library.contents.entry(name)
        return entry.id, entry.digest, entry.error, library.contents.manifest.shard_of(entry.id)

    def _read(self, name: str) -> Adapter:
        with self._lock:
            path, library = self._paths.get(name), self._library
        if path is not None:
            return load(path)
        if library is None or name not in library:
            raise self.unknown(name)
        return library[name]

    # Changes

    def look(self) -> None:
        """Open the library anew where somebody has changed it."""
        with self._lock:
            if self._library is None or self._library.path is None:
                return
            pause = _LOOK_AFAR if is_url(self._library.path) else _LOOK
            if time.monotonic() - self._looked < pause:
                return
            self._looked = time.monotonic()
            seen = self._manifest()
            if seen == self._seen or seen is None:
                return
            with suppress(LorafoldError):  # as it was, until it can be read again
                # Not closed: somebody may be reading it.
                self._library, self._seen = Library.open(str(self._library.path)), seen
                shard_of = self._library.contents.manifest.shard_of
                found = self._digests.items()
                # Of what is gone, or stands elsewhere, nobody will ask.
                self._digests = {k: d for k, d in found if len(k) < 4 or shard_of(k[0]) == k[3]}

    def _manifest(self) -> Any:
        path = None if self._library is None else self._library.path
        if path is None:
            return None
        place = place_of(path) / LIBRARY_NAME
        try:
            if isinstance(place, UrlPath):
                return place.state()
            found = place.stat()
        except (OSError, FileError):
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size

    def add(self, name: str, path: str | os.PathLike[str]) -> None:
        """One more, by its path.

        Raises:
            MismatchError: the name is taken. LorafoldError: what reading it says.
        """
        if not name:
            raise MismatchError("a name must not be empty")
        self._check_free(name)
        load(path)  # what can't be read is said now
        with self._lock:
            self._check_free(name)  # somebody may have been faster
            self._paths[name] = os.fspath(path)
            self._times[name] = self._times.get(name, 0) + 1

    def _check_free(self, name: str) -> None:
        if name == self.base or name in self:
            raise MismatchError(f"the name {one_line(name)} is taken")

    def drop(self, name: str) -> None:
        """One less; requests that run it go on.

        Raises:
            UnknownNameError: no adapter of that name was given by its path.
        """
        with self._lock:
            if name not in self._paths:
                raise self.unknown(name)
            self._digests.pop((name, self._paths.pop(name), self._times[name]), None)


def _prepared(adapter: Adapter) -> Adapter:
    """With each rank prefix the best of its rank, unless it was trained at ranks of its own."""
    check_finite(adapter)
    if adapter.refusal is not None or not Prefixes.of(adapter.config).plain:
        return adapter
    return adapter.nested()
