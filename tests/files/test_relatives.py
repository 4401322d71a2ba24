"""Programs that write PEFT's names, and something else under them."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import lorafold as lf
from lorafold.cli import main
from lorafold.errors import MismatchError
from lorafold.files import open_adapter
from lorafold.parts import PREFIX

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["c_attn"]}


def written(folder, tensors, config):
    folder.mkdir()
    tensors = {key: t.contiguous() for key, t in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


# loralib's merged layers

BLOCKS = [[True, False, True], [True, True, True], [False, True], [True]]


def merged(enabled, out=8, inner=10, r=4, three=True, seed=0):
    """A, B of the blocks, and ΔW as loralib's layer makes it: a grouped convolution, padded."""
    g = torch.Generator().manual_seed(seed)
    k = sum(enabled)
    A, B = torch.randn(k * r, inner, generator=g), torch.randn(k * out, r, generator=g)
    rows = F.conv1d(A[None], B[..., None], groups=k)[0]
    whole = torch.zeros(len(enabled), out, inner)
    whole[torch.tensor(enabled)] = rows.view(k, out, inner)
    return A, (B[..., None] if three else B), whole.flatten(0, 1)


@pytest.mark.parametrize("three", [True, False], ids=["B of a convolution", "B of loralib"])
@pytest.mark.parametrize("enabled", BLOCKS, ids=str)
def test_merged_layers_block_by_block(enabled, three, tmp_path):
    A, B, dense = merged(enabled, three=three)
    stem = f"{PREFIX}h.0.attn.c_attn"
    tensors = {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B}
    config = {**CONFIG, "enable_lora": enabled, "merge_weights": False, "fan_in_fan_out": True}
    folder = written(tmp_path / "a", tensors, config)
    a = lf.load(folder)
    u = a["h.0.attn.c_attn"]
    assert u.scale == 1.5
    assert u.rank == 4 * sum(enabled)
    assert torch.equal(u.A, A)
    assert torch.allclose(u.dense(), 1.5 * dense, atol=1e-5)
    file = open_adapter(folder)
    assert file.shapes["h.0.attn.c_attn"] == (*u.shape, u.rank)
    assert torch.equal(file.read("h.0.attn.c_attn").B, u.B)
    assert lf.load(tensors, config=config).digest == a.digest
    lf.save(a, tmp_path / "again")
    again = lf.load(tmp_path / "again")
    assert torch.equal(again["h.0.attn.c_attn"].A, A)
    assert again.digest == a.digest
    said = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"]) == (4 * sum(enabled), 6 * sum(enabled))
    assert "enable_lora" not in said
    assert said["fan_in_fan_out"]


def test_merged_layers_that_do_not_fit_are_named(tmp_path, capsys):
    A, B, _ = merged([True, False, True])
    tensors = {"c_attn.lora_A": A, "c_attn.lora_B": B}
    for config in (CONFIG, {**CONFIG, "r": 8}):
        says = r'ranks disagree: .*"enable_lora": \[true, false, true\]'
        with pytest.raises(MismatchError, match=says):
            lf.load(tensors, config=config)
    with pytest.raises(SystemExit):
        main(["info", str(written(tmp_path / "a", tensors, CONFIG))])
    assert '"enable_lora": [true, false, true]' in capsys.readouterr().err
    for enabled, says in (
        ([True, True, True], r"c_attn\.lora_B.*with 3 of 3 blocks"),
        ([False, False], "must list true and false, found"),
        ("qv", "must list true and false, found 'qv'"),
    ):
        with pytest.raises(MismatchError, match=says):
            lf.load(tensors, config={**CONFIG, "enable_lora": enabled})
    plain = lf.load(
        {"q.lora_A": A[:4], "q.lora_B": torch.randn(8, 4)},
        config={**CONFIG, "enable_lora": None},
    )
    assert plain["q"].rank == 4


# Tinker

