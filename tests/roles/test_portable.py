"""Adapters by roles: read back exactly, and on another architecture with the same effect."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lorafold as lf
from lorafold.files import open_adapter
from lorafold.roles import Packing, Role

spec = importlib.util.spec_from_file_location("models", Path(__file__).with_name("models.py"))
models = importlib.util.module_from_spec(spec)
spec.loader.exec_module(models)

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "base_model_name_or_path": "some/base"}


def adapter_of(model, leave=("norm",), scale=1.5, dtype=torch.float32):
    """A seeded update of every linear layer of a model."""
    g = torch.Generator().manual_seed(3)
    modules = {}
    for path in lf.roles(model):
        layer = model.get_submodule(path) if "experts" not in path else None
        if layer is None or type(layer).__name__ not in ("Linear", "Conv1D", "FalconLinear"):
            continue
        shape = tuple(layer.weight.shape)
        out, inner = shape[::-1] if type(layer).__name__ == "Conv1D" else shape
        A = torch.randn(2, inner, generator=g) / inner**0.5
        modules[path] = lf.LowRank(A, torch.randn(out, 2, generator=g) / 4, scale).to(dtype=dtype)
    return lf.Adapter(modules, config=CONFIG)


def run(model, inputs, adapter):
    live = lf.attach(model, adapter)
    with live.use("default"):
        found = models.output_of(model, inputs)
    live.detach()
    return found


@pytest.mark.parametrize("name", models.ARCHITECTURES)
@pytest.mark.form("portable", "read", by="what was written, bit for bit")
def test_it_comes_back_exactly(name, tmp_path):
    model = models.model_of(name)
    a = adapter_of(model, dtype=torch.bfloat16)
    lf.save(a, tmp_path / "p", format="portable", base=model)
    back = lf.load(tmp_path / "p")
    assert back.digest == a.digest
    assert list(back) == list(a)
    assert back.config == a.config
    assert back.layouts == a.layouts
    on_it = lf.load(tmp_path / "p", base=model)
    assert on_it.digest == a.digest
    keys = {key.rpartition(".")[0] for key in load_file(tmp_path / "p" / "portable.safetensors")}
    assert keys == {str(role) for role in lf.roles(a).values()}


def test_everything_else_comes_back_too(tmp_path):
    g = torch.Generator().manual_seed(0)
    modules = {
        "model.embed_tokens": lf.LowRank(torch.randn(2, 64, generator=g), torch.ones(8, 2), 1 / 3),
        "model.encoder.conv1": lf.LowRank(torch.randn(1, 24, generator=g), torch.ones(8, 1), 0.0),
        "model.layers.0.mlp.experts.gate_up_proj[2]": lf.LowRank(
            torch.zeros(2, 8), torch.zeros(12, 2).half(), 2.0
        ),
    }
    layouts = {
        "model.embed_tokens": lf.Layout("embedding"),
        "model.encoder.conv1": lf.Layout("conv", (8, 3)),
        "model.layers.0.mlp.experts.gate_up_proj[2]": lf.Layout(
            "expert", parameter="gate_up_proj", stem="model.layers.0.mlp.experts", expert=(2, 4)
        ),
    }
    name = "base_model.model.classifier.weight"
    extras = {name: torch.arange(4, dtype=torch.int8), "odd: key": torch.zeros(0, 3)}
    a = lf.Adapter(modules, extras, {**CONFIG, "modules_to_save": ["classifier"]}, layouts=layouts)
    lf.save(a, tmp_path / "p", format="portable")
    back = lf.load(tmp_path / "p")
    assert back.digest == a.digest
    assert back.layouts == a.layouts
    assert back.config == a.config
    opened = open_adapter(tmp_path / "p")
    assert opened.scales["model.embed_tokens"] == 1 / 3
    assert opened.read("model.encoder.conv1").shape == (8, 24)
    # As PEFT's format, from which it may have come, has it.
    lf.save(a, tmp_path / "q")
    lf.save(back, tmp_path / "r")
    assert lf.load(tmp_path / "q").digest == lf.load(tmp_path / "r").digest


def twins():
    """Llama and Phi-3 with the same weights: q, k and v, gate and up apart, and in one."""
    llama, phi = models.model_of("llama"), models.model_of("phi3")
    state = llama.state_dict()
    fused = {}
    for key in phi.state_dict():
        if "qkv_proj" in key:
            fused[key] = torch.cat([state[key.replace("qkv", x)] for x in "qkv"])
        elif "gate_up_proj" in key:
            fused[key] = torch.cat([state[key.replace("gate_up", x)] for x in ("gate", "up")])
        else:
            fused[key] = state[key]
    phi.load_state_dict(fused)
    return llama, phi


def test_on_an_architecture_that_fuses_and_back(tmp_path):
    llama, phi = twins()
    inputs = models.inputs_of("llama")
    torch.testing.assert_close(models.output_of(llama, inputs), models.output_of(phi, inputs))
    a = adapter_of(llama)
    expected = run(llama, inputs, a)
    assert (expected - models.output_of(llama, inputs)).abs().max() > 1e-2
    lf.save(a, tmp_path / "p", format="portable")
    fused = lf.load(tmp_path / "p", base=phi)
    assert fused["model.layers.0.self_attn.qkv_proj"].rank == 6
    torch.testing.assert_close(run(phi, inputs, fused), expected, atol=1e-5, rtol=0)
    lf.save(fused, tmp_path / "q", format="portable", base=phi)
    apart = lf.load(tmp_path / "q", base=llama)
    assert list(apart) != []
    torch.testing.assert_close(run(llama, inputs, apart), expected, atol=1e-5, rtol=0)
    for path, u in a.items():
        assert (apart[path] - u).norm() < 1e-6 * u.norm()
    # The file of the fused one, as PEFT reads it.
    lf.save(fused, tmp_path / "r")
    assert lf.load(tmp_path / "r").distance(fused) < 1e-6 * fused.norm()


@pytest.mark.parametrize("other", ["mistral", "qwen2"])
def test_on_an_architecture_of_other_names_or_the_same(other, tmp_path):
    a = adapter_of(models.model_of("llama"))
    lf.save(a, tmp_path / "p", format="portable")
    moved = lf.load(tmp_path / "p", base=models.config_of(other))
    assert moved.digest == a.digest
    assert moved.base_model is None  # the configuration has no name


def test_interleaved_rows_go_where_another_model_has_them(tmp_path):
    """GPT-NeoX's rows to GPT-2's stacked ones, to Falcon's, and to single projections."""
    neox, gpt2 = models.model_of("gpt_neox"), models.model_of("gpt2")
    path = "gpt_neox.layers.1.attention.query_key_value"
    a = lf.Adapter({path: adapter_of(neox)[path]}, config=CONFIG)
    lf.save(a, tmp_path / "p", format="portable", base=neox)
    moved = lf.load(tmp_path / "p", base=gpt2)
    assert list(moved) == ["transformer.h.1.attn.c_attn"]
    heads = a[path].dense().view(4, 3, 8, 32)  # heads, (query, key, value), dim
    stacked = heads.transpose(0, 1).reshape(96, 32)
    assert torch.equal(moved["transformer.h.1.attn.c_attn"].dense(), stacked)
    single = lf.load(tmp_path / "p", base=models.model_of("gptj"))
    for i, word in enumerate("qkv"):
        dense = single[f"transformer.h.1.attn.{word}_proj"].dense()
        assert torch.equal(dense, heads[:, i].reshape(32, 32))
    lf.save(single, tmp_path / "q", format="portable")
    back = lf.load(tmp_path / "q", base=neox)
    torch.testing.assert_close(back[path].dense(), a[path].dense(), atol=1e-6, rtol=0)
    bloom = lf.load(tmp_path / "p", base=models.model_of("bloom"))
    assert torch.equal(next(iter(bloom.values())).B, a[path].B)  # packed alike: bit for bit
    falcon = lf.load(tmp_path / "p", base=models.model_of("falcon heads"))
    assert torch.equal(next(iter(falcon.values())).B, a[path].B)
    with pytest.raises(lf.MismatchError, match="part 'key' is 32×32"):
        lf.load(tmp_path / "p", base=models.model_of("falcon"))  # one key for all queries


