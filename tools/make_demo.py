"""Make the demo that ships with lorafold: small base models and adapters trained for real.

    python tools/make_demo.py --work DIR [--base NAME …] [--only base|adapters|package] [--jobs N]

Three steps for each base, each resumed from what lies in DIR: pretrain a Llama on a general corpus;
train LoRA adapters with PEFT; package what is wanted of them under `src/lorafold/demo/data`.

The first base, `base`, gets an adapter a task (twelve of them as one script with one seed would
have made them: same rank, same targets, same initial A; the others each in their own way), packaged
with the held-out texts and `tasks.json`. The other bases are there to move adapters to. They were
trained on fewer bytes than the first, with an optimizer that needs fewer, and are packaged with
their own `tasks.json`: the losses of adapters trained natively, by the same recipes, on the tasks
of `NATIVE`, which are not packaged themselves. Packaging refuses adapters that lower their held-out
loss by less than `LEAST_LIFT` (there `LEAST_NATIVE`), and a package above `MOST_BYTES`.

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
from demo_native import fresh, trained, with_factors
from demo_sources import base_corpus
from demo_tasks import TASKS
from demo_tokenizers import byte_tokenizer, pair_tokenizer, save_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lorafold.demo.model import base_dir, data_dir, heldout_loss, load_base, read_base, tokens_of

BASE_NAME = "lorafold/demo-base"
CONTEXT = 256
LEAST_LIFT = 0.2  # of the base's held-out loss
LEAST_NATIVE = 0.15  # the recipes were not made for these bases
MOST_BYTES = {"base": 8 * 2**20, "bases": 8 * 2**20}
SHARED_SEED = 17
MODEL = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
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


@dataclass(frozen=True)
class Base:
    """The shape of a base and how it is pretrained."""

    seed: int
    width: int = 128
    layers: int = 4
    key_value_heads: int = 4
    vocabulary: int = 256  # bytes; more are byte pairs
    context: int = CONTEXT
    batch: int = 16
    native_batch: int = 8
    steps: int = 600
    muon: bool = True


BASES = {
    "base": Base(0, batch=32, steps=1700, muon=False),
    "wide": Base(1, width=160),
    "deep": Base(2, width=96, layers=6),
    # A pair stands for 2.4 bytes: as many bytes a step as the others.
    "pairs": Base(3, key_value_heads=2, vocabulary=1024, context=128, batch=13, native_batch=7),
}

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

# What adapters are trained on the other bases for: four domains of text, four algorithms.
NATIVE = (
    *("json_facts", "sql_inserts", "argparse_help", "encodings"),
    *("uppercase", "dates", "number_words", "camel_case"),
)


# ---------------------------------------------------------------- training


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _batches(tokens: Tensor, size: int, seed: int, context: int = CONTEXT) -> Iterator[Tensor]:
    """Endless batches `(size, context + 1)` of windows at random places of the text."""
    generator = torch.Generator().manual_seed(seed)
    within = torch.arange(context + 1)
    while True:
        starts = torch.randint(len(tokens) - context - 1, (size, 1), generator=generator)
        yield tokens[starts + within].long()


def _train(
    model: nn.Module,
    batches: Iterator[Tensor],
    *,
    steps: int,
    learning_rate: float,
    decay: float,
    name: str,
    muon: bool = False,
    checkpoint: Path | None = None,
) -> None:
    """AdamW with a short warm-up and a cosine to a tenth, in bfloat16 autocast.

    With `muon` the matrices of the layers take Muon's steps, at twice the rate. A `checkpoint` is
    written every 50 steps, and training goes on from it.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    inner = [p for n, p in model.named_parameters() if muon and "layers." in n and p.ndim == 2]
    outer = [p for p in trained if not any(p is other for other in inner)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(outer, lr=learning_rate, betas=(0.9, 0.95), weight_decay=decay)
    ]
    if inner:
        optimizers.append(
            torch.optim.Muon(inner, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        )
    warmup = max(10, steps // 20)
    first = 0
    if checkpoint is not None and checkpoint.exists():
        first, weights, states = torch.load(checkpoint)
        model.load_state_dict(weights)
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        for _ in range(first):
            next(batches)
    start = time.monotonic()
    for step in range(first, steps):
        progress = max(0.0, (step - warmup) / (steps - warmup))
        rate = learning_rate * min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * progress))
        for optimizer, factor in zip(optimizers, (1, 2), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = factor * rate
        batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 49 or step == steps - 1:
            seconds = time.monotonic() - start
            print(f"{name}: step {step + 1}, loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
            if checkpoint is not None:
                states = [optimizer.state_dict() for optimizer in optimizers]
                torch.save((step + 1, model.state_dict(), states), checkpoint)


def _llama(base: Base) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=base.vocabulary,
        hidden_size=base.width,
        intermediate_size=3 * base.width,
        num_hidden_layers=base.layers,
        num_attention_heads=4,
        num_key_value_heads=base.key_value_heads,
        max_position_embeddings=base.context,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def train_base(work: Path, name: str) -> None:
    """Pretrain a base; leaves it in float16, with its tokenizer, under `work/bases/name`."""
    torch.set_num_threads(1)
    base = BASES[name]
    folder = work / "bases" / name
    work.mkdir(parents=True, exist_ok=True)
    corpus = base_corpus()
    if base.vocabulary == 256:
        tokenizer, tokens = byte_tokenizer(), _bytes(corpus)
    else:
        tokenizer = pair_tokenizer(corpus.decode(), base.vocabulary)
        tokens = torch.tensor(tokenizer.encode(corpus.decode()).ids, dtype=torch.int16)
    torch.manual_seed(base.seed)
    model = _llama(base)
    _train(
        model,
        _batches(tokens, base.batch, base.seed, base.context),
        steps=base.steps,
        learning_rate=3e-3,
        decay=0.1,
        name=name,
        muon=base.muon,
        checkpoint=work / f"{name}.pt",
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.half()
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder, base.context)


def train_adapter(work: Path, name: str) -> None:
    """Train one adapter on the first base; leaves it in float16 under `work/adapters`."""
    torch.set_num_threads(1)
    task, recipe = BY_NAME[name], RECIPES[name]
    model = LlamaForCausalLM.from_pretrained(work / "bases" / "base", dtype=torch.float32)
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
    batches = _batches(_bytes(task.training_text()), 8, recipe.seed)
    rate = recipe.learning_rate
    _train(adapted, batches, steps=recipe.steps, learning_rate=rate, decay=0.01, name=name)
    target = work / "adapters" / name
    adapted.save_pretrained(str(target), save_embedding_layers=False)
    (target / "README.md").unlink(missing_ok=True)
    weights = target / "adapter_model.safetensors"
    halved = {key: value.half() for key, value in load_file(weights).items()}
    save_file(halved, weights, {"format": "pt"})


def train_native(work: Path, base: str, name: str) -> None:
    """What an adapter trained on another base reaches; leaves `work/native/base/name.json`."""
    torch.set_num_threads(1)
    task, recipe, folder = BY_NAME[name], RECIPES[name], work / "bases" / base
    config, state = read_base(folder)
    tokens = torch.tensor(tokens_of(task.training_text(), folder))
    windows, steps = BASES[base].native_batch, recipe.steps
    found = trained(
        config, state, fresh(state, recipe), tokens, recipe, steps=steps, windows=windows
    )
    text = task.heldout_text()
    held = tokens_of(text, folder)
    losses = {
        "base_loss": heldout_loss(config, state, text, tokens=held),
        "native_loss": heldout_loss(config, with_factors(state, found), text, tokens=held),
    }
    print(f"{base}, {name}: {losses}", flush=True)
    target = work / "native" / base / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    rounded = {key: round(loss, 4) for key, loss in losses.items()}
    target.write_text(json.dumps({**rounded, "steps": steps}))


def train_adapters(work: Path, base: str, jobs: int) -> None:
    """Train the adapters that are not there yet, `jobs` at a time."""
    if base == "base":
        done = {path.parent.name for path in work.glob("adapters/*/adapter_model.safetensors")}
        wanted = [(train_adapter, (work, name)) for name in RECIPES if name not in done]
    else:
        done = {path.stem for path in work.glob(f"native/{base}/*.json")}
        wanted = [(train_native, (work, base, name)) for name in NATIVE if name not in done]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(function, *given) for function, given in wanted]
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
    for folder in ("base", "adapters", "heldout"):
        shutil.rmtree(data / folder, ignore_errors=True)
    (data / "heldout").mkdir(parents=True)
    _copy(work / "bases" / "base", data / "base", MODEL)
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
        check_lift(task.name, base_loss, adapter_loss)
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


def package_other(work: Path, base: str) -> None:
    """Copy one of the other bases into the package, with what native adapters reach on it."""
    shutil.rmtree(base_dir(base), ignore_errors=True)
    _copy(work / "bases" / base, base_dir(base), MODEL)
    native = work / "native" / base
    entries = {name: json.loads((native / f"{name}.json").read_text()) for name in NATIVE}
    for name, entry in entries.items():
        check_lift(name, entry["base_loss"], entry["native_loss"], LEAST_NATIVE)
    (base_dir(base) / "tasks.json").write_text(json.dumps(entries, indent=2) + "\n")


def check_lift(name: str, base_loss: float, adapter_loss: float, least: float = LEAST_LIFT) -> None:
    """Refuse an adapter that does too little."""
    lift = 1 - adapter_loss / base_loss
    print(f"{name:18} {base_loss:.3f} -> {adapter_loss:.3f}  lift {lift:.1%}")
    if lift < least:
        raise SystemExit(f"{name}: a lift of {least:.0%} is wanted; train it longer")


def check_size() -> None:
    """Refuse a package larger than promised."""
    sizes = dict.fromkeys(MOST_BYTES, 0)
    for path in data_dir().rglob("*"):
        if path.is_file():
            part = path.relative_to(data_dir()).parts[0]
            sizes["bases" if part == "bases" else "base"] += path.stat().st_size
    for part, most in MOST_BYTES.items():
        print(f"{part}: {sizes[part] / 2**20:.2f} MiB")
        if sizes[part] > most:
            raise SystemExit(
                f"{part} takes {sizes[part]} bytes, more than {most}; lower some ranks"
            )


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    target.mkdir(parents=True)
    for name in names:
        shutil.copyfile(source / name, target / name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--base", nargs="+", choices=list(BASES), default=list(BASES))
    parser.add_argument("--only", choices=["base", "adapters", "package"], help="run one step")
    parser.add_argument("--jobs", type=int, default=1, help="adapters trained at the same time")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work, only = arguments.work, arguments.only
    for base in arguments.base:
        if only in (None, "base") and not (work / "bases" / base).exists():
            train_base(work, base)
        if only in (None, "adapters"):
            train_adapters(work, base, arguments.jobs)
        if only in (None, "package"):
            if base == "base":
                package(work)
            else:
                package_other(work, base)
            check_size()


if __name__ == "__main__":
    main()
