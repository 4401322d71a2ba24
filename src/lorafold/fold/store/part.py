"""Lists of adapters: the entries of names whose hashes begin alike, in one file each.

A name's list is found by the first bits of its SHA-256, so looking up, adding or removing one
name concerns one list. A list that grows long is written as two, one bit more each, and two that
have become short as one: how long a list is does not depend on how many there are.

A list's bytes are compared with their checksum when they are read. One name is looked up in them,
and taken out or put in by editing them: what is said of all others is neither parsed nor written
anew. All names are looked at when all are first asked for, and each entry is checked when it is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from types import MappingProxyType
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
    return f"{_hash(name):032b}"


def _hash(name: str) -> int:
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "big")


@dataclass(slots=True)
class Line:
    """An adapter as its list has it.

    Args:
        name, order, id: of the adapter. json: its object. read: the record, once asked for.
    """

    name: str
    order: int
    id: int
    json: bytes
    read: AdapterEntry | None = None

    @classmethod
    def of(cls, entry: AdapterEntry) -> Line:
        """That of a record."""
        return cls(entry.name, entry.order, entry.id, encoded(entry.to_json()), entry)

    @classmethod
    def cut(cls, json: bytes) -> Line | None:
        """That of an object as lorafold writes it, which is not parsed; None of any other."""
        begins = _BEGINS.match(json)
        try:
            return begins and cls(begins[1].decode(), int(begins[2]), int(begins[3]), json)
        except UnicodeDecodeError:
            return None

    @property
    def entry(self) -> AdapterEntry:
        """The record.

        Raises:
            FileError: naming the field that is wrong.
        """
        if self.read is None:
            value = parsed(self.json, f"the library's adapter {self.name!r:.80}")
            self.read = AdapterEntry.from_json(value)
        return self.read


_BEGINS = re.compile(
    rb'\{"name":"([^"\\\x00-\x1f]*)","order":(0|[1-9][0-9]{0,17}),"id":(0|[1-9][0-9]{0,17}),"digest":'
)
_BETWEEN, _BEFORE_ORDER = b'},{"name":"', b'","order":'
_FIRST = len(b'[{"name":"')  # where a list's first name begins
_ESCAPED = re.compile(r'["\\\x00-\x1f]')


class Entries(Mapping[str, AdapterEntry]):
    """Those of one list, by name: one is looked up in its bytes, and for all they are parsed.

    A `FileError` comes when the first is asked for.

    Args:
        load: gives the list's bytes. where: the file, for messages. prefix: of the names' bits.
        size: how many there must be. file: what is still to be read for that.
        gone: names that are left out. known: lines that need not be looked up.

    Attributes:
        size: how many the bytes have. file: None once it was read.
    """

    def __init__(
        self,
        load: Callable[[], bytes],
        where: str,
        prefix: str,
        size: int,
        file: Callable[[], bytes] | None = None,
        gone: Collection[str] = (),
        known: Mapping[str, Line] = MappingProxyType({}),
    ) -> None:
        self._load, self._gone = load, gone
        self._where, self._prefix, self.size = where, prefix, size
        self._known = dict(known)
        self.file = file

    @classmethod
    def of(cls, prefix: str, lines: Iterable[Line]) -> Entries:
        """Those of lines that are there; by their order."""
        by_name = {line.name: line for line in sorted(lines, key=attrgetter("order"))}
        raw = _joined_lines(by_name.values())
        return cls(lambda: raw, "a list of adapters", prefix, len(by_name), known=by_name)

    @cached_property
    def _raw(self) -> bytes:
        raw = self._load()
        self._load, self.file = lambda: raw, None  # holds no file, which others could not remove
        return raw

    @cached_property
    def lines(self) -> dict[str, Line]:
        """Name → its line, by their order in the file."""
        found = _by_name(self._raw, self._where, self._prefix, self.size) | self._known
        return {name: line for name, line in found.items() if name not in self._gone}

    @cached_property
    def _plain(self) -> bool:
        """Whether a name can be looked up in the bytes: no escapes, no config like a line."""
        raw, size = self._raw, self.size
        begins = raw.startswith(b"[" + _BETWEEN[2:]) and raw.endswith(b"}]")
        counts = raw.count(_BETWEEN) == size - 1 and raw.count(_BEFORE_ORDER) == size
        return begins and counts and b"\\" not in raw and not self._gone

    def find(self, name: str) -> Line | None:
        """The line of a name."""
        found = self._known.get(name)
        if found is None and self._plain and "lines" not in self.__dict__:
            at = -1
            if not _ESCAPED.search(name):
                asked = name.encode("utf-8", "surrogatepass")
                at = self._raw.find(b'{"name":"%s%s' % (asked, _BEFORE_ORDER))
            if at < 0:
                return None
            found = Line.cut(self._raw[at : self._raw.find(_BETWEEN, at) + 1 or -1])
        if found is None:
            found = self.lines.get(name)
        if found is not None:
            self._known[name] = found
        return found

    def __getitem__(self, name: str) -> AdapterEntry:
        found = self.find(name)
        if found is None:
            raise KeyError(name)
        return found.entry

    def __iter__(self) -> Iterator[str]:
        return iter(self.lines)

    def __len__(self) -> int:
        return len(self.lines)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.find(name) is not None

    def to_bytes(self) -> bytes:
        """As a file."""
        return _joined_lines(self.lines.values()) if self._gone else self._raw

    def edited(self, name: str, line: Line | None) -> Entries | None:
        """With another line of a name, or none; None where it takes more than to edit the bytes."""
        raw, old, size = self._raw, self.find(name), self.size
        if not self._plain:
            return None
        if old is None:
            last = Line.cut(raw[raw.rfind(_BETWEEN) + 2 : -1])
            if line is None or last is None or last.order > line.order:
                return None
            raw, size = b"%s,%s]" % (raw[:-1], line.json), size + 1
        else:
            at = raw.find(old.json)
            end = at + len(old.json)
            if at < 0 or (line is None and size == 1) or (line and line.order != old.order):
                return None
            if line is not None:
                raw = raw[:at] + line.json + raw[end:]
            elif raw[end : end + 1] == b",":
                raw, size = raw[:at] + raw[end + 1 :], size - 1
            else:
                raw, size = raw[: at - 1] + raw[end:], size - 1
        return Entries(lambda: raw, self._where, self._prefix, size)


def _joined_lines(lines: Iterable[Line]) -> bytes:
    return b"[%s]" % b",".join(map(attrgetter("json"), lines))


def _by_name(raw: bytes, where: str, prefix: str, size: int) -> dict[str, Line]:
    """A file's lines by name; what sorts them and says where they are is checked."""
    lines = _lines(raw, where)
    by_name = {line.name: line for line in lines}
    if len(by_name) < len(lines):
        raise FileError(f"{where} has two adapters of one name")
    if len(lines) != size:
        raise FileError(f"{where} lists {len(lines)} adapters, the manifest says {size}")
    begins, others = int(prefix or "0", 2), _DEEPEST - len(prefix)
    for name in by_name:
        if _hash(name) >> others != begins:
            raise FileError(f"{where} has {name!r:.80}, whose place is another list")
    return by_name


