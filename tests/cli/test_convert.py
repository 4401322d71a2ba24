"""`lorafold convert`: an adapter in another form, and what is told of it."""

from __future__ import annotations

import pytest
import torch

import lorafold as lf

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


def test_what_is_in_the_way_and_what_has_no_place(cli, sql, tmp_path):
    ran = cli("convert", sql, "-o", sql, "--to", "mlx", "--overwrite")
    assert (ran.code, "is the source" in ran.err) == (2, True)
    ran = cli("convert", sql, "-o", tmp_path / "new", "--to", "gguf")
    assert (ran.code, "'peft', 'mlx'" in ran.err) == (2, True)
    a = lf.load(sql)
    lf.save(lf.Adapter(a.modules, {"score.weight": torch.ones(2, 6)}), tmp_path / "head")
    ran = cli("convert", tmp_path / "head", "-o", tmp_path / "new", "--to", "mlx")
    assert ran.code == 2
    assert "'score.weight'" in ran.err
    assert "format=" not in ran.err
    assert not (tmp_path / "new").exists()
    ran = cli("convert", sql, "-o", tmp_path / "new", "--to", "mlx", "--base", tmp_path / "none")
    assert (ran.code, "no such folder" in ran.err) == (2, True)
