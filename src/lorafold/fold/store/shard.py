"""Shards: immutable safetensors files, open from first to last and read by ranges.

Tensors follow each other without padding, so one may start at an address that its type can't be
read from. Reading therefore always copies; nothing is mapped, as mapped pages count as memory.
Opening checks the size, and the header against its checksum; `Shard.verify` checks all the rest.
"""

from __future__ import annotations

import copy
import hashlib
import os
import struct
import zlib
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import FileError
from ...files.atomic import CREATE_FLAGS, write_all
from ...files.disk.header import DTYPE_NAMES, Entry, header_length, parse_header
from ...files.remote.file import UrlDescriptor
from ...files.remote.place import UrlPath, place_of
from .descriptor import Descriptor
from .shard_writer import CHECKSUMS, ShardInfo, ShardWriter

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

_BLOCK = 1 << 20  # bytes read at a time when verifying


class Shard:
    """An open, immutable shard. Made by `Shard.open` and `Shard.of`.

    The file stays open, so its tensors stay readable after its name is gone.
    """

    def __init__(self, source: Descriptor | UrlDescriptor, info: ShardInfo | None) -> None:
        self.name = source.name
        self.info = info
        self.nbytes = 0
        self._source: Descriptor | UrlDescriptor | None = source
        self._tensors: dict[str, Entry] = {}
        self._checksums: dict[str, int] = {}
        self._read_header()

    @classmethod
    def open(cls, path: str | os.PathLike[str], info: ShardInfo | None = None) -> Shard:
        """Open a shard: size, header and the header's checksum are checked, the tensors not read.

        Args:
            path: the file.
            info: what it must be; None to take any safetensors file.

        Raises:
            FileError: missing, unreadable, not what `info` says, or not valid safetensors.
        """
        place = place_of(path)
        if isinstance(place, UrlPath):
            return cls(UrlDescriptor(place), info)
        return cls(Descriptor.of(place), info)

    @classmethod
    def of(cls, writer: ShardWriter) -> Shard:
        """What a writer wrote, after its `close`.

        Raises:
            FileError: it isn't closed yet, or was dropped.
        """
        if writer.aborted:
            raise FileError(f"shard {writer.name} was dropped")
        if writer.info is None:
            raise FileError(f"shard {writer.name} is still being written")
        return cls(writer.file, writer.info)

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; a read that runs in another thread still ends well."""
        self._source = None

    def twin(self) -> Shard:
        """The same file, closed apart from this."""
        return copy.copy(self)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._source is None

    def moved_to(self, folder: Path) -> None:
        """Say in which folder the file is by now."""
        if self._source is not None:
            self._source.called(str(folder / self.stated.name))
            self.name = self._source.name

    @property
    def stated(self) -> ShardInfo:
        """What a manifest says of it."""
        if self.info is None:
            raise FileError(f"shard {self.name}: no checksums are known for it")
        return self.info

    @property
    def keys(self) -> Collection[str]:
        """The names of its tensors."""
        return self._tensors.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._find(key).shape

    def code(self, key: str) -> str:
        """The dtype of a tensor, as safetensors calls it."""
        return self._find(key).code

    def read(self, key: str) -> NDArray[Any]:
        """A copy of a tensor.

        Raises:
            FileError: no such key, a dtype that numpy doesn't have, or the file can't be read.
        """
        import numpy as np

        entry = self._find(key)
        kind = getattr(np, DTYPE_NAMES[entry.code].replace("bool", "bool_"), None)
        if kind is None:
            raise FileError(f"{self._at(key)}: numpy has no {entry.code}; use read_tensor")
        data = np.frombuffer(bytearray(self.read_bytes(key)), kind)
        return data.reshape(entry.shape)

    def read_tensor(self, key: str) -> torch.Tensor:
        """A copy of a tensor, of any dtype, on the CPU.

        Raises:
            FileError: no such key, the file can't be read, or the tensor is damaged.
        """
        from ...files.safetensors import room

        tensor, view = room(self._find(key))
        self._fill(key, view, self._find(key).start)
        self._check(key, view)
        return tensor

    def copy_tensor(self, key: str, target: ShardWriter, name: str) -> None:
        """Write a tensor to another shard as it is.

        Raises:
            FileError: no such key, the file can't be read, or the tensor is damaged.
        """
        entry = self._find(key)
        target.copy(name, entry.code, entry.shape, self.read_bytes(key))

    def read_bytes(
        self, key: str, start: int = 0, stop: int | None = None, check: bool = True
    ) -> bytes:
        """Bytes [start, stop) of a tensor as stored (little-endian); all by default.

        Only a whole tensor is compared with its checksum, and not where `check` is False.

        Raises:
            FileError: no such key, a range outside of the tensor, or the file can't be read.
        """
        entry = self._find(key)
        size = entry.stop - entry.start
        stop = size if stop is None else stop
        if not 0 <= start <= stop <= size:
            raise FileError(f"{self._at(key)}: [{start}, {stop}) is not within {size} bytes")
        data = bytearray(stop - start)
        self._fill(key, memoryview(data), entry.start + start)
        if check and stop - start == size:
            self._check(key, data)
        return bytes(data)

    def ahead(self, spans: Iterable[tuple[str, int, int]]) -> None:
        """Tell which parts, (key, start, stop), `read_bytes` is asked for next.

        Raises:
            FileError: no such key, or the file can't be read.
        """
        starts = ((self._find(key).start, start, stop) for key, start, stop in spans)
        self._open_source().ahead((at + start, at + stop) for at, start, stop in starts)

    def verify(self) -> None:
        """Read all of the shard and compare with the checksums.

        Raises:
            FileError: they differ, or none are known.
        """
        self._check_all(lambda part: None)

    def copy_to(self, path: str | os.PathLike[str]) -> None:
        """Write the shard, byte for byte, to a new file, and flush it to the disk.

        Raises:
            FileError: it is damaged; what was written then stays.
        """
        descriptor = os.open(path, CREATE_FLAGS, 0o666)
        try:
            self._check_all(lambda part: write_all(descriptor, part))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _check_all(self, use: Callable[[memoryview], None]) -> None:
        """Pass all bytes to `use`, in order, and compare them with the checksums."""
        info, source = self.stated, self._open_source()
        self._check_size(source)
        block = memoryview(bytearray(min(_BLOCK, self.nbytes)))
        for what, begin, end, expected in (
            ("header", 0, self._start, info.header_sha256),
            ("tensors", self._start, self.nbytes, info.data_sha256),
        ):
            digest = hashlib.sha256()
            for at in range(begin, end, len(block)):
                part = block[: end - at]
                if not source.read_into(part, at):
                    raise FileError(f"shard {self.name} was truncated after it was opened")
                digest.update(part)
                use(part)
            if digest.hexdigest() != expected:
                raise FileError(
                    f"shard {self.name} is damaged: its {what} have SHA-256 {digest.hexdigest()}, "
                    f"recorded was {expected}"
                )

    def _at(self, key: str) -> str:
        return f"shard {self.name}, key {key!r}"

    def _find(self, key: str) -> Entry:
        try:
            return self._tensors[key]
        except KeyError:
            raise FileError(f"shard {self.name} holds no tensor {key!r}") from None

    def _check(self, key: str, data: memoryview | bytearray) -> None:
        if zlib.crc32(data) != self._checksums.get(key, zlib.crc32(data)):
            raise FileError(f"{self._at(key)} is damaged: its CRC-32 is not the one recorded")

    def _open_source(self) -> Descriptor | UrlDescriptor:
        source = self._source
        if source is None:
            raise FileError(f"shard {self.name} is closed")
        return source

    def _fill(self, key: str, target: memoryview, begin: int) -> None:
        if not self._open_source().read_into(target, begin):
            raise FileError(f"{self._at(key)}: the file was truncated after it was opened")

    def _check_size(self, source: Descriptor | UrlDescriptor) -> None:
        self.nbytes = source.size()
        if self.info is not None and self.nbytes != self.info.nbytes:
            raise FileError(
                f"shard {self.name} is truncated or was changed: {self.nbytes:,} bytes, "
                f"recorded were {self.info.nbytes:,}"
            )

    def _read_header(self) -> None:
        source = self._open_source()
        self._check_size(source)
        where = f"shard {self.name}"
        start = bytearray(8)
        source.read_into(memoryview(start), 0)
        header = bytearray(header_length(start, self.nbytes, where))
        self._start = 8 + len(header)
        source.read_into(memoryview(header), 8)
        if self.info is not None:
            found = hashlib.sha256(start + header).hexdigest()
            if found != self.info.header_sha256:
                raise FileError(
                    f"{where} is damaged: its header has SHA-256 {found}, "
                    f"recorded was {self.info.header_sha256}"
                )
        self._tensors, metadata = parse_header(header, self.nbytes, where)
        stated = metadata.get(CHECKSUMS)
        if stated is None and self.info is None:
            return  # of any other writer
        try:
            words = struct.unpack(f">{len(self._tensors)}I", bytes.fromhex(stated or ""))
            self._checksums = dict(zip(self._tensors, words, strict=True))
        except (ValueError, struct.error):
            raise FileError(f"{where} does not state a CRC-32 of each tensor") from None
