"""Workers on this machine: processes of one interpreter each, replaced where they die or hang.

Not `ProcessPoolExecutor`: that imports the user's main module in every process, which runs a script
without a guard again, and when one process dies it fails all that runs without saying whose fault
it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import IO, Any

from .worker import perform

_LEAVING = 10.0  # seconds for a task of this process to end
_START_WITHIN = 300.0  # seconds for a process to import what it needs
# Of what is imported nothing is garbage, and to look for some takes a tenth of the time.
_START = (
    "import gc, sys; gc.disable(); sys.path[:] = {path!r}; "
    "from lorafold.scale.worker import main; main()"
)


class WorkerDiedError(Exception):
    """The process that ran a task ended."""


class LocalWorkers(Executor):
    """Runs `perform` in processes of this machine.

    Args:
        count: processes. patience: seconds that a task may take before its process is killed.
        here: this process is one of them, if there are several; it has imported already what the
            others need a second or two for. What takes too long here is left to the others, and
            what ends its process ends this one.
    """

    def __init__(self, count: int, patience: float, here: bool = False) -> None:
        self.count, self._patience = count, patience
        self._threads = ThreadPoolExecutor(count, "worker")
        self._idle: SimpleQueue[_Process | _ThisProcess] = SimpleQueue()
        self._all: set[_Process | _ThisProcess] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._asked = 0  # tasks that are neither done nor taken back
        self._this = _ThisProcess() if here and count > 1 else None
        if self._this is not None:
            self._all.add(self._this)
            self._idle.put(self._this)
        self._grow(min(count, os.cpu_count() or 1))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if fn is not perform or kwargs:
            raise TypeError("these workers run tasks of a work directory alone")
        with self._lock:
            self._asked += 1
        self._grow(min(self.count, self._asked))
        future = self._threads.submit(self._run, args)
        future.add_done_callback(self._answered)
        return future

    def _answered(self, _: Future[Any]) -> None:
        with self._lock:
            self._asked -= 1

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes, at once."""
        with self._lock:
            self._closed = True
            everyone = set(self._all)
        if self._this is not None:
            # Given up or not: a process can't end while a thread of its own is within torch.
            everyone.add(self._this)
        for process in everyone:
            process.kill()
        self._threads.shutdown(wait, cancel_futures=True)
        for process in everyone:
            process.close()

    def _grow(self, wanted: int) -> None:
        """Start what lacks of so many: one for each core at once, more where there are tasks."""
        with self._lock:
            while len(self._all) < wanted and not self._closed:
                process = _Process()
                self._all.add(process)
                # Nobody waits for it while others are idle.
                threading.Thread(target=self._begin, args=(process,), daemon=True).start()

    def _begin(self, process: _Process) -> None:
        process.begin()
        self._idle.put(process)

    def _run(self, task: tuple[Any, ...]) -> bytes | None:
        process = self._idle.get()
        try:
            found = process.ask(task, self._patience)
        except BaseException:
            with self._lock:
                self._all.discard(process)
            process.give_up()
            self._grow(min(self.count, len(self._all) + 1))
            raise
        self._idle.put(process)
        return found


class _ThisProcess:
    """A thread of this process in the place of another, a new one for each task."""

    def __init__(self) -> None:
        self._answers: SimpleQueue[bytes | WorkerDiedError | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def ask(self, task: tuple[Any, ...], patience: float) -> bytes | None:
        """Run a task; as `_Process.ask`."""
        self._thread = threading.Thread(
            target=lambda: self._answers.put(perform(*task)), daemon=True, name="task"
        )
        self._thread.start()
        try:
            answer = self._answers.get(timeout=patience)
        except Empty:
            raise WorkerDiedError(f"this process did not answer within {patience:g} s") from None
        if isinstance(answer, WorkerDiedError):
            raise answer
        return answer

    def give_up(self) -> None:
        """A thread can't be ended: what it finds when all is done is a result like others."""

    def kill(self) -> None:
        """Whoever waits for its answer is told."""
        self._answers.put(WorkerDiedError("this process was stopped"))

    def close(self) -> None:
        """Wait a while for a task that is under way."""
        if self._thread is not None:
            self._thread.join(_LEAVING)


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """What is started in the block never gets Ctrl-C, which is for who started it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Process:
    """One process, asked one thing at a time."""

    def __init__(self) -> None:
        # Thin algebra in each, and its threads would only wait for one another.
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with _no_interrupt():
            self._popen = subprocess.Popen(
                [sys.executable, "-c", _START.format(path=sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=env,
            )
        self._failed: WorkerDiedError | None = None

    def begin(self) -> None:
        """Wait until it has imported what it needs; whoever asks is told if that fails."""
        assert self._popen.stdout is not None
        try:
            self._answer(self._popen.stdout, _START_WITHIN)
        except WorkerDiedError as e:
            self._failed = e

    def ask(self, task: tuple[Any, ...], patience: float) -> bytes | None:
        """Have it run a task.

        Raises:
            WorkerDiedError: it ended, or took too long and was ended.
        """
        stdin, stdout = self._popen.stdin, self._popen.stdout
        assert stdin is not None
        assert stdout is not None
        if self._failed is not None:
            raise self._failed
        with contextlib.suppress(OSError):
            stdin.write(json.dumps(task) + "\n")
            stdin.flush()
        return bytes.fromhex(self._answer(stdout, patience)) or None

    def _answer(self, stdout: IO[str], patience: float) -> str:
        hung = threading.Event()

        def end() -> None:
            hung.set()
            self.kill()

        timer = threading.Timer(patience, end)
        timer.daemon = True
        timer.start()
        try:
            answer = stdout.readline()
        except (OSError, ValueError):  # it was closed meanwhile
            answer = ""
        finally:
            timer.cancel()
        if not answer.endswith("\n"):
            why = f"did not answer within {patience:g} s" if hung.is_set() else self._end()
            raise WorkerDiedError(f"process {self._popen.pid} {why}")
        return answer

    def _end(self) -> str:
        try:
            code = self._popen.wait(10)
        except subprocess.TimeoutExpired:
            return "closed its output"
        return f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"

    def give_up(self) -> None:
        """End it, and let go of it."""
        self.kill()
        self.close()

    def kill(self) -> None:
        """End it; whoever waits for its answer is told."""
        self._popen.kill()

    def close(self) -> None:
        """Let go of one that was ended."""
        self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