EXPERTS = f"{PREFIX}model.layers.0.mlp.experts"
TINKER = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def tinker(shared=("w1.A", "w3.A", "w2.B"), count=3, D=6, H=10):
    """Factors as Tinker saves them, and {path: ΔW / scale}."""
    g = torch.Generator().manual_seed(0)
    tensors, dense = {}, {}
    for w, name, out, inner in (
        ("w1", "gate_proj", H, D),
        ("w3", "up_proj", H, D),
        ("w2", "down_proj", D, H),
    ):
        n = {side: 1 if f"{w}.{side}" in shared else count for side in "AB"}
        A = torch.randn(n["A"], 4, inner, generator=g)
        B = torch.randn(n["B"], out, 4, generator=g)
        tensors |= {f"{EXPERTS}.{w}.lora_A.weight": A, f"{EXPERTS}.{w}.lora_B.weight": B}
        for e, delta in enumerate(B @ A):
            dense[f"model.layers.0.mlp.experts.{e}.{name}"] = delta
    A, B = torch.randn(4, D, generator=g), torch.randn(20, 4, generator=g)
    tensors |= {
        f"{PREFIX}model.unembed_tokens.lora_A.weight": A,
        f"{PREFIX}model.unembed_tokens.lora_B.weight": B,
    }
    dense["lm_head"] = B @ A
    return tensors, dense


@pytest.mark.parametrize("shared", [("w1.A", "w3.A", "w2.B"), ("w1.B",), ()], ids=str)
def test_tinkers_experts_and_output_layer(shared, tmp_path):
    tensors, dense = tinker(shared)
    folder = written(tmp_path / "a", tensors, TINKER)
    a = lf.load(folder)
    assert set(a) == set(dense)
    assert a.layouts == {}
    for path, delta in dense.items():
        assert torch.allclose(a[path].dense(), 2 * delta, atol=1e-5), path
    file = open_adapter(folder)
    assert all(torch.equal(file.read(path).B, u.B) for path, u in a.items())
    assert lf.load(tensors, config=TINKER).digest == a.digest
    lf.save(a, tmp_path / "peft")
    again = lf.load(tmp_path / "peft")
    assert again.digest == a.digest
    keys = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert f"{EXPERTS}.2.up_proj.lora_B.weight" in keys
    small = a.resize(rank=2)
    assert lf.fold({"a": a, "b": small}, tolerance=0)["b"].distance(small) < 1e-5 * a.norm()


def test_tinkers_placeholders_are_nothing():
    tensors, dense = tinker()
    for side in "AB":  # of a model without gates
        tensors[f"{EXPERTS}.w1.lora_{side}.weight"] = torch.empty(1, 0, 6)
    a = lf.load(tensors, config=TINKER)
    assert set(a) == {path for path in dense if not path.endswith("gate_proj")}
    assert not a.extras


def test_tinkers_experts_run_on_their_base():
    transformers = pytest.importorskip("transformers")
    tensors, dense = tinker(D=16, H=24)
    config = transformers.Qwen3MoeConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=8,
        moe_intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=3,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    state = {k: t.clone() for k, t in model.state_dict().items()}
    path = "model.layers.0.mlp.experts"
    for e in range(3):
        gate, up, down = (dense[f"{path}.{e}.{x}_proj"] for x in ("gate", "up", "down"))
        state[f"{path}.gate_up_proj"][e] += 2 * torch.cat([gate, up])
        state[f"{path}.down_proj"][e] += 2 * down
    state["lm_head.weight"] += 2 * dense["lm_head"]
    ids = torch.arange(12)[None]
    with lf.attach(model, lf.load(tensors, config=TINKER)).use("default"), torch.no_grad():
        found = model(ids).logits
    twin = transformers.Qwen3MoeForCausalLM(config).eval()
    twin.load_state_dict(state)
    with torch.no_grad():
        assert torch.allclose(found, twin(ids).logits, atol=1e-4)


def test_tinkers_shapes_that_contradict_each_other_are_named():
    stem = f"{EXPERTS}.w1"
    for A, B, says in (
        ((2, 4, 6), (3, 10, 4), r"experts\.w1'.*no factors of experts"),
        ((3, 4, 6), (3, 10, 5), "no factors of experts"),
        ((1, 4, 6), (1, 10, 4), "both shared"),
        ((3, 4, 6), (10, 4), "no factors of experts"),
        ((3, 2, 6), (3, 10, 2), "the config gives .* the rank 4"),
    ):
        pair = {f"{stem}.lora_A.weight": torch.ones(A), f"{stem}.lora_B.weight": torch.ones(B)}
        with pytest.raises(MismatchError, match=says):
            lf.load(pair, config=TINKER)
