"""Names of tasks: digests of a function and its inputs, the same in every process."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import Any


def key_of(value: Any) -> str:
    """A hexadecimal digest of what a value is: numbers, text, arrays, tensors, records, functions,
    and collections of these.

    Raises:
        TypeError: it is something else.
    """
    parts: list[bytes] = []
    _take(parts, value)
    return hashlib.sha256(b"".join(parts)).hexdigest()[:40]


def _take(parts: list[bytes], value: Any) -> None:
    # A kind and a length before everything, so that no two values read the same.
    kind = type(value)
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        data = value if isinstance(value, bytes) else repr(value).encode("utf-8", "surrogatepass")
        _add(parts, kind.__name__, data)
    elif hasattr(kind, "__lorafold_key__"):  # says itself which inputs it stands for
        parts.append(_head(kind.__name__, 0))
        _take(parts, value.__lorafold_key__())
    elif isinstance(value, (tuple, list)):
        if all(type(item) in _PLAIN for item in value):
            _add(parts, "plain sequence", repr(list(value)).encode("utf-8", "surrogatepass"))
            return
        parts.append(_head("sequence", len(value)))
        for item in value:
            _take(parts, item)
    elif dataclasses.is_dataclass(kind):
        names = _fields_of(kind)
        parts.append(_head(kind.__name__, len(names)))
        for name in names:
            _take(parts, getattr(value, name))
    elif isinstance(value, Mapping):
        parts.append(_head("mapping", len(value)))
        _take(parts, list(value))
        _take(parts, list(value.values()))
    elif callable(value) and hasattr(value, "__qualname__"):
        _take(parts, f"{value.__module__}.{value.__qualname__}")
    else:
        dtype, shape, data = _array(value)
        _add(parts, f"{dtype} {shape}", data)


def _add(parts: list[bytes], kind: str, data: bytes) -> None:
    parts += (_head(kind, len(data)), data)


_PLAIN = (str, int, float, bool, type(None))


@lru_cache
def _fields_of(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


def _array(value: Any) -> tuple[str, list[int], bytes]:
    """An array or tensor in plain values."""
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return str(value.dtype), list(value.shape), raw.tobytes()
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(value)
        return str(array.dtype), list(array.shape), array.tobytes()
    if isinstance(value, (torch.device, torch.dtype)):
        return str(value), [], b""
    raise TypeError(f"a {type(value).__name__} has no key")


@lru_cache(1 << 12)
def _head(kind: str, length: int) -> bytes:
    return kind.encode() + struct.pack("<Q", length)
