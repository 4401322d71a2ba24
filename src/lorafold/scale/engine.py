"""Who does the work: this process, or whatever executor is given, with the same results.

A task is a pure function of its inputs, which can be pickled. It is given to an executor by its
name in a work directory, where its result is left: so nothing large goes through an executor, and
what is done stays done. Tasks are sent ahead, results come in the order of the tasks. What
dies, hangs or is refused a read for the moment is tried again, and named where that does not help.
"""

from __future__ import annotations

import contextlib
import numbers
import os
import pickle
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from ..errors import FileError, MismatchError
from ..thin import threads
from ..words import note
from .keys import key_of
from .work import Shared, WorkDirectory
from .worker import perform

PATIENCE = 3600.0  # seconds that one task may take
_ATTEMPTS = 3  # of a task whose worker dies or hangs
_PAUSE = 0.25  # seconds before a task is sent again, doubled each time
_LEAVING = 10.0  # seconds for what runs to end, after an error
_AHEAD = 64  # tasks that are sent before their results are asked for
_SEEN = 5.0  # seconds until a file that another machine wrote is seen here


@dataclass(frozen=True)
class Task:
    """A function's inputs, and what to call them where it fails.

    Args:
        name: for people. inputs: its arguments, known to `key_of`.
    """

    name: str
    inputs: tuple[Any, ...]


class Engine:
    """Runs tasks in this process; see `Spread` for the other ways.

    Args:
        at_once: tasks that run at the same time, each on one thread of torch as in any worker, so
            that it rounds alike; None: one after another, on the threads that the caller has.

    Attributes:
        spread: whether tasks are run elsewhere, so that large ones pay.
    """

    spread = False

    def __init__(self, at_once: int | None = None) -> None:
        self._at_once = at_once

    def map(self, function: Callable[..., Any], tasks: Iterable[Task]) -> Iterator[Any]:
        """The results of a function of the module level, in order."""
        if self._at_once is None or self._at_once == 1:
            for task in tasks:
                with threads(self._at_once):
                    result = function(*task.inputs)
                yield result
            return
        with ThreadPoolExecutor(self._at_once, "task") as pool:
            sent: deque[Future[Any]] = deque()
            try:
                for task in tasks:
                    sent.append(pool.submit(_alone, function, task.inputs))
                    if len(sent) > self._at_once:
                        yield sent.popleft().result()
                while sent:
                    yield sent.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def share(self, value: Any) -> Held | Shared:
        """What many tasks use; they get it by its `get`."""
        return Held(value)


