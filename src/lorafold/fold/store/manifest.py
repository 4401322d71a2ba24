"""What a library says of itself, as records: every field read is checked into one of these.

docs/formats.md describes the files: a small `library.json` (`Manifest`: the options, a
`ModuleEntry` a module, the shards with the ids of whose records they hold), and lists of
`AdapterEntry` (`Part`). An entry has its adapter's id and not its shard, so that no list changes
where records are copied into another shard. Records never change; a change makes new ones.
"""

from __future__ import annotations

import bisect
import functools
import gzip
import hashlib
import io
import shlex
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import attrgetter
from typing import Any, TypeVar

from ...errors import FileError, MismatchError, UnknownNameError
from ...files.atomic import appears, replace_file, set_aside
from ...files.config import LIBRARY_NAME
from ...files.disk.held import read_regular
from ...files.remote.place import Place, exists, is_dir, is_file
from ...words import did_you_mean
from ..options import FORMS, RECORDED, Options
from .entries import AdapterEntry, ModuleEntry, Rows, sha256, shard_name, sizes
from .fields import (
    Wrong,
    an_object,
    count,
    encoded,
    mapped,
    matching,
    one_of,
    parsed,
    read,
    text,
    tuple_of,
)
from .part import PART_NAME, PREFIX, Adapters, Entries, FileInfo, Part, changed_parts
from .shard_writer import ShardInfo

T = TypeVar("T")
FORMAT = "lorafold-library"
VERSION = 1
LONGEST = 1 << 27  # bytes of a manifest
_REMEMBERED = 4 << 20  # bytes of a manifest that is not read anew where it is asked for again
_LOOKED_THROUGH = 10_000  # names among which near ones are looked for
MANIFEST = LIBRARY_NAME
COPY = f".{MANIFEST}.gz"


@dataclass(frozen=True)
class Manifest:
    """What a library says of itself.

    Args:
        base_model: that the adapters belong to. options: it was folded by.
        config: what the adapters' configs are written as differences from.
        modules: a module's position is its number. parts: the adapters, in lists.
        holds: shard → whose records it has; none of a shard that has bases alone.
        next_id: larger than every id and every place among the names so far.
        plain_svd_bytes: what truncating each adapter alone would take; 0 without a tolerance.
    """

    base_model: str | None = None
    options: Options = field(default_factory=Options)
    config: Mapping[str, Any] = field(default_factory=dict)
    modules: tuple[ModuleEntry, ...] = ()
    parts: tuple[Part, ...] = ()
    holds: Mapping[str, Rows] = field(default_factory=dict)
    next_id: int = 0
    plain_svd_bytes: int = 0

    @cached_property
    def adapters(self) -> Adapters:
        """By name, in the order in which they came."""
        return Adapters(self.parts)

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Module path → its number."""
        return {m.path: j for j, m in enumerate(self.modules)}

    def check_shape(self, path: str, shape: tuple[int, int]) -> None:
        """Raise a `MismatchError` if the library has the module in another shape."""
        j = self.numbers.get(path)
        if j is not None and self.modules[j].shape != tuple(shape):
            raise MismatchError(
                f"module {path!r} is {self.modules[j].shape} in the library and "
                f"{tuple(shape)} in the adapter"
            )

    def entry(self, name: str) -> AdapterEntry:
        """An adapter's.

        Raises:
            UnknownNameError: no such adapter.
        """
        try:
            return self.adapters[name]
        except KeyError:
            count = len(self.adapters)
            hint = f"it has {count:,}"
            if count <= _LOOKED_THROUGH:
                hint = did_you_mean(str(name), self.adapters)
            raise UnknownNameError(f"no adapter {name!r} in the library; {hint}") from None

    def changed(self, entries: Iterable[AdapterEntry], leaving: Collection[str] = ()) -> Manifest:
        """With these adapters, in place of those of their names, and without those that leave.

        Only the lists that have one of the names are written anew. Which shard has the records of
        what is new is said by `holding`.
        """
        fresh = {entry.name: entry for entry in entries}
        left = set()
        for name in {*fresh, *leaving} if self.parts else ():
            part = self.adapters.part_of(name)
            if part is not None:
                left.add(part.entries[name].id)
        highest = max((max(e.id, e.order) for e in fresh.values()), default=-1)
        holds, left_of = dict(self.holds), dict[str, list[int]]()
        for number in left - {entry.id for entry in fresh.values()}:
            shard = self.shard_of(number)
            if shard is not None:
                left_of.setdefault(shard, []).append(number)
        for name, numbers in left_of.items():
            holds[name] = holds[name].without(numbers)
            if not holds[name].alive and name not in self._with_bases:
                del holds[name]
        return replace(
            self,
            parts=changed_parts(self.parts, self.adapters, fresh, leaving),
            holds=holds,
            next_id=max(self.next_id, highest + 1),
        )

    def holding(self, shards: Mapping[str, Rows], instead: Collection[str] = ()) -> Manifest:
        """With some shards' rows, and without those of others that they take the place of."""
        kept = {name: rows for name, rows in self.holds.items() if name not in instead}
        return replace(self, holds={**kept, **shards})

    @cached_property
    def _starts(self) -> tuple[list[int], list[str]]:
        found = sorted((rows.first, name) for name, rows in self.holds.items())
        return [first for first, _ in found], [name for _, name in found]

    def shard_of(self, number: int) -> str | None:
        """The shard with the records of the adapter of an id; None where no shard has them."""
        starts, names = self._starts
        at = bisect.bisect_right(starts, number) - 1
        return names[at] if at >= 0 and number <= self.holds[names[at]].last else None

    @cached_property
    def used(self) -> frozenset[str]:
        """The shards that hold anything of the library."""
        return self._with_bases | {name for name, rows in self.holds.items() if rows.alive}

    @cached_property
    def _with_bases(self) -> frozenset[str]:
        pieces = (p for m in self.modules for pieces in m.bases.values() for p in pieces)
        return frozenset(piece.shard for piece in pieces)

    def to_bytes(self, shards: Mapping[str, ShardInfo]) -> bytes:
        """`library.json`: what it says, and first of all the SHA-256 of that.

        Raises:
            FileError: it has no form in JSON.
        """
        head = {
            "format": FORMAT,
            "version": VERSION,
            "base_model": self.base_model,
            "options": self.options.recorded(),
            "plain_svd_bytes": self.plain_svd_bytes,
            "config": self.config,
            "next_id": self.next_id,
            "modules": [m.to_json() for m in self.modules],
        }
        lists = b",".join(map(attrgetter("line"), self.parts))
        files = b",".join(_line(name, info, self.holds.get(name)) for name, info in shards.items())
        raw = b'%s,"adapters":[%s],"shards":{%s}}' % (encoded(head)[:-1], lists, files)
        return _HEAD + hashlib.sha256(raw).hexdigest().encode() + _NEXT + raw[1:]


