"""A store is old or new wherever a writer is killed, and no reader notices writers."""

import errno
import functools
import gc
import hashlib
import json
import os
import shutil
import signal

import numpy as np
import pytest
import safetensors.numpy

from lorafold.errors import FileError
from lorafold.files import atomic
from lorafold.fold.store import turns
from lorafold.fold.store.entries import ModuleEntry, Piece
from lorafold.fold.store.manifest import MANIFEST, Manifest
from lorafold.fold.store.shard import Shard
from lorafold.fold.store.store import LIBRARY, Store

CAPACITY = 256


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No flushing, which takes time and shows in no test: the calls are counted all the same."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def add_shard(transaction, *values):
    """A shard with one tensor per value, "0", "1", …; its name."""
    with transaction.new_shard(header_capacity=CAPACITY) as shard:
        for i, value in enumerate(values):
            shard.add(str(i), np.full(3, value, np.float32))
    return shard.info.name


def saying(note, shards, **fields):
    """A manifest that uses the first tensor of each of these shards."""
    bases = [{"U0": (Piece(name, "0", 1),)} for name in shards]
    modules = [ModuleEntry(f"m{i}", (1, 3), "shared", b) for i, b in enumerate(bases)]
    return Manifest(base_model=note, modules=tuple(modules), **fields)


def create(path, *values, overwrite=False, note="created", **fields):
    """A store with one shard per value."""
    with Store.create(path, overwrite=overwrite) as t:
        shards = [add_shard(t, value) for value in values]
        return t.commit(saying(note, shards, **fields))


def used(store):
    """The shards that a store's manifest uses, in its order."""
    return [module.bases["U0"][0].shard for module in store.manifest.modules]


def change(store, value=9, note="changed"):
    """Drop the first shard, keep the others, add one with the value 9."""
    with store.transaction(timeout=0) as t:
        _, *keep = used(t)
        return t.commit(saying(note, [*keep, add_shard(t, value)]))


def state(store):
    """What the store says."""
    values = [store.shards[name].read("0")[0].item() for name in used(store)]
    return store.manifest.base_model, values


def state_at(path):
    """The same from a fresh look at the disk, checksums verified; None when nothing is there."""
    if not path.exists():
        return None
    with Store.open(path) as store:
        store.verify()
        return state(store)


def files(path):
    return sorted(p.name for p in path.iterdir() if p.name not in (".lock", ".library.json.gz"))


# Commit and read back


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_create_change_and_look(tmp_path, where):
    path = tmp_path / "deep" / "lib" if where == "disk" else None
    store = create(path, 1, 2, config={"a": [1, None, "é"]})
    assert store.path == path
    assert state(store) == ("created", [1, 2])
    assert store.manifest.config == {"a": [1, None, "é"]}
    changed = change(store)
    assert changed is store
    assert state(store) == ("changed", [2, 9])
    store.verify()
    if path:
        assert state_at(path) == ("changed", [2, 9])
        assert files(path) == ["library.json", *sorted(store.shards)]
        assert store.nbytes == sum(p.stat().st_size for p in path.iterdir())
        assert Store.open(path).manifest == store.manifest


def test_memory_and_disk_take_the_same_bytes(tmp_path):
    in_memory = create(None, 1, 2)
    saved = in_memory.save(tmp_path / "lib")
    assert in_memory.path is None
    assert saved.manifest == in_memory.manifest
    assert saved.nbytes == in_memory.nbytes
    assert state_at(tmp_path / "lib") == state(in_memory)
    change(in_memory)
    assert state(saved) == ("created", [1, 2])
    with pytest.raises(FileError, match=r"lib exists already; give overwrite=True"):
        in_memory.save(tmp_path / "lib")
    in_memory.save(tmp_path / "lib", overwrite=True)
    saved.save(tmp_path / "again")
    assert state_at(tmp_path / "lib") == ("changed", [2, 9])
    assert state_at(tmp_path / "again") == ("created", [1, 2])
    assert sorted(os.listdir(tmp_path)) == ["again", "lib"]


