"""Writing a shard: a safetensors file as a stream, its tensors' sizes not known beforehand.

The JSON comes first in the file though what is in it is known last. A region of estimated size is
therefore kept free for it and filled at the end, with trailing spaces. Two SHA-256 taken on the way
cover every byte: one the length and the JSON, the other the tensors.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from ...errors import FileError
from ...files.atomic import CREATE_FLAGS, write_all
from ...files.safetensors import MAX_HEADER, header_of, stored

BLOCK = 1 << 20  # bytes gathered into one write


@dataclass(frozen=True)
class ShardInfo:
    """What a manifest says about a shard.

    Args:
        name: of its file.
        nbytes: size of the file.
        header_sha256: of the length and the JSON, up to the first tensor; hexadecimal.
        data_sha256: of the rest.
    """

    name: str
    nbytes: int
    header_sha256: str
    data_sha256: str


class ShardWriter:
    """Writes one shard, tensor after tensor, without holding more than a block of it in memory.

    As a context manager it closes the shard at the end of the block, or drops it on an exception.
    Put byte streams after the tensors: an odd number of bytes puts all that follow off their
    natural alignment, which costs other readers of the file a copy.

    Args:
        path: the file, which must not exist yet; None to keep the shard in memory.
        header_capacity: bytes to keep free for the JSON: about 90 and the key's length for each
            tensor. Too few are no error, but the tensors are then moved at the end.
        metadata: texts to store beside the tensors.
        name: what the shard is called; the file's name by default.

    Attributes:
        memory: after `close`, the whole file when `path` is None.
        info: what `close` returned; None before.
        aborted: whether the shard was dropped.

    Example:
        >>> import numpy as np
        >>> from lorafold.fold.store.shard import Shard
        >>> writer = ShardWriter(None, header_capacity=256)
        >>> writer.add("core", np.eye(2, dtype=np.float32))
        >>> with writer.stream("codes") as stream:
        ...     stream.write(b"packed")
        >>> info = writer.close()
        >>> Shard.of(writer).read_bytes("codes", 0, 4)
        b'pack'
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        *,
        header_capacity: int,
        metadata: Mapping[str, str] | None = None,
        name: str | None = None,
    ) -> None:
        self.path = None if path is None else Path(path)
        self.name = name or (self.path.name if self.path else "shard in memory")
        self._tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._metadata = dict(metadata) if metadata else None
        for text in (*(metadata or {}), *(metadata or {}).values()):
            self._check_text(text, "the metadata")
        # The data starts at a multiple of 8, as all of safetensors' own files do.
        self._start = 8 + -(-min(max(header_capacity, 8), MAX_HEADER) // 8) * 8
        self._end = 0  # of the data so far, from its start
        self._hash = hashlib.sha256()
        self._pending = bytearray()
        self.memory = bytearray()
        self._descriptor: int | None = None
        self._open_stream: ShardStream | None = None
        self._broken = False
        self.aborted = False
        self.info: ShardInfo | None = None
        if self.path is not None:
            self._descriptor = os.open(self.path, CREATE_FLAGS, 0o666)
            os.lseek(self._descriptor, self._start, os.SEEK_SET)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

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
        dtype, shape, data = stored(array, f"shard {self.name}, key {key!r}")
        self._append(data)
        self._tensors[key] = dtype, shape

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

    def close(self) -> ShardInfo:
        """Write the header, flush everything to the disk and close; again: only the result.

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
        head = header_of(tensors, self._metadata, f"shard {self.name}", self._start)
        start = len(head)
        if self._descriptor is None:
            self.memory[:0] = head
        else:
            if start > self._start:
                self._move_data(start - self._start)
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            write_all(self._descriptor, head)
            os.fsync(self._descriptor)
            self._release()
        self.info = ShardInfo(
            self.name, start + self._end, hashlib.sha256(head).hexdigest(), self._hash.hexdigest()
        )
        return self.info

    def abort(self) -> None:
        """Remove what was written: a transaction does not take the shard in, closed or not."""
        if self.aborted:
            return
        self._broken = self.aborted = True
        if self.info is None:
            self.memory.clear()
            if self._descriptor is not None:
                self._release()
        if self.path is not None:
            os.unlink(self.path)

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
        self._check_text(key, "the key")

    def _check_text(self, text: str, what: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as e:
            # JSON could escape a lone surrogate, but no reader written in Rust takes it.
            raise FileError(f"shard {self.name}: {what} {text!r} is not valid Unicode") from e

    def _append(self, data: memoryview) -> None:
        self._broken = True  # a part may be on the disk when a write raises
        self._hash.update(data)
        self._end += len(data)
        if self._descriptor is None:
            self.memory += data
        else:
            if len(self._pending) + len(data) > BLOCK:
                self._flush()
            if len(data) < BLOCK:
                self._pending += data
            else:
                write_all(self._descriptor, data)
        self._broken = False

    def _flush(self) -> None:
        if self._descriptor is not None and self._pending:
            write_all(self._descriptor, self._pending)
            self._pending = bytearray()  # not cleared: a debugger may hold a view of it

    def _move_data(self, by: int) -> None:
        """Make room for a longer header, from the end backwards so that nothing is overwritten."""
        assert self._descriptor is not None
        block = max(BLOCK, by)
        for begin in reversed(range(0, self._end, block)):
            count = min(block, self._end - begin)
            data = bytearray(count)
            os.lseek(self._descriptor, self._start + begin, os.SEEK_SET)
            read = 0
            while read < count:
                part = os.read(self._descriptor, count - read)
                if not part:
                    raise FileError(f"shard {self.name} was truncated while it was written")
                data[read : read + len(part)] = part
                read += len(part)
            os.lseek(self._descriptor, self._start + begin + by, os.SEEK_SET)
            write_all(self._descriptor, data)

    def _release(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)


class ShardStream:
    """A tensor of bytes being written, made by `ShardWriter.stream`; close it, or use `with`."""

    def __init__(self, writer: ShardWriter, key: str) -> None:
        self.key = key
        self._writer = writer
        self._begin = writer._end

    @property
    def nbytes(self) -> int:
        """Bytes written so far, which is also the offset of the next one within the tensor."""
        return self._writer._end - self._begin

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes.

        Raises:
            FileError: the stream is closed.
        """
        if self._writer._open_stream is not self:
            raise FileError(f"shard {self._writer.name}: the stream {self.key!r} is closed")
        self._writer._append(memoryview(data).cast("B"))

    def close(self) -> None:
        """End the tensor; the writer takes other ones again."""
        writer = self._writer
        if writer._open_stream is self:
            writer._open_stream = None
            writer._tensors[self.key] = torch.uint8, (self.nbytes,)

    def __enter__(self) -> ShardStream:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:  # half a tensor must not pass for a whole one
            self._writer._broken = True
        self.close()
