"""Turns go round in the order of asking, end with their process, and lock through no link."""

import contextlib
import os
import signal
import threading

import pytest

from lorafold.errors import FileError
from lorafold.files import atomic
from lorafold.fold.store import turns
from lorafold.fold.store.turns import LOCK, turn


def tickets(folder):
    return sorted(name for name in os.listdir(folder) if name != LOCK)


def waiting(folder, count):
    """Until so many wait."""
    while len(tickets(folder)) != count:
        os.sched_yield()


def test_turns_go_round_in_the_order_of_asking(tmp_path):
    """Also for who had the last one, and asks again at once."""
    served = []

    def ask(who):
        with turn(tmp_path, 1000):
            served.append(who)

    threads = [threading.Thread(target=ask, args=[who]) for who in range(4)]
    with turn(tmp_path, 0):
        for k, thread in enumerate(threads):
            thread.start()
            waiting(tmp_path, k + 1)
    ask("again")
    for thread in threads:
        thread.join()
    assert served == [0, 1, 2, 3, "again"]
    assert os.listdir(tmp_path) == [LOCK]


def test_one_at_a_time(tmp_path):
    inside, most = 0, []

    def many():
        nonlocal inside
        for _ in range(20):
            with turn(tmp_path, 1000):
                inside += 1
                most.append(inside)
                os.sched_yield()
                inside -= 1

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 80
    assert os.listdir(tmp_path) == [LOCK]


def child(operation):
    """Fork one that says when it is there, and waits to be killed."""
    ready, said = os.pipe()
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            operation(lambda: (os.write(said, b"!"), signal.pause()))
        os._exit(1)
    return pid, lambda: os.read(ready, 1)


def killed(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_the_turn_of_who_is_killed_is_over(tmp_path):
    def hold(pause):
        with turn(tmp_path, 0):
            pause()

    pid, there = child(hold)
    there()
    with pytest.raises(FileError, match="is being changed by another process"), turn(tmp_path, 0):
        pass
    assert os.listdir(tmp_path) == [LOCK]  # who gives up leaves the queue
    killed(pid)
    with turn(tmp_path, 0):
        pass


def test_the_place_of_who_is_killed_is_free(tmp_path):
    def wait(pause):
        with turn(tmp_path, 1000):
            pass

    with turn(tmp_path, 0):
        pid, _ = child(wait)
        waiting(tmp_path, 1)
        killed(pid)
        assert len(tickets(tmp_path)) == 1  # nobody has looked yet
    with turn(tmp_path, 0):
        assert os.listdir(tmp_path) == [LOCK]


def test_who_waits_in_a_folder_that_is_replaced_waits_in_the_new_one(tmp_path, monkeypatch):
    old, new = tmp_path / "lib", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    waits = []
    with contextlib.ExitStack() as first:
        first.enter_context(turn(old, 0))

        def wait(seconds):
            waits.append(sorted(os.listdir(old)))
            if len(waits) == 1:
                old.rename(tmp_path / "away")
                new.rename(old)
            assert len(waits) < 5

        monkeypatch.setattr(turns.time, "sleep", wait)
        with turn(old, 1000):
            assert os.listdir(old) == [LOCK]
    assert waits[0] == [LOCK, f"{LOCK}.000000000001.wait"]


def test_a_lock_is_no_link(tmp_path):
    """Two libraries whose locks are one would wait for each other; what it leads to stays."""
    far = tmp_path / "far"
    far.mkdir()
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / LOCK).symlink_to(far / LOCK)
    (tmp_path / "near" / f"{LOCK}.000000000007.wait").symlink_to(far / "ticket")
    (far / "ticket").write_text("")
    for dangling in (True, False):
        if not dangling:
            (tmp_path / "near" / LOCK).unlink()
            (tmp_path / "near" / LOCK).symlink_to(far / LOCK)
            (far / LOCK).write_text("x")
        with turn(tmp_path / "near", 0), turn(far, 0):
            assert not (tmp_path / "near" / LOCK).is_symlink()
        assert (tmp_path / "near" / LOCK).stat().st_size == 0
    assert (far / LOCK).read_text() == "x"
    assert os.listdir(tmp_path / "near") == [LOCK]
    assert (far / "ticket").exists()


@pytest.mark.parametrize("kind", ["fifo", "directory", "device"])
def test_what_is_no_file_is_no_lock(tmp_path, kind):
    path = tmp_path / LOCK
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/null")
    if kind == "device":  # a link is replaced, wherever it leads
        with turn(tmp_path, 0):
            assert path.is_file()
        return
    with pytest.raises(FileError, match=r"no regular file|Is a directory"), turn(tmp_path, 0):
        pass


def test_systems_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "fcntl", None)
    monkeypatch.setattr(turns, "HAS_LOCKS", False)
    with turn(tmp_path, 0), turn(tmp_path, 0):
        assert os.listdir(tmp_path) == [LOCK]


def test_a_folder_that_can_not_be_written_says_so(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(FileError, match="can't be changed: Permission denied"), turn(tmp_path, 0):
        pass
