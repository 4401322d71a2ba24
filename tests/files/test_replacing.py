"""What is not ours survives every overwrite; sources are never written over."""

import errno
import os
import re
import stat
from pathlib import Path

import pytest
import torch

import lorafold as lf
from lorafold.errors import FileError
from lorafold.files import atomic, replacing
from lorafold.files.atomic import new_directory
from lorafold.files.replacing import Kind, check_apart, exchange

THING = Kind("a thing", lambda p: (p / "mark").is_file(), re.compile("mark|data"))


@pytest.fixture(params=["exchange", "two renames"])
def renames(request, monkeypatch):
    """Both kinds of file system."""
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "_renameat2", lambda *_: errno.ENOSYS)


def fill(path, text, overwrite=False, sources=()):
    with new_directory(path, THING, overwrite=overwrite, sources=sources) as staging:
        for name in ("mark", "data"):
            (staging / name).write_text(text)


def content(path):
    return {
        str(p.relative_to(path)): p.read_bytes().decode("latin1")
        for p in sorted(path.rglob("*"))
        if p.is_file()
    }


def tree(path):
    """Everything under a path, links and folders too, to see that nothing at all has changed."""
    return sorted(
        (str(p.relative_to(path)), p.read_bytes() if p.is_file() else None) for p in path.rglob("*")
    )


# An empty directory


def test_an_empty_directory_counts_as_not_there(tmp_path, renames):
    (tmp_path / "x").mkdir(mode=0o700)
    fill(tmp_path / "x", "1")
    assert content(tmp_path / "x") == {"mark": "1", "data": "1"}
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o700
    assert os.listdir(tmp_path) == ["x"]


def test_an_empty_directory_that_fills_meanwhile_is_not_replaced(tmp_path, renames):
    for overwrite in (False, True):
        target = tmp_path / f"x{overwrite}"
        target.mkdir()
        with (
            pytest.raises(FileError, match="appeared while"),
            new_directory(target, THING, overwrite=overwrite),
        ):
            (target / "thesis.tex").write_text("years")
        assert content(target) == {"thesis.tex": "years"}


