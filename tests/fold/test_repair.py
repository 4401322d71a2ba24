"""A library that lost a file gives all that does not need it, and is made whole without it."""

import contextlib
import gzip
import itertools
import os
import shutil

import pytest
import torch

import lorafold as lf
from lorafold.errors import FileError, MismatchError

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
        modules = {p: lf.LowRank(u.A, step[p].B, 0.5 + i % 2) for p, u in first.items()}
        return lf.Adapter(modules, {"head": torch.arange(3.0) + i}, {"r": 2, "lora_alpha": i})

    return {f"a{i}": kin(i) for i in range(7)}


@pytest.fixture(scope="module", params=["input", "flat"])
def template(request, tmp_path_factory, adapters):
    """A library of several shards and lists: some of one fold, and some added later."""
    path = tmp_path_factory.mktemp("template") / "lib"
    first = {name: adapters[name] for name in ("a0", "a1", "a2", "a3")}
    with lf.fold(first, path, tolerance=0.05, form=request.param) as lib:
        lib.add(adapters["a4"], "a4", form="exact")
        lib.add(adapters["a5"], "a5", tolerance=0.01)
        lib.add(adapters["a6"], "a6")
    return path


@pytest.fixture
def library(template, tmp_path):
    return shutil.copytree(template, tmp_path / "lib")


def opened(path):
    with pytest.warns(UserWarning, match="is damaged"):
        return lf.Library.open(path)


def readable(lib):
    """{name: digest} of what comes out."""
    found = {}
    for name in lib:
        with contextlib.suppress(FileError):
            found[name] = lib[name].digest
    return found


def gone(path):
    path.unlink()


def cut(path):
    os.truncate(path, path.stat().st_size - 7)


def empty(path):
    os.truncate(path, 0)


def flipped(path):
    raw = path.read_bytes()
    at = len(raw) - 5
    path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])


@pytest.mark.parametrize("damage", [gone, cut])
def test_one_lost_shard_loses_what_is_in_it_alone(library, adapters, damage):
    whole = readable(lf.Library.open(library))
    for shard in sorted(library.glob("shard-*")):
        raw = shard.read_bytes()
        with lf.Library.open(library) as lib:
            inside = {name for name in lib if lib.entry(name)["shard"] == shard.name}
        damage(shard)
        lib = opened(library)
        assert lib.names == list(whole)
        found = readable(lib)
        assert found.items() <= whole.items()
        assert not inside & set(found)
        assert {n for n in lib if lib.entry(n).get("problem")} == inside
        assert lib.stats()["damage"]
        checks = lib.verify(strict=False)
        assert {n for n in checks if checks[n].problem is None} == set(found)
        assert shard.name in checks.damage[0]
        with pytest.raises(FileError, match=shard.name):
            lib.verify()
        shard.write_bytes(raw)  # from a copy: all is there again
        assert readable(lf.Library.open(library)) == whole


def test_what_is_sound_can_be_changed_beside_what_is_lost(library, adapters):
    (last,) = {lf.Library.open(library).entry("a4")["shard"]}
    raw = (library / last).read_bytes()
    (library / last).unlink()
    lib = opened(library)
    lib.remove("a5")
    lib.add(adapters["a5"], "new", form="svd")
    assert "new" in readable(lib)
    (library / last).write_bytes(raw)
    with lf.Library.open(library) as lib:
        lib.verify()
        assert "a5" not in lib
        assert lib["a4"].digest == adapters["a4"].digest
    (library / last).unlink()
    lib = opened(library)
    lib.remove("a4")  # which nothing can be read of
    lf.Library.open(library).verify()


@pytest.fixture
def long(tmp_path, adapters, monkeypatch):
    """A library of several lists."""
    monkeypatch.setattr("lorafold.fold.store.part._LONGEST", 4)
    first = {f"b{k}": adapters[f"a{k % 7}"] for k in range(9)}
    with lf.fold(first, tmp_path / "long", tolerance=0.05, form="input") as lib:
        lib.add(adapters["a5"], "a5")
    assert len(list((tmp_path / "long").glob("adapters-*"))) > 2
    return tmp_path / "long"


