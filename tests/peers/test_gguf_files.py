"""GGUF files run by llama.cpp: log-probabilities of all tokens, against transformers and PEFT.

llama.cpp ends the process where an assertion of its own fails, so it runs in a child. Flash
attention and the cache in half precision are off: with either one the base alone is off by 1e-2.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

import lorafold as lf
from lorafold.errors import RefusedError
from lorafold.files.formats.gguf.architectures import ARCHITECTURES, names_of
from lorafold.parts import Layout

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp", reason="no wheel of xllamacpp here", exc_type=ImportError)

BOUND = 1e-4
BOUND_OF_GELU = 2e-3  # which ggml takes from a table in half precision: a base is as far off alone
IDS = [[1, 5, 9, 3, 7, 2], [1, 40]]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
# Class of the configuration and what it has besides: one of each model type that is written for.
MODELS = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "moe_intermediate_size": 24, "norm_topk_prob": True}),
    "olmoe": ("Olmoe", {**EXPERTS, "num_key_value_heads": 4}),
    "granite": ("Granite", {"logits_scaling": 0.5, "residual_multiplier": 0.5}),
    "smollm3": ("SmolLM3", {}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "gemma3_text": ("Gemma3Text", {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "olmo2": ("Olmo2", {}),
    "phi3": ("Phi3", {}),
    "arcee": ("Arcee", {}),
    "seed_oss": ("SeedOss", {"head_dim": 16}),
}
SHIFTED = ("gemma", "gemma2", "gemma3_text")  # whose norms are stored less 1
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CHILD = """
import json, sys, xllamacpp
said = json.load(sys.stdin)
p = xllamacpp.CommonParams()
p.model.path = said["base"]
p.n_ctx, p.n_parallel, p.warmup, p.verbosity = 256, 1, False, 0
p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
p.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in said["adapters"]]
p.lora_init_without_apply = True
server = xllamacpp.Server(p)
found = []
for ids, scales in said["requests"]:
    answer = server.handle_completions({
        "prompt": ids, "n_predict": 1, "n_probs": said["vocab"], "temperature": 0.0,
        "cache_prompt": False,
        "lora": [{"id": k, "scale": c} for k, c in enumerate(scales)],
    })
    top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    assert len(top) == said["vocab"], len(top)
    found.append([x["logprob"] for x in sorted(top, key=lambda x: x["id"])])
print("\\n" + json.dumps(found))
"""


def of_llama_cpp(base, adapters, requests, vocab=64):
    """(requests, vocab): log-probabilities of the next token of each (ids, scales)."""
    said = {"base": str(base), "adapters": list(map(str, adapters)), "requests": requests}
    ran = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps({**said, "vocab": vocab}),
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, f"{ran.returncode}: {ran.stderr[-2000:]}"
    return torch.tensor(json.loads(ran.stdout.splitlines()[-1]))


class Peers:
    """A tiny base in both forms, and what transformers and PEFT make of it.

    Args:
        folder: to work in. name: its model type. more: of its configuration.
    """

    def __init__(self, folder, name, **more):
        self.folder, self.name = folder, name
        stem, own = MODELS[name]
        config = getattr(transformers, f"{stem}Config")(
            **{**SIZES, "tie_word_embeddings": name in SHIFTED, **own, **more}
        )
        torch.manual_seed(0)
        self.model = transformers.AutoModelForCausalLM.from_config(config)
        for p in self.model.parameters():  # so that what is added to it shows
            p.data.mul_(8) if p.ndim > 1 else p.data.add_(0.1 * torch.randn(p.shape))
        self.base = folder / "base"
        self.model.save_pretrained(self.base)
        self.gguf = folder / "base.gguf"
        write_base(self.gguf, name, self.model)
        self.count = 0

    def fresh(self):
        return transformers.AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)

    def adapter(self, seed=1, **options):
        """A folder as PEFT writes it, of factors that are not zero; and the same as GGUF."""
        self.count += 1
        place = self.folder / f"peft{self.count}"
        torch.manual_seed(seed)
        said = {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, **options}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(self.fresh(), peft.LoraConfig(**said))
            for key, p in model.named_parameters():
                if "lora_" in key:
                    p.data = 0.15 * torch.randn(p.shape)
            model.save_pretrained(place)
        target = self.folder / f"{place.name}.gguf"
        lf.save(lf.load(place), target, format="gguf", base=self.base)
        return place, target

    def of_peft(self, places, requests):
        """As `of_llama_cpp` gives it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(self.fresh(), str(places[0]), "0").eval()
            for k, place in enumerate(places[1:], 1):
                model.load_adapter(str(place), str(k))
        layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
        plain = [dict(layer.scaling) for layer in layers]
        found = []
        model.base_model.set_adapter([str(k) for k in range(len(places))])
        for ids, scales in requests:
            for layer, own in zip(layers, plain, strict=True):
                for k, c in enumerate(scales):
                    if str(k) in own:
                        layer.scaling[str(k)] = own[str(k)] * c
            with torch.no_grad():
                found.append(model(torch.tensor([ids])).logits[0, -1].log_softmax(-1))
        return torch.stack(found)


