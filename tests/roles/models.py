"""A tiny random model of every architecture whose roles are told, and how many layers it has."""

import torch
import transformers

HEADS, WIDTH = 4, 32
PLAIN = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "vocab_size": 64,
}
GROUPED = {**PLAIN, "num_key_value_heads": 2}
HERE = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PIXELS = {"image_size": 8, "patch_size": 4}
EXPERTS = {"num_experts": 3, "moe_intermediate_size": 16}
GPT = {"n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "vocab_size": 64, "n_positions": 32, **HERE}
FALCON = {k: v for k, v in PLAIN.items() if k != "intermediate_size"}
DISTIL = {"dim": WIDTH, "n_layers": 2, "n_heads": HEADS, "hidden_dim": 48, "vocab_size": 64}
T5 = {"d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": HEADS}
TOWER = {k: v for k, v in PLAIN.items() if k != "vocab_size"}
WHISPER = {
    **{"d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 64},
    **{"encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS},
    **{"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_source_positions": 16},
    **{"max_target_positions": 16, "decoder_start_token_id": 1},
}

# name: (configuration, its fields, model)
ARCHITECTURES = {
    "llama": ("LlamaConfig", GROUPED, "LlamaForCausalLM"),
    "mistral": ("MistralConfig", GROUPED, "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", GROUPED, "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 16}, "Qwen3ForCausalLM"),
    "gemma": ("GemmaConfig", {**GROUPED, "head_dim": 16}, "GemmaForCausalLM"),
    "gemma2": ("Gemma2Config", {**GROUPED, "head_dim": 16}, "Gemma2ForCausalLM"),
    "phi3": ("Phi3Config", {**GROUPED, **HERE, "rms_norm_eps": 1e-6}, "Phi3ForCausalLM"),
    "gpt2": ("GPT2Config", GPT, "GPT2LMHeadModel"),
    "gpt2 cross": ("GPT2Config", {**GPT, "add_cross_attention": True}, "GPT2LMHeadModel"),
    "gpt_neox": ("GPTNeoXConfig", {**PLAIN, **HERE}, "GPTNeoXForCausalLM"),
    "gptj": ("GPTJConfig", {**GPT, "rotary_dim": 4}, "GPTJForCausalLM"),
    "opt": (
        "OPTConfig",
        {**FALCON, "ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
        "OPTForCausalLM",
    ),
    "bloom": ("BloomConfig", {**GPT, "hidden_size": WIDTH}, "BloomForCausalLM"),
    "falcon": ("FalconConfig", {**FALCON, **HERE}, "FalconForCausalLM"),
    "falcon heads": (
        "FalconConfig",
        {**FALCON, **HERE, "multi_query": False, "alibi": True},
        "FalconForCausalLM",
    ),
    "falcon new": (
        "FalconConfig",
        {**FALCON, **HERE, "new_decoder_architecture": True, "num_kv_heads": 2},
        "FalconForCausalLM",
    ),
    "bert": ("BertConfig", PLAIN, "BertForPreTraining"),
    "bert classifier": ("BertConfig", PLAIN, "BertForSequenceClassification"),
    "bert decoder": (
        "BertConfig",
        {**PLAIN, "is_decoder": True, "add_cross_attention": True},
        "BertLMHeadModel",
    ),
    "distilbert": ("DistilBertConfig", DISTIL, "DistilBertForMaskedLM"),
    "distilbert classifier": ("DistilBertConfig", DISTIL, "DistilBertForSequenceClassification"),
    "roberta": ("RobertaConfig", {**PLAIN, "pad_token_id": 0}, "RobertaForMaskedLM"),
    "roberta classifier": (
        "RobertaConfig",
        {**PLAIN, "pad_token_id": 0},
        "RobertaForSequenceClassification",
    ),
    "mpnet": ("MPNetConfig", PLAIN, "MPNetForMaskedLM"),
    "t5": ("T5Config", {**T5, "vocab_size": 64}, "T5ForConditionalGeneration"),
    "t5 gated": (
        "T5Config",
        {**T5, "vocab_size": 64, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        "T5ForConditionalGeneration",
    ),
    "vit": ("ViTConfig", {**TOWER, **PIXELS}, "ViTForImageClassification"),
    "vit body": ("ViTConfig", {**TOWER, **PIXELS}, "ViTModel"),
    "clip": (
        "CLIPConfig",
        {
            "text_config": {**PLAIN, **HERE},
            "vision_config": {**TOWER, **PIXELS},
            "projection_dim": 16,
        },
        "CLIPModel",
    ),
    "whisper": ("WhisperConfig", {**WHISPER, **HERE}, "WhisperForConditionalGeneration"),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 3}, "MixtralForCausalLM"),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 24},
        "Qwen2MoeForCausalLM",
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**GROUPED, **EXPERTS, "head_dim": 8, "mlp_only_layers": [0]},
        "Qwen3MoeForCausalLM",
    ),
}


def config_of(name):
    """The configuration of an architecture."""
    config, fields, _ = ARCHITECTURES[name]
    return getattr(transformers, config)(**fields)


def model_of(name, device="cpu", seed=0):
    """A random model of an architecture."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with torch.device(device):
            return getattr(transformers, ARCHITECTURES[name][2])(config_of(name)).eval()


def inputs_of(name, seed=1):
    """What the model of an architecture is run on."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (2, 7), generator=generator)
    kind = name.split()[0]
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    if kind == "clip":
        return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    if kind == "whisper":
        features = torch.randn(2, 80, 32, generator=generator)
        return {"input_features": features, "decoder_input_ids": ids}
    if kind == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids}
    if name in ("gpt2 cross", "bert decoder"):
        states = torch.randn(2, 5, WIDTH, generator=generator)
        return {"input_ids": ids, "encoder_hidden_states": states}
    return {"input_ids": ids}


def output_of(model, inputs):
    """All floating-point tensors that a model gives, in one."""
    with torch.no_grad():
        found = model(**inputs)
    return torch.cat([t.flatten() for t in found.values() if isinstance(t, torch.Tensor)])