def test_a_lost_list_takes_its_names_and_no_others(long, adapters):
    before = readable(lf.Library.open(long))
    whole = shutil.copytree(long, long.with_name("whole"))
    for part in sorted(long.glob("adapters-*")):
        raw = part.read_bytes()
        part.unlink()
        lib = opened(long)
        found = readable(lib)
        assert 0 < len(found) < len(before)
        assert found.items() <= before.items()
        lost = sorted(set(before) - set(lib.names))
        copy = shutil.copytree(long, long.with_name(part.name))
        lib = opened(copy)
        lib.add(adapters["a0"], lost[0], form="svd")  # a name that the list has, too
        lib.remove(next(n for n in lib.names if n not in lost))
        (copy / part.name).write_bytes(raw)  # it comes back: no shard that it needs is gone
        with lf.Library.open(copy) as lib:
            lib.verify()
            assert set(lost) <= set(readable(lib))
        done = lf.fold.repair(long, {"new": adapters["a1"]})
        assert (done.lost_lists, done.rebuilt, done.dropped) == (1, ("new",), {})
        with lf.Library.open(long) as lib:
            assert {n: d for n, d in readable(lib).items() if n != "new"} == found
            lib.verify({"new": adapters["a1"]})
        shutil.rmtree(long)
        shutil.copytree(whole, long)


@pytest.mark.parametrize(
    ("damage", "given"), [(gone, False), (empty, True), (flipped, False), (flipped, True)]
)
def test_repair_drops_or_rebuilds_what_is_lost(template, tmp_path, adapters, damage, given):
    for k, shard in enumerate(sorted(template.glob("shard-*"))):
        library = shutil.copytree(template, tmp_path / str(k))
        with lf.Library.open(library) as lib:
            whole = readable(lib)
            bounds = {name: lib.entry(name)["bound"] for name in lib}
        damage(library / shard.name)
        lib = lf.Library.open(library) if damage is flipped else opened(library)
        sound = readable(lib)
        lost = set(whole) - set(sound)
        done = lf.fold.repair(library, adapters if given else None)
        assert done.damage
        assert shard.name in done.damage[0]
        assert set(done.rebuilt) == (lost if given else set())
        assert set(done.dropped) == (set() if given else lost)
        assert done.kept == len(sound)
        with lf.Library.open(library) as lib:
            assert lib.names == [name for name in whole if given or name in sound]
            assert readable(lib).items() >= sound.items()  # not a bit of the others has changed
            errors = lib.verify(adapters if given else {n: adapters[n] for n in sound} or None)
            assert all(errors[n] <= bounds[n] + 1e-6 for n in errors)
            lib.add(adapters["a1"], "after")  # on the bases that are left
            assert lib.verify({"after": adapters["a1"]})["after"] <= 0.05
            assert readable(lib).items() >= sound.items()
        assert lf.fold.repair(library).damage == ()
        named = {part.file.name for part in lib.contents.manifest.parts}
        there = {"library.json", ".library.json.gz", ".lock", *lib.contents.state.shards, *named}
        assert set(os.listdir(library)) == there


def test_repair_of_several_losses_at_once(library, adapters):
    whole = readable(lf.Library.open(library))
    for shard in sorted(library.glob("shard-*"))[1:]:
        shard.unlink()
    with pytest.raises(FileError, match=r"is missing; put the file back .* `lorafold repair "):
        [opened(library)[name] for name in whole]
    sound = readable(opened(library))
    done = lf.fold.repair(library, adapters)
    assert {*done.rebuilt, *sound} == set(whole)
    with lf.Library.open(library) as lib:
        assert list(lib) == list(whole)
        lib.verify(adapters)
        assert readable(lib).items() >= sound.items()
    for path in library.glob("adapters-*"):
        os.truncate(path, 3)
    done = lf.fold.repair(library, adapters)
    assert (done.lost_lists, done.kept, set(done.rebuilt)) == (1, 0, set(adapters))
    lf.Library.open(library).verify(adapters)


def test_repair_without_damage_changes_nothing(library):
    before = {p.name: p.read_bytes() for p in library.iterdir()}
    assert lf.fold.repair(library) == lf.fold.Repair(kept=7)
    assert {p.name: p.read_bytes() for p in library.iterdir()} == before


def test_repair_takes_only_what_was_folded(library, adapters):
    with lf.Library.open(library) as lib:
        (library / lib.entry("a5")["shard"]).unlink()
    before = {p.name: p.read_bytes() for p in library.iterdir()}
    with pytest.raises(MismatchError, match="source of 'a5' is not what was folded"):
        lf.fold.repair(library, {"a5": adapters["a1"]})
    assert {p.name: p.read_bytes() for p in library.iterdir()} == before


def test_repair_does_not_throw_away_what_only_can_not_be_read(library, monkeypatch):
    shard = sorted(library.glob("shard-*"))[0]
    open_now = os.open

    def refuse(path, *args, **kwargs):
        if os.fspath(path) == str(shard):
            raise PermissionError(13, "Permission denied")
        return open_now(path, *args, **kwargs)

    before = {p.name: p.read_bytes() for p in library.iterdir()}
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(FileError, match="may be whole; make it readable"):
        lf.fold.repair(library)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in library.iterdir()} == before


