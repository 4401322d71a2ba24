"""A library of many files: a reader opens what it needs, and no writer takes it away."""

import gc
import json
import os
import resource
import shutil
import sys
import warnings

import pytest
import torch

import lorafold as lf
from lorafold.errors import FileError, UnknownNameError
from lorafold.fold.store import state

SHAPES = {"q": (12, 8), "v": (8, 12)}


@pytest.fixture(autouse=True)
def many(monkeypatch):
    """Lists and shards of two names, and three files are many; no flushing, which takes time."""
    monkeypatch.setattr("lorafold.fold.store.state._HELD", 3)
    monkeypatch.setattr("lorafold.fold.store.part._LONGEST", 2)
    monkeypatch.setattr("lorafold.fold.store.part._SHORT", 1)
    monkeypatch.setattr("lorafold.fold.passes.write._ROWS", 2)
    monkeypatch.setattr("lorafold.fold.store.compaction._SMALL", 1 << 10)
    monkeypatch.setattr("lorafold.fold.store.compaction._FULL", 1 << 12)
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def adapters(make_adapter):
    return {
        f"a{i}": make_adapter(SHAPES, 2, seed=i, extras={"head": torch.arange(3.0) + i})
        for i in range(12)
    }


@pytest.fixture
def library(tmp_path, adapters):
    some = {name: adapters[name] for name in list(adapters)[:10]}
    with lf.fold(some, tmp_path / "lib", tolerance=0.1, form="shared") as lib:
        assert len(lib.contents.state.files) > 8
        assert lib.contents.state.lease is not None
    return tmp_path / "lib"


def digests(lib):
    return {name: lib[name].digest for name in lib.names}


class Opens:
    """The files of a folder that are opened in a block."""

    def __init__(self, folder):
        self.folder, self.seen, self.watching = str(folder), [], False
        sys.addaudithook(self.hook)

    def hook(self, event, args):
        if self.watching and event == "open" and isinstance(args[0], str | os.PathLike):
            path = os.fspath(args[0])
            if os.path.dirname(path) == self.folder:
                self.seen.append(os.path.basename(path))

    def __enter__(self):
        self.seen, self.watching = [], True
        return self.seen

    def __exit__(self, *_):
        self.watching = False


def kinds(names):
    return sorted({name.split("-")[0] for name in names}), len(set(names))


def test_a_name_takes_its_list_and_its_shard(library):
    digest = lf.Library.open(library)["a3"].digest
    opens = Opens(library)
    with opens as seen:
        lib = lf.Library.open(library)
    assert set(seen) == {"library.json"}
    with opens as seen:
        assert "a3" in lib
    assert kinds(seen) == (["adapters"], 1)
    with opens as seen:
        lib.contents.own_bytes("a3")
    assert kinds(seen) == (["shard"], 1)
    with opens as seen:
        assert lib["a3"].digest == digest
    assert set(seen) <= {m.shard for x in lib.contents.modules for p in x.bases.values() for m in p}
    lib = lf.Library.open(library)
    with opens as seen:
        assert "nobody" not in lib
    assert len(seen) == 1
    with opens as seen:
        assert len(lib) == 10
    assert not seen


def test_a_folder_of_links_is_read(library, tmp_path):
    """As in the Hub's cache, where every file is a link."""
    (tmp_path / "links").mkdir()
    for file in library.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    lib = lf.Library.open(tmp_path / "links")
    assert lib.contents.state.lease is not None
    assert digests(lib) == digests(lf.Library.open(library))
    lib.verify()


def test_an_unknown_name_among_many_is_told_without_reading_them_all(library, monkeypatch):
    opens, lib = Opens(library), lf.Library.open(library)
    monkeypatch.setattr("lorafold.fold.store.manifest._LOOKED_THROUGH", 9)
    with opens as seen, pytest.raises(UnknownNameError, match="no adapter 'a33' .*; it has 10$"):
        lib["a33"]
    assert len(seen) == 1
    monkeypatch.undo()
    with pytest.raises(UnknownNameError, match="did you mean 'a3'"):
        lib["a33"]


def everything_else(library, adapters):
    """Changes after which nothing is left of what there was."""
    lib = lf.Library.open(library)
    lib.add(adapters["a10"], "a0", replace=True)
    lib.add(adapters["a11"], "x")
    for k in range(1, 10):
        lib.remove(f"a{k}")
    lib.refold(tolerance=0.2)
    lib.close()
    lf.fold({"y": adapters["a1"]}, library, overwrite=True).close()


def overwritten(library, adapters):
    with lf.fold({"y": adapters["a1"]}, tolerance=0.2) as lib:
        lib.save(library, overwrite=True).close()


@pytest.mark.parametrize("change", [everything_else, overwritten])
@pytest.mark.parametrize("locks", [True, False])
def test_what_writers_do_reaches_no_reader(library, adapters, change, locks, monkeypatch):
    if not locks:
        monkeypatch.setattr(state, "share_lock", lambda _: os.stat("/nowhere"))
    expected = digests(lf.Library.open(library))
    reader, twin = lf.Library.open(library), lf.Library.open(library)
    assert (reader.contents.state.lease is None) == (not locks)
    change(library, adapters)
    assert lf.Library.open(library).names == ["y"]
    assert digests(reader) == expected
    reader.close()
    assert digests(twin.to()) == expected
    twin.verify()
    del reader, twin
    gc.collect()
    # The last reader is gone: the next writer removes what it kept.
    lf.Library.open(library).add(adapters["a2"], "z")
    named = lf.Library.open(library).contents.state.files
    assert set(os.listdir(library)) == {"library.json", ".library.json.gz", ".lock", *named}