def test_encoders_stand_for_each_other(tmp_path):
    bert = models.model_of("bert")
    path = "bert.encoder.layer.1.attention.self.query"
    a = lf.Adapter({path: adapter_of(bert)[path]}, config=CONFIG)
    found = {
        "distilbert": "distilbert.transformer.layer.1.attention.q_lin",
        "mpnet": "mpnet.encoder.layer.1.attention.attn.q",
        "gptj": "transformer.h.1.attn.q_proj",  # another side, but either has one alone
    }
    for name, there in found.items():
        lf.save(a, tmp_path / name, format="portable")
        assert list(lf.load(tmp_path / name, base=models.model_of(name))) == [there]
    with pytest.raises(lf.MismatchError, match=r"no counterpart.*encoder\.1\.attention\.query"):
        lf.load(tmp_path / "gptj", base=models.model_of("vit"))


def test_extras_and_config_go_along_or_are_refused(tmp_path):
    llama, neox = models.model_of("llama"), models.model_of("gpt_neox")
    path = "model.layers.0.self_attn.o_proj"
    u = adapter_of(llama)[path]
    head = "base_model.model.lm_head.weight"
    bias = f"base_model.model.{path}.lora_B.bias"
    config = {**CONFIG, "modules_to_save": ["lm_head"], "target_modules": ["o_proj"], "r": 2}
    config |= {"lora_alpha": 3, "lora_bias": True, "task_type": "CAUSAL_LM"}
    extras = {head: torch.randn(64, 32), bias: torch.randn(32)}
    a = lf.Adapter({path: u}, extras, config)
    lf.save(a, tmp_path / "p", format="portable")
    moved = lf.load(tmp_path / "p", base=neox)
    to = "gpt_neox.layers.0.attention.dense"
    assert list(moved) == [to]
    assert set(moved.extras) == {head, f"base_model.model.{to}.lora_B.bias"}
    assert torch.equal(moved.extras[head], extras[head])
    assert moved.config["task_type"] == "CAUSAL_LM"
    assert "target_modules" not in moved.config
    lf.save(moved, tmp_path / "q")
    assert lf.load(tmp_path / "q").digest == moved.digest
    norm = {"base_model.model.model.norm.weight": torch.ones(32)}
    odd = dataclasses.replace(a, extras=norm)
    lf.save(odd, tmp_path / "r", format="portable")
    assert lf.load(tmp_path / "r").digest == odd.digest
    with pytest.raises(lf.errors.RefusedError, match=r"norm\.weight.*leave it out"):
        lf.load(tmp_path / "r", base=neox)