def _line(name: str, info: ShardInfo, holds: Rows | None) -> bytes:
    """What a manifest says of a shard."""
    line = b'"%s":{"bytes":%d,"header_sha256":"%s","data_sha256":"%s"' % (
        name.encode(),
        info.nbytes,
        info.header_sha256.encode(),
        info.data_sha256.encode(),
    )
    return line + (b"}" if holds is None else b",%s}" % holds.line)


_HEAD, _NEXT = b'{"sha256":"', b'",'  # how every library.json begins, the digest between them
_START = len(_HEAD) + 64 + len(_NEXT)


# Reading


@dataclass(frozen=True, slots=True)
class _PartFile:
    file: str
    bytes: int
    sha256: str
    prefix: str
    listed: int
    gone: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _ShardFile:
    bytes: int
    header_sha256: str
    data_sha256: str
    ids: tuple[int, int] | None = None
    rows: int = 0
    gone: tuple[int, ...] = ()

    @property
    def holds(self) -> Rows | None:
        """Whose records it has."""
        return None if self.ids is None else Rows(*self.ids, self.rows, self.gone)


def _base_model(value: Any) -> str | None:
    return None if value is None else text(value)


def _options(value: Any) -> Options:
    given = an_object(value)
    try:
        found = Options(**{k: v for k, v in given.items() if k in RECORDED})
        found.check_ranges()
    except (MismatchError, TypeError) as e:
        raise Wrong(f"those of a fold ({e})") from None
    one_of(*FORMS)(found.form)
    return found


def _right(record: Callable[[Any], T]) -> Callable[[Any], T]:
    """A check that a record can be made of the value."""

    def check(value: Any) -> T:
        try:
            return record(value)
        except FileError as e:
            raise Wrong(f"right ({e})") from None

    return check


def _ids(value: Any) -> tuple[int, int]:
    found = sizes(value)
    if len(found) != 2 or found[0] > found[1]:
        raise Wrong("[lowest, highest]")
    return found[0], found[1]


def _shard_file(value: Any) -> _ShardFile:
    found = read(_ShardFile, value, _SHARD, "one")
    gone = set(found.gone)
    if found.ids is None:
        fits = not found.rows and not gone
    else:
        first, last = found.ids
        fits = 1 <= found.rows <= last - first + 1 and len(gone) == len(found.gone) <= found.rows
        fits = fits and all(first <= number <= last for number in gone)
    if not fits:
        raise Wrong("right (its ids, rows and gone do not belong together)")
    return found


