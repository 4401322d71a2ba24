"""Options, and config files of three dialects that say the same."""

import sys

import pytest

import lorafold as lf
from lorafold.train.job.dialects import read_config
from lorafold.train.job.recipe import Recipe

pytest.importorskip("yaml")
BARE = {"base": "demo", "data": ["a.jsonl"], "output": "out"}

OURS = """
base: models/llama
data: [a.jsonl, b.jsonl]
output: out
rank: 32
alpha: 16
dropout: 0.05
targets: all-linear
epochs: 4
batch: 2
accumulate: 4
lr: 2e-4
schedule: cosine
warmup: 0.1
held-out: 0.05
max-length: 4096
packing: true
lora-plus: 16
quantize: nf4
gradient_checkpointing: true
weight_decay: 0.0
"""
AXOLOTL = """
base_model: models/llama
model_type: AutoModelForCausalLM
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: a.jsonl
    type: completion
  - path: b.jsonl
val_set_size: 0.05
output_dir: out
adapter: qlora
lora_model_dir:
sequence_len: 4096
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
wandb_project:
wandb_entity: us
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
resume_from_checkpoint:
logging_steps: 1
attn_implementation: flash_attention_2
warmup_ratio: 0.1
loraplus_lr_ratio: 16
weight_decay: 0.0
"""
FACTORY = """
model_name_or_path: models/llama
stage: sft
do_train: true
finetuning_type: lora
quantization_bit: 4
quantization_method: bnb
lora_rank: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target: all
dataset: a.jsonl, b.jsonl
template: llama3
cutoff_len: 4096
packing: true
output_dir: out
logging_steps: 10
plot_loss: true
overwrite_output_dir: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
learning_rate: 2.0e-4
num_train_epochs: 4.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
val_size: 0.05
loraplus_lr_ratio: 16.0
disable_gradient_checkpointing: false
weight_decay: 0.0
"""


def config(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return read_config(str(path))


def test_three_dialects_say_the_same(tmp_path):
    recipes = [Recipe.of(config(tmp_path, t).options) for t in (OURS, AXOLOTL, FACTORY)]
    assert recipes[0] == recipes[1] == recipes[2]
    assert recipes[0] != Recipe.of(BARE)
    assert recipes[0].data == ("a.jsonl", "b.jsonl")
    axolotl, factory = config(tmp_path, AXOLOTL), config(tmp_path, FACTORY)
    assert axolotl.renamed["lora_r"] == "rank"
    assert set(axolotl.idle) == {
        "model_type", "wandb_entity", "optimizer", "logging_steps", "attn_implementation",
    }  # fmt: skip
    assert set(factory.idle) == {"template", "logging_steps", "plot_loss", "overwrite_output_dir"}


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("rnak: 3", lf.UnknownNameError, "line 1: there is no option 'rnak'; did you mean 'rank'"),
        ("deepspeed: z3.json", lf.UnknownNameError, "no option 'deepspeed'"),
        ("rank: 0", lf.MismatchError, "line 1: rank must be a whole number of at least 1, found 0"),
        ("rank: true", lf.MismatchError, "rank must be a whole number"),
        ("lora_r: x", lf.MismatchError, "line 1: rank must be a whole number"),
        ("\nlr: fast", lf.MismatchError, "line 2: lr must be a number above 0"),
        ("rank: 3\nlora_r: 4", lf.MismatchError, "lora_r and rank say different things of rank"),
        ("stage: dpo", lf.MismatchError, "stage must be 'sft' here, found 'dpo'"),
        ("finetuning_type: full", lf.MismatchError, "finetuning_type must be 'lora'"),
        ("adapter: ia3", lf.MismatchError, "adapter must be 'lora' or 'qlora'"),
        ("use_dora: true", lf.MismatchError, "use_dora must be False here"),
        ("optimizer: lion", lf.MismatchError, "optimizer: only AdamW is here"),
        ("val_set_size: 500", lf.MismatchError, "val_set_size must be a share"),
        ("datasets:\n - path: a\n   type: alpaca", lf.MismatchError, "type 'alpaca' is not read"),
        ("datasets:\n - path: a\n   shards: 3", lf.MismatchError, "'shards' of a file can't be"),
        ("[1, 2]", lf.MismatchError, "must hold options"),
        ("rank: 3\nrank: 4", lf.FileError, "'rank' is there twice"),
        ("a: [", lf.FileError, "line 1"),
    ],
)
def test_what_a_file_can_t_say(text, error, says, tmp_path):
    with pytest.raises(error, match=rf"config.yaml: .*{says}"):
        config(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("lora_target_modules: [q_proj, v_proj]", {"targets": ("q_proj", "v_proj")}),
        ("targets: q_proj, v_proj", {"targets": ("q_proj", "v_proj")}),
        ("betas: .9,.95", {"betas": (0.9, 0.95)}),
        ("adam_beta2: 0.95", {"betas": (0.9, 0.95)}),
        ("nested: 1,2,4", {"nested": (1, 2, 4)}),
        ("load_in_8bit: true\nadapter: lora", {"quantize": "int8"}),
        ("quantization_bit: 8", {"quantize": "int8"}),
        ("quantization_bit: 4\nquantization_type: fp4", {"quantize": "fp4"}),
        ("pissa_init: true\npissa_iter: 8", {"init": "pissa_niter_8"}),
        ("peft_init_lora_weights: pissa", {"init": "pissa"}),
        ("max_steps: -1", {}),
        ("max_steps: 12", {"steps": 12}),
        ("lr_scheduler: constant_with_warmup", {"schedule": "constant"}),
        ("train_on_inputs: true", {"train_on_prompts": True}),
        ("bf16: auto", {}),
        ("bf16: true", {"bf16": True}),
        ("fp16: false", {}),
        ("datasets:\n - path: a\n   field_messages: chat", {
            "data": ("a",), "columns": {"messages": "chat"},
        }),
    ],
)  # fmt: skip
def test_what_theirs_means(text, means, tmp_path):
    assert config(tmp_path, text).options == means


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"nested": [1, 32]}, "nested= names rank 32, above the adapter's own, 16"),
        ({"nested": [1], "init": "pissa"}, "nested= can't begin with init='pissa'"),
        ({"init": "zero"}, "init must be one of"),
        ({"betas": [0.9]}, "betas must be two numbers below 1"),
        ({"betas": [0.9, 1]}, "betas must be a number at least 0 and below 1"),
        ({"layers": [0.5, 0.5]}, "layers must be a band"),
        ({"warmup": 1.5}, "warmup must be a number of steps, or a share"),
        ({"held_out": 1}, "held_out must be"),
        ({"schedule": "cosin"}, "schedule must be 'cosine', 'linear' or 'constant'"),
        ({"quantize": "nf3"}, "quantize must be"),
        ({"columns": {"txt": "a"}}, "columns must be"),
        ({"data": []}, "data= is missing"),
        ({"base": None}, "BASE is missing"),
    ],
)
def test_options_out_of_range(given, says):
    with pytest.raises(lf.MismatchError, match=says):
        Recipe.of({**BARE, **given})


def test_without_pyyaml(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(lf.MissingExtraError, match=r"pip install 'lorafold\[train\]'"):
        config(tmp_path, OURS)


def test_alpha_is_twice_the_rank_unless_it_is_given():
    assert Recipe.of({**BARE, "rank": 4}).spec().alpha == 8
    assert Recipe.of({**BARE, "rank": 4, "alpha": 4}).spec().alpha == 4
