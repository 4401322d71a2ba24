"""Copies of an opened library are independent, and who reads one sees one state of it."""

import contextlib
import copy
import os
import pickle
import shutil
import threading

import pytest
import torch

import lorafold as lf
from lorafold.errors import FileError, UnknownNameError

SHAPES = {"q": (12, 8), "v": (8, 12)}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No flushing, which takes time and shows in no test."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def adapters(make_adapter):
    first = make_adapter(SHAPES, 2, seed=0)

    def kin(i):
        step = make_adapter(SHAPES, 2, seed=i)
        return lf.Adapter({p: lf.LowRank(u.A, step[p].B, 0.5) for p, u in first.items()})

    return {f"a{i}": kin(i) for i in range(6)}


@pytest.fixture(params=["disk", "memory"])
def library(request, tmp_path, adapters):
    path = tmp_path / "lib" if request.param == "disk" else None
    some = {name: adapters[name] for name in ("a0", "a1", "a2")}
    return lf.fold(some, path, tolerance=0.1, form="input")


COPIES = {
    "to": lambda lib: lib.to(),
    "dtype": lambda lib: lib.to(dtype=torch.float16),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


def digests(lib):
    return {name: lib[name].digest for name in lib}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_does_not_change_with_the_original(tmp_path, library, adapters, kind):
    before = digests(library)
    other = COPIES[kind](library)
    seen = digests(other)
    other.remove("a0")
    assert library.names == ["a0", "a1", "a2"]
    assert digests(library) == before
    with library.save(tmp_path / "saved") as saved:
        assert digests(saved) == before
    assert other.names == ["a1", "a2"]
    library.verify()
    third = COPIES[kind](library)
    if library.path is None:
        library.add(adapters["a3"], "new")
        assert other.names == ["a1", "a2"]
    else:  # a folder has one state; who changes it goes on from there
        library.add(adapters["a3"], "new")
        assert library.names == ["a1", "a2", "new"]
    assert digests(third) == seen


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("first", ["original", "copy"])
def test_closing_one_does_not_close_the_other(library, kind, first):
    seen = digests(library)
    other = COPIES[kind](library)
    expected = digests(other)
    if first == "original":
        library.close()
        assert digests(other) == expected
        with pytest.raises(FileError, match="closed"):
            library["a0"]
        with pytest.raises(FileError, match="closed"):
            COPIES[kind](library)
    else:
        other.close()
        assert digests(library) == seen
        library.verify()
        with pytest.raises(FileError, match="closed"):
            other["a0"]


def test_a_model_keeps_what_was_attached_after_the_library_is_closed(tmp_path, make_adapter):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    lib = lf.fold({"x": make_adapter({"0": (8, 8)}, 2)}, tmp_path / "lib", tolerance=0)
    x = torch.randn(3, 8)
    live = lf.attach(model, lib)
    lib.close()
    with live.use("x"):
        changed = model(x)
    assert not torch.equal(changed, model(x))


def test_a_pickle_opens_the_folder_again(library):
    if library.path is not None:
        twin = pickle.loads(pickle.dumps(library))
        twin.remove("a0")
        assert "a0" in library


def test_what_is_read_through_a_copy_stays_when_the_folder_goes(tmp_path, adapters):
    lib = lf.fold(adapters, tmp_path / "lib", tolerance=0.1)
    twin = lib.to()
    before = digests(lib)
    shutil.rmtree(tmp_path / "lib")
    lib.close()
    assert digests(twin) == before


def test_reading_beside_changes_sees_one_state(library, adapters):
    """Every record with the bases that it was coded on, whatever another thread does."""
    stop, found = threading.Event(), []
    exact = digests(library)
    reads = 0

    def change():
        try:
            for k in range(4):
                library.add(adapters["a3"], "x", tolerance=0.001)  # longer bases
                library.remove("x")
                some = {name: adapters[name] for name in ("a0", "a1", "a2")}
                library.refold(tolerance=0.1 if k % 2 else 0.12, sources=some)
        finally:
            stop.set()

    def looked():
        c = library.contents
        names = list(c.manifest.adapters)
        for name in names:  # one state: what it names can be read
            for module in SHAPES:
                c.parts(name, module)
        library.stats()
        for name in ("a0", "a1", "a2"):
            a = library[name]
            if a.distance(adapters[name]) > 0.35 * adapters[name].norm():
                found.append((name, "wrong"))
        with contextlib.suppress(UnknownNameError):  # it comes and goes
            library.entry("x")

    writer = threading.Thread(target=change)
    writer.start()
    try:
        while not stop.is_set():
            looked()
            reads += 1
    except Exception as e:  # noqa: BLE001 - whatever it is
        found.append(repr(e))
    finally:
        writer.join()
    assert not found
    assert reads > 0
    assert set(library) == set(exact)


def test_contents_are_of_one_state(library, adapters):
    c = library.contents
    before = c.adapter("a0").digest
    library.add(adapters["a3"], "new", tolerance=0.001)
    library.remove("a0")
    assert list(c.manifest.adapters) == ["a0", "a1", "a2"]
    assert c.adapter("a0").digest == before
    assert list(c.now().manifest.adapters) == ["a1", "a2", "new"]
    assert library.contents is library.contents
