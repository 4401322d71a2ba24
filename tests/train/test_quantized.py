"""Training on a quantised base, by the trainer, on the demo's base: QLoRA from end to end."""

from pathlib import Path

import pytest
import torch

import lorafold as lf
from lorafold.demo.model import data_dir

transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")
BASE = data_dir() / "base"
WIDTH, STEPS = 32, 10
MARGIN = 0.9  # of what training in float32 lowers the held-out loss by
FORMATS = {
    "nf4": {},
    "nf4, bf16": {"double_quant": True, "compute_dtype": torch.bfloat16},
    "int8": {"bits": 8},
    "torchao": {"bits": 8, "kind": "int8_weight_only"},
}
SPECS = {
    "lora": lambda: lf.LoRA(rank=8, alpha=16, seed=0),
    "pissa": lambda: lf.LoRA(rank=8, alpha=16, init="pissa", seed=0),
}


def base(fmt=None, dtype=torch.float32):
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=dtype)
    if fmt == "torchao":
        pytest.importorskip("torchao", reason="torchao is not installed")
    if fmt is not None:
        lf.quantize_base(model, **FORMATS[fmt])
    return model


def pieces():
    """Training rows of a task, and a batch that is held out."""
    text = (data_dir() / "heldout" / "roman.txt").read_bytes()
    rows = torch.tensor(list(text[: len(text) // WIDTH * WIDTH])).view(-1, WIDTH)
    return [{"input_ids": r, "labels": r} for r in rows[:128]], rows[160:200]


TRAIN, HELD = pieces()


def trainer(folder, model, **options):
    given = {
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 3,
        **options,
    }
    args = transformers.TrainingArguments(str(folder), **given)
    return lf.train.Trainer(model, args, train_dataset=TRAIN)


def losses(t):
    return [row["loss"] for row in t.state.log_history if "loss" in row]


def held(model):
    model.eval()
    with torch.no_grad():
        return float(model(input_ids=HELD, labels=HELD).loss)


def fitted(folder, fmt=None, spec="lora", dtype=torch.float32, **options):
    model = base(fmt, dtype)
    lf.attach(model, SPECS[spec]())
    t = trainer(folder, model, **options)
    t.train()
    return t


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    """(bare, trained): what is held out before and after training in float32."""
    bare = held(base())
    return bare, held(fitted(tmp_path_factory.mktemp("floats")).model)


@pytest.mark.parametrize("fmt", FORMATS)
def test_it_learns_what_is_learned_in_float32(fmt, floats, tmp_path):
    bare, trained = floats
    assert bare - trained > 1
    t = fitted(tmp_path / "a", fmt)
    assert bare - held(t.model) >= MARGIN * (bare - trained)
    # The same adapter on the base that was not quantised.
    t.live.save(tmp_path / "mine")
    model = base()
    with lf.attach(model, tmp_path / "mine").use("default"):
        assert bare - held(model) >= MARGIN * (bare - trained)


@pytest.mark.parametrize(
    ("fmt", "spec"), [("nf4", "lora"), ("nf4", "pissa"), ("int8", "lora"), ("torchao", "lora")]
)
def test_resumed_it_goes_on_as_if_it_had_not_stopped(fmt, spec, tmp_path):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    whole = fitted(tmp_path / "a", fmt, spec, **options)
    assert losses(whole)[-1] < losses(whole)[0]
    for resumed in (SPECS[spec](), tmp_path / "a" / "checkpoint-2"):
        model = base(fmt)
        lf.attach(model, resumed, trainable=isinstance(resumed, Path))
        again = trainer(tmp_path / "a", model, max_steps=3)
        again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
        assert losses(again) == losses(whole)


def test_activations_computed_again_give_the_same(tmp_path):
    plain = fitted(tmp_path / "a", "nf4", max_steps=2)
    again = fitted(tmp_path / "b", "nf4", max_steps=2, gradient_checkpointing=True)
    assert losses(again) == pytest.approx(losses(plain), abs=1e-4)
    half = fitted(tmp_path / "c", "nf4", max_steps=2, bf16=True, dtype=torch.bfloat16)
    assert losses(half) == pytest.approx(losses(plain), abs=0.1)
    assert {p.dtype for p in half.live.parameters()} == {torch.float32}


def test_merged_afterwards_in_floats(tmp_path):
    t = fitted(tmp_path / "a", "nf4", max_steps=2)
    adapted = held(t.model)
    with pytest.raises(lf.RefusedError, match="lf.dequantize"):
        t.live.merge()
    lf.dequantize(t.model)  # the weights that are stored, as floats
    t.live.merge(keep=False)
    t.live.detach()
    assert held(t.model) == pytest.approx(adapted, abs=1e-4)
    t.model.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert held(again) == pytest.approx(adapted, abs=1e-4)
