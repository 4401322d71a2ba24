"""`lorafold train`: from files to adapters, and every way in which that ends early."""

from __future__ import annotations

import json
import math
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch

import lorafold as lf
from lorafold.demo.model import base_dir, data_dir

pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")
QUICK = ["--lr", "5e-3", "--rank", "4", "--batch", "4", "--cpu", "--no-bf16"]


def pairs(task, n=24):
    lines = (data_dir() / "heldout" / f"{task}.txt").read_text().splitlines()
    halves = [line.partition(" -> ") for line in lines]
    return [{"prompt": a + b, "completion": c} for a, b, c in halves if c][:n]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def roman(tmp_path, monkeypatch):
    """A file of prompts and completions, in the current directory."""
    monkeypatch.chdir(tmp_path)
    return jsonl(tmp_path / "roman.jsonl", pairs("roman"))


@pytest.fixture
def heard():
    """Ctrl-C is heard, also where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def logits(adapter, text="1999 -> "):
    model = transformers.AutoModelForCausalLM.from_pretrained(base_dir(), dtype=torch.float32)
    model.eval()
    if adapter is not None:
        lf.attach(model, adapter).use("default")
    with torch.no_grad():
        return model(torch.tensor([list(text.encode())])).logits


def at_step(monkeypatch, step, act):
    """Have `act` done in the middle of a training step."""
    from lorafold.train.mixin import AdapterTraining

    inner = AdapterTraining.training_step

    def acting(self, *args, **kw):
        loss = inner(self, *args, **kw)
        return (act() if self.state.global_step + 1 == step else None) or loss

    monkeypatch.setattr(AdapterTraining, "training_step", acting)


def test_an_adapter_a_card_and_what_it_gained(roman, cli):
    ran = cli("train", "demo", "--data", roman, "-o", "out", "--steps", 6, *QUICK, "--json")
    assert ran.code == 0, ran.err
    assert ran.err == ""
    found = ran.json
    assert found["places"] == {"default": "out"}
    assert (found["data"]["train"], found["data"]["held_out"]) == (21, 3)
    assert found["steps"] == 6
    written = json.loads(Path("out/training.json").read_text())
    assert {"kind": "train", **written, "places": found["places"]} == found
    assert str(roman.parent) not in Path("out/training.json").read_text()
    card = Path("out/README.md").read_text()
    assert found["data"]["files"][0]["sha256"] in card
    assert "21 rows" in card
    # What is measured is what the files on the disk do.
    gain = found["adapters"]["default"]["held_out"]
    assert gain["lift"] == gain["base"] - gain["adapter"] > 0.1
    held = held_out_rows(roman)
    for name, adapter in (("base", None), ("adapter", "out")):
        assert abs(nats(held, adapter) - gain[name]) < 1e-3
    shown = cli("info", "out")
    assert "lorafold/demo-base" in shown.out
    assert shown.err == ""


def held_out_rows(path):
    from lorafold.train.job.data import held_out, read_data

    return held_out(read_data([str(path)], {}, 1).rows, 0.125, 0)[1]


def nats(rows, adapter):
    """Nats a token of the completions, the line break behind each included, row by row."""
    total = count = 0
    for row in rows:
        ids = list((row["prompt"] + row["completion"] + "\n").encode())
        found = logits(adapter, bytes(ids).decode())[0, :-1].log_softmax(-1)
        for at in range(len(row["prompt"].encode()), len(ids)):
            total, count = total - found[at - 1, ids[at]].item(), count + 1
    return total / count


def test_peft_runs_it(roman, cli):
    peft = pytest.importorskip("peft")
    assert cli("train", "demo", "--data", roman, "-o", "out", "--steps", 2, *QUICK).code == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(base_dir(), dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, "out").eval()
    with torch.no_grad():
        other = theirs(torch.tensor([list(b"1999 -> ")])).logits
    torch.testing.assert_close(other, logits("out"), atol=1e-4, rtol=1e-4)
    assert (other - logits(None)).abs().max() > 1e-2


@pytest.mark.parametrize("packing", [False, True])
def test_several_at_once(packing, roman, cli):
    rows = [{**row, "adapter": name} for name in ("roman", "morse") for row in pairs(name, 16)]
    both = jsonl(Path("both.jsonl"), rows)
    more = ["--packing"] if packing else []
    ran = cli("train", "demo", "--data", both, "-o", "out", "--steps", 3, *QUICK, *more)
    assert ran.code == 0, ran.err
    assert {p.name for p in Path("out").iterdir()} == {
        "roman", "morse", "checkpoints", "training.json",
    }  # fmt: skip
    shown = cli("info", "out")
    assert "2 adapters" in shown.out
    assert shown.err == ""  # the checkpoints are none
    roman_, morse = lf.load("out/roman"), lf.load("out/morse")
    assert 0 < roman_.norm() != morse.norm()
    found = json.loads(Path("out/training.json").read_text())["adapters"]
    assert all(found[name]["held_out"]["lift"] > 0 for name in ("roman", "morse"))
    # One by itself takes their place, and leaves nothing of them.
    ran = cli("train", "demo", "--data", roman, "-o", "out", "--steps", 1, *QUICK, "--overwrite")
    assert ran.code == 0, ran.err
    assert not Path("out/roman").exists()
    assert lf.load("out").rank == 4


@pytest.mark.parametrize(
    "options",
    [
        ["--quantize", "nf4", "--betas", ".9,.95", "--lora-plus", "4"],
        ["--init", "pissa", "--gradient-checkpointing", "--bf16"],
        ["--nested", "1,2,4", "--rslora", "--targets", "q_proj,v_proj", "--layers", "0.5,1"],
    ],
    ids=["qlora", "pissa", "nested"],
)
def test_what_a_run_can_be(options, roman, cli):
    if "nf4" in options:
        pytest.importorskip("bitsandbytes")
    ran = cli("train", "demo", "--data", roman, "-o", "out", "--steps", 5, *QUICK, *options)
    assert ran.code == 0, ran.err
    found = json.loads(Path("out/training.json").read_text())
    losses = [row["loss"] for row in found["losses"] if "loss" in row]
    assert losses[-1] < losses[0]
    adapter = lf.load("out")
    assert adapter.rank == (8 if "pissa" in options else 4)  # with its start beside
    assert len(adapter.modules) == (4 if "--layers" in options else 28)


def test_only_what_the_assistant_says_is_learned(roman, cli):
    chats = [
        [
            {"role": "user", "content": r["prompt"]},
            {"role": "assistant", "content": r["completion"]},
        ]
        for r in pairs("roman")
    ]
    data = jsonl(Path("chats.jsonl"), [{"messages": chat} for chat in chats])
    counts = []
    for more in ([], ["--train-on-prompts"]):
        line = ["train", "demo", "--data", data, "-o", "out", "--steps", 1, *QUICK, "--overwrite"]
        ran = cli(*line, *more, "--json")
        assert ran.code == 0, ran.err
        counts.append(ran.json["adapters"]["default"]["held_out"]["tokens"])
        assert any("no chat template" in text for text in ran.json["said"])
    assert "generation" in Path("out/chat_template.jinja").read_text()
    assert 0 < counts[0] < counts[1] / 2


# What was begun before


def test_it_is_run_twice(roman, cli):
    line = ["train", "demo", "--data", roman, "-o", "out", "--steps", 2, *QUICK]
    assert cli(*line).code == 0
    first = Path("out/adapter_model.safetensors").read_bytes()
    ran = cli(*line, "--seed", 1)
    assert ran.code == 2
    assert "out exists already; give --overwrite" in ran.err
    assert Path("out/adapter_model.safetensors").read_bytes() == first
    Path("out/thesis.txt").write_text("mine")
    assert cli(*line, "--overwrite").code == 0
    assert Path("out/adapter_model.safetensors").read_bytes() == first  # the seed decides
    assert cli(*line, "--seed", 1, "--overwrite").code == 0
    assert Path("out/adapter_model.safetensors").read_bytes() != first
    assert Path("out/thesis.txt").read_text() == "mine"
    Path("other").mkdir()
    Path("other/thesis.txt").write_text("mine")
    ran = cli("train", "demo", "--data", roman, "-o", "other", *QUICK, "--overwrite")
    assert ran.code == 2
    assert "won't be overwritten" in ran.err


def test_ctrl_c_writes_a_checkpoint_to_go_on_from(roman, cli, monkeypatch, heard):
    line = ["train", "demo", "--data", roman, "--steps", 6, *QUICK]
    assert cli(*line, "-o", "whole").code == 0
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: signal.raise_signal(signal.SIGINT))
        ran = cli(*line, "-o", "out")
    assert ran.code == 2
    assert "stopping after this step" in ran.err
    assert "stopped after step 3, with a checkpoint; to go on: lorafold train -o out --resume" in (
        ran.err
    )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not Path("out/adapter_model.safetensors").exists()
    assert lf.load("out/checkpoints/checkpoint-3").rank == 4
    ran = cli(*line, "-o", "out")
    assert "training run that is not over: give --resume to go on, or --overwrite" in ran.err
    ran = cli("train", "-o", "out", "--resume", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["steps"] == 6
    assert lf.load("out").distance(lf.load("whole")) < 1e-4 * lf.load("whole").norm()
    # It may go on for longer than was meant, under another name, but not as another run.
    Path("out").rename("moved")
    again = cli("train", "-o", "moved", "--resume", "--steps", 8, "--json").json
    assert again["steps"] == 8
    assert again["base"] == ran.json["base"] == "lorafold/demo-base"
    Path("moved").rename("out")
    assert "--lr is another than the run was begun with" in (
        cli("train", "-o", "out", "--resume", "--lr", "1").err
    )
    roman.write_text(roman.read_text() + roman.read_text())
    assert (
        "the data is not what the run was begun with" in cli("train", "-o", "out", "--resume").err
    )


def test_a_second_ctrl_c_leaves_at_once(roman, cli, monkeypatch, heard):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_step(monkeypatch, 3, twice)
    ran = cli("train", "demo", "--data", roman, "-o", "out", "--steps", 6, *QUICK)
    assert ran.code == 2
    assert ran.err.splitlines()[-1] == "error: interrupted"
    assert Path("out/checkpoints/checkpoint-2").is_dir()
    assert not Path("out/checkpoints/checkpoint-3").exists()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_no_number_stops_it(what, roman, cli, monkeypatch):
    from lorafold.train.mixin import AdapterTraining

    inner = AdapterTraining.training_step

    def broken(self, *args, **kw):
        loss = inner(self, *args, **kw)
        if self.state.global_step + 1 < 3:
            return loss
        if what == "loss":
            return loss * math.nan
        next(self.live.parameters()).grad[0] = math.inf
        return loss

    monkeypatch.setattr(AdapterTraining, "training_step", broken)
    ran = cli("train", "demo", "--data", roman, "-o", "out", "--steps", 6, *QUICK)
    assert ran.code == 1
    assert f"the {what} is" in ran.err
    assert "at step 3: out/checkpoints/checkpoint-2 is the last good one; a lower --lr" in ran.err
    assert lf.load("out/checkpoints/checkpoint-2").norm() > 0
    assert not Path("out/checkpoints/checkpoint-3").exists()


def test_a_disk_that_is_full_leaves_the_last_checkpoint(roman, cli, monkeypatch):
    line = ["train", "demo", "--data", roman, "--steps", 4, *QUICK]
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, old[1])))
        try:
            ran = cli(*line, "-o", "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert ran.code == 2
    assert "out/checkpoints/checkpoint-3 can't be written (" in ran.err
    assert "out/checkpoints/checkpoint-2 is whole" in ran.err
    assert not Path("out/checkpoints/checkpoint-3").exists()
    assert cli("train", "-o", "out", "--resume").code == 0
    assert cli(*line, "-o", "whole").code == 0
    assert lf.load("out").distance(lf.load("whole")) < 1e-4 * lf.load("whole").norm()


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "adapter_model.safetensors"])
def test_a_checkpoint_with_another_bit_is_not_gone_on_from(name, roman, cli, monkeypatch, heard):
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: signal.raise_signal(signal.SIGINT))
        cli("train", "demo", "--data", roman, "-o", "out", "--steps", 4, *QUICK)
    path = Path("out/checkpoints/checkpoint-3", name)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    ran = cli("train", "-o", "out", "--resume")
    assert ran.code == 2
    assert f"checkpoint-3/{name} is not what was written: remove out/checkpoints/" in ran.err
    shutil.rmtree(path.parent)
    assert cli("train", "-o", "out", "--resume").code == 0
    recipe = Path("out/checkpoints/recipe.json")
    recipe.write_text(recipe.read_text().replace('"rank": 4', '"rank": 8'))
    ran = cli("train", "-o", "out", "--resume")
    assert "recipe.json: what it holds is not what was written" in ran.err


def test_a_result_that_can_t_be_written_leaves_the_old_one(roman, cli, monkeypatch):
    line = ["train", "demo", "--data", roman, "-o", "out", "--steps", 2, *QUICK]
    assert cli(*line).code == 0
    first = Path("out/adapter_model.safetensors").read_bytes()
    from lorafold.train.job import folder

    def full(*_):
        raise OSError(28, "No space left on device", "out")

    monkeypatch.setattr(folder, "write_form", full)
    ran = cli(*line, "--seed", 1, "--overwrite")
    assert ran.code == 2
    assert "No space left on device" in ran.err
    assert Path("out/adapter_model.safetensors").read_bytes() == first
    monkeypatch.undo()


def test_it_stops_where_the_held_out_loss_rises(roman, cli):
    line = ["train", "demo", "--data", roman, "-o", "out", *QUICK, "--lr", "2", "--steps", 40]
    ran = cli(*line, "--schedule", "constant", "--eval-every", 1, "--patience", 2, "--json")
    assert ran.code == 0, ran.err
    found = ran.json
    assert found["ended"] == "early"
    assert found["steps"] == found["best_step"] + 2 < 40
    losses = {row["step"]: row["held_out"] for row in found["losses"]}
    assert losses[found["best_step"]] == min(losses.values())


# What is wrong


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--targets", "q_prj"], "q_prj"),
        (["--nested", "1,32"], "--nested names rank 32, above the adapter's own, 4"),
        (["--rank", "0"], "--rank must be a whole number of at least 1"),
        (["--betas", "0.9"], "--betas must be two numbers"),
        (["--max-length", "999"], "--max-length 999 is above the 256 tokens|above the 256 tokens"),
        (["--columns", "text"], "'text' is not WHAT=COLUMN"),
        (["--config", "config.yaml"], "no option 'rnak'; did you mean 'rank'"),
        (["--eval", "other.jsonl"], "have different columns"),
        (["--quantize", "nf3"], "--quantize must be"),
    ],
)
def test_options_that_can_t_be(options, says, roman, cli):
    Path("config.yaml").write_text("rnak: 3\n")
    Path("other.jsonl").write_text('{"text": "a"}\n')
    ran = cli("train", "demo", "--data", roman, "-o", "out", *QUICK, *options)
    assert ran.code == 2
    (line,) = [line for line in ran.err.splitlines() if line.startswith("error")]
    assert any(part in line for part in says.split("|")), line
    assert not Path("out").exists()


def test_a_file_and_the_command_s_own_options(roman, cli):
    text = f"base_model: demo\ndatasets:\n - path: {roman}\noutput_dir: out\nlora_r: 2\n"
    Path("config.yaml").write_text(text + "max_steps: 9\nlearning_rate: 5e-3\nwandb_project: x\n")
    ran = cli("train", "--config", "config.yaml", "--steps", 1, "--cpu", "--json")
    assert ran.code == 0, ran.err
    assert lf.load("out").rank == 2
    assert ran.json["steps"] == 1
    assert ran.json["config"]["unused"] == ["wandb_project"]
    assert ran.json["config"]["renamed"]["lora_r"] == "rank"


def test_lines_bases_and_outputs_that_are_none(roman, cli):
    bad = Path("bad.jsonl")
    bad.write_text('{"text": "a"}\n{"text": 3}\n')
    ran = cli("train", "demo", "--data", bad, "-o", "out", *QUICK)
    assert (ran.code, "bad.jsonl: line 2: text must be a text" in ran.err) == (2, True)
    ran = cli("train", "org/model", "--data", roman, "-o", "out")
    assert "no such folder: 'org/model'" in ran.err
    Path("empty").mkdir()
    assert "empty is no base" in cli("train", "empty", "--data", roman, "-o", "out").err
    assert "BASE is missing" in cli("train", "--data", roman, "-o", "out").err
    assert "--data is missing" in cli("train", "demo", "-o", "out").err
    assert "--output is missing" in cli("train", "demo", "--data", roman).err
    assert "no checkpoint of a training run" in cli("train", "-o", "out", "--resume").err
    assert "holds the source" in cli("train", "demo", "--data", roman, "-o", ".", *QUICK).err
    names = jsonl(Path("names.jsonl"), [{**r, "adapter": "checkpoints"} for r in pairs("roman")])
    assert "can't be called 'checkpoints'" in (
        cli("train", "demo", "--data", names, "-o", "out", *QUICK).err
    )
    mine = jsonl(Path("a.jsonl"), [{**r, "adapter": "a"} for r in pairs("roman")])
    ran = cli("train", "demo", "--data", mine, "--eval", names, "-o", "out", *QUICK)
    assert "names.jsonl': the column adapter names 'checkpoints', which no row" in ran.err
    assert not Path("out").exists()


def test_what_is_too_long_is_counted(roman, cli):
    rows = [{"prompt": "a" * n, "completion": "b" * 9} for n in (10, 60, 70)]
    data = jsonl(Path("a.jsonl"), rows)
    line = ["train", "demo", "--data", data, "-o", "out", "--steps", 1, "--max-length", 64, *QUICK]
    ran = cli(*line, "--held-out", 0)
    assert ran.code == 0, ran.err
    assert "2 rows cut at 64 tokens; 1 of them left out" in ran.out
    assert "not measured" in ran.out
    assert "what it gains was not measured" in Path("out/README.md").read_text()
    ran = cli(*line, "--held-out", 0, "--overwrite", "--max-length", 8)
    assert (ran.code, "no row has a token to be learned" in ran.err) == (2, True)
    assert lf.load("out").rank == 4  # the old one
    ran = cli(*line, "--held-out", 0, "--max-length", 8, "-o", "new")
    assert (ran.code, Path("new").exists()) == (2, False)


def test_without_its_libraries(roman, cli, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "trl", None)
    ran = cli("train", "demo", "--data", roman, "-o", "out", *QUICK)
    assert ran.code == 2
    assert "pip install 'lorafold[train]'" in ran.err
