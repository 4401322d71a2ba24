"""A library's disk: immutable shards and one manifest, replaced last.

    library.json             the manifest: what the library says, its shards and lists of adapters
    .library.json.gz         a second copy of it, for repairs
    .library.<hex>.json      one that was replaced, and that a reader may have open
    shard-<hex>.safetensors  named by what is in it; size and checksums in the manifest
    adapters-<hex>.json      adapters whose names' hashes begin alike; likewise
    .lock, .lock.<n>.wait    locked by whoever changes the library, or waits for it; empty
    .retired.json            at a URL: since when files are needed no more

A change writes new files beside the old ones, flushes them, and replaces the manifest: that one
rename is the change. Files it no longer names are removed after it; a killed writer leaves the old
state or the new one, and files that no manifest names, which the next writer removes.

Nothing that a writer does reaches a reader. One of a library of few files opens all of them at
once. One of many holds a shared lock on the manifest that it read; a writer keeps
that under another name, and the files that it names, until it finds nobody's lock on it.

At a URL there is no rename, no lock and no open file: the change is one put of the manifest, on the
condition that it still is what the change began with, where the store knows conditions
(`remote.exchange`), and files that it no longer names are kept for a day (`remote.retention`).
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import FileError
from ...files.atomic import new_directory, replace_file, sync_directory, try_lock
from ...files.disk.held import read_regular
from ...files.remote.exchange import replace_if
from ...files.remote.place import Place, UrlPath, is_file, is_url, new_place, place_of
from ...files.remote.retention import NOTES, retire
from ...files.replacing import Kind, check_apart, check_no_link, check_replaceable
from .manifest import (
    COPY,
    FORMAT,
    MANIFEST,
    Manifest,
    compressed,
    named_files,
    read_manifest,
    write_copy,
)
from .part import PART_NAME, Part
from .shard import Shard
from .shard_writer import SHARD_NAME, ShardInfo, ShardWriter
from .state import Shards, State, leased, many, read_state
from .turns import LOCK, TICKET, TIMEOUT, turn

_REPLACED = re.compile(r"\.library\.[0-9a-f]{16}\.json")
_KEPT_NAMES = re.compile("|".join(map(re.escape, (MANIFEST, COPY, LOCK, NOTES))))
_LEFT_BY_WRITERS = re.compile(
    rf"{SHARD_NAME.pattern}|{PART_NAME.pattern}|{_REPLACED.pattern}"
    rf"|\.({re.escape(MANIFEST)}|{re.escape(COPY)}|{PART_NAME.pattern}|shard)\.[0-9a-f]{{16}}\.tmp"
)


def _is_known(path: Place) -> bool:
    """Whether a library is or was at `path`, in whatever state and of whatever version."""
    try:
        names = _names(path)
        return any(map(SHARD_NAME.fullmatch, names)) or FORMAT.encode() in read_manifest(path)
    except (FileError, OSError):
        return False


LIBRARY = Kind(
    "a library",
    _is_known,
    re.compile("|".join((_KEPT_NAMES.pattern, TICKET.pattern, _LEFT_BY_WRITERS.pattern))),
)


class Store:
    """Open shards and the manifest that names them, on disk or in memory.

    Open one by `Store.open`, make one by `Store.create`, change it by `transaction`. What is read
    stays as it was when opened, or when a transaction of this very object last began or ended.

    Attributes:
        path: the folder; None in memory.
        timeout: seconds that a change waits for its turn.
        state: what it holds. Replaced at once, and never changed, by a transaction: what was taken
            from it before stays readable.
        replaced: manifests that were replaced, and that a reader has → the files they name.
        tidied: when the folder had last changed when it was last tidied; None before.

    Examples:
        >>> import numpy as np
        >>> from lorafold.fold.store.entries import ModuleEntry, Piece
        >>> with Store.create(None) as t:
        ...     with t.new_shard(header_capacity=256) as shard:
        ...         shard.add("core", np.ones(3, np.float32))
        ...     piece = Piece(shard.info.name, "core", 3)
        ...     module = ModuleEntry("q_proj", (4, 8), "svd", {"U0": (piece,)})
        ...     store = t.commit(Manifest(modules=(module,)))
        >>> store.shards[piece.shard].read("core")
        array([1., 1., 1.], dtype=float32)
    """

    def __init__(self, path: Place | None, timeout: float = TIMEOUT) -> None:
        self.path = path
        self.timeout = timeout
        self.state = State()
        self._alone = threading.Lock()  # what the lock file is to a store on disk
        self.replaced: dict[str, frozenset[str]] = {}
        self.tidied: int | None = None

    @property
    def manifest(self) -> Manifest:
        """What the library says."""
        return self.state.manifest

    @property
    def shards(self) -> Mapping[str, Shard]:
        """Name → `Shard`, in the manifest's order, without those that are lost."""
        return self.state.shards

    @classmethod
    def open(cls, path: str | os.PathLike[str], timeout: float = TIMEOUT) -> Store:
        """Open a library's folder; see `state.py` for which files that opens.

        Shards and lists that are missing or cut are left out, and named in `state.damage`; of few
        files also those that are damaged.

        Args:
            path: the folder. timeout: seconds that a change waits for its turn.

        Raises:
            FileError: no library there, a newer one than this version reads, or a damaged manifest.
        """
        if not os.fspath(path):  # which would be the working directory
            raise FileError("no such folder: ''")
        store = cls(_folder(path), timeout)
        store._load()
        return store

    @staticmethod
    def create(
        path: str | os.PathLike[str] | None, *, overwrite: bool = False, timeout: float = TIMEOUT
    ) -> Transaction:
        """A transaction whose `commit` makes a new store; nothing is at `path` before it.

        Args:
            path: the folder; None to keep everything in memory.
            overwrite: replace the library at `path`, as any transaction would change it: other
                files in its folder stay.
            timeout: seconds to wait for another writer of a library to be replaced.

        Raises:
            FileError: when entered: something is at `path` and `overwrite` is False, or another
                process is changing it.
        """
        place = None if path is None else _new_place(path)
        return Transaction(Store(place, timeout), "overwrite" if overwrite else "create", timeout)

    def transaction(self, timeout: float | None = None) -> Transaction:
        """A change of this store, alone among all processes, in their order of asking.

        Args:
            timeout: seconds to wait for the turn; None is the store's.

        Raises:
            FileError: when entered: another process is changing the library, or it is gone.
        """
        return Transaction(self, "change", self.timeout if timeout is None else timeout)

    def save(
        self, path: str | os.PathLike[str], *, overwrite: bool = False, timeout: float | None = None
    ) -> Store:
        """Write this store to a folder, shard by shard as it is.

        Args:
            path: the folder.
            overwrite: replace the library that is there; other files in its folder stay.
            timeout: seconds to wait for other writers of a library to be replaced; None is the
                store's.

        Returns:
            The store opened from the folder; this one stays what it is.

        Raises:
            FileError: something is at `path` and `overwrite` is False, another process is changing
                it, or this store is damaged.
        """
        state = self.state
        if state.damage:
            raise FileError(f"a damaged library is not copied: {state.problems()}")
        timeout = self.timeout if timeout is None else timeout
        check_apart(path, [self.path])
        with Store.create(path, overwrite=overwrite, timeout=timeout) as t:
            t.commit(t.copied(state))
        return Store.open(path, timeout)

    def as_it_is(self) -> Store:
        """The same for reading and changing; what either does to itself does not reach the other.

        Raises:
            FileError: it was closed.
        """
        if self.closed:
            raise FileError(f"the library {self.path or 'in memory'} is closed: open it again")
        twin = Store(self.path, self.timeout)
        twin.state = self.state.twin()
        return twin

    @property
    def closed(self) -> bool:
        """Whether it was closed; one without shards never is."""
        return self.state.shards.closed

    def verify(self) -> None:
        """Read all shards and compare with the checksums in the manifest.

        Raises:
            FileError: naming the first damaged file.
        """
        found = self.state.verified(self.path)
        if found.damage:
            raise FileError(found.problems())

    @property
    def nbytes(self) -> int:
        """Bytes of all files, on disk or as they would be, without those that are lost."""
        state = self.state
        parts = sum(p.file.nbytes for p in state.manifest.parts if p.file and not p.lost)
        manifest = len(state.raw) + len(compressed(state.raw)) if state.raw else 0
        return manifest + parts + sum(info.nbytes for info in state.shards.infos.values())

    def close(self) -> None:
        """Let go of all shards."""
        self.state.shards.close()
        self.state = replace(self.state, raw=b"")  # so that a transaction opens them again

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load(self) -> None:
        """Make this store what the disk says now; shards open already stay open."""
        assert self.path is not None
        self.state = read_state(self.path, self.state)

    def _become(self, state: State) -> None:
        self.state = state

    def named_by(self, raw: bytes) -> frozenset[str]:
        """The files that a manifest of this folder names.

        Raises:
            FileError: it is none.
        """
        state = self.state
        return state.files if raw == state.raw else named_files(raw, f"{self.path}/{MANIFEST}")


