"""Adapters on a disk that others change: no mixed reads, no writing through links, no hanging."""

import errno
import json
import os
import shutil
import threading

import pytest
import torch

import lorafold as lf
from lorafold.errors import FileError
from lorafold.files import atomic, find, open_adapter
from lorafold.files.disk import held
from lorafold.files.disk.held import ChangedError, Held, open_regular


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No flushing, which takes time and shows in no test."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(params=["exchange", "two renames"])
def renames(request, monkeypatch):
    """Both kinds of file system."""
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "_renameat2", lambda *_: errno.ENOSYS)


def adapter(k):
    """One whose config and tensors both say which it is."""
    u = lf.LowRank(torch.full((1, 3), float(k)), torch.ones(4, 1), scale=float(k))
    return lf.Adapter({"q": u}, config={"r": 1, "lora_alpha": k, "peft_type": "LORA"})


def which(a):
    """The number of an adapter, by both."""
    return {a["q"].scale, float(a["q"].A[0, 0])}


# One adapter, and not two


def test_no_read_has_the_config_of_one_and_the_tensors_of_another(tmp_path, renames):
    path, stop, odd = tmp_path / "a", threading.Event(), []
    lf.save(adapter(1), path)

    def write():
        try:
            for k in range(1, 60):
                lf.save(adapter(k), path, overwrite=True)
        finally:
            stop.set()

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    while not stop.is_set():
        found = which(lf.load(path))
        reads += 1
        odd += [found] if len(found) > 1 else []
    writer.join()
    assert reads > 0
    assert not odd


@pytest.mark.parametrize("moment", ["config", "weights"])
def test_an_overwrite_between_the_two_files_is_met(tmp_path, monkeypatch, moment):
    """Deterministic: the other adapter comes just before, or just after, one file is opened."""
    path = tmp_path / "a"
    lf.save(adapter(1), path)
    opened, left = held.open_regular, [1]

    def overtaken(file):
        name = os.path.basename(file)
        if left and name.startswith("adapter_model" if moment == "weights" else "adapter_config"):
            left.pop()
            number = opened(file) if moment == "config" else None
            lf.save(adapter(2), path, overwrite=True)
            return opened(file) if number is None else number
        return opened(file)

    monkeypatch.setattr(held, "open_regular", overtaken)
    assert which(lf.load(path)) == {2.0}
    assert not left


@pytest.mark.parametrize("closed", [False, True])
def test_an_open_handle_keeps_the_files_it_opened(tmp_path, monkeypatch, closed):
    path = tmp_path / "a"
    lf.save(adapter(1), path)
    handle = open_adapter(path)
    if closed:  # as where many are open
        monkeypatch.setattr(held, "_MOST", 2)
        for k in range(4):
            lf.save(adapter(3), tmp_path / str(k))
            open_adapter(tmp_path / str(k))
        assert which(handle.load()) == {1.0}  # opened again: it is the same
        handles = [open_adapter(tmp_path / str(k)) for k in range(4)]
        assert all(which(h.load()) == {3.0} for h in handles)
    lf.save(adapter(2), path, overwrite=True)
    if closed:
        with pytest.raises(FileError, match="changed since it was opened; open it again"):
            handle.load()
    else:
        assert which(handle.load()) == {1.0}
        assert handle.read("q").scale == 1.0
    assert which(open_adapter(path).load()) == {2.0}


def test_what_is_written_to_in_place_is_not_the_same(tmp_path):
    path = tmp_path / "a"
    lf.save(adapter(1), path)
    handle = open_adapter(path)
    file = path / "adapter_model.safetensors"
    raw = file.read_bytes()
    with open(file, "r+b") as f:
        f.write(raw[:-1] + b"x")
    os.utime(file, ns=(0, 12345))
    with pytest.raises(FileError, match="was changed since it was opened"):
        handle.load()
    with pytest.raises(ChangedError):
        handle.read("q")


def test_many_handles_need_few_descriptors(tmp_path):
    for k in range(100):
        lf.save(adapter(k + 1), tmp_path / str(k))
    before = len(os.listdir("/proc/self/fd"))
    handles = [open_adapter(tmp_path / str(k)) for k in range(100)]
    assert len(os.listdir("/proc/self/fd")) - before <= 64
    assert all(which(h.load()) == {k + 1.0} for k, h in enumerate(handles))
    assert len(os.listdir("/proc/self/fd")) - before <= 64
    del handles
    assert len(os.listdir("/proc/self/fd")) <= before


