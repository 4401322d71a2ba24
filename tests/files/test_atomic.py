"""Directories and files appear whole or not at all, whether the file system can exchange or not."""

import errno
import os
import re
import stat

import pytest

from lorafold.errors import FileError
from lorafold.files import atomic
from lorafold.files.atomic import new_directory, replace_file, set_aside, sync_directory
from lorafold.files.replacing import Kind

THING = Kind("a thing", lambda p: (p / "a").is_file(), re.compile("a"), folders=re.compile("inner"))


@pytest.fixture(params=["exchange", "two renames"])
def renames(request, monkeypatch):
    """Both kinds of file system."""
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "_renameat2", lambda *_: errno.ENOSYS)
    return request.param


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No flushing, which takes time and shows in no test: the calls are counted all the same."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def fill(path, text, overwrite=False):
    with new_directory(path, THING, overwrite=overwrite) as staging:
        os.mkdir(staging / "inner")
        for name in ("a", "inner/b"):
            descriptor = os.open(staging / name, atomic.CREATE_FLAGS)
            atomic.write_all(descriptor, text.encode())
            os.close(descriptor)


def content(path):
    """Texts of the files under `path`; None when it isn't there."""
    if not path.exists():
        return None
    return {str(p.relative_to(path)): p.read_text() for p in path.rglob("*") if p.is_file()}


def whole(text):
    return {"a": text, "inner/b": text}


# new_directory


def test_a_new_directory_appears_when_the_block_ends(tmp_path, renames):
    with new_directory(tmp_path / "x" / "y", THING) as staging:
        assert staging.parent == tmp_path / "x"
        (staging / "a").write_text("1")
        assert not (tmp_path / "x" / "y").exists()
    assert content(tmp_path / "x" / "y") == {"a": "1"}
    assert os.listdir(tmp_path / "x") == ["y"]


def test_permissions_are_those_of_any_new_directory(tmp_path):
    fill(tmp_path / "x", "1")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_exception_leaves_nothing(tmp_path, renames):
    fill(tmp_path / "old", "1")
    for path in (tmp_path / "old", tmp_path / "no" / "parent" / "new"):
        with (
            pytest.raises(ZeroDivisionError),
            new_directory(path, THING, overwrite=True) as staging,
        ):
            (staging / "a").write_text("2")
            raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["old"]
    assert content(tmp_path / "old") == whole("1")


def test_what_exists_is_refused_before_the_block(tmp_path):
    fill(tmp_path / "x", "1")
    with (
        pytest.raises(FileError, match=r"x exists already; give overwrite=True"),
        new_directory(tmp_path / "x", THING),
    ):
        pytest.fail("the block was entered")
    assert os.listdir(tmp_path) == ["x"]


def test_what_appeared_meanwhile_is_not_replaced(tmp_path, renames):
    with (
        pytest.raises(FileError, match="appeared while"),
        new_directory(tmp_path / "x", THING) as staging,
    ):
        (staging / "a").write_text("mine")
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "a").write_text("theirs")
    assert content(tmp_path / "x") == {"a": "theirs"}
    assert os.listdir(tmp_path) == ["x"]


def test_nothing_is_replaced_through_a_link(tmp_path, renames):
    fill(tmp_path / "far" / "real", "1")
    (tmp_path / "link").symlink_to(tmp_path / "far" / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "far" / "new")
    for name in ("link", "dangling"):
        with pytest.raises(FileError, match="is a symbolic link to .*far"):
            fill(tmp_path / name, "2", overwrite=True)
        assert (tmp_path / name).is_symlink()
    assert content(tmp_path / "far" / "real") == whole("1")
    assert os.listdir(tmp_path / "far") == ["real"]


def test_paths_that_are_no_place_are_refused(tmp_path, monkeypatch):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    (tmp_path / "here" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "deep")
    for path, message in [
        (tmp_path / "loop", "is a symbolic link"),
        (tmp_path / "file" / "x", "not a directory"),
        (tmp_path / "file" / "x" / "y", "not a directory"),
        ("/", "root"),
        (".", "current directory"),
        ("..", "current directory|holds 'deep'"),
    ]:
        overwrite = "current" in message
        with (
            pytest.raises(FileError, match=message),
            new_directory(path, THING, overwrite=overwrite),
        ):
            pytest.fail("the block was entered")


def test_a_failed_second_rename_puts_the_old_one_back(tmp_path, monkeypatch):
    fill(tmp_path / "x", "1")
    monkeypatch.setattr(atomic, "_renameat2", lambda *_: errno.EINVAL)
    rename, calls = os.rename, []

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "broken")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(FileError, match="x can.t be written: broken"):
        fill(tmp_path / "x", "2", overwrite=True)
    assert len(calls) == 3
    assert content(tmp_path / "x") == whole("1")
    assert os.listdir(tmp_path) == ["x"]


def test_long_names(tmp_path):
    for name in ("é" * 120, "x" * 255, "語" * 85):
        fill(tmp_path / name, "1")
        fill(tmp_path / name, "2", overwrite=True)
        replace_file(tmp_path / name / "a", b"3")
        assert content(tmp_path / name) == {"a": "3", "inner/b": "2"}