def test_the_manifest_says_what_the_files_are(tmp_path):
    create(tmp_path / "lib", 1)
    raw = (tmp_path / "lib" / "library.json").read_text()
    manifest = json.loads(raw)
    assert raw == json.dumps(manifest, separators=(",", ":"))
    digest = manifest.pop("sha256")
    rest = json.dumps(manifest, separators=(",", ":"))
    assert hashlib.sha256(rest.encode()).hexdigest() == digest
    assert (manifest["format"], manifest["version"]) == ("lorafold-library", 1)
    ((name, entry),) = manifest["shards"].items()
    content = (tmp_path / "lib" / name).read_bytes()
    assert entry.keys() == {"bytes", "header_sha256", "data_sha256"}
    assert entry["bytes"] == len(content)
    both = entry["header_sha256"] + entry["data_sha256"]
    assert name == f"shard-{hashlib.sha256(both.encode()).hexdigest()[:16]}.safetensors"
    assert safetensors.numpy.load(content)["0"].tolist() == [1, 1, 1]


def test_equal_stores_are_equal_files(tmp_path):
    for folder in ("a", "b"):
        create(tmp_path / folder, 1, 2)
    change(Store.open(tmp_path / "a"))
    create(tmp_path / "c", 2, 9, note="changed")
    assert files(tmp_path / "a") == files(tmp_path / "c") != files(tmp_path / "b")
    for name in files(tmp_path / "a"):
        a, c = ((tmp_path / folder / name).read_bytes() for folder in "ac")
        assert a == c


def test_a_shard_that_is_there_already_is_one(tmp_path):
    """Equal content has one name: what is written again takes the place of what was there."""
    store = create(tmp_path / "lib", 1, 2)
    _, two = used(store)
    (tmp_path / "lib" / two).write_bytes(b"rotten")
    change(store, value=2)
    assert used(store) == [two, two]
    assert state_at(tmp_path / "lib") == state(store) == ("changed", [2, 2])
    assert files(tmp_path / "lib") == ["library.json", two]
    with store.transaction() as t:
        twice = [add_shard(t, 7), add_shard(t, 7)]
        t.commit(saying("twice", twice))
    assert state_at(tmp_path / "lib") == ("twice", [7, 7])


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_names_are_any_text(tmp_path, where):
    path = tmp_path / "lib" if where == "disk" else None
    names = ["é", "🙂", "\udc80x", "../..", "a\0b", "\ud83d", '"', "", "\u2028", "𝄞\udcff"]
    for note in (names, names[:2]):
        store = create(path, 1, overwrite=True, config=dict.fromkeys(note, note))
        assert store.manifest.config == dict.fromkeys(note, note)
        if path:
            assert Store.open(path).manifest == store.manifest
    with pytest.raises(FileError, match="pair of surrogates"):
        create(path, overwrite=True, config={"\ud83d\ude42": 1, "🙂": 2})
    with pytest.raises(FileError, match="JSON"):
        create(path, overwrite=True, config={"x": float("nan")})
    with pytest.raises(FileError, match="JSON"):
        create(path, overwrite=True, config={"x": {1}})
    assert path is None or state_at(path) == ("created", [1])


def test_what_the_manifest_does_not_use_is_not_committed(tmp_path):
    with Store.create(tmp_path / "lib") as t:
        one = add_shard(t, 1)
        t.new_shard(header_capacity=CAPACITY).abort()
        unused = t.new_shard(header_capacity=CAPACITY)
        unused.close()
        closed = t.new_shard(header_capacity=CAPACITY)
        closed.close()
        closed.abort()
        t.commit(saying("created", [one]))
    assert state_at(tmp_path / "lib") == ("created", [1])
    assert len(files(tmp_path / "lib")) == 2


