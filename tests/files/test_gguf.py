"""llama.cpp's files: what they hold, what is refused, and heads of files that are none."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafold as lf
from lorafold.cli import main
from lorafold.errors import FileError, MismatchError, RefusedError
from lorafold.files import load_many, open_adapter
from lorafold.files.find import name_of
from lorafold.parts import Layout

gguf = pytest.importorskip("gguf")

GOLDEN = Path(__file__).parent / "golden"  # what llama.cpp's own converter made: see README there
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
EMBED, HEAD = "model.embed_tokens", "lm_head"
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def base_of(folder, **config):
    """A base by its configuration alone."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


@pytest.fixture
def base(tmp_path):
    return base_of(tmp_path / "base")


def update(out, inner, rank=2, scale=1.0, dtype=torch.float32):
    return lf.LowRank(torch.randn(rank, inner).to(dtype), torch.randn(out, rank).to(dtype), scale)


def adapter_of(**more):
    modules = {Q: update(16, 12, 3, 0.3), K: update(8, 12, 2, 2.0)}
    return lf.Adapter({**modules, "model.layers.1.mlp.down_proj": update(12, 20, 5, -1.7)}, **more)


def tensors_in(path):
    """By the package gguf."""
    return {t.name: torch.from_numpy(np.array(t.data)) for t in gguf.GGUFReader(path).tensors}


def made(path, tensors, arch="llama", alpha=None, kind="adapter", **texts):
    """A file by the package gguf: arrays, or (bytes, type)."""
    w = gguf.GGUFWriter(path, arch)
    w.add_type(kind)
    w.add_string("adapter.type", "lora")
    if alpha is not None:
        w.add_float32("adapter.lora.alpha", alpha)
    for key, text in texts.items():
        w.add_string(key.replace("__", "."), text)
    for key, t in tensors.items():
        if isinstance(t, tuple):
            w.add_tensor(key, t[0], raw_dtype=t[1])
        else:
            w.add_tensor(key, t.numpy())
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def pair(name, out, inner, rank=2):
    return {
        f"{name}.weight.lora_a": torch.randn(rank, inner),
        f"{name}.weight.lora_b": torch.randn(out, rank),
    }


# llama.cpp's own


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.form("gguf", "read", by="llama.cpp's converter")
def test_what_its_converter_wrote_is_the_adapter_of_peft(name):
    folder = GOLDEN / name
    truth = lf.load(folder / "peft")
    found = lf.load(folder / "converted.gguf", base=folder / "base")
    assert found.modules.keys() == truth.modules.keys()
    for path, u in truth.modules.items():
        assert torch.equal(found[path].A, u.A)
        assert torch.equal(found[path].B, u.B)
        assert found[path].scale == u.scale
        assert found.layout(path) == truth.layout(path)
    assert found.distance(truth) == 0


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.form("gguf", "written", by="llama.cpp's converter")
def test_its_converters_tensors_are_written_bit_for_bit(name, tmp_path):
    """Of an adapter of scale 1, where nothing is multiplied into B."""
    folder = GOLDEN / name
    truth = lf.load(folder / "peft")
    plain = {path: lf.LowRank(u.A, u.B) for path, u in truth.modules.items()}
    target = tmp_path / "a.gguf"
    lf.save(replace(truth, modules=plain), target, format="gguf", base=folder / "base")
    ours, theirs = tensors_in(target), tensors_in(folder / "converted.gguf")
    assert ours.keys() == theirs.keys()
    assert len(ours) == 30
    assert all(torch.equal(t, theirs[key]) for key, t in ours.items())
    lf.save(truth, target, format="gguf", base=folder / "base", overwrite=True)
    assert "adapter.lora.alpha" not in gguf.GGUFReader(target).fields
    back = lf.load(target, base=folder / "base")
    assert back.distance(truth) <= 1e-6 * truth.norm()


# There and back


