"""What a store holds at one moment, and what of it is lost.

A `State` never changes; a store goes from one to the next in one assignment, so whoever holds one
reads records and bases that belong together. What can't be opened is no reason to give nothing:
it is kept as `Damage`, beside the files that are whole.
"""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...errors import FileError
from ...files.disk.held import open_regular
from .manifest import MANIFEST, Manifest, parse_manifest, read_manifest
from .part import FileInfo
from .shard import Shard
from .shard_writer import ShardInfo

_RETRIES = 10  # manifests replaced while a reader was opening shards; each needs one more writer
_OWN_LIMITS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # of this process: no fault of a file


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


@dataclass(frozen=True)
class State:
    """A manifest, and the shards that it names.

    Args:
        raw: the manifest as written. manifest: what it says.
        shards: name → those that are open. missing: name → what is stated of the others.
        damage: file name → what is wrong, of shards and of lists of adapters.
    """

    raw: bytes = b""
    manifest: Manifest = field(default_factory=Manifest)
    shards: Mapping[str, Shard] = field(default_factory=dict)
    missing: Mapping[str, ShardInfo] = field(default_factory=dict)
    damage: Mapping[str, Damage] = field(default_factory=dict)

    @property
    def files(self) -> set[str]:
        """Names of the files that the manifest names, lost or not."""
        parts = {part.file.name for part in self.manifest.parts if part.file is not None}
        return {*self.shards, *self.missing, *parts}

    def shard(self, name: str, folder: Path | None) -> Shard:
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
        return replace(self, shards={name: shard.twin() for name, shard in self.shards.items()})

    def verified(self, folder: Path | None) -> State:
        """The same with all damage that is found by reading every shard.

        Args:
            folder: where the shards should have their names, unless a writer has moved on.
        """
        found = dict(self.damage)
        for name in self.shards if _is_current(self.raw, folder) else ():
            path = Path(folder or "", name)
            if not os.path.exists(path):
                text = f"shard {path} is missing; who has it open still can save the library anew"
                found[name] = Damage(text, True)
        for name, shard in self.shards.items():
            try:
                shard.verify()
            except FileError as e:
                found[name] = Damage.of(e)
        return replace(self, damage=found)

    def problems(self) -> str:
        """What is damaged, in a line: the first, and how many more."""
        first, *rest = [damage.text for damage in self.damage.values()]
        return f"{first} (and {len(rest)} more files)" if rest else first


def _is_current(raw: bytes, folder: Path | None) -> bool:
    """Whether a folder still has the manifest."""
    try:
        return folder is not None and read_manifest(folder) == raw
    except FileError:
        return False


def remedy(folder: Path | None, lost: bool = True) -> str:
    """What to do about damage."""
    if not lost:
        return "it may be whole: make it readable, and open the library again"
    return (
        "put the file back from a copy of the library, or see what else is left by "
        f"`lorafold repair {shlex.quote(str(folder))}` (lorafold.fold.repair)"
    )


def read_state(folder: Path, before: State) -> State:
    """What the disk says now; shards that are open already stay open.

    Raises:
        FileError: no library there, or a manifest that can't be read or used.
    """
    raw = read_manifest(folder)
    for _ in range(_RETRIES):
        if before.raw and raw == before.raw and not before.damage:
            return before
        try:
            found = _state_of(folder, raw, before)
            if not found.damage:
                return found
        except FileError:
            found = None
            again = read_manifest(folder)
            if again == raw:
                raise
        # Either the library is damaged, or a writer removed a file after we read which there are;
        # then the manifest has changed, too.
        again = read_manifest(folder)
        if again == raw and found is not None:
            return found
        raw = again
    raise FileError(f"{folder} changes faster than it can be opened; try again")


def _state_of(folder: Path, raw: bytes, before: State) -> State:
    damage: dict[str, Damage] = {}

    def list_of(info: FileInfo) -> bytes | None:
        path = folder / info.name
        try:
            return _checked_list(path, info)
        except FileError as e:
            damage[info.name] = Damage.of(e)
            return None

    where = str(folder / MANIFEST)
    manifest, infos = parse_manifest(raw, where, list_of, before.manifest.parts)
    shards, missing = {}, {}
    for name, info in infos.items():
        known = before.shards.get(name)
        try:
            if known is None or known.closed or known.info != info:
                known = Shard.open(folder / name, info)
            shards[name] = known
        except FileError as e:
            damage[name], missing[name] = Damage.of(e), info
    return State(raw, manifest, shards, missing, damage)


def _checked_list(path: Path, info: FileInfo) -> bytes:
    try:
        with open(open_regular(path), "rb") as file:
            fits = os.fstat(file.fileno()).st_size == info.nbytes
            raw = file.read() if fits else b""
    except FileNotFoundError as e:
        raise FileError(f"{path} is missing") from e
    except OSError as e:
        raise FileError(f"{path} can't be read: {e.strerror}") from e
    if not fits or not info.fits(raw):
        raise FileError(f"{path} is damaged: it is not what {MANIFEST} says of it")
    return raw