_PART = {
    "file": matching(PART_NAME, "the name of a list of adapters"),
    "bytes": count,
    "sha256": sha256,
    "prefix": matching(PREFIX, "the first bits of a hash, as 0 and 1"),
    "listed": count,
    "gone": tuple_of(text),
}
_SHARD: dict[str, Callable[[Any], Any]] = {
    "bytes": count,
    "header_sha256": sha256,
    "data_sha256": sha256,
    "ids": _ids,
    "rows": count,
    "gone": sizes,
}


def _part_file(value: Any) -> _PartFile:
    """A list's record; those of lists that stay are many, and remembered."""
    if type(value) is dict and value.keys() == _PLAIN:
        plain = tuple(value[name] for name in _PLAIN_ORDER)
        if all(type(item) in (str, int) for item in plain):
            return _plain_part(*plain)
    return read(_PartFile, value, _PART, "a list")


_PLAIN_ORDER = ("file", "bytes", "sha256", "prefix", "listed")
_PLAIN = set(_PLAIN_ORDER)


@functools.lru_cache(1 << 12)
def _plain_part(*values: str | int) -> _PartFile:
    return read(_PartFile, dict(zip(_PLAIN_ORDER, values, strict=True)), _PART, "a list")


_WHOLE: dict[str, Callable[[Any], Any]] = {
    "base_model": _base_model,
    "options": _options,
    "config": an_object,
    "modules": tuple_of(_right(ModuleEntry.from_json)),
    "adapters": tuple_of(_right(_part_file)),
    "shards": mapped(_right(_shard_file), shard_name),
    "next_id": count,
    "plain_svd_bytes": count,
}


@dataclass(frozen=True)
class Said:
    """A manifest as it is in its file."""

    base_model: str | None
    options: Options
    config: dict[str, Any]
    modules: tuple[ModuleEntry, ...]
    adapters: tuple[_PartFile, ...]
    shards: dict[str, _ShardFile]
    next_id: int
    plain_svd_bytes: int

    @property
    def files(self) -> frozenset[str]:
        """Names of the files that it names."""
        return frozenset((*self.shards, *(p.file for p in self.adapters)))


def read_manifest(path: Place) -> bytes:
    """The bytes of the manifest in the folder `path`.

    Raises:
        FileError: there is none, or it can't be read.
    """

    def check(size: int) -> None:
        if size > LONGEST:
            raise FileError(f"{path / MANIFEST} is too long for a manifest")

    try:
        return read_regular(path / MANIFEST, check)
    except FileNotFoundError as e:
        if not exists(path) and appears(path):
            return read_manifest(path)
        if is_dir(path):
            hint = ""
            if is_file(path / COPY):
                hint = f": `lorafold repair {shlex.quote(str(path))}` puts it back from its copy"
            raise FileError(f"{path} is not a library: it holds no {MANIFEST}{hint}") from e
        aside = set_aside(path)
        if aside:
            raise FileError(
                f"{path} does not exist; an interrupted overwrite left its old state in {aside[-1]}"
            ) from e
        raise FileError(f"{path} does not exist") from e
    except NotADirectoryError as e:
        raise FileError(f"{path} is a file; a library is a folder with a {MANIFEST}") from e
    except OSError as e:
        raise FileError(f"{path / MANIFEST} can't be read: {e.strerror}") from e


def manifest_of(
    whole: Said,
    where: str,
    load: Callable[[FileInfo], Callable[[], bytes] | None],
    known: Iterable[Part] = (),
) -> tuple[Manifest, dict[str, ShardInfo]]:
    """The manifest and what it says about its shards.

    Args:
        whole: as read. where: the file, for messages.
        load: of a list of adapters, what gives its checked bytes; None where it is lost.
        known: parts that need not be read again.

    Raises:
        FileError: what it says does not belong together.
    """
    shards = {
        name: ShardInfo(s.bytes, s.header_sha256, s.data_sha256) for name, s in whole.shards.items()
    }
    for name, info in shards.items():
        if info.name != name:
            raise FileError(f"{where}: {name} is {info.name} by its checksums")
    have = {
        p.file: p for p in known if p.file is not None and not p.lost and p.entries.file is None
    }
    parts = [_part(p, have, load, where) for p in whole.adapters]
    holds = {name: s.holds for name, s in whole.shards.items()}
    manifest = Manifest(
        whole.base_model,
        whole.options,
        whole.config,
        whole.modules,
        tuple(parts),
        {name: rows for name, rows in holds.items() if rows is not None},
        whole.next_id,
        whole.plain_svd_bytes,
    )
    if len(manifest.numbers) < len(manifest.modules):
        raise FileError(f"{where} has two modules of one path")
    return manifest, shards


def named_files(raw: bytes, where: str) -> frozenset[str]:
    """The files that a manifest names.

    Raises:
        FileError: as `said`.
    """
    return said(raw, where).files