def test_each_module_keeps_its_rank_and_its_scale_is_in_b(tmp_path, base):
    a, target = adapter_of(base_model="org/base"), tmp_path / "sql.gguf"
    lf.save(a, target, format="gguf", base=base)
    f = open_adapter(target, base=base)
    assert f.shapes[Q] == (16, 12, 3)
    assert set(f.scales.values()) == {1.0}
    assert f.base_model == "org/base"
    back = lf.load(target, base=base)
    for path, u in a.modules.items():
        assert torch.equal(back[path].A, u.A)
        assert (back[path].dense() - u.dense()).norm() <= 1e-6 * u.norm()
        assert torch.equal(f.read(path).B, back[path].B)
        assert torch.equal(f.only(path).read(path).A, u.A)
    assert torch.equal(back[K].B, a[K].B * 2)
    rows = tensors_in(target)["blk.0.attn_q.weight.lora_b"]
    expected = (a[Q].B.double() * 0.3).float().reshape(4, 2, 2, 3).transpose(1, 2).reshape(16, 3)
    assert torch.equal(rows, expected)


def test_a_square_q_with_fewer_heads_of_k_is_told_by_value(tmp_path, base):
    """Neither shape would show it: the heads of the one are not those of the other."""
    a = lf.Adapter({Q: update(16, 16), K: update(16, 16)})
    lf.save(a, tmp_path / "a.gguf", format="gguf", base=base)
    assert lf.load(tmp_path / "a.gguf", base=base).distance(a) == 0
    other = base_of(tmp_path / "other", num_key_value_heads=4)
    wrong = lf.load(tmp_path / "a.gguf", base=other)
    assert torch.equal(wrong[Q].B, a[Q].B)
    assert not torch.equal(wrong[K].B, a[K].B)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path, base, dtype):
    a, target = adapter_of(), tmp_path / "a.gguf"
    lf.save(a, target, format="gguf", base=base, dtype=dtype)
    f = open_adapter(target, base=base)
    assert set(f.dtypes.values()) == {dtype}
    back = f.load()
    assert torch.equal(back[Q].A, a[Q].A.to(dtype))
    assert back.distance(a) < 5e-3 * a.norm()
    narrow = a.to(dtype=dtype)  # exact in float32, which is what is written
    lf.save(narrow, target, format="gguf", base=base, overwrite=True)
    back = lf.load(target, base=base)
    assert back[Q].B.dtype == torch.float32
    assert back.distance(narrow) <= 1e-6 * narrow.norm()


def test_eight_bits_are_read_as_gguf_reads_them(tmp_path):
    a, b = torch.randn(32, 64), torch.randn(96, 32)
    kind = gguf.GGMLQuantizationType.Q8_0
    tensors = {
        "blk.0.attn_q.weight.lora_a": (gguf.quantize(a.numpy(), kind), kind),
        "blk.0.attn_q.weight.lora_b": (gguf.quantize(b.numpy(), kind), kind),
    }
    target = made(tmp_path / "a.gguf", tensors, arch="qwen2", alpha=16.0)
    u = lf.load(target)[Q]
    for t, (packed, _) in zip((u.A, u.B), tensors.values(), strict=True):
        assert torch.equal(t, torch.from_numpy(gguf.dequantize(packed, kind)))
    assert u.scale == 0.5
    assert open_adapter(target).dtypes[Q] == torch.float32


@pytest.mark.parametrize("alpha", [None, 0.0, 8.0])
def test_alpha_is_divided_by_each_tensors_own_rank(tmp_path, alpha):
    tensors = pair("blk.0.attn_q", 6, 10, 2) | pair("blk.0.attn_k", 6, 10, 4)
    found = lf.load(made(tmp_path / "a.gguf", tensors, arch="qwen2", alpha=alpha))
    assert [found[Q].scale, found[K].scale] == ([4.0, 2.0] if alpha else [1.0, 1.0])


def test_embedding_and_head(tmp_path, base):
    modules = {EMBED: update(12, 40, 3), HEAD: update(40, 12, 2)}
    a = lf.Adapter(modules, layouts={EMBED: Layout("embedding")})
    lf.save(a, tmp_path / "a.gguf", format="gguf", base=base)
    tensors = tensors_in(tmp_path / "a.gguf")
    assert torch.equal(tensors["token_embd.weight.lora_a"], a[EMBED].A.T)
    assert torch.equal(tensors["token_embd.weight.lora_b"], a[EMBED].B)
    back = lf.load(tmp_path / "a.gguf", base=base)
    assert back.distance(a) == 0
    assert back.layout(EMBED).kind == "embedding"
    tied = base_of(tmp_path / "tied", tie_word_embeddings=True)
    for path in modules:
        one = lf.Adapter({path: a[path]}, layouts={path: a.layout(path)})
        with pytest.raises(RefusedError, match=f"one weight for embedding and .*{path}"):
            lf.save(one, tmp_path / "no.gguf", format="gguf", base=tied)
    assert not (tmp_path / "no.gguf").exists()