# Leaving without a commit, and other slips


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_leaving_without_commit_changes_nothing(tmp_path, where):
    path = tmp_path / "lib" if where == "disk" else None
    store = create(path, 1)
    with store.transaction() as t:
        add_shard(t, 2)
        t.new_shard(header_capacity=CAPACITY)
    with pytest.raises(ZeroDivisionError), store.transaction() as t:
        add_shard(t, 3)
        raise ZeroDivisionError
    with pytest.raises(FileError, match="no shard nonsense"), store.transaction() as t:
        add_shard(t, 4)
        t.commit(saying("wrong", ["nonsense"]))
    with pytest.raises(FileError, match="still being streamed"), store.transaction() as t:
        t.new_shard(header_capacity=CAPACITY).stream("s")
        t.commit(t.manifest)
    for overwrite in (False, True):
        other = tmp_path / "other" if where == "disk" else None
        with Store.create(other, overwrite=overwrite) as t:
            add_shard(t, 1)
    assert state(store) == ("created", [1])
    if path:
        assert state_at(path) == ("created", [1])
        assert files(path) == ["library.json", *store.shards]
        assert os.listdir(tmp_path) == ["lib"]


def test_a_transaction_is_for_one_block():
    store = create(None, 1)
    t = store.transaction()
    for call in (
        lambda: t.new_shard(header_capacity=CAPACITY),
        lambda: t.commit(Manifest()),
    ):
        with pytest.raises(FileError, match="use it in a `with` block"):
            call()
    with t:
        t.commit(t.manifest)
        with pytest.raises(FileError, match="commit once"):
            t.commit(t.manifest)
    with pytest.raises(FileError, match="once only"), t:
        pass
    with store.transaction(), pytest.raises(FileError, match="another transaction"):
        store.transaction(timeout=0).__enter__()


def test_create_refuses_what_exists(tmp_path):
    create(tmp_path / "lib", 1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    for name, message in [
        ("lib", "exists already; give overwrite=True"),
        ("other", "exists already, and it is not a library: it holds 'notes.txt'"),
    ]:
        with pytest.raises(FileError, match=message), Store.create(tmp_path / name):
            pytest.fail("the block was entered")


def test_overwrite_of_a_library_stays_in_its_folder(tmp_path):
    old = create(tmp_path / "lib", 1, 2)
    (tmp_path / "lib" / "notes.txt").write_text("mine")
    inode = (tmp_path / "lib").stat().st_ino
    create(tmp_path / "lib", 3, overwrite=True)
    assert (tmp_path / "lib").stat().st_ino == inode
    assert (tmp_path / "lib" / "notes.txt").read_text() == "mine"
    assert len(files(tmp_path / "lib")) == 3
    assert state_at(tmp_path / "lib") == ("created", [3])
    assert state(old) == ("created", [1, 2])


@pytest.mark.parametrize("found", ["nothing", "empty", "newer", "broken"])
def test_overwrite_of_a_library_of_any_kind(tmp_path, found):
    path = tmp_path / "lib"
    if found != "nothing":
        path.mkdir()
    if found == "newer":
        (path / "library.json").write_text('{"format":"lorafold-library","version":2,"shards":{}}')
    if found == "broken":
        (path / "library.json").write_text("{")
        (path / "shard-0123456789abcdef.safetensors").write_text("x")
    if found in ("newer", "broken"):
        (path / "notes.txt").write_text("mine")
    create(path, 3, overwrite=True)
    assert state_at(path) == ("created", [3])
    assert len(files(path)) == 2 + (found in ("newer", "broken"))


@pytest.mark.parametrize("found", ["file", "folder", "another's manifest"])
def test_overwrite_of_anything_else_is_refused(tmp_path, found):
    path = tmp_path / "lib"
    if found == "file":
        path.write_text("x")
    else:
        path.mkdir()
        (path / "library.json" if "manifest" in found else path / "notes.txt").write_text("{}")
    with pytest.raises(FileError, match="lib won't be overwritten"):
        create(path, 3, overwrite=True)
    assert path.read_text() == "x" if found == "file" else len(files(path)) == 1


# What is no library


NAME = "shard-0000000000000000.safetensors"
SHARD = {"bytes": 1, "header_sha256": "0" * 64, "data_sha256": "0" * 64}
TRUE_NAME = f"shard-{hashlib.sha256(b'0' * 128).hexdigest()[:16]}.safetensors"
PART = {"file": "adapters-0000000000000000.json", "bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no library.json"),
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("\udcff", "not valid JSON"),
        ("[]", "not a library's: format is None"),
        ('{"format":"other"}', "format is 'other'"),
        ('{"format":"lorafold-library"}', "version must be a whole number, found None"),
        ('{"format":"lorafold-library","version":true}', "found True"),
        ('{"format":"lorafold-library","version":"1"}', "found '1'"),
        ('{"format":"lorafold-library","version":0}', "found 0"),
        ('{"format":"lorafold-library","version":2}', "version 2; this lorafold reads up to 1"),
        ('{"format":"lorafold-library","version":1}', "does not begin with its SHA-256"),
        ({"version": 2}, "version 2; this lorafold reads up to 1"),
        ({"format": "other"}, "format is 'other'"),
        ({"shards": None}, "shards must be an object, found None"),
        ({"shards": {"..%2f": SHARD}}, "the name of a shard"),
        ({"shards": {f"../{NAME}": SHARD}}, "the name of a shard"),
        ({"shards": {f"{NAME}\n": SHARD}}, "the name of a shard"),
        ({"shards": {NAME: {**SHARD, "bytes": 1.0}}}, "bytes must be a whole number"),
        ({"shards": {NAME: {**SHARD, "data_sha256": "0"}}}, "data_sha256 must be a SHA-256"),
        ({"shards": {NAME: {"bytes": 1}}}, "has no field 'header_sha256'"),
        ({"shards": {NAME: SHARD}}, f"{NAME} is shard-.* by its checksums"),
        ({"adapters": [{**PART, "file": "../x.json"}]}, "the name of a list of adapters"),
    ],
    ids=str,
)
def test_what_is_no_library_is_refused_with_the_reason(tmp_path, content, message):
    if isinstance(content, dict):
        content = stamped({**json.loads(Manifest().to_bytes({})), **content})
    elif content is not None:
        content = content.encode(errors="surrogateescape")
    if content is not None:
        (tmp_path / "library.json").write_bytes(content)
    with pytest.raises(FileError, match=message) as caught:
        Store.open(tmp_path)
    assert str(tmp_path) in str(caught.value)


