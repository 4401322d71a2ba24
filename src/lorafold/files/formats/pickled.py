"""`adapter_model.bin`: a dict of tensors as torch.save writes it, read as data and nothing else.

It is a ZIP of a pickle and of the tensors' storages, stored as they are. torch reads it without
looking at the checksums that are in it, unpacks what is packed there, and gives views of whatever
size and stride the pickle says: all of that is checked here, so that a damaged file is an error and
a small one stays small. What torch is given is a ZIP made of the parts that were checked. The form
before PyTorch 1.6 has no checksums.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from typing import IO, Any

import torch
from torch import Tensor

from ...errors import FileError
from ..disk.header import disguise
from ..disk.held import Held
from ..remote.file import UrlFile
from ..safetensors import CODES

_ZIP = b"PK\x03\x04"


def unpickled(held: Held | UrlFile) -> dict[str, Tensor]:
    """The tensors of a file, each in memory of its own or of those that are equal views.

    Raises:
        FileError: it is damaged, or holds anything but plain tensors by name. ChangedError: it was
            written to meanwhile.
    """
    path = held.path
    loader: Callable[..., Any] = torch.load
    with held.stream() as file:
        file.seek(0)
        start = file.read(100)
        says = disguise(start)
        if says is not None and not start.startswith(_ZIP):
            raise FileError(f"{path} is {says}")
        file.seek(0)
        try:
            read: IO[bytes] = _rebuilt(file) if start.startswith(_ZIP) else file
            found = loader(read, map_location="cpu", weights_only=True)
        except Exception as e:  # a damaged pickle can raise anything
            raise FileError(f"{path}: can't be read as a PyTorch file of tensors ({e})") from e
    held.check()  # which says if it was written to meanwhile
    if not isinstance(found, dict) or not all(
        isinstance(key, str) and isinstance(t, Tensor) for key, t in found.items()
    ):
        raise FileError(f"{path}: must hold a dict of tensors by name")
    return _copies(found, held)


def _rebuilt(file: IO[bytes]) -> IO[bytes]:
    """The parts of an archive, each as its checksum says, in one that has nothing else.

    By one flag in its list of parts torch takes a tensor for memory that nobody wrote.

    Raises:
        ValueError: a part is packed, or there twice. Others: as zipfile's, of a damaged one.
    """
    made = io.BytesIO()
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(made, "w") as plain:
        parts = archive.infolist()
        if len({part.filename for part in parts}) < len(parts):
            raise ValueError("a part of it is there twice")
        said = any(part.CRC for part in parts)  # torch can be told to leave them out
        for part in parts:
            if part.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{part.filename!r:.80} is packed, which PyTorch never does")
            if not said:
                part.CRC = None  # type: ignore[assignment]  # which zipfile takes for none
            plain.writestr(zipfile.ZipInfo(part.filename), archive.read(part))
    made.seek(0)
    return made


def _copies(tensors: dict[str, Tensor], held: Held | UrlFile) -> dict[str, Tensor]:
    """The tensors without the storages that they are views of; equal views stay one tensor."""
    made: dict[tuple[Any, ...], Tensor] = {}
    found, left = {}, held.size
    for key, t in tensors.items():
        _check_plain(key, t, held.path)
        view = (t.data_ptr(), t.dtype, t.shape, t.stride())
        if view not in made:
            left -= t.numel() * t.itemsize
            if left < 0:
                raise FileError(f"{held.path}: {key!r} has more numbers than the file")
            made[view] = t.detach().clone(memory_format=torch.contiguous_format)
        found[key] = made[view]
    return found


def _check_plain(key: str, t: Tensor, path: str) -> None:
    """Raise where a tensor is more, or less, than numbers in a row."""
    plain = t.layout == torch.strided and t.device.type == "cpu" and not t.is_nested
    if not plain or t.dtype not in CODES or type(t) not in (Tensor, torch.nn.Parameter):
        kind = f"{t.dtype}, {t.layout}, on {t.device}, a {type(t).__name__}"
        raise FileError(f"{path}: {key!r} is no plain tensor ({kind})")
