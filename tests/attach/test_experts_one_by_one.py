"""Adapters with a module for each expert, on models that have one parameter for all of them."""

import pytest
import torch

import lorafold as lf
from lorafold.errors import MismatchError, RefusedError

transformers = pytest.importorskip("transformers")
IDS = torch.arange(10)[None] % 64
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = {
    "mixtral": (
        "Mixtral",
        {"intermediate_size": 24, "num_local_experts": 4},
        ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
        "block_sparse_moe.experts.{}.w2",
    ),
    "qwen": (
        "Qwen3Moe",
        {"intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 4, "head_dim": 8},
        ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"),
        "mlp.experts.{}.down_proj",
    ),
    "square": (  # intermediate and hidden sizes are one
        "Mixtral",
        {"intermediate_size": 32, "num_local_experts": 4},
        ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"),
        "mlp.experts.{}.down_proj",
    ),
}


def model_of(name):
    kind, more, _, _ = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SHAPE, **more, num_experts_per_tok=2)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def update(seed, out, inner, rank=3):
    g = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, inner, generator=g), torch.randn(out, rank, generator=g)
    return lf.LowRank(A, B, 0.3)


def adapter_for(name, model, experts=(0, 3)):
    """Updates of some experts' layers, and the state dict that they make, by hand."""
    _, _, (gate, up), down = MODELS[name]
    state = {k: t.clone() for k, t in model.state_dict().items()}
    modules = {}
    for n in range(2):
        parameters = f"model.layers.{n}.mlp.experts"
        D, F = state[f"{parameters}.down_proj"].shape[1:]
        for e in experts:
            for k, (path, out, inner) in enumerate([(gate, F, D), (up, F, D), (down, D, F)]):
                u = update(100 * n + 10 * e + k, out, inner)
                modules[f"model.layers.{n}.{path.format(e)}"] = u
                if k == 2:
                    state[f"{parameters}.down_proj"][e] += u.dense()
                else:
                    state[f"{parameters}.gate_up_proj"][e, k * F : (k + 1) * F] += u.dense()
    return lf.Adapter(modules), state


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", MODELS)
def test_they_run_as_parts_of_the_parameter(name):
    model = model_of(name)
    adapter, state = adapter_for(name, model)
    before = logits(model)
    twin = model_of(name)
    twin.load_state_dict(state)
    expected = logits(twin)
    assert (expected - before).abs().max() > 0.05
    live = lf.attach(model, adapter)
    with live.use("default"):
        assert torch.allclose(logits(model), expected, atol=1e-5)
    assert torch.equal(logits(model), before)
    assert live.adapter("default").digest == adapter.digest
    live.merge("default")
    assert torch.allclose(logits(model), expected, atol=1e-5)
    live.unmerge()
    assert live.verify(IDS) < 1e-4
    live.detach()
    assert torch.equal(logits(model), before)
    applied = adapter.apply_to(model.state_dict())
    assert applied.keys() == state.keys()
    assert all(torch.allclose(t, state[k], atol=1e-6) for k, t in applied.items())


