"""Kinds of files that runs of training and steering go on from, and a library's second copy."""

import functools
import itertools
import json
import sys
import warnings

import torch

import lorafold as lf
from lorafold.errors import FileError
from lorafold.files.config import CARD_MARK
from lorafold.fold import Library
from lorafold.train.checkpoints import seal
from lorafold.train.job.folder import Folder
from lorafold.train.job.recipe import Recipe
from lorafold.train.job.run import resumed
from lorafold.train.steering import state as steering
from lorafold.train.steering.options import Options
from lorafold.train.steering.steer import Run

kinds = sys.modules["attacks_kinds"]  # which corpus.py has loaded
Kind, plain = kinds.Kind, kinds.plain
CHECKPOINT = ("checksums.json", "trainer_state.json", "optimizer.pt", "adapter_model.safetensors")


# lorafold train: how it goes on, from which checkpoint, and what an earlier run left


def make_job(folder):
    out = Folder(str(folder / "out"))
    recipe = Recipe.of({"base": "demo", "data": ["a.jsonl"], "output": "out", "steps": 6})
    out.begin({"recipe": recipe.to_dict(), "digest": "d" * 64, "base_model": "org/base"})
    for step in (2, 4):
        at = out.checkpoints / f"checkpoint-{step}"
        lf.save(kinds.adapter(step), at)
        torch.save({"state": {0: {"step": step}}}, at / "optimizer.pt")
        (at / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 6}))
        seal(at)
    (folder / "out" / "training.json").write_text(
        json.dumps({"adapters": {"sql": {"folder": "sql"}, "law": {"folder": ""}}})
    )


def load_job(folder):
    out = Folder(str(folder / "out"))
    out.check((), overwrite=True)
    recipe, base = resumed(str(out.path))
    recipe = recipe.with_(output="out")  # which is where it lies
    return {"recipe": recipe.to_dict(), "base": base, "from": kinds.told_of(lf.load(out.last))}


def job_says(folder):
    """What was written; of a checkpoint that was not written to its end, the one before it."""
    last = Folder(str(folder / "out")).last.name
    before = load_job(folder.with_name("start"))
    if last == "checkpoint-4":
        return before
    assert last == "checkpoint-2"
    return {**before, "from": kinds.told_of(lf.load(folder / "out" / "checkpoints" / last))}


# lorafold steer: the rounds that are kept, and the one that is trained


class Letters:
    """A tokenizer: a token a letter."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(c) % 32 for c in text]}

    def decode(self, ids):
        return "".join(chr(64 + i) for i in ids)


def language_model():
    """A tiny one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 32}
    sizes |= {"num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 16}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=None, bos_token_id=None)).eval()


def steering_asked():
    """Pairs and options."""
    pairs = [{"prompt": a + b, "chosen": "AB", "rejected": "yz"} for a in "abcd" for b in "ef"]
    small = {"steps": 4, "every": 2, "kl": None, "tokens": 4, "lr": 0.05}
    return pairs, Options(kind=lf.LoRA(rank=1), rounds=2, **small)


@functools.cache
def steering_run():
    """A run in its second round."""
    run, steps = Run(language_model(), Letters(), *steering_asked()), itertools.count()
    assert not run.go(stop=lambda: next(steps) >= 7)
    assert len(run.done) == 1
    assert run.now.step > 0
    return run


def load_steering(folder):
    header, tensors, adapters = steering.read_run(folder / "run")
    header = repr(dict(sorted(header.items())))
    found = {name: kinds.told_of(a) for name, a in adapters.items()}
    return {"header": header, "adapters": found, **{k: plain(t) for k, t in tensors.items()}}


# The second copy of a library's manifest


def load_copy(folder):
    (folder / "lib" / "library.json").unlink(missing_ok=True)
    lf.fold.repair(folder / "lib")
    with Library.open(folder / "lib") as lib:
        return {name: (kinds.told_of(lib[name]), lib.error(name)) for name in lib.names}


# Cards


def make_card(folder):
    kinds.make_peft(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Über SQL\n\nOf ü.\n")


def load_card(folder):
    """The card that comes out of a library; that it was left out is told."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with lf.fold({"a": folder}, tolerance=0) as lib:
            lib.save(folder / "lib", overwrite=True)
    if told:
        raise FileError(str(told[0].message))
    with Library.open(folder / "lib") as lib:
        lf.save(lib["a"], folder / "out", overwrite=True)
    card = folder / "out" / "README.md"
    return {"card": card.read_bytes().decode() if card.is_file() else None}


def card_says(folder):
    """The text with lorafold's mark below."""
    path = folder / "README.md"
    text = path.read_bytes().decode().rstrip() if path.is_file() else ""
    text = text.removesuffix(CARD_MARK).rstrip()
    return {"card": f"{text}\n{CARD_MARK}\n" if text else None}


KINDS = {
    "job": Kind(
        make_job,
        (
            "out/checkpoints/recipe.json",
            "out/training.json",
            *(f"out/checkpoints/checkpoint-4/{name}" for name in CHECKPOINT),
        ),
        load_job,
        job_says,
        ("info FOLDER/out/checkpoints/checkpoint-4", "train -o FOLDER/out --resume"),
    ),
    "steering": Kind(
        lambda folder: steering.save_run(steering_run(), folder / "run"),
        (
            "run/run.safetensors",
            "run/round1/adapter_model.safetensors",
            "run/round1/adapter_config.json",
        ),
        load_steering,
    ),
    "second copy": Kind(
        kinds.make_library,
        ("lib/.library.json.gz",),
        load_copy,
        None,
        ("ls FOLDER/lib", "repair FOLDER/lib"),
    ),
    "card": Kind(make_card, ("README.md",), load_card, card_says, ("info FOLDER",)),
}
