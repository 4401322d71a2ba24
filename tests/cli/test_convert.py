"""`lorafold convert`: an adapter in another form, and what is told of it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import lorafold as lf
from lorafold.parts import Layout

PATHS = {f"model.layers.{n}.self_attn.q_proj": (6, 10) for n in range(2)}


@pytest.fixture
def sql(tmp_path):
    """Two modules of other ranks and scales."""
    modules = {
        path: lf.LowRank(torch.randn(rank, inner), torch.randn(out, rank), 0.3 * rank)
        for rank, (path, (out, inner)) in enumerate(PATHS.items(), 2)
    }
    lf.save(lf.Adapter(modules), tmp_path / "sql")
    return tmp_path / "sql"


def test_there_and_back(cli, sql, tmp_path, shapes):
    out, back = tmp_path / "mlx", tmp_path / "back"
    ran = cli("convert", sql, "-o", out, "--to", "mlx", "--base-model", "org/base", "--json")
    assert ran.code == 0
    assert ran.json.keys() - {"kind"} == shapes["convert"][0]
    assert ran.json["format"] == "mlx"
    assert ran.json["ranks"] == [[2, 3], [2, 3]]
    assert 0 <= ran.json["error"] < 1e-6
    original, written = lf.load(sql), lf.load(out)
    assert written.base_model == "org/base"
    assert original.distance(written) < 1e-6 * original.norm()
    ran = cli("convert", out, "-o", back, "--to", "peft")
    assert ran.code == 0
    assert "in the form of peft" in ran.out
    assert all(torch.equal(u.A, original[p].A) for p, u in lf.load(back).modules.items())


def test_a_dtype_states_what_it_costs(cli, sql, tmp_path):
    out = tmp_path / "mlx"
    ran = cli("convert", sql, "-o", out, "--to", "mlx", "--dtype", "bfloat16", "--json")
    original = lf.load(sql)
    error = original.distance(lf.load(out)) / original.norm()
    assert ran.json["error"] == pytest.approx(error)
    assert 5e-4 < error < 5e-3
    assert ran.json["dtypes"] == [["float32"], ["bfloat16"]]


def test_experts_get_other_names_and_the_error_is_still_told(cli, tmp_path):
    """gate_up_proj of all experts is two modules in a checkpoint, and so in MLX."""
    base, path = tmp_path / "base", "model.layers.0.mlp.experts.gate_up_proj"
    base.mkdir()
    block = "model.layers.0.block_sparse_moe.experts"
    shapes = {f"{block}.{e}.{w}.weight": (6, 10) for e in (0, 1) for w in ("w1", "w3")}
    save_file({key: torch.zeros(s) for key, s in shapes.items()}, base / "model.safetensors")
    config = {"model_type": "mixtral", "num_local_experts": 2, "tie_word_embeddings": False}
    (base / "config.json").write_text(json.dumps(config))
    updates = {e: lf.LowRank(torch.randn(2, 10), torch.randn(12, 2)) for e in (0, 1)}
    layouts = {
        f"{path}[{e}]": Layout("expert", parameter="gate_up_proj", expert=(e, 2)) for e in updates
    }
    a = lf.Adapter({f"{path}[{e}]": u for e, u in updates.items()}, layouts=layouts)
    lf.save(a, tmp_path / "peft")
    words = ("convert", tmp_path / "peft", "-o", tmp_path / "mlx", "--to", "mlx", "--base", base)
    ran = cli(*words, "--dtype", "bfloat16", "--json")
    assert ran.code == 0
    assert ran.json["modules"] == [2, 4]
    assert 5e-4 < ran.json["error"] < 5e-3
    ran = cli(*words, "--overwrite", "--json")
    assert ran.json["error"] < 1e-7
    found = lf.load(tmp_path / "mlx")
    for e, u in updates.items():
        halves = torch.cat([found[f"{block}.{e}.{w}"].dense() for w in ("w1", "w3")])
        torch.testing.assert_close(halves, u.dense())


def test_what_is_in_the_way_and_what_has_no_place(cli, sql, tmp_path):
    ran = cli("convert", sql, "-o", sql, "--to", "mlx", "--overwrite")
    assert (ran.code, "is the source" in ran.err) == (2, True)
    ran = cli("convert", sql, "-o", tmp_path / "new", "--to", "onnx")
    assert (ran.code, "'peft', 'mlx'" in ran.err) == (2, True)
    a = lf.load(sql)
    lf.save(lf.Adapter(a.modules, {"score.weight": torch.ones(2, 6)}), tmp_path / "head")
    ran = cli("convert", tmp_path / "head", "-o", tmp_path / "new", "--to", "mlx")
    assert ran.code == 2
    assert "'score.weight'" in ran.err
    assert "format=" not in ran.err
    assert ran.err.endswith("write it with --to peft\n")
    assert not (tmp_path / "new").exists()
    ran = cli("convert", sql, "-o", tmp_path / "new", "--to", "mlx", "--base", tmp_path / "none")
    assert (ran.code, "no such folder" in ran.err) == (2, True)


def test_flat_names_become_the_bases(cli, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    save_file({"to_q.in_b.weight": torch.zeros(6, 10)}, base / "model.safetensors")
    down, up = torch.randn(2, 10), torch.randn(6, 2)
    flat = {"lora_unet_to_q_in_b.lora_down.weight": down, "lora_unet_to_q_in_b.lora_up.weight": up}
    file = tmp_path / "x.safetensors"
    save_file(flat, file)
    ran = cli("convert", file, "-o", out, "--to", "peft", "--base", base, "--json")
    assert ran.code == 0
    assert ran.json["error"] == 0
    assert torch.equal(lf.load(out)["to_q.in_b"].A, down)
    ran = cli(
        *("convert", file, "-o", tmp_path / "none", "--to", "peft"),
        *("--base", base.parent / "other"),
    )
    assert ran.code == 2
    assert not (tmp_path / "none").exists()


@pytest.mark.filterwarnings("default:.*multiplied to full rank")
def test_a_lokr_of_full_rank_is_cut_to_a_tolerance(cli, tmp_path):
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    parts = {"lokr_w1": torch.randn(3, 3), "lokr_w2": torch.randn(8, 6)}
    save_file({f"{stem}.{k}": t for k, t in parts.items()}, tmp_path / "x.safetensors")
    out = tmp_path / "out"
    ran = cli("convert", tmp_path / "x.safetensors", "-o", out, "--to", "peft")
    assert ran.code == 2
    assert "`lorafold convert IN -o OUT --to peft --tolerance 0.01`" in ran.err
    line = ("convert", tmp_path / "x.safetensors", "-o", out, "--to", "peft", "--tolerance", "0.3")
    ran = cli(*line)
    assert ran.code == 0, ran.err
    assert "cut, with a relative error of at most 0.3" in ran.err
    dense = torch.kron(parts["lokr_w1"], parts["lokr_w2"])
    (u,) = lf.load(out).modules.values()
    assert 0 < (u.dense() - dense).norm() <= 0.3 * dense.norm()


def test_a_peft_folder_gets_the_paths_of_its_base(cli, tmp_path):
    """A `model.` too few, and experts one by one where transformers has one parameter."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
    )
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    shapes = {"layers.0.self_attn.k_proj": (4, 8), "layers.0.mlp.experts.1.up_proj": (12, 8)}
    shapes["layers.0.mlp.experts.1.gate_proj"] = (12, 8)
    modules = {
        path: lf.LowRank(torch.randn(2, inner), torch.randn(out, 2), 0.5)
        for path, (out, inner) in shapes.items()
    }
    lf.save(lf.Adapter(modules), tmp_path / "in")
    line = ("convert", tmp_path / "in", "-o", tmp_path / "out", "--to", "peft")
    ran = cli(*line, "--base", tmp_path / "base", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["error"] < 1e-6
    out = lf.load(tmp_path / "out")
    assert "model.layers.0.self_attn.k_proj" in out
    assert "model.layers.0.mlp.experts.gate_up_proj[1]" in out
    state = model.state_dict()
    one, two = (lf.load(tmp_path / name).apply_to(state) for name in ("in", "out"))
    assert all(torch.allclose(t, two[key], atol=1e-5) for key, t in one.items())
