"""TRL's SFTTrainer with adapters attached, on the demo's base."""

import pytest
import torch

import lorafold as lf
from lorafold.demo.model import data_dir

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")
BASE = data_dir() / "base"


def texts(task, n=24):
    pieces = (data_dir() / "heldout" / f"{task}.txt").read_text()
    return [pieces[64 * i : 64 * i + 64] for i in range(n)]


def trainer(folder, data, spec=None, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    lf.attach(model, lf.LoRA(rank=4, seed=0) if spec is None else spec)
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(10)
    given = {
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 3,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "max_length": 64,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
        **options,
    }
    return lf.train.SFTTrainer(
        model,
        trl.SFTConfig(str(folder), **given),
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=tokenizer,
    )


def losses(t):
    return [row["loss"] for row in t.state.log_history if "loss" in row]


@pytest.mark.parametrize("form", ["text", "prompt"])
def test_its_data_formats_train_the_adapter_alone(form, tmp_path):
    data = [{"text": text} for text in texts("roman")]
    if form == "prompt":
        data = [{"prompt": text[:20], "completion": text[20:]} for text in texts("roman")]
    t = trainer(tmp_path / "a", data)
    t.train()
    assert losses(t)[-1] < losses(t)[0]
    folder = tmp_path / "a" / "checkpoint-6"
    assert not list(folder.glob("model*"))
    assert lf.load(folder).rank == 4
    again = trainer(tmp_path / "a", data)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert losses(again) == losses(t)


@pytest.mark.parametrize("end_to_end", [False, True])
def test_rows_of_many_adapters(end_to_end, tmp_path):
    tasks = ("roman", "morse")
    data = [{"text": text, "adapter": task} for task in tasks for text in texts(task, 12)]
    specs = {task: lf.LoRA(rank=4, seed=0) for task in tasks}
    more = {"padding_free": True, "max_length": None} if end_to_end else {}
    t = trainer(tmp_path / "a", data, specs, save_strategy="no", **more)
    t.train()
    assert losses(t)[-1] < losses(t)[0]
    a, b = (t.live.adapter(task) for task in tasks)
    assert a.norm() > 0
    assert b.norm() > 0
    assert a.cosine(b) < 0.9
    unknown = [{"text": "a", "adapter": "nobody"}]
    with pytest.raises(lf.UnknownNameError, match="'nobody'"):
        trainer(tmp_path / "b", unknown, specs)


def test_packed(tmp_path):
    data = [{"text": text[:30]} for text in texts("roman")]
    t = trainer(tmp_path / "a", data, packing=True, save_strategy="no")
    t.train()
    assert losses(t)[-1] < losses(t)[0]


def test_an_adapted_head_is_refused_as_the_loss_goes_past_it(tmp_path):
    spec = lf.LoRA(rank=4, seed=0, targets=["lm_head", "q_proj"], exclude=())
    with pytest.raises(lf.RefusedError, match="attached to the output layer"):
        trainer(tmp_path, [{"text": "a"}], spec)
