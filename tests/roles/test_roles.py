"""Roles: every layer of every architecture has one, no two have the same."""

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import lorafold as lf
from lorafold.roles import Role

spec = importlib.util.spec_from_file_location("models", Path(__file__).with_name("models.py"))
models = importlib.util.module_from_spec(spec)
spec.loader.exec_module(models)


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_every_layer_has_a_role_of_its_own(name):
    model = models.model_of(name, device="meta")
    found = lf.roles(model)
    layers = {
        path
        for path, m in model.named_modules()
        if isinstance(m, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d)
        or type(m).__name__ == "Conv1D"
    }
    assert layers
    assert layers <= found.keys()
    assert len(set(found.values())) == len(found)
    assert {Role.parse(str(role)) for role in found.values()} == set(found.values())


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_a_configuration_says_what_its_model_does(name):
    """By the class that it names, or by one of the type."""
    config = models.config_of(name)
    config.architectures = [models.ARCHITECTURES[name][2]]
    expected = lf.roles(models.model_of(name, device="meta"))
    assert lf.roles(config) == expected
    config.architectures = None
    body = {role for role in expected.values() if role.layer is not None}
    assert body <= set(lf.roles(config.to_dict()).values())


def test_a_folder_goes_by_its_configuration_or_its_names(tmp_path):
    model = models.model_of("gpt_neox")
    model.save_pretrained(tmp_path / "whole")
    assert lf.roles(tmp_path / "whole") == lf.roles(model)
    (tmp_path / "whole" / "config.json").unlink()
    named = lf.roles(str(tmp_path / "whole"))
    assert named.pop("embed_out") == Role("head", None, "")  # as the file calls it
    assert named == {path: r for path, r in lf.roles(model).items() if path != "lm_head"}
    assert lf.roles(tmp_path / "whole" / "model.safetensors").keys() == {*named, "embed_out"}
    assert lf.roles(model.state_dict()) == lf.roles(model)
    models.config_of("gpt2").save_pretrained(tmp_path / "config")
    assert Role("attention.qkv", 1) in lf.roles(tmp_path / "config").values()
    (tmp_path / "none").mkdir()
    with pytest.raises(lf.errors.FileError, match="neither safetensors"):
        lf.roles(tmp_path / "none")
    with pytest.raises(lf.errors.FileError, match="no such folder"):
        lf.roles(tmp_path / "gone")
    (tmp_path / "none" / "config.json").write_text("[")
    with pytest.raises(lf.errors.FileError, match="not valid JSON"):
        lf.roles(tmp_path / "none")
    (tmp_path / "none" / "config.json").write_text('{"model_type": "of nobody"}')
    with pytest.raises(lf.errors.FileError, match="transformers knows"):
        lf.roles(tmp_path / "none")
    (tmp_path / "none" / "model.safetensors").write_bytes(b"no")
    with pytest.raises(lf.errors.FileError, match="can't be read as safetensors"):
        lf.roles(tmp_path / "none")
    a = lf.Adapter({"h.0.q_proj": lf.LowRank(torch.ones(1, 4), torch.ones(4, 1))})
    lf.save(a, tmp_path / "adapter")
    with pytest.raises(lf.errors.FileError, match=r"lorafold\.load"):
        lf.roles(tmp_path / "adapter")
    assert lf.roles(a) == {"h.0.q_proj": Role("attention.query", 0)}


NAMES = {
    # as files have it, of models whose modules are called otherwise in memory
    "model.layers.3.block_sparse_moe.experts.7.w1.weight": "decoder.3.experts.gate[7]",
    "model.layers.3.block_sparse_moe.gate.weight": "decoder.3.experts.router",
    "model.layers.3.mlp.experts.11.down_proj": "decoder.3.experts.down[11]",
    "model.layers.3.mlp.experts.down_proj[2]": "decoder.3.experts.down[2]",
    "vit.encoder.layer.5.attention.attention.key": "vision.5.attention.key",
    "vit.encoder.layer.5.attention.output.dense": "vision.5.attention.output",
    "vit.encoder.layer.5.output.dense": "vision.5.mlp.down",
    # inside of something else
    "0.auto_model.encoder.layer.4.attention.self.value": "encoder.4.attention.value",
    "model.language_model.layers.2.mlp.up_proj": "decoder.2.mlp.up",
    "model.vision_tower.vision_model.encoder.layers.2.mlp.fc1": "vision.2.mlp.up",
    "base_model.model.model.layers.1.self_attn.q_proj": "decoder.1.attention.query",
    "_orig_mod.model.layers.1.self_attn.q_proj": "decoder.1.attention.query",
    # short ones
    "q_proj": "decoder.attention.query",
    "layers.0.q_proj": "decoder.0.attention.query",
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name):
    assert str(lf.roles([name])[name]) == NAMES[name]