def _lines(raw: bytes, where: str) -> list[Line]:
    """A file's lines, with their bytes as they are where lorafold wrote them."""
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
    keys = [(x["name"], x["order"], x["id"]) for x in value]
    cut = map(Line.cut, (b'{"name":"%s}' % piece for piece in raw[_FIRST:-2].split(_BETWEEN)))
    lines = [line for line in cut if line is not None]
    if [(line.name, line.order, line.id) for line in lines] == keys:
        return lines
    return [Line(*key, encoded(x)) for key, x in zip(keys, value, strict=True)]


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


@dataclass(frozen=True)
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
    def of(cls, prefix: str, lines: Collection[Line]) -> Part:
        """A new one."""
        return cls(prefix, Entries.of(prefix, lines), len(lines))

    @property
    def count(self) -> int:
        """How many adapters are there, as far as is known."""
        if self.lost:
            return 0
        return len(self.entries) if self.gone else self.listed

    def unreadable(self) -> Part:
        """The same, lost."""
        return replace(self, entries=Entries.of(self.prefix, ()), lost=True)

    def written(self, raw: bytes) -> tuple[str, Part]:
        """The name that a file of these bytes (its entries') gets by them, and the part as that."""
        digest = hashlib.sha256(raw).hexdigest()
        info = FileInfo(f"adapters-{digest[:16]}.json", len(raw), digest)
        return info.name, replace(self, gone=frozenset(), listed=self.count, file=info)

    @cached_property
    def line(self) -> bytes:
        """As the manifest names it."""
        assert self.file is not None
        found = {"file": self.file.name, "bytes": self.file.nbytes, "sha256": self.file.sha256}
        gone = {"gone": sorted(self.gone)} if self.gone else {}
        return encoded({**found, "prefix": self.prefix, "listed": self.listed, **gone})


