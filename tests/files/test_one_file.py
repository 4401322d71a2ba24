"""Formats that are one file: whole or not at all, and in the place of its own kind alone."""

import importlib
import os
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lorafold as lf
from lorafold.errors import FileError
from lorafold.files import atomic
from lorafold.files.atomic import new_file
from lorafold.files.formats.registry import FORMATS, Format, Written
from lorafold.files.replacing import FileKind

NOTE = FileKind("a note", ".note", lambda p: p.read_bytes().startswith(b"note"))


def fill(path, text="note 1", overwrite=False, sources=()):
    with new_file(path, NOTE, overwrite=overwrite, sources=sources) as staging:
        staging.write_text(text)


def names(folder):
    return sorted(os.listdir(folder))


def test_it_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "a.note"
    with pytest.raises(RuntimeError), new_file(target, NOTE) as staging:
        staging.write_text("half")
        assert not target.exists()
        raise RuntimeError
    assert names(tmp_path) == []
    fill(target)
    assert target.read_text() == "note 1"
    assert names(target.parent) == ["a.note"]


def test_what_is_there_is_replaced_when_asked_for_and_of_its_kind(tmp_path):
    target = tmp_path / "a.note"
    target.touch()
    os.chmod(target, 0o600)
    with pytest.raises(FileError, match=r"a\.note exists already; give overwrite=True"):
        fill(target)
    fill(target, overwrite=True)  # an empty file is nobody's
    fill(target, "note 2", overwrite=True)
    assert target.read_text() == "note 2"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    target.write_text("a thesis")
    with pytest.raises(FileError, match="won't be overwritten: it is not a note"):
        fill(target, overwrite=True)
    with pytest.raises(FileError, match="exists already, and is not a note"):
        fill(target)
    assert target.read_text() == "a thesis"
    assert names(tmp_path) == ["a.note"]


def test_what_appears_meanwhile_stays(tmp_path):
    target = tmp_path / "a.note"
    with pytest.raises(FileError, match="exists already"), new_file(target, NOTE) as staging:
        staging.write_text("note 1")
        target.write_text("a thesis")
    assert target.read_text() == "a thesis"
    assert names(tmp_path) == ["a.note"]


def test_a_file_system_without_such_renames(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_renameat2", lambda *_: 38)
    fill(tmp_path / "a.note")
    fill(tmp_path / "a.note", "note 2", overwrite=True)
    assert (tmp_path / "a.note").read_text() == "note 2"


def test_names_that_can_not_be_meant(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError, match=r"is a folder, and a note is one file.*folder/folder\.no"):
        fill(tmp_path / "folder")
    with pytest.raises(FileError, match=r"ends in \.note: call it .*/sql\.note"):
        fill(tmp_path / "sql")
    with pytest.raises(FileError, match="has no name"):
        fill("")
    (tmp_path / "link.note").symlink_to(tmp_path / "a.note")
    with pytest.raises(FileError, match="is a symbolic link"):
        fill(tmp_path / "link.note", overwrite=True)
    with pytest.raises(FileError, match="lies in the source"):
        fill(tmp_path / "folder" / "a.note", sources=[tmp_path / "folder"])
    assert names(tmp_path) == ["folder", "link.note"]


def test_at_a_url():
    pytest.importorskip("fsspec")
    from fsspec.implementations.memory import MemoryFileSystem

    url = "memory://test_one_file/x.note"
    fill(url)
    with pytest.raises(FileError, match="exists already; give overwrite=True"):
        fill(url)
    fill(url, "note 2", overwrite=True)
    fs = MemoryFileSystem()
    assert fs.cat("/test_one_file/x.note") == b"note 2"
    fs.rm("/test_one_file", recursive=True)


@pytest.fixture
def one_file(monkeypatch):
    """A format that is one safetensors file, with its names in PEFT's words and α beside."""

    def form(adapter, **_):
        tensors = {}
        for path, u in adapter.modules.items():
            tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = u.A, u.B
            tensors[f"{path}.alpha"] = torch.tensor(u.rank * u.scale)
        return Written(tensors, {"made": "here"})

    monkeypatch.setitem(FORMATS, "one", Format("", ".safetensors"))
    monkeypatch.setattr(importlib.import_module("lorafold.files.save"), "writer", lambda name: form)


def test_an_adapter_as_one_file(tmp_path, one_file):
    a = lf.Adapter({"q_proj": lf.LowRank(torch.randn(2, 6), torch.randn(4, 2))})
    target = tmp_path / "a.safetensors"
    lf.save(a, target, format="one")
    with safe_open(target, "pt") as f:
        assert f.metadata() == {"made": "here"}
    assert lf.load(target).distance(a) == 0
    lf.save(2 * a, target, format="one", overwrite=True)
    assert (lf.load(target) - a).distance(a) < 1e-6
    whole = tmp_path / "model.safetensors"
    save_file({"model.q_proj.weight": torch.zeros(4, 6)}, whole)
    with pytest.raises(FileError, match="won't be overwritten: it is not an adapter"):
        lf.save(a, whole, format="one", overwrite=True)
    assert load_file(whole).keys() == {"model.q_proj.weight"}
    assert names(tmp_path) == ["a.safetensors", "model.safetensors"]