def stamped(manifest):
    """library.json of what its object holds, its own checksum made right."""
    rest = {k: v for k, v in manifest.items() if k != "sha256"}
    raw = json.dumps(rest, separators=(",", ":")).encode()
    return b'{"sha256":"' + hashlib.sha256(raw).hexdigest().encode() + b'",' + raw[1:]


def test_paths_that_are_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileError, match="x does not exist"):
        Store.open(tmp_path / "x")
    with pytest.raises(FileError, match="is a file"):
        Store.open(tmp_path / "file")
    store = create(tmp_path / "lib", 1)
    shutil.rmtree(tmp_path / "lib")
    with pytest.raises(FileError, match="lib can't be changed: No such file"), store.transaction():
        pass
    assert state(store) == ("created", [1])


# Damage


def test_a_changed_byte_is_found_by_verify_and_a_lost_one_by_open(tmp_path):
    store = create(tmp_path / "lib", 1, 2)
    one, name = used(store)
    path = tmp_path / "lib" / name
    raw = path.read_bytes()

    def damage():
        with Store.open(tmp_path / "lib") as found:
            assert set(found.shards) == {one, name} - set(found.state.damage)
            return {file: (d.text, d.lost) for file, d in found.state.damage.items()}

    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    damaged = Store.open(tmp_path / "lib")
    with pytest.raises(FileError, match=f"{name} is damaged: its tensors"):
        damaged.verify()
    with pytest.raises(FileError, match=f"{name} is damaged"):
        damaged.save(tmp_path / "copy")
    assert damage() == {}
    for content, said in [
        (raw[:-1], "is truncated"),
        (raw[:20] + b"?" + raw[21:], "is damaged: its header"),
        (None, "is missing"),
    ]:
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        found = damage()
        assert set(found) == {name}
        text, lost = found[name]
        assert f"{name} {said}" in text
        assert lost
        with Store.open(tmp_path / "lib") as store, pytest.raises(FileError, match=said):
            store.save(tmp_path / "copy")
        with Store.open(tmp_path / "lib") as store, pytest.raises(FileError, match=said):
            store.verify()
    assert os.listdir(tmp_path) == ["lib"]
    create(tmp_path / "lib", 3, overwrite=True)
    assert state_at(tmp_path / "lib") == ("created", [3])


