"""`merge-into`: what is written, and what is told of it."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafold as lf
from lorafold.lowrank import LowRank

PREFIX = "base_model.model."
Q = "model.layers.{}.self_attn.q_proj"
FILE = "model.safetensors"


def same(found, wanted):
    return found.keys() == wanted.keys() and all(
        found[key].dtype == t.dtype and torch.equal(found[key], t) for key, t in wanted.items()
    )


def test_a_merged_checkpoint(here, cli):
    (here / "base" / "config.json").write_text("{}")
    (here / "base" / "pytorch_model.bin").write_text("x")
    ran = cli("merge-into", "base", "adapters/sql", "-o", "merged")
    assert (ran.code, ran.err) == (0, "")
    assert "adapters/sql merged into base with c = 1" in ran.out
    assert "6 of 8 tensors changed; 1 file" in ran.out
    assert "left out    pytorch_model.bin" in ran.out
    assert "rounding" not in ran.out  # float32 all through
    assert sorted(os.listdir("merged")) == ["config.json", FILE]
    base, found = (load_file(f"{folder}/{FILE}") for folder in ("base", "merged"))
    assert same(found, lf.load("adapters/sql").apply_to(base))
    assert cli("check", "adapters/sql", "--base", "merged").code == 0


def test_from_a_library_with_c_and_a_dtype(here, cli):
    line = ["merge-into", "base", "lib:sql", "-o", "merged", "-c", "-0.5", "--dtype", "bfloat16"]
    found = cli(*line, "--json").json
    assert (found["c"], found["dtype"], found["path"]) == (-0.5, "bfloat16", "merged")
    assert (found["files"], found["tensors"], len(found["changed"])) == ([FILE], 8, 6)
    assert found["unplaced"] == {}
    assert (found["untied"], found["left_out"]) == (None, [])
    with lf.Library.open("lib") as lib:
        wanted = (-0.5 * lib["sql"]).apply_to(load_file(f"base/{FILE}"))
    assert same(load_file(f"merged/{FILE}"), {k: t.bfloat16() for k, t in wanted.items()})
    assert 1e-4 < found["rounding"] < 1
    assert found["nbytes"] == os.path.getsize(f"merged/{FILE}")
    again = cli(*line, "--overwrite")
    assert again.code == 0
    assert f"{100 * found['rounding']:#.3g} % of ‖c·ΔW‖" in again.out


def test_shards(here, cli):
    state = load_file(f"base/{FILE}")
    keys = sorted(state)
    parts = {"model-1.safetensors": keys[:3], "model-2.safetensors": keys[3:]}
    for name, part in parts.items():
        save_file({k: state[k] for k in part}, here / "base" / name)
    (here / "base" / FILE).unlink()
    index = {"weight_map": {k: name for name, part in parts.items() for k in part}}
    (here / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    ran = cli("merge-into", "base", "adapters/sql", "-o", "merged")
    assert "2 files" in ran.out
    found = {name: load_file(f"merged/{name}") for name in parts}
    assert {name: sorted(part) for name, part in found.items()} == parts
    joined = {k: t for part in found.values() for k, t in part.items()}
    assert same(joined, lf.load("adapters/sql").apply_to(state))


def test_what_has_no_place_is_listed_and_nothing_is_written(here, cli, make_adapter):
    shapes = {Q.format(n): (24, 16) for n in range(24)}
    lf.save(make_adapter(shapes, 2), "a")
    before = sorted(here.rglob("*"))
    ran = cli("merge-into", "base", "a", "-o", "merged")
    assert ran.code == 1
    assert ran.err == (
        "error: 21 parts of the adapter have no place in base: nothing is written "
        "(--partial merges the rest)\n"
    )
    assert f"{Q.format(3)}" in ran.out
    assert "and 1 more: --verbose" in ran.out
    assert "more" not in cli("merge-into", "base", "a", "-o", "merged", "--verbose").out
    ran = cli("merge-into", "base", "a", "-o", "merged", "--json")
    assert ran.json["kind"] == "unplaced"
    assert (ran.code, ran.json["written"], len(ran.json["unplaced"])) == (1, False, 21)
    assert sorted(here.rglob("*")) == before
    (here / "base" / "config.json").write_text("{}")
    ran = cli("merge-into", "base", "a", "-o", "merged", "--partial")
    assert (ran.code, ran.err) == (0, "")
    assert f"{Q.format(3)}" in ran.out
    config = json.loads((here / "merged" / "config.json").read_text())
    assert len(config["lorafold"]["left_out"]) == 21


def test_an_embedding_that_is_the_output_layer_parts_from_it(here, cli):
    u = LowRank(torch.randn(1, 32), torch.randn(16, 1))
    name = "model.embed_tokens"
    lf.save(lf.Adapter({name: u}, layouts={name: lf.Layout("embedding")}), "a")
    (here / "base" / "config.json").write_text('{"tie_word_embeddings": true}')
    ran = cli("merge-into", "base", "a", "-o", "merged")
    assert (ran.code, ran.err) == (0, "")
    assert "lm_head.weight has a weight of its own now" in ran.out


@pytest.mark.parametrize(
    ("config", "shapes", "says"),
    [
        ({"use_dora": True}, {Q.format(0): (24, 16)}, "this is a DoRA adapter"),
        ({}, {"x.y": (24, 16)}, "nothing of the adapter's 1 modules is in base"),
        ({}, {Q.format(0): (24, 15)}, "has shape (24, 16), the update fits (24, 15)"),
    ],
)
def test_refusals_write_nothing(config, shapes, says, here, cli, make_adapter):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    lf.save(make_adapter(shapes, 2, config=config), "a")
    before = sorted(here.rglob("*"))
    ran = cli("merge-into", "base", "a", "-o", "merged")
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert says in ran.err
    assert sorted(here.rglob("*")) == before


def test_a_quantised_base_is_refused(here, cli):
    state = load_file(f"base/{FILE}")
    state[f"{Q.format(1)}.weight"] = torch.zeros(192, 1, dtype=torch.uint8)
    save_file(state, f"base/{FILE}")
    ran = cli("merge-into", "base", "adapters/sql", "-o", "merged")
    assert ran.code == 2
    assert "base is quantised: 'model.layers.1.self_attn.q_proj.weight' is uint8" in ran.err


@pytest.mark.parametrize(
    ("adapter", "folder"),
    [("adapters/sql", "adapters/sql/merged"), ("adapters/sql", "adapters"), ("lib:sql", "lib/m")],
)
def test_nothing_is_written_into_or_around_the_adapter(adapter, folder, here, cli):
    before = sorted(here.rglob("*"))
    ran = cli("merge-into", "base", adapter, "-o", folder, "--overwrite")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "the source" in ran.err
    assert sorted(here.rglob("*")) == before
