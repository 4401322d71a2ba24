"""The safetensors format, as far as a shard needs it: types, entries, and a careful parser.

A file is an 8-byte little-endian length N, N bytes of JSON that give each tensor's dtype, shape and
place, and the tensors one after the other without a gap; trailing spaces in the JSON are allowed.
(https://github.com/huggingface/safetensors#format)
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from ...errors import FileError

MAX_HEADER = 100_000_000  # bytes of JSON; the reference implementation reads no more

# safetensors code -> (name in numpy and torch, bytes per item)
DTYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F32": ("float32", 4),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
}
_CODES = {name: code for code, (name, _) in DTYPES.items()}
TORCH_ONLY = {code for code in DTYPES if code == "BF16" or code.startswith("F8")}


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


class Place(NamedTuple):
    """Where a tensor lies, and what it is: bytes [begin, end) from the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def entry(self) -> dict[str, Any]:
        """As the JSON header has it."""
        offsets = [self.begin, self.end]
        return {"dtype": self.dtype, "shape": list(self.shape), "data_offsets": offsets}


def raw(array: Any, where: str) -> tuple[str, tuple[int, ...], memoryview]:
    """safetensors' dtype and shape, and the bytes, little-endian in row-major order."""
    torch = sys.modules.get("torch")  # what isn't imported can't have made a tensor
    if torch is not None and isinstance(array, torch.Tensor):
        code = _CODES.get(str(array.dtype).removeprefix("torch."))
        if code is None or array.layout != torch.strided or array.is_meta:
            kind = "meta" if array.is_meta else f"{array.dtype}, {array.layout}"
            raise FileError(f"{where}: a tensor of {kind} can't be stored in safetensors")
        shape = tuple(array.shape)
        flat = array.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        flat = flat.as_strided(flat.shape, (1,))  # one element may come with any stride
        return code, shape, flat.view(torch.uint8).numpy().data
    if not isinstance(array, np.ndarray | np.generic):
        raise FileError(f"{where}: expected an array or a tensor, found {type(array).__name__}")
    array = np.asarray(array)
    code = _CODES.get(array.dtype.name)
    if code is None:
        raise FileError(f"{where}: {array.dtype} can't be stored in safetensors")
    little = array.dtype.newbyteorder("<") if code not in TORCH_ONLY else array.dtype
    flat = np.ascontiguousarray(array.astype(little, copy=False)).reshape(-1)
    return code, array.shape, flat.view(np.uint8).data


def parse_header(header: bytes, size: int, where: str) -> tuple[dict[str, str], dict[str, Place]]:
    """Metadata and tensors (dtype, shape, begin, end) of a header over `size` bytes of data."""
    try:
        found = json.loads(header.decode())
    except (ValueError, RecursionError) as e:
        raise FileError(f"{where}: its header is not valid JSON ({e})") from e
    if not isinstance(found, dict):
        raise FileError(f"{where}: its header is not a JSON object")
    metadata = found.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise FileError(f"{where}: its __metadata__ must map texts to texts")
    tensors = {key: _parse_entry(entry, f"{where}, key {key!r}") for key, entry in found.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    end = 0
    for key, place in ordered.items():
        if place.begin != end:
            what = "overlaps the one before" if place.begin < end else "leaves a gap before it"
            raise FileError(
                f"{where}, key {key!r}: starts at {place.begin}, which {what} (ends at {end})"
            )
        end = place.end
    if end != size:
        raise FileError(
            f"{where} is truncated or has a tail: its tensors take {end:,} bytes, "
            f"the file holds {size:,}"
        )
    return metadata, ordered


def _parse_entry(entry: Any, where: str) -> Place:
    if not isinstance(entry, dict):
        raise FileError(f"{where}: not a JSON object")
    code, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(code, str) or code not in DTYPES:
        raise FileError(f"{where}: unknown dtype {code!r}; known are {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > 64:  # numpy's limit
        raise FileError(f"{where}: a shape must be a list of sizes, found {shape!r:.80}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FileError(f"{where}: data_offsets must be [begin, end], found {offsets!r:.80}")
    nbytes = math.prod(shape) * DTYPES[code][1]
    if offsets[1] - offsets[0] != nbytes:
        raise FileError(
            f"{where}: {code} of shape {shape!r:.80} takes {nbytes:,} bytes, "
            f"data_offsets give {offsets[1] - offsets[0]:,}"
        )
    return Place(code, tuple(shape), offsets[0], offsets[1])


def _naturals(value: Any) -> TypeGuard[list[int]]:
    # `type`, as True is an int by inheritance
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