class Transaction:
    """A change being made to a store, or a new store; made by `Store`, used in a `with` block.

    Leaving the block without `commit` leaves everything as it was.

    Attributes:
        manifest: as it stands on the disk under the writer's lock; an empty one for a new store.
        shards: the shards it names, without those that are lost.
        state: both, and what is damaged.
    """

    def __init__(self, store: Store, kind: str, timeout: float) -> None:
        self.state = State()
        self._store = store
        self._kind = kind
        self._timeout = timeout
        self._place = contextlib.ExitStack()  # what holds the lock and cleans up
        self._folder: Place | None = None
        self._scratch: Path | None = None  # where shards are written before they have their names
        self._before: bytes | None = None  # at a URL: the manifest that this one's replaces
        self._in_place = False  # whether the folder has its final name
        self._writers: list[ShardWriter] = []
        self._named: list[ShardWriter] = []  # those with their names for good
        self._state = "new"

    @property
    def manifest(self) -> Manifest:
        return self.state.manifest

    @property
    def shards(self) -> Mapping[str, Shard]:
        return self.state.shards

    def __enter__(self) -> Transaction:
        if self._state != "new":
            raise FileError("a transaction can be entered once only")
        self._state = "open"
        try:
            self._begin()
        except BaseException as e:
            self.__exit__(type(e), e, None)
            raise
        return self

    def _begin(self) -> None:
        store, place = self._store, self._place
        if store.path is None:
            place.enter_context(_held(store._alone, self._timeout))
        elif isinstance(store.path, UrlPath):
            self._begin_at(store.path)
        elif self._kind == "change" or (self._kind == "overwrite" and _is_library(store.path)):
            place.enter_context(turn(store.path, self._timeout))
            place.enter_context(_without_leftovers(store))
            self._folder, self._scratch, self._in_place = store.path, store.path, True
        else:
            folder = new_directory(store.path, LIBRARY, overwrite=self._kind == "overwrite")
            self._folder = self._scratch = place.enter_context(folder)
        if self._kind == "change":
            if store.path is not None:
                store._load()  # another writer may have come between
            self.state, self._before = store.state, store.state.raw

    def _begin_at(self, url: UrlPath) -> None:
        """At a URL, where nobody is kept out: who comes between is found at the end."""
        if self._kind != "change":
            self._before = _replaceable(url, self._kind == "overwrite")
        self._place.callback(lambda: _remove_leftovers(self._store, self._before))
        scratch = self._place.enter_context(tempfile.TemporaryDirectory(prefix="lorafold-"))
        self._folder, self._scratch, self._in_place = url, Path(scratch), True

    def __exit__(self, kind: object, error: BaseException | None, trace: Any) -> None:
        if self._state == "committed":
            self._place.close()  # does nothing, unless `commit` was interrupted
            return
        self._state = "left"
        for writer in self._writers:
            # Not those that `commit` named: where it failed after it had replaced the manifest,
            # that names them. The place removes them where it doesn't.
            if writer not in self._named:
                with contextlib.suppress(OSError):
                    writer.abort()
        # An exception is what tells the place that nothing is to be kept.
        leaving = error or _LeftWithoutCommitError()
        self._place.__exit__(type(leaving), leaving, trace)
        if isinstance(error, OSError):
            where = self._store.path or "the library in memory"
            about = f" ({os.fsdecode(error.filename)})" if error.filename else ""
            reason = f"{error.strerror or error}{about}"
            raise FileError(f"{where} can't be changed: {reason}") from error

    def new_shard(self, *, header_capacity: int) -> ShardWriter:
        """A writer of a shard that `commit` will take in, if its manifest uses it.

        It has its name, which is what to refer to it by, once it is closed.

        Args:
            header_capacity: as in `ShardWriter`.
        """
        self._check_open()
        writer = ShardWriter(self._unnamed(), header_capacity=header_capacity)
        self._writers.append(writer)
        return writer

    def _unnamed(self) -> Path | None:
        """Where a shard is written before it has its name; None in memory."""
        scratch = self._scratch
        return None if scratch is None else scratch / f".shard.{secrets.token_hex(8)}.tmp"

    def copied(self, state: State) -> Manifest:
        """Write the shards of another store, for `commit` to take in.

        Returns:
            Its manifest, whose lists of adapters are still to be written.
        """
        self._check_open()
        if self._folder is not None:
            for name, shard in state.shards.items():
                unnamed = self._unnamed()
                assert unnamed is not None
                shard.copy_to(unnamed)
                if isinstance(self._folder, UrlPath):
                    (self._folder / name).upload(unnamed)
                    os.unlink(unnamed)
                else:
                    os.replace(unnamed, self._folder / name)
        self.state = State(shards=Shards(state.shards.infos, self._folder))
        parts = tuple(replace(part, file=None) for part in state.manifest.parts)
        return replace(state.manifest, parts=parts)

    def verified(self) -> State:
        """The state with all damage that is found by reading every file."""
        self.state = self.state.verified(self._folder)
        return self.state

    def commit(self, manifest: Manifest) -> Store:
        """Make the change: all or nothing. Ends the transaction.

        Args:
            manifest: what the library says. The shards that it uses are kept, of those that are
                there and of the new ones, which are closed.

        Returns:
            The store, which is the one that the transaction was made from, as it is now.

        Raises:
            FileError: the manifest is not JSON, it uses an unknown shard, or a shard could not
                be written; nothing has changed then.
        """
        self._check_open()
        shards, missing = self._shards_of(manifest)
        manifest = _written(manifest, self._folder)
        raw = manifest.to_bytes({**missing, **shards.infos})
        damage = self.state.damage
        if damage:
            lists = {part.file.name for part in manifest.parts if part.file is not None}
            damage = {n: d for n, d in damage.items() if n in lists or n in missing}
        state = State(raw, manifest, shards, missing, damage)
        if self._folder is not None:
            self._check_undisturbed()
            _replace_manifest(self._store, self._folder, raw, self._before, self._in_place)
            if not self._in_place:  # else before anything goes that the old one needs
                write_copy(self._folder, raw)
        if self._in_place or self._folder is None:
            self._end(self._leased(state))
            self._place.close()
        else:
            self._place.close()  # gives the folder its name
            assert isinstance(self._store.path, Path)
            state = replace(state, shards=shards.moved_to(self._store.path))
            self._end(self._leased(state))
        return self._store

    def _leased(self, state: State) -> State:
        """The state as a reader has it, if it has many files."""
        path = self._store.path
        files = len(state.shards) + len(state.missing) + len(state.manifest.parts)
        if path is None or isinstance(path, UrlPath) or not many(files):
            return state
        return leased(path, state)

    def _shards_of(self, manifest: Manifest) -> tuple[Shards, dict[str, ShardInfo]]:
        """What a manifest uses, the old ones first; new ones get their names, others go.

        Returns:
            Those that are there, and those that are lost: they are named on as long as they are
            used, for they may be put back.
        """
        used, there = manifest.used, self.state.shards
        fresh: dict[str, ShardWriter] = {}
        for writer in self._writers:
            if not writer.aborted:
                name = writer.close().name
                if name in used and name not in fresh:
                    fresh[name] = writer
                else:
                    writer.abort()
        missing = {n: i for n, i in self.state.missing.items() if n in used and n not in fresh}
        unknown = sorted(used - there.keys() - fresh.keys() - missing.keys())
        if unknown:
            raise FileError(f"there is no shard {unknown[0]}; there are {len(there)}")
        # One that was there already and is written again takes the other's place: it is whole.
        infos = {n: info for n, info in there.infos.items() if n in used and n not in fresh}
        files = len(infos) + len(fresh) + len(missing) + len(manifest.parts)
        opened = there.opened if many(files) else {n: there[n] for n in infos}
        opened = {n: shard for n, shard in opened.items() if n in infos}
        for name, writer in fresh.items():
            if self._folder is not None:
                self._named.append(writer)
            # Opened before the manifest names them: what can't be opened is not committed.
            opened[name] = _placed(writer, self._folder)
            infos[name] = opened[name].stated
        return Shards(infos, self._folder, opened, self.state.lease), missing

    def _end(self, state: State) -> None:
        self._state = "committed"
        # Shards that are dropped here close when nobody holds them any more. Closing them now would
        # break a reader in another thread.
        self._store._become(state)

    def _check_undisturbed(self) -> None:
        """On some network file systems a lock keeps out this machine's processes only."""
        store = self._store
        if isinstance(store.path, UrlPath):
            return  # which the put of the manifest finds
        if self._kind == "change" and store.path and read_manifest(store.path) != store.state.raw:
            raise FileError(f"{store.path} was changed by another process in spite of the lock")

    def _check_open(self) -> None:
        if self._state != "open":
            raise FileError(
                "the transaction is not open: use it in a `with` block, and commit once, at its end"
            )


