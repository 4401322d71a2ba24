"""Names of tasks: digests of a function and its inputs, the same in every process."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Mapping
from typing import Any


def key_of(value: Any) -> str:
    """A hexadecimal digest of what a value is: numbers, text, arrays, tensors, records, functions,
    and collections of these.

    Raises:
        TypeError: it is something else.
    """
    found = hashlib.sha256()
    _take(found, value)
    return found.hexdigest()[:40]


def _take(found: Any, value: Any) -> None:
    # A kind and a length before everything, so that no two values read the same.
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        data = value if isinstance(value, bytes) else repr(value).encode("utf-8", "surrogatepass")
        _head(found, type(value).__name__, len(data))
        found.update(data)
    elif hasattr(type(value), "__lorafold_key__"):  # says itself which inputs it stands for
        _head(found, type(value).__name__, 0)
        _take(found, value.__lorafold_key__())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        _head(found, type(value).__name__, len(fields))
        for field in fields:
            _take(found, getattr(value, field.name))
    elif isinstance(value, Mapping):
        _head(found, "mapping", len(value))
        for key, item in value.items():
            _take(found, key)
            _take(found, item)
    elif isinstance(value, (tuple, list)):
        _head(found, "sequence", len(value))
        for item in value:
            _take(found, item)
    elif callable(value) and hasattr(value, "__qualname__"):
        _take(found, f"{value.__module__}.{value.__qualname__}")
    else:
        _take(found, _array(value))


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


def _head(found: Any, kind: str, length: int) -> None:
    found.update(kind.encode())
    found.update(struct.pack("<Q", length))
