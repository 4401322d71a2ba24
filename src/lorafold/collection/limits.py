"""What work on a collection may use: memory, threads, a device."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
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


class _Scopes:
    """Which threads are in `threads`, and what a thread goes back to when it comes out.

    torch keeps a count for each thread that has used it, and starts a new one at what any thread
    set last. So a thread may find what another's scope set: it goes back to what that scope found.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside: list[int] = []  # a thread's identity, once for each scope that it is in
        self._found = self._given = 0  # what the first found; what was set last

    def enter(self, count: int) -> int:
        """Set the thread's count; what it goes back to."""
        import torch

        with self._lock:
            before = torch.get_num_threads()
            if not self._inside:
                self._found = before
            elif before == self._given and threading.get_ident() not in self._inside:
                before = self._found
            self._inside.append(threading.get_ident())
            self._set(count)
            return before

    def leave(self, before: int) -> None:
        """Set back what `enter` gave."""
        with self._lock:
            self._inside.remove(threading.get_ident())
            self._set(before)

    def _set(self, count: int) -> None:
        import torch

        if torch.get_num_threads() != count:
            torch.set_num_threads(count)
            self._given = count


_SCOPES = _Scopes()


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many torch threads for the calling thread in the block; as many as it has where None.

    Operations on thin blocks take microseconds, and handing each to a second thread costs more
    than it saves: milliseconds where another process uses that core. Scopes of several threads may
    overlap and end in any order. Not for: a thread that set, for itself, just what another's scope
    sets; it can't be told from a new one.
    """
    if count is None:
        yield
        return
    before = _SCOPES.enter(count)
    try:
        yield
    finally:
        _SCOPES.leave(before)


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
