"""An engine's thread: the queue, calls between steps, and what happens when a step fails.

A failing step ends everything that runs and waits with the error, and the thread with it; `start`
begins anew. One lock guards the queue; a step runs without it.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from ...errors import LorafoldError
from ..engine import BusyError, DownError, Engine, Limits, Load, Piece, Request

T = TypeVar("T")


class Looping(Engine):
    """An engine with a thread of its own; a kind of it says what a step is.

    Args:
        limits: what it has room for.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._changed = threading.Condition()
        self._waiting: deque[Request] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._cancelled: set[Request] = set()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._draining = self._stopping = False

    # What a kind says

    @abstractmethod
    def begin(self) -> None:
        """Make what a run needs, with nothing in it."""

    @abstractmethod
    def step(self) -> None:
        """Do a piece of work."""

    @abstractmethod
    def running(self) -> list[Request]:
        """The requests that are no longer in the queue."""

    @abstractmethod
    def leave(self, request: Request) -> None:
        """Let go of a request that runs, telling nobody."""

    @property
    def used(self) -> float:
        """Share of the room for tokens that is taken."""
        return 0.0

    # For a kind's step

    def next_waiting(self) -> Request | None:
        """The request whose turn it is; it stays in the queue."""
        with self._changed:
            return self._waiting[0] if self._waiting else None

    def take(self, request: Request) -> bool:
        """Take the first of the queue out of it; False where it was cancelled meanwhile."""
        with self._changed:
            if self._waiting and self._waiting[0] is request:
                self._waiting.popleft()
                return True
            return False

    # The seam

    def submit(self, request: Request, follows: bool = False) -> None:
        self.limits.check(request)
        with self._changed:
            self._check_up()
            if len(self._waiting) >= self.limits.waiting and not follows:
                raise BusyError(
                    f"{len(self._waiting)} requests are waiting, which is all that may: try later"
                )
            self._waiting.append(request)
            self._changed.notify()

    def check(self, request: Request) -> None:
        self.limits.check(request)

    def cancel(self, request: Request) -> None:
        with self._changed:
            self._cancelled.add(request)
            self._changed.notify()

    def call(self, function: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        with self._changed:
            self._check_alive()
            self._calls.append((function, future))
            self._changed.notify()
        return future

    def start(self) -> None:
        with self._changed:
            before = self._thread
            if before is not None and before.is_alive() and self._error is None:
                return
        if before is not None and before is not threading.current_thread():
            before.join()  # it may be telling the last of what it had
        with self._changed:
            self._draining = self._draining and not self._stopping
            self._error, self._stopping = None, False
            self._thread = threading.Thread(target=self._run, name="lorafold-engine", daemon=True)
            self._thread.start()

    def drain(self) -> None:
        with self._changed:
            self._draining = True

    def stop(self, timeout: float | None = None) -> None:
        with self._changed:
            self._draining = self._stopping = True
            self._changed.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    @property
    def error(self) -> Exception | None:
        return self._error

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def load(self) -> Load:
        with self._changed:
            running, waiting = self.running(), list(self._waiting)
        return Load(
            len(running),
            len(waiting),
            self.used,
            tuple(dict.fromkeys(name for r in running for name in r.mix)),
            tuple(dict.fromkeys(name for r in waiting for name in r.mix)),
        )

    # The thread

    def _check_alive(self) -> None:
        if self._error is not None:
            raise DownError(f"the engine has failed: {self._error}")
        if self._thread is None or self._stopping:
            raise DownError("the engine is not running")

    def _check_up(self) -> None:
        self._check_alive()
        if self._draining:
            raise DownError("the server is ending, and takes no more requests")

    def _run(self) -> None:
        try:
            with torch.no_grad():  # in inference mode, what is attached couldn't be changed later
                self.begin()
                while self._wait():
                    self._call()
                    self._drop()
                    self.step()
            self._end(DownError("the server has ended"))
        except Exception as error:  # noqa: BLE001  (whatever it is, everybody is told)
            with self._changed:
                self._error = error
            self._end(DownError(f"the engine has failed: {type(error).__name__}: {error}"))

    def _wait(self) -> bool:
        """Until there is something to do; False when it is to end."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._stopping
                    or self._waiting
                    or self._calls
                    or self._cancelled
                    or self.running()
                )
            )
            return not self._stopping

    def _call(self) -> None:
        while True:
            with self._changed:
                if not self._calls:
                    return
                function, future = self._calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except Exception as error:  # noqa: BLE001  (its caller's)
                future.set_exception(error)

    def _drop(self) -> None:
        """Let go of what was cancelled."""
        with self._changed:
            gone, self._cancelled = self._cancelled, set()
            if not gone:
                return
            told = [r for r in self._waiting if r in gone]
            self._waiting = deque(r for r in self._waiting if r not in gone)
        for request in [r for r in self.running() if r in gone]:
            self.leave(request)
            told.append(request)
        for request in told:
            request.told(Piece(reason="cancelled"))

    def _end(self, error: LorafoldError) -> None:
        """Tell everybody that there is no more."""
        with self._changed:
            told = [*self.running(), *self._waiting]
            calls = list(self._calls)
            self._waiting.clear()
            self._calls.clear()
            self._cancelled.clear()
            for request in self.running():
                self.leave(request)
        for _, future in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        for request in told:
            request.told(Piece(reason="error", error=error))
