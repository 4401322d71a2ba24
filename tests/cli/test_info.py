"""`info`: what is said of an adapter agrees with its file and with plain algebra."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

import lorafold as lf

PREFIX = "base_model.model."


@pytest.fixture
def odd(tmp_path, make_adapter):
    """Save an adapter with a config of its own; the path."""

    def save(name, **config):
        shapes = {"layers.0.q_proj": (6, 5), "layers.1.q_proj": (6, 5)}
        adapter = make_adapter(shapes, 2, seed=3, scale=2.0)
        lf.save(adapter, tmp_path / name)
        path = tmp_path / name / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return tmp_path / name

    return save


def test_one_adapter(world, cli, dense):
    path = world / "adapters" / "sql"
    adapter = lf.load(path)
    found = cli("info", path, "--json", "-v").json
    norm = math.sqrt(sum(float((dense(u) ** 2).sum()) for u in adapter.modules.values()))
    assert found["norm"] == pytest.approx(norm, rel=1e-6)
    assert found["ranks"] == {"4": 6}
    assert found["targets"] == {"q_proj": 3, "v_proj": 3}
    assert found["modules"] == len(found["per_module"]) == 6
    assert found["parameters"] == sum(4 * sum(u.shape) for u in adapter.modules.values())
    assert found["base_model"] == "base"
    assert found["digest"] == adapter.digest
    assert found["refusal"] is None
    assert found["bytes"] == sum(p.stat().st_size for p in path.iterdir())
    text = cli("info", path).out
    for word in ("base", "rank", "α", "q_proj ×3, v_proj ×3", "default (B = 0)", adapter.digest):
        assert word in text
    assert "layers.0" not in text
    assert "model.layers.0.self_attn.q_proj  24×16" in cli("info", path, "--verbose").out


def test_an_adapter_in_a_library(world, cli):
    found = cli("info", f"{world / 'lib'}:sql", "--json").json
    assert found["digest"] == lf.Library.open(world / "lib")["sql"].digest


def test_alpha_is_that_of_the_config(odd, cli):
    plain = cli("info", odd("plain", r=2, lora_alpha=6), "--json").json
    assert (plain["alphas"], plain["scaling"]) == ({"6": 2}, "alpha/rank")
    path = odd("rs", r=2, lora_alpha=6, use_rslora=True)
    rslora = cli("info", path, "--json").json
    assert (rslora["alphas"], rslora["scaling"]) == ({"6": 2}, "alpha/sqrt(rank)")
    assert rslora["norm"] == pytest.approx(plain["norm"] * math.sqrt(2))
    assert "scaled by α/√r (rsLoRA)" in cli("info", path).out
    path = odd("pattern", r=2, lora_alpha=6, alpha_pattern={"layers.1.q_proj": 3})
    assert cli("info", path, "--json").json["alphas"] == {"3": 1, "6": 1}


def test_unknown_extras_are_all_listed(tmp_path, make_adapter, cli):
    extras = {f"{PREFIX}thing.{n}": torch.zeros(2) for n in range(5)}
    extras[f"{PREFIX}score.weight"] = torch.zeros(3)
    adapter = make_adapter({"q": (4, 4)}, 1, extras=extras, config={"modules_to_save": ["score"]})
    lf.save(adapter, tmp_path / "a")
    ran = cli("info", tmp_path / "a")
    assert all(f"{PREFIX}thing.{n}" in ran.out for n in range(5))
    assert "saved module" in ran.out
    found = cli("info", tmp_path / "a", "--json").json
    assert sorted(found["extras"]) == ["saved module", "unknown"]
    assert found["extra_parameters"] == 13


def test_a_refused_adapter_says_why_and_has_no_norm(odd, cli):
    path = odd("pissa", init_lora_weights="pissa")
    ran = cli("info", path)
    assert ran.code == 0
    assert "not for ΔW algebra" in ran.out
    assert "PiSSA" in ran.out
    found = cli("info", path, "--json", "-v").json
    assert found["norm"] is None
    assert found["init"] == "pissa"


@pytest.mark.parametrize("columns", [80, 120, 1000])
def test_a_folder_has_one_line_each(world, cli, columns):
    ran = cli("info", world / "adapters", columns=columns)
    table, _, rest = ran.out.partition("\n\n")
    lines = table.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["law", "poems", "sql"]
    assert max(map(len, lines)) <= columns
    assert "3 adapters, all with: base base" in rest.replace("\n", " ")
    several = cli("info", *sorted((world / "adapters").iterdir()), columns=columns)
    assert several.out == ran.out


def test_one_damaged_adapter_does_not_hide_the_others(here, cli):
    (here / "adapters" / "poems" / "adapter_model.safetensors").write_bytes(b"")
    ran = cli("info", "adapters")
    assert ran.code == 2
    assert "sql" in ran.out
    assert "law" in ran.out
    assert "can't be read" in ran.out
    assert ran.err.startswith("error: 1 of 3 can't be read: ")
    assert ran.err.count("\n") == 1


def test_a_library(world, cli):
    with lf.Library.open(world / "lib") as lib:
        stats = lib.stats()
    found = cli("info", world / "lib", "--json").json
    listed = cli("info", world / "lib", "--json", "-v").json
    assert {k: listed[k] for k in stats} == json.loads(json.dumps(stats))
    assert stats.keys() - found.keys() == {"modules"}
    text = cli("info", world / "lib").out
    assert f"{stats['ratio']:.2f}× smaller" in text
    assert "no two adapters" in text
    assert "layers.0" not in text
    assert "layers.0" in cli("info", world / "lib", "--verbose").out


def test_what_a_library_shares(world, cli):
    """Unrelated adapters: what a few directions hold is what they hold of random ones."""
    ran = cli("info", world / "lib", "--verbose", "--json").json
    with lf.Library.open(world / "lib") as lib:
        wanted = lf.shared_spectrum(lib)
    assert [row["directions"] for row in ran["shared"]] == [1, 2, 4, 8]
    for row in ran["shared"]:
        assert row["energy"] == pytest.approx(wanted.share(row["directions"]))
        assert row["random"] == pytest.approx(wanted.control(row["directions"]))
        assert row["energy"] == pytest.approx(row["random"], abs=0.15)
    assert "shared" not in cli("info", world / "lib", "--json").json
    assert "of random adapters" in cli("info", world / "lib", "--verbose", columns=300).out


def test_names_with_control_characters_do_not_reach_the_terminal(tmp_path, make_adapter, cli):
    a = make_adapter({"q\x1b[31m": (4, 4)}, 1)
    lf.save(dataclasses.replace(a, base_model="b\nc"), tmp_path / "a")
    ran = cli("info", tmp_path / "a", "--verbose")
    assert "\x1b" not in ran.out
    assert "q\\x1b[31m" in ran.out
    assert "base        b\\nc\n" in ran.out


def test_without_a_config_alpha_is_asked_for(world, tmp_path, cli):
    source = world / "adapters" / "sql" / "adapter_model.safetensors"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / source.name).write_bytes(source.read_bytes())
    ran = cli("info", tmp_path / "a")
    assert ran.code == 2
    assert "give --alpha" in ran.err
    assert cli("info", tmp_path / "a", "--alpha", "8", "--json").json["alphas"] == {"8": 6}