# Killed anywhere


@pytest.mark.parametrize("mode", ["kill", "torn", "fail once", "fail on"])
@pytest.mark.parametrize("start", [None, "old"])
def test_killed_anywhere_a_directory_is_old_or_new(tmp_path, kill_points, mode, start):
    count = 0

    def prepare():
        nonlocal count
        count += 1
        if start:
            fill(tmp_path / str(count) / "x", start)
        return tmp_path / str(count) / "x"

    def operation(path):
        fill(path, "new", overwrite=True)

    seen = []

    def check(path, n):
        found = content(path)
        assert found in ([whole("new")] if n is None else [start and whole(start), whole("new")])
        if mode == "fail once" and found != whole("new"):
            assert not path.parent.exists() or os.listdir(path.parent) == ["x"]  # cleaned up
        seen.append(found == whole("new"))
        atomic._swept.clear()
        fill(path, "later", overwrite=True)  # a later write works, and removes what was left
        assert content(path) == whole("later")
        assert os.listdir(path.parent) == ["x"]

    assert kill_points.everywhere(prepare, operation, check, mode) > 10
    assert seen == sorted(seen), "the new state must not go away again"
    assert not seen[0]


def test_killed_between_two_renames_the_old_state_is_found(tmp_path, kill_points, monkeypatch):
    monkeypatch.setattr(atomic, "_renameat2", lambda *_: errno.ENOSYS)
    paths = (tmp_path / str(i) / "x" for i in range(1000))
    aside = 0

    def prepare():
        path = next(paths)
        fill(path, "old")
        return path

    def check(path, n):
        nonlocal aside
        if path.exists():
            assert content(path) in (whole("old"), whole("new"))
        else:
            aside += 1
            (old,) = set_aside(path)
            assert content(old) == whole("old")

    kill_points.everywhere(prepare, lambda path: fill(path, "new", overwrite=True), check)
    assert aside == 1


def test_staging_of_a_living_writer_stays(tmp_path):
    with new_directory(tmp_path / "x", THING) as staging:
        (staging / "a").write_text("1")
        atomic._swept.clear()
        fill(tmp_path / "y", "2")
        assert staging.exists()
    assert content(tmp_path / "x") == {"a": "1"}


# replace_file


def test_replace_file_writes_and_keeps_permissions(tmp_path):
    path = tmp_path / "f"
    replace_file(path, b"one")
    path.chmod(0o640)
    (tmp_path / "link").symlink_to(path)
    replace_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    replace_file(tmp_path / "link", b"three")  # takes the link's place
    assert path.read_bytes() == b"two"
    assert (tmp_path / "link").read_bytes() == b"three"
    assert not (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["f", "link"]


@pytest.mark.parametrize("mode", ["kill", "torn", "fail once", "fail on"])
def test_killed_anywhere_a_file_is_old_or_new(tmp_path, kill_points, mode):
    path = tmp_path / "f"

    def prepare():
        path.write_bytes(b"old" * 1000)
        return path

    def check(path, n):
        assert path.read_bytes() in (b"old" * 1000, b"newer" * 1000)
        assert n is not None or path.read_bytes() == b"newer" * 1000
        if mode == "fail once":
            assert os.listdir(tmp_path) == ["f"]

    def operation(path):
        replace_file(path, b"newer" * 1000)

    assert kill_points.everywhere(prepare, operation, check, mode) >= 5


def test_killing_finds_a_file_written_in_place(tmp_path, kill_points):
    """The check above must fail on the plain way to write a file."""
    path = tmp_path / "f"
    states = set()

    def plain(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC)
        os.write(descriptor, b"new")

    kill_points.everywhere(
        lambda: path.write_bytes(b"old") and path,
        plain,
        lambda path, n: states.add(path.read_bytes()),
        "torn",
    )
    assert not states <= {b"old", b"new"}


# Power cuts


def test_everything_is_flushed_around_its_rename(tmp_path, kill_points, renames):
    def operation():
        fill(tmp_path / "p" / "x", "1")
        fill(tmp_path / "p" / "x", "2", overwrite=True)
        replace_file(tmp_path / "p" / "f", b"1")

    calls = kill_points.trace(operation)
    assert kill_points.unsafe_renames(calls) == []
    # The parent that was created has its name flushed, too.
    assert ("fsync", str(tmp_path)) in calls


def test_flushes_that_are_missing_are_found(tmp_path, kill_points):
    calls = [c for c in kill_points.trace(lambda: fill(tmp_path / "x", "1")) if c[0] != "fsync"]
    assert len(kill_points.unsafe_renames(calls)) == 3


def test_a_directory_that_cannot_be_flushed_is_no_error(tmp_path, monkeypatch):
    def refuse(number):
        def fsync(_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fsync)

    refuse(errno.EINVAL)
    sync_directory(tmp_path)
    refuse(errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        sync_directory(tmp_path)


def test_systems_without_locks_still_write(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "fcntl", None)
    fill(tmp_path / "x", "1")
    fill(tmp_path / "y", "2")
    assert sorted(os.listdir(tmp_path)) == ["x", "y"]