def _written(manifest: Manifest, folder: Place | None) -> Manifest:
    """The manifest with all of its lists of adapters written."""

    def written(part: Part) -> Part:
        raw = part.entries.to_bytes()
        name, found = part.written(raw)
        if folder is not None:
            replace_file(folder / name, raw)
        return found

    parts = (written(part) if part.file is None else part for part in manifest.parts)
    return replace(manifest, parts=tuple(parts))


def _placed(writer: ShardWriter, folder: Place | None) -> Shard:
    """A closed shard with the name that it has for good, opened."""
    if isinstance(folder, UrlPath):
        assert writer.path is not None
        assert writer.info is not None
        (folder / writer.info.name).upload(writer.path)
        return Shard.open(folder / writer.info.name, writer.info)
    if folder is not None:
        writer.rename(folder)
    return Shard.of(writer)


def _replace_manifest(
    store: Store, folder: Place, raw: bytes, before: bytes | None, in_place: bool
) -> None:
    """What makes a change: the manifest is another one; at a URL only if it was `before`."""
    if isinstance(folder, UrlPath):
        replace_if(folder / MANIFEST, raw, before)
        return
    sync_directory(folder)  # the files' names are safe before the manifest has them
    if in_place:
        _keep_for_readers(store, folder)
    replace_file(folder / MANIFEST, raw)