def test_a_copy_of_the_bases_embedding_is_left_out(tmp_path, base):
    weight = torch.randn(40, 12)
    save_file({f"{EMBED}.weight": weight, f"{HEAD}.weight": weight + 1}, base / "model.safetensors")
    key = f"base_model.model.{EMBED}.base_layer.weight"
    layouts = {EMBED: Layout("embedding")}
    a = lf.Adapter({EMBED: update(12, 40)}, {key: weight.clone()}, layouts=layouts)
    lf.save(a, tmp_path / "a.gguf", format="gguf", base=base)
    assert lf.load(tmp_path / "a.gguf", base=base).distance(replace(a, extras={})) == 0
    other = replace(a, extras={key: weight + 1})
    with pytest.raises(RefusedError, match="no place for .*base_layer.*no copy of a weight"):
        lf.save(other, tmp_path / "no.gguf", format="gguf", base=base)


@pytest.mark.parametrize("named", ["disk", "memory"])
def test_experts(tmp_path, named):
    """Those of one parameter in memory, and those of one tensor each on the disk."""
    base = base_of(tmp_path / "base", model_type="mixtral", num_local_experts=3)
    block = "model.layers.1.block_sparse_moe.experts"
    if named == "disk":
        modules = {f"{block}.{e}.w3": update(6, 10, r) for e, r in ((0, 2), (2, 1))}
        a = lf.Adapter(modules)
    else:
        path = "model.layers.1.mlp.experts.gate_up_proj"
        modules = {f"{path}[{e}]": update(12, 10, 2, 0.5) for e in range(3)}
        layouts = {
            f"{path}[{e}]": Layout("expert", parameter="gate_up_proj", expert=(e, 3))
            for e in range(3)
        }
        a = lf.Adapter(modules, layouts=layouts)
    target = tmp_path / "a.gguf"
    lf.save(a, target, format="gguf", base=base)
    tensors = tensors_in(target)
    assert tuple(tensors["blk.1.ffn_up_exps.weight.lora_a"].shape) == (3, 2, 10)
    assert tuple(tensors["blk.1.ffn_up_exps.weight.lora_b"].shape) == (3, 6, 2)
    back = lf.load(target, base=base)
    if named == "disk":
        assert not tensors["blk.1.ffn_up_exps.weight.lora_b"][1].any()
        assert [back[f"{block}.{e}.w3"].rank for e in range(3)] == [2, 1, 1]
        assert all(torch.equal(back[p].A, u.A) for p, u in modules.items())
        assert all(torch.equal(back[p].B, u.B) for p, u in modules.items())
    else:
        for e, u in enumerate(modules.values()):
            halves = torch.cat([back[f"{block}.{e}.{w}"].dense() for w in ("w1", "w3")])
            torch.testing.assert_close(halves, u.dense())


def test_round_the_language_models_formats(tmp_path, base):
    """PEFT, GGUF, MLX, GGUF, PEFT: A keeps its bits, ΔW is off by less than 1e-6, ranks stay."""
    a = adapter_of()
    lf.save(a, tmp_path / "peft")
    lf.save(lf.load(tmp_path / "peft"), tmp_path / "a.gguf", format="gguf", base=base)
    lf.save(lf.load(tmp_path / "a.gguf", base=base), tmp_path / "mlx", format="mlx")
    lf.save(lf.load(tmp_path / "mlx"), tmp_path / "b.gguf", format="gguf", base=base)
    lf.save(lf.load(tmp_path / "b.gguf", base=base), tmp_path / "again")
    back = lf.load(tmp_path / "again")
    assert back.modules.keys() == a.modules.keys()
    assert all(torch.equal(back[path].A, u.A) for path, u in a.modules.items())
    assert torch.equal(back[K].B * back[K].scale, a[K].B * 2)
    assert back.distance(a) <= 1e-6 * a.norm()


def test_at_a_url(tmp_path, base):
    fsspec = pytest.importorskip("fsspec")
    a, url = adapter_of(), "memory://test_gguf/sql.gguf"
    lf.save(a, url, format="gguf", base=base)
    with pytest.raises(FileError, match="give overwrite=True"):
        lf.save(a, url, format="gguf", base=base)
    f = open_adapter(url, base=base)
    assert (f.read(Q).dense() - a[Q].dense()).norm() <= 1e-6 * a[Q].norm()
    assert lf.load("memory://test_gguf", base=base).distance(a) <= 1e-6 * a.norm()
    fsspec.filesystem("memory").rm("/test_gguf", recursive=True)


