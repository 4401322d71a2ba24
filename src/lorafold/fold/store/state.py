"""What a store holds at one moment, and what of it is lost.

A `State` never changes; a store goes from one to the next in one assignment, so whoever holds one
reads records and bases that belong together. What can't be opened is no reason to give nothing:
it is kept as `Damage`, beside the files that are whole.

Nothing that a writer does reaches a state. Where it has few files, all are opened or read at once.
Of many, each is opened when it is needed, and a shared lock on the manifest (a lease) says to
writers that what this one names is still to stay: see `store.py`. At a URL there are no locks, and
what is named no more stays for a day.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...errors import FileError
from ...files.atomic import share_lock
from ...files.disk.held import read_regular
from ...files.remote.file import gone
from ...files.remote.place import Place, UrlPath, exists
from .descriptor import Descriptor
from .manifest import MANIFEST, Manifest, Said, manifest_of, read_manifest, said
from .part import FileInfo
from .shard import Shard
from .shard_writer import ShardInfo

_HELD = 16  # files that a reader opens at once; of more it opens those that it needs
_OPEN = 64  # shards that stay open, where they are more and can be opened again
_RETRIES = 10  # manifests replaced while a reader was opening shards; each needs one more writer
# Of this process, or of a store that gives no ranges: no fault of a file.
_OWN_LIMITS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOTSUP}


def many(files: int) -> bool:
    """Whether a library has so many files that a reader does not open all of them at once."""
    return files > _HELD


@dataclass(frozen=True)
class Damage:
    """What is wrong with a file.

    Args:
        text: naming the file. lost: whether its bytes are known to be gone or wrong; a file that
            merely can't be read now (no right to, a disk that fails) may be whole.
    """

    text: str
    lost: bool

    @classmethod
    def of(cls, error: FileError) -> Damage:
        """By what was raised when the file was read.

        Raises:
            FileError: that one, where it says nothing on the file.
        """
        cause = error.__cause__
        number = cause.errno if isinstance(cause, OSError) else None
        if number in _OWN_LIMITS:
            raise error
        return cls(str(error), number in (None, errno.ENOENT))


class Shards(Mapping[str, Shard]):
    """A library's shards by name, each opened when it is first asked for.

    Args:
        infos: name → what is stated of it. folder: where they are; None in memory.
        opened: those that are open already.
        lease: what keeps writers from removing them; None where all are open.
    """

    def __init__(
        self,
        infos: Mapping[str, ShardInfo],
        folder: Place | None = None,
        opened: Mapping[str, Shard] | None = None,
        lease: Descriptor | None = None,
    ) -> None:
        self.infos = dict(infos)
        self._folder, self._lease = folder, lease
        self._opened = dict(opened or {})
        self._closed = False

    def __getitem__(self, name: str) -> Shard:
        info = self.infos[name]
        found = self._opened.get(name)
        if found is None:
            if self._closed or self._folder is None:
                raise FileError(
                    f"the library {self._folder or 'in memory'} is closed: open it again"
                )
            try:
                found = self._opened[name] = Shard.open(self._folder / name, info)
            except FileError as e:
                raise _told(self._folder / name, e) from e
            again = self._lease is not None or isinstance(self._folder, UrlPath)
            if again and len(self._opened) > _OPEN:
                self._opened.pop(
                    next(iter(self._opened), ""), None
                )  # whoever reads it still has it
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def __contains__(self, name: object) -> bool:
        return name in self.infos

    @property
    def opened(self) -> dict[str, Shard]:
        """Those that are open now."""
        return {name: shard for name, shard in list(self._opened.items()) if not shard.closed}

    @property
    def closed(self) -> bool:
        """Whether they were closed; none never are."""
        return self._closed and bool(self.infos)

    def close(self) -> None:
        """Let go of all."""
        self._closed = True
        for shard in list(self._opened.values()):
            shard.close()

    def twin(self) -> Shards:
        """The same, closed apart from these."""
        opened = {name: shard.twin() for name, shard in self.opened.items()}
        return Shards(self.infos, self._folder, opened, self._lease)

    def leased(self, lease: Descriptor) -> Shards:
        """The same, kept from being removed by another lease."""
        return Shards(self.infos, self._folder, self._opened, lease)

    def moved_to(self, folder: Path) -> Shards:
        """Those of a folder that has another name by now, all of which are open."""
        for shard in self._opened.values():
            shard.moved_to(folder)
        return Shards(self.infos, folder, self._opened, self._lease)


@dataclass(frozen=True)
class State:
    """A manifest, and the shards that it names.

    Args:
        raw: the manifest as written. manifest: what it says.
        shards: name → those that are there. missing: name → what is stated of the others.
        damage: file name → what is wrong, of shards and of lists of adapters.
        lease: keeps writers from removing files that are not open; None where all are.
    """

    raw: bytes = b""
    manifest: Manifest = field(default_factory=Manifest)
    shards: Shards = field(default_factory=lambda: Shards({}))
    missing: Mapping[str, ShardInfo] = field(default_factory=dict)
    damage: Mapping[str, Damage] = field(default_factory=dict)
    lease: Descriptor | None = None

    @functools.cached_property
    def files(self) -> frozenset[str]:
        """Names of the files that the manifest names, lost or not."""
        parts = (part.file.name for part in self.manifest.parts if part.file is not None)
        return frozenset((*self.shards, *self.missing, *parts))

    def shard(self, name: str, folder: Place | None) -> Shard:
        """The shard of that name.

        Raises:
            FileError: it is lost, or the manifest does not name it.
        """
        if name in self.shards:
            return self.shards[name]
        if name in self.damage:
            damage = self.damage[name]
            raise FileError(f"{damage.text}; {remedy(folder, damage.lost)}")
        raise FileError(f"the library's manifest uses {name}, which it does not name")

    def twin(self) -> State:
        """The same, with shards that are closed apart from these."""
        return replace(self, shards=self.shards.twin())

    def verified(self, folder: Place | None) -> State:
        """The same with all damage that is found by reading every file.

        Args:
            folder: where the files should have their names, unless a writer has moved on.
        """
        found, parts = dict(self.damage), list(self.manifest.parts)
        if folder is not None and _is_current(self.raw, folder):
            for name in self.shards:
                path = folder / name
                if not exists(path):
                    text = (
                        f"shard {path} is missing; who has it open still can save the library anew"
                    )
                    found[name] = Damage(text, True)
            for k, part in enumerate(parts):
                if part.file is not None and not part.lost:
                    try:
                        checked_list(folder / part.file.name, part.file)
                    except FileError as e:
                        found[part.file.name] = Damage.of(e)
                        parts[k] = part.unreadable()
        for name in self.shards:
            try:
                self.shards[name].verify()
            except FileError as e:
                found.setdefault(name, Damage.of(e))
        return replace(self, manifest=replace(self.manifest, parts=tuple(parts)), damage=found)

    def problems(self) -> str:
        """What is damaged, in a line: the first, and how many more."""
        first, *rest = [damage.text for damage in self.damage.values()]
        return f"{first} (and {len(rest)} more files)" if rest else first


def _is_current(raw: bytes, folder: Place | None) -> bool:
    """Whether a folder still has the manifest."""
    try:
        return folder is not None and read_manifest(folder) == raw
    except FileError:
        return False


def remedy(folder: Place | None, lost: bool = True) -> str:
    """What to do about damage."""
    if not lost:
        return "it may be whole: make it readable, and open the library again"
    return (
        "put the file back from a copy of the library, or see what else is left by "
        f"`lorafold repair {shlex.quote(str(folder))}` (lorafold.fold.repair)"
    )


# Reading


class _OutrunError(FileError):
    """A writer has replaced the manifest meanwhile."""


def read_state(folder: Place, before: State) -> State:
    """What the disk says now; shards that are open already stay open.

    Raises:
        FileError: no library there, or a manifest that can't be read or used.
    """
    raw = read_manifest(folder)
    for _ in range(_RETRIES):
        if before.raw and raw == before.raw and not before.damage:
            return before
        found = None
        try:
            found = state_of(folder, raw, before)
            if not found.damage:
                return found
        except _OutrunError:
            pass
        except FileError:
            if read_manifest(folder) == raw:
                raise
        # Either the library is damaged, or a writer removed a file after we read which there are;
        # then the manifest has changed, too.
        again = read_manifest(folder)
        if again == raw and found is not None:
            return found
        raw = again
    raise FileError(f"{folder} changes faster than it can be opened; try again")


def state_of(folder: Place, raw: bytes, before: State) -> State:
    """The state of a manifest that a folder has now.

    Args:
        before: whose open shards, and lists that were read, are taken over.

    Raises:
        FileError: the manifest can't be used, or is another by now.
    """
    where = str(folder / MANIFEST)
    whole = said(raw, where)
    lazy, lease = many(len(whole.files)), None
    if lazy and not isinstance(folder, UrlPath):
        lease = _lease(folder, raw)
        lazy = lease is not None
    # What is read now, and not when it is needed: where it might go until then everything.
    now = _not_as_stated(folder, whole) if lazy else whole.files
    damage: dict[str, Damage] = {}

    def list_of(info: FileInfo) -> _ListFile | None:
        file = _ListFile(folder, info, lease)
        try:
            return file.read() if info.name in now else file
        except FileError as e:
            damage[info.name] = Damage.of(e)
            return None

    manifest, infos = manifest_of(whole, where, list_of, before.manifest.parts)
    there = before.shards.opened
    opened = {name: shard for name, shard in there.items() if infos.get(name) == shard.info}
    for name in infos.keys() & now:
        try:
            opened[name] = opened.get(name) or Shard.open(folder / name, infos[name])
        except FileError as e:
            damage[name] = Damage.of(e)
    missing = {name: info for name, info in infos.items() if name in damage}
    kept = {name: info for name, info in infos.items() if name not in missing}
    return State(raw, manifest, Shards(kept, folder, opened, lease), missing, damage, lease)


def leased(folder: Path, state: State) -> State:
    """A state that was just written, as a reader of many files has it: with a lease on its own."""
    lease = None
    if not state.damage:
        with contextlib.suppress(_OutrunError):
            lease = _lease(folder, state.raw)
    if lease is None:
        return read_state(folder, replace(state, raw=b""))
    # The manifest names them as the one before did: whoever holds that finds them as well.
    for part in state.manifest.parts:
        if isinstance(part.entries.file, _ListFile):
            part.entries.file.lease = lease
    return replace(state, shards=state.shards.leased(lease), lease=lease)


def _lease(folder: Path, raw: bytes) -> Descriptor | None:
    """A shared lock on the manifest, as long as this is held; None where files can't be locked."""
    try:
        file = Descriptor.of(folder / MANIFEST)
        if share_lock(file.number):
            now = bytearray(len(raw) + 1)
            whole = not file.read_into(memoryview(now), 0) and bytes(now[:-1]) == raw
            # Through links, too: a folder of the Hub's cache is made of them.
            there = os.stat(folder / MANIFEST)
            if whole and os.path.samestat(os.fstat(file.number), there):
                return file
    except FileError as e:
        Damage.of(e)  # raises where this process may open no more files
        raise _OutrunError(f"{folder / MANIFEST} was replaced") from None
    except OSError:
        return None
    raise _OutrunError(f"{folder / MANIFEST} was replaced")