class _LeftWithoutCommitError(Exception):
    """Tells the place of a transaction that nothing is to be kept."""


def _folder(path: str | os.PathLike[str]) -> Place:
    """The folder itself, where a link leads to it: it stays the one, wherever that leads later."""
    if is_url(path):
        return place_of(path)
    found = Path(os.path.abspath(path))
    return Path(os.path.realpath(found)) if os.path.islink(found) else found


def _new_place(path: str | os.PathLike[str]) -> Place:
    """Where a library is written as a whole."""
    if is_url(path):
        return new_place(path)
    check_no_link(path)
    return Path(os.path.abspath(path))


def _replaceable(url: UrlPath, overwrite: bool) -> bytes | None:
    """The manifest at a URL where a library is to be written; None where none is.

    Raises:
        FileError: something is there that may not be replaced.
    """
    check_replaceable(url, LIBRARY, overwrite, url)
    return read_manifest(url) if is_file(url / MANIFEST) else None


def _names(folder: Place) -> list[str]:
    """Names of the files in a folder."""
    return folder.names() if isinstance(folder, UrlPath) else os.listdir(folder)


def _is_library(path: Place) -> bool:
    """Whether a library of this version is at `path`, whatever the state of its shards."""
    try:
        named_files(read_manifest(path), str(path / MANIFEST))
    except FileError:
        return False
    return True