def said(raw: bytes, where: str) -> Said:
    """What the bytes of a manifest say, each field checked.

    Raises:
        FileError: damaged, not a library's, of a newer version, or with a field that is wrong.
    """
    # A change looks at the same bytes several times, and so do a thousand readers.
    return _said_again(raw, where) if len(raw) <= _REMEMBERED else _said(raw, where)


def _said(raw: bytes, where: str) -> Said:
    if raw[: len(_HEAD)] == _HEAD and raw[_START - len(_NEXT) : _START] == _NEXT:
        stated = raw[len(_HEAD) : _START - len(_NEXT)].decode("ascii", "replace")
        digest = hashlib.sha256(b"{")
        digest.update(memoryview(raw)[_START:])  # of what may be long, no second copy
        found = digest.hexdigest()
        if found != stated:
            raise FileError(f"{where} is damaged: its SHA-256 is {found}, it states {stated:.80}")
        value = parsed(raw, where)
        _check_version(value, where)
        try:
            return read(Said, value, _WHOLE, "its object")
        except FileError as e:
            raise FileError(f"{where}: {e}") from None
    value = parsed(raw, where)
    _check_version(value, where)
    raise FileError(f"{where} does not begin with its SHA-256: it is damaged, or was edited")


_said_again = functools.lru_cache(4)(_said)


def _check_version(value: Any, where: str) -> None:
    found = value.get("format") if isinstance(value, dict) else None
    if found != FORMAT:
        raise FileError(f"{where} is not a library's: format is {found!r:.80}, expected {FORMAT!r}")
    version = value.get("version")
    if type(version) is not int or version < 1:
        raise FileError(f"{where}: version must be a whole number, found {version!r:.80}")
    if version > VERSION:
        raise FileError(
            f"{where} has format version {version}; this lorafold reads up to {VERSION}: update it"
        )


def _part(
    p: _PartFile,
    known: Mapping[FileInfo, Part],
    load: Callable[[FileInfo], Callable[[], bytes] | None],
    where: str,
) -> Part:
    """A list of adapters, read when it is needed, or as it is known."""
    info, gone = FileInfo(p.file, p.bytes, p.sha256), frozenset(p.gone)
    before = known.get(info)
    if before is not None and before.gone == gone and before.prefix == p.prefix:
        return before
    reading = load(info)
    if reading is None:
        return Part(p.prefix, Entries.of(p.prefix, ()), p.listed, gone, info, lost=True)
    name = f"{where.removesuffix(MANIFEST)}{p.file}"
    entries = Entries(reading, name, p.prefix, p.listed, reading, gone)
    return Part(p.prefix, entries, p.listed, gone, info)


# A second copy, for when the manifest is damaged: all else is read by it. It is written after each
# change and before the files go that the change has made needless, and by the next writer before
# anything else where that was not reached. So what the copy names is there, whether it is of the
# last state or of the one before. Nobody reads it but a repair.


#
# It is compressed in pieces, one after the other, so that those that stay need not be again.

_CUTS = b'{"file":"adapters-0', b']},"shard-'  # one list in 16, and a shard after one with gaps
_PIECE = 1 << 16  # bytes of a piece that is remembered


@functools.lru_cache(2)
def compressed(raw: bytes) -> bytes:
    """The copy of a manifest, as a file has it."""
    pieces = [raw]
    for cut in _CUTS:
        pieces = [piece for longer in pieces for piece in _pieces(longer, cut)]
    return b"".join(_packed_again(p) if len(p) <= _PIECE else _packed(p) for p in pieces)


def _pieces(raw: bytes, cut: bytes) -> list[bytes]:
    """What it is made of, cut before each `cut`."""
    first, *rest = raw.split(cut)
    return [first, *(cut + piece for piece in rest)]


def _packed(piece: bytes) -> bytes:
    return gzip.compress(piece, 6, mtime=0)


_packed_again = functools.lru_cache(1 << 8)(_packed)


def write_copy(folder: Place, raw: bytes) -> None:
    """Write it, unless it is there.

    Raises:
        FileError: it can't be written.
    """
    data = compressed(raw)

    def check(size: int) -> None:
        if size != len(data):
            raise OSError("of another length")

    try:
        there = read_regular(folder / COPY, check)
    except OSError:
        there = b""
    if there != data:
        replace_file(folder / COPY, data)


def read_copy(folder: Place) -> bytes | None:
    """The manifest as the copy has it; None where there is none that is whole."""

    def check(size: int) -> None:
        if size > LONGEST:
            raise OSError("too long")

    try:
        with gzip.open(io.BytesIO(read_regular(folder / COPY, check))) as file:
            raw = file.read(len(_HEAD))
            if raw == _HEAD:  # a little may unpack to a lot
                raw += file.read(LONGEST)
        named_files(raw, str(folder / COPY))
    except (OSError, EOFError, zlib.error, FileError):
        return None
    return raw
