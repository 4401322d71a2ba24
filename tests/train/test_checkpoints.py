"""Checkpoints that are whole, or not there; and what was written in them."""

import json
import os

import pytest

from lorafold.errors import FileError
from lorafold.train.checkpoints import check_sealed, drop_older, last_checkpoint, seal, written


def fill(folder, word="new"):
    folder.mkdir()
    (folder / "optimizer.pt").write_text(word)
    (folder / "adapters").mkdir()
    (folder / "adapters" / "a.safetensors").write_text(word)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": word}))


def test_a_checkpoint_is_sealed_to_the_last_bit(tmp_path):
    folder = tmp_path / "checkpoint-2"
    with written(folder):
        fill(folder)
    check_sealed(folder)
    (folder / "notes.txt").write_text("of mine")  # which nobody sealed
    check_sealed(folder)
    for name in ("optimizer.pt", "adapters/a.safetensors", "trainer_state.json"):
        path = folder / name
        before = path.read_bytes()
        for after in (before + b" ", bytes([before[0] ^ 1]) + before[1:], None):
            path.unlink() if after is None else path.write_bytes(after)
            with pytest.raises(FileError, match=name):
                check_sealed(folder)
        path.write_bytes(before)
    os.truncate(folder / "optimizer.pt", 1 << 40)  # of another length, which is not read
    with pytest.raises(FileError, match="checksums.json to go on from it as it is"):
        check_sealed(folder)
    (folder / "checksums.json").unlink()
    check_sealed(folder)


def test_one_that_fails_leaves_what_was_there(tmp_path):
    folder = tmp_path / "checkpoint-4"
    with (
        pytest.raises(FileError, match="checkpoint-4 can't be written .no room.$"),
        written(folder),
    ):
        fill(folder)
        raise OSError(28, "no room")
    assert not os.listdir(tmp_path)
    with written(folder):
        fill(folder, "old")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with (
        pytest.raises(FileError, match=r"checkpoint-4 can't be written .*checkpoint-4 is whole"),
        written(folder),
    ):
        fill(folder)
        raise RuntimeError("no room")
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert os.listdir(tmp_path) == ["checkpoint-4"]
    with written(folder):
        fill(folder)
    assert (folder / "optimizer.pt").read_text() == "new"
    assert os.listdir(tmp_path) == ["checkpoint-4"]


def test_the_last_one_is_the_last_that_was_written_to_its_end(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step in (2, 10):
        fill(tmp_path / f"checkpoint-{step}")
        seal(tmp_path / f"checkpoint-{step}")
    assert last_checkpoint(tmp_path).name == "checkpoint-10"
    state = tmp_path / "checkpoint-10" / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:-2])
    assert last_checkpoint(tmp_path).name == "checkpoint-2"


@pytest.mark.parametrize("most", [None, 1, 2, 3])
@pytest.mark.parametrize("best", [None, 1, 4])
def test_older_ones_go_as_with_transformers(most, best, tmp_path):
    utils = pytest.importorskip("transformers.trainer_utils")

    def left(drop, where):
        where.mkdir()
        for step in (1, 2, 3, 4):
            (where / f"checkpoint-{step}").mkdir()
            os.utime(where / f"checkpoint-{step}", (step, step))
        (where / "checkpoint-of-mine").write_text("")
        drop(where, str(where / f"checkpoint-{best}") if best else None)
        return sorted(os.listdir(where))

    ours = left(lambda where, best: drop_older(where, most, best), tmp_path / "ours")
    assert ours == left(
        lambda where, best: utils.rotate_checkpoints(str(where), most, best, use_mtime=True),
        tmp_path / "theirs",
    )