# Links


def linked(source, target):
    """As `cp -rs` makes it: folders, and a link for every file."""
    for folder, _, names in os.walk(source):
        place = target / os.path.relpath(folder, source)
        place.mkdir(parents=True, exist_ok=True)
        for name in names:
            (place / name).symlink_to(os.path.join(folder, name))
    return target


def content(path):
    return {p.name: p.read_bytes() for p in path.iterdir() if p.name != ".lock"}


def test_an_adapter_of_links_is_replaced_and_what_they_lead_to_stays(tmp_path, renames):
    lf.save(adapter(1), tmp_path / "real")
    (tmp_path / "real" / "notes.txt").write_text("mine")
    before = content(tmp_path / "real")
    copy = linked(tmp_path / "real", tmp_path / "copy")
    assert which(lf.load(copy)) == {1.0}
    lf.save(adapter(2), copy, overwrite=True)
    assert content(tmp_path / "real") == before
    assert which(lf.load(copy)) == {2.0}
    assert (copy / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("change", ["add", "remove", "refold", "overwrite", "save"])
def test_a_library_of_links_is_changed_and_what_they_lead_to_stays(tmp_path, make_adapter, change):
    a = {f"a{k}": make_adapter({"q": (8, 6)}, 2, seed=k) for k in range(3)}
    lib = lf.fold(a, tmp_path / "real", tolerance=0.1)
    lib.add(a["a0"], "b")
    lib.remove("b")
    before = content(tmp_path / "real")
    copy = linked(tmp_path / "real", tmp_path / "copy")
    other = lf.Library.open(copy)
    if change == "add":
        other.add(a["a1"], "new")
    elif change == "remove":
        other.remove("a0")
    elif change == "refold":
        other.refold(tolerance=0.3)
    elif change == "overwrite":
        lf.fold({"z": a["a2"]}, copy, overwrite=True)
    else:
        lf.fold({"z": a["a2"]}).save(copy, overwrite=True)
    assert content(tmp_path / "real") == before
    assert (tmp_path / "real" / ".lock").stat().st_size == 0
    assert not (copy / "library.json").is_symlink()
    with lf.Library.open(tmp_path / "real") as real:
        real.verify(a)
        real.remove("a2")  # and the other way round
    lf.Library.open(copy).verify()


def test_nothing_is_written_where_a_link_leads(tmp_path, make_adapter):
    lf.save(adapter(1), tmp_path / "real")
    lib = lf.fold({"a": make_adapter({"q": (8, 6)}, 2)}, tmp_path / "lib")
    for name, to in [("one", "real"), ("two", "lib"), ("three", "nowhere")]:
        (tmp_path / name).symlink_to(to)
    for overwrite in (False, True):
        for save in (
            lambda o: lf.save(adapter(2), tmp_path / "one", overwrite=o),
            lambda o: lf.save(adapter(2), tmp_path / "three", overwrite=o),
            lambda o: lf.fold([adapter(2)], tmp_path / "two", overwrite=o),
            lambda o: lf.fold([adapter(2)]).save(tmp_path / "two", overwrite=o),
        ):
            with pytest.raises(FileError, match="is a symbolic link to .*: name what it leads to"):
                save(overwrite)
    assert which(lf.load(tmp_path / "one")) == {1.0}
    assert lf.Library.open(tmp_path / "two").names == lib.names
    assert sorted(os.listdir(tmp_path)) == ["lib", "one", "real", "three", "two"]


def test_a_library_stays_the_folder_that_a_link_led_to(tmp_path, make_adapter):
    a = {f"a{k}": make_adapter({"q": (8, 6)}, 2, seed=k) for k in range(2)}
    for name in ("v1", "v2"):
        lf.fold(a, tmp_path / name)
    (tmp_path / "current").symlink_to("v1")
    lib = lf.Library.open(tmp_path / "current")
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to("v2")
    lib.remove("a0")
    assert lf.Library.open(tmp_path / "v1").names == ["a1"]
    assert lf.Library.open(tmp_path / "v2").names == ["a0", "a1"]


# What is no file


def put(kind, path):
    if path.exists():
        path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["fifo", "directory", "device"])
