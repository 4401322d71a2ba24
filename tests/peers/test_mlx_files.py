"""MLX's files against mlx-lm: what it writes is read right, and it runs what is written for it."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch

import lorafold as lf
from lorafold.files import open_adapter
from lorafold.files.formats.mlx.writing import DENSE, OF_EXPERTS
from lorafold.parts import Layout

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
mx = pytest.importorskip("mlx.core", reason="no wheel of mlx here", exc_type=ImportError)
pytest.importorskip("mlx_lm", reason="no wheel of mlx-lm here", exc_type=ImportError)

IDS = [[1, 5, 9, 3, 7, 2]]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path_factory):
    return llama(tmp_path_factory.mktemp("base"), request.param), request.param


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("base"), False)


def llama(folder, tied):
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)
    return made(folder, config)


def made(folder, config):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for p in model.parameters():  # so that what is added to it shows
        p.data.mul_(8) if p.ndim > 1 else None
    model.save_pretrained(folder)
    return folder


def of_mlx(base, folder=None):
    """The logits that mlx-lm computes, with the adapter in a folder or without."""
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model, _ = load_model(base)
    if folder is not None:
        load_adapters(model, str(folder))
        model.eval()
    return torch.tensor(model(mx.array(IDS)).tolist())


def of_peft(base, folder=None):
    """The same of transformers, with an adapter that PEFT runs."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if folder is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tied weights, about merging
            model = peft.PeftModel.from_pretrained(model, str(folder))
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits


def trained(base, folder, kind="lora", keys=None, rank=3, scale=2.5):
    """A folder as `mlx_lm.lora` writes it, of factors that are not zero."""
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model, save_config

    model, _ = load_model(base)
    model.freeze()
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys}
    parameters = {k: v for k, v in parameters.items() if v is not None}
    mx.random.seed(1)
    linear_to_lora_layers(model, 2, parameters, use_dora=kind == "dora")
    noise = tree_map(lambda x: x + 0.3 * mx.random.normal(x.shape), model.trainable_parameters())
    model.update(noise)
    folder.mkdir()
    mx.save_safetensors(
        str(folder / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters()))
    )
    said = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": parameters, "model": "b"}
    save_config(said, folder / "adapter_config.json")
    return folder


EVERY = ["model.embed_tokens", "lm_head", "self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"]


@pytest.mark.parametrize("keys", [None, EVERY], ids=["all linear layers", "embedding and head"])
@pytest.mark.form("mlx", "read", by="mlx-lm")
@pytest.mark.form("mlx", "read", by="PEFT")
def test_what_mlx_wrote_runs_the_same_here_and_in_peft(untied, tmp_path, keys):
    folder = trained(untied, tmp_path / "mlx", keys=keys)
    expected, plain = of_mlx(untied, folder), of_mlx(untied)
    assert (expected - plain).abs().max() > 1
    adapter = lf.load(folder)
    lf.save(adapter, tmp_path / "peft")
    torch.testing.assert_close(of_peft(untied, tmp_path / "peft"), expected, atol=1e-4, rtol=0)
    model = transformers.AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32)
    live = lf.attach(model, adapter)
    with live.use(next(iter(live.names))), torch.no_grad():
        logits = model(torch.tensor(IDS)).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_dora_of_mlx_runs_the_same_in_peft(untied, tmp_path):
    folder = trained(untied, tmp_path / "mlx", kind="dora")
    adapter = lf.load(folder)
    assert "DoRA" in adapter.refusal
    lf.save(adapter, tmp_path / "peft")
    expected = of_mlx(untied, folder)
    assert (expected - of_mlx(untied)).abs().max() > 1
    torch.testing.assert_close(of_peft(untied, tmp_path / "peft"), expected, atol=1e-4, rtol=0)


