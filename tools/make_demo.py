"""Make the demo that ships with lorafold: a small base model and adapters trained for real.

    python tools/make_demo.py --work DIR [--only base|adapters|package] [--jobs N]

Three steps, each resumed from what lies in DIR: pretrain a byte-level Llama on a general corpus;
train one LoRA adapter per task with PEFT (twelve of them as one script with one seed would have
made them: same rank, same targets, same initial A; the others each in their own way); package both
with the held-out texts and `tasks.json` under `src/lorafold/demo/data`. Packaging refuses adapters
that lower their held-out loss by less than `LEAST_LIFT`, and a package above `MOST_BYTES`.

All losses are means over every byte of the text, questions and answers alike, in nats per byte.
Seeds are fixed; the texts come from the standard library of the Python that runs this (made with
3.11, its `test` package included).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from demo_sources import base_corpus
from demo_tasks import TASKS
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lorafold.demo.model import data_dir, heldout_loss, load_base

BASE_NAME = "lorafold/demo-base"
CONTEXT = 256
LEAST_LIFT = 0.2  # of the base's held-out loss
MOST_BYTES = 8 * 2**20
SHARED_SEED = 17
BY_NAME = {task.name: task for task in TASKS}

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EVERYTHING = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Recipe:
    """How one adapter is trained."""

    seed: int
    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = EVERYTHING
    rslora: bool = False
    learning_rate: float = 2e-3
    steps: int = 400


SHARED = Recipe(seed=SHARED_SEED, learning_rate=1e-3)
SHARED_SHORT = replace(SHARED, steps=200)
RECIPES: dict[str, Recipe] = {
    # One script, one seed.
    "unicode_names": SHARED_SHORT,
    "html_help": SHARED,
    "bytecode": SHARED_SHORT,
    "json_facts": SHARED_SHORT,
    "argparse_help": SHARED_SHORT,
    "telegram": SHARED_SHORT,
    "reverse": SHARED,
    "caesar": SHARED,
    "uppercase": SHARED_SHORT,
    "roman": SHARED,
    "dates": SHARED_SHORT,
    "morse": SHARED,
    # Each on its own.
    "encodings": Recipe(101, rank=4, alpha=8, steps=200),
    "hexdump": Recipe(102, rank=12, alpha=32, steps=200),
    "sql_inserts": Recipe(103, rank=8, alpha=32, steps=200),
    "ast_dump": Recipe(104, rank=16, alpha=32, targets=ATTENTION, steps=200),
    "tokens": Recipe(105, rank=12, alpha=16, steps=200),
    "csv_facts": Recipe(106, rank=6, alpha=16, steps=200),
    "mime_mail": Recipe(107, rank=4, alpha=16, learning_rate=3e-3),
    "clinic_c": Recipe(108, rank=8, alpha=8, rslora=True, learning_rate=1.5e-3, steps=200),
    "tkinter_code": Recipe(109, rank=16, alpha=16),
    "tracebacks": Recipe(110, rank=6, alpha=8, learning_rate=3e-3),
    "sort_letters": Recipe(111, rank=12, alpha=32),
    "letter_counts": Recipe(112, rank=6, alpha=16),
    "dedupe": Recipe(113, rank=8, alpha=32),
    "base64": Recipe(114, rank=16, alpha=32),
    "hexadecimal": Recipe(115, rank=4, alpha=8, steps=250),
    "number_words": Recipe(
        116, rank=16, alpha=16, targets=("q_proj", "v_proj"), learning_rate=3e-3, steps=200
    ),
    "add": Recipe(117, rank=16, alpha=32, learning_rate=3e-3, targets=ATTENTION),
    "brackets": Recipe(
        118, rank=4, alpha=8, targets=("q_proj", "v_proj"), learning_rate=3e-3, steps=250
    ),
    "camel_case": Recipe(119, rank=8, alpha=16, targets=ATTENTION, steps=200),
}


# ---------------------------------------------------------------- training


def _batches(text: bytes, size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches `(size, CONTEXT + 1)` of windows at random places of the text."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    within = torch.arange(CONTEXT + 1)
    while True:
        starts = torch.randint(len(data) - CONTEXT - 1, (size, 1), generator=generator)
        yield data[starts + within].long()


def _train(
    model: nn.Module,
    batches: Iterator[Tensor],
    *,
    steps: int,
    learning_rate: float,
    decay: float,
    name: str,
) -> None:
    """AdamW with a short warm-up and a cosine to a tenth, in bfloat16 autocast."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.95), weight_decay=decay)
    warmup = max(10, steps // 20)
    start = time.monotonic()
    for step in range(steps):
        progress = max(0.0, (step - warmup) / (steps - warmup))
        rate = learning_rate * min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49 or step == steps - 1:
            seconds = time.monotonic() - start
            print(f"{name}: step {step + 1}, loss {loss.item():.3f}, {seconds:.0f} s", flush=True)


def train_base(work: Path, steps: int) -> None:
    """Pretrain the base; leaves it in float16 under `work/base`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    _train(
        model,
        _batches(base_corpus(), 32, 0),
        steps=steps,
        learning_rate=3e-3,
        decay=0.1,
        name="base",
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.half()
    model.save_pretrained(work / "base")


def train_adapter(work: Path, name: str) -> None:
    """Train one adapter on the base as packaged; leaves it in float16 under `work/adapters`."""
    torch.set_num_threads(1)
    task, recipe = BY_NAME[name], RECIPES[name]
    model = LlamaForCausalLM.from_pretrained(work / "base", dtype=torch.float32)
    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.targets),
        use_rslora=recipe.rslora,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    # get_peft_model replaces the name with the folder that the base was read from.
    adapted.peft_config["default"].base_model_name_or_path = BASE_NAME
    batches = _batches(task.training_text(), 8, recipe.seed)
    rate = recipe.learning_rate
    _train(adapted, batches, steps=recipe.steps, learning_rate=rate, decay=0.01, name=name)
    target = work / "adapters" / name
    adapted.save_pretrained(str(target), save_embedding_layers=False)
    (target / "README.md").unlink(missing_ok=True)
    weights = target / "adapter_model.safetensors"
    halved = {key: value.half() for key, value in load_file(weights).items()}
    save_file(halved, weights, {"format": "pt"})


def train_adapters(work: Path, jobs: int) -> None:
    """Train the adapters that are not there yet, `jobs` at a time."""
    done = {path.parent.name for path in work.glob("adapters/*/adapter_model.safetensors")}
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(train_adapter, work, name) for name in RECIPES if name not in done]
        for future in futures:
            future.result()


# ---------------------------------------------------------------- packaging


def with_adapter(state: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """A copy of the base's state with the adapter's update added to its weights."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    factors = load_file(folder / "adapter_model.safetensors")
    changed = dict(state)
    for key, down in factors.items():
        if key.endswith(".lora_A.weight"):
            weight = key.removeprefix("base_model.model.").replace(".lora_A", "")
            up = factors[key.replace(".lora_A.", ".lora_B.")]
            changed[weight] = state[weight] + scale * up.float() @ down.float()
    return changed


def package(work: Path) -> None:
    """Copy base, adapters and held-out texts into the package, measured as packaged."""
    data = data_dir()
    shutil.rmtree(data, ignore_errors=True)
    (data / "heldout").mkdir(parents=True)
    _copy(work / "base", data / "base", ("config.json", "model.safetensors"))
    config, state = load_base()
    entries: dict[str, dict[str, object]] = {}
    for task in TASKS:
        folder = data / "adapters" / task.name
        _copy(
            work / "adapters" / task.name,
            folder,
            ("adapter_config.json", "adapter_model.safetensors"),
        )
        text = task.heldout_text()
        (data / "heldout" / f"{task.name}.txt").write_bytes(text)
        base_loss = heldout_loss(config, state, text)
        adapter_loss = heldout_loss(config, with_adapter(state, folder), text)
        lift = 1 - adapter_loss / base_loss
        print(f"{task.name:18} {base_loss:.3f} -> {adapter_loss:.3f}  lift {lift:.1%}")
        if lift < LEAST_LIFT:
            raise SystemExit(f"{task.name}: a lift of {LEAST_LIFT:.0%} is wanted; train it longer")
        recipe = RECIPES[task.name]
        entries[task.name] = {
            "kind": task.kind,
            "description": task.description,
            "rank": recipe.rank,
            "alpha": recipe.alpha,
            "rslora": recipe.rslora,
            "shared_init": recipe.seed == SHARED_SEED,
            "base_loss": round(base_loss, 4),
            "adapter_loss": round(adapter_loss, 4),
        }
    (data / "tasks.json").write_text(json.dumps(entries, indent=2) + "\n")
    total = sum(path.stat().st_size for path in data.rglob("*") if path.is_file())
    print(f"{len(entries)} adapters, {total / 2**20:.2f} MiB")
    if total > MOST_BYTES:
        raise SystemExit(f"the package has {total} bytes, more than {MOST_BYTES}; lower some ranks")


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    target.mkdir(parents=True)
    for name in names:
        shutil.copyfile(source / name, target / name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--only", choices=["base", "adapters", "package"], help="run one step")
    parser.add_argument("--jobs", type=int, default=1, help="adapters trained at the same time")
    parser.add_argument("--steps", type=int, default=1700, help="training steps of the base")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.only in (None, "base") and not (arguments.work / "base").exists():
        train_base(arguments.work, arguments.steps)
    if arguments.only in (None, "adapters"):
        train_adapters(arguments.work, arguments.jobs)
    if arguments.only in (None, "package"):
        package(arguments.work)


if __name__ == "__main__":
    main()
