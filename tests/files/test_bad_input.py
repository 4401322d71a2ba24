"""Bad input in PEFT's format: a FileError or MismatchError of one line, naming file and key."""

import importlib
import json
import math
import os
import struct

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import lorafold as lf
from lorafold.errors import FileError, MismatchError
from lorafold.files import open_adapter
from lorafold.files import safetensors as files_safetensors
from lorafold.files.base import read_base

saving = importlib.import_module("lorafold.files.save")  # `files.save` is the function
P = "base_model.model."
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q", "v"]}


def pair(stem, out=4, inn=3, rank=2, seed=0, prefix=P):
    g = torch.Generator().manual_seed(seed)
    return {
        f"{prefix}{stem}.lora_A.weight": torch.randn(rank, inn, generator=g),
        f"{prefix}{stem}.lora_B.weight": torch.randn(out, rank, generator=g),
    }


def written(folder, tensors, config=CONFIG):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def raw(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


ONE = {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
ENTRY = json.dumps(ONE["x"]).encode()
BROKEN_FILES = {
    "0 bytes": (b"", "0 bytes are too few"),
    "7 bytes": (b"\1" * 7, "7 bytes are too few"),
    "absurd header length": (b"\xff" * 8 + b"{}", "claims 18446744073709551615 bytes"),
    "no header at all": (struct.pack("<Q", 0), "not valid JSON"),
    "header longer than the file": (struct.pack("<Q", 50) + b"{}", "ends after 10"),
    "header is no JSON": (raw(b"{nope"), "not valid JSON"),
    "header is no UTF-8": (raw(b'{"\xff"}'), "not valid JSON"),
    "header nests without end": (raw(b"[" * 100_000), "not valid JSON"),
    "header is a list": (raw(b"[]"), "JSON object"),
    "key twice": (raw(b'{"x":%s,"x":%s}' % (ENTRY, ENTRY), b"0000"), "'x' appears twice"),
    "key twice, of one value": (raw(b'{"x":%s,"x":1}' % ENTRY, b"0000"), "'x' appears twice"),
    "field twice": (raw(b'{"x":{"dtype":"F32","dtype":"F32"}}'), "'dtype' appears twice"),
    "__metadata__ twice": (raw(b'{"__metadata__":{},"__metadata__":{}}'), "appears twice"),
    "key is no Unicode": (raw(b'{"\\ud800":{}}'), "not valid JSON.*surrogate"),
    "number without end": (raw(b'{"x":' + b"9" * 5000 + b"}"), "entry for 'x'"),
    "__metadata__ is a list": (raw({"__metadata__": []}), "__metadata__.*texts"),
    "__metadata__ of numbers": (raw({"__metadata__": {"a": 1}}), "__metadata__.*texts"),
    "entry is empty": (raw({"x": {}}), "'x' has the dtype None"),
    "entry is no object": (raw({"x": 3}), "entry for 'x'"),
    "unknown dtype": (raw({"x": {**ONE["x"], "dtype": "F31"}}, b"0000"), "'x'.*'F31'"),
    "dtype is a list": (raw({"x": {**ONE["x"], "dtype": []}}, b"0000"), "'x'.*dtype"),
    "negative shape": (raw({"x": {**ONE["x"], "shape": [-1]}}, b"0000"), "'x'.*shape"),
    "shape of fractions": (raw({"x": {**ONE["x"], "shape": [1.0]}}, b"0000"), "'x'.*shape"),
    "shape of truths": (raw({"x": {**ONE["x"], "shape": [True]}}, b"0000"), "'x'.*shape"),
    "shape is a number": (raw({"x": {**ONE["x"], "shape": 1}}, b"0000"), "'x'.*shape"),
    "too many dimensions": (raw({"x": {**ONE["x"], "shape": [1] * 65}}, b"0000"), "'x'.*shape"),
    "huge product": (raw({"x": {**ONE["x"], "shape": [2**40] * 9}}, b"0000"), "'x'.*shape"),
    "huge but for a zero": (
        raw({"x": {**ONE["x"], "shape": [0, 2**62, 4], "data_offsets": [0, 0]}}),
        "'x'.*shape",
    ),
    "one offset": (raw({"x": {**ONE["x"], "data_offsets": [0]}}, b"0000"), "'x'.*range"),
    "negative offsets": (raw({"x": {**ONE["x"], "data_offsets": [-4, 0]}}, b"0000"), "'x'.*range"),
    "offsets beyond 64 bits": (
        raw({"x": {**ONE["x"], "data_offsets": [2**64, 2**64 + 4]}}, b"0000"),
        "'x'.*range",
    ),
    "huge shape": (raw({"x": {**ONE["x"], "shape": [2**70]}}, b"0000"), "'x'.*shape"),
    "backward range": (raw({"x": {**ONE["x"], "data_offsets": [4, 0]}}, b"0000"), "'x'.*range"),
    "size and shape differ": (raw({"x": {**ONE["x"], "shape": [2]}}, b"0000"), "'x'.*8 bytes"),
    "cut off in the data": (raw(ONE, b"000"), "'x' reaches to byte"),
    "bytes left over": (raw(ONE, b"00000"), "1 bytes after the last"),
    "hole": (raw({"x": {**ONE["x"], "data_offsets": [4, 8]}}, b"0" * 8), "'x' leave a hole"),
    "overlap": (raw({**ONE, "y": ONE["x"]}, b"0000"), "overlap those before"),
    "no tensors": (raw({}), "no tensors"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_the_reference_implementation_refuses_them_too(name):
    """But for four: it checks what it needs itself, and an adapter needs tensors."""
    data, _ = BROKEN_FILES[name]
    if name in ("no tensors", "too many dimensions", "huge but for a zero", "key twice"):
        return
    with pytest.raises((SafetensorError, OverflowError)):
        safetensors.torch.load(data)


def test_a_dtype_that_this_torch_lacks_is_named(tmp_path, monkeypatch):
    monkeypatch.delitem(files_safetensors.DTYPES, "F32")
    folder = written(tmp_path / "a", pair("q"))
    with pytest.raises(FileError, match="'F32', which torch .* does not have yet"):
        lf.load(folder)


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_broken_safetensors(name, tmp_path):
    data, match = BROKEN_FILES[name]
    folder = written(tmp_path / "a", pair("q"))
    (folder / "adapter_model.safetensors").write_bytes(data)
    for call in (open_adapter, lf.load):
        with pytest.raises(FileError, match=rf"adapter_model\.safetensors.*{match}"):
            call(folder)


def test_every_truncation_is_noticed(tmp_path):
    folder = written(tmp_path / "a", pair("q"))
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        with pytest.raises(FileError, match=r"adapter_model\.safetensors"):
            open_adapter(folder)
    file.write_bytes(whole)
    lf.load(folder)


A, B = f"{P}q.lora_A.weight", f"{P}q.lora_B.weight"
BROKEN_TENSORS = {
    "A without B": ({A: torch.ones(2, 3)}, rf"{A}'.*partner lora_B"),
    "B without A": ({B: torch.ones(4, 2)}, rf"{B}'.*partner lora_A"),
    "ranks disagree": ({A: torch.ones(2, 3), B: torch.ones(4, 3)}, f"ranks disagree: '{A}'"),
    "rank against the config": ({A: torch.ones(3, 3), B: torch.ones(4, 3)}, f"'{A}'.*rank 2"),
    "integers": ({A: torch.ones(2, 3).int(), B: torch.ones(4, 2)}, f"'{A}' must be floating"),
    "one dimension": ({A: torch.ones(6), B: torch.ones(4, 2)}, f"'{A}' has shape"),
    "empty shard": ({A: torch.ones(0, 3), B: torch.ones(4, 0)}, f"'{A}' has shape.*gathered"),
    "A is a conv": ({A: torch.ones(2, 3, 3), B: torch.ones(4, 2)}, "ranks disagree"),
    "one module twice": (
        {**pair("q"), **pair("q", prefix="")},
        r"base_model\.model\.q\.lora_. ?.*'q\.lora_.\.weight' are the same module",
    ),
    "two adapters": (
        {**pair("q"), **{k.replace(".weight", ".b.weight"): v for k, v in pair("q").items()}},
        "are the same module",
    ),
    "embedding and linear": (
        {
            **pair("q"),
            P + "q.lora_embedding_A": torch.ones(2, 9),
            P + "q.lora_embedding_B": torch.ones(4, 2),
        },
        "are the same module",
    ),
    "unnamed parameter": (pair("q.base_layer"), "target_parameters"),
    "NaN": ({A: torch.ones(2, 3), B: torch.full((4, 2), math.nan)}, "module 'q': B holds NaN"),
    "infinity": ({A: torch.full((2, 3), math.inf), B: torch.ones(4, 2)}, "module 'q': A holds NaN"),
}


@pytest.mark.parametrize("name", BROKEN_TENSORS)
def test_tensors_that_contradict_each_other(name, tmp_path):
    tensors, match = BROKEN_TENSORS[name]
    folder = written(tmp_path / "a", tensors)
    with pytest.raises(MismatchError, match=rf"(?s)adapter_model\.safetensors: .*{match}"):
        lf.load(folder)
    with pytest.raises(MismatchError, match=rf"(?s)state dict: .*{match}"):
        lf.load(tensors, config=CONFIG)


BROKEN_CONFIGS = {
    "not JSON": ("{", "not valid JSON"),
    "empty": ("", "empty"),
    "a list": ("[]", "JSON object"),
    "not UTF-8": (b"\xff\xfe", "UTF-8"),
    "no r": ({**CONFIG, "r": None}, "'r' must be a number"),
    "r is text": ({**CONFIG, "r": "8"}, "'r' must be a number"),
    "no alpha": ({"r": 2}, "'lora_alpha' must be a number, found None: write into the config"),
    "AdaLoRA": ({**CONFIG, "peft_type": "ADALORA"}, "'ADALORA'.*only LORA"),
    "LoHa": ({**CONFIG, "peft_type": "LOHA"}, "'LOHA'"),
    "IA3": ({"peft_type": "IA3"}, "'IA3'"),
    "patterns are a list": ({**CONFIG, "rank_pattern": ["q"]}, "'rank_pattern' must be an object"),
}


@pytest.mark.parametrize("name", BROKEN_CONFIGS)
def test_broken_configs(name, tmp_path):
    config, match = BROKEN_CONFIGS[name]
    folder = written(tmp_path / "a", pair("q"))
    data = config if isinstance(config, str | bytes) else json.dumps(config)
    data = data.encode() if isinstance(data, str) else data
    (folder / "adapter_config.json").write_bytes(data)
    with pytest.raises(FileError, match=rf"adapter_config\.json.*{match}"):
        lf.load(folder)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"r": 0}, "at least 1"),
        ({"r": 2.5}, "whole number"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern key '\\('"),
        ({"alpha_pattern": {"q": "x"}}, "alpha_pattern.*'x'"),
    ],
)
def test_configs_that_give_no_scale(config, match, tmp_path):
    folder = written(tmp_path / "a", pair("q"), {**CONFIG, **config})
    with pytest.raises(MismatchError, match=rf"adapter_model\.safetensors: .*{match}"):
        lf.load(folder)


def test_places_without_an_adapter(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileError, match="neither is"):
        lf.load(empty)
    (empty / "adapter_config.json").write_text("{}")
    with pytest.raises(FileError, match=r"only adapter_config\.json"):
        lf.load(empty)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileError, match=r"notes\.txt"):
        lf.load(tmp_path / "notes.txt")
    with pytest.raises(FileError, match="no such file"):
        lf.load(tmp_path / "nowhere")
    with pytest.raises(FileError, match="given as a path, not as int"):
        lf.load(3)
    with pytest.raises(MismatchError, match="must be a tensor"):
        lf.load({A: [1.0]}, alpha=1)
    with pytest.raises(MismatchError, match="config must be a mapping"):
        lf.load(pair("q"), config=3)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 16797696\n"
