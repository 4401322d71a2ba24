"""Thin algebra runs on one thread, whatever the process has.

Operations on thin blocks take microseconds, and handing each to a second thread costs more than it
saves: milliseconds where another process uses that core.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")


class _Scopes:
    """Which threads are in `threads`, and what a thread goes back to when it comes out.

    torch keeps a count for each thread that has used it, and starts a new one at what any thread
    set last. So a thread may find what another's scope set: it goes back to what that scope found.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside: list[int] = []  # a thread's identity, once for each scope that it is in
        self._found = self._given = 0  # what the first found; what was set last

    def has(self, count: int) -> bool:
        """Whether the calling thread is in a scope already, and its count is this."""
        import torch

        return threading.get_ident() in self._inside and torch.get_num_threads() == count

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

    Scopes of several threads may overlap and end in any order. Not for: a thread that set, for
    itself, just what another's scope sets; it can't be told from a new one.
    """
    if count is None or _SCOPES.has(count):
        yield
        return
    before = _SCOPES.enter(count)
    try:
        yield
    finally:
        _SCOPES.leave(before)


def thin(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, run within `threads(1)`."""

    @functools.wraps(function)
    def alone(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if _SCOPES.has(1):
            return function(*args, **kwargs)
        before = _SCOPES.enter(1)
        try:
            return function(*args, **kwargs)
        finally:
            _SCOPES.leave(before)

    return alone
