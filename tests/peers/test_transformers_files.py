"""Checkpoints as transformers writes them, merged into, against the model that PEFT runs.

Its files and its modules differ in names and layout (prefixes, words, experts one by one, q k v in
one tensor, tied weights). What is loaded from the merged folder has to be the adapted model.
"""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file

import lorafold as lf
from lorafold.files.base import BaseFiles, read_base
from lorafold.files.disk.header import Entry

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TEXT = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50,
}
GQA = {"num_key_value_heads": 2}
IDS = {"input_ids": torch.tensor([[1, 2, 3, 5, 6, 7]])}


def llama(tie=False):
    config = transformers.LlamaConfig(**TEXT, **GQA, tie_word_embeddings=tie)
    return transformers.LlamaForCausalLM(config), IDS


def gpt2(tie=True):
    config = transformers.GPT2Config(
        n_embd=24, n_layer=2, n_head=2, vocab_size=50, n_positions=32, tie_word_embeddings=tie
    )
    return transformers.GPT2LMHeadModel(config), IDS


def neox(tie=False):
    config = transformers.GPTNeoXConfig(**TEXT, tie_word_embeddings=tie)
    return transformers.GPTNeoXForCausalLM(config), IDS


def llava(tie=False):
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**TEXT, **GQA, tie_word_embeddings=tie),
        image_token_index=49,
        tie_word_embeddings=tie,
        vision_feature_layer=-1,
    )
    inputs = {
        "input_ids": torch.tensor([[1, 49, 49, 49, 49, 5, 6, 7]]),
        "pixel_values": torch.randn(1, 3, 16, 16),
    }
    return transformers.LlavaForConditionalGeneration(config), inputs


def qwen_vl(tie=False):
    config = transformers.Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 24,
            "patch_size": 8,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        text_config={
            **TEXT,
            **GQA,
            "tie_word_embeddings": tie,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]},
        },
        tie_word_embeddings=tie,
        image_token_id=49,
        video_token_id=48,
        vision_start_token_id=47,
    )
    inputs = {
        "input_ids": torch.tensor([[1, 47, 49, 49, 49, 49, 5, 6, 7]]),
        "mm_token_type_ids": torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 0]]),
        "pixel_values": torch.randn(16, 3 * 2 * 64),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    return transformers.Qwen2_5_VLForConditionalGeneration(config), inputs


def mixtral(tie=False):
    config = transformers.MixtralConfig(**TEXT, **GQA, num_local_experts=4, tie_word_embeddings=tie)
    return transformers.MixtralForCausalLM(config), IDS


def qwen_moe(tie=False):
    config = transformers.Qwen3MoeConfig(
        **TEXT,
        **GQA,
        head_dim=12,
        moe_intermediate_size=12,  # so that gate and up together are square
        num_experts=4,
        num_experts_per_tok=2,
        tie_word_embeddings=tie,
    )
    return transformers.Qwen3MoeForCausalLM(config), IDS


def vit(tie=False):
    del tie
    sizes = {k: TEXT[k] for k in TEXT if k != "vocab_size"}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8)
    return transformers.ViTForImageClassification(config), {
        "pixel_values": torch.randn(1, 3, 16, 16)
    }


def bert(tie=True):
    config = transformers.BertConfig(**TEXT, tie_word_embeddings=tie)
    return transformers.BertForMaskedLM(config), IDS


def roberta(tie=True):
    config = transformers.RobertaConfig(
        **TEXT, pad_token_id=0, max_position_embeddings=40, tie_word_embeddings=tie
    )
    return transformers.RobertaForMaskedLM(config), IDS


def distilbert(tie=True):
    config = transformers.DistilBertConfig(
        dim=24, hidden_dim=40, n_layers=2, n_heads=2, vocab_size=50, tie_word_embeddings=tie
    )
    return transformers.DistilBertForMaskedLM(config), IDS


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TOWERS = ["q_proj", "v_proj", "fc1", "down_proj", "linear_1"]