@contextlib.contextmanager
def _held(lock: threading.Lock, timeout: float) -> Iterator[None]:
    if not lock.acquire(timeout=max(timeout, 0)):
        raise FileError(f"the store is being changed by another transaction; waited {timeout:g} s")
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _without_leftovers(store: Store) -> Iterator[None]:
    """Remove what no manifest names, of killed writers before the block and of this one after."""
    assert isinstance(store.path, Path)
    if store.tidied is None or store.tidied != _changed_at(store.path):
        _remove_leftovers(store)
    try:
        yield
    finally:
        _remove_leftovers(store)


def _remove_leftovers(store: Store, before: bytes | None = None) -> None:
    """Remove what no manifest names; at a URL what `before`, a manifest, did not name for long."""
    folder = store.path
    assert folder is not None
    try:
        # What counts is the disk: a failed commit may have replaced the manifest or not.
        raw = read_manifest(folder)
        named = store.named_by(raw)
        write_copy(folder, raw)  # before what it names goes
        unneeded = set(filter(_LEFT_BY_WRITERS.fullmatch, set(_names(folder)) - named))
        if not isinstance(folder, UrlPath):
            read = _still_read(store, folder, filter(_REPLACED.fullmatch, unneeded))
            unneeded.difference_update(read, *read.values())
    except (FileError, OSError):
        return
    # The change is made; what can't be removed the next writer tries again.
    if isinstance(folder, UrlPath):
        with contextlib.suppress(OSError, FileError):
            needed = named_files(before, str(folder / MANIFEST)) if before else set()
            retire(folder, sorted(unneeded), COPY, needed)
        return
    for name in sorted(unneeded):
        with contextlib.suppress(OSError):
            os.unlink(folder / name)
    store.tidied = _changed_at(folder)


def _changed_at(folder: Path) -> int | None:
    with contextlib.suppress(OSError):
        return os.stat(folder).st_mtime_ns
    return None


def _keep_for_readers(store: Store, folder: Path) -> None:
    """Give a manifest that is to be replaced a second name, where readers may have a lock on it."""
    try:
        files = store.named_by(read_manifest(folder))
    except FileError:
        return
    if many(len(files)):
        name = f".library.{secrets.token_hex(8)}.json"
        os.link(folder / MANIFEST, folder / name)
        store.replaced[name] = files


def _still_read(
    store: Store, folder: Path, replaced: Iterable[str]
) -> Mapping[str, frozenset[str]]:
    """Manifests that were replaced, but that a reader has a lock on; and the files they name."""
    known, store.replaced = store.replaced, {}
    for name in replaced:
        path = folder / name
        try:
            if os.path.samefile(path, folder / MANIFEST):
                continue  # of a writer that was killed before it could replace it
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            if not try_lock(descriptor):
                # By the name that it had: its bytes have been read as that.
                where = str(folder / MANIFEST)
                store.replaced[name] = known.get(name) or named_files(read_regular(path), where)
        finally:
            os.close(descriptor)
    return store.replaced
