"""Lists of adapters: the entries of names whose hashes begin alike, in one file each.

A name's list is found by the first bits of its SHA-256, so looking up, adding or removing one
name concerns one list. A list that grows long is written as two, one bit more each, and two that
have become short as one: how long a list is does not depend on how many there are.

A list's bytes are compared with their checksum when they are read, its names are looked at when
they are first asked for, and each entry is checked when it is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ...errors import FileError
from .entries import AdapterEntry
from .fields import Wrong, count, encoded, parsed, text

PART_NAME = re.compile(r"adapters-[0-9a-f]{16}\.json")
PREFIX = re.compile(r"[01]{0,32}")
_LONGEST = 512  # entries of a list
_SHORT = 128  # entries of two lists that become one
_DEEPEST = 32  # bits; lists of names that agree in so many are not divided


def bits_of(name: str) -> str:
    """The first 32 bits of the SHA-256 of a name in UTF-8, as 0 and 1."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return f"{int.from_bytes(digest[:4], 'big'):032b}"


class Entries(Mapping[str, AdapterEntry]):
    """Those of one list, by name.

    Args:
        load: gives {name: entry}, an entry being a record or an object of JSON that is to be one.
    """

    def __init__(self, load: Callable[[], dict[str, Any]]) -> None:
        self._load = load

    @classmethod
    def of(cls, entries: Iterable[Any]) -> Entries:
        """Those of records, or of checked objects, that are there; by their order."""
        in_order = sorted(entries, key=lambda entry: _field(entry, "order"))
        found = {_field(entry, "name"): entry for entry in in_order}
        return cls(lambda: found)

    @classmethod
    def read(cls, load: Callable[[], bytes], where: str, prefix: str, size: int) -> Entries:
        """Those of a file; a `FileError` comes when the first is asked for.

        Args:
            load: gives its bytes. where: the file, for messages. prefix: of the names' bits.
            size: how many there must be.
        """
        return cls(lambda: _by_name(load(), where, prefix, size))

    @property
    def loaded(self) -> bool:
        """Whether they have been read."""
        return "_found" in self.__dict__

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

    def as_they_are(self) -> Iterable[Any]:
        """Records, or objects of those that nobody has asked for."""
        return self._found.values()

    def id_of(self, name: str) -> int:
        """The id of an adapter."""
        found: int = _field(self._found[name], "id")
        return found

    def to_bytes(self) -> bytes:
        """As a file."""
        values = self._found.values()
        return encoded([v.to_json() if isinstance(v, AdapterEntry) else v for v in values])


def _field(value: Any, key: str) -> Any:
    return getattr(value, key) if isinstance(value, AdapterEntry) else value[key]


def _by_name(raw: bytes, where: str, prefix: str, size: int) -> dict[str, Any]:
    """A file's objects by name; what sorts them and says where they are is checked."""
    value = parsed(raw, where)
    if type(value) is not list:
        raise FileError(f"{where} must be a list of adapters")
    checks = {"name": text, "order": count, "id": count}
    for key, check in checks.items():
        try:
            for found in value:
                check(found[key])
        except (Wrong, TypeError, KeyError, IndexError) as e:
            raise FileError(f"{where}: {_why_not(value) or e}") from None
    by_name = {x["name"]: x for x in value}
    if len(by_name) < len(value):
        raise FileError(f"{where} has two adapters of one name")
    if len(value) != size:
        raise FileError(f"{where} lists {len(value)} adapters, the manifest says {size}")
    for name in by_name:
        if not bits_of(name).startswith(prefix):
            raise FileError(f"{where} has {name!r:.80}, whose place is another list")
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
    """The adapters whose names' bits begin alike, as one file lists them.

    Args:
        prefix: how the bits begin. entries: of those that are there. listed: how many the file has.
        gone: names that the file lists, but that have left or are in another part by now: of a lost
            one alone, as others are written anew. file: None before it is written.
        lost: whether the file is damaged, so that nobody knows what it lists. It is named on, for
            it may be put back.
    """

    prefix: str
    entries: Entries
    listed: int
    gone: frozenset[str] = frozenset()
    file: FileInfo | None = None
    lost: bool = False

    @classmethod
    def of(cls, prefix: str, entries: Collection[Any]) -> Part:
        """A new one."""
        return cls(prefix, Entries.of(entries), len(entries))

    @property
    def count(self) -> int:
        """How many adapters are there, as far as is known."""
        if self.lost:
            return 0
        return len(self.entries) if self.gone else self.listed

    def unreadable(self) -> Part:
        """The same, lost."""
        return replace(self, entries=Entries.of(()), lost=True)

    def written(self, raw: bytes) -> tuple[str, Part]:
        """The name that a file of these bytes (its entries') gets by them, and the part as that."""
        digest = hashlib.sha256(raw).hexdigest()
        info = FileInfo(f"adapters-{digest[:16]}.json", len(raw), digest)
        return info.name, replace(self, gone=frozenset(), listed=self.count, file=info)

    def to_json(self) -> dict[str, Any]:
        """As the manifest names it."""
        assert self.file is not None
        found = {"file": self.file.name, "bytes": self.file.nbytes, "sha256": self.file.sha256}
        found |= {"prefix": self.prefix, "listed": self.listed}
        return {**found, "gone": sorted(self.gone)} if self.gone else found


