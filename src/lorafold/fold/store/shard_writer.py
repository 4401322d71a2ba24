"""Writing a shard: a safetensors file as a stream, its tensors' sizes not known beforehand.

The JSON comes first in the file though what is in it is known last. A region of estimated size is
therefore kept free for it and filled at the end, with trailing spaces. Two SHA-256 taken on the way
cover every byte: one the length and the JSON, the other the tensors. From them comes the name, so
what a shard holds can't change without its name. A CRC-32 of each tensor stands in the JSON.
"""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import FileError
from ...files.atomic import write_all
from ...files.disk.header import MAX_HEADER, header_of, stored
from .descriptor import Descriptor

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

BLOCK = 1 << 20  # bytes gathered into one write
CHECKSUMS = "crc32"  # in the header's metadata: one after the other, 8 hexadecimal digits each
SHARD_NAME = re.compile(r"shard-[0-9a-f]{16}\.safetensors")


def sealed(record: bytes) -> bytes:
    """A record as it is stored: its CRC-32 comes after it."""
    return record + zlib.crc32(record).to_bytes(4, "little")


def unsealed(stored: bytes) -> bytes | None:
    """The inverse of `sealed`; None where the record is not the one that was sealed."""
    record, checksum = stored[:-4], stored[-4:]
    return record if zlib.crc32(record).to_bytes(4, "little") == checksum else None


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """What a manifest says about a shard.

    Args:
        nbytes: size of the file.
        header_sha256: of the length and the JSON, up to the first tensor; hexadecimal.
        data_sha256: of the rest.
    """

    nbytes: int
    header_sha256: str
    data_sha256: str

    @property
    def name(self) -> str:
        """The file's name, which says what is in it."""
        both = f"{self.header_sha256}{self.data_sha256}"
        return f"shard-{hashlib.sha256(both.encode()).hexdigest()[:16]}.safetensors"


