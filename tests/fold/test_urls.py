"""Libraries at URLs: the same bytes, readers of older states, and nothing of two writers lost."""

import json
import pickle
import threading

import pytest
import torch

import lorafold as lf
from lorafold.errors import FileError
from lorafold.files.find import in_library
from lorafold.files.remote import exchange, retention
from lorafold.files.remote.exchange import OvertakenError, is_guarded
from lorafold.files.remote.place import UrlPath
from lorafold.fold.store.manifest import COPY, MANIFEST

SHAPES = {f"layers.{n}.q_proj": (24, 16) for n in range(3)}


@pytest.fixture
def five(make_adapter):
    names = ["sql", "poems", "law", "code", "chess"]
    return {name: make_adapter(SHAPES, 2, seed=k, scale=1.0) for k, name in enumerate(names)}


@pytest.fixture
def three(five):
    return {name: five[name] for name in ("sql", "poems", "law")}


def named(at, folder="lib"):
    """Names in a folder that its manifest needs, and that itself."""
    raw = json.loads(at.files(folder)[MANIFEST])
    return {MANIFEST, COPY, *raw["shards"], *(part["file"] for part in raw["adapters"])}


def aged(at, folder="lib"):
    """Let the time pass that old files are kept for."""
    path = f"{at.path}/{folder}/{retention.NOTES}"
    notes = json.loads(at.fs.cat(path))
    long_ago = {name: since - 2 * retention.KEPT for name, since in notes.items()}
    at.fs.pipe_file(path, json.dumps(long_ago).encode())


@pytest.fixture
def no_age(monkeypatch):
    """Files may be removed however young they are, if they were noted long ago."""
    written = retention._written
    later = retention.KEPT + 1
    monkeypatch.setattr(
        retention, "_written", lambda p: written(p) + (later if p.name == COPY else 0)
    )


# The same as on this machine


def test_a_library_at_a_url_has_the_bytes_of_one_on_this_machine(at, three, tmp_path):
    lf.fold(three, tmp_path / "lib", tolerance=0.1)
    lib = lf.fold(three, f"{at.url}/lib", tolerance=0.1)
    here = {p.name: p.read_bytes() for p in (tmp_path / "lib").iterdir() if p.name != ".lock"}
    assert at.files("lib") == here
    assert lib.path == f"{at.url}/lib"
    assert lib.nbytes == lf.Library.open(tmp_path / "lib").nbytes


def test_all_that_a_library_does_is_done_at_a_url(at, five, three, tmp_path):
    lib = lf.fold(three, f"{at.url}/lib", tolerance=0.1)
    lib.verify(three)
    error = lib.add(five["code"], "code")
    assert error <= 0.1
    other = lf.Library.open(f"{at.url}/lib")
    other.remove("sql")
    assert lib.names == ["sql", "poems", "law", "code"]  # as it was when it last changed
    assert lf.Library.open(f"{at.url}/lib").names == other.names == ["poems", "law", "code"]
    other.refold(tolerance=0.3)
    assert lf.Library.open(f"{at.url}/lib").tolerance == 0.3
    lib.add(five["chess"], "chess")  # goes on from there
    assert lib.names == ["poems", "law", "code", "chess"]
    assert pickle.loads(pickle.dumps(lib)).names == lib.names
    here = lib.save(tmp_path / "copy")
    there = here.save(f"{at.url}/copy")
    assert at.files("copy") == {
        p.name: p.read_bytes() for p in (tmp_path / "copy").iterdir() if p.name != ".lock"
    }
    assert there["law"].digest == lib["law"].digest
    assert lf.load(f"{at.url}/copy:law").digest == lib["law"].digest
    assert in_library(f"{at.url}/copy:law") == (f"{at.url}/copy", "law")
    assert lf.fold([f"{at.url}/copy:law", f"{at.url}/copy:chess"]).names == ["law", "chess"]
    assert lf.fold(f"{at.url}/copy").names == lib.names
    assert lf.fold.repair(f"{at.url}/copy").damage == ()


def test_a_library_at_a_url_is_attached(at, three, make_net, shapes_of, make_adapter):
    net, tokens = make_net(torch.float32), torch.zeros(1, 3, dtype=torch.long)
    adapters = {n: make_adapter(shapes_of(net), 2, seed=k) for k, n in enumerate("ab")}
    lf.fold(adapters, f"{at.url}/lib", tolerance=0)
    lf.save(adapters["a"], f"{at.url}/a")
    plain = net(tokens)
    live = lf.attach(net, f"{at.url}/lib")
    assert sorted(live.names) == ["a", "b"]
    with live.use("a"):
        of_library = net(tokens)
    live.detach()
    live = lf.attach(net, f"{at.url}/a")
    with live.use(live.names[0]):
        assert torch.allclose(net(tokens), of_library, atol=1e-6)
    live.detach()
    assert not torch.allclose(plain, of_library)