class Adapters(Mapping[str, AdapterEntry]):
    """All adapters by name, in the order in which they came; one name is looked up in one list.

    Args:
        parts: the lists. Those that are lost list nobody.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = [part for part in parts if not part.lost]
        self._by_prefix: dict[str, list[Part]] = {}
        for part in self._parts:
            self._by_prefix.setdefault(part.prefix, []).append(part)
        self._depths = sorted({len(prefix) for prefix in self._by_prefix}, reverse=True)

    def part_of(self, name: object) -> Part | None:
        """The list that has a name."""
        if isinstance(name, str):
            bits = bits_of(name)
            for depth in self._depths:
                for part in self._by_prefix.get(bits[:depth], ()):
                    if name in part.entries:
                        return part
        return None

    def place_of(self, name: str) -> str | None:
        """The prefix of the list that a new name goes to; None where there is none for it."""
        bits = bits_of(name)
        return next((bits[:d] for d in self._depths if bits[:d] in self._by_prefix), None)

    def __getitem__(self, name: str) -> AdapterEntry:
        part = self.part_of(name)
        if part is None:
            raise KeyError(name)
        return part.entries[name]

    def __contains__(self, name: object) -> bool:
        return self.part_of(name) is not None

    def __len__(self) -> int:
        return sum(part.count for part in self._parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._in_order)

    @cached_property
    def _in_order(self) -> list[str]:
        found = [(_field(e, "order"), _field(e, "name")) for e in self.as_they_are()]
        names = [name for _, name in sorted(found)]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise FileError(f"the library has two adapters of one name, {twice!r:.80}")
        return names

    def as_they_are(self) -> Iterable[Any]:
        """Records, or objects of those that nobody has asked for, list after list."""
        return (entry for part in self._parts for entry in part.entries.as_they_are())

    def ids(self) -> Iterable[int]:
        """The ids of all, list after list."""
        return (_field(entry, "id") for entry in self.as_they_are())


def changed_parts(
    parts: Sequence[Part], fresh: Mapping[str, AdapterEntry], leaving: Collection[str]
) -> tuple[Part, ...]:
    """The lists with some adapters, in place of those of their names, and without some others.

    Only the lists that have one of the names are written anew.
    """
    names = {*fresh, *leaving}
    bits = {name: bits_of(name) for name in names}
    lost = [_without(part, names, bits) for part in parts if part.lost]
    there = Adapters(parts)
    changed: dict[str, dict[str, Any]] = {}  # prefix → what its list has by now
    for name in names:
        part = there.part_of(name)
        prefix = there.place_of(name) if part is None else part.prefix
        if prefix is None:  # no list for it, or a lost one
            covering = [p.prefix for p in lost if bits[name].startswith(p.prefix)]
            prefix = max(covering, key=len, default="")
        if part is not None or name in fresh:
            changed.setdefault(prefix, {})
            if name in fresh:
                changed[prefix][name] = fresh[name]
    kept = []
    for part in parts:
        if part.prefix in changed and not part.lost:
            for entry in part.entries.as_they_are():
                name = _field(entry, "name")
                if name not in names:
                    changed[part.prefix][name] = entry
        elif not part.lost:
            kept.append(part)
    short = {prefix for prefix, entries in changed.items() if len(entries) <= _SHORT}
    for prefix in sorted(short, key=len, reverse=True):
        kept = _joined(prefix, changed, kept, {p.prefix for p in lost})
    new = [Part.of(*piece) for p, found in changed.items() for piece in _divided(p, found.values())]
    return tuple(sorted((*lost, *kept, *new), key=lambda part: (part.prefix, not part.lost)))


def _without(part: Part, names: Collection[str], bits: Mapping[str, str]) -> Part:
    """A lost list less some names, any of which it may have."""
    leave = frozenset(name for name in names if bits[name].startswith(part.prefix))
    return replace(part, gone=part.gone | leave) if leave else part


def _joined(
    prefix: str, changed: dict[str, dict[str, Any]], kept: list[Part], lost: Collection[str]
) -> list[Part]:
    """Make one list of two short ones, as often as that goes; what is kept of the others."""
    while prefix in changed and prefix:
        beside = prefix[:-1] + "10"[int(prefix[-1])]
        here = changed[prefix]
        there = [part for part in kept if part.prefix == beside]
        found = {_field(e, "name"): e for e in changed.get(beside, {}).values()}
        known = beside in changed or there
        size = len(here) + len(found) + sum(part.count for part in there)
        if not known or size > _SHORT or {prefix, beside} & set(lost):
            break
        for part in there:
            found |= {_field(e, "name"): e for e in part.entries.as_they_are()}
        kept = [part for part in kept if part.prefix != beside]
        changed.pop(beside, None)
        del changed[prefix]
        prefix = prefix[:-1]
        changed[prefix] = {**changed.get(prefix, {}), **here, **found}
    if prefix == "" and not changed.get("", True):
        del changed[""]
    return kept


def _divided(prefix: str, entries: Collection[Any]) -> Iterator[tuple[str, Collection[Any]]]:
    """Lists that are not too long, each with its prefix."""
    if len(entries) <= _LONGEST or len(prefix) >= _DEEPEST:
        yield prefix, entries
        return
    halves: tuple[list[Any], list[Any]] = [], []
    for entry in entries:
        halves[int(bits_of(_field(entry, "name"))[len(prefix)])].append(entry)
    for bit, half in enumerate(halves):
        yield from _divided(f"{prefix}{bit}", half)