def test_provenance_goes_along(tmp_path, base):
    folder, target = tmp_path / "a", tmp_path / "a.gguf"
    lf.save(adapter_of(), folder)
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"made": "by hand", "general.name": "SQL"})
    lf.save(lf.load(folder), target, format="gguf", base=base)
    fields = gguf.GGUFReader(target).fields
    assert fields["lorafold.made"].contents() == "by hand"
    assert fields["general.name"].contents() == "SQL"
    again = tmp_path / "again.gguf"
    lf.save(lf.load(target, base=base), again, format="gguf", base=base)
    assert again.read_bytes() == target.read_bytes()


# The base


def test_where_rows_are_permuted_the_base_is_needed_in_every_door(tmp_path, base, capsys):
    target = tmp_path / "sql.gguf"
    a = adapter_of()
    lf.save(a, target, format="gguf", base=base)
    for door in (lf.load, open_adapter):
        with pytest.raises(MismatchError, match=r"sql\.gguf: .*load it with base=, the base's fol"):
            door(target)
    for door in (lf.fold, lf.merge, lf.similarity, lf.anatomy):
        with pytest.raises(MismatchError, match=r"load it with its base \(`lorafold.load`"):
            door(target)
    assert load_many(tmp_path, base=base)["sql"].distance(a) <= 1e-6 * a.norm()
    lines = [["info"], ["similar", str(tmp_path / "a")], ["fold", "-o", str(tmp_path / "lib")]]
    lines += [["merge", "-o", str(tmp_path / "m")], ["anatomy"], ["roles"]]
    lf.save(a, tmp_path / "a")
    for command, *more in lines:
        words = [command, str(target), *more]
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2, words
        assert "load it with --base, the base's folder" in capsys.readouterr().err
        with pytest.raises(SystemExit) as ended:
            main([*words, "--base", str(base)])
        assert ended.value.code == 0, capsys.readouterr().err
        capsys.readouterr()
    assert lf.Library.open(tmp_path / "lib").names == ["sql"]
    others = {"model.layers.0.self_attn.o_proj": update(8, 8)}
    lf.save(lf.Adapter(others), tmp_path / "o.gguf", format="gguf", base=base)
    assert lf.load(tmp_path / "o.gguf").modules.keys() == others.keys()


def test_the_names_are_those_that_the_base_has(tmp_path):
    base = base_of(tmp_path / "base", model_type="qwen2")
    name = "model.language_model.layers.0.self_attn.q_proj"
    shapes = {f"{name}.weight": (6, 10), "model.language_model.norm.weight": (10,)}
    save_file({k: torch.zeros(s) for k, s in shapes.items()}, base / "model.safetensors")
    target = made(tmp_path / "a.gguf", pair("blk.0.attn_q", 6, 10), arch="qwen2")
    assert [*lf.load(target).modules] == [Q]
    assert lf.load(target, base=base).modules.keys() == {Q}  # found behind its prefix
    old = base_of(tmp_path / "old", model_type="qwen2")
    save_file({"layers.0.attention.wq.weight": torch.zeros(6, 10)}, old / "model.safetensors")
    assert [*lf.load(target, base=old).modules] == ["layers.0.attention.wq"]
    (tmp_path / "wrong").mkdir()
    wrong = base_of(tmp_path / "wrong", model_type="qwen2")
    save_file({f"{Q}.weight": torch.zeros(8, 10)}, wrong / "model.safetensors")
    with pytest.raises(MismatchError, match=r"has the shape \(8, 10\) in the base"):
        lf.load(target, base=wrong)
    two = made(tmp_path / "b.gguf", pair("blk.7.attn_q", 6, 10), arch="qwen2")
    with pytest.raises(MismatchError, match="no module of .* is meant by 'blk.7.attn_q'"):
        lf.load(two, base=wrong)