def test_experts_in_one_parameter_and_one_by_one(tmp_path):
    path = "model.layers.0.mlp.experts"
    g = torch.Generator().manual_seed(0)
    modules, layouts = {}, {}
    for e in range(3):
        for leaf, out, inner in (("gate_up_proj", 96, 32), ("down_proj", 32, 48)):
            name = f"{path}.{leaf}[{e}]"
            A = torch.randn(2, inner, generator=g)
            modules[name] = lf.LowRank(A, torch.randn(out, 2, generator=g))
            layouts[name] = lf.Layout("expert", parameter=leaf, stem=path, expert=(e, 3))
    a = lf.Adapter(modules, config=CONFIG, layouts=layouts)
    mixtral = models.model_of("mixtral")
    lf.save(a, tmp_path / "p", format="portable", base=mixtral)
    assert lf.load(tmp_path / "p").digest == a.digest
    assert list(lf.load(tmp_path / "p", base=mixtral)) == list(a)
    singles = [
        f"model.layers.0.block_sparse_moe.experts.{e}.{w}"
        for e in range(3)
        for w in ("w1", "w2", "w3")
    ]
    apart = lf.load(tmp_path / "p", base=singles)
    assert set(apart) == set(singles)
    assert torch.equal(apart[singles[5]].dense(), a[f"{path}.gate_up_proj[1]"].dense()[48:])
    assert apart.layouts == {}
    together = lf.load(_saved(apart, tmp_path / "q"), base=mixtral)
    assert together.modules.keys() == a.modules.keys()
    assert together.distance(a) < 1e-6 * a.norm()
    names = ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"]
    with pytest.raises(lf.MismatchError, match="one of the experts"):
        lf.load(tmp_path / "q", base=names)  # which do not say how many there are


