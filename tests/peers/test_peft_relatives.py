"""What PEFT makes of its relatives' adapters, once they were read and saved."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import lorafold as lf

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
IDS = torch.arange(10)[None]
# Asking a model for its gradient checkpointing, as PEFT does, makes transformers warn.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.form("peft", "read", by="torch")
@pytest.mark.form("peft", "written", by="PEFT")
def test_merged_layers_of_the_first_releases(tmp_path):
    """enable_lora on GPT-2's c_attn, which today's PEFT has no word for."""
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    state = {k: t.clone() for k, t in model.state_dict().items()}
    tensors = {}
    for n in range(2):
        A, B = torch.randn(2 * 4, 16), torch.randn(2 * 16, 4, 1)
        stem = f"base_model.model.transformer.h.{n}.attn.c_attn"
        tensors |= {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B}
        delta = 0.5 * F.conv1d(A[None], B, groups=2)[0]  # of query and value
        W = state[f"transformer.h.{n}.attn.c_attn.weight"]  # (in, out)
        W[:, :16] += delta[:16].T
        W[:, 32:] += delta[16:].T
    old = {
        **{"peft_type": "LORA", "r": 4, "lora_alpha": 2, "target_modules": ["c_attn"]},
        **{"enable_lora": [True, False, True], "fan_in_fan_out": True, "bias": "none"},
    }
    (tmp_path / "old").mkdir()
    save_file(tensors, tmp_path / "old" / "adapter_model.safetensors")
    (tmp_path / "old" / "adapter_config.json").write_text(json.dumps(old))
    adapter = lf.load(tmp_path / "old")
    with lf.attach(model, adapter).use("default"):
        here = logits(model)
    lf.Live.of(model).detach()
    lf.save(adapter, tmp_path / "new")
    there = logits(peft.PeftModel.from_pretrained(model, tmp_path / "new"))
    twin = transformers.GPT2LMHeadModel(config).eval()
    twin.load_state_dict(state)
    assert torch.allclose(here, logits(twin), atol=1e-4)
    assert torch.allclose(there, logits(twin), atol=1e-4)


# It looks for the pattern's keys among modules alone, and follows them at parameters all the same.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
def test_a_module_for_each_expert_on_one_parameter_for_all(tmp_path):
    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval()
    shapes = {"w1": (24, 16), "w3": (24, 16), "w2": (16, 24)}
    modules = {
        f"model.layers.{n}.block_sparse_moe.experts.{e}.{w}": lf.LowRank(
            torch.randn(2, inner), torch.randn(out, 2), 0.3
        )
        for n in range(2)
        for e in (0, 2)
        for w, (out, inner) in shapes.items()
    }
    adapter = lf.Adapter(modules)
    before = logits(model)
    with lf.attach(model, adapter).use("default"):
        here = logits(model)
    lf.Live.of(model).detach()
    assert (here - before).abs().max() > 0.01
    lf.save(adapter, tmp_path / "apart")
    lf.save(lf.load(tmp_path / "apart", base=model), tmp_path / "together")
    there = logits(peft.PeftModel.from_pretrained(model, tmp_path / "together"))
    assert torch.allclose(here, there, atol=1e-4)