def test_what_many_readers_keep_is_what_they_read(library, adapters):
    """Each keeps the state that it opened; what none of them needs goes."""
    readers, expected = [], []
    for k in range(5):
        readers.append(lf.Library.open(library))
        expected.append(readers[-1].names)
        with lf.Library.open(library) as lib:
            lib.remove(f"a{k}")
            lib.add(adapters[f"a{k}"], f"n{k}")
        gc.collect()
    replaced = [
        name
        for name in os.listdir(library)
        if name.startswith(".library.") and name.endswith(".json")
    ]
    assert len(replaced) <= 6
    for reader, names in zip(readers, expected, strict=True):
        assert [reader[name].norm() > 0 for name in reader.names] == [True] * len(names)
        assert reader.names == names


def test_what_a_writer_has_read_keeps_nothing_that_it_replaces(library, adapters):
    lib = lf.Library.open(library)
    for k in range(5):
        assert lib[f"a{k + 5}"].norm() > 0  # from a list that stays
        lib.add(adapters["a11"], f"n{k}")
        lib.remove(f"n{k}")
    gc.collect()
    with lib.contents.store.transaction():
        pass
    assert lib.contents.state.lease is not None
    there = {*lib.contents.state.files, "library.json", ".library.json.gz", ".lock"}
    assert set(os.listdir(library)) == there


def test_a_kill_at_every_call_reaches_no_reader(adapters, tmp_path, kill_points):
    torch.set_num_threads(1)
    library = tmp_path / "lib"
    five = {f"a{k}": adapters[f"a{k}"] for k in range(5)}
    with lf.fold(five, library, tolerance=0.1, form="svd") as lib:
        before = digests(lib)
    runs = iter(range(10**6))
    readers, seen = [], []

    def prepare():
        path = shutil.copytree(library, tmp_path / f"run{next(runs)}")
        readers[:] = [lf.Library.open(path)]
        return path

    def change(path):
        with lf.Library.open(path) as lib:
            lib.add(adapters["a11"], "a3", replace=True)

    def check(path, n):
        with lf.Library.open(path) as lib:
            lib.verify()
            found = digests(lib)
            seen.append(found != before)
            assert lib.contents.state.lease is not None
        assert {**found, "a3": before["a3"]} == before
        with lf.Library.open(path) as lib:
            lib.add(adapters["a10"], "next")
        (reader,) = readers
        assert digests(reader) == before
        readers.clear()
        del reader
        gc.collect()
        with lf.Library.open(path) as lib:
            lib.remove("next")
            lib.verify()
            assert digests(lib) == found
        gc.collect()
        with lf.Library.open(path).contents.store.transaction():
            pass
        named = lf.Library.open(path).contents.state.files
        assert set(os.listdir(path)) == {"library.json", ".library.json.gz", ".lock", *named}
        shutil.rmtree(path)

    assert kill_points.everywhere(prepare, change, check) > 20
    assert seen == sorted(seen)
    assert set(seen) == {False, True}


@pytest.mark.parametrize("held", [3, 1000])
def test_a_thousand_readers_have_the_same_files_open(library, monkeypatch, held):
    monkeypatch.setattr("lorafold.fold.store.state._HELD", held)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    there = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (there + 60, hard))
    try:
        readers = [lf.Library.open(library) for _ in range(1000)]
        assert {len(reader["a1"].modules) for reader in readers[::9]} == {2}
        assert {tuple(reader.names) for reader in readers[::90]} == {tuple(readers[0].names)}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    del readers
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= there + 1


def test_of_many_shards_some_stay_open(library, monkeypatch):
    monkeypatch.setattr("lorafold.fold.store.state._OPEN", 2)
    lib = lf.Library.open(library)
    for _ in range(2):
        assert len(digests(lib)) == 10
        assert len(lib.contents.store.shards.opened) <= 2
    lib.close()
    with pytest.raises(FileError, match="closed"):
        lib["a1"]


def test_damage_is_told_when_it_is_met(library, adapters):
    """What is missing or cut is seen at once; what is altered when it is read."""
    whole = digests(lf.Library.open(library))
    lists = sorted(p for p in library.glob("adapters-*") if len(json.loads(p.read_bytes())) > 1)
    raw = lists[0].read_bytes()
    mine = [entry["name"] for entry in json.loads(raw)]
    lists[0].write_bytes(raw.replace(b'"order"', b'"ordes"', 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lib = lf.Library.open(library)
    for name in whole:
        if name not in mine:
            assert lib[name].digest == whole[name]
    with pytest.raises(FileError, match=r"adapters-.* is damaged.*lorafold repair"):
        lib[mine[0]]
    with pytest.raises(FileError, match=r"adapters-.* is damaged"):
        lib.verify()
    assert f"{lists[0]} is damaged" in lib.verify(strict=False).damage[0]
    with pytest.raises(FileError, match=r"adapters-.* is damaged"):
        lib.add(adapters["a11"], mine[0], replace=True)
    lib.add(adapters["a11"], next(n for n in whole if n not in mine), replace=True)
    done = lf.fold.repair(library, {name: adapters[name] for name in mine})
    assert done.lost_lists == 1
    assert set(done.rebuilt) == set(mine)
    with lf.Library.open(library) as lib:
        lib.verify({name: adapters[name] for name in mine})
        assert set(lib.names) == set(whole)
    shard = next(p for p in library.glob("shard-*"))
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.warns(UserWarning, match=f"{shard.name} is truncated"):
        lf.Library.open(library)