def test_a_model_with_adapters_in_it_has_the_same_roles():
    import peft

    model = models.model_of("bert classifier")
    expected = lf.roles(model)
    path = "bert.encoder.layer.0.attention.self.query"
    u = lf.LowRank(torch.ones(1, 32), torch.ones(32, 1))
    live = lf.attach(model, lf.Adapter({path: u}))
    assert lf.roles(model) == expected
    live.detach()
    config = peft.LoraConfig(
        target_modules=["query", "word_embeddings"], modules_to_save=["classifier"], use_dora=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks what transformers deprecates
        wrapped = peft.get_peft_model(model, config)
    assert lf.roles(wrapped) == expected


def test_tables_go_before_and_the_longest_end_counts():
    names = ["net.0.wq", "net.0.special.wq", "net.0.self_attn.q_proj", "tower.1.patchify"]
    first = {"wq": "attention.query", "special.wq": "cross.query", "tower.#.patchify": "vision.odd"}
    found = lf.roles(names, [first, {"q_proj": "attention.other", "wq": "attention.never"}])
    assert [str(role) for role in found.values()] == [
        "decoder.0.attention.query",
        "decoder.0.cross.query",
        "decoder.0.attention.other",
        "vision.1.odd",
    ]
    assert (
        lf.roles(names[:1], {"net.#.wq": "encoder.attention.query"})["net.0.wq"].side == "encoder"
    )


def test_what_is_not_known_is_listed():
    names = [f"net.{i}.strange" for i in range(7)]
    with pytest.raises(lf.MismatchError, match=r"7 of 8 .*'net\.0\.strange'.*…; give tables="):
        lf.roles([*names, "q_proj"])
    found, unknown = lf.roles.recognised([*names, "q_proj"])
    assert unknown == names
    assert list(found) == ["q_proj"]
    assert lf.roles([]) == {}


@pytest.mark.parametrize("bad", [3, None, ["q_proj", 3], [b"q_proj"], {"q_proj": 3, 4: 5}])
def test_what_has_no_modules_is_refused(bad):
    with pytest.raises(lf.MismatchError, match="roles are told from a model"):
        lf.roles(bad)


@pytest.mark.parametrize(
    "table", [{"wq": 3}, {"wq": "Attention"}, {"wq": ""}, {"wq": "vision."}, ["wq"], "wq", 3]
)
def test_a_bad_table_is_refused(table):
    with pytest.raises(lf.MismatchError):
        lf.roles(["wq"], table)


@pytest.mark.parametrize(
    "name",
    ["", "decoder", "decoder.", "3", "Attention", "decoder.-1.mlp.up", "mlp.up[", "mlp.up[x]"],
)
def test_no_role_is_called_so(name):
    with pytest.raises(lf.MismatchError):
        Role.parse(name)


def test_a_role_that_cannot_be():
    with pytest.raises(lf.MismatchError, match="a side is one of"):
        Role("mlp.up", 0, "upside")
    with pytest.raises(lf.MismatchError, match="does not begin with a side"):
        Role("text.embedding", 0)
    assert Role("experts.gate_up", 2, "decoder", 1).parts == (
        Role("experts.gate", 2, "decoder", 1),
        Role("experts.up", 2, "decoder", 1),
    )
    assert Role("mlp.up", 1).parts == ()


@pytest.mark.parametrize(
    "odd",
    [
        {"hidden_size": "x"},
        {"hidden_size": -3},
        {"architectures": [3]},
        {"architectures": 5},
        {"architectures": ["ViTModel"]},
        {"num_attention_heads": 0},
    ],
)
def test_a_damaged_configuration_is_refused_in_one_line(odd):
    small = models.config_of("llama").to_dict()
    with pytest.raises(lf.MismatchError, match="makes no model of this configuration") as e:
        lf.roles({**small, **odd})
    assert "\n" not in str(e.value)


def test_only_models_are_made_and_no_random_number_is_drawn():
    small = models.config_of("llama").to_dict()
    state = torch.get_rng_state()
    found = lf.roles({**small, "architectures": ["pipeline"]})
    assert found == lf.roles(models.config_of("llama"))
    assert torch.equal(torch.get_rng_state(), state)
