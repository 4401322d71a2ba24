"""A model's folder written anew: what changes, what stays to the byte, what is left out."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lorafold as lf
from lorafold.files.base import read_base
from lorafold.merge import checkpoint
from lorafold.merge.checkpoint import Edits, write_checkpoint

INDEX = "model.safetensors.index.json"


def state_of(layers=2):
    g = torch.Generator().manual_seed(0)
    state = {f"layers.{n}.q.weight": torch.randn(6, 4, generator=g) for n in range(layers)}
    state |= {"count": torch.arange(3, dtype=torch.int32), "steps": torch.tensor(2**40)}
    state |= {"flags": torch.tensor([True, False, True]), "none": torch.empty(0, 4)}
    return state | {
        "half": torch.randn(5, generator=g).half(),
        "wide": torch.rand(3, generator=g).double(),
    }


@pytest.fixture
def base(tmp_path):
    """A base in two shards."""
    path = tmp_path / "base"
    path.mkdir()
    state = state_of()
    where = {key: f"model-{i % 2 + 1}.safetensors" for i, key in enumerate(sorted(state))}
    for file in sorted(set(where.values())):
        part = {k: t for k, t in state.items() if where[k] == file}
        save_file(part, path / file, metadata={"format": "pt", "by": "a test"})
    size = sum(t.nbytes for t in state.values())
    index = {"metadata": {"total_size": size, "more": "x"}, "weight_map": where}
    (path / INDEX).write_text(json.dumps(index))
    return path


def rewritten(base, changes=None, dtype=None, **more):
    """The folder that is written, and what was left out."""
    out = base.with_name("out")
    out.mkdir()
    edits = Edits(changes or {}, dtype, **more)
    return out, write_checkpoint(read_base(str(base)), out, edits, lambda *_: None)


def tensors(folder):
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    for key, t in wanted.items():
        assert (found[key].dtype, found[key].shape) == (t.dtype, t.shape), key
        assert bits(found[key]) == bits(t), key


def bits(t):
    return bytes(t.contiguous().reshape(-1).view(torch.uint8).numpy().data)


@pytest.mark.parametrize("within_the_system", [True, False])
def test_without_a_change_every_byte_stays(within_the_system, base, monkeypatch):
    if not within_the_system:

        def cannot(*_args, **_options):
            raise OSError(18, "cross-device")

        monkeypatch.setattr(os, "copy_file_range", cannot, raising=False)
        monkeypatch.setattr(checkpoint, "_CHUNK", 24)
    out, left_out = rewritten(base)
    assert left_out == []
    assert sorted(os.listdir(out)) == sorted(os.listdir(base))
    for path in base.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes()


def test_a_change_changes_its_tensor_alone(base):
    out, _ = rewritten(base, {"layers.1.q.weight": lambda t: t.neg_()})
    state = state_of()
    assert_same_bits(tensors(out), state | {"layers.1.q.weight": -state["layers.1.q.weight"]})


def test_an_error_of_the_system_is_no_reason_to_copy_ourselves(base, monkeypatch):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        rewritten(base)


def test_a_file_that_shrinks_meanwhile(base, monkeypatch):
    monkeypatch.setattr(os, "copy_file_range", lambda *_args, **_options: 0, raising=False)
    file = base / "model-2.safetensors"
    seen = read_base(str(base))
    out = base.with_name("out")
    out.mkdir()

    def cut(_, name):
        if name == "model-2.safetensors":
            os.truncate(file, file.stat().st_size - 30)

    with pytest.raises(lf.FileError, match=r"model-2\.safetensors: '.*' ends too early"):
        write_checkpoint(seen, out, Edits(), cut)


def test_a_dtype_reaches_config_and_index_and_spares_whole_numbers(base, monkeypatch):
    monkeypatch.setattr(checkpoint, "_CHUNK", 8)
    config = {"dtype": "float32", "text_config": {"torch_dtype": "float32"}, "other": "float32"}
    (base / "config.json").write_text(json.dumps(config))
    out, _ = rewritten(base, dtype=torch.bfloat16)
    state = state_of()
    wanted = state | {k: t.bfloat16() for k, t in state.items() if t.is_floating_point()}
    assert_same_bits(tensors(out), wanted)
    found = json.loads((out / "config.json").read_text())
    inner = {"torch_dtype": "bfloat16"}
    assert found == {"dtype": "bfloat16", "text_config": inner, "other": "float32"}
    index, old = (json.loads((folder / INDEX).read_text()) for folder in (out, base))
    size = sum(t.nbytes for t in wanted.values())
    assert index == {**old, "metadata": {"total_size": size, "more": "x"}}
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as f:
            assert f.metadata() == {"format": "pt", "by": "a test"}
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_a_dtype_that_all_have_changes_nothing(base):
    state = {key: torch.ones(3) for key in "ab"}
    for path in base.iterdir():
        path.unlink()
    save_file(state, base / "model.safetensors", metadata={"z": "1", "a": "2"})
    out, _ = rewritten(base, dtype=torch.float32)
    name = "model.safetensors"
    assert (out / name).read_bytes() == (base / name).read_bytes()


def test_numbers_that_a_dtype_does_not_have_are_refused_and_infinite_ones_are_not(base):
    for path in base.iterdir():
        path.unlink()
    state = {"a": torch.tensor([1.0, float("inf"), float("nan")])}
    save_file(state, base / "model.safetensors")
    out, _ = rewritten(base, dtype=torch.float16)
    assert_same_bits(tensors(out), {"a": state["a"].half()})
    save_file({"a": torch.tensor([1e5])}, base / "model.safetensors")
    (out / "model.safetensors").unlink()
    out.rmdir()
    with pytest.raises(lf.MismatchError, match="'a' has numbers beyond the range of float16"):
        rewritten(base, dtype=torch.float16)


def test_a_config_that_is_no_json_is_refused(base):
    """What it says of tied weights decides what is written."""
    (base / "config.json").write_text("{")
    with pytest.raises(lf.FileError, match=r"config\.json: not valid JSON"):
        rewritten(base)


def test_the_other_files_are_copied_and_other_weights_left_out(base):
    kept = ["tokenizer.json", "chat.jinja", "1_Pooling/config.json", "2_Dense/model.safetensors"]
    left = ["pytorch_model.bin", "x.gguf", "other.safetensors", "original/a.pth"]
    left += ["adapter_model.safetensors", "adapter_config.json", "pytorch_model.bin.index.json"]
    for name in [*kept, *left, ".git/config", ".cache/x"]:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    elsewhere = base.with_name("elsewhere")
    elsewhere.write_text("linked")
    (base / "link.json").symlink_to(elsewhere)
    (base / "loop").symlink_to(base)
    (base / "dangling").symlink_to(base / "nowhere")
    if hasattr(os, "mkfifo"):
        os.mkfifo(base / "pipe")
        left.append("pipe")  # to read it would be to wait for ever
    weights = sorted(p.name for p in base.glob("model*"))
    out, left_out = rewritten(base)
    assert sorted(left_out) == sorted([*left, "loop/", "dangling"])
    assert all((out / name).read_text() == name for name in kept)
    assert (out / "link.json").read_text() == "linked"
    assert not (out / "link.json").is_symlink()
    found = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert found == {*kept, *weights, "link.json"}


def test_a_tensor_is_added_beside_the_one_that_it_starts_from(base):
    """Also where whole numbers come before it: every tensor stays aligned."""
    (base / "config.json").write_text(json.dumps({"tie": True, "text_config": {"tie": True}}))
    key, new = "layers.0.q.weight", "head.weight"
    changes = {new: lambda t: t.mul_(2)}
    out, _ = rewritten(base, changes, added={new: key}, fields={"tie": False, "more": 1})
    state = state_of()
    assert_same_bits(tensors(out), state | {new: 2 * state[key]})
    index, old = (json.loads((folder / INDEX).read_text()) for folder in (out, base))
    assert index["weight_map"] == old["weight_map"] | {new: old["weight_map"][key]}
    assert index["metadata"]["total_size"] == old["metadata"]["total_size"] + state[key].nbytes
    found = json.loads((out / "config.json").read_text())
    assert found == {"tie": False, "text_config": {"tie": False}, "more": 1}


# Which files they are


def test_one_whole_file_goes_before_an_index_as_in_transformers(base):
    save_file({"a": torch.ones(1)}, base / "model.safetensors")
    seen = read_base(str(base))
    assert [f.name for f in seen.files] == ["model.safetensors"]
    assert seen.index is None


def test_the_usual_index_goes_before_that_of_a_variant(base):
    (base / "model.fp16.safetensors.index.json").write_text("{")
    assert read_base(str(base)).index == base / INDEX


def test_damaged_bases(base):
    first, second = "model-1.safetensors", "model-2.safetensors"

    def fails(match):
        with pytest.raises(lf.FileError, match=match):
            read_base(str(base))

    for name in ("../base/" + first, "/x.safetensors", "..", ""):
        (base / INDEX).write_text(json.dumps({"weight_map": {"a": first, "b": name}}))
        fails("which is no file beside it")
    (base / INDEX).write_text(json.dumps({"weight_map": {"a": first, "b": "gone"}}))
    fails("which is not there")
    (base / INDEX).write_text(json.dumps({"weight_map": {"a": first, "b": second}}))
    save_file(load_file(base / first), base / second)
    fails("and in another file as well")
    (base / second).write_bytes((base / first).read_bytes()[:-3])
    fails("it is cut off")
    (base / INDEX).write_text("{")
    fails("not an index")
    for path in base.iterdir():
        path.unlink()
    fails("no safetensors file")
