"""The adapters that are attached for requests: by content, counted, and let go of by bytes.

A name may mean another adapter tomorrow; a request goes on with the one that it began with. So
adapters are attached under the digest of their content, and each request holds the digests that it
runs. One that nobody holds stays until others need its bytes: the longest unused goes first.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..adapter import Adapter
from ..attach.live import Live
from ..attach.run.slots import BY_ITSELF, Slots
from ..attach.selection import Selection
from ..attach.state import State
from ..errors import MismatchError
from .engine import Request


class Attachments:
    """The adapters on a running model, under digests; for its engine's thread alone.

    Args:
        model: the base. slots: adapters that run at once. dtype: of their factors.

    Attributes:
        live: the handle.
    """

    def __init__(self, model: nn.Module, slots: int, dtype: torch.dtype) -> None:
        # As many as are made as adapters come, or as many at once.
        reserved = None if slots == BY_ITSELF else slots
        self._state = State(model, Slots(reserved, None, dtype, fixed_dtype=True))
        self.live = Live(self._state)
        self._tried: set[str] = set()

    def check(self, request: Request) -> None:
        """Raise a `LorafoldError` where a request's mix can't run in a row."""
        if request.mix:
            mix, c, rank = dict(request.mix), request.c, request.rank
            selection = Selection.of([mix], [c], [rank], self._state.sources)
            self._state.running.check(selection)

    def add(self, adapter: Adapter, digest: str, trial: Callable[[], Any]) -> None:
        """Attach one, and try it where it comes to layers that none was tried at.

        Args:
            trial: runs the model for two rows, so that a layer where these can't be told apart
                says so.

        Raises:
            MismatchError: it does not fit the base, or rows can't be told apart where it goes; it
                is not attached then.
        """
        if digest in self._state.sources:
            return
        self.live.add(adapter, digest)
        try:
            with self.live.use([digest, None]):
                if not self._tried.issuperset(self._state.sites):
                    trial()
        except BaseException:
            self.live.remove(digest)
            raise
        self._tried |= set(self._state.sites)

    def remove(self, digest: str) -> None:
        """Let go of one."""
        if digest in self._state.sources:
            self.live.remove(digest)


@dataclass
class Held:
    """An adapter that is attached.

    Args:
        nbytes: of its tensors. users: requests that hold it.
    """

    nbytes: int
    users: int = 0


class Pool:
    """Which adapters are attached, and who holds them.

    Args:
        attach, detach: by digest; these wait for the engine. most: bytes that all of them together
            may take, those that are in use aside.

    Attributes:
        nbytes: that they take.
    """

    def __init__(
        self, attach: Callable[[Adapter, str], Any], detach: Callable[[str], Any], most: int
    ) -> None:
        self._attach, self._detach, self._most = attach, detach, most
        self._held: OrderedDict[str, Held] = OrderedDict()
        self._changing = threading.Lock()  # who attaches and detaches; that takes its time
        self._lock = threading.Lock()  # of the counts; nobody waits for long

    @property
    def nbytes(self) -> int:
        """Bytes of all that are attached."""
        with self._lock:
            return sum(held.nbytes for held in self._held.values())

    @property
    def digests(self) -> dict[str, int]:
        """{digest: requests that hold it}, the longest unused first."""
        with self._lock:
            return {digest: held.users for digest, held in self._held.items()}

    def hold(self, digest: str, read: Callable[[], Adapter]) -> None:
        """Have an adapter attached until it is released as often as it was held.

        Args:
            read: gives it, where it isn't attached.

        Raises:
            LorafoldError: what reading or attaching it says.
        """
        if self._holds([digest]):
            return
        with self._changing:
            if self._holds([digest]):  # meanwhile
                return
            adapter = read()
            self._make_room(size_of(adapter))
            self._attach(adapter, digest)
            with self._lock:
                self._held[digest] = Held(size_of(adapter), 1)

    def hold_again(self, digests: Iterable[str]) -> None:
        """Digests that are held already, once more."""
        self._holds(digests)

    def release(self, digests: Iterable[str]) -> None:
        """One that held these has ended."""
        with self._lock:
            for digest in digests:
                self._held[digest].users -= 1

    def _holds(self, digests: Iterable[str]) -> bool:
        with self._lock:
            for digest in digests:
                if digest not in self._held:
                    return False
                self._held[digest].users += 1
                self._held.move_to_end(digest)
            return True

    def _make_room(self, nbytes: int) -> None:
        while self.nbytes + nbytes > self._most and (digest := self._unused()) is not None:
            with self._lock:  # nobody can hold it from here on, and who wants it waits
                if self._held[digest].users:
                    continue
                del self._held[digest]
            self._detach(digest)

    def _unused(self) -> str | None:
        with self._lock:
            return next((digest for digest, held in self._held.items() if not held.users), None)


def size_of(adapter: Adapter) -> int:
    """Bytes of all its tensors."""
    factors = sum(t.nbytes for u in adapter.modules.values() for t in (u.A, u.B))
    return factors + sum(t.nbytes for t in adapter.extras.values())


def check_finite(adapter: Adapter) -> None:
    """Raise a `MismatchError` for a module saved whole whose numbers are not finite.

    Those of updates are, or they would be none.
    """
    for key, t in adapter.extras.items():
        if t.is_floating_point() and not bool(t.isfinite().all()):
            raise MismatchError(f"its tensor {key!r} has numbers that are not finite")