def test_beside_an_adapter_of_the_whole_parameter():
    model = model_of("qwen")
    apart, _ = adapter_for("qwen", model)
    path = "model.layers.0.mlp.experts.down_proj"
    layout = lf.Layout("expert", parameter="down_proj", expert=(3, 4))
    whole = lf.Adapter({f"{path}[3]": update(7, 32, 24)}, layouts={f"{path}[3]": layout})
    live = lf.attach(model, {"apart": apart, "whole": whole})
    with live.use({"apart": 1.0, "whole": -0.5}):
        found = logits(model)
    live.detach()
    state = (-0.5 * whole).apply_to(apart.apply_to(model.state_dict()))
    model.load_state_dict(state)
    assert torch.allclose(found, logits(model), atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_load_puts_them_on_the_base(name, tmp_path):
    """As experts of one parameter, which PEFT has too."""
    model = model_of(name)
    adapter, state = adapter_for(name, model)
    lf.save(adapter, tmp_path / "apart")
    moved = lf.load(tmp_path / "apart", base=model)
    assert {p.rpartition(".")[2] for p in moved} == {
        f"{leaf}[{e}]" for leaf in ("gate_up_proj", "down_proj") for e in (0, 3)
    }
    applied = moved.apply_to(model.state_dict())
    assert all(torch.allclose(t, state[k], atol=1e-5) for k, t in applied.items())
    lf.save(moved, tmp_path / "peft")
    again = lf.load(tmp_path / "peft").apply_to(model.state_dict())
    assert all(torch.allclose(t, state[k], atol=1e-5) for k, t in again.items())


def test_what_can_not_be_attached_is_named():
    model = model_of("qwen")
    path = "model.layers.0.mlp.experts.{}.down_proj"
    with pytest.raises(MismatchError, match=r"experts\.1\.down_proj' takes updates of \(32, 24\)"):
        lf.attach(model, lf.Adapter({path.format(1): update(0, 32, 20)}))
    with pytest.raises(MismatchError, match=r"none of the 1 modules .*experts\.4\.down_proj"):
        lf.attach(model, lf.Adapter({path.format(4): update(0, 32, 24)}))
    adapter = lf.Adapter({path.format(1): update(0, 32, 24)})
    live = lf.attach(model, adapter)
    with pytest.raises(RefusedError, match="routing hides the"):
        live.use(["default", None])
    live.detach()
    with pytest.raises(RefusedError, match="can't be trained here"):
        lf.attach(model, adapter, trainable=True)
    with pytest.raises(RefusedError, match="attach its adapters one by one"):
        lf.attach(model, lf.fold({"a": adapter}))


def test_a_parameter_that_is_stored_the_other_way_has_no_such_parts():
    """As gpt-oss has it: (experts, in, 2 · out), gate and up row by row."""
    state = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.zeros(4, 32, 48),
        "model.layers.0.mlp.experts.down_proj": torch.zeros(4, 24, 32),
    }
    adapter = lf.Adapter({"model.layers.0.mlp.experts.0.gate_proj": update(0, 24, 32)})
    with pytest.raises(MismatchError, match="none of the adapter's 1 modules is in the state dict"):
        adapter.apply_to(state)


# Prefixes


PREFIXES = ["model.", "", "model.model.", "language_model.model.", "model.language_model."]


@pytest.mark.parametrize("prefix", [*PREFIXES, "language_model.", "backbone."])
@pytest.mark.parametrize("body", [False, True])
def test_a_prefix_that_is_inserted_or_missing_is_settled_by_the_model(prefix, body, tmp_path):
    config = transformers.LlamaConfig(**SHAPE, intermediate_size=48)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    target = model.model if body else model
    shapes = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "mlp.up_proj": (48, 32)}
    state = {k: t.clone() for k, t in target.state_dict().items()}
    modules = {}
    for n in range(2):
        for k, (path, (out, inner)) in enumerate(shapes.items()):
            u = update(10 * n + k, out, inner)
            modules[f"{prefix}layers.{n}.{path}"] = u
            state[f"{'' if body else 'model.'}layers.{n}.{path}.weight"] += u.dense()
    adapter = lf.Adapter(modules)
    lf.save(adapter, tmp_path / "a")
    applied = lf.load(tmp_path / "a").apply_to(target.state_dict())
    assert all(torch.allclose(t, state[k], atol=1e-6) for k, t in applied.items())
    moved = lf.load(tmp_path / "a", base=target)
    assert all(f"{path}.weight" in state for path in moved)
    live = lf.attach(target, lf.load(tmp_path / "a"))
    with live.use("default"), torch.no_grad():
        found = target(IDS)[0]
    live.detach()
    target.load_state_dict(state)
    with torch.no_grad():
        assert torch.allclose(found, target(IDS)[0], atol=1e-5)