def _not_as_stated(folder: Place, whole: Said) -> set[str]:
    """The files that are not there, or not as long as the manifest says."""
    sizes = {p.file: p.bytes for p in whole.adapters}
    sizes |= {name: shard.bytes for name, shard in whole.shards.items()}
    if isinstance(folder, UrlPath):
        found = folder.sizes()
    else:
        with os.scandir(folder) as files:
            found = {file.name: file.stat().st_size for file in files if file.name in sizes}
    return {name for name, size in sizes.items() if found.get(name) != size}


def _told(path: Place, error: FileError) -> FileError:
    """Of a file that was there when the library was opened: at a URL it is not kept for ever."""
    missing = isinstance(error.__cause__, FileNotFoundError)
    return gone(str(path)) if missing and isinstance(path, UrlPath) else error


@dataclass
class _ListFile:
    """A list of adapters that is read when it is needed.

    Args:
        lease: keeps it there until then; of any manifest that names it. raw: its bytes, once read.
    """

    folder: Place
    info: FileInfo
    lease: Descriptor | None
    raw: bytes | None = None

    @property
    def path(self) -> Place:
        """The file's."""
        return self.folder / self.info.name

    def read(self) -> _ListFile:
        """The same with its bytes.

        Raises:
            FileError: it is missing or damaged.
        """
        return replace(self, raw=checked_list(self.path, self.info))

    def __call__(self) -> bytes:
        """Its bytes."""
        if self.raw is not None:
            return self.raw
        try:
            return checked_list(self.path, self.info)
        except FileError as e:
            told = _told(self.path, e)
            if told is not e:
                raise told from e
            damage = Damage.of(e)
            raise FileError(f"{damage.text}; {remedy(self.path.parent, damage.lost)}") from e


def checked_list(path: Place, info: FileInfo) -> bytes:
    """A list's bytes.

    Raises:
        FileError: they can't be read, or are not those of its name.
    """
    damaged = f"{path} is damaged: it is not what {MANIFEST} says of it"

    def check(size: int) -> None:
        if size != info.nbytes:
            raise FileError(damaged)

    try:
        raw = read_regular(path, check)
    except FileNotFoundError as e:
        raise FileError(f"{path} is missing") from e
    except OSError as e:
        raise FileError(f"{path} can't be read: {e.strerror}") from e
    if not info.fits(raw):
        raise FileError(damaged)
    return raw