def test_a_model_or_its_configuration_is_a_base_too(tmp_path, base):
    transformers = pytest.importorskip("transformers")
    a = adapter_of()
    lf.save(a, tmp_path / "a.gguf", format="gguf", base=base)
    config = transformers.LlamaConfig(
        **{k: v for k, v in CONFIG.items() if k != "model_type"},
        hidden_size=12,
        head_dim=4,
        intermediate_size=20,
        vocab_size=40,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    for given in (config, model, config.to_dict(), str(base / "config.json")):
        found = lf.load(tmp_path / "a.gguf", base=given)
        assert found.distance(a) <= 1e-6 * a.norm()
        lf.save(a, tmp_path / "b.gguf", format="gguf", base=given, overwrite=True)
        assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()
    lf.save(replace(a, base_model=str(base)), tmp_path / "c.gguf", format="gguf")


WRONG_BASES = {
    "not there": ({}, "no such folder"),
    "no configuration": (None, "has no config.json"),
    "another": ({"model_type": "qwen2"}, "is of the architecture 'llama', and .* is of 'qwen2'"),
    "not tried": ({"model_type": "bert"}, "'bert', of which it is not known what llama.cpp"),
    "no heads": ({"num_attention_heads": None}, "does not say how many heads"),
    "other heads": ({"num_attention_heads": 5}, "its 16 rows are not those of the 5 heads"),
}


@pytest.mark.parametrize("case", WRONG_BASES)
def test_a_base_that_does_not_fit(case, tmp_path, base):
    said, why = WRONG_BASES[case]
    lf.save(adapter_of(), tmp_path / "a.gguf", format="gguf", base=base)
    other = tmp_path / "other"
    if said is None:
        other.mkdir()
    elif said:
        base_of(other, **said)
    with pytest.raises((FileError, MismatchError), match=why):
        lf.load(tmp_path / "a.gguf", base=other)


# Finding


def test_files_are_called_by_their_own_names_and_a_folder_stands_for_them(tmp_path, base):
    folder = tmp_path / "loras"
    folder.mkdir()
    a = lf.Adapter({"model.layers.0.self_attn.o_proj": update(8, 12)})
    for name in ("sql", "poems"):
        lf.save(a, folder / f"{name}.gguf", format="gguf", base=base)
    assert name_of(folder / "sql.gguf") == "sql"
    for source in (str(folder / "*.gguf"), folder, [folder / "sql.gguf", folder / "poems.gguf"]):
        assert sorted(lf.fold(source, tolerance=0).names) == ["poems", "sql"]
    assert sorted(load_many(folder)) == ["poems", "sql"]
    with pytest.raises(FileError, match=r"holds 2 adapters: 'poems\.gguf', 'sql\.gguf'"):
        lf.load(folder)
    (folder / "poems.gguf").unlink()
    assert lf.load(folder).distance(a) == 0
    lf.save(a, folder / "law")
    made(folder / "base.gguf", {"token_embd.weight": torch.zeros(4, 4)}, kind="model")
    assert sorted(load_many(folder)) == ["law", "sql"]  # a whole model beside them is none


def test_check_and_convert(tmp_path, capsys):
    base = base_of(tmp_path / "base")
    shapes = {Q: (16, 12), K: (8, 12), "model.layers.1.mlp.down_proj": (12, 20)}
    save_file({f"{p}.weight": torch.zeros(s) for p, s in shapes.items()}, base / "m.safetensors")
    a = adapter_of()
    lf.save(a, tmp_path / "peft")

    def run(*words):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, words), "--json"])
        told = capsys.readouterr()
        assert ended.value.code == 0, told.err
        return json.loads(told.out)

    line = ("--to", "gguf", "--base", base)
    said = run("convert", tmp_path / "peft", "-o", tmp_path / "a.gguf", *line)
    assert said["ranks"] == [[2, 5], [2, 5]]
    assert 0 <= said["error"] < 1e-6
    assert run("check", tmp_path / "a.gguf", "--base", base)["ok"]
    half = ("-o", tmp_path / "h.gguf", *line, "--dtype", "float16")
    assert 5e-5 < run("convert", tmp_path / "a.gguf", *half)["error"] < 1e-3
    run("convert", tmp_path / "a.gguf", "-o", tmp_path / "back", "--to", "peft", "--base", base)
    assert lf.load(tmp_path / "back").distance(a) <= 1e-6 * a.norm()


# What is not written