def test_what_can_not_be_read_now_may_be_whole(tmp_path, monkeypatch):
    """A disk that fails is damage, but not known to be loss; a full table of files is neither."""
    create(tmp_path / "lib", 1, 2)
    (first, *_) = used(Store.open(tmp_path / "lib"))
    opened = os.open

    def failing(number):
        def fail(path, *args, **kwargs):
            if os.path.basename(path) == first:
                raise OSError(number, os.strerror(number), path)
            return opened(path, *args, **kwargs)

        monkeypatch.setattr(os, "open", fail)

    for number in (errno.EIO, errno.EACCES):
        failing(number)
        found = Store.open(tmp_path / "lib").state.damage
        assert list(found) == [first]
        assert not found[first].lost
    failing(errno.EMFILE)
    with pytest.raises(FileError, match="Too many open files"):
        Store.open(tmp_path / "lib")


def test_what_a_change_does_not_know_it_leaves(tmp_path):
    """Lost shards and lists stay named, so that they can be put back; then all is there again."""
    store = create(tmp_path / "lib", 1, 2)
    one, two = used(store)
    raw = (tmp_path / "lib" / one).read_bytes()
    (tmp_path / "lib" / one).unlink()
    damaged = Store.open(tmp_path / "lib")
    with damaged.transaction() as t:
        t.commit(saying("changed", [one, two, add_shard(t, 7)]))
    assert list(damaged.state.missing) == list(Store.open(tmp_path / "lib").state.damage) == [one]
    (tmp_path / "lib" / one).write_bytes(raw)
    with damaged.transaction() as t:  # which looks again
        assert not t.state.damage
    assert state_at(tmp_path / "lib") == ("changed", [1, 2, 7])


# Readers beside writers


def test_readers_do_not_notice_writers(tmp_path):
    writer = create(tmp_path / "lib", 1, 2)
    reader = Store.open(tmp_path / "lib")
    held = writer.shards
    change(writer)
    assert state(reader) == ("created", [1, 2])
    reader.verify()
    # A dict of shards taken before the change stays readable, too.
    assert {s.read("0")[0] for s in held.values()} == {1, 2}
    create(tmp_path / "lib", 3, overwrite=True)
    create(None, 4).save(tmp_path / "lib", overwrite=True)
    shutil.rmtree(tmp_path / "lib")
    assert state(reader) == ("created", [1, 2])
    assert state(writer) == ("changed", [2, 9])


def test_a_shard_that_vanishes_while_opening_is_retried(tmp_path, monkeypatch):
    writer = create(tmp_path / "lib", 1)
    wins = 3
    opened = Shard.open

    def outrun(path, info=None):
        nonlocal wins
        if wins:
            wins -= 1
            monkeypatch.setattr(Shard, "open", opened)
            change(writer, value=wins)
            monkeypatch.setattr(Shard, "open", outrun)
        return opened(path, info)

    monkeypatch.setattr(Shard, "open", outrun)
    assert state(Store.open(tmp_path / "lib")) == ("changed", [0])
    assert wins == 0
    wins = 1000
    with pytest.raises(FileError, match="changes faster"):
        Store.open(tmp_path / "lib")


def test_old_shards_are_let_go(tmp_path):
    store = create(tmp_path / "lib", 1, 2)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for value in (7, 8, 9):
        change(store, value)
        create(tmp_path / "other", 1, overwrite=True)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    store.close()
    assert len(os.listdir("/proc/self/fd")) == before - 2
    change(store, 10)  # opens what it needs again
    assert state(store) == ("changed", [9, 10])