def run(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


def adapted(make, folder, tie, **config):
    """A base on the disk, an adapter trained on it, and the logits with and without it."""
    torch.manual_seed(0)
    model, inputs = make() if tie is None else make(tie)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data.normal_(0, 0.3)  # zeros would hide one that is lost
    model.save_pretrained(folder / "base")
    plain = run(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tied weights, fan_in_fan_out
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, **config))
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                p.data.normal_(0, 0.15)
            elif "modules_to_save" in name or "trainable_tokens_delta" in name:
                p.data.add_(0.3 * torch.randn_like(p))
        wanted = run(wrapped, inputs)
        wrapped.save_pretrained(folder / "adapter")
    assert (wanted - plain).abs().max() > 0.02  # the comparison can fail
    return lf.load(folder / "adapter"), inputs, wanted


def loaded(make, folder):
    return type(make()[0]).from_pretrained(folder)


@pytest.mark.parametrize(
    ("make", "config", "changed"),
    [
        (llama, {"target_modules": ["q_proj", "down_proj"]}, 4),
        (llava, {"target_modules": TOWERS}, 13),
        (qwen_vl, {"target_modules": ["q_proj", "qkv", "down_proj", "proj"]}, 11),
        (mixtral, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}, 2 + 24),
        (mixtral, {"target_modules": [], "target_parameters": [*EXPERTS, "mlp.gate.weight"]}, 26),
        (qwen_moe, {"target_modules": [], "target_parameters": EXPERTS}, 24),
        (neox, {"target_modules": ["query_key_value", "lm_head"]}, 3),
        (
            vit,
            {
                "target_modules": ["q_proj", "v_proj", "o_proj", "fc1", "fc2"],
                "modules_to_save": ["classifier"],
            },
            12,
        ),
    ],
)
def test_a_merged_checkpoint_is_the_adapted_model(make, config, changed, tmp_path):
    adapter, inputs, wanted = adapted(make, tmp_path, None, **config)
    merged = lf.merge_into_weights(tmp_path / "base", adapter, tmp_path / "out")
    assert (merged.unplaced, merged.untied, len(merged.changed)) == ({}, None, changed)
    found = run(loaded(make, tmp_path / "out"), inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    base, out = (load_file(tmp_path / f / "model.safetensors") for f in ("base", "out"))
    assert list(base) == list(out)
    # Half of the way, as the attached model runs it.
    lf.merge_into_weights(tmp_path / "base", adapter, tmp_path / "half", c=0.5)
    half = load_file(tmp_path / "half" / "model.safetensors")
    for key, W in base.items():
        torch.testing.assert_close(half[key], (W + out[key]) / 2, rtol=1e-5, atol=1e-6)


TOKENS = {
    "target_modules": ["q_proj"],
    "trainable_token_indices": {"embed_tokens": [1, 3], "lm_head": [1, 4]},
}
EMBEDDINGS = {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("make", "config", "head"),
    [
        (llama, {"target_modules": ["embed_tokens", "q_proj"]}, "lm_head"),
        (llama, {"target_modules": ["lm_head", "q_proj"]}, "lm_head"),
        (llama, {"target_modules": ["lm_head", "embed_tokens"]}, "lm_head"),
        (llama, EMBEDDINGS, "lm_head"),
        (llama, EMBEDDINGS | {"modules_to_save": ["embed_tokens"]}, "lm_head"),
        (llama, EMBEDDINGS | {"modules_to_save": ["lm_head"]}, "lm_head"),
        (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [2, 5]}, None),
        (llama, TOKENS | {"trainable_token_indices": {"lm_head": [1, 4]}}, "lm_head"),
        (llama, TOKENS, "lm_head"),
        (llama, TOKENS | {"trainable_token_indices": {"lm_head": [1], "embed_tokens": [1]}}, None),
        (qwen_vl, {"target_modules": ["lm_head", "q_proj"]}, "lm_head"),
        (llava, {"target_modules": ["embed_tokens", "q_proj"]}, "language_model.lm_head"),
        (llava, {"target_modules": ["lm_head", "q_proj"]}, "language_model.lm_head"),
        (gpt2, {"target_modules": ["wte"]}, "lm_head"),
        (gpt2, {"target_modules": ["lm_head"]}, "lm_head"),
        (bert, {"target_modules": ["word_embeddings"]}, "cls.predictions.decoder"),
        (bert, {"target_modules": ["decoder"]}, "cls.predictions.decoder"),
        (roberta, {"target_modules": ["word_embeddings"]}, "lm_head.decoder"),
        (distilbert, {"target_modules": ["word_embeddings"]}, "vocab_projector"),
    ],
)
def test_tied_weights_part_where_they_differ(make, config, head, tmp_path):
    adapter, inputs, wanted = adapted(make, tmp_path, True, **config)
    merged = lf.merge_into_weights(tmp_path / "base", adapter, tmp_path / "out")
    assert merged.untied == (head and f"{head}.weight")
    twin = loaded(make, tmp_path / "out")
    torch.testing.assert_close(run(twin, inputs), wanted, rtol=1e-5, atol=1e-5)
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["tie_word_embeddings"] is (head is None)
    ties = twin.get_input_embeddings().weight is twin.get_output_embeddings().weight
    assert ties is (head is None)


