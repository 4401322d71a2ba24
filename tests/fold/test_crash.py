"""Killed at any moment, a library is in the state before or after, and whole.

What is killed is a forked child: torch keeps to one thread, and what it works on is made before.
"""

import contextlib
import os
import random
import shutil
import signal
import time
import warnings

import pytest
import torch

import lorafold as lf

SHAPES = {"q": (16, 24)}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No flushing, which takes time and shows in no test: the calls are counted all the same."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def adapters(make_adapter):
    extras = {"head": torch.arange(3.0)}
    return {f"a{i}": make_adapter(SHAPES, 2, seed=i, extras=extras) for i in range(6)}


@pytest.fixture(scope="module")
def start(tmp_path_factory, adapters):
    """A library of three, which every run gets a copy of."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("start") / "lib"
    with lf.fold(some(adapters, "a0", "a1", "a2"), path, tolerance=0.1) as lib:
        lib.remove("a1")  # leaves what a real history leaves: a lock and a shard of several rows
        lib.add(adapters["a1"], "a1")
    return path


def some(adapters, *names):
    return {n: adapters[n] for n in names}


def state_at(path):
    """What a fresh look at the disk says, checksums verified; None where nothing is there."""
    if not path.exists():
        return None
    with lf.Library.open(path) as lib:
        lib.verify()
        for name in lib:  # every record decodes
            assert lib[name].norm() > 0
            assert lib[name].extras["head"].tolist() == [0, 1, 2]
        return {name: (lib.entry(name)["digest"], round(lib.error(name), 9)) for name in lib}


def leftovers(path):
    """Files in the folder, beside those that the manifest names."""
    with lf.Library.open(path) as lib:
        store = lib.contents.store
        parts = {part.file.name for part in store.manifest.parts}
        named = {"library.json", ".library.json.gz", ".lock", *store.shards, *parts}
    return set(os.listdir(path)) - named


def fold_anew(path, adapters):
    lf.fold(some(adapters, "a3", "a4"), path, tolerance=0.2)


def fold_over(path, adapters):
    lf.fold(some(adapters, "a3", "a4"), path, tolerance=0.2, overwrite=True)


def add(path, adapters):
    lf.Library.open(path).add(adapters["a3"], "new")


def replace(path, adapters):
    lf.Library.open(path).add(adapters["a3"], "a0", replace=True)


def remove(path, adapters):
    lf.Library.open(path).remove("a0")


def remove_and_merge(path, adapters):
    lib = lf.Library.open(path)
    for name in ("a0", "a2"):
        lib.remove(name)


def refold(path, adapters):
    lf.Library.open(path).refold(tolerance=0.3)


def refold_from_sources(path, adapters):
    lf.Library.open(path).refold(sources=some(adapters, "a0", "a1", "a2"), tolerance=0.02)


def save_over(path, adapters):
    lf.fold(some(adapters, "a3", "a4"), tolerance=0.2).save(path, overwrite=True)


CHANGES = [fold_over, add, replace, remove, refold, refold_from_sources, save_over]


@pytest.mark.parametrize(
    ("operation", "mode"),
    [
        *((operation, "kill") for operation in (fold_anew, *CHANGES, remove_and_merge)),
        *((operation, "torn") for operation in (fold_anew, add, refold)),
    ],
)
def test_a_kill_at_every_call_leaves_the_old_state_or_the_new(
    tmp_path, start, adapters, kill_points, operation, mode
):
    runs = iter(range(10**6))
    old = None if operation is fold_anew else state_at(start)
    expected = tmp_path / "expected"
    if operation is not fold_anew:
        shutil.copytree(start, expected)
    operation(expected, adapters)
    new = state_at(expected)
    allowed = [old, new]
    if operation is remove_and_merge:  # two changes, and a state between them
        allowed.append({n: e for n, e in old.items() if n != "a0"})
    seen = []

    def prepare():
        folder = tmp_path / f"run{next(runs)}"
        folder.mkdir()
        if operation is not fold_anew:
            shutil.copytree(start, folder / "lib")
        return folder / "lib"

    def check(path, n):
        state = state_at(path)
        assert state in allowed
        if n is None:
            assert state == new
            assert not leftovers(path)
        seen.append(allowed.index(state))
        if state is not None and n is not None:
            # The next writer gets through, and cleans up after the dead one.
            lf.Library.open(path).add(adapters["a5"], "next")
            assert not leftovers(path)
            assert set(state_at(path)) == {*state, "next"}
        shutil.rmtree(path.parent)

    calls = kill_points.everywhere(prepare, lambda path: operation(path, adapters), check, mode)
    assert calls > 3
    assert seen[0] == 0
    # The change happens at one call: before it the old state, after it the new one.
    assert seen == sorted(seen, key=[0, 2, 1].index)


@pytest.mark.parametrize("operation", [add, remove_and_merge])
def test_a_manifest_lost_after_a_kill_is_put_back(
    tmp_path, start, adapters, kill_points, operation
):
    """What its second copy names is there, whether that is of the state before or after."""
    runs = iter(range(10**6))
    before = state_at(start)
    seen = []

    def prepare():
        path = tmp_path / f"run{next(runs)}" / "lib"
        shutil.copytree(start, path)
        return path

    def check(path, n):
        state = state_at(path)
        os.truncate(path / "library.json", 50)
        repaired = lf.fold.repair(path)
        assert repaired.kept == len(state_at(path))
        assert "as its second copy had it" in repaired.damage[0]
        assert not repaired.dropped
        seen.append(state_at(path))
        if n is None:
            assert seen[-1] == state
        shutil.rmtree(path.parent)

    kill_points.everywhere(prepare, lambda path: operation(path, adapters), check)
    assert seen[0] == before != seen[-1]
    states = {frozenset(state.items()) for state in seen}
    assert len(states) == (3 if operation is remove_and_merge else 2)


@pytest.mark.parametrize("mode", ["fail once", "fail on"])
@pytest.mark.parametrize("operation", [fold_anew, add, remove, refold])
def test_a_full_disk_leaves_the_old_state_or_the_new(
    tmp_path, start, adapters, kill_points, operation, mode
):
    runs = iter(range(10**6))
    old = None if operation is fold_anew else state_at(start)

    def prepare():
        folder = tmp_path / f"run{next(runs)}"
        folder.mkdir()
        if operation is not fold_anew:
            shutil.copytree(start, folder / "lib")
        return folder / "lib"

    states = []

    def check(path, n):
        states.append(state_at(path))
        shutil.rmtree(path.parent)

    kill_points.everywhere(prepare, lambda path: operation(path, adapters), check, mode)
    assert all(s in (old, states[-1]) for s in states)
    assert states[-1] != old


def test_the_change_is_flushed_before_it_counts(tmp_path, start, adapters, kill_points):
    """For power cuts, which no kill can show: no rename before the flush of what it names."""
    for operation in (add, remove, refold):
        path = tmp_path / operation.__name__
        shutil.copytree(start, path)
        calls = kill_points.trace(lambda operation=operation, path=path: operation(path, adapters))
        assert kill_points.unsafe_renames(calls) == []
    calls = kill_points.trace(lambda: fold_anew(tmp_path / "new", adapters))
    assert kill_points.unsafe_renames(calls) == []


def busy(path, adapters, sink):
    """Change a library over and over; a byte is sent when each change is done."""
    torch.set_num_threads(1)
    lib = lf.Library.open(path)
    while True:
        for step in (
            lambda: lib.add(adapters["a3"], "x"),
            lambda: lib.add(adapters["a4"], "y"),
            lambda: lib.remove("a0"),
            lambda: lib.refold(tolerance=0.3),
            lambda: lib.add(adapters["a0"], "a0", tolerance=0.1),
            lambda: lib.remove("x"),
            lambda: lib.remove("y"),
            lambda: lib.refold(sources=some(adapters, "a1", "a2", "a0"), tolerance=0.1),
        ):
            step()
            os.write(sink, b".")


# The names after each of the steps above, from the start and in every later round.
STATES = [
    {"a0", "a1", "a2"},
    {"a0", "a1", "a2", "x"},
    {"a0", "a1", "a2", "x", "y"},
    {"a1", "a2", "x", "y"},
    {"a1", "a2", "x", "y"},
    {"a0", "a1", "a2", "x", "y"},
    {"a0", "a1", "a2", "y"},
    {"a0", "a1", "a2"},
]


def test_fifty_kills_at_random_moments(tmp_path, start, adapters):
    moments = random.Random(20)
    done_at_death = set()
    step_time = 0.05
    for run in range(50):
        path = tmp_path / f"lib{run}"
        shutil.copytree(start, path)
        source, sink = os.pipe()
        with warnings.catch_warnings():
            # Python 3.12 warns of forks under threads; the child doesn't touch any.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                busy(path, adapters, sink)
            os._exit(1)  # only by an error: it goes on until it is killed
        os.close(sink)
        with os.fdopen(source, "rb", buffering=0) as reports:
            # In the middle of some step, however slow the machine is: after so many of them, and a
            # part of the time that one takes.
            steps, began = moments.randrange(10), time.monotonic()
            for _ in range(steps):
                assert reports.read(1), "the child failed"
            if steps:
                step_time = (time.monotonic() - began) / steps
            time.sleep(1.5 * moments.random() ** 3 * step_time)  # short steps are met as well
            os.kill(child, signal.SIGKILL)
            assert os.waitpid(child, 0)[1] == signal.SIGKILL
            steps += len(reports.read())
        state = state_at(path)
        # The step that was under way has happened, or it has not.
        assert set(state) in (STATES[steps % 8], STATES[(steps + 1) % 8])
        done_at_death.add(steps % 8)
        lib = lf.Library.open(path)
        lib.add(adapters["a5"], "next")
        assert not leftovers(path)
        sources = {"x": "a3", "y": "a4", "next": "a5"}
        lib.verify({name: adapters[sources.get(name, name)] for name in lib})
        shutil.rmtree(path)
    assert len(done_at_death) >= 5  # the moments did differ