# Writers beside writers


def in_child(operation):
    """Run in a forked child until it says so; (its pid, a function that lets it go on)."""
    ready, said = os.pipe()
    goes, go = os.pipe()
    child = os.fork()
    if not child:
        try:
            operation(lambda: (os.write(said, b"!"), os.read(goes, 1)))
            os._exit(0)
        finally:
            os._exit(1)
    assert os.read(ready, 1) == b"!"
    return child, lambda: os.write(go, b"!")


def slow_change(path, pause):
    with Store.open(path).transaction() as t:
        shard = add_shard(t, 7)
        pause()
        t.commit(saying("child", [*used(t), shard]))


def test_two_writers_take_turns(tmp_path, monkeypatch):
    path = tmp_path / "lib"
    store = create(path, 1)
    child, go_on = in_child(functools.partial(slow_change, path))
    for locked in (
        store.transaction(timeout=0),
        Store.create(path, overwrite=True, timeout=0),
    ):
        with pytest.raises(FileError, match=r"lib is being changed by another process"), locked:
            pytest.fail("the block was entered")
    with pytest.raises(FileError, match=r"lib is being changed by another process"):
        create(None, 2).save(path, overwrite=True, timeout=0)
    waits = []

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 1:
            go_on()
        os.sched_yield()

    monkeypatch.setattr(turns.time, "sleep", wait)
    with store.transaction(timeout=60) as t:
        assert t.manifest.base_model == "child"  # read under the lock
        assert t.shards.keys() == set(used(t))
        t.commit(saying("parent", [*used(t), add_shard(t, 8)]))
    assert waits
    assert os.waitpid(child, 0)[1] == 0
    assert state_at(path) == state(store) == ("parent", [1, 7, 8])


def test_a_killed_writer_holds_no_lock_and_its_leftovers_go(tmp_path):
    path = tmp_path / "lib"
    store = create(path, 1)
    child, _ = in_child(functools.partial(slow_change, path))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for left in (".library.json.0123456789abcdef.tmp", "adapters-0123456789abcdef.json"):
        (path / left).write_text("{")
    (path / "shard-0123456789abcdef.safetensors").write_text("x")
    (path / "mine.safetensors").write_text("not named like a shard")
    assert len(files(path)) == 7
    assert state_at(path) == ("created", [1])
    with store.transaction(timeout=0):
        assert files(path) == sorted(["library.json", "mine.safetensors", *store.shards])


def test_the_lock_of_a_replaced_library_does_not_count(tmp_path, monkeypatch):
    """A writer that waited at the old folder must not change what is no longer there."""
    path = tmp_path / "lib"
    store = create(path, 1)
    lock, replaced = turns.try_lock, []

    def replaced_meanwhile(descriptor):
        if not replaced:
            replaced.append(1)
            create(None, 5).save(path, overwrite=True)
        return lock(descriptor)

    monkeypatch.setattr(turns, "try_lock", replaced_meanwhile)
    with store.transaction(timeout=0) as t:
        t.commit(saying("late", used(t)))
    assert state_at(path) == ("late", [5])


def test_a_lock_that_does_not_lock_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(turns, "try_lock", lambda _: True)
    store, other = create(tmp_path / "lib", 1), Store.open(tmp_path / "lib")
    with (
        pytest.raises(FileError, match="in spite of the lock"),
        store.transaction() as t,
    ):
        change(other)
        t.commit(t.manifest)
    assert state_at(tmp_path / "lib") == ("changed", [9])


def test_no_right_to_write(tmp_path, monkeypatch):
    store = create(tmp_path / "lib", 1)

    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(FileError, match="can't be changed: Permission denied"), store.transaction():
        pass


# Killed anywhere


def operations():
    """name -> (what is there before, the operation, what is there after)."""

    def save(path):
        create(None, 5, note="saved").save(path, overwrite=True)

    old = ("created", [1, 2])
    return {
        "create": (None, lambda path: create(path, 5, 6), ("created", [5, 6])),
        "change": (old, lambda path: change(Store.open(path)), ("changed", [2, 9])),
        "overwrite": (old, lambda path: create(path, 5, overwrite=True), ("created", [5])),
        "save over": (old, save, ("saved", [5])),
    }


