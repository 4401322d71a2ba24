"""Thread scopes: each thread, and each that starts later, has its count back in any order of ends.

torch's count belongs to a thread; one that is new to torch starts at what any thread set last.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lorafold as lf
from lorafold.fold.coding.record import decode
from lorafold.thin import thin, threads

HOME = 5


class Worker:
    """A thread that does one thing after another, each to its end, and that may be in scopes."""

    def __init__(self):
        self._pool, self._open = ThreadPoolExecutor(1), []

    def do(self, call, *args):
        return self._pool.submit(call, *args).result()

    def enter(self, count):
        self._open.append(threads(count))
        self.do(self._open[-1].__enter__)

    def leave(self):
        self.do(self._open.pop().__exit__, None, None, None)

    def count(self):
        return self.do(torch.get_num_threads)

    def end(self):
        self._pool.shutdown()


@contextmanager
def workers():
    """Makes threads that are new to torch; what torch starts threads at is set back at the end."""
    before = torch.get_num_threads()
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, before)

        def new():
            worker = Worker()
            stack.callback(worker.end)
            return worker

        torch.set_num_threads(HOME)
        yield new


@pytest.mark.parametrize("first_out", [0, 1])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("counts", list(itertools.product([1, 3, HOME], repeat=2)))
def test_two_scopes_overlap(counts, known, first_out):
    with workers() as new:
        pair = new(), new()
        if known:  # a thread that has used torch has a count of its own
            assert [worker.count() for worker in pair] == [HOME, HOME]
        for worker, count in zip(pair, counts, strict=True):
            worker.enter(count)
        assert [worker.count() for worker in pair] == list(counts)
        pair[first_out].leave()
        assert pair[1 - first_out].count() == counts[1 - first_out]
        pair[1 - first_out].leave()
        assert [worker.count() for worker in (*pair, new())] == [HOME] * 3


@pytest.mark.parametrize("first_out", [0, 1])
def test_scopes_within_scopes_overlap(first_out):
    with workers() as new:
        pair = new(), new()
        for count in (1, 4):
            for worker in pair:
                worker.enter(count)
        for worker in (pair[first_out], pair[1 - first_out]):
            worker.leave()
            assert worker.count() == 1
            worker.enter(2)
            worker.leave()
            assert worker.count() == 1
            worker.leave()
        assert [worker.count() for worker in (*pair, new())] == [HOME] * 3


def test_each_of_many_threads_has_its_count_back():
    with workers() as new:
        many = [new() for _ in range(4)]
        for order in itertools.permutations(range(4)):
            for worker in many:
                worker.enter(1)
            late = new()
            late.enter(1)
            for k in order:
                many[k].leave()
            late.leave()
            assert [worker.count() for worker in (*many, late, new())] == [HOME] * 6


def test_a_thread_with_a_count_of_its_own_keeps_it():
    with workers() as new:
        first, other = new(), new()
        assert first.count() == other.count() == HOME  # torch forgets what is set before the first
        other.do(torch.set_num_threads, 3)
        for worker in (first, other):
            worker.enter(1)
        for worker in (first, other):
            worker.leave()
        assert (first.count(), other.count()) == (HOME, 3)


def test_none_leaves_the_count():
    with workers() as new:
        worker = new()
        worker.enter(3)
        worker.enter(None)
        assert worker.count() == 3
        worker.leave()
        worker.leave()
        assert worker.count() == HOME


def test_a_failure_in_a_scope_sets_the_count_back():
    def fail():
        with threads(1):
            raise KeyError

    with workers() as new:
        worker = new()
        with pytest.raises(KeyError):
            worker.do(fail)
        assert worker.count() == HOME


class Counts(TorchDispatchMode):
    """Operations that gave many numbers while the thread had several threads to give them to."""

    def __init__(self):
        super().__init__()
        self.shared = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        first = found[0] if isinstance(found, tuple) else found
        size = first.numel() if isinstance(first, torch.Tensor) else 0
        looks = any(word in str(func) for word in ("view", "detach", "alias"))  # computes nothing
        if torch.get_num_threads() > 1 and not looks and (size >= 1024 or "linalg" in str(func)):
            self.shared.add(str(func))
        return found


UPDATE = {
    "norm": lambda u, v: u.norm(),
    "inner": lambda u, v: u.inner(v),
    "svd": lambda u, v: u.svd(),
    "spectrum": lambda u, v: u.spectrum(),
    "truncate": lambda u, v: u.truncate(rank=2),
    "sum": lambda u, v: lf.Adapter({"m": u}) + lf.Adapter({"m": v}),
    "resize": lambda u, v: lf.Adapter({"m": u}).resize(2),
    "distance": lambda u, v: lf.Adapter({"m": u}).distance(lf.Adapter({"m": v})),
}
LIBRARY = {
    "load": lambda lib, path: lf.load(path),
    "open": lambda lib, path: lf.fold(path).contents,
    "read": lambda lib, path: lib["a"],
    "one module": lambda lib, path: lib.update("a", "m0"),
    "parts": lambda lib, path: lib.contents.parts("a", "m0"),
    "project": lambda lib, path: lib.project(path),
    "verify": lambda lib, path: lib.verify({"a": path}),
    "add": lambda lib, path: lib.add(path, name="b", replace=True),
    "refold": lambda lib, path: lib.refold(0.2),
    "handle": lambda lib, path: next(iter(lib.__lorafold_handles__().values())).load(),
}


def alone(action, *given):
    with workers() as new:
        worker = new()

        def run():
            before = torch.get_num_threads()
            with Counts() as counts:
                action(*given)
            return before, torch.get_num_threads(), counts.shared

        assert worker.do(run) == (HOME, HOME, set())


@pytest.mark.parametrize("action", UPDATE)
def test_thin_algebra_is_on_one_thread(make_update, action):
    alone(UPDATE[action], make_update(256, 128, 8, seed=0), make_update(256, 128, 8, seed=1))


@pytest.mark.parametrize("action", LIBRARY)
def test_a_library_is_read_on_one_thread(make_adapter, tmp_path, action):
    a = make_adapter({"m0": (256, 128), "m1": (256, 128)}, 8)
    lf.save(a, tmp_path / "a")
    lib = lf.fold({"a": tmp_path / "a"}, tmp_path / "lib", tolerance=0.1)
    alone(LIBRARY[action], lib, tmp_path / "a")


def test_what_is_on_several_threads_is_seen():
    """The negative control."""
    with pytest.raises(AssertionError, match="mm"):
        alone(lambda x: x @ x, torch.ones(64, 64))
    alone(thin(lambda x: x @ x), torch.ones(64, 64))


def test_an_error_in_thin_algebra_sets_the_count_back():
    def fail():
        with pytest.raises(lf.FileError):
            thin(decode)(b"\x09", (4, 4), None)
        return torch.get_num_threads()

    with workers() as new:
        assert new().do(fail) == HOME