def mamba(tie=True):
    config = transformers.MambaConfig(
        hidden_size=24, num_hidden_layers=2, vocab_size=50, state_size=4, tie_word_embeddings=tie
    )
    return transformers.MambaForCausalLM(config), IDS


def modernbert(tie=True):
    config = transformers.ModernBertConfig(
        **TEXT, pad_token_id=0, global_attn_every_n_layers=2, tie_word_embeddings=tie
    )
    return transformers.ModernBertForMaskedLM(config), IDS


def xlm(tie=True):
    config = transformers.XLMConfig(
        vocab_size=50, emb_dim=24, n_layers=2, n_heads=2, tie_word_embeddings=tie
    )
    return transformers.XLMWithLMHeadModel(config), IDS


def xlnet(tie=True):
    config = transformers.XLNetConfig(
        d_model=24, n_layer=2, n_head=2, d_inner=40, vocab_size=50, tie_word_embeddings=tie
    )
    return transformers.XLNetLMHeadModel(config), IDS


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("make", "embedding", "other", "head"),
    [
        (mamba, "backbone.embeddings", "in_proj", "lm_head"),
        (modernbert, "tok_embeddings", "Wqkv", "decoder"),
        (xlm, "transformer.embeddings", "q_lin", "pred_layer.proj"),
        (xlnet, "word_embedding", "layer_1", "lm_loss"),
    ],
)
def test_embeddings_and_heads_of_other_names(make, embedding, other, head, whole, tmp_path):
    config = {"target_modules": [embedding, head]}
    if whole:
        config = {"target_modules": [other], "modules_to_save": [embedding]}
    adapter, inputs, wanted = adapted(make, tmp_path, True, **config)
    merged = lf.merge_into_weights(tmp_path / "base", adapter, tmp_path / "out")
    assert merged.untied == f"{head}.weight"
    twin = loaded(make, tmp_path / "out")
    torch.testing.assert_close(run(twin, inputs), wanted, rtol=1e-5, atol=1e-5)


def tied_classes():
    """(class, embedding, what transformers ties to it) of every model that has such a thing."""
    from transformers.models.auto import modeling_auto

    tables = [v for k, v in vars(modeling_auto).items() if k.endswith("_MAPPING_NAMES")]
    names = {n for t in tables for v in t.values() for n in ([v] if isinstance(v, str) else v)}
    for name in sorted(names):
        ties = getattr(getattr(transformers, name, None), "_tied_weights_keys", None)
        for embedding in sorted(set(ties.values())) if isinstance(ties, dict) else ():
            if re.search(r"(embed[a-z_]*|shared|wte)\.weight$", embedding):
                yield name, embedding, [key for key, like in ties.items() if like == embedding]


