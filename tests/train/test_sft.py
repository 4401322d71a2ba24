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
    tokenizer.add_special_tokens({"eos_token": tokenizer.convert_ids_to_tokens(10)})
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


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_packed_rows_of_many_adapters_train_what_they_train_apart(strategy, tmp_path):
    tasks = ("roman", "morse", "dates")
    whose = [tasks[i % 3] for i in range(12)]
    data = [{"text": texts(task)[i][: 20 + i], "adapter": task} for i, task in enumerate(whose)]
    specs = {task: lf.LoRA(rank=4, seed=0) for task in tasks}
    options = {"max_steps": 2, "save_strategy": "no", "per_device_train_batch_size": 12}
    apart = trainer(tmp_path / "a", data, specs, **options)
    packed = trainer(
        tmp_path / "b", data, specs, packing=True, packing_strategy=strategy, **options
    )
    assert len(packed.train_dataset) < 12  # all of which are one batch
    (batch,) = packed.get_train_dataloader()
    assert sorted(batch["lorafold_lengths"]) == sorted(len(row["text"]) + 1 for row in data)
    for t in (apart, packed):
        t.train()
    for a, b in zip(losses(apart), losses(packed), strict=True):
        assert abs(a - b) < 1e-4
    for task in tasks:  # Adam makes whole steps of what is rounding where a gradient is next to 0
        mine, other = apart.live.adapter(task), packed.live.adapter(task)
        assert mine.distance(other) < 0.02 * mine.norm()
    assert packed.live.adapter("roman").cosine(packed.live.adapter("morse")) < 0.9


def test_one_packed_step_has_the_gradients_of_the_rows_apart(tmp_path):
    tasks = ("roman", "morse")
    data = [{"text": texts(tasks[i % 2])[i][: 20 + i], "adapter": tasks[i % 2]} for i in range(8)]
    grads = []
    for packing in (False, True):
        specs = {task: lf.LoRA(rank=4, seed=0) for task in tasks}
        t = trainer(tmp_path / "a", data, specs, packing=packing, per_device_train_batch_size=8)
        with torch.no_grad():
            for p in t.live.parameters():  # B = 0 would leave A without a gradient
                p.add_(0.01)
        t.model.train()
        t.training_step(t.model, next(iter(t.get_train_dataloader())), None)
        grads.append([p.grad for p in t.live.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * float(a.abs().max()), rtol=1e-3)


def test_packing_that_cuts_anywhere_is_refused_where_rows_have_adapters(tmp_path):
    data = [{"text": text, "adapter": "default"} for text in texts("roman")]
    with pytest.raises(lf.RefusedError, match="'wrapped' cuts rows anywhere.*'bfd'"):
        trainer(tmp_path, data, packing=True, packing_strategy="wrapped")


@pytest.mark.parametrize("packing", [False, True])
def test_what_does_not_fit_is_counted(packing, tmp_path):
    data = [{"prompt": "a" * n, "completion": "b" * 9} for n in (10, 60, 70)]
    t = trainer(tmp_path, data, packing=packing)
    fit = t.fits["train"]
    assert (fit.rows, fit.tokens, fit.cut) == (3, 20 + 70 + 80, 2)
    assert fit.dropped == (0 if packing else 1)  # of the last one, only prompt is left
    assert (
        t.fits["train"]
        == trainer(tmp_path, data, packing=packing, shuffle_dataset=True).fits["train"]
    )


def test_an_adapted_head_is_refused_as_the_loss_goes_past_it(tmp_path):
    spec = lf.LoRA(rank=4, seed=0, targets=["lm_head", "q_proj"], exclude=())
    with pytest.raises(lf.RefusedError, match="attached to the output layer"):
        trainer(tmp_path, [{"text": "a"}], spec)
