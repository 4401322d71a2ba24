"""Paths that nothing can have: an error of lorafold's at every door, in reading and in writing."""

import importlib.util
from pathlib import Path

import pytest

import lorafold as lf
from lorafold.errors import LorafoldError
from lorafold.files import load_many
from lorafold.files.base import read_base
from lorafold.route import load as load_router
from lorafold.train.job.data import read_data
from lorafold.train.job.dialects import read_config
from lorafold.train.steering.pairs import read_pairs
from lorafold.transfer.alignment import Alignment

spec = importlib.util.spec_from_file_location("attacks_kinds", Path(__file__).with_name("kinds.py"))
kinds = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kinds)

PATHS = {
    "a long name": "x" * 5_000,
    "a long name in a folder": "here/" + "y" * 300,
    "a NUL": "a\0b",
    "half a letter": "a/\ud800",
    "below a file": "file/z",
    "below a device": "/dev/null/x",
}
READERS = {
    "load": lf.load,
    "load many": load_many,
    "library": lf.Library.open,
    "repair": lf.fold.repair,
    "fold": lambda path: lf.fold([path]),
    "base": read_base,
    "merge into": lambda path: lf.merge_into_weights(path, kinds.adapter(), "out"),
    "router": load_router,
    "alignment": lambda path: Alignment.load(f"{path}.safetensors"),
    "roles": lf.roles,
    "resume": kinds.attached()[1].resume,
    "data": lambda path: read_data([f"{path}.jsonl"], {}, 1),
    "pairs": lambda path: read_pairs(f"{path}.jsonl"),
    "config": lambda path: read_config(f"{path}.yaml"),
}
WRITERS = {
    "save": lambda path: lf.save(kinds.adapter(), path),
    "save over": lambda path: lf.save(kinds.adapter(), path, overwrite=True),
    "fold": lambda path: lf.fold({"a": kinds.adapter()}, path),
    "merge into": lambda path: lf.merge_into_weights("base", kinds.adapter(), path),
    "state": kinds.attached()[1].save,
    "report": lambda path: lf.report({"a": kinds.adapter()}, path),
}
DOORS = {f"{what} {n}": door for what, of in (("read", READERS), ("write", WRITERS))
         for n, door in of.items()}  # fmt: skip


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("door", DOORS)
def test_a_path_that_nothing_can_have_is_refused(door, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "file").write_text("")
    kinds.make_base(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    if door == "read config":
        pytest.importorskip("yaml")
    with pytest.raises(LorafoldError) as told:
        DOORS[door](path)
    assert 0 < len(str(told.value)) < 2_000
    assert sorted(tmp_path.rglob("*")) == before