def _alone(function: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    with threads(1):
        return function(*inputs)


@dataclass(frozen=True)
class Held:
    """What tasks share in one process."""

    value: Any

    def get(self) -> Any:
        """It."""
        return self.value


class Spread(Engine):
    """Runs tasks by an executor, through a work directory.

    Args:
        executor: what runs `perform`. work: the directory, which every worker sees.
        patience: seconds that a task may take.
    """

    spread = True

    def __init__(self, executor: Executor, work: WorkDirectory, patience: float = PATIENCE) -> None:
        self._executor, self._work, self._patience = executor, work, patience
        self._ahead = 1 if isinstance(executor, _Here) else _AHEAD
        self._under_way: set[Future[Any]] = set()

    def map(self, function: Callable[..., Any], tasks: Iterable[Task]) -> Iterator[Any]:
        source, ahead = iter(tasks), deque[_Sent]()
        try:
            while True:
                while len(ahead) < self._ahead and (task := next(source, None)) is not None:
                    key = key_of((function, task.inputs))
                    # Tasks of the same inputs are one.
                    same = next((other for other in ahead if other.key == key), None)
                    ahead.append(same or _Sent(task, key))
                    self._send(function, ahead[-1])
                if not ahead:
                    return
                self._finish(function, ahead[0])
                yield self._result(function, ahead.popleft())
        finally:
            for one in ahead:
                if one.future is not None:
                    one.future.cancel()

    def _result(self, function: Callable[..., Any], one: _Sent) -> Any:
        """What a task left; one that was damaged on the disk since is run once more."""
        try:
            return self._work.result(one.key)
        except FileError:
            if self._work.is_done(one.key):  # it is there, and can't be read
                raise
        one.done = False
        self._finish(function, one)
        return self._work.result(one.key)

    def share(self, value: Any) -> Shared:
        return self._work.share(key_of(value), value)

    def stop(self) -> None:
        """After an error: take back what was sent, and wait a while for what runs."""
        wait([one for one in list(self._under_way) if not one.cancel()], _LEAVING)

    def _send(self, function: Callable[..., Any], one: _Sent) -> None:
        if one.done or one.future is not None:
            return
        one.done = self._work.is_done(one.key)
        if not one.done:
            self._work.put_task(one.key, function, one.task.inputs)
            try:
                future = self._executor.submit(perform, os.fspath(self._work.path), one.key)
            except Exception as e:  # it was shut down, or its workers can't be started
                why = str(e) or type(e).__name__
                raise FileError(f"the executor takes no tasks: {why}") from e
            if not hasattr(future, "add_done_callback"):
                raise FileError(f"the executor's submit gives no Future, but {future!r:.80}")
            one.future = future
            self._under_way.add(one.future)
            one.future.add_done_callback(self._under_way.discard)

    def _finish(self, function: Callable[..., Any], one: _Sent) -> None:
        """Wait for a task; where that fails for reasons that are not its own, send it again."""
        for attempt in range(_ATTEMPTS):
            if one.done:
                break
            self._send(function, one)
            if one.future is None:
                break
            try:
                raised = one.future.result(self._patience + 60)
            except (Exception, CancelledError) as e:
                problem = str(e) or type(e).__name__
                if isinstance(e, TimeoutError):
                    problem = f"it did not answer within {self._patience:g} s"
                one.future.cancel()
                one.future = None
                if attempt == _ATTEMPTS - 1:
                    raise FileError(
                        f"{one.task.name} was given up after {_ATTEMPTS} attempts: {problem}"
                    ) from e
                note(f"{one.task.name} is tried again: {problem}")
                time.sleep(_PAUSE * 2**attempt)
                continue
            if raised is not None:
                raise _raised(raised)
            one.done = True
        one.future = None
        self._await_file(one)
        self._work.drop_task(one.key)

    def _await_file(self, one: _Sent) -> None:
        limit = time.monotonic() + _SEEN
        while not self._work.is_done(one.key):
            if time.monotonic() > limit:
                raise FileError(
                    f"{one.task.name} is done, but its result is not in {self._work.path}: give "
                    "work= on storage that all machines have at the same path"
                )
            time.sleep(0.05)


def _raised(found: Any) -> BaseException:
    """What a task raised, as `perform` gives it."""
    with contextlib.suppress(Exception):
        error = pickle.loads(found)
        if isinstance(error, BaseException):
            return error
    return FileError(f"the executor gives back what no task gave: {found!r:.80}")


@dataclass
class _Sent:
    task: Task
    key: str
    future: Future[Any] | None = None
    done: bool = False


class _Here(Executor):
    """This process, which so leaves its results in a work directory."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@dataclass(frozen=True)
class Crew:
    """Who is to do the work, as a user says it.

    Args:
        executor: an `Executor`, "ray", or "ray://host:port". workers: processes on this machine.
        work: a directory that keeps finished tasks.

    Raises:
        MismatchError: an executor that is none, workers below 1, or both given.
    """

    executor: Executor | str | None = None
    workers: int | None = None
    work: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        e, workers = self.executor, self.workers
        ray = isinstance(e, str) and (e == "ray" or e.startswith("ray://"))
        if e is not None and not ray and not isinstance(e, Executor):
            raise MismatchError(
                "executor must be a concurrent.futures.Executor, 'ray' or 'ray://host:port', found "
                f"{e!r:.80}"
            )
        whole = isinstance(workers, numbers.Integral) and not isinstance(workers, bool)
        if workers is not None and not (whole and workers >= 1):
            raise MismatchError(f"workers must be a whole number of at least 1, found {workers!r}")
        if workers is not None and e is not None:
            raise MismatchError("give executor= or workers=, not both")
        work = self.work
        if work is None:
            return
        text = os.fspath(work) if isinstance(work, str | os.PathLike) else ""
        if not isinstance(text, str) or not text or "://" in text:
            raise MismatchError(
                f"work must be a folder that all workers see at one path, found {work!r:.80}"
            )

    @contextlib.contextmanager
    def engine(
        self, run: Any = None, patience: float = PATIENCE, at_once: int | None = None
    ) -> Iterator[Engine]:
        """What runs tasks within the block.

        Args:
            run: what says which run a work directory belongs to, known to `key_of`.
            at_once: see `Engine`, where nobody else works.

        Raises:
            FileError: a work directory of another run, or an executor that does not answer.
        """
        if self.executor is None and self.workers is None and self.work is None:
            yield Engine(at_once)
            return
        with contextlib.ExitStack() as stack:
            if self.work is None:
                # A task that nobody waits for any more may still write to it.
                folder = tempfile.TemporaryDirectory(
                    prefix="lorafold-work-", ignore_cleanup_errors=True
                )
                work = WorkDirectory(stack.enter_context(folder))
            else:
                work = WorkDirectory(self.work, key_of(run))
            with contextlib.ExitStack() as own:
                spread = Spread(self._executor(own, patience), work, patience)
                stack.callback(spread.stop)
                yield spread

    def _executor(self, stack: contextlib.ExitStack, patience: float) -> Executor:
        if isinstance(self.executor, Executor):
            return self.executor
        own: Executor = _Here()
        if self.workers is not None:
            from .local import LocalWorkers

            own = LocalWorkers(self.workers, patience, here=True)
        elif self.executor is not None:
            from .ray import RayExecutor

            own = RayExecutor(self.executor)
        stack.callback(own.shutdown)
        return own
