"""Nothing damaged in a library is silently wrong, and nothing in it ends in any other error."""

import contextlib
import copy
import hashlib
import json
import os
import random
import shutil
import warnings

import pytest
import torch

import lorafold as lf
from lorafold.errors import FileError, LorafoldError, ToleranceError

SHAPES = {"q": (12, 8), "v": (8, 12)}


def dumped(value):
    return json.dumps(value, separators=(",", ":")).encode()


@pytest.fixture(scope="module")
def adapters(make_adapter):
    first = make_adapter(SHAPES, 2, seed=0)

    def kin(i):
        step = make_adapter(SHAPES, 2, seed=i)
        modules = {p: lf.LowRank(u.A, step[p].B, 0.5 + i % 2) for p, u in first.items()}
        return lf.Adapter(modules, {"head": torch.arange(3.0) + i}, {"r": 2, "lora_alpha": i})

    return {f"a{i}": kin(i) for i in range(6)}


@pytest.fixture(scope="module")
def template(tmp_path_factory, adapters):
    """A library with bases, several shards and lists, and one adapter stored exactly."""
    path = tmp_path_factory.mktemp("template") / "lib"
    some = {name: adapters[name] for name in ("a0", "a1", "a2", "a3")}
    with lf.fold(some, path, tolerance=0.1, form="input") as lib:
        lib.add(adapters["a4"], "exact", form="exact")
        lib.remove("a1")
        lib.add(adapters["a5"], "a3", replace=True, tolerance=0.01)
    return path


@pytest.fixture
def library(template, tmp_path):
    return shutil.copytree(template, tmp_path / "lib")


def everything(lib):
    """All that a library says and holds, comparable."""
    found = {}
    for name in lib:
        a = lib[name]
        found[name] = (
            {p: (u.A.tolist(), u.B.tolist(), u.scale) for p, u in a.modules.items()},
            {k: t.tolist() for k, t in a.extras.items()},
            a.config,
            a.layouts,
            lib.entry(name),
        )
    return found, lib.stats(), lib.tolerance


def looked_through(path):
    with lf.Library.open(path) as lib:
        return everything(lib)


