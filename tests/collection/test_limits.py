"""Thread scopes: each thread, and each that starts later, has its count back in any order of ends.

torch's count belongs to a thread; one that is new to torch starts at what any thread set last.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
import torch

from lorafold.collection.limits import threads

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