def test_a_manifest_is_put_back_from_its_second_copy(library):
    raw, copy = (library / "library.json").read_bytes(), library / ".library.json.gz"
    assert gzip.decompress(copy.read_bytes()) == raw
    for how in ("cut", "empty", "edited", "gone", "folder"):
        (library / "library.json").unlink()
        if how == "folder":
            (library / "library.json").mkdir()
        elif how != "gone":
            bad = {"cut": raw[:100], "empty": b"", "edited": raw.replace(b"svd", b"sve", 1)}[how]
            (library / "library.json").write_bytes(bad)
        with pytest.raises(FileError, match=r"library\.json|library is"):
            lf.Library.open(library)
        if how == "folder":  # what is not lorafold's is not removed
            with pytest.raises(FileError):
                lf.fold.repair(library)
            (library / "library.json").rmdir()
        found = lf.fold.repair(library)
        assert "as its second copy had it" in found.damage[0]
        assert not found.dropped
        assert (library / "library.json").read_bytes() == raw
        lf.Library.open(library).verify()


def test_a_manifest_without_a_second_copy_can_not_be_repaired(library):
    copy = library / ".library.json.gz"
    data = copy.read_bytes()
    os.truncate(library / "library.json", 100)
    flipped = data[:40] + bytes([data[40] ^ 1]) + data[41:]
    for bad in (b"", data[:-9], flipped, gzip.compress(b"{}")):
        copy.write_bytes(bad)
        with pytest.raises(FileError, match=r"no second copy: put library.json back from a copy"):
            lf.fold.repair(library)
    copy.unlink()
    (library / "library.json").unlink()
    with pytest.raises(FileError, match=r"holds no library\.json$"):
        lf.fold.repair(library)


def test_a_library_that_lost_manifest_and_shard_is_repaired_at_once(library, adapters):
    names = list(lf.Library.open(library))
    with lf.Library.open(library) as lib:
        gone = library / lib.entry(names[0])["shard"]
    gone.unlink()
    (library / "library.json").unlink()
    with pytest.raises(FileError, match=r"lorafold repair .* puts it back"):
        lf.Library.open(library)
    found = lf.fold.repair(library, adapters)
    assert len(found.damage) == 2
    assert names[0] in found.rebuilt
    assert set(lf.Library.open(library)) == set(names)


def test_killed_anywhere_a_repair_can_be_done_again(template, tmp_path, adapters, kill_points):
    """Until it is done the damage stands, and afterwards nothing is left to do."""
    torch.set_num_threads(1)
    damaged = shutil.copytree(template, tmp_path / "damaged")
    with lf.Library.open(damaged) as lib:
        shards = {lib.entry(name)["shard"] for name in ("a0", "a5")}
        before = readable(lib)
    for shard in shards:
        flipped(damaged / shard)
    sound = readable(lf.Library.open(damaged))
    count = itertools.count()
    seen = []

    def prepare():
        return shutil.copytree(damaged, tmp_path / str(next(count)))

    def check(path, n):
        with lf.Library.open(path) as lib:
            assert set(lib) == set(before)
            assert readable(lib).items() >= sound.items()
            seen.append(all(c.problem is None for c in lib.verify(strict=False).values()))
        lf.fold.repair(path, adapters)
        with lf.Library.open(path) as lib:
            assert lib.names == list(before)
            lib.verify(adapters)
        shutil.rmtree(path)

    kill_points.everywhere(prepare, lambda path: lf.fold.repair(path, adapters), check)
    assert seen == sorted(seen)
    assert seen[-1]
    assert not seen[0]


def test_who_has_it_open_sees_the_loss_and_can_save_it(library, adapters):
    lib = lf.Library.open(library)
    whole = readable(lib)
    (library / lib.entry("a5")["shard"]).unlink()
    with pytest.raises(FileError, match=r"is missing; who has it open still can save"):
        lib.verify()
    checks = lib.verify(strict=False)
    assert len(checks.damage) == 1
    assert all(check.problem is None for check in checks.values())
    with lib.save(library.with_name("saved")) as saved:
        saved.verify()
        assert readable(saved) == whole
    other = lf.Library.open(library.with_name("saved"))
    lf.Library.open(library.with_name("saved")).refold(tolerance=0.3, sources=adapters)
    other.verify()  # the files that it has open are gone because a writer has moved on