class Adapters(Mapping[str, AdapterEntry]):
    """All adapters by name, in the order in which they came; one name is looked up in one list.

    Args:
        parts: the lists. Those that are lost list nobody.

    Attributes:
        some_lost: whether there are such.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = [part for part in parts if not part.lost]
        self.some_lost = len(self._parts) < len(parts)
        self._by_prefix: dict[str, list[Part]] = {}
        for part in self._parts:
            self._by_prefix.setdefault(part.prefix, []).append(part)
        self._depths = sorted(set(map(len, self._by_prefix)), reverse=True)

    def at(self, prefix: str) -> Sequence[Part]:
        """The lists of a prefix."""
        return self._by_prefix.get(prefix, ())

    def part_of(self, name: object) -> Part | None:
        """The list that has a name."""
        if isinstance(name, str):
            bits = bits_of(name)
            for depth in self._depths:
                for part in self.at(bits[:depth]):
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
        names = [name for _, name in sorted((line.order, line.name) for line in self._lines())]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise FileError(f"the library has two adapters of one name, {twice!r:.80}")
        return names

    def _lines(self) -> Iterable[Line]:
        return (line for part in self._parts for line in part.entries.lines.values())

    def ids(self) -> Iterable[int]:
        """The ids of all, list after list."""
        return (line.id for line in self._lines())


def changed_parts(
    parts: Sequence[Part],
    there: Adapters,
    fresh: Mapping[str, AdapterEntry],
    leaving: Collection[str],
) -> tuple[Part, ...]:
    """The lists with some adapters, in place of those of their names, and without some others.

    Only the lists that have one of the names are written anew.

    Args:
        parts: the lists. there: what is in them.
    """
    names = {*fresh, *leaving}
    if len(names) == 1:
        (name,) = names
        edited = _edited(parts, there, name, fresh.get(name))
        if edited is not None:
            return edited
    bits = {name: bits_of(name) for name in names}
    lost = [_without(part, names, bits) for part in parts if part.lost]
    changed: dict[str, dict[str, Line]] = {}  # prefix → what its list has by now
    for name in names:
        part = there.part_of(name)
        prefix = there.place_of(name) if part is None else part.prefix
        if prefix is None:  # no list for it, or a lost one
            covering = [p.prefix for p in lost if bits[name].startswith(p.prefix)]
            prefix = max(covering, key=len, default="")
        if part is not None or name in fresh:
            changed.setdefault(prefix, {})
            if name in fresh:
                changed[prefix][name] = Line.of(fresh[name])
    kept = [part for part in parts if not part.lost and part.prefix not in changed]
    for prefix, lines in changed.items():
        for part in there.at(prefix):
            lines.update((n, line) for n, line in part.entries.lines.items() if n not in names)
    short = {prefix for prefix, entries in changed.items() if len(entries) <= _SHORT}
    for prefix in sorted(short, key=len, reverse=True):
        kept = _joined(prefix, changed, kept, {p.prefix for p in lost})
    new = [Part.of(*piece) for p, found in changed.items() for piece in _divided(p, found.values())]
    return tuple(sorted((*lost, *kept, *new), key=attrgetter("prefix")))


def _edited(
    parts: Sequence[Part], there: Adapters, name: str, entry: AdapterEntry | None
) -> tuple[Part, ...] | None:
    """The lists after the change of one name, where that takes no more than to edit one's bytes."""
    part = there.part_of(name)
    if part is None:
        beside = there.at(there.place_of(name) or "")
        part = beside[0] if len(beside) == 1 else None
    if part is None or part.gone or there.some_lost:
        return None
    entries = part.entries.edited(name, None if entry is None else Line.of(entry))
    if entries is None or not (_SHORT if part.prefix else 0) < entries.size <= _LONGEST:
        return None
    edited = Part(part.prefix, entries, entries.size)
    return tuple(edited if p is part else p for p in parts)


def _without(part: Part, names: Collection[str], bits: Mapping[str, str]) -> Part:
    """A lost list less some names, any of which it may have."""
    leave = frozenset(name for name in names if bits[name].startswith(part.prefix))
    return replace(part, gone=part.gone | leave) if leave else part


def _joined(
    prefix: str, changed: dict[str, dict[str, Line]], kept: list[Part], lost: Collection[str]
) -> list[Part]:
    """Make one list of two short ones, as often as that goes; what is kept of the others."""
    while prefix in changed and prefix:
        beside = prefix[:-1] + "10"[int(prefix[-1])]
        here = changed[prefix]
        there = [part for part in kept if part.prefix == beside]
        found = dict(changed.get(beside, {}))
        known = beside in changed or there
        size = len(here) + len(found) + sum(part.count for part in there)
        if not known or size > _SHORT or {prefix, beside} & set(lost):
            break
        for part in there:
            found |= part.entries.lines
        kept = [part for part in kept if part.prefix != beside]
        changed.pop(beside, None)
        del changed[prefix]
        prefix = prefix[:-1]
        changed[prefix] = {**changed.get(prefix, {}), **here, **found}
    if prefix == "" and not changed.get("", True):
        del changed[""]
    return kept


def _divided(prefix: str, lines: Collection[Line]) -> Iterator[tuple[str, Collection[Line]]]:
    """Lists that are not too long, each with its prefix."""
    if len(lines) <= _LONGEST or len(prefix) >= _DEEPEST:
        yield prefix, lines
        return
    halves: tuple[list[Line], list[Line]] = [], []
    for line in lines:
        halves[int(bits_of(line.name)[len(prefix)])].append(line)
    for bit, half in enumerate(halves):
        yield from _divided(f"{prefix}{bit}", half)
