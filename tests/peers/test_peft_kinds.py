"""Adapters of every kind as PEFT writes them: merged, reloaded there, looked for in its own merge.

The reference is dense: PEFT merges each adapter into the base, and the differences are summed.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
import transformers
from safetensors.torch import load_file, save_model

import lorafold as lf
from lorafold.merge import verify_merge

WEIGHTS = [0.7, -0.4]
TOKENS = torch.tensor([[1, 5, 2, 9, 0, 3], [4, 4, 8, 7, 6, 1]])
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "max_position_embeddings": 16,
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:counted as zero"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pattern keys did not match"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
]


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, tie_word_embeddings=False)
    )


def gpt2():
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 32, "n_positions": 16}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def mixtral():
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SMALL, num_local_experts=3, tie_word_embeddings=False)
    )


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(32, 4)
        self.one, self.two = nn.Conv1d(4, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)

    def forward(self, tokens):
        x = self.one(self.emb(tokens).transpose(1, 2))
        return self.two(x[..., None].expand(-1, -1, -1, 3)).mean((2, 3))


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
KINDS = {
    "patterns": (
        llama,
        {
            "r": 4,
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 2},
            "alpha_pattern": {"v_proj": 32},
        },
        {
            "r": 3,
            "lora_alpha": 5,
            "target_modules": "all-linear",
            "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 1},
            "use_rslora": True,
        },
    ),
    "embeddings": (
        llama,
        {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
        {"r": 2, "target_modules": ["embed_tokens", "lm_head"]},
    ),
    "conv1d": (
        gpt2,
        {"r": 4, "target_modules": ["c_attn", "attn.c_proj"], "fan_in_fan_out": True},
        {"r": 2, "lora_alpha": 6, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    ),
    "convolutions": (
        Convolutions,
        {"r": 4, "target_modules": ["one", "two", "emb"]},
        {"r": 2, "target_modules": ["one", "two"], "use_rslora": True},
    ),
    "experts": (
        mixtral,
        {"r": 2, "target_modules": ["q_proj"], "target_parameters": EXPERTS},
        {"r": 4, "target_modules": ["v_proj"], "target_parameters": EXPERTS[:1]},
    ),
}


def outputs(model):
    with torch.no_grad():
        found = model.eval()(TOKENS)
    return found if torch.is_tensor(found) else found.logits


def trained(base, config, seed):
    """A PEFT model over a copy of the base whose factors are not zero."""
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
    g = torch.Generator().manual_seed(seed)
    for key, p in model.named_parameters():
        if "lora_" in key:
            p.data = torch.randn(p.shape, generator=g) / 4
    return model


def written(model, folder):
    """A model's tensors as a checkpoint; transformers' own where it is of transformers."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
        return folder
    folder.mkdir()
    save_model(model, str(folder / "model.safetensors"))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_merge_reload_and_are_found(tmp_path, kind):
    make, *configs = KINDS[kind]
    torch.manual_seed(0)
    base = make()
    plain = {k: v.double() for k, v in base.state_dict().items()}
    total = dict(plain)
    for i, (config, w) in enumerate(zip(configs, WEIGHTS, strict=True)):
        model = trained(base, config, i)
        model.save_pretrained(tmp_path / f"a{i}")
        merged = model.merge_and_unload()
        for k, v in merged.state_dict().items():
            total[k] = total[k] + w * (v.double() - plain[k])
        if i == 0:
            written(base, tmp_path / "base")
            written(merged, tmp_path / "merged")
    result = lf.merge([tmp_path / "a0", tmp_path / "a1"], weights=WEIGHTS)
    dense = copy.deepcopy(base)
    dense.load_state_dict({k: v.float() for k, v in total.items()})
    wanted = outputs(dense)
    for pad in (False, True):
        out = tmp_path / f"out{pad}"
        lf.save(result, out, pad=pad)
        found = outputs(peft.PeftModel.from_pretrained(copy.deepcopy(base), out))
        assert torch.linalg.norm(found - wanted) < 1e-5 * torch.linalg.norm(wanted)
    assert torch.linalg.norm(outputs(base) - wanted) > 0.1 * torch.linalg.norm(wanted)

    right = verify_merge(tmp_path / "base", tmp_path / "a0", tmp_path / "merged")
    assert right.ok, right
    wrong = verify_merge(tmp_path / "base", tmp_path / "a1", tmp_path / "merged")
    assert set(wrong.counts) <= {"other change", "not applied"}


@pytest.mark.filterwarnings("ignore:.*Model has `tie_word")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True")
@pytest.mark.filterwarnings("ignore:.* tensors that changed are no matrices")
def test_a_fine_tuned_gpt2_becomes_an_adapter_that_peft_runs(tmp_path):
    """Conv1D, biases of layers with an update, norms."""
    torch.manual_seed(0)
    base = gpt2()
    tuned = copy.deepcopy(base)
    for p in tuned.parameters():
        p.data += 0.1 * torch.randn_like(p)
    written(base, tmp_path / "base"), written(tuned, tmp_path / "tuned")
    lf.save(lf.extract(tmp_path / "base", tmp_path / "tuned", rank=99), tmp_path / "out")
    found = outputs(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out"))
    assert torch.allclose(found, outputs(tuned), atol=1e-4)
    lf.merge_into_weights(tmp_path / "base", tmp_path / "out", tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    wanted = load_file(tmp_path / "tuned/model.safetensors")
    assert all(torch.allclose(again[k], W, atol=1e-5) for k, W in wanted.items())