def test_what_is_tied_to_an_embedding_is_what_transformers_ties():
    """Or it is said that it isn't known; never another name, which would be read as nothing."""
    known = 0
    for name, embedding, heads in tied_classes():
        config = {"architectures": [name], "tie_word_embeddings": True}
        entry = Entry("F32", (3, 2), 0, 24)
        tied = BaseFiles("base", {embedding: entry}, config=config).named().tied
        if tied is None:
            # Of encoders and of bodies, which other names hold in the files.
            assert name.endswith("Model") or name in NOT_VOCABULARY, name
        else:
            assert tied[1] == embedding, name
            assert tied[0] in ("", *heads[: len(heads) == 1]), name
            known += tied[0] != ""
    assert known > 200


NOT_VOCABULARY = {"LukeForMaskedLM", "NeoMMEForMaskedLM", "UdopForConditionalGeneration"}


def test_equal_copies_of_tied_weights_stay_tied(tmp_path):
    torch.manual_seed(0)
    model, inputs = llama(True)
    model.save_pretrained(tmp_path / "base")
    new = torch.randn(50, 24)
    prefix = "base_model.model."
    extras = {f"{prefix}model.embed_tokens.weight": new, f"{prefix}lm_head.weight": new.clone()}
    adapter = lf.Adapter({}, extras, {"modules_to_save": ["embed_tokens", "lm_head"]})
    merged = lf.merge_into_weights(tmp_path / "base", adapter, tmp_path / "out")
    assert merged.untied is None
    twin = loaded(llama, tmp_path / "out")
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    model.lm_head.weight.data.copy_(new)
    torch.testing.assert_close(run(twin, inputs), run(model, inputs))


@pytest.mark.parametrize(
    "make", [llama, gpt2, neox, llava, qwen_vl, mixtral, qwen_moe, vit, distilbert]
)
def test_every_tensor_in_memory_is_found_in_the_files(make, tmp_path):
    """What the pieces hold, put together, is the tensor that the model has."""
    torch.manual_seed(0)
    model = make()[0]
    for p in model.parameters():
        p.data.normal_()  # no two alike
    model.save_pretrained(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    state = model.state_dict()
    base = read_base(str(tmp_path)).named(state)
    for name, W in state.items():
        held = base.find(name)
        assert held is not None, name
        assert held.shape == tuple(W.shape)
        found = torch.full_like(W, torch.nan)
        for piece in held.pieces:
            part = found if piece.expert is None else found[piece.expert]
            part = part if piece.rows is None else part[slice(*piece.rows)]
            there = files[piece.like or piece.key]
            part.copy_(there if piece.into is None else there[slice(*piece.into)])
        assert torch.equal(found, W), name


def test_what_no_rule_knows_has_no_place(tmp_path):
    """A renamed tensor is no reason to write something else."""
    adapter, _, _ = adapted(llava, tmp_path, None, target_modules=TOWERS)
    path = tmp_path / "base" / "model.safetensors"
    state = load_file(path)
    from safetensors.torch import save_file

    moved = {k.replace("vision_tower.encoder", "tower.stack"): t for k, t in state.items()}
    save_file(moved, path)
    with pytest.raises(lf.MismatchError, match=r"\d+ parts .* 'model\.vision_tower\.encoder"):
        lf.merge_into_weights(tmp_path / "base", adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merged = lf.merge_into_weights(tmp_path / "base", adapter, tmp_path / "out", partial=True)
    assert all(path.startswith("model.vision_tower.encoder") for path in merged.unplaced)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[k], t) for k, t in moved.items() if "tower.stack" in k)