def test_what_is_no_file_is_an_error_and_no_wait(tmp_path, make_adapter, kind):
    with pytest.raises(OSError, match=r"regular file|Is a directory"):
        put(kind, tmp_path / "x")
        open_regular(tmp_path / "x")
    lf.save(adapter(1), tmp_path / "a")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        broken = shutil.copytree(tmp_path / "a", tmp_path / name)
        put(kind, broken / name)
        with pytest.raises(FileError):
            lf.load(broken)
    put(kind, tmp_path / "x.safetensors")
    with pytest.raises(FileError):
        lf.load(tmp_path / "x.safetensors")
    lib = lf.fold({"a": make_adapter({"q": (8, 6)}, 2)}, tmp_path / "lib")
    shard = lib.entry("a")["shard"]
    part = next((tmp_path / "lib").glob("adapters-*")).name
    for name in ("library.json", shard, part):
        broken = shutil.copytree(tmp_path / "lib", tmp_path / f"lib-{name}")
        put(kind, broken / name)
        if name == "library.json":
            with pytest.raises(FileError):
                lf.Library.open(broken)
        else:
            with pytest.warns(UserWarning, match=r"regular file|Is a directory"):
                assert name in lf.Library.open(broken).stats()["damage"][0]


# Permissions


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_written_files_follow_the_umask(tmp_path, make_adapter, umask):
    a = make_adapter({"layers.0.self_attn.q_proj": (8, 6)}, 2)
    before = os.umask(umask)
    try:
        lf.save(a, tmp_path / "a")
        lf.save(a, tmp_path / "a", overwrite=True)
        lf.save(a, tmp_path / "p", format="portable")
        lib = lf.fold({"a": a}, tmp_path / "lib")
        lib.add(a, "b")
        lib.save(tmp_path / "copy")
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert path.stat().st_mode & 0o777 == expected, path


# Where names can't be exchanged


def test_an_old_state_set_aside_is_named_and_put_back(tmp_path, kill_points, monkeypatch):
    monkeypatch.setattr(atomic, "_renameat2", lambda *_: errno.ENOSYS)
    torch.set_num_threads(1)
    aside = []
    count = iter(range(1000))

    def prepare():
        path = tmp_path / str(next(count)) / "a"
        lf.save(adapter(1), path)
        (path / "notes.txt").write_text("mine")
        return path

    def check(path, n):
        atomic._swept.clear()
        if not path.exists():
            aside.append(path)
            with pytest.raises(FileError, match="interrupted overwrite left its old state in"):
                lf.load(path)
            with pytest.raises(FileError, match="exists already"):  # it does: it was put back
                lf.save(adapter(3), path)
            assert which(lf.load(path)) == {1.0}
        assert which(lf.load(path)) in ({1.0}, {2.0})
        lf.save(adapter(3), path, overwrite=True)
        assert which(lf.load(path)) == {3.0}
        assert (path / "notes.txt").read_text() == "mine"
        assert os.listdir(path.parent) == ["a"]  # nothing is left over

    kill_points.everywhere(prepare, lambda path: lf.save(adapter(2), path, overwrite=True), check)
    assert len(aside) == 1


def test_the_old_state_of_a_living_writer_is_left_alone(tmp_path, monkeypatch):
    path = tmp_path / "a"
    lf.save(adapter(1), path)
    staging = tmp_path / ".a.0123456789abcdef.tmp"
    staging.mkdir()
    lock = os.open(staging, os.O_RDONLY)
    try:
        assert atomic.try_lock(lock)
        os.rename(path, staging.with_suffix(".old"))
        lf.save(adapter(2), path)
        assert staging.with_suffix(".old").exists()
    finally:
        os.close(lock)
    lf.save(adapter(3), path, overwrite=True)
    assert not staging.with_suffix(".old").exists()


def test_the_card_of_a_config_is_plain_json(tmp_path):
    """The helper above is what it says: alpha is in the config, the number in the tensors."""
    lf.save(adapter(5), tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["lora_alpha"] == 5
    assert Held(tmp_path / "a" / "adapter_config.json").is_there()


def test_a_folder_that_is_exchanged_while_it_is_looked_into_is_met(tmp_path, monkeypatch):
    """Deterministic: the old state is moved away after the folder was seen, not its files."""
    path, looked, left = tmp_path / "a", find.adapters_at, [1]
    lf.save(adapter(1), path)
    lf.save(adapter(2), tmp_path / "b")

    def overtaken(folder):
        if not left:
            return looked(folder)
        left.pop()
        path.rename(tmp_path / "old")
        found = looked(folder)
        (tmp_path / "b").rename(path)
        return found

    monkeypatch.setattr(find, "adapters_at", overtaken)
    assert which(lf.load(path)) == {2.0}
    assert not left
