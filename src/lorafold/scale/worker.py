"""Running tasks where they are sent: `perform` is all that an executor is asked for.

As a process (`main`) it takes tasks from its standard input, a line each, until that ends.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pickle
import sys
import traceback
from typing import Any

from ..errors import FileError
from ..thin import threads
from .work import WorkDirectory


def perform(folder: str, key: str) -> bytes | None:
    """Run a task of a work directory, and leave its result there.

    Args:
        folder: the work directory. key: of the task.

    Returns:
        What it raised, pickled; None if nothing.
    """
    try:
        if not os.path.isdir(folder):
            raise FileError(
                f"the work directory {folder} is not there for a worker: give work= on storage "
                "that all machines have at the same path"
            )
        work = WorkDirectory(folder)
        if work.is_done(key):
            return None
        function, inputs = work.task(key)
        with threads(1):
            work.finish(key, function(*inputs))
    except Exception as e:  # noqa: BLE001 (the driver raises it)
        return _pickled(e)
    return None


def _pickled(e: Exception) -> bytes:
    e.__traceback__ = None  # frames can't be pickled
    try:
        raw = pickle.dumps(e)
        pickle.loads(raw)
    except Exception:  # noqa: BLE001 (as its own class may raise when pickled)
        raw = pickle.dumps(RuntimeError("".join(traceback.format_exception_only(e)).strip()))
    return raw


def main() -> None:
    """Serve tasks from standard input: [folder, key] as JSON; the answer is hexadecimal. An empty
    one comes first, when what takes long to import is there.
    """
    answers = os.dup(1)
    os.dup2(2, 1)  # what else is printed must not be taken for an answer
    with threads(1):  # which imports torch
        gc.freeze()
        gc.enable()
    with contextlib.suppress(BrokenPipeError):  # who asked is gone
        _answer(answers, b"")
        for line in sys.stdin:
            task: list[Any] = json.loads(line)
            _answer(answers, perform(*task) or b"")


def _answer(number: int, found: bytes) -> None:
    line = memoryview(found.hex().encode() + b"\n")
    while line:
        line = line[os.write(number, line) :]
