"""Who changes a library when: one lock for the change, and a queue before it.

    .lock           locked by whoever changes the library; never removed
    .lock.<n>.wait  a ticket: somebody waits, and has it locked; the lowest number goes first

A lock by itself goes to whoever asks at the right moment, and who has just let go of it is always
first to ask. So who finds it taken draws the next number, and waits until nobody with a lower one
does. Locks end with their process: the ticket of one that was killed can be locked by the next in
the queue, which removes it. The queue only says who may try: that one at a time changes the library
is ensured by the one lock.

Locks (flock) hold among the processes of one machine, and on network file systems that pass them
on. Where they don't, a change finds at its end that another came between, and fails.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import FileError
from ...files.atomic import CREATE_FLAGS, HAS_LOCKS, READ_FLAGS, is_still_at, try_lock, unlock

LOCK = ".lock"
TICKET = re.compile(re.escape(LOCK) + r"\.([0-9]{12})\.wait")
TIMEOUT = 60.0  # seconds to wait for one's turn, unless something else is said

# Never through a link, which may lead to another library's lock; never waiting for a FIFO.
_FLAGS = os.O_RDWR | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_PAUSE = 0.004  # seconds between looks, times the length of the queue ahead
_LONGEST_PAUSE = 0.1


@contextlib.contextmanager
def turn(folder: Path, timeout: float) -> Iterator[None]:
    """Wait for one's turn to change what is in `folder`, and have it to the end of the block.

    Args:
        folder: a library's. timeout: seconds to wait.

    Raises:
        FileError: it did not come, the folder is gone or can't be written, or it can't be locked.
    """
    deadline = time.monotonic() + timeout
    ticket: _Ticket | None = None
    try:
        while True:
            ahead = _ahead(folder, ticket)
            descriptor = None if ahead else _locked(folder)
            if descriptor is not None:
                break
            if ticket is not None and not ticket.counts():
                ticket.give_back()
                ticket = None
            ticket = ticket or _drawn(folder)
            left = deadline - time.monotonic()
            if left <= 0:
                raise FileError(
                    f"{folder} is being changed by another process (or by another transaction of "
                    f"this one); waited {timeout:g} s for the turn, and timeout= can say longer"
                )
            time.sleep(min(_PAUSE * (1 + ahead), _LONGEST_PAUSE, left))
    finally:
        if ticket is not None:
            ticket.give_back()
    try:
        yield
    finally:
        # Closing alone would leave the lock with a child process forked meanwhile.
        unlock(descriptor)
        os.close(descriptor)


# The lock


def _locked(folder: Path) -> int | None:
    """The lock, held; None where somebody else holds it."""
    path = folder / LOCK
    while True:
        try:
            descriptor = os.open(path, _FLAGS | os.O_CREAT, 0o666)
        except OSError as e:
            if e.errno == errno.ELOOP:
                _remove_link(path)
                continue
            raise FileError(f"{folder} can't be changed: {e.strerror}") from e
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise FileError(f"{path} is no regular file: remove it")
            held = try_lock(descriptor)
            if held and is_still_at(descriptor, path):
                return descriptor
        except OSError as e:
            os.close(descriptor)
            raise FileError(f"{folder} can't be locked: {e.strerror}") from e
        except FileError:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if not held:
            return None
        # Of a folder that was replaced as we waited: lock the new one.


def _remove_link(path: Path) -> None:
    """Remove a link in the lock's place, but nobody's lock that has come there meanwhile."""
    folder = os.open(path.parent, READ_FLAGS)
    try:
        while not try_lock(folder):
            time.sleep(_PAUSE)
        if not path.is_symlink():
            if not os.path.isfile(path):
                raise FileError(f"{path} is no regular file: remove it")
            return
        os.unlink(path)
    except OSError as e:
        raise FileError(f"{path} is a link, which locks nothing: {e.strerror}") from e
    finally:
        unlock(folder)
        os.close(folder)


# The queue


@dataclass
class _Ticket:
    """A place in the queue, as long as its file is there and locked."""

    path: Path
    number: int
    descriptor: int

    def counts(self) -> bool:
        """Whether it is still there; not where the folder was replaced by another."""
        return is_still_at(self.descriptor, self.path)

    def give_back(self) -> None:
        """Leave the queue."""
        with contextlib.suppress(OSError):  # one that stays is removed by the next
            if self.counts():
                os.unlink(self.path)
        unlock(self.descriptor)
        os.close(self.descriptor)


def _numbers(folder: Path) -> list[int]:
    try:
        names = [name for name in os.listdir(folder) if name.startswith(LOCK)]
    except OSError:  # gone, or one may not look around: the lock will say
        return []
    return sorted(int(match[1]) for match in map(TICKET.fullmatch, names) if match)


def _path(folder: Path, number: int) -> Path:
    return folder / f"{LOCK}.{number:012}.wait"


def _ahead(folder: Path, ticket: _Ticket | None) -> int:
    """How many are ahead, all of them where one has no ticket; the nearest of them is alive."""
    while HAS_LOCKS:
        numbers = [n for n in _numbers(folder) if ticket is None or n < ticket.number]
        if not numbers or not _is_dead(_path(folder, numbers[-1])):
            return len(numbers)
    return 0


def _is_dead(path: Path) -> bool:
    """Whether nobody waits with a ticket, which then is removed."""
    try:
        descriptor = os.open(path, _FLAGS)
    except FileNotFoundError:
        return True
    except OSError as e:
        if e.errno != errno.ELOOP:
            return False  # of another user, it seems, who may be alive
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # a link is nobody's
        return True
    try:
        if not try_lock(descriptor):
            return False
        # Who holds the lock of what is there is the only one who may remove it.
        if is_still_at(descriptor, path):
            os.unlink(path)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _drawn(folder: Path) -> _Ticket:
    """The next ticket."""
    while True:
        number = max(_numbers(folder), default=0) + 1
        path = _path(folder, number)
        try:
            descriptor = os.open(path, CREATE_FLAGS, 0o666)
        except FileExistsError:
            continue
        except OSError as e:
            raise FileError(f"{folder} can't be changed: {e.strerror}") from e
        try:
            if try_lock(descriptor) and is_still_at(descriptor, path):
                return _Ticket(path, number, descriptor)
        except OSError as e:
            os.close(descriptor)
            raise FileError(f"{folder} can't be locked: {e.strerror}") from e
        os.close(descriptor)  # somebody took it for dead between the two calls
