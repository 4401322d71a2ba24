"""What a library says of itself, as records: every field read is checked into one of these.

docs/formats.md describes the files: a small `library.json` (`Manifest`: the options, a
`ModuleEntry` a module, the shards), and one list of `AdapterEntry` for each shard (`Part`), so that
adding to many adapters writes a new list of one. Records never change; a change makes new ones.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import os
import shlex
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from ...errors import FileError, MismatchError, UnknownNameError
from ...files.atomic import appears, replace_file, set_aside
from ...files.config import LIBRARY_NAME
from ...files.disk.held import open_regular, read_regular
from ...words import did_you_mean
from ..options import FORMS, RECORDED, Options
from .entries import AdapterEntry, ModuleEntry, sha256, shard_name
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
from .part import PART_NAME, Entries, FileInfo, Part
from .shard_writer import ShardInfo

T = TypeVar("T")
_LONGER = 8  # a list of adapters is written again with one that is new and this many times shorter
FORMAT = "lorafold-library"
VERSION = 1
LONGEST = 1 << 27  # bytes of a manifest
MANIFEST = LIBRARY_NAME
COPY = f".{MANIFEST}.gz"


@dataclass(frozen=True)
class Manifest:
    """What a library says of itself.

    Args:
        base_model: that the adapters belong to. options: it was folded by.
        config: what the adapters' configs are written as differences from.
        modules: a module's position is its number. parts: the adapters, in lists.
        plain_svd_bytes: what truncating each adapter alone would take; 0 without a tolerance.
    """

    base_model: str | None = None
    options: Options = field(default_factory=Options)
    config: Mapping[str, Any] = field(default_factory=dict)
    modules: tuple[ModuleEntry, ...] = ()
    parts: tuple[Part, ...] = ()
    plain_svd_bytes: int = 0

    @cached_property
    def adapters(self) -> Entries:
        """By name, in the order in which they came."""
        return Entries.joined(part.entries for part in self.parts)

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
        except (KeyError, TypeError):
            hint = did_you_mean(str(name), self.adapters)
            raise UnknownNameError(f"no adapter {name!r} in the library; {hint}") from None

    def changed(self, entries: Iterable[AdapterEntry], leaving: Collection[str] = ()) -> Manifest:
        """With these adapters, in place of those of their names, and without those that leave.

        What is new goes into a list of its own, and lists that are not much longer into that with
        it: there are few, and a long one is hardly ever written again.
        """
        fresh: dict[str, Any] = {e.name: e for e in entries}
        parts = [part.without({*fresh, *leaving}) for part in self.parts]
        kept = [part for part in parts if part.lost]
        whole = [part for part in parts if not part.lost]
        for part in sorted(whole, key=lambda part: len(part.entries)):
            # One that is mostly gone is written anew, too.
            if len(part.entries) <= _LONGER * len(fresh) or len(part.gone) > len(part.entries):
                fresh |= dict(part.entries.items_as_they_are())
            else:
                kept.append(part)
        new = [Part(Entries.joined([Entries(lambda: fresh)]))] if fresh else []
        return replace(self, parts=(*reversed(kept), *new))

    @cached_property
    def used(self) -> frozenset[str]:
        """The shards that hold anything of the library."""
        pieces = (p for m in self.modules for pieces in m.bases.values() for p in pieces)
        return frozenset(set(self.adapters.shard_of().values()) | {piece.shard for piece in pieces})

    def to_bytes(self, shards: Mapping[str, ShardInfo]) -> bytes:
        """`library.json`: what it says, and first of all the SHA-256 of that.

        Raises:
            FileError: it has no form in JSON.
        """
        whole = {
            "format": FORMAT,
            "version": VERSION,
            "base_model": self.base_model,
            "options": self.options.recorded(),
            "plain_svd_bytes": self.plain_svd_bytes,
            "config": self.config,
            "modules": [m.to_json() for m in self.modules],
            "adapters": [part.to_json() for part in self.parts],
            "shards": {
                name: {
                    "bytes": info.nbytes,
                    "header_sha256": info.header_sha256,
                    "data_sha256": info.data_sha256,
                }
                for name, info in shards.items()
            },
        }
        raw = encoded(whole)
        return _HEAD + hashlib.sha256(raw).hexdigest().encode() + _NEXT + raw[1:]


_HEAD, _NEXT = b'{"sha256":"', b'",'  # how every library.json begins, the digest between them
_START = len(_HEAD) + 64 + len(_NEXT)


# Reading


@dataclass(frozen=True, slots=True)
class _PartFile:
    file: str
    bytes: int
    sha256: str
    gone: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _ShardFile:
    bytes: int
    header_sha256: str
    data_sha256: str


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


_PART = {
    "file": matching(PART_NAME, "the name of a list of adapters"),
    "bytes": count,
    "sha256": sha256,
    "gone": tuple_of(text),
}
_SHARD = {"bytes": count, "header_sha256": sha256, "data_sha256": sha256}
_WHOLE: dict[str, Callable[[Any], Any]] = {
    "base_model": _base_model,
    "options": _options,
    "config": an_object,
    "modules": tuple_of(_right(ModuleEntry.from_json)),
    "adapters": tuple_of(_right(lambda value: read(_PartFile, value, _PART, "a list"))),
    "shards": mapped(_right(lambda value: read(_ShardFile, value, _SHARD, "one")), shard_name),
    "plain_svd_bytes": count,
}


@dataclass(frozen=True)
class _Whole:
    base_model: str | None
    options: Options
    config: dict[str, Any]
    modules: tuple[ModuleEntry, ...]
    adapters: tuple[_PartFile, ...]
    shards: dict[str, _ShardFile]
    plain_svd_bytes: int


def read_manifest(path: Path) -> bytes:
    """The bytes of the manifest in the folder `path`.

    Raises:
        FileError: there is none, or it can't be read.
    """
    try:
        with open(open_regular(path / MANIFEST), "rb") as file:
            raw = file.read(LONGEST + 1)
        if len(raw) > LONGEST:
            raise FileError(f"{path / MANIFEST} is too long for a manifest")
        return raw
    except FileNotFoundError as e:
        if not os.path.exists(path) and appears(path):
            return read_manifest(path)
        if os.path.isdir(path):
            hint = ""
            if os.path.isfile(path / COPY):
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


def parse_manifest(
    raw: bytes, where: str, part: Callable[[FileInfo], bytes | None], known: Iterable[Part] = ()
) -> tuple[Manifest, dict[str, ShardInfo]]:
    """The manifest and what it says about its shards, checked.

    Args:
        raw: as read. where: the file, for messages.
        part: reads a list of adapters that the manifest names, checked; None where it is lost.
        known: parts that need not be read again.

    Raises:
        FileError: damaged, not a library's, of a newer version, or with a field that is wrong.
    """
    whole = _checked(raw, where)
    shards = {
        name: ShardInfo(s.bytes, s.header_sha256, s.data_sha256) for name, s in whole.shards.items()
    }
    for name, info in shards.items():
        if info.name != name:
            raise FileError(f"{where}: {name} is {info.name} by its checksums")
    have = {p.file: p for p in known if p.file is not None and not p.lost}
    parts = [_part(p, have, part, where) for p in whole.adapters]
    manifest = Manifest(
        whole.base_model,
        whole.options,
        whole.config,
        whole.modules,
        tuple(parts),
        whole.plain_svd_bytes,
    )
    if len(manifest.numbers) < len(manifest.modules):
        raise FileError(f"{where} has two modules of one path")
    return manifest, shards


def named_files(raw: bytes, where: str) -> set[str]:
    """The files that a manifest names.

    Raises:
        FileError: as `parse_manifest`, as far as the lists of adapters are not needed.
    """
    whole = _checked(raw, where)
    return {*whole.shards, *(p.file for p in whole.adapters)}


def _checked(raw: bytes, where: str) -> _Whole:
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
            return read(_Whole, value, _WHOLE, "its object")
        except FileError as e:
            raise FileError(f"{where}: {e}") from None
    value = parsed(raw, where)
    _check_version(value, where)
    raise FileError(f"{where} does not begin with its SHA-256: it is damaged, or was edited")


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
    load: Callable[[FileInfo], bytes | None],
    where: str,
) -> Part:
    """A list of adapters, read, or as it is known."""
    info, gone = FileInfo(p.file, p.bytes, p.sha256), frozenset(p.gone)
    before = known.get(info)
    if before is not None and before.gone <= gone:
        return before.without(gone - before.gone)
    raw = load(info)
    if raw is None:
        return Part(Entries.of(()), gone, info, lost=True)
    entries = Entries.read(raw, f"{where.removesuffix(MANIFEST)}{p.file}")
    return Part(entries.without(gone) if gone else entries, gone, info)


# A second copy, for when the manifest is damaged: all else is read by it. It is written after each
# change and before the files go that the change has made needless, and by the next writer before
# anything else where that was not reached. So what the copy names is there, whether it is of the
# last state or of the one before. Nobody reads it but a repair.


@functools.lru_cache(2)
def compressed(raw: bytes) -> bytes:
    """The copy of a manifest, as a file has it."""
    return gzip.compress(raw, mtime=0)


def write_copy(folder: Path, raw: bytes) -> None:
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


def read_copy(folder: Path) -> bytes | None:
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
