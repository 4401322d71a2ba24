"""A base from a folder: its dtype, its room, in four bits, and what is no base."""

from __future__ import annotations

import json

import pytest
import torch

import lorafold as lf
from lorafold.demo.model import base_dir, data_dir
from lorafold.errors import FileError, MismatchError, RefusedError
from lorafold.serve import Room, Sampling, read_base

transformers = pytest.importorskip("transformers")


def text(base, serving, mix=None, new=12):
    engine = base.engine
    engine.start()
    for name in mix or {}:
        serving.add(engine, lf.load(data_dir() / "adapters" / name), name)
    told = serving.ask(engine, b"1994 -> ", new, Sampling(temperature=0, top=0), mix=mix or {})
    found = told.wait()
    engine.stop(60)
    assert found.reason == "length", found.pieces[-1].error
    return bytes(found.tokens), found.logprobs


def test_room_and_dtype(serving):
    base = read_base(base_dir(), "demo", device="cpu")
    limits = base.engine.limits
    assert (limits.length, limits.vocabulary, limits.adapters) == (256, 256, 64)
    assert limits.rows == 64
    assert base.engine.model.dtype == torch.float32  # float16, as stored, is slow here
    small = read_base(base_dir(), "demo", room=Room(3, 100, 2, 5), dtype="bfloat16", device="cpu")
    assert small.engine.model.dtype == torch.bfloat16
    own = small.engine.limits
    assert (own.rows, own.length, own.adapters, own.waiting) == (3, 100, 2, 5)
    assert text(small, serving, {"roman": 1.0})[0]


def test_a_base_in_four_bits_runs_adapters(serving):
    plain = read_base(base_dir(), "demo", device="cpu", room=Room(2))
    four = read_base(base_dir(), "demo", device="cpu", room=Room(2), quantize="nf4")
    _, expected = text(plain, serving, {"roman": 1.0})
    _, found = text(four, serving, {"roman": 1.0})
    _, other = text(read_base(base_dir(), "demo", device="cpu", quantize="nf4"), serving)
    assert found[0] != expected[0]
    assert abs(found[0] - expected[0]) < 1.5
    assert other[0] != found[0]


def test_what_is_no_base(tmp_path):
    with pytest.raises(FileError, match="is no base"):
        read_base(tmp_path, "x")
    config = json.loads((base_dir() / "config.json").read_text())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FileError, match="can't read its config"):
        read_base(tmp_path, "x")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileError, match="can't load a model"):
        read_base(tmp_path, "x")
    bloom = {"model_type": "bloom", "architectures": ["BloomForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(bloom))
    with pytest.raises(RefusedError, match="'bloom' are not served by rows"):
        read_base(tmp_path, "x")  # before its weights are looked for


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "dtype must be one of auto, float32"),
        ({"quantize": "int3"}, "quantize must be one of nf4"),
        ({"engine": "magic"}, "engine must be one of rows, packed; found 'magic'"),
        ({"room": Room(length=257)}, "asks for 257 tokens, and the base takes 256"),
        ({"room": Room(rows=-1)}, "max_rows must be at least 1"),
        ({"room": Room(waiting=0)}, "max_queue must be at least 1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(MismatchError, match=message):
        read_base(base_dir(), "demo", device="cpu", **options)


def test_bytes_are_tokens_where_there_is_no_tokenizer(tmp_path, serving):
    import shutil

    for name in ("config.json", "model.safetensors"):
        shutil.copy(base_dir() / name, tmp_path / name)
    base = read_base(tmp_path, "bare", device="cpu", room=Room(2))
    assert base.words.tokens("é\n") == [0xC3, 0xA9, 10]
    assert base.words.lined
    assert text(base, serving) == text(read_base(base_dir(), "d", device="cpu"), serving)