def not_held(name):
    """(adapter, options, what is said) of what GGUF has no place for."""
    u, a = update(6, 8), adapter_of()
    conv = {"c": Layout("conv", kernel=(2, 4))}
    return {
        "no base": (a, {"base": None}, "give base=, the base's folder"),
        "a head": (replace(a, extras={"score.weight": u.A}), {}, "'score.weight'"),
        "a bias": (replace(a, extras={f"{Q}.bias": u.A[0]}), {}, f"'{Q}.bias'"),
        "DoRA": (
            replace(a, extras={f"{Q}.lora_magnitude_vector": torch.ones(6)}),
            {},
            "can't hold the adapter: this is a DoRA",
        ),
        "PiSSA": (
            replace(a, config={"init_lora_weights": "pissa", "r": 2, "lora_alpha": 2}),
            {},
            "PiSSA",
        ),
        "replicas": (replace(a, config={"layer_replication": [[0, 2]]}), {}, "layers replicated"),
        "a convolution": (lf.Adapter({"c": u}, layouts=conv), {}, "no place for 'c'"),
        "a strange name": (lf.Adapter({"model.layers.0.x": u}), {}, "'model.layers.0.x' is no mod"),
        "a norm's name": (lf.Adapter({"model.layers.0.self_attn.q_norm": u}), {}, "is no module"),
        "other heads": (lf.Adapter({Q: update(6, 8)}), {}, f"{Q}.*not those of 4 heads"),
        "float64": (a, {"dtype": torch.float64}, "does not read torch.float64"),
        "too large": (
            lf.Adapter({Q: lf.LowRank(torch.ones(1, 8), torch.full((8, 1), 1e38), 1e10)}),
            {},
            "numbers that float32 can't hold",
        ),
        "padding": (a, {"pad": True}, "pad= and tables= are not for format='gguf'"),
    }[name]


NOT_HELD = (
    *("no base", "a head", "a bias", "DoRA", "PiSSA", "replicas", "a convolution"),
    *("a strange name", "a norm's name", "other heads", "float64", "too large", "padding"),
)


@pytest.mark.parametrize("name", NOT_HELD)
def test_what_gguf_can_not_hold_is_refused_by_name(name, tmp_path, base):
    adapter, options, says = not_held(name)
    with pytest.raises((RefusedError, MismatchError), match=says):
        lf.save(adapter, tmp_path / "no.gguf", format="gguf", **{"base": base, **options})
    assert not (tmp_path / "no.gguf").exists()


def test_only_its_own_kind_is_replaced(tmp_path, base):
    a, target = adapter_of(), tmp_path / "a.gguf"
    lf.save(a, target, format="gguf", base=base)
    with pytest.raises(FileError, match="give overwrite=True"):
        lf.save(a, target, format="gguf", base=base)
    lf.save(2 * a, target, format="gguf", base=base, overwrite=True)
    model = made(tmp_path / "model.gguf", {"token_embd.weight": torch.zeros(4, 4)}, kind="model")
    before = model.read_bytes()
    with pytest.raises(FileError, match="won't be overwritten: it is not an adapter"):
        lf.save(a, model, format="gguf", base=base, overwrite=True)
    assert model.read_bytes() == before


# What is not read