class ShardWriter:
    """Writes one shard, tensor after tensor, without holding more than a block of it in memory.

    As a context manager it closes the shard at the end of the block, or drops it on an exception.
    Put byte streams after the tensors: an odd number of bytes puts all that follow off their
    natural alignment, which costs other readers of the file a copy.

    Args:
        path: the file, which must not exist yet; None to keep the shard in memory.
        header_capacity: bytes to keep free for the JSON: about 100 and the key's length for each
            tensor. Too few are no error, but the tensors are then moved at the end.

    Attributes:
        info: what `close` returned; None before.
        aborted: whether the shard was dropped.
        file: the open file.

    Examples:
        >>> import numpy as np
        >>> from lorafold.fold.store.shard import Shard
        >>> writer = ShardWriter(None, header_capacity=256)
        >>> writer.add("core", np.eye(2, dtype=np.float32))
        >>> with writer.stream("codes") as stream:
        ...     stream.write(b"packed")
        6
        >>> info = writer.close()
        >>> Shard.of(writer).read_bytes("codes", 0, 4)
        b'pack'
    """

    def __init__(self, path: str | os.PathLike[str] | None, *, header_capacity: int) -> None:
        self.path = None if path is None else Path(path)
        self.name = self.path.name if self.path else "in memory"
        self._tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._checksums: list[int] = []
        # The data starts at a multiple of 8, as all of safetensors' own files do.
        self._start = 8 + -(-min(max(header_capacity, 8), MAX_HEADER) // 8) * 8
        self._end = 0  # of the data so far, from its start
        self._hash = hashlib.sha256()
        self._pending = bytearray()
        self._open_stream: ShardStream | None = None
        self._broken = False
        self.aborted = False
        self.info: ShardInfo | None = None
        self.file = Descriptor.new(path)
        os.lseek(self.file.number, self._start, os.SEEK_SET)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    @property
    def nbytes(self) -> int:
        """Bytes of tensors so far."""
        return self._end

    def add(self, key: str, array: NDArray[Any] | torch.Tensor) -> None:
        """Append a tensor.

        Args:
            key: its name; valid Unicode, new to this shard.
            array: any shape, 0-d and empty too; any dtype of safetensors in numpy, torch, or
                ml_dtypes. A tensor on another device is copied.

        Raises:
            FileError: the key is taken or not allowed, the dtype is not one of safetensors', or
                the shard is closed or being streamed to.
        """
        self._check_key(key)
        code, shape, data = stored(array, f"shard {self.name}, key {key!r}")
        self._append(data)
        self._enter(key, code, shape, zlib.crc32(data))

    def copy(self, key: str, code: str, shape: tuple[int, ...], data: bytes) -> None:
        """Append a tensor of another shard, as it is stored there.

        Args:
            key: as in `add`. code: of its dtype, as safetensors has it. shape, data: of the tensor.
        """
        self._check_key(key)
        self._append(memoryview(data))
        self._enter(key, code, shape, zlib.crc32(data))

    def stream(self, key: str) -> ShardStream:
        """A one-dimensional U8 tensor to be written in pieces; nothing else until it is closed.

        Args:
            key: as in `add`.

        Raises:
            FileError: as in `add`.
        """
        self._check_key(key)
        self._open_stream = ShardStream(self, key)
        return self._open_stream

    def take(self, stream: ShardStream, data: memoryview) -> None:
        """Append bytes of the stream that is open."""
        if self._open_stream is not stream:
            raise FileError(f"shard {self.name}: the stream {stream.key!r} is closed")
        self._append(data)

    def end(self, stream: ShardStream, whole: bool) -> None:
        """Enter the stream's tensor; half a tensor must not pass for a whole one."""
        if self._open_stream is stream:
            self._open_stream = None
            self._broken |= not whole
            self._enter(stream.key, "U8", (stream.nbytes,), stream.checksum)

    def close(self) -> ShardInfo:
        """Write the header and flush everything to the disk; again: only the result.

        Raises:
            FileError: a stream is open, an earlier write failed, or the header exceeds the
                100 MB that safetensors allows.
        """
        if self.info is not None:
            return self.info
        self._check_ready()
        self._broken = True  # until all below is done
        self._flush()
        tensors = ((key, *kind) for key, kind in self._tensors.items())
        metadata = {CHECKSUMS: "".join(f"{c:08x}" for c in self._checksums)}
        head = header_of(tensors, metadata, f"shard {self.name}", self._start)
        if len(head) > self._start:
            self._move_data(len(head) - self._start)
        os.lseek(self.file.number, 0, os.SEEK_SET)
        write_all(self.file.number, head)
        if self.path is not None:
            os.fsync(self.file.number)
        self.info = ShardInfo(
            len(head) + self._end, hashlib.sha256(head).hexdigest(), self._hash.hexdigest()
        )
        return self.info

    def abort(self) -> None:
        """Remove what was written: a transaction does not take the shard in, closed or not."""
        if self.aborted:
            return
        self._broken = self.aborted = True
        if self.path is not None:
            os.unlink(self.path)

    def rename(self, folder: Path) -> None:
        """Give a closed shard the name that it has for good."""
        assert self.info is not None
        if self.path is not None:
            self.file.rename(self.path, folder / self.info.name)
            self.path = folder / self.info.name

    def _enter(self, key: str, code: str, shape: tuple[int, ...], checksum: int) -> None:
        self._tensors[key] = code, shape
        self._checksums.append(checksum)

    def _check_ready(self) -> None:
        if self.info is not None:
            raise FileError(f"shard {self.name} is closed")
        if self._broken:
            raise FileError(f"shard {self.name} was dropped, or a write to it failed")
        if self._open_stream is not None:
            raise FileError(f"shard {self.name}: {self._open_stream.key!r} is still being streamed")

    def _check_key(self, key: str) -> None:
        self._check_ready()
        if key in self._tensors or key == "__metadata__":
            raise FileError(f"shard {self.name}: the key {key!r} is taken")
        try:
            key.encode()
        except UnicodeEncodeError as e:
            # JSON could escape a lone surrogate, but no reader written in Rust takes it.
            raise FileError(f"shard {self.name}: the key {key!r} is not valid Unicode") from e

    def _append(self, data: memoryview) -> None:
        self._broken = True  # a part may be on the disk when a write raises
        self._hash.update(data)
        self._end += len(data)
        if len(self._pending) + len(data) > BLOCK:
            self._flush()
        if len(data) < BLOCK:
            self._pending += data
        else:
            write_all(self.file.number, data)
        self._broken = False

    def _flush(self) -> None:
        if self._pending:
            write_all(self.file.number, self._pending)
            self._pending = bytearray()  # not cleared: a debugger may hold a view of it

    def _move_data(self, by: int) -> None:
        """Make room for a longer header, from the end backwards so that nothing is overwritten."""
        block = max(BLOCK, by)
        for begin in reversed(range(0, self._end, block)):
            data = bytearray(min(block, self._end - begin))
            if not self.file.read_into(memoryview(data), self._start + begin):
                raise FileError(f"shard {self.name} was truncated while it was written")
            os.lseek(self.file.number, self._start + begin + by, os.SEEK_SET)
            write_all(self.file.number, data)


class ShardStream:
    """A tensor of bytes being written, made by `ShardWriter.stream`; close it, or use `with`.

    Attributes:
        key: of the tensor. checksum: CRC-32 of what was written so far.
    """

    def __init__(self, writer: ShardWriter, key: str) -> None:
        self.key = key
        self.checksum = 0
        self._writer = writer
        self._begin = writer.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes written so far, which is also the offset of the next one within the tensor."""
        return self._writer.nbytes - self._begin

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append bytes.

        Returns:
            How many there are.

        Raises:
            FileError: the stream is closed.
        """
        view = memoryview(data).cast("B")
        self._writer.take(self, view)
        self.checksum = zlib.crc32(view, self.checksum)
        return len(view)

    def close(self) -> None:
        """End the tensor; the writer takes other ones again."""
        self._writer.end(self, whole=True)

    def __enter__(self) -> ShardStream:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._writer.end(self, whole=kind is None)