MOE = {
    "MixtralConfig": {"num_local_experts": 4},
    "OlmoeConfig": {"num_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("kind", MOE)
def test_experts_of_mlx_are_those_of_the_checkpoint(kind, tmp_path):
    """Merged into it by their names there, they make the model that mlx-lm runs."""
    from lorafold.merge import merge_into_weights

    config = getattr(transformers, kind)(**SIZES, **MOE[kind], tie_word_embeddings=False)
    base = made(tmp_path / "base", config)
    folder = trained(base, tmp_path / "mlx")
    expected = of_mlx(base, folder)
    assert (expected - of_mlx(base)).abs().max() > 1
    adapter = open_adapter(folder)
    assert sum(".experts." in path for path in adapter.shapes) == 2 * 3 * 4
    merge_into_weights(base, lf.load(folder), tmp_path / "merged")
    torch.testing.assert_close(of_mlx(tmp_path / "merged"), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(of_peft(tmp_path / "merged"), expected, atol=1e-4, rtol=0)


# What lorafold writes


def mixed(base, tied):
    """An adapter in PEFT's form with ranks 2, 3 and 4 and scales that no two of them share."""
    layers = {"self_attn.q_proj": 2, "self_attn.v_proj": 3, "mlp.down_proj": 4}
    modules = {}
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    names = dict.fromkeys(f"model.layers.{i}.{name}" for i in range(2) for name in layers)
    ranks = {name: layers[name.split(".", 3)[3]] for name in names}
    if not tied:
        ranks |= {"lm_head": 2, "model.embed_tokens": 3}
    layouts = {"model.embed_tokens": Layout("embedding")} if not tied else {}
    torch.manual_seed(1)
    for path, rank in ranks.items():
        out, inner = model.get_submodule(path).weight.shape
        if path in layouts:
            out, inner = inner, out
        A, B = torch.randn(rank, inner), 0.3 * torch.randn(out, rank)
        modules[path] = lf.LowRank(A, B, 4 / (3 * rank))
    return lf.Adapter(modules, layouts=layouts)


@pytest.mark.form("mlx", "written", by="mlx-lm")
def test_mlx_runs_what_is_written_as_peft_does(base, tmp_path):
    """Ranks 2, 3 and 4 in one rank, their scales in B."""
    folder, tied = base
    adapter = mixed(folder, tied)
    lf.save(adapter, tmp_path / "peft")
    lf.save(adapter, tmp_path / "mlx", format="mlx", base=folder)
    expected = of_peft(folder, tmp_path / "peft")
    assert (expected - of_peft(folder)).abs().max() > 1
    found = of_mlx(folder, tmp_path / "mlx")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    wrong = tmp_path / "wrong"
    shutil.copytree(tmp_path / "mlx", wrong)
    said = json.loads((wrong / "adapter_config.json").read_text())
    said["lora_parameters"]["scale"] = 2.0
    (wrong / "adapter_config.json").write_text(json.dumps(said))
    assert (of_mlx(folder, wrong) - expected).abs().max() > 0.1
    back = lf.load(tmp_path / "mlx")
    assert {p: u.rank for p, u in back.modules.items()} == {
        p: u.rank for p, u in adapter.modules.items()
    }
    assert all(torch.equal(u.A, adapter[p].A) for p, u in back.modules.items())
    assert adapter.distance(back) < 1e-6 * adapter.norm()


def test_what_mlx_wrote_comes_out_bit_for_bit(untied, tmp_path):
    folder = trained(untied, tmp_path / "mlx", keys=EVERY)
    lf.save(lf.load(folder), tmp_path / "again", format="mlx", base=untied)
    before, after = (mx.load(str(f / "adapters.safetensors")) for f in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(bool(mx.array_equal(before[key], after[key])) for key in before)
    assert torch.equal(of_mlx(untied, tmp_path / "again"), of_mlx(untied, folder))


def test_dora_goes_both_ways(untied, tmp_path):
    folder = trained(untied, tmp_path / "mlx", kind="dora")
    lf.save(lf.load(folder), tmp_path / "peft")
    lf.save(lf.load(tmp_path / "peft"), tmp_path / "again", format="mlx")
    assert torch.equal(of_mlx(untied, tmp_path / "again"), of_mlx(untied, folder))


@pytest.mark.parametrize("kind", MOE)
def test_experts_of_peft_run_in_mlx(kind, tmp_path):
    """Two parameters of all experts in PEFT, three modules in MLX, and a router."""
    config = getattr(transformers, kind)(**SIZES, **MOE[kind], tie_word_embeddings=False)
    base = made(tmp_path / "base", config)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, lora)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.normal_(std=0.5)
    model.save_pretrained(tmp_path / "peft")
    lf.save(lf.load(tmp_path / "peft"), tmp_path / "mlx", format="mlx", base=base)
    with torch.no_grad():
        expected = model.eval()(torch.tensor(IDS)).logits
    assert (expected - of_peft(base)).abs().max() > 1
    torch.testing.assert_close(of_mlx(base, tmp_path / "mlx"), expected, atol=1e-4, rtol=0)
    again = tmp_path / "again"
    lf.save(lf.load(tmp_path / "mlx"), again, format="mlx", base=base)
    assert torch.equal(of_mlx(base, again), of_mlx(base, tmp_path / "mlx"))


# What else a configuration needs: of transformers' class, and of mlx-lm's.
ROPE = {"rope_theta": 1e4, "rope_scaling": None, "partial_rotary_factor": 0.5, "head_dim": 8}
MORE = {
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "mixtral": {"num_local_experts": 4},
    **{
        kind: {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        for kind in ("olmoe", "qwen2_moe", "qwen3_moe")
    },
}


@pytest.mark.parametrize("kind", [*DENSE, *OF_EXPERTS])
def test_the_modules_of_an_architecture_have_these_names(kind):
    """Of every one that is let through: linear layers and embedding, with none left over."""
    import importlib

    from mlx import nn
    from mlx_lm.models.switch_layers import SwitchLinear
    from mlx_lm.utils import MODEL_REMAPPING

    config = transformers.AutoConfig.for_model(kind, **SIZES, pad_token_id=0, **MORE.get(kind, {}))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    layers = (torch.nn.Linear, torch.nn.Embedding)
    expected = {name for name, m in model.named_modules() if isinstance(m, layers)}
    block = "block_sparse_moe" if kind == "mixtral" else "mlp"
    for n in range(2) if kind in OF_EXPERTS else ():
        names = ("gate", *(f"switch_mlp.{x}_proj" for x in ("gate", "up", "down")))
        expected |= {f"model.layers.{n}.{block}.{name}" for name in names}
    tied = {"lm_head"} if config.tie_word_embeddings else set()
    there = importlib.import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(kind, kind)}")
    said = {**ROPE, **config.to_dict()}
    said = {**said, "num_experts": said.get("num_local_experts", said.get("num_experts"))}
    mlx_model = there.Model(there.ModelArgs.from_dict(said))
    layers = (nn.Linear, nn.Embedding, SwitchLinear)
    found = {name for name, m in mlx_model.named_modules() if isinstance(m, layers)}
    assert found - tied == expected - tied