def write_base(path, name, model):
    """A base as llama.cpp's converter writes it, in float32."""
    config = model.config
    arch = next(a for a in ARCHITECTURES.values() if name in a.models)
    w = gguf.GGUFWriter(path, arch.name)
    w.add_type("model")
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    w.add_block_count(layers)
    w.add_context_length(128)
    w.add_embedding_length(config.hidden_size)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_head_count(heads)
    w.add_head_count_kv(config.num_key_value_heads)
    w.add_key_length(width)
    w.add_value_length(width)
    w.add_layer_norm_rms_eps(config.rms_norm_eps)
    w.add_rope_dimension_count(width)
    rope = config.rope_parameters
    w.add_rope_freq_base((rope.get("full_attention") or rope)["rope_theta"])
    w.add_vocab_size(config.vocab_size)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        w.add_expert_count(experts)
        w.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        w.add_expert_feed_forward_length(config.moe_intermediate_size)
    if name == "granite":
        w.add_logit_scale(config.logits_scaling)
        w.add_attention_scale(config.attention_multiplier)
        w.add_embedding_scale(config.embedding_multiplier)
        w.add_residual_scale(config.residual_multiplier)
    if name == "phi3":
        w.add_rope_scaling_orig_ctx_len(128)
        w.add_sliding_window(0)
    if name == "gemma3_text":
        w.add_sliding_window(config.sliding_window)
        w.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    if name == "gemma2":
        w.add_attn_logit_softcapping(config.attn_logit_softcapping)
        w.add_final_logit_softcapping(config.final_logit_softcapping)
        w.add_sliding_window(config.sliding_window)
    tokens = [b"<unk>", b"<s>", b"</s>", *(b"t%d" % i for i in range(config.vocab_size - 3))]
    w.add_tokenizer_model("llama")
    w.add_token_list(tokens)
    w.add_token_scores([0.0] * len(tokens))
    w.add_token_types([2, 3, 3, *[1] * (len(tokens) - 3)])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    number = next(n for n, there in gguf.MODEL_ARCH_NAMES.items() if there == arch.name)
    names = gguf.get_tensor_name_map(number, layers)
    for key, t in base_tensors(model, name).items():
        there = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert there, key
        if arch.permuted and key.endswith(("q_proj.weight", "k_proj.weight")):
            n = heads if "q_proj" in key else config.num_key_value_heads
            rows = t.reshape(n, 2, -1, t.shape[1]).transpose(1, 2).reshape(t.shape)
        else:
            rows = t
        w.add_tensor(there, np.ascontiguousarray(rows.float().numpy()))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def base_tensors(model, name):
    """{key: tensor}, experts apart, each kind of them stacked."""
    found = {}
    for key, t in model.state_dict().items():
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if key.endswith("experts.gate_up_proj"):
            gate, up = t.chunk(2, 1)
            owner = key.removesuffix("gate_up_proj")
            found[f"{owner}gate_proj.weight"], found[f"{owner}up_proj.weight"] = gate, up
        elif key.endswith("experts.down_proj"):
            found[f"{key}.weight"] = t
        else:
            shifted = name in SHIFTED and key.endswith("norm.weight")
            found[key] = t + 1 if shifted else t
    return found


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    made = {}

    def of(name, **more):
        key = name, *more.items()
        if key not in made:
            made[key] = Peers(tmp_path_factory.mktemp(name), name, **more)
        return made[key]

    return of