def test_an_empty_directory_that_is_a_mount_point_is_named(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()

    def busy(source, target):
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr(os, "rename", busy)
    with pytest.raises(FileError, match="x is a mount point: name a folder inside it"):
        fill(tmp_path / "x", "1")


# What may be replaced


def test_its_own_files_are_replaced_and_all_others_stay(tmp_path, renames):
    target = tmp_path / "x"
    fill(target, "1")
    (target / "thesis.tex").write_text("years")
    (target / "figures" / "old").mkdir(parents=True)
    (target / "figures" / "old" / "1.pdf").write_text("plot")
    (target / "figures").chmod(0o750)
    (target / "empty").mkdir()
    (target / "link").symlink_to("thesis.tex")
    (target / "nowhere").symlink_to("gone")
    os.link(target / "thesis.tex", tmp_path / "backup.tex")
    with open(target / "thesis.tex", "a") as held:  # as an editor may have it open
        fill(target, "2", overwrite=True)
        held.write(" of work")
    assert content(target) == {
        "mark": "2",
        "data": "2",
        "thesis.tex": "years of work",
        "link": "years of work",
        "figures/old/1.pdf": "plot",
    }
    assert stat.S_IMODE((target / "figures").stat().st_mode) == 0o750
    assert (target / "empty").is_dir()
    assert os.readlink(target / "nowhere") == "gone"
    assert (tmp_path / "backup.tex").samefile(target / "thesis.tex")
    assert sorted(os.listdir(tmp_path)) == ["backup.tex", "x"]


def test_files_of_its_own_that_are_not_written_again_go(tmp_path, renames):
    fill(tmp_path / "x", "1")
    with new_directory(tmp_path / "x", THING, overwrite=True) as staging:
        (staging / "mark").write_text("2")
    assert content(tmp_path / "x") == {"mark": "2"}


def test_a_link_by_one_of_its_names_goes_and_what_it_leads_to_stays(tmp_path):
    fill(tmp_path / "x", "1")
    (tmp_path / "far").write_text("theirs")
    (tmp_path / "x" / "data").unlink()
    (tmp_path / "x" / "data").symlink_to(tmp_path / "far")
    fill(tmp_path / "x", "2", overwrite=True)
    assert content(tmp_path / "x") == {"mark": "2", "data": "2"}
    assert (tmp_path / "far").read_text() == "theirs"


def test_a_folder_by_one_of_its_names_stays_or_is_refused(tmp_path):
    fill(tmp_path / "x", "1")
    (tmp_path / "x" / "data").unlink()
    (tmp_path / "x" / "data").mkdir()
    (tmp_path / "x" / "data" / "thesis").write_text("years")
    before = tree(tmp_path)
    with pytest.raises(FileError, match=r"x holds 'data', which can't be kept"):
        fill(tmp_path / "x", "2", overwrite=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["file", "other", "link"])
def test_anything_else_is_refused_by_name(tmp_path, overwrite, kind):
    target = tmp_path / "precious"
    if kind == "file":
        target.write_text("years")
        match = "it is a file, not the folder of a thing"
    else:
        real = tmp_path / "real" if kind == "link" else target
        real.mkdir()
        (real / "thesis.tex").write_text("years")
        match = "it is not a thing: it holds 'thesis.tex'"
        if kind == "link":
            target.symlink_to(real, target_is_directory=True)
            match = "is a symbolic link to"
    before = tree(tmp_path)
    for path in (target, f"{target}/", tmp_path / "no" / ".." / "precious"):
        with pytest.raises(FileError, match=f"precious.*{match}"):
            fill(path, "1", overwrite=overwrite)
    assert tree(tmp_path) == before


def test_what_becomes_something_else_meanwhile_is_not_replaced(tmp_path, renames):
    fill(tmp_path / "x", "1")
    with (
        pytest.raises(FileError, match="it holds 'thesis.tex'"),
        new_directory(tmp_path / "x", THING, overwrite=True),
    ):
        for name in ("mark", "data"):
            (tmp_path / "x" / name).unlink()
        (tmp_path / "x" / "thesis.tex").write_text("years")
    assert content(tmp_path / "x") == {"thesis.tex": "years"}
    assert os.listdir(tmp_path) == ["x"]


def test_what_comes_at_the_last_moment_stays(tmp_path, monkeypatch, renames):
    fill(tmp_path / "x", "1")
    move = atomic._move_into_place

    def late(staging, target, replaces):
        (target / "thesis.tex").write_text("years")
        move(staging, target, replaces)

    monkeypatch.setattr(atomic, "_move_into_place", late)
    fill(tmp_path / "x", "2", overwrite=True)
    assert content(tmp_path / "x") == {"mark": "2", "data": "2", "thesis.tex": "years"}


def test_a_file_system_without_hard_links_refuses_by_name(tmp_path, monkeypatch):
    fill(tmp_path / "x", "1")
    fill(tmp_path / "y", "1")
    (tmp_path / "x" / "thesis.tex").write_text("years")

    def refused(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    before = tree(tmp_path)
    with pytest.raises(FileError, match=r"x holds 'thesis.tex', which can't be kept.*: move it"):
        fill(tmp_path / "x", "2", overwrite=True)
    assert tree(tmp_path) == before
    fill(tmp_path / "y", "2", overwrite=True)  # nothing to keep


@pytest.mark.parametrize("mode", ["kill", "torn", "fail once", "fail on"])
def test_killed_anywhere_what_is_not_ours_is_there(tmp_path, kill_points, mode, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    count = 0

    def prepare():
        nonlocal count
        count += 1
        path = tmp_path / str(count) / "x"
        fill(path, "1")
        (path / "deep").mkdir()
        for name in ("thesis.tex", "deep/data"):
            (path / name).write_text("years")
        return path

    def check(path, n):
        found = content(path)
        assert {found.pop("thesis.tex"), found.pop("deep/data")} == {"years"}
        assert set(found.values()) in ({"1"}, {"2"})
        atomic._swept.clear()
        fill(path, "3", overwrite=True)
        assert content(path)["thesis.tex"] == "years"
        assert os.listdir(path.parent) == ["x"]

    def operation(path):
        fill(path, "2", overwrite=True)

    assert kill_points.everywhere(prepare, operation, check, mode) > 10


def test_the_current_directory_is_refused(tmp_path, monkeypatch):
    fill(tmp_path / "x", "1")
    (tmp_path / "empty").mkdir()
    for name in ("x", "empty"):
        monkeypatch.chdir(tmp_path / name)
        with pytest.raises(FileError, match="current directory"):
            fill(".", "2", overwrite=True)


# Sources


def spellings(path):
    yield path
    yield f"{path}/"
    yield os.path.relpath(path)
    yield path / ".." / path.name
    link = path.parent / f"link-{path.name}"
    link.symlink_to(path, target_is_directory=True)
    yield link
    yield path.parent / f"link-{path.name}" / ".." / path.name


def test_sources_however_they_are_spelled(tmp_path):
    source = tmp_path / "in" / "source"
    (source / "deep").mkdir(parents=True)
    (source / "file").write_text("1")
    for spelled in spellings(source):
        for target, what in [
            (source, "is"),
            (source / "new", "lies in"),
            (source / "deep" / "er" / "new", "lies in"),
            (tmp_path / "in", "holds"),
            (tmp_path, "holds"),
            (tmp_path / "x" / ".." / "in", "holds"),
        ]:
            with pytest.raises(FileError, match=f"{what} the source .*: write elsewhere"):
                check_apart(target, [None, tmp_path / "no", spelled])
        for target in (tmp_path / "out", tmp_path / "in" / "source2", tmp_path / "in" / "sourc"):
            check_apart(target, [spelled])
    with pytest.raises(FileError, match="holds"):
        check_apart(source, [source / "file"])
    for spelled in spellings(tmp_path / "in"):
        with pytest.raises(FileError, match="holds the source"):
            check_apart(spelled, [source])


def test_a_target_that_links_of_a_source_lead_into(tmp_path):
    """As in the Hub's cache, where a snapshot is a folder of links."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1").write_text("weights")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "adapter_model.safetensors").symlink_to(tmp_path / "blobs" / "1")
    with pytest.raises(FileError, match="blobs holds the source"):
        check_apart(tmp_path / "blobs", [tmp_path / "snapshot"])


def test_case_where_the_file_system_has_none(tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    stat_of = os.stat

    def folded(path, *args, **kwargs):
        return stat_of(str(path).replace("SOURCE", "source"), *args, **kwargs)

    monkeypatch.setattr(replacing.os, "stat", folded)
    with pytest.raises(FileError, match="is the source"):
        check_apart(tmp_path / "SOURCE", [tmp_path / "source"])


# The verbs


def adapter(seed=0):
    g = torch.Generator().manual_seed(seed)
    factors = torch.randn(2, 8, generator=g), torch.randn(6, 2, generator=g)
    return lf.Adapter({"layers.0.q_proj": lf.LowRank(*factors)})


@pytest.fixture
def world(tmp_path, monkeypatch):
    """adapters/{sql, law}, a library, and a folder of things that aren't ours."""
    for k, name in enumerate(("sql", "law")):
        lf.save(adapter(k), tmp_path / "adapters" / name)
    lf.fold(tmp_path / "adapters", tmp_path / "lib").close()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("years")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saved(path):
    lf.save(adapter(), path, overwrite=True)


def folded(path):
    lf.fold([adapter()], path, overwrite=True).close()


def folded_by_retention(path):
    options = {"retention": 0.9, "score": lambda name, a: 0.0 if a is None else 1.0}
    lf.fold([adapter()], path, overwrite=True, **options).close()


def library_saved(path):
    lf.fold([adapter()]).save(path, overwrite=True).close()


def live_saved(path):
    model = torch.nn.Sequential()
    model.add_module("q_proj", torch.nn.Linear(8, 6))
    live = lf.attach(model, lf.LoRA(rank=2, targets="q_proj"))
    live.save(path, overwrite=True)
    live.detach()


WRITERS = [saved, folded, folded_by_retention, library_saved, live_saved]


@pytest.mark.parametrize("write", WRITERS)
def test_no_verb_writes_over_what_is_not_ours(world, write):
    other = "lib" if write in (saved, live_saved) else "adapters/sql"
    before = tree(world)
    for target in ("precious", "adapters", "precious/thesis.tex", other):
        with pytest.raises(FileError, match="won't be overwritten|not a directory"):
            write(world / target)
    assert tree(world) == before


@pytest.mark.parametrize("write", WRITERS)
def test_every_verb_keeps_other_files(world, write):
    target = world / "out"
    write(target)
    (target / "opt.pt").write_text("moments")
    (target / "logs").mkdir()
    (target / "logs" / "1").write_text("loss")
    write(target)
    assert content(target)["opt.pt"] == "moments"
    assert content(target)["logs/1"] == "loss"


@pytest.mark.parametrize("write", WRITERS)
def test_every_verb_takes_an_empty_directory_for_nothing(world, write):
    (world / "empty").mkdir()
    write(world / "empty")
    assert any((world / "empty").iterdir())
    without = {
        saved: lambda p: lf.save(adapter(), p),
        folded: lambda p: lf.fold([adapter()], p).close(),
        library_saved: lambda p: lf.fold([adapter()]).save(p).close(),
    }
    if write in without:
        (world / "other").mkdir()
        without[write](world / "other")
        assert any((world / "other").iterdir())


def test_an_adapter_over_a_checkpoint_takes_its_training_state_with_it(world):
    live_saved(world / "out")
    assert (world / "out" / "training_state.safetensors").exists()
    saved(world / "out")
    assert sorted(os.listdir(world / "out")) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_fold_never_writes_over_its_sources(world, overwrite):
    before = tree(world)
    for sources, target in [
        ("adapters", "adapters"),
        ("adapters", "."),
        ("adapters/*", "adapters"),
        (["adapters/sql"], "adapters/sql"),
        (["adapters/sql"], "adapters"),  # law, which is not folded, would go too
        ({"x": "adapters/sql"}, "adapters/sql/lib"),
        (["adapters/sql/adapter_model.safetensors"], "adapters"),
    ]:
        with pytest.raises(FileError, match="the source|won't be overwritten"):
            lf.fold(sources, target, overwrite=overwrite)
    assert tree(world) == before
    for _ in range(2):  # beside its sources is no harm
        lf.fold("adapters", "adapters/lib", overwrite=True).close()
    assert content(world / "adapters" / "sql")


def test_a_library_is_not_saved_over_itself(world):
    before = tree(world)
    with lf.Library.open("lib") as lib:
        for target in ("lib", "lib/copy", ".", Path("lib") / ".." / "lib"):
            with pytest.raises(FileError, match="the source"):
                lib.save(target, overwrite=True)
    assert tree(world) == before


def test_a_newer_or_damaged_library_is_still_one(world):
    (world / "lib" / "library.json").write_text("{")
    folded(world / "lib")
    assert lf.Library.open("lib").names == ["task_0"]
    (world / "board").mkdir()
    (world / "board" / "library.json").write_text('{"name": "a package of another program"}')
    with pytest.raises(FileError, match="it holds 'library.json'"):
        folded(world / "board")


def test_an_empty_text_is_no_path(world):
    """It would be the working directory, which here holds adapters and is an adapter's place."""
    a = lf.load("adapters/sql")
    r = lf.CentroidRouter.fit({"a": ["x y", "y x"], "b": ["1 2", "2 1"]}, "ngrams")
    writers = (
        lambda: lf.save(a, "", overwrite=True),
        lambda: lf.fold("adapters", "", overwrite=True),
        lambda: lf.report("adapters", "", overwrite=True),
        lambda: lf.merge_into_weights("base", a, "", overwrite=True),
        lambda: r.save("", overwrite=True),
    )
    for write in writers:
        with pytest.raises(FileError, match="an empty text is none"):
            write()
    os.chdir("adapters/sql")
    readers = (
        lambda: lf.load(""),
        lambda: lf.Library.open(""),
        lambda: lf.merge(""),
        lambda: lf.extract("", "", rank=1),
        lambda: lf.CentroidRouter.load(""),
    )
    for read in readers:
        with pytest.raises(FileError, match="''"):
            read()


# Files into a folder that others use


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("fatal", [None, 1, 2, 3])
def test_files_get_their_names_all_or_none(fatal, links, tmp_path, monkeypatch):
    new, out, aside = (tmp_path / name for name in ("new", "out", "aside"))
    for folder in (new, out, aside):
        folder.mkdir()
    for name in ("a", "b", "c"):
        (new / name).write_text("new")
    (out / "b").write_text("old")
    (out / "notes").write_text("mine")
    before, calls, replace = content(out), [], os.replace

    def one_fails(*args):
        calls.append(args)
        if len(calls) == fatal:
            raise OSError(errno.ENOSPC, "full")
        replace(*args)

    def no_links(*_):
        raise OSError(errno.EPERM, "no such here")

    monkeypatch.setattr(os, "replace", one_fails)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    files = {new / "a": out / "a", new / "b": out / "b", new / "c": out / "deep" / "er" / "c"}
    if fatal is None:
        exchange(files, aside)
        assert content(out) == {"a": "new", "b": "new", "deep/er/c": "new", "notes": "mine"}
        assert not os.listdir(new)
    else:
        with pytest.raises(OSError, match="full"):
            exchange(files, aside)
        assert content(out) == before
        assert not (out / "deep").exists()