DISGUISED = {
    "a pointer": (POINTER, r"a pointer of git-LFS, not the file itself: .*git lfs pull"),
    "a page": (b"\n<!DOCTYPE html><html><body>Not found</body></html>", "a page of HTML"),
    "another page": (b"<html lang=en>", "a page of HTML"),
    "an error": (b'{"error":"Invalid username or password."}', "what a server says instead"),
    "another error": (b"Entry not found", "what a server says instead of the file: fetch it"),
    "GGUF": (b"GGUF\3\0\0\0" + b"\0" * 60, "a GGUF file"),
    "a pickle": (b"PK\3\4" + b"\0" * 60, r"a ZIP file.*\.bin"),
}


@pytest.mark.parametrize("name", DISGUISED)
def test_another_file_under_the_name_is_told(name, tmp_path):
    data, match = DISGUISED[name]
    folder = written(tmp_path / "a", pair("q"))
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    for file in (weights, config):
        kept = file.read_bytes()
        file.write_bytes(data)
        says = match if file is weights or name not in ("GGUF", "a pickle") else "."
        with pytest.raises(FileError, match=rf"(?s){file.name}.* {says}"):
            lf.load(folder)
        file.write_bytes(kept)
    (folder / "adapter_model.bin").write_bytes(data)
    weights.unlink()
    with pytest.raises(FileError, match=r"adapter_model\.bin"):
        lf.load(folder, allow_pickle=True)
    base = tmp_path / "base"
    base.mkdir()
    (base / "model.safetensors").write_bytes(data)
    with pytest.raises(FileError, match=rf"(?s)model\.safetensors is {match}"):
        read_base(str(base))


