"""The safetensors format: headers parsed with care and written, tensors read by their byte range.

A file (https://github.com/huggingface/safetensors): eight bytes, the little-endian length N of the
header; N bytes of JSON, {key: {dtype, shape, data_offsets}}, trailing spaces allowed; then the
data, without holes. A tensor is read into memory of its own and never mapped: mapped pages count
as the process's memory, and a mapping per adapter would hold one descriptor each. A file is open
only while it is being read, so ten thousand adapters need no more descriptors than one.

What stands at its head is in `disk/header.py`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from io import FileIO

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import FileError
from .disk import header as heads
from .disk.header import DTYPE_NAMES, ENOUGH, METADATA, Entry, Path, disguise, header_length
from .disk.held import Descriptor, open_regular
from .remote.asking import PAUSES
from .remote.file import UrlFile
from .remote.place import UrlPath, place_of

# Older releases of torch lack some of the 8-bit types.
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, torch_name)
    for name, torch_name in DTYPE_NAMES.items()
    if hasattr(torch, torch_name)
}
CODES = {dtype: name for name, dtype in DTYPES.items()}

# What a disk on a network says when it is out of reach for the moment.
_PASSING = {errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.ECONNRESET, errno.ENETUNREACH}

Opened = FileIO | Descriptor | UrlFile


@contextlib.contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Tell what the system, or the safetensors library, says of a file as a `FileError`.

    Args:
        path: what is named where they don't name the file.
    """
    try:
        yield
    except OSError as e:
        raise FileError(f"{e.filename or os.fspath(path)}: {e.strerror or e}") from e
    except SafetensorError as e:
        raise FileError(f"{os.fspath(path)}: {e}") from e


# Reading a file


def open_place(path: Path) -> FileIO | UrlFile:
    """The file, of this machine or of a store, for reading.

    Raises:
        FileError: it can't be opened.
    """
    place = place_of(path)
    if not isinstance(place, UrlPath):
        return open_file(path)
    with file_errors(path):
        return UrlFile(place)


def open_file(path: Path) -> FileIO:
    """The file, unbuffered, for reading.

    Raises:
        FileError: it can't be opened.
    """
    try:
        return FileIO(open_regular(path))
    except OSError as e:
        raise FileError(f"{os.fspath(path)}: {e.strerror or e}") from e


def header_bytes(file: Opened, path: Path) -> tuple[bytearray, int]:
    """The header's JSON, not yet parsed, and the size of the file.

    Raises:
        FileError: the file is empty, cut off, or no safetensors file.
    """
    size = file.size if isinstance(file, UrlFile) else os.fstat(file.fileno()).st_size
    start = read_range(file, 0, min(ENOUGH, size), path)
    says = disguise(start)
    if says is not None:
        raise FileError(f"{os.fspath(path)} is {says}")
    length = header_length(start[:8], size, path)
    return read_range(file, 8, length, path), size


def parse_header(
    header: bytes | bytearray, size: int, where: Path
) -> tuple[dict[str, Entry], dict[str, str]]:
    """See `disk.header.parse_header`; a dtype that this torch lacks is an error, too."""
    found, metadata = heads.parse_header(header, size, where)
    for key, entry in found.items():
        if entry.code not in DTYPES:
            late = f"which torch {torch.__version__} does not have yet"
            raise FileError(f"{where}: {key!r} has the dtype {entry.code!r}, {late}")
    return found, metadata


def read_entries(path: Path) -> dict[str, Entry]:
    """What the header of the file says of each tensor.

    Raises:
        FileError: as `header_bytes` and `parse_header`.
    """
    with open_place(path) as f:
        header, size = header_bytes(f, path)
    return parse_header(header, size, path)[0]