def _saved(adapter, path, **options):
    lf.save(adapter, path, format="portable", **options)
    return path


def test_bad_input(tmp_path):
    llama = models.model_of("llama")
    a = adapter_of(llama)
    with pytest.raises(lf.MismatchError, match="'peft', 'portable', 'mlx'"):
        lf.save(a, tmp_path / "x", format="onnx")
    with pytest.raises(lf.MismatchError, match="pad="):
        lf.save(a, tmp_path / "x", format="portable", pad=True)
    with pytest.raises(lf.MismatchError, match="other formats than 'peft'"):
        lf.save(a, tmp_path / "x", base=llama)
    odd = lf.Adapter({"strange.0.thing": next(iter(a.values()))})
    with pytest.raises(lf.MismatchError, match=r"no role.*'strange.0.thing'.*tables="):
        lf.save(odd, tmp_path / "x", format="portable")
    twice = lf.Adapter(dict.fromkeys(["a.0.q_proj", "b.0.q_proj"], next(iter(a.values()))))
    with pytest.raises(lf.MismatchError, match="have one role"):
        lf.save(twice, tmp_path / "x", format="portable")
    with pytest.raises(lf.MismatchError, match="have one role"):
        lf.roles.onto(twice, llama)
    path = _saved(lf.Adapter({"layers.0.q_proj": next(iter(a.values()))}), tmp_path / "two")
    with pytest.raises(lf.MismatchError, match="several modules of the base"):
        lf.load(path, base=["a.0.q_proj", "b.0.q_proj"])
    assert not (tmp_path / "x").exists()
    path = _saved(a, tmp_path / "p")
    with pytest.raises(lf.errors.FileError, match="overwrite"):
        lf.save(a, path, format="portable")
    lf.save(a, path, overwrite=True)  # one format in the other's place
    assert not (path / "portable.safetensors").exists()
    lf.save(a, path, format="portable", overwrite=True)
    assert [p.name for p in path.iterdir()] == ["portable.safetensors"]
    with pytest.raises(lf.MismatchError, match="alpha"):
        lf.load(path, alpha=2)
    key = {p: u for p, u in a.items() if "k_proj" in p}
    grouped = _saved(lf.Adapter(key), tmp_path / "k")
    with pytest.raises(lf.MismatchError, match="is 32×32 in the base, and .* update is 16×32"):
        lf.load(grouped, base=models.model_of("opt"))
    with pytest.raises(lf.MismatchError, match=r"no counterpart.*mlp\.gate"):
        lf.load(path, base=models.model_of("gptj"))
    fused = adapter_of(models.model_of("gpt_neox"))
    with pytest.raises(lf.MismatchError, match=r"packs.*base=its own"):
        lf.load(_saved(fused, tmp_path / "f"), base=models.model_of("gptj"))


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("version", "2", "update lorafold"),
        ("modules", "[]", "must hold a JSON object"),
        ("modules", "{", "not valid JSON"),
        ("modules", "{}", "do not tell"),
        ("modules", '{"no role!": {"path": "x", "scale": 1}}', "damaged"),
        ("modules", '{"decoder.0.attention.query": {"scale": 1}}', "damaged"),
        ("modules", '{"decoder.0.attention.query": {"path": 1, "scale": 1}}', "damaged"),
        ("modules", '{"decoder.0.attention.query": {"path": "x", "scale": "1"}}', "damaged"),
        (
            "modules",
            '{"decoder.0.attention.query": {"path": "x", "scale": 1, "layout": 3}}',
            "dama",
        ),
        ("modules", '{"decoder.0.attention.query": []}', "damaged"),
        ("config", "3", "must hold a JSON object"),
    ],
)
def test_a_damaged_header_is_refused(field, value, says, tmp_path):
    u = lf.LowRank(torch.ones(1, 4), torch.ones(4, 1))
    path = _saved(lf.Adapter({"layers.0.q_proj": u}), tmp_path / "p") / "portable.safetensors"
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    assert json.loads(metadata["modules"]).keys() == {"decoder.0.attention.query"}
    save_file(load_file(path), path, metadata={**metadata, field: value})
    with pytest.raises(lf.errors.FileError, match=says):
        lf.load(path)