def test_what_is_there_is_replaced_only_when_asked(at, three, five):
    lf.fold(three, f"{at.url}/lib")
    with pytest.raises(FileError, match="exists already; give overwrite=True to replace it"):
        lf.fold(five, f"{at.url}/lib")
    with pytest.raises(FileError, match="exists already; give overwrite=True"):
        lf.fold(five).save(f"{at.url}/lib")
    at.fs.pipe_file(f"{at.path}/lib/notes.txt", b"mine")
    lf.fold(five, f"{at.url}/lib", overwrite=True)
    assert len(lf.Library.open(f"{at.url}/lib")) == 5
    lf.fold(three).save(f"{at.url}/lib", overwrite=True)
    assert len(lf.Library.open(f"{at.url}/lib")) == 3
    assert at.files("lib")["notes.txt"] == b"mine"
    at.fs.pipe_file(f"{at.path}/other/notes.txt", b"mine")
    with pytest.raises(FileError, match="it is not a library: it holds 'notes.txt'"):
        lf.fold(three, f"{at.url}/other", overwrite=True)
    with pytest.raises(FileError, match=f"{at.url}/nowhere does not exist"):
        lf.Library.open(f"{at.url}/nowhere")


# Reading by ranges


def test_one_adapter_is_read_without_the_others(s3, make_adapter):
    shapes = {f"layers.{n}.up_proj": (512, 512) for n in range(4)}
    many = {f"a{k}": make_adapter(shapes, 8, seed=k, scale=1.0) for k in range(24)}
    lf.fold(many, f"{s3.url}/lib", tolerance=0)
    lib = lf.Library.open(f"{s3.url}/lib")
    s3.requests.log.clear()
    assert lib["a7"].digest == many["a7"].digest
    asked = [span.partition("=")[2].split("-") for m, p, span in s3.requests.log if m == "GET"]
    nbytes = sum(int(stop) - int(start) + 1 for start, stop in asked)
    alone = lib.entry("a7")["file_bytes"]
    assert alone < nbytes < 3 * alone < lib.nbytes / 4
    s3.requests.log.clear()
    lib["a7"]
    assert len(s3.requests.log) <= len(asked)


# Readers of an older state


def test_a_reader_goes_on_with_what_it_has_opened(at, five, three):
    lib = lf.fold(three, f"{at.url}/lib", tolerance=0)
    reader = lf.Library.open(f"{at.url}/lib")
    lib.remove("sql")
    lib.add(five["code"], "code")
    lib.refold(tolerance=0.2)
    lf.fold(five, f"{at.url}/lib", overwrite=True)
    assert {name: reader[name].digest for name in reader} == {
        name: adapter.digest for name, adapter in three.items()
    }


def test_old_files_are_kept_for_a_day_and_then_removed(at, five, three, no_age):
    lib = lf.fold(three, f"{at.url}/lib", tolerance=0)
    reader = lf.Library.open(f"{at.url}/lib")
    before = named(at)
    lib.refold(tolerance=0.2)
    assert before - named(at)
    assert at.files("lib").keys() == before | named(at) | {retention.NOTES}
    lib.add(five["code"], "code")
    assert before <= at.files("lib").keys()
    aged(at)
    lib.remove("code")
    kept = json.loads(at.files("lib")[retention.NOTES])
    assert at.files("lib").keys() == named(at) | {retention.NOTES, *kept}
    assert not before - {MANIFEST, COPY} & at.files("lib").keys()
    with pytest.raises(FileError, match="is gone: the library was changed since it was opened"):
        [reader[name] for name in reader]
    lf.Library.open(f"{at.url}/lib").verify({n: three[n] for n in three})


def test_a_file_that_comes_again_is_not_removed_for_having_been_old(at, five, three, no_age):
    lib = lf.fold(three, f"{at.url}/lib", tolerance=0)
    lib.add(five["code"], "code")
    lib.remove("code")
    lib.add(five["code"], "code")  # the same shard, by the same name
    aged(at)
    lib.add(five["chess"], "chess")
    errors = lf.Library.open(f"{at.url}/lib").verify({n: five[n] for n in lib})
    assert errors == dict.fromkeys(lib, 0.0)


def test_what_was_noted_of_a_file_before_it_was_needed_does_not_count(at, three, no_age):
    """As where a writer was killed right after its change: the file is needed, and noted."""
    lib = lf.fold(three, f"{at.url}/lib", tolerance=0)
    reader = lf.Library.open(f"{at.url}/lib")
    before = named(at)
    notes = json.dumps(dict.fromkeys(before, 0.0)).encode()
    at.fs.pipe_file(f"{at.path}/lib/{retention.NOTES}", notes)
    lib.refold(tolerance=0.2)
    assert before <= at.files("lib").keys()
    assert reader["law"].digest == three["law"].digest


def test_notes_that_are_damaged_delay_a_removal_and_nothing_else(at, five, three, no_age):
    lib = lf.fold(three, f"{at.url}/lib", tolerance=0)
    lib.refold(tolerance=0.2)
    at.fs.pipe_file(f"{at.path}/lib/{retention.NOTES}", b'["no notes"')
    before = at.files("lib").keys()
    lib.add(five["code"], "code")
    assert before <= at.files("lib").keys()
    assert json.loads(at.files("lib")[retention.NOTES])


