"""`lorafold roles`: bases and adapters, tables, and what is not known."""

from pathlib import Path

import pytest
import torch

import lorafold as lf


@pytest.fixture
def adapter(tmp_path):
    modules = {
        f"model.layers.{i}.self_attn.{x}_proj": lf.LowRank(torch.ones(1, 4), torch.ones(4, 1))
        for i in range(2)
        for x in "qv"
    }
    lf.save(lf.Adapter(modules), tmp_path / "a")
    return tmp_path / "a"


def test_an_adapter_by_kind_and_by_module(cli, adapter):
    result = cli("roles", adapter)
    assert result.code == 0
    assert "model.layers.#.self_attn.q_proj" in result.out
    assert "decoder.#.attention.query" in result.out
    shown = cli("--verbose", "roles", adapter).out
    assert "decoder.1.attention.value" in shown
    d = cli("roles", adapter, "--json").json
    assert d["roles"]["model.layers.1.self_attn.q_proj"] == {
        "role": "decoder.1.attention.query",
        "kind": "attention.query",
        "layer": 1,
        "side": "decoder",
        "expert": None,
        "parts": [],
        "packing": None,
    }


def test_a_base_says_how_it_packs(cli, tmp_path):
    import transformers

    config = transformers.GPTNeoXConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        vocab_size=8,
    )
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "base")
    result = cli("roles", tmp_path / "base", columns=160)
    assert "query, key, value as 1:1:1, 2 groups" in result.out
    d = cli("roles", tmp_path / "base", "--json").json
    found = d["roles"]["gpt_neox.layers.0.attention.query_key_value"]
    assert found["packing"] == {"shares": [1, 1, 1], "groups": 2}
    assert found["parts"] == ["attention.query", "attention.key", "attention.value"]


def test_a_portable_adapter_is_one_like_any(cli, adapter, tmp_path):
    lf.save(lf.load(adapter), tmp_path / "p", format="portable")
    assert cli("roles", tmp_path / "p").out == cli("roles", adapter).out
    assert cli("info", tmp_path / "p").code == 0
    assert cli("diff", tmp_path / "p", adapter).code == 0


def test_what_is_not_known_takes_a_table(cli, tmp_path):
    u = lf.LowRank(torch.ones(1, 4), torch.ones(4, 1))
    lf.save(lf.Adapter({"[red]net.0.wq": u}), tmp_path / "a")
    result = cli("roles", tmp_path / "a")
    assert result.code == 2
    assert "[red]net.0.wq" in result.err
    assert "--table" in result.err
    assert len(result.err.splitlines()) == 1
    table = tmp_path / "table.json"
    table.write_text('{"wq": "attention.query"}')
    result = cli("roles", tmp_path / "a", "--table", table)
    assert result.code == 0
    assert "[red]net.#.wq" in result.out
    for text in ("[", "[]", '{"wq": "No"}'):
        table.write_text(text)
        result = cli("roles", tmp_path / "a", "--table", table)
        assert result.code == 2
        assert len(result.err.splitlines()) == 1
    assert cli("roles", tmp_path / "a", "--table", tmp_path / "gone").code == 2
    assert cli("roles", tmp_path / "gone").code == 2


def test_a_library_is_no_base(here, cli):
    ran = cli("roles", "lib")
    assert ran.code == 2
    assert "lib is a library; name one of its adapters" in ran.err
    Path("nothing").mkdir()
    empty = cli("roles", "nothing")
    assert empty.code == 2
    assert empty.err.count("\n") == 1
