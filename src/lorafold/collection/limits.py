"""What work on a collection may use: memory and a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import MismatchError

if TYPE_CHECKING:
    import torch


def block_bytes(memory: str | int) -> int:
    """Bytes of factors a block may hold under a memory limit such as "1GiB" or a number of bytes.

    Decompositions, their coded copies and float64 temporaries take several times a block, and a
    few blocks are alive at once.
    """
    return max(1 << 16, memory_bytes(memory) // 256)


def memory_bytes(memory: str | int) -> int:
    """A limit in bytes from "1GiB", "512 MB", "2e9" or a number.

    Raises:
        MismatchError: not a size.
    """
    if isinstance(memory, int) and memory > 0:
        return memory
    units = {
        "": 1,
        "b": 1,
        "kb": 10**3,
        "mb": 10**6,
        "gb": 10**9,
        "kib": 2**10,
        "mib": 2**20,
        "gib": 2**30,
    }
    text = str(memory).strip().lower()
    digits = text.rstrip("abcdfghijklmnopqrstuvwxyz ")
    unit = text[len(digits) :].strip()
    try:
        size = int(float(digits) * units[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise MismatchError(f"memory must be a size such as '1GiB', found {memory!r}")
    return size


def torch_device(device: Any) -> torch.device | None:
    """The device asked for; a `MismatchError` names one that is not there."""
    if device is None:
        return None
    import torch

    try:
        found = torch.device(device)
        if found.type == "meta":
            raise RuntimeError("nothing is computed on it")
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as e:
        raise MismatchError(f"device {device!r} can't be used: {str(e).splitlines()[0]}") from e
    return found
