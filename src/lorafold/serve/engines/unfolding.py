"""Adapters of a library as folders that other engines read, written when they are asked for.

A folder is named by what is in it (the digest of the adapter that was unfolded, not the original's
that the library keeps: after a `refold` that one stays, and the numbers do not), by c, the rank,
the dtype and the base. So one that is there is right for ever, and nothing in a name that was asked
for ever is a path. All of them have one rank and scale 1, the form that all readers agree on.

An engine reads a folder again when it pleases, so none goes while one may need it: a process that
uses them holds a shared lock, and those longest unused go when one begins that is alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path

import torch

from ...adapter import Adapter
from ...errors import FileError, MismatchError
from ...files.atomic import HAS_LOCKS, new_directory, share_lock, try_lock
from ...files.config import CONFIG_NAME, WEIGHTS_NAME
from ...files.remote.place import is_url
from ...files.save import ADAPTER, peft_form, write_form
from ...fold.library import Library
from ...fold.store.manifest import MANIFEST
from ...prefixes import regauged
from ...words import one_line
from ..naming import Named, parsed
from .settings import BYTES, FOLDER, VARIANTS, Settings

_PLACES = 2  # of c and of weights: each other number is an adapter of its own to the engine
_FOLDER = re.compile(r"lora-[0-9a-f]{32}")
_LOCK = ".lock"
_FRESH = 60.0  # seconds that a library at a URL is taken for what it was
_PATIENCE = 30.0  # seconds for another process to clear the folder


class Unfolded:
    """The adapters of one library as folders; for one thread.

    Args:
        settings: where from and where to, and limits.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._dtype: torch.dtype = getattr(torch, settings.dtype)
        self._library: Library | None = None
        self._seen: object = None
        self._digests: dict[str, str] = {}
        self._variants: dict[str, set[str]] = {}
        self._lock: int | None = None

    def folder(self, text: str, base: str) -> Path:
        """The folder of what a name asks for, written if it isn't there.

        Args:
            text: a name in the library, or what `naming` makes of one. base: what the engine calls
                its base; said in the folder's config.

        Raises:
            UnknownNameError: no such adapter; nothing is written then.
            LorafoldError: one that can't be read, scaled, cut or written, or a limit.
        """
        library = self._opened()
        named = _rounded(parsed(text, library))
        counted = self._counted(text, named)
        read = _Reader(library)
        target = self.settings.folder / self._name(named, base, read)
        self._begin()
        if _is_whole(target):
            with suppress(OSError):
                os.utime(target)  # by which it is known how long it was not used
        else:
            _discard(target)
            self._write(_made(named, read), target, base)
        for variants in counted:
            variants.add(text)
        return target

    def close(self) -> None:
        """Let go of the library, and of the folders: another process may remove them."""
        if self._library is not None:
            self._library.close()
        if self._lock is not None:
            os.close(self._lock)
        self._library = self._lock = None

    def _opened(self) -> Library:
        """The library as it is now."""
        seen = self._mark()
        if self._library is None or seen != self._seen:
            opened = Library.open(self.settings.library)
            if self._library is not None:
                self._library.close()
            self._library, self._seen, self._digests = opened, seen, {}
        return self._library

    def _mark(self) -> object:
        """What changes when the library does."""
        if is_url(self.settings.library):
            return time.monotonic() // _FRESH
        with suppress(OSError):  # what opening it says then is better
            found = os.stat(Path(self.settings.library) / MANIFEST)
            return found.st_ino, found.st_size, found.st_mtime_ns
        return None

    def _counted(self, text: str, named: Named) -> list[set[str]]:
        """Where the name is to be counted once it is there.

        Raises:
            MismatchError: an adapter has as many variants as it may.
        """
        if named.plain:
            return []
        most = self.settings.variants
        found = [self._variants.setdefault(name, set()) for name, _ in named.mix]
        for (name, _), variants in zip(named.mix, found, strict=True):
            if text not in variants and len(variants) >= most:
                raise MismatchError(
                    f"{one_line(name)} has {most} variants, each an adapter of its own here: "
                    f"{VARIANTS}={2 * most or 1} allows more"
                )
        return found

    def _name(self, named: Named, base: str, read: Callable[[str], Adapter]) -> str:
        for name, _ in named.mix:
            if name not in self._digests:
                self._digests[name] = read(name).digest
        mix = [(self._digests[name], weight) for name, weight in named.mix]
        key = json.dumps([mix, named.c, named.rank, self.settings.dtype, base])
        return f"lora-{hashlib.sha256(key.encode()).hexdigest()[:32]}"

    def _begin(self) -> None:
        """Before the first folder: have a place for them, and room, if nobody else uses it."""
        if self._lock is not None:
            return
        folder = self.settings.folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            why = f"{folder} can't be written: {e.strerror}; {FOLDER} names another folder"
            raise FileError(why) from e
        try:
            if HAS_LOCKS and try_lock(lock):
                _clear(folder, self.settings.nbytes // 2)
            deadline = time.monotonic() + _PATIENCE
            while not share_lock(lock) and time.monotonic() < deadline:
                time.sleep(0.02)
        except OSError:  # no locks on this file system: nobody knows who is alone, nothing goes
            pass
        except BaseException:
            os.close(lock)
            raise
        self._lock = lock

    def _write(self, adapter: Adapter, target: Path, base: str) -> None:
        if adapter.refusal is None:
            adapter = replace(adapter, config=regauged(adapter.config))
        pad = adapter.refusal is None
        tensors, config = peft_form(adapter, pad=pad, dtype=self._dtype, base_model=base)
        nbytes = sum(t.nbytes for t in tensors.values())
        taken = sum(kept.nbytes for kept in _kept(self.settings.folder))
        if taken + nbytes > self.settings.nbytes:
            raise FileError(
                f"{self.settings.folder} has {taken:,} bytes, and {nbytes:,} more are above the "
                f"limit of {self.settings.nbytes:,}: {BYTES} sets another; the longest unused go "
                "when the engine starts again"
            )
        try:
            with new_directory(target, ADAPTER) as staging:
                write_form(staging, tensors, config)
        except FileError:
            if not _is_whole(target):  # otherwise another process was first, with the same
                raise


class _Reader:
    """Gives adapters by name, each read once."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._read: dict[str, Adapter] = {}

    def __call__(self, name: str) -> Adapter:
        if name not in self._read:
            self._read[name] = self._library[name]
        return self._read[name]


def _rounded(named: Named) -> Named:
    mix = tuple((name, round(weight, _PLACES) + 0.0) for name, weight in named.mix)
    return Named(mix, round(named.c, _PLACES) + 0.0, named.rank)  # + 0.0: no −0


def _made(named: Named, read: Callable[[str], Adapter]) -> Adapter:
    """The adapter that a name asks for."""
    if named.plain:
        return read(named.mix[0][0])
    parts = []
    for name, weight in named.mix:
        part = read(name)
        if named.rank is not None:
            part = part.resize(rank=named.rank)
        parts.append(named.c * weight * part)
    return reduce(add, parts)


def _is_whole(folder: Path) -> bool:
    return (folder / CONFIG_NAME).is_file() and (folder / WEIGHTS_NAME).is_file()


@dataclass(frozen=True)
class _Kept:
    """A folder that lies there; when it was last used."""

    path: Path
    nbytes: int
    used: float


def _kept(folder: Path) -> list[_Kept]:
    """What was unfolded, the longest unused first; nothing else that lies there."""
    found = []
    for path in folder.iterdir():
        if _FOLDER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            with suppress(FileNotFoundError):
                nbytes = sum(file.stat().st_size for file in path.iterdir())
                found.append(_Kept(path, nbytes, path.stat().st_mtime))
    return sorted(found, key=lambda kept: (kept.used, kept.path.name))


def _clear(folder: Path, most: int) -> None:
    """Remove those longest unused until no more than `most` bytes are there."""
    kept = _kept(folder)
    taken = sum(k.nbytes for k in kept)
    for old in kept:
        if taken <= most:
            return
        _discard(old.path)
        taken -= old.nbytes


def _discard(folder: Path) -> None:
    """Remove one, so that a kill on the way leaves nothing under its name."""
    hidden = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    with suppress(FileNotFoundError):
        os.rename(folder, hidden)
        shutil.rmtree(hidden, ignore_errors=True)
