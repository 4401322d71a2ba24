"""`check`: an adapter against a base's headers, each kind of misfit found and no false alarm."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafold as lf
from lorafold import naming
from lorafold.cli import check
from lorafold.files import safetensors
from lorafold.files.base import by_kind
from lorafold.lowrank import LowRank
from lorafold.parts import ExtraKind

PREFIX = "base_model.model."
Q = "model.layers.{}.self_attn.q_proj"


@pytest.fixture
def base(here):
    """Change the base: base(fn) rewrites its tensors by fn(state)."""
    path = here / "base" / "model.safetensors"

    def change(function):
        save_file(function(load_file(path)), path)

    return change


def save(adapter, name="a"):
    lf.save(adapter, name)
    return name


def test_an_adapter_that_fits(here, cli):
    ran = cli("check", "adapters/sql", "--base", "base")
    assert ran.code == 0
    assert "adapters/sql fits base" in ran.out
    assert "6 of 6 match by name and shape" in ran.out
    found = cli("check", "lib:sql", "--base", "base/model.safetensors", "--json").json
    assert found["ok"]
    assert found["untouched"] == found["unmatched"] == found["ignored"] == []


def test_no_weights_are_read(here, cli, monkeypatch):
    from lorafold.files import safetensors as ranges

    read = []
    original = ranges.read_tensors
    monkeypatch.setattr(
        ranges, "read_tensors", lambda f, w, p: (read.append(str(p)), original(f, w, p))[1]
    )
    assert cli("check", "adapters/sql", "--base", "base").code == 0
    assert not [p for p in read if "base" in p]


def test_a_layer_left_out_is_named_by_kind(here, make_adapter, cli):
    save(make_adapter({Q.format(n): (24, 16) for n in (0, 2)}, 2))
    ran = cli("check", "a", "--base", "base")
    assert ran.code == 0
    assert "model.layers.#.self_attn.q_proj  # = 1" in ran.out
    assert "v_proj" not in ran.out  # another kind
    assert (
        "  model.layers.1.self_attn.q_proj" in cli("check", "a", "--base", "base", "--verbose").out
    )
    assert cli("check", "a", "--base", "base", "--json").json["untouched"] == [Q.format(1)]


def test_names_that_match_nothing_and_wrong_shapes(here, make_adapter, cli):
    save(make_adapter({Q.format(0): (24, 16), Q.format(9): (24, 16), Q.format(1): (24, 15)}, 2))
    ran = cli("check", "a", "--base", "base")
    assert ran.code == 1
    assert ran.err == "error: 1 without a match in base, 1 of the wrong shape\n"
    assert "a does not fit base" in ran.out
    assert "1 of 3 match by name and shape" in ran.out
    found = cli("check", "a", "--base", "base", "--json").json
    assert found["unmatched"] == [Q.format(9)]
    assert found["wrong_shape"] == [{"name": Q.format(1), "expected": [24, 15], "found": [24, 16]}]


def test_nothing_matches(here, make_adapter, cli):
    save(make_adapter({"a.b.c": (4, 4)}, 2))
    assert cli("check", "a", "--base", "base").code == 1


@pytest.mark.parametrize("longer", ["adapter", "base"])
def test_the_name_of_the_body_may_be_left_out(longer, here, base, make_adapter, cli):
    shapes = {f"h.{n}.attn": (4, 4) for n in range(3)}
    prefix = {"adapter": "transformer.", "base": ""}[longer]
    other = {"adapter": "", "base": "transformer."}[longer]
    save(make_adapter({prefix + p: s for p, s in shapes.items()}, 2))
    base(lambda _: {f"{other}{p}.weight": torch.zeros(s) for p, s in shapes.items()})
    ran = cli("check", "a", "--base", "base")
    assert ran.code == 0
    words = {"adapter": "names less 'transformer.'", "base": "names after 'transformer.'"}[longer]
    assert words in ran.out
    base(lambda s: {**s, f"{other}h.3.attn.weight": torch.zeros(4, 4)})
    found = cli("check", "a", "--base", "base", "--json").json
    assert found["untouched"] == [f"{prefix}h.3.attn"]


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_base_that_was_wrapped_when_it_was_saved(wrapper, here, base, cli):
    base(lambda s: {wrapper + key: t for key, t in s.items()})
    found = cli("check", "adapters/sql", "--base", "base", "--json").json
    assert (found["ok"], found["modules_matched"], found["untouched"]) == (True, 6, [])


def test_shards_with_an_index(here, cli):
    state = load_file("base/model.safetensors")
    keys = sorted(state)
    parts = {"model-1.safetensors": keys[:3], "model-2.safetensors": keys[3:]}
    for name, part in parts.items():
        save_file({k: state[k] for k in part}, here / "base" / name)
    (here / "base" / "model.safetensors").unlink()
    weight_map = {k: name for name, part in parts.items() for k in part}
    index = here / "base" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert cli("check", "adapters/sql", "--base", "base").code == 0
    (here / "base" / "model-2.safetensors").unlink()
    ran = cli("check", "adapters/sql", "--base", "base")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "names 'model-2.safetensors', which is not there" in ran.err
    index.write_text("[]")
    assert "not an index" in cli("check", "adapters/sql", "--base", "base").err


def test_a_base_in_another_format_or_damaged(here, cli):
    shutil.rmtree("base")
    (here / "base").mkdir()
    assert "no safetensors file" in cli("check", "adapters/sql", "--base", "base").err
    (here / "base" / "model.safetensors").write_bytes(b"\xff" * 20)
    ran = cli("check", "adapters/sql", "--base", "base")
    assert (ran.code, ran.err.count("\n")) == (2, 1)


def test_transposed_and_quantised_weights(here, base, cli):
    key = Q.format(0) + ".weight"
    base(lambda s: {**s, key: s[key].T.contiguous()})
    assert cli("check", "adapters/sql", "--base", "base").code == 0
    base(lambda s: {**s, key: torch.zeros(7, 1, dtype=torch.uint8)})
    found = cli("check", "adapters/sql", "--base", "base", "--json").json
    assert [u["name"] for u in found["unchecked"]] == [Q.format(0)]
    base(
        lambda s: {
            **{k: t for k, t in s.items() if k != key},
            Q.format(0) + ".qweight": torch.zeros(2, 2, dtype=torch.int32),
        }
    )
    ran = cli("check", "adapters/sql", "--base", "base")
    assert ran.code == 0
    assert "not checked" in ran.out
    assert "5 of 6 match" in ran.out


def test_a_tied_head_is_the_embedding(here, make_adapter, cli):
    save(make_adapter({"lm_head": (32, 16)}, 2))
    bare = cli("check", "a", "--base", "base", "--json").json
    assert bare["not_merged"] == "base has no config.json, so its weights can't be untied"
    (here / "base" / "config.json").write_text("{}")
    ran = cli("check", "a", "--base", "base")
    assert ran.code == 0
    assert "lm_head.weight gets a weight of its own in a merge: the model will be untied" in ran.out
    assert cli("check", "adapters/sql", "--base", "base", "--json").json["untied"] is None
    extras = {f"{PREFIX}{n}.weight": torch.zeros(32, 16) for n in ("lm_head", "model.embed_tokens")}
    saved = {"modules_to_save": ["lm_head", "embed_tokens"], "peft_type": "LORA"}
    saved |= {"r": 2, "lora_alpha": 4}
    save(make_adapter({Q.format(0): (24, 16)}, 2, extras=extras, config=saved), "c")
    ran = cli("check", "c", "--base", "base", columns=200)
    assert "the model will be untied, unless the two saved copies are equal" in ran.out
    assert "2 of 2 match" in ran.out
    save(make_adapter({"lm_head": (33, 16)}, 2), "b")
    assert cli("check", "b", "--base", "base").code == 1


def test_it_says_where_merge_into_would_write_nothing(base, here, make_adapter, cli):
    """Each adapter by `check`, and by `merge-into` itself."""
    score = {f"{PREFIX}score.weight": torch.zeros(2, 16)}
    saved = {"modules_to_save": ["score"], "peft_type": "LORA", "r": 2, "lora_alpha": 4}
    save(make_adapter({Q.format(0): (24, 16)}, 2, extras=score, config=saved), "new")
    layers = {"layer_replication": [[0, 2], [1, 3]], "r": 2, "lora_alpha": 4}
    save(make_adapter({Q.format(n): (24, 16) for n in range(4)}, 2, config=layers), "replicas")
    for name, ok, says in [
        ("adapters/sql", True, None),
        ("new", True, "parts of the adapter without a place that fits: 1"),
        ("replicas", True, "layer_replication"),
    ]:
        assert_as_merged(cli, name, ok, says)
    base(lambda s: {k.replace("model.embed_tokens", "model.shared"): t for k, t in s.items()})
    (here / "base" / "config.json").write_text("{}")
    u = lf.LowRank(torch.ones(2, 32), torch.ones(16, 2))
    layout = {"model.shared": lf.Layout("embedding")}
    lf.save(lf.Adapter({"model.shared": u}, layouts=layout), "embedding")
    assert_as_merged(cli, "embedding", True, "one weight, 'model.shared.weight', for encoder")


def assert_as_merged(cli, name, ok, says):
    found = cli("check", name, "--base", "base", "--json").json
    ran = cli("merge-into", "base", name, "-o", f"out-{name.replace('/', '-')}")
    assert (found["ok"], found["not_merged"] is None) == (ok, ran.code == 0)
    if says is not None:
        assert says in found["not_merged"]
        shown = cli("check", name, "--base", "base", columns=400).out
        assert "merge-into" in shown
        assert "writes nothing" in shown
        assert "will be untied" not in shown
        assert not Path(f"out-{name}").exists()


def test_replicated_layers_are_those_of_the_file(here, make_adapter, cli):
    config = {"layer_replication": [[0, 2], [1, 3]], "r": 2, "lora_alpha": 4}
    save(make_adapter({Q.format(n): (24, 16) for n in range(4)}, 2, config=config))
    found = cli("check", "a", "--base", "base", "--json").json
    assert found["ok"]
    assert found["untouched"] == []


def test_what_a_plain_reader_ignores(here, make_adapter, cli):
    config = {
        "r": 2,
        "lora_alpha": 4,
        "bias": "lora_only",
        "modules_to_save": ["score"],
        "alpha_pattern": {"layers.0.*": 4},
        "peft_type": "LORA",
    }
    extras = {
        f"{PREFIX}{Q.format(0)}.bias": torch.zeros(24),
        f"{PREFIX}score.weight": torch.zeros(2, 16),
        f"{PREFIX}model.norm.weight": torch.zeros(16),
    }
    save(make_adapter({Q.format(0): (24, 16)}, 2, extras=extras, config=config))
    found = cli("check", "a", "--base", "base", "--json").json
    ignored = {row["what"]: row["count"] for row in found["ignored"]}
    assert ignored == {"bias": 1, "saved module": 1, "unknown": 1, "alpha_pattern": 1}
    # A bias that the base lacks has no place; a new head is nothing wrong.
    assert found["unmatched"] == [f"{PREFIX}{Q.format(0)}.bias"]
    assert found["new"] == [f"{PREFIX}score.weight"]


def test_every_kind_of_extra_has_its_word():
    assert set(check._IGNORED) == set(get_args(ExtraKind))


def test_extras_of_the_wrong_shape(here, make_adapter, cli):
    extras = {f"{PREFIX}model.norm.weight": torch.zeros(17)}
    save(make_adapter({Q.format(0): (24, 16)}, 2, extras=extras))
    found = cli("check", "a", "--base", "base", "--json").json
    assert [w["expected"] for w in found["wrong_shape"]] == [[17]]


def test_trained_tokens_and_embeddings(here, cli):
    layout = lf.Layout(kind="embedding")
    u = LowRank(torch.randn(2, 32), torch.randn(16, 2))
    name = "model.embed_tokens"
    adapter = lf.Adapter({name: u}, layouts={name: layout})
    save(adapter)
    found = cli("check", "a", "--base", "base", "--json").json
    assert found["ok"]
    assert [row["what"] for row in found["ignored"]] == ["embedding"]
    config = {"r": 1, "lora_alpha": 1, "trainable_token_indices": [3, 4]}
    for width, code in ((16, 0), (15, 1)):
        key = f"{PREFIX}{name}.token_adapter.trainable_tokens_delta"
        q = LowRank(torch.randn(1, 16), torch.randn(24, 1))
        save(lf.Adapter({Q.format(0): q}, {key: torch.zeros(2, width)}, config), f"t{width}")
        assert cli("check", f"t{width}", "--base", "base").code == code


@pytest.mark.parametrize("rows", [[3, 32], [3, 99], [-1, 3], [3], [3, 4, 5]])
def test_token_indices_that_the_vocabulary_does_not_have(rows, here, cli):
    config = {"r": 1, "lora_alpha": 1, "trainable_token_indices": rows}
    key = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
    q = LowRank(torch.randn(1, 16), torch.randn(24, 1))
    save(lf.Adapter({Q.format(0): q}, {key: torch.zeros(2, 16)}, config))
    ran = cli("check", "a", "--base", "base")
    assert ran.code == 1
    found = cli("check", "a", "--base", "base", "--json").json
    assert [w["name"] for w in found["wrong_shape"]] == [key]
    assert (found["modules_matched"], found["other_tensors_matched"]) == (1, 0)


def test_modules_and_other_tensors_are_counted_apart(here, make_adapter, cli):
    config = {"bias": "lora_only", "modules_to_save": ["score"], "peft_type": "LORA", "r": 2}
    extras = {
        f"{PREFIX}{Q.format(0)}.bias": torch.zeros(24),  # not in the base
        f"{PREFIX}score.weight": torch.zeros(2, 16),  # new
        f"{PREFIX}model.norm.weight": torch.zeros(16),
    }
    shapes = {Q.format(0): (24, 16), Q.format(9): (24, 16), Q.format(1): (24, 15)}
    save(make_adapter(shapes, 2, extras=extras, config=config | {"lora_alpha": 4}))
    ran = cli("check", "a", "--base", "base")
    assert "1 of 3 match by name and shape" in ran.out
    assert "1 of 3 match\n" in ran.out


def test_the_adapters_own_tensors_are_not_read_either(here, cli, monkeypatch):
    extras = {f"{PREFIX}model.norm.weight": torch.zeros(16)}
    q = LowRank(torch.randn(1, 16), torch.randn(24, 1))
    save(lf.Adapter({Q.format(0): q}, extras))

    def fail(*_):
        raise AssertionError

    monkeypatch.setattr(safetensors, "read_tensors", fail)
    assert cli("check", "a", "--base", "base").code == 0


def test_experts_and_convolutions(here, base, cli):
    path, owner = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts"
    modules = {f"{path}[{e}]": LowRank(torch.randn(1, 4), torch.randn(6, 1)) for e in range(2)}
    layouts = {
        f"{path}[{e}]": lf.Layout(
            kind="expert", parameter="gate_up_proj", stem=owner, expert=(e, 2)
        )
        for e in range(2)
    }
    modules["conv"] = LowRank(torch.randn(1, 12), torch.randn(5, 1))
    layouts["conv"] = lf.Layout(kind="conv", kernel=(3, 2, 2))
    save(lf.Adapter(modules, layouts=layouts))
    weights = {path: torch.zeros(2, 4, 6), "conv.weight": torch.zeros(5, 3, 2, 2)}
    base(lambda s: s | weights)
    found = cli("check", "a", "--base", "base", "--json").json
    assert found["ok"], found
    assert {row["what"] for row in found["ignored"]} == {"expert", "conv"}
    base(lambda s: {**s, path: torch.zeros(3, 4, 6)})
    assert cli("check", "a", "--base", "base").code == 1
    one_by_one = {f"{owner}.{e}.gate_proj.weight": torch.zeros(3, 4) for e in range(2)}
    one_by_one |= {f"{owner}.{e}.up_proj.weight": torch.zeros(3, 4) for e in range(2)}
    base(lambda s: {**{k: t for k, t in s.items() if k != path}, **one_by_one})
    found = cli("check", "a", "--base", "base", "--json").json
    assert (found["ok"], found["modules_matched"], found["unchecked"]) == (True, 3, [])
    del one_by_one[f"{owner}.1.up_proj.weight"]  # half an expert
    base(lambda s: {k: t for k, t in s.items() if not k.startswith(owner)} | one_by_one)
    assert cli("check", "a", "--base", "base").code == 1


def test_kinds_leave_out_whole_numbers_only():
    assert naming.kind("h.0.mlp1.2.w") == "h.#.mlp1.#.w"
    assert by_kind(["h.0.a", "h.3.a", "b"]) == {"h.#.a": ["0", "3"], "b": [""]}


# --for


def test_what_a_program_would_do(cli, tmp_path, shapes):
    u = lf.LowRank(torch.randn(2, 8), torch.randn(4, 2), 3.0)
    lf.save(lf.Adapter({"h.0.q_proj": u}, base_model="base"), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    config |= {"use_rslora": True, "lora_alpha": 2}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    ran = cli("check", tmp_path / "a", "--for", "peft")
    assert ran.code == 0, ran.err
    assert " ".join(ran.out.split()) == f"peft loads {tmp_path}/a: as it was trained"
    ran = cli("check", tmp_path / "a", "--for", "llama.cpp")
    assert ran.code == 1
    said = " ".join(ran.out.split())
    assert "rslora: misreads: the converter writes lora_alpha alone" in said
    assert re.search(r"h\.0\.q_proj +1 +1\.41421", ran.out)
    assert f"remedy: lorafold convert {tmp_path}/a -o a-gguf.gguf --to gguf --base BASE" in ran.out
    assert ran.err.startswith("error: llama.cpp misreads: ")
    ran = cli("check", tmp_path / "a", "--for", "llama.cpp", "--json")
    assert ran.code == 1
    assert ran.json["kind"] == "check-for"
    assert ran.json.keys() - {"kind"} == shapes["check-for"][0]
    assert (ran.json["outcome"], ran.json["same"]) == ("misreads", False)
    (worst, *_) = ran.json["findings"]
    assert worst["factors"]["h.0.q_proj"] == {"applied": 1.0, "right": pytest.approx(2**0.5)}


def test_check_needs_a_base_or_a_program(cli, tmp_path):
    ran = cli("check", "adapters/sql")
    assert ran.code == 2
    assert "give the base's folder with --base, or a program with --for" in ran.err
    assert cli("check", tmp_path, "--for", "vlm").code == 2


def test_names_without_numbers_are_listed_too(cli, base):
    modules = {name: LowRank(torch.ones(1, 5), torch.ones(4, 1)) for name in ("tower", "x.7.y")}
    ran = cli("check", save(lf.Adapter(modules)), "--base", "base")
    assert ran.code == 1
    listed = ran.out.partition("Matches nothing in the base:\n")[2].partition("\n\n")[0]
    assert {line.split("#")[0].strip() for line in listed.splitlines()} >= {"tower", "x."}