def read_tensors(file: Opened, wanted: Iterable[tuple[str, Entry]], path: Path) -> list[Tensor]:
    """The tensors at those entries, each in memory of its own.

    Raises:
        FileError: the file ends too early (it changed since its header was read).
    """
    wanted = list(wanted)
    if isinstance(file, UrlFile):  # all of them at once
        rooms = [room(entry) for _, entry in wanted]
        parts = [(e.start, view) for (_, e), (_, view) in zip(wanted, rooms, strict=True)]
        _fill_from(file, parts, f"{path}")
        return [t for t, _ in rooms]
    result = []
    for key, entry in wanted:
        t, view = room(entry)
        _fill(file, entry.start, view, f"{path}: {key!r}")
        result.append(t)
    return result


def read_rows(file: Opened, wanted: tuple[str, Entry], rows: tuple[int, int], path: Path) -> Tensor:
    """The rows from one to another of the tensor at an entry, as `read_tensors` reads it."""
    (key, entry), (start, stop) = wanted, rows
    row = (entry.stop - entry.start) // entry.shape[0]
    part = replace(
        entry,
        shape=(stop - start, *entry.shape[1:]),
        start=entry.start + start * row,
        stop=entry.start + stop * row,
    )
    return read_tensors(file, [(key, part)], path)[0]


def room(entry: Entry) -> tuple[Tensor, memoryview]:
    """A tensor of the entry's dtype and shape, and its bytes, to be filled."""
    flat = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
    return flat.view(entry.dtype).reshape(entry.shape), flat.numpy().data


def is_finite(t: Tensor) -> bool:
    """Whether a tensor of any dtype holds neither NaN nor infinity."""
    wide = t.float() if t.itemsize == 1 else t
    if not (wide.is_floating_point() or wide.is_complex()) or not wide.numel():
        return True
    return bool(wide.abs().amax().isfinite())  # NaN stays


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file, with the permissions that any new file has here.

    Args:
        tensors: on the CPU, contiguous, no two sharing memory.
        path: the file, in a folder that nobody else writes to.
        metadata: what the header says beside.
    """
    from safetensors.torch import save_file

    number = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    mode = os.fstat(number).st_mode
    os.close(number)
    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    if len(metadata or ()) > 1:
        _order_metadata(path)
    os.chmod(path, stat.S_IMODE(mode))  # the library's own are for the owner alone


def _order_metadata(path: Path) -> None:
    """Sort what a header says beside, which the library writes in an order of chance: two files of
    the same are the same bytes.
    """
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header[METADATA] = dict(sorted(header[METADATA].items()))
        said = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(said) <= length:
            file.seek(8)
            file.write(said.ljust(length))


# Headers


def read_range(file: Opened, start: int, length: int, path: Path) -> bytearray:
    """Some bytes of a file.

    Raises:
        FileError: it ends before.
    """
    buffer = bytearray(length)
    _fill(file, start, memoryview(buffer), str(path))
    return buffer


def _fill_from(file: UrlFile, parts: list[tuple[int, memoryview]], what: str) -> None:
    try:
        whole = file.read_into(parts)
    except OSError as e:
        raise FileError(f"{what} can't be read: {e.strerror or e}") from e
    if not whole:
        raise FileError(f"{what} ends too early: the file is cut off or was changed")


def _fill(file: Opened, start: int, view: memoryview, what: str) -> None:
    if isinstance(file, UrlFile):
        _fill_from(file, [(start, view)], what)
        return
    try:
        while len(view):  # one read gives at most 2 GiB on Linux
            # At a place of its own, as several threads may read.
            n = _read_patiently(file.fileno(), view, start)
            if not n:
                raise FileError(f"{what} ends too early: the file is cut off or was changed")
            view, start = view[n:], start + n
    except OSError as e:
        raise FileError(f"{what} can't be read: {e.strerror or e}") from e


def _read_patiently(number: int, view: memoryview, start: int) -> int:
    """Read; again after a pause where a disk on a network fails in a way that passes."""
    for pause in PAUSES:
        try:
            return _read_at(number, view, start)
        except OSError as e:
            if e.errno not in _PASSING:
                raise
        time.sleep(pause)
    return _read_at(number, view, start)


def _read_at(number: int, view: memoryview, start: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(number, [view], start)
    part = os.pread(number, len(view), start)
    view[: len(part)] = part
    return len(part)
