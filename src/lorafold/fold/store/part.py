"""Lists of adapters: a library's entries in a few files, parsed when the first of them is needed.

With ten thousand names, to check every field of each takes longer than all else that opening does.
So a list's bytes are compared with their checksum, its names are looked at when they are first
asked for, and each entry is checked when it is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ...errors import FileError
from .entries import AdapterEntry, shard_name
from .fields import Wrong, count, encoded, parsed, text

PART_NAME = re.compile(r"adapters-[0-9a-f]{16}\.json")


class Entries(Mapping[str, AdapterEntry]):
    """Adapters by name.

    Args:
        load: gives {name: entry}, an entry being a record or an object of JSON that is to be one.
    """

    def __init__(self, load: Callable[[], dict[str, Any]]) -> None:
        self._load = load

    @classmethod
    def of(cls, entries: Iterable[AdapterEntry]) -> Entries:
        """Those of records that are there."""
        found = {entry.name: entry for entry in entries}
        return cls(lambda: found)

    @classmethod
    def read(cls, raw: bytes, where: str) -> Entries:
        """Those of a file; a `FileError` comes when the first is asked for."""
        return cls(lambda: _by_name(raw, where))

    @classmethod
    def joined(cls, parts: Iterable[Entries]) -> Entries:
        """Those of several, by their order.

        Raises:
            FileError: when the first is asked for: two have one name.
        """
        several = list(parts)

        def load() -> dict[str, Any]:
            found = [item for part in several for item in part.items_as_they_are()]
            found.sort(key=lambda item: _field(item[1], "order"))
            by_name = dict(found)
            if len(by_name) < len(found):
                names = [name for name, _ in found]
                twice = next(name for name in names if names.count(name) > 1)
                raise FileError(f"the library has two adapters of one name, {twice!r:.80}")
            return by_name

        return cls(load)

    @cached_property
    def _found(self) -> dict[str, Any]:
        return self._load()

    def __getitem__(self, name: str) -> AdapterEntry:
        value = self._found[name]
        if not isinstance(value, AdapterEntry):
            value = self._found[name] = AdapterEntry.from_json(value)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, name: object) -> bool:
        return name in self._found

    def without(self, names: Collection[str]) -> Entries:
        """Those less some."""
        return Entries(lambda: {n: v for n, v in self._found.items() if n not in names})

    def items_as_they_are(self) -> Iterable[tuple[str, Any]]:
        """(name, record or object)."""
        return self._found.items()

    def shard_of(self) -> dict[str, str]:
        """Name → the shard that holds its records."""
        return {name: _field(value, "shard") for name, value in self._found.items()}

    def next_order(self) -> int:
        """The place of an adapter that comes after all of them."""
        return max((_field(v, "order") for v in self._found.values()), default=-1) + 1

    def to_bytes(self) -> bytes:
        """As a file."""
        values = self._found.values()
        return encoded([v.to_json() if isinstance(v, AdapterEntry) else v for v in values])


def _field(value: Any, key: str) -> Any:
    return getattr(value, key) if isinstance(value, AdapterEntry) else value[key]


def _by_name(raw: bytes, where: str) -> dict[str, Any]:
    """A file's objects by name; what sorts them and says where they are is checked."""
    value = parsed(raw, where)
    if type(value) is not list:
        raise FileError(f"{where} must be a list of adapters")
    checks = {"name": text, "order": count, "shard": shard_name}
    for key, check in checks.items():
        try:
            # Few are different where there are many, but for the names, whose check is quick.
            for found in {x[key] for x in value}:
                check(found)
        except (Wrong, TypeError, KeyError, IndexError) as e:
            raise FileError(f"{where}: {_why_not(value) or e}") from None
    by_name = {x["name"]: x for x in value}
    if len(by_name) < len(value):
        raise FileError(f"{where} has two adapters of one name")
    return by_name


def _why_not(value: list[Any]) -> FileError | None:
    """What is wrong with the first adapter that is."""
    for x in value:
        try:
            AdapterEntry.from_json(x)
        except FileError as e:
            return e
    return None


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file as the manifest names it."""

    name: str
    nbytes: int
    sha256: str

    def fits(self, raw: bytes) -> bool:
        """Whether these are its bytes."""
        return len(raw) == self.nbytes and hashlib.sha256(raw).hexdigest() == self.sha256


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the adapters, as one file lists them.

    Args:
        entries: of those that are there. gone: names that the file lists, but that have left or are
            in another part by now. file: None before it is written.
        lost: whether the file is damaged, so that nobody knows what it lists. It is named on, for
            it may be put back.
    """

    entries: Entries
    gone: frozenset[str] = frozenset()
    file: FileInfo | None = None
    lost: bool = False

    def without(self, names: Collection[str]) -> Part:
        """The part less some adapters; of a lost one any could be."""
        leave = frozenset(name for name in names if self.lost or name in self.entries)
        if not leave:
            return self
        return replace(self, entries=self.entries.without(leave), gone=self.gone | leave)

    def written(self, raw: bytes) -> tuple[str, Part]:
        """The name that a file of these bytes (its entries') gets by them, and the part as that."""
        digest = hashlib.sha256(raw).hexdigest()
        info = FileInfo(f"adapters-{digest[:16]}.json", len(raw), digest)
        return info.name, replace(self, gone=frozenset(), file=info)

    def to_json(self) -> dict[str, Any]:
        """As the manifest names it."""
        assert self.file is not None
        found = {"file": self.file.name, "bytes": self.file.nbytes, "sha256": self.file.sha256}
        return {**found, "gone": sorted(self.gone)} if self.gone else found