ALL = [0.0, 0.5, 1.0, -1.0]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.form("gguf", "written", by="llama.cpp")
@pytest.mark.form("gguf", "read", by="llama.cpp")
def test_every_architecture_that_is_written_for(name, peers):
    p = peers(name)
    options = {}
    if name in ("mixtral", "qwen3_moe", "olmoe"):
        options = {"target_modules": LINEAR[:4]}
        options["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    if name == "phi3":
        options = {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}
    place, target = p.adapter(**options)
    again = p.folder / "again.gguf"
    lf.save(lf.load(target, base=p.base), again, format="gguf", base=p.base)
    requests = [(ids, [c, 0.0]) for ids in IDS for c in ALL]
    found = of_llama_cpp(p.gguf, [target, again], [*requests, (IDS[0], [0.0, 1.0])])
    expected = p.of_peft([place], requests)
    assert (expected[2] - expected[0]).abs().max() > 1
    bound = BOUND_OF_GELU if name in SHIFTED else BOUND
    assert (found[:-1] - expected).abs().max() < bound
    assert torch.equal(found[-1], found[2])  # what was read and written anew is the same
    plain = of_llama_cpp(p.gguf, [], [(ids, []) for ids in IDS])
    assert torch.equal(plain, found[:-1][:: len(ALL)])  # at 0 it is as if it were not there


def test_two_adapters_at_once_of_other_ranks_and_scales(peers):
    """Each module has a rank and a scale of its own, and q is not square: 2 heads of 16 on 32."""
    p = peers("llama", head_dim=16, num_attention_heads=4)
    a = p.adapter(
        rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 7}, alpha_pattern={"k_proj": 1}
    )
    b = p.adapter(seed=2, r=1, lora_alpha=3, target_modules=["v_proj", "q_proj"], use_rslora=True)
    scales = [(0.7, -0.4), (0, 1), (1, 0), (1, 1)]
    requests = [(ids, list(pair)) for ids in IDS for pair in scales]
    found = of_llama_cpp(p.gguf, [a[1], b[1]], requests)
    expected = p.of_peft([a[0], b[0]], requests)
    assert (found - expected).abs().max() < BOUND
    assert (expected[0] - expected[1]).abs().max() > 0.3
    tensors = {t.name: t.shape for t in gguf.GGUFReader(a[1]).tensors}
    assert list(tensors["blk.0.attn_q.weight.lora_b"]) == [2, 64]
    assert list(tensors["blk.1.ffn_up.weight.lora_a"]) == [32, 7]


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_embedding_and_head_of_an_untied_base(name, peers):
    p = peers(name)
    place, target = p.adapter(target_modules=["embed_tokens", "lm_head", "k_proj"])
    requests = [(ids, [c]) for ids in IDS for c in ALL]
    found, expected = of_llama_cpp(p.gguf, [target], requests), p.of_peft([place], requests)
    assert (expected[2] - expected[0]).abs().max() > 0.5
    assert (found - expected).abs().max() < BOUND


def test_a_tied_base(peers):
    """What changes other modules is right; embedding and head are refused: llama.cpp aborts."""
    p = peers("qwen2", tie_word_embeddings=True)
    place, target = p.adapter()
    requests = [(ids, [c]) for ids in IDS for c in ALL]
    found, expected = of_llama_cpp(p.gguf, [target], requests), p.of_peft([place], requests)
    assert (found - expected).abs().max() < BOUND
    u = lf.LowRank(0.1 * torch.randn(2, 64), torch.randn(32, 2))
    one = lf.Adapter({"model.embed_tokens": u}, layouts={"model.embed_tokens": Layout("embedding")})
    with pytest.raises(RefusedError, match="one weight for embedding and output layer"):
        lf.save(one, p.folder / "no.gguf", format="gguf", base=p.base)
    untied = peers("qwen2").base
    lf.save(one, p.folder / "no.gguf", format="gguf", base=untied)
    with pytest.raises(AssertionError):  # so that the refusal has its reason
        of_llama_cpp(p.gguf, [p.folder / "no.gguf"], [(IDS[0], [1.0])])


def test_without_the_permutation_it_would_be_another_adapter(peers, monkeypatch):
    p = peers("llama")
    place, target = p.adapter(seed=3, target_modules=["q_proj", "k_proj"])
    monkeypatch.setattr("lorafold.files.formats.gguf.writing.permuted", lambda B, heads: B)
    wrong = p.folder / "wrong.gguf"
    lf.save(lf.load(place), wrong, format="gguf", base=p.base)
    requests = [(IDS[0], [1.0, 0.0]), (IDS[0], [0.0, 1.0])]
    found = of_llama_cpp(p.gguf, [target, wrong], requests)
    expected = p.of_peft([place], [(IDS[0], [1.0])])
    assert (found[0] - expected[0]).abs().max() < BOUND
    assert (found[1] - expected[0]).abs().max() > 0.1


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2e-2), (torch.bfloat16, 2e-1)])
def test_half_precision_is_read_too(dtype, bound, peers):
    p = peers("llama")
    place, _ = p.adapter(seed=4)
    half = p.folder / "half.gguf"
    lf.save(lf.load(place), half, format="gguf", base=p.base, dtype=dtype, overwrite=True)
    requests = [(IDS[0], [1.0])]
    off = (of_llama_cpp(p.gguf, [half], requests) - p.of_peft([place], requests)).abs().max()
    assert BOUND < off < bound


def test_the_table_has_the_names_of_ggufs_own():
    for arch in ARCHITECTURES.values():
        table = names_of(arch)
        for there, usual in arch.usual.items():
            assert table[usual] == there
    assert set(MODELS) == {model for arch in ARCHITECTURES.values() for model in arch.models}