@pytest.mark.parametrize("mode", ["kill", "torn", "fail once", "fail on"])
@pytest.mark.parametrize("name", list(operations()))
def test_killed_anywhere_a_store_is_old_or_new(tmp_path, kill_points, name, mode):
    before, operation, after = operations()[name]
    template = tmp_path / "template"
    if before:
        create(template, 1, 2)
    runs = []

    def prepare():
        runs.append(tmp_path / str(len(runs)) / "lib")
        runs[-1].parent.mkdir()
        if before:
            shutil.copytree(template, runs[-1])
        return runs[-1]

    seen = []

    def check(path, n):
        found = state_at(path)
        assert found in ([after] if n is None else [before, after])
        seen.append(found == after)
        if mode == "fail once" and found == before and before:
            assert os.listdir(path.parent) == ["lib"]  # cleaned up
            assert len(files(path)) == 3
        # The next writer finds no lock, and removes what was left.
        atomic._swept.clear()
        if found is None:
            create(path, 1)
        else:
            change(Store.open(path))
        with atomic.new_directory(path.parent / "sibling", LIBRARY):
            pass
        assert sorted(os.listdir(path.parent)) == ["lib", "sibling"]
        assert files(path) == ["library.json", *sorted(Store.open(path).shards)]

    assert kill_points.everywhere(prepare, operation, check, mode) >= 10
    if mode != "fail once":  # there, a failure may be one that doesn't matter
        assert seen == sorted(seen), "the new state must not go away again"
    assert not seen[0]
    assert seen[-1]


def broken_order(path):
    """What a change must not do: remove before the manifest is replaced."""
    with Store.open(path) as store:
        os.unlink(path / next(iter(store.shards)))
        change(store)


def broken_replace(path):
    """What a change must not do: write the manifest in place."""
    raw = (path / "library.json").read_bytes()
    descriptor = os.open(path / "library.json", os.O_WRONLY | os.O_TRUNC)
    os.write(descriptor, raw)


@pytest.mark.parametrize("operation", [broken_order, broken_replace])
def test_killing_finds_broken_orders(tmp_path, kill_points, operation):
    def check(path, n):
        state_at(path)

    paths = (tmp_path / str(i) for i in range(100))

    def prepare():
        path = next(paths)
        create(path, 1)
        return path

    with pytest.raises(FileError):
        kill_points.everywhere(prepare, operation, check)


def test_everything_is_flushed_before_it_is_named(tmp_path, kill_points):
    for name, (before, operation, _) in operations().items():
        path = tmp_path / name
        if before:
            create(path, 1, 2)
        calls = kill_points.trace(lambda: operation(path))  # noqa: B023 - called at once
        assert kill_points.unsafe_renames(calls) == [], name
        kinds = [kind for kind, *_ in calls]
        renamed = max(i for i, kind in enumerate(kinds) if kind in ("replace", "_renameat2"))
        assert "unlink" not in kinds[:renamed], name


def test_shard_names_are_flushed_before_the_manifest_has_them(tmp_path, kill_points):
    store = create(tmp_path / "lib", 1)
    calls = kill_points.trace(lambda: change(store))
    replaced = next(
        i for i, call in enumerate(calls) if call[0] == "replace" and call[-1].endswith(MANIFEST)
    )
    assert ("fsync", str(tmp_path / "lib")) in calls[:replaced]
    assert ("fsync", str(tmp_path / "lib")) in calls[replaced:]


def test_a_commit_is_a_few_calls(tmp_path, kill_points):
    store = create(tmp_path / "lib", 1)

    def operation():
        with store.transaction() as t:
            t.commit(saying("changed", [add_shard(t, *range(1000))]))

    calls = kill_points.trace(operation)
    assert len(calls) < 60
    assert MANIFEST in os.path.basename(calls[-3][-1])  # then the folder and the old shard
