"""Every family that is listed runs in rows, and packed, as transformers runs it alone."""

from __future__ import annotations

import pytest
import torch

import lorafold as lf
from lorafold.errors import RefusedError
from lorafold.serve import Limits
from lorafold.serve.run.families import FAMILIES, PACKED, context_of
from lorafold.serve.run.packed import PackedEngine
from lorafold.serve.run.rows import RowsEngine

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
TYPES = ["sliding_attention", "full_attention"]
CONFIGS = {
    "llama": ("LlamaConfig", {}),
    "qwen2": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 16, "layer_types": TYPES},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "mistral": ("MistralConfig", {"sliding_window": 16}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 16, "layer_types": TYPES}),
    "gemma3_text": (
        "Gemma3TextConfig",
        {"head_dim": 8, "sliding_window": 16, "layer_types": TYPES},
    ),
    "phi3": ("Phi3Config", {"sliding_window": 20}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "sliding_window": 16}),
}


UNGROUPED = ("gpt2", "gpt_neox", "opt")  # as many keys as queries, and no word on it


def tiny(kind, **more):
    name, own = CONFIGS[kind]
    given = {**SMALL, **own, **more}
    if kind in UNGROUPED:
        del given["num_key_value_heads"]
    config = getattr(transformers, name)(**given)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager" if kind == "gemma2" else "sdpa"
    )
    with torch.no_grad():  # so that what is said differs
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4)
    return model.eval()


def fitting(model, rank=4, seed=0):
    """An adapter of all its attention's layers."""
    g = torch.Generator().manual_seed(seed)
    modules = {}
    for path, layer in model.named_modules():
        weight = getattr(layer, "weight", None)
        if ("attn" not in path and "attention" not in path) or weight is None or weight.ndim != 2:
            continue
        out, inn = weight.shape if isinstance(layer, torch.nn.Linear) else weight.shape[::-1]
        A, B = torch.randn(rank, inn, generator=g), torch.randn(out, rank, generator=g)
        modules[path] = lf.LowRank(A / inn**0.5, B / 4)
    return lf.Adapter(modules, {}, {"fan_in_fan_out": model.config.model_type == "gpt2"})


def test_every_family_is_tried():
    assert CONFIGS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("kind", CONFIGS)
def test_requests_are_as_each_alone(kind, serving, make):
    model = tiny(kind)
    assert model.config.model_type == kind
    if make is PackedEngine and kind not in PACKED:
        with pytest.raises(RefusedError, match=f"'{kind}' are not served packed; .*'rows'"):
            make(model, None, serving.LIMITS)
        return
    limits = Limits(length=64, vocabulary=96, rows=4, adapters=8, waiting=20)
    adapter = fitting(model)
    engine = serving.started(model, {"x": adapter}, limits, make)
    g = torch.Generator().manual_seed(1)
    lengths = [3, 17, 30, 5, 9]
    prompts = [torch.randint(96, (n,), generator=g).tolist() for n in lengths]
    mixes = [{}, {"x": 1.0}, {"x": -0.5}, {"x": 1.0}, {}]
    told = [serving.ask(engine, p, 20, mix=mix).wait for p, mix in zip(prompts, mixes, strict=True)]
    told = [wait() for wait in told]
    engine.stop(60)
    for prompt, mix, one in zip(prompts, mixes, told, strict=True):
        assert one.reason == "length", one.pieces[-1]
        with torch.no_grad(), engine.attachments.live.use(dict(mix) or None):
            whole = torch.tensor([[*prompt, *one.tokens]])
            scores = model(whole).logits[0, len(prompt) - 1 : -1].float().log_softmax(1)
        own = scores.gather(1, torch.tensor(one.tokens)[:, None])[:, 0]
        assert torch.allclose(own, torch.tensor(one.logprobs), atol=1e-4)
        gap = scores.topk(2).values
        likeliest = scores.argmax(1) == torch.tensor(one.tokens)
        assert bool((likeliest | (gap[:, 0] - gap[:, 1] < 1e-3)).all())
    assert len({tuple(one.tokens) for one in told}) > 1
    changed = [one.logprobs[0] for one in told]
    assert len(set(changed)) == len(changed)


def test_others_are_refused_by_name(serving):
    config = transformers.BloomConfig(vocab_size=96, hidden_size=32, n_layer=1, n_head=4)
    model = transformers.BloomForCausalLM(config)
    for make in (RowsEngine, PackedEngine):
        with pytest.raises(RefusedError, match="type 'bloom' are not served by rows"):
            make(model, None, serving.LIMITS)


def test_positions_that_depend_on_the_longest_row_are_not_reached():
    scaled = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "factor": 2.0,
    }
    config = transformers.Phi3Config(
        **{**SMALL, "rope_parameters": scaled, "original_max_position_embeddings": 64}
    )
    assert config.max_position_embeddings == 128
    assert context_of(config) == 64
    assert context_of(tiny("llama").config) == 128
