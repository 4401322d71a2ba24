"""Files of the work directory: what was written, or an error, and then made anew."""

import builtins
import os

import pytest

from lorafold.errors import FileError
from lorafold.scale.work import Pieces, WorkDirectory

KEY = "0" * 40


@pytest.fixture
def work(tmp_path):
    return WorkDirectory(tmp_path / "work", "run")


def write(work, kind):
    """A file of that kind, and how it is read."""
    if kind == "done":
        work.finish(KEY, {"a": 1})
        return lambda: work.result(KEY)
    if kind == "long":
        work.finish(KEY, Pieces({"a": 1}, [b"one", b"two"]))
        return lambda: (work.result(KEY).value, work.result(KEY).read(2, 5))
    if kind == "task":
        work.put_task(KEY, len, ("abc",))
        return lambda: work.task(KEY)
    found = work.share(KEY, [kind])  # what was read of one path is not read again
    return found.get


@pytest.mark.parametrize("kind", ["done", "long", "task", "shared"])
def test_every_bit_is_what_was_written_or_it_is_made_anew(kind, work):
    read = write(work, kind)
    (path,) = (p for p in work.path.iterdir() if p.name.startswith(KEY))
    data = path.read_bytes()
    mutations = [data[:n] for n in range(0, len(data), 7)]
    mutations += [
        data[:k] + bytes([data[k] ^ 1 << k % 8]) + data[k + 1 :] for k in range(len(data))
    ]
    for mutated in [*mutations, data + b"\0", bytes(len(data))]:
        path.write_bytes(mutated)
        with pytest.raises(FileError, match="is not what was written: run it again"):
            read()
        assert not path.exists()
    with pytest.raises(FileError, match="can't be read"):
        read()
    assert write(work, kind)() in (
        {"a": 1},
        ({"a": 1}, b"etw"),
        (len, ("abc",)),
        ["shared"],
    )


@pytest.mark.parametrize("kind", ["done", "long", "task", "shared"])
def test_a_full_disk_leaves_nothing_of_a_file(kind, work, monkeypatch):
    before, plain, calls = sorted(os.listdir(work.path)), builtins.open, []

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            calls.append(data)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

    def opened(path, mode="r", **more):
        return Full(plain(path, mode, **more)) if "w" in mode else plain(path, mode, **more)

    monkeypatch.setattr(builtins, "open", opened)
    with pytest.raises(FileError, match=r"can't be written: No space left"):
        write(work, kind)
    assert sorted(os.listdir(work.path)) == before