def test_names_of_a_user_are_data(tmp_path):
    name = "../[bold]x[/bold]\n.q_proj"
    u = lf.LowRank(torch.ones(1, 4), torch.ones(4, 1))
    a = lf.Adapter({name: u})
    assert lf.load(_saved(a, tmp_path / "p")).digest == a.digest
    assert lf.roles(a)[name] == Role("attention.query")
    assert Packing(("gate", "up"), (1, 1)).rows(2)["up"].tolist() == [1]


@pytest.mark.form("portable", "written", by="a reader in numpy, from its page")
def test_a_reader_written_from_the_page(tmp_path):
    """docs/formats.md in plain numpy: both directions of a packing, and the scale."""
    neox = models.model_of("gpt_neox")
    a = adapter_of(neox)
    path = _saved(a, tmp_path / "p", base=neox) / "portable.safetensors"
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    metadata = header.pop("__metadata__")
    assert set(metadata) == {"format", "version", "modules", "config"}
    assert (metadata["format"], metadata["version"]) == ("lorafold-portable", "1")
    assert json.loads(metadata["config"]) == CONFIG

    def array(key):
        entry = header.pop(key)
        assert entry["dtype"] == "F32"
        start, stop = (8 + n + at for at in entry["data_offsets"])
        return np.frombuffer(data[start:stop], "<f4").reshape(entry["shape"])

    modules = json.loads(metadata["modules"])
    assert [said["path"] for said in modules.values()] == list(a)
    for role, said in modules.items():
        A, B = array(f"{role}.A"), array(f"{role}.B")
        u = a[said["path"]]
        np.testing.assert_array_equal(A, u.A.numpy())
        np.testing.assert_array_equal(B, u.B.numpy())
        assert said["scale"] == u.scale
        assert ("packing" in said) == role.endswith("qkv")
        if "packing" in said:
            packing = said["packing"]
            assert packing["words"] == ["query", "key", "value"]
            blocks = B.reshape(packing["groups"], sum(packing["shares"]), -1, B.shape[1])
            at = packing["shares"][0]
            keys = blocks[:, at : at + packing["shares"][1]].reshape(-1, B.shape[1])
            parts = lf.roles.packing(Role.parse(role), neox).split(u)
            np.testing.assert_array_equal(keys, parts["key"].B.numpy())
    assert header == {}


def test_what_is_there_twice_is_refused():
    u = lf.LowRank(torch.ones(1, 8), torch.ones(24, 1))
    q = lf.LowRank(torch.ones(1, 8), torch.ones(8, 1))
    a = lf.Adapter({"h.0.attn.c_attn": u, "h.0.attn.q_proj": q})
    stacked = {"h.0.attn.c_attn": Packing(("query", "key", "value"), (1, 1, 1))}
    names = [f"layers.0.self_attn.{x}_proj" for x in "qkv"]
    with pytest.raises(lf.MismatchError, match="twice"):
        lf.roles.onto(a, names, packings=stacked)
    alone = lf.Adapter({"h.0.attn.c_attn": u})
    assert list(lf.roles.onto(alone, names, packings=stacked)) == names
