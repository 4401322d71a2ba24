"""Killing an operation at every call that changes the disk, and looking at what is left.

The operation runs in a forked child in which the functions of `os` that change the disk count their
calls; the n-th one ends the process, or fails. `everywhere` does so for n = 1, 2, … until the
operation gets through. What has been written stays (a killed process loses no page cache), so this
says nothing on power cuts: for those, `unsafe_renames` checks the order of writes and flushes.

Keep torch's thread pool out of the operation (`torch.set_num_threads(1)`, or numpy only): threads
do not survive a fork.
"""

import builtins
import contextlib
import errno
import functools
import io
import os
import traceback
import warnings

from lorafold.files import atomic

CHANGES = [
    *("write", "pwrite", "writev", "pwritev", "sendfile", "copy_file_range"),
    *("fsync", "fdatasync", "ftruncate", "truncate", "chmod", "fchmod"),
    *("replace", "rename", "renames", "link", "symlink", "unlink", "remove", "rmdir", "mkdir"),
]
WRITES = {"write", "pwrite"}
COMPLETED, REACHED, SURVIVED, BROKEN = 0, 77, 78, 1
MODES = (
    "kill",  # the process ends before the n-th call
    "torn",  # as kill, but half of what the n-th call writes is written
    "fail once",  # the n-th call raises OSError: disk full
    "fail on",  # the n-th call and all later ones do: the disk is gone
)


def everywhere(prepare, operation, check, mode="kill"):
    """Run an operation once per call that changes the disk, with that call being the fatal one.

    Args:
        prepare: () -> state; makes what the operation works on, anew for every run.
        operation: (state) -> None.
        check: (state, n) -> None; asserts on what is left after the n-th call was fatal. Its last
            call, after the run that got through, has n None.
        mode: one of `MODES`.

    Returns:
        The number of calls.
    """
    n = 1
    while True:
        state = prepare()
        outcome = run_with_kill_at(n, functools.partial(operation, state), mode)
        check(state, None if outcome == COMPLETED else n)
        if outcome == COMPLETED:
            return n - 1
        n += 1


def run_with_kill_at(n, operation, mode="kill"):
    """Run `operation` in a child whose n-th call that changes the disk is fatal.

    Returns:
        COMPLETED: there are fewer calls than n. REACHED: it was killed there, or raised.
        SURVIVED: the call failed, and the operation got through in spite of it.

    Raises:
        AssertionError: with the child's traceback, when it failed on its own account.
    """
    source, sink = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns of forks under threads; the child doesn't touch any.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        _run_child(n, operation, mode, sink)
    os.close(sink)
    with os.fdopen(source) as report:
        text = report.read()
    outcome = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert outcome in (COMPLETED, REACHED, SURVIVED), f"the child failed ({outcome}):\n{text}"
    return outcome


def _run_child(n, operation, mode, sink):
    write = os.write
    count = 0

    def reached(name, do, args):
        nonlocal count
        count += 1
        if mode.startswith("fail"):
            if count == n or (count > n and mode == "fail on"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif count == n:
            if mode == "torn" and name in WRITES:
                do(args[0], memoryview(args[1])[: len(args[1]) // 2], *args[2:])
            os._exit(REACHED)

    try:
        _intercept(reached)
        operation()
        os._exit(COMPLETED if count < n else SURVIVED)
    except BaseException:  # noqa: BLE001 - whatever it is, a forked child must not go on
        if mode.startswith("fail") and count >= n:
            os._exit(REACHED)
        write(sink, traceback.format_exc().encode())
        os._exit(BROKEN)


def _intercept(before):
    """Have `before(name, function, args)` called before every call that changes the disk.

    Returns:
        A context manager that undoes it.
    """

    def wrap(owner, name, changes=lambda *args, **kwargs: True):
        function = getattr(owner, name)

        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            if changes(*args, **kwargs):
                before(name, function, args)
            return function(*args, **kwargs)

        setattr(owner, name, wrapped)
        undo.callback(setattr, owner, name, function)

    undo = contextlib.ExitStack()
    for name in CHANGES:
        if hasattr(os, name):
            wrap(os, name)
    wrap(os, "open", lambda path, flags, *a, **k: flags & (os.O_CREAT | os.O_TRUNC))
    for owner in (builtins, io):
        wrap(owner, "open", lambda file, mode="r", *a, **k: set(mode) & set("wax+"))
    wrap(atomic, "_renameat2")
    return undo


def trace(operation):
    """The calls of `operation` that change the disk, in order: (name, path, ...) each."""
    calls = []

    def before(name, function, args):
        if isinstance(args[0], int):  # a file descriptor
            calls.append((name, os.readlink(f"/proc/self/fd/{args[0]}")))
        else:
            paths = [os.fsdecode(a) for a in args[:2] if isinstance(a, str | bytes | os.PathLike)]
            calls.append((name, *paths))

    with _intercept(before):
        operation()
    return calls


def unsafe_renames(calls):
    """What a power cut could take: renames of unflushed files, and ones not flushed afterwards.

    Args:
        calls: as `trace` gives them.
    """
    found = []
    unflushed, names_to_flush = set(), set()
    for name, *paths in calls:
        if name in WRITES:
            unflushed.add(paths[0])
        elif name == "fsync":
            unflushed.discard(paths[0])
            names_to_flush.discard(paths[0])
        elif name in ("rename", "replace", "_renameat2"):
            source, target = paths
            lost = [p for p in unflushed if p == source or p.startswith(source + os.sep)]
            found += [f"{p} not flushed before {target} has its name" for p in lost]
            names_to_flush.add(os.path.dirname(target))
    return found + [f"{p} not flushed after a rename in it" for p in names_to_flush]
