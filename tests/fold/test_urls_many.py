"""Large libraries at URLs, whose files are opened when they are needed; and folding by workers."""

import json

import pytest
import torch

import lorafold as lf
from lorafold.errors import FileError
from lorafold.files.remote import retention
from lorafold.fold.store.manifest import COPY

SHAPES = {"q": (12, 8), "v": (8, 12)}


@pytest.fixture
def many(monkeypatch):
    """Lists and shards of two names, and three files are many."""
    monkeypatch.setattr("lorafold.fold.store.state._HELD", 3)
    monkeypatch.setattr("lorafold.fold.store.state._OPEN", 2)
    monkeypatch.setattr("lorafold.fold.store.part._LONGEST", 2)
    monkeypatch.setattr("lorafold.fold.store.part._SHORT", 1)
    monkeypatch.setattr("lorafold.fold.passes.write._ROWS", 2)
    monkeypatch.setattr("lorafold.fold.store.compaction._SMALL", 1 << 10)
    monkeypatch.setattr("lorafold.fold.store.compaction._FULL", 1 << 12)


@pytest.fixture(scope="module")
def adapters(make_adapter):
    return {
        f"a{i}": make_adapter(SHAPES, 2, seed=i, scale=1.0, extras={"head": torch.arange(3.0) + i})
        for i in range(12)
    }


@pytest.fixture
def ten(many, adapters):
    return {name: adapters[name] for name in list(adapters)[:10]}


def get(s3):
    """Files that were read."""
    names = {path.rpartition("/")[2] for method, path, _ in s3.requests.log if method == "GET"}
    return {name for name in names if name.endswith((".json", ".safetensors"))}


def test_a_name_at_a_url_takes_its_list_and_its_shard(s3, ten):
    lf.fold(ten, f"{s3.url}/lib", tolerance=0)
    s3.requests.log.clear()
    lib = lf.Library.open(f"{s3.url}/lib")
    assert get(s3) == {"library.json"}
    assert lib["a3"].digest == ten["a3"].digest
    read = get(s3) - {"library.json"}
    assert sorted(name.partition("-")[0] for name in read) == ["adapters", "shard"]


def test_a_large_library_at_a_url_is_changed_like_any(at, ten, adapters):
    lib = lf.fold(ten, f"{at.url}/lib", tolerance=0)
    reader = lf.Library.open(f"{at.url}/lib")
    lib.add(adapters["a10"], "a10")
    for k in range(5):
        lib.remove(f"a{k}")
    lib.add(adapters["a11"], "a11")
    found = lf.Library.open(f"{at.url}/lib")
    assert sorted(found.names) == sorted([*(f"a{k}" for k in range(5, 12))])
    assert {n: found[n].digest for n in found} == {n: adapters[n].digest for n in found}
    found.verify()
    assert {n: reader[n].digest for n in reader} == {n: a.digest for n, a in ten.items()}


def test_a_reader_of_what_is_kept_no_longer_is_told_to_open_it_again(at, ten, monkeypatch):
    lib = lf.fold(ten, f"{at.url}/lib", tolerance=0)
    readers = [lf.Library.open(f"{at.url}/lib") for _ in range(2)]
    assert readers[0]["a0"].digest == ten["a0"].digest
    lib.refold(tolerance=0.2)
    written, later = retention._written, retention.KEPT + 1
    monkeypatch.setattr(
        retention, "_written", lambda p: written(p) + (later if p.name == COPY else 0)
    )
    notes = f"{at.path}/lib/{retention.NOTES}"
    noted = json.loads(at.fs.cat_file(notes))
    at.fs.pipe_file(notes, json.dumps(dict.fromkeys(noted, 0.0)).encode())
    lib.remove("a9")
    assert not noted.keys() & at.files("lib").keys()
    for reader in readers:
        with pytest.raises(FileError, match="is gone: the library was changed since it was opened"):
            [reader[name] for name in ten]


def test_workers_give_the_same_bytes_at_a_url(s3, adapters, tmp_path):
    for name, adapter in adapters.items():
        lf.save(adapter, f"{s3.url}/adapters/{name}")
    lf.fold(f"{s3.url}/adapters/*", tmp_path / "here", memory="64KiB").close()
    lf.fold(f"{s3.url}/adapters/*", f"{s3.url}/lib", memory="64KiB", workers=2)
    here = {p.name: p.read_bytes() for p in (tmp_path / "here").iterdir() if p.name != ".lock"}
    assert s3.files("lib") == here
    lib = lf.Library.open(f"{s3.url}/lib")
    before = {name: lib.error(name) for name in lib}
    lib.refold(tolerance=0.3, workers=2)  # read by workers from the URL, and not from the sources
    assert before.keys() == set(lib.names)
    lib.verify(adapters)