def what_is_seen(path):
    """Everything in a library that is damaged; None where the damage is met. `verify` meets it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            lib = lf.Library.open(path)
        except FileError:
            return None
    with lib:
        found = None
        with contextlib.suppress(FileError):
            found = everything(lib)
        with pytest.raises(FileError, match=r"^.*$"):
            lib.verify()
        if lib.contents.state.damage:
            return None  # it was told of
    return found


def test_no_flipped_bit_is_silently_wrong(library):
    """In 1,500 places of the small files; `verify` finds every one."""
    expected = looked_through(library)
    files = sorted(p for p in library.iterdir() if p.name[0] != ".")
    assert len(files) == 5
    g = random.Random(0)
    silent = 0
    for k in range(1500):
        path = files[k % len(files)]
        raw = path.read_bytes()
        at, bit = g.randrange(len(raw)), g.randrange(8)
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :])
        found = what_is_seen(library)
        assert found in (None, expected), (path.name, at, bit)
        silent += found is not None
        path.write_bytes(raw)
    assert looked_through(library) == expected
    assert silent < 100  # in the header's padding and what has left: nothing that is read


def flipped(library, name, where=-1):
    """Flip a bit in a record of an adapter."""
    with lf.Library.open(library) as lib:
        entry = lib.contents.entry(name)
        shard = lib.contents.shard_of(entry)
        record = shard.read_bytes("m0", *lib.contents.span(0, entry))
        path = library / shard.stated.name
    raw = path.read_bytes()
    assert raw.count(record) == 1
    at = raw.index(record) + where % len(record)
    path.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])


@pytest.mark.parametrize("where", [0, 9, -1])
def test_a_flipped_bit_in_a_record_is_found_when_it_is_read(library, adapters, where):
    flipped(library, "a0", where)
    with lf.Library.open(library) as lib:
        c = lib.contents
        for read in (lambda: lib["a0"], lambda: lib.update("a0", "q"), lambda: c.parts("a0", "q")):
            with pytest.raises(FileError, match="damaged: the record of 'a0' at 'q'"):
                read()
        assert lib["a2"].modules.keys() == SHAPES.keys()  # the others are there
        assert lib["exact"].digest == adapters["a4"].digest


def test_no_change_gives_damage_a_right_checksum(library):
    """What is damaged is not copied into a new shard, which would state it as right."""
    flipped(library, "a2")
    with lf.Library.open(library) as lib:
        shard = lib.entry("a2")["shard"]
        lib.remove("a0")  # most of that shard is unused now, and still it is not copied
        assert lib.entry("a2")["shard"] == shard
        with pytest.raises(FileError, match="damaged: the record of 'a2'"):
            lib["a2"]
        with pytest.raises(FileError, match="damaged"):
            lib.verify()
        with pytest.raises(FileError, match="damaged"):
            lib.save(library.parent / "copy")
        assert not any(name.endswith(".tmp") for name in os.listdir(library))
    # What is damaged can be taken out, and the rest is whole again.
    with lf.Library.open(library) as lib:
        lib.remove("a2")
        lib.verify()


def test_a_row_that_is_anothers_is_found(library):
    """With every checksum made right: `verify` compares what is stored exactly with its digest."""
    with lf.Library.open(library) as lib:
        ids = {name: lib.entry(name)["id"] for name in lib}
    for name in ("a0", "exact"):
        fresh = library.with_name(name)
        shutil.copytree(library, fresh)
        manifest, lists = read_files(fresh)
        for entries in lists:
            for entry in entries:
                if entry["name"] == "exact":
                    entry.update(id=ids["a0"], extras={"head": f"x{ids['a0']}.0"})
        write_files(fresh, manifest, lists)
        with lf.Library.open(fresh) as lib, pytest.raises(ToleranceError, match="its digest"):
            lib.verify()


# Edited by hand


def read_files(path):
    """library.json, and the lists of adapters that it names."""
    manifest = json.loads((path / "library.json").read_bytes())
    return manifest, [json.loads((path / p["file"]).read_bytes()) for p in manifest["adapters"]]


def write_files(path, manifest, lists):
    """What is edited, with names and checksums made right."""
    if type(manifest) is dict and type(manifest.get("adapters")) is list:
        for part, entries in zip(manifest["adapters"], lists, strict=False):
            if type(part) is dict and entries is not None:
                raw = entries if type(entries) is bytes else dumped(entries)
                digest = hashlib.sha256(raw).hexdigest()
                name = f"adapters-{digest[:16]}.json"
                part.update(file=name, bytes=len(raw), sha256=digest)
                if type(entries) is list:
                    part["listed"] = len(entries)
                (path / name).write_bytes(raw)
    (path / "library.json").write_bytes(stamped(manifest))


def stamped(manifest):
    rest = {k: v for k, v in manifest.items() if k != "sha256"}
    raw = dumped(rest)
    return b'{"sha256":"' + hashlib.sha256(raw).hexdigest().encode() + b'",' + raw[1:]


HUGE = 1 << 70
VALUES = [None, True, -1, 0, 7, HUGE, 0.5, float("inf"), "x", "../x", [], [[]], {}, {"x": 1}]
VALUES += [["U0", "b", 2], "shard-0123456789abcdef.safetensors"]


def places(value, path=()):
    """Every place in JSON, those inside first."""
    kinds = {dict: dict.items, list: enumerate}
    items = kinds[type(value)](value) if type(value) in kinds else ()
    for key, item in items:
        yield from places(item, (*path, key))
        yield (*path, key)


def at(value, path):
    for key in path:
        value = value[key]
    return value


def edits(value):
    """(what, edited copy) for every place: gone, twice, and every other value."""
    for path in places(value):
        owner, key = path[:-1], path[-1]
        gone = copy.deepcopy(value)
        del at(gone, owner)[key]
        yield (*path, "gone"), gone
        if type(at(value, owner)) is list:
            twice = copy.deepcopy(value)
            at(twice, owner).append(at(value, path))
            yield (*path, "twice"), twice
        for other in VALUES:
            if type(other) is not type(at(value, path)) or other != at(value, path):
                edited = copy.deepcopy(value)
                at(edited, owner)[key] = other
                yield (*path, other), edited


def survives(path, adapter):
    """Whether everything that is done with a library ends well; else in a LorafoldError."""
    with contextlib.suppress(LorafoldError, UserWarning), lf.Library.open(path) as lib:
        everything(lib)
        repr(lib)
        lib.verify(strict=False)
        for name in lib:
            for module in SHAPES:
                lib.contents.parts(name, module)
        lib.project(adapter)
        return True
    return False


def test_every_edited_manifest_is_read_or_refused(library, adapters):
    manifest, lists = read_files(library)
    kept = count = 0
    for what, edited in edits(manifest):
        if what[0] == "adapters" and len(what) == 4 and what[2] in ("file", "bytes", "sha256"):
            write_files(library, edited, [])
        else:
            write_files(library, edited, lists)
        count += 1
        try:
            kept += survives(library, adapters["a0"])
        except Exception as e:
            raise AssertionError(f"{what}: {e!r}") from e
    assert count > 800
    assert kept < count / 4


def test_every_edited_adapter_is_read_or_refused(library, adapters):
    manifest, lists = read_files(library)
    kept = count = 0
    for k, entries in enumerate(lists):
        for what, edited in edits(entries):
            others = [edited if i == k else None for i in range(len(lists))]
            write_files(library, copy.deepcopy(manifest), others)
            count += 1
            try:
                kept += survives(library, adapters["a0"])
            except Exception as e:
                raise AssertionError(f"{what}: {e!r}") from e
    assert count > 500
    assert kept < count / 3


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"[", "not valid JSON"),
        (b"{}", "must be a list"),
        (b"[1]", "must be an object, found 1"),
        (b'[{"name":NaN}]', "NaN is no number"),
        (b'[{"name":"a","name":"b"}]', "'name' appears twice"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1" + b"0" * 5000 + b"]", "not valid JSON"),
        (b"\xff", "not valid JSON"),
    ],
)
def test_lists_that_are_none(library, raw, message):
    manifest, _ = read_files(library)
    write_files(library, manifest, [raw])
    with pytest.raises(FileError, match=message) as caught:
        looked_through(library)
    assert "adapters-" in str(caught.value)


def test_two_names_or_modules_alike_are_refused(library):
    manifest, lists = read_files(library)
    write_files(library, copy.deepcopy(manifest), [[*lists[0], lists[0][0]], *lists[1:]])
    with pytest.raises(FileError, match="two adapters of one name"):
        looked_through(library)
    more = copy.deepcopy(manifest)
    more["adapters"].append({"prefix": "", "listed": 1})
    write_files(library, more, [*lists, lists[0][:1]])
    with pytest.raises(FileError, match="two adapters of one name"):
        looked_through(library)
    manifest["modules"][1]["path"] = manifest["modules"][0]["path"]
    write_files(library, manifest, lists)
    with pytest.raises(FileError, match="two modules of one path"):
        lf.Library.open(library)


# What is absent, and what is damaged; and where it lies


SIDES = [("flat", "A"), ("flat", "B"), ("shared", "U"), ("shared", "V"), ("input", "V")]


@pytest.mark.parametrize(("form", "side"), [*SIDES, ("output", "U")])
@pytest.mark.parametrize("opened", [False, True])
def test_a_damaged_side_is_not_taken_for_none(tmp_path, adapters, form, side, opened):
    """By reading, `project` and `add`; and the message has the path that the shard has."""
    some = {name: adapters[name] for name in ("a0", "a1", "a2")}
    lib = lf.fold(some, tmp_path / "lib", tolerance=0.01, form=form)
    (shard,) = (tmp_path / "lib").glob("shard-*")
    key = f"b0.{side}0"
    piece = lib.contents.store.shards[shard.name].read_bytes(key)
    raw = shard.read_bytes()
    at = raw.index(piece) + len(piece) // 2
    shard.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    if opened:
        lib = lf.Library.open(tmp_path / "lib")
    manifest = (tmp_path / "lib" / "library.json").read_bytes()
    for use in (
        lambda: lib["a0"],
        lambda: lib.project(adapters["a3"]),
        lambda: lib.add(adapters["a3"], "a3"),
    ):
        with pytest.raises(FileError, match="is damaged") as caught:
            use()
        assert f"{shard}, key {key!r}" in str(caught.value)
    with pytest.raises(FileError, match=f"shard {shard} is damaged"):
        lib.verify()
    assert (tmp_path / "lib" / "library.json").read_bytes() == manifest
    assert lib.add(adapters["a3"], "own", form="svd") <= 0.01  # that needs no side of others


def test_adapters_of_another_rank_have_no_flat_sides(adapters, make_adapter):
    lib = lf.fold({n: adapters[n] for n in ("a0", "a1", "a2")}, tolerance=0.01, form="flat")
    for rank in (1, 3):
        other = make_adapter(SHAPES, rank, seed=9)
        assert lib.project(other).loadings == {}
        assert lib.add(other, str(rank)) <= 0.01


@pytest.mark.parametrize("overwrite", [False, True])
def test_messages_say_where_a_shard_is(tmp_path, adapters, overwrite):
    """Not where it lay while the library was written."""
    path = tmp_path / "lib"
    if overwrite:
        lf.fold({"b": adapters["a1"]}, path)
    lib = lf.fold({"a": adapters["a0"]}, path, overwrite=overwrite)
    lib.add(adapters["a2"], "c")
    for shard in lib.contents.store.shards.values():
        assert shard.name == str(path / shard.stated.name)
        with pytest.raises(FileError, match=f"shard {path}/shard-[0-9a-f]+.safetensors holds no"):
            shard.read("x")
    for shard in path.glob("shard-*"):
        os.truncate(shard, 5)
    with pytest.raises(FileError, match=f"shard {path}/shard-"):
        lib["a"]