FINE = pair("blk.0.attn_q", 6, 10)
WRONG = {
    "a whole model": (FINE, {"kind": "model"}, "is a whole model of llama.cpp's"),
    "another kind": (FINE, {"kind": "mmproj"}, "of the type 'mmproj', no adapter"),
    "another architecture": (FINE, {"arch": "falcon"}, "'falcon', of which it is not known"),
    "no partner": (
        {"blk.0.attn_q.weight.lora_a": torch.ones(2, 10)},
        {},
        r"has no partner blk\.0\.attn_q\.weight\.lora_b",
    ),
    "another suffix": (FINE | {"blk.0.attn_q.bias": torch.ones(6)}, {}, "is no factor"),
    "no such module": (pair("blk.0.attn_sinks", 6, 10), {}, "known to have no such module"),
    "no fit": (
        {
            "blk.0.attn_q.weight.lora_a": torch.ones(2, 9),
            "blk.0.attn_q.weight.lora_b": torch.ones(6, 3),
        },
        {},
        "are no factors of one update",
    ),
    "NaN": ({k: t * float("nan") for k, t in FINE.items()}, {}, "NaN"),
    "nothing": ({}, {}, "there is no update in it"),
    "alpha": (FINE, {"alpha": float("nan")}, "'adapter.lora.alpha' must be a number"),
    "integers": (
        {k: t.to(torch.int8) for k, t in FINE.items()},
        {},
        "is of the type I8; F32, F16, BF16 and Q8_0 are read",
    ),
    "wrong ranks": (FINE, {"lorafold__ranks": '{"blk.0.ffn_up_exps": 3}'}, "lists of whole numb"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_can_not_be_read_is_named(case, tmp_path):
    tensors, options, why = WRONG[case]
    target = made(tmp_path / "a.gguf", tensors, **{"arch": "qwen2", **options})
    with pytest.raises((FileError, MismatchError), match=rf"a\.gguf:? .*{why}"):
        lf.load(target)


def head(*, version=3, tensors=0, values=0, rest=b""):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values) + rest


def text(value):
    return struct.pack("<Q", len(value)) + value


ADAPTER = text(b"general.type") + struct.pack("<I", 8) + text(b"adapter")
HEADS = {
    "nothing": (b"", "does not begin like one"),
    "another file": (b"PK\x03\x04" + bytes(40), "is a ZIP file"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git-LFS"),
    "a few bytes": (b"GGUF\x03\0\0\0", "it is cut off"),
    "version 1": (head(version=1), "of version 1, which is not read"),
    "big-endian": (head(version=3 << 24), "big-endian"),
    "values without end": (head(values=2**63), "values, and no adapter has more than"),
    "tensors without end": (head(tensors=2**63), "tensors, and no adapter has more than"),
    "fewer than it says": (head(values=3, tensors=9), "it is cut off"),
    "a long text": (head(values=1, rest=struct.pack("<Q", 2**60)), "a text of 1,152,921"),
    "no UTF-8": (head(values=1, rest=text(b"\xff")), "no UTF-8"),
    "twice": (head(values=2, rest=ADAPTER * 2), "appears twice"),
    "a strange type": (head(values=1, rest=text(b"x") + struct.pack("<I", 99)), "the type 99"),
    "arrays of arrays": (
        head(values=1, rest=text(b"x") + struct.pack("<IIQ", 9, 9, 1)),
        "arrays of arrays",
    ),
    "a long array": (
        head(values=1, rest=text(b"x") + struct.pack("<IIQ", 9, 4, 2**40)),
        "holds 1,099,511,627,776 values",
    ),
    "a model's tokens": (
        head(values=1, rest=text(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2**20)),
        "is a whole model",
    ),
    "dimensions": (
        head(tensors=1, values=1, rest=ADAPTER + text(b"t") + struct.pack("<I", 5)),
        "has 5 dimensions",
    ),
    "an empty dimension": (
        head(tensors=1, values=1, rest=ADAPTER + text(b"t") + struct.pack("<IQIQ", 1, 0, 0, 0)),
        "the impossible shape",
    ),
    "beyond the end": (
        head(tensors=1, values=1, rest=ADAPTER + text(b"t") + struct.pack("<IQIQ", 1, 99, 0, 0)),
        "reaches to byte",
    ),
    "at no boundary": (
        head(tensors=1, values=1, rest=ADAPTER + text(b"t") + struct.pack("<IQIQ", 1, 9, 0, 4)),
        "lie over others",
    ),
    "alignment": (
        head(
            values=2,
            rest=ADAPTER + text(b"general.alignment") + struct.pack("<II", 4, 3) + bytes(64),
        ),
        "must be a power of two",
    ),
}


@pytest.mark.parametrize("case", HEADS)
def test_a_head_that_is_none(case, tmp_path):
    raw, why = HEADS[case]
    target = tmp_path / "a.gguf"
    target.write_bytes(raw)
    with pytest.raises(FileError, match=rf"a\.gguf.*{why}"):
        lf.load(target)


def test_a_file_that_is_cut_off_anywhere(tmp_path):
    whole = (GOLDEN / "qwen2" / "converted.gguf").read_bytes()
    target = tmp_path / "a.gguf"
    for n in range(0, len(whole), 61):
        target.write_bytes(whole[:n])
        with pytest.raises(FileError, match=r"a\.gguf"):
            lf.load(target)


def test_one_under_another_ending(tmp_path):
    (tmp_path / "a.safetensors").write_bytes((GOLDEN / "qwen2" / "converted.gguf").read_bytes())
    with pytest.raises(FileError, match=r"its name should end in \.gguf"):
        lf.load(tmp_path / "a.safetensors")