# Two writers


def between(at, monkeypatch, what, times=1):
    """Do something just before a manifest is replaced, for the first times that it is."""
    replace_if = exchange._replace_if
    left = [times]

    def hooked(*args):
        if left[0] > 0:
            left[0] -= 1
            what()
        return replace_if(*args)

    monkeypatch.setattr(exchange, "_replace_if", hooked)


def test_a_change_that_another_came_between_is_made_again(at, five, three, monkeypatch, impatient):
    lib = lf.fold(three, f"{at.url}/lib", tolerance=0.1)
    other = lf.Library.open(f"{at.url}/lib")
    between(at, monkeypatch, lambda: other.add(five["code"], "code"), times=1)
    lib.add(five["chess"], "chess")
    assert lib.names == ["sql", "poems", "law", "code", "chess"]
    between(at, monkeypatch, lambda: other.remove("sql"))
    lib.remove("law")
    assert lf.Library.open(f"{at.url}/lib").names == lib.names == ["poems", "code", "chess"]
    lib.verify({name: five[name] for name in lib})


def test_what_can_not_be_made_again_quietly_fails_and_changes_nothing(at, five, three, monkeypatch):
    lib = lf.fold(three, f"{at.url}/lib", tolerance=0.1)
    other = lf.Library.open(f"{at.url}/lib")
    for change in (
        lambda: lib.refold(tolerance=0.3),
        lambda: lf.fold(five, f"{at.url}/lib", overwrite=True),
        lambda: lf.fold(five).save(f"{at.url}/lib", overwrite=True),
    ):
        between(at, monkeypatch, lambda: other.add(five["code"], "code", replace=True))
        with pytest.raises(OvertakenError, match="was changed by another writer meanwhile"):
            change()
        found = lf.Library.open(f"{at.url}/lib")
        assert found.names == other.names == ["sql", "poems", "law", "code"]
        assert found.tolerance == 0.1
        other.remove("code")


def test_of_two_that_make_a_library_at_once_one_does(at, five, three, monkeypatch, tmp_path):
    lf.fold(five, tmp_path / "lib")
    between(at, monkeypatch, lambda: at.put(tmp_path / "lib", "lib"))
    with pytest.raises(OvertakenError):
        lf.fold(three, f"{at.url}/lib")
    assert len(lf.Library.open(f"{at.url}/lib")) == 5


def test_a_change_that_is_overtaken_for_ever_gives_up(at, five, three, monkeypatch, impatient):
    lib = lf.fold(three, f"{at.url}/lib", tolerance=0)
    monkeypatch.setattr(exchange, "_ATTEMPTS", 3)
    old = at.files("lib")[MANIFEST]

    def overtaken(fs, key, path, data, before):
        raise OvertakenError("always")

    monkeypatch.setattr(exchange, "_replace_if", overtaken)
    with pytest.raises(OvertakenError, match="always"):
        lib.add(five["code"], "code")
    assert at.files("lib")[MANIFEST] == old


def test_writers_in_several_threads_lose_nothing(at, five, make_adapter):
    lf.fold({"first": five["sql"]}, f"{at.url}/lib", tolerance=0)
    errors = []

    def add(k):
        try:
            lib = lf.Library.open(f"{at.url}/lib")
            for n in range(2):
                lib.add(make_adapter(SHAPES, 2, seed=10 * k + n, scale=1.0), f"{k}.{n}")
        except Exception as e:  # noqa: BLE001  (told below)
            errors.append(e)

    threads = [threading.Thread(target=add, args=(k,)) for k in range(1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    lib = lf.Library.open(f"{at.url}/lib")
    assert sorted(lib.names) == ["1.0", "1.1", "2.0", "2.1", "3.0", "3.1", "first"]
    assert lib["2.1"].digest == make_adapter(SHAPES, 2, seed=21, scale=1.0).digest
    lib.verify()


def test_a_store_that_does_not_know_conditions_is_told_apart(s3, five, three, caplog):
    assert is_guarded(UrlPath(f"{s3.url}/lib/{MANIFEST}"))
    exchange._keep.clear()
    s3.requests.headers = {"HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"}
    assert not is_guarded(UrlPath(f"{s3.url}/lib/{MANIFEST}"))
    s3.requests.headers = set()
    exchange._keep.clear()
    s3.requests.before = lambda m, p: 501 if m == "PUT" and p.endswith(".lock") else None
    assert not is_guarded(UrlPath(f"{s3.url}/lib/{MANIFEST}"))
    lib = lf.fold(three, f"{s3.url}/lib")
    assert "only one process at a time may change what is there" in caplog.text
    lib.add(five["code"], "code")
    assert lf.Library.open(f"{s3.url}/lib").names == [*three, "code"]
    exchange._keep.clear()