def test_a_download_that_stopped_says_how_far_it_came(tmp_path):
    folder = written(tmp_path / "a", pair("q"))
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    says = rf"cut off \({len(whole)} bytes expected, {len(whole) - 9} found\)"
    with pytest.raises(FileError, match=says):
        lf.load(folder)
    file.write_bytes(whole[:40])
    with pytest.raises(FileError, match=r"cut off \(more than \d+ bytes expected, 40 found\)"):
        lf.load(folder)


def test_what_was_not_gathered_is_named_whatever_it_is(tmp_path):
    """ZeRO 3 leaves tensors of shape (0,) where a rank has nothing of them."""
    config = {**CONFIG, "modules_to_save": ["score"]}
    for key in (A, B, f"{P}score.weight"):
        tensors = {**pair("q"), f"{P}score.weight": torch.ones(2, 3), key: torch.empty(0)}
        with pytest.raises(MismatchError, match=rf"'{key}' of shape \(0,\).*not gathered"):
            lf.load(written(tmp_path / key, tensors, config))
    (tmp_path / "base").mkdir()
    save_file({"q.weight": torch.empty(0)}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(MismatchError, match=r"'q\.weight' of shape \(0,\)"):
        read_base(str(tmp_path / "base"))


@pytest.mark.parametrize("text", ["{", "[]", "\xff", ""])
def test_a_damaged_config_of_a_base_is_no_absent_one(text, tmp_path):
    """It says whether weights are tied."""
    save_file({"q.weight": torch.ones(4, 3)}, tmp_path / "model.safetensors")
    assert read_base(str(tmp_path)).config == {}
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(FileError, match=r"config\.json"):
        read_base(str(tmp_path))


def test_a_full_disk_is_an_error_of_ours(tmp_path, monkeypatch):
    """Whoever writes: the library of safetensors, or the system."""
    adapter = lf.load(pair("q"), alpha=2)
    full = OSError(28, "No space left on device")

    def fails(*_args, **_options):
        raise full

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fails)
        with pytest.raises(FileError, match=r"out can't be written: No space left on device"):
            lf.save(adapter, tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(saving, "save_tensors", fails)
        full = SafetensorError("Error while serializing: I/O error: No space left (os error 28)")
        with pytest.raises(FileError, match=r"out can't be written: .*No space left"):
            lf.save(adapter, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    lf.save(adapter, tmp_path / "out")
