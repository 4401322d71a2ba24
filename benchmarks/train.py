"""Is a training step as fast as PEFT's, in as much memory? And eight adapters in one batch?

The same Llama, shape and ranks on both sides: a step is forward, backward and AdamW on adapters at
every linear layer of the blocks, steps in turn. Losses of both are compared after equal starts.
Memory is the peak of a fresh process that makes a few steps, above what it has before them.

Then eight adapters: a batch of 32 rows, four of each adapter, in one step (`loss_by_adapter`), next
to what PEFT can do: eight steps of four rows, an adapter each.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import arguments, interleaved, llama, report

import lorafold as lf
from lorafold.train.many import tokens_by_adapter

QUESTION = "a training step with adapters at every linear layer: lorafold beside PEFT"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, MANY, VOCABULARY = 16, 8, 2048


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--memory", choices=("lorafold", "PEFT"), help="only this, in this process")


def base() -> Any:
    return llama(512, 1408, 8, 6, VOCABULARY)


def rows(count: int, length: int = 128) -> Any:
    g = torch.Generator().manual_seed(0)
    return torch.randint(VOCABULARY, (count, length), generator=g)


def step_of(model: Any, parameters: Any, ids: Any) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def step() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def ours(model: Any, ids: Any) -> Callable[[], float]:
    live = lf.attach(model, lf.LoRA(rank=RANK, alpha=RANK, targets=TARGETS, seed=0))
    model.train()
    return step_of(model, list(live.parameters()), ids)


def theirs(model: Any, ids: Any, start: lf.Adapter | None = None) -> Callable[[], float]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS)
    peft = get_peft_model(model, config).train()
    if start is not None:
        named = dict(peft.named_modules())
        with torch.no_grad():
            for path, u in start.items():
                named[f"base_model.model.{path}.lora_A.default"].weight.copy_(u.A)
    return step_of(peft, [p for p in peft.parameters() if p.requires_grad], ids)


def one() -> dict[str, Any]:
    """A step of one adapter; both begin with the same factors."""
    model, ids = base(), rows(8)
    mine = copy.deepcopy(model)
    step = ours(mine, ids)
    start = lf.Live.of(mine).adapter("default")
    other = theirs(model, ids, start)
    found = interleaved({"lorafold": step, "PEFT": other}, REPEATS)
    losses = step(), other()
    return {
        "what": "one adapter, 8 × 128 tokens",
        "lorafold s": found["lorafold"],
        "PEFT s": found["PEFT"],
        "share": found["lorafold"] / found["PEFT"],
        "apart": abs(losses[0] - losses[1]),
    }


def many() -> dict[str, Any]:
    """Eight adapters, four rows of each."""
    names = [f"a{i}" for i in range(MANY)]
    ids = rows(4 * MANY, 64)
    mine = base()
    specs = {
        n: lf.LoRA(rank=RANK, alpha=RANK, targets=TARGETS, seed=i) for i, n in enumerate(names)
    }
    live = lf.attach(mine, specs)
    mine.train()
    optimizer = torch.optim.AdamW(live.parameters(), lr=1e-3)
    whose = torch.arange(MANY).repeat_interleave(4)
    counts = tokens_by_adapter(ids, whose, MANY)

    def together() -> None:
        optimizer.zero_grad()
        with live.use([names[i] for i in whose.tolist()]):
            logits = mine(input_ids=ids).logits
            lf.train.loss_by_adapter(logits, ids, whose, counts).backward()
        optimizer.step()

    from peft import LoraConfig, get_peft_model

    peft: Any = None
    for name in names:
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS)
        if peft is None:
            peft = get_peft_model(base(), config, adapter_name=name)
        else:
            peft.add_adapter(name, config)
    steps = []
    for i, name in enumerate(names):
        peft.set_adapter(name)
        own = [p for n, p in peft.named_parameters() if f".{name}." in n]
        steps.append((name, step_of(peft, own, ids[4 * i : 4 * i + 4])))
    peft.train()

    def in_turn() -> None:
        for name, step in steps:
            peft.set_adapter(name)
            step()

    found = interleaved({"lorafold": together, "PEFT": in_turn}, max(3, REPEATS // 3))
    return {
        "what": f"{MANY} adapters, 4 × 64 tokens each",
        "lorafold s": found["lorafold"],
        "PEFT s": found["PEFT"],
        "share": found["lorafold"] / found["PEFT"],
        "apart": None,
    }


def memory(who: str) -> None:
    """Print the peak above what is there before the adapters, in bytes."""
    model, ids = base(), rows(8)
    if who == "PEFT":
        import peft  # noqa: F401  (its own size is not the step's)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    step = ours(model, ids) if who == "lorafold" else theirs(model, ids)
    for _ in range(3):
        step()
    print(status("VmHWM") - before)


def status(field: str) -> int:
    """A size of this process, in bytes (Linux)."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition(f"{field}:")[2].split()[0])


def peak(who: str) -> int:
    """The median of three fresh processes."""
    command = [sys.executable, sys.argv[0], "--memory", who]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(3)]
    return int(statistics.median(int(run.stdout.split()[-1]) for run in runs))


if __name__ == "__main__":
    args = arguments(QUESTION, options)
    REPEATS = args.repeats
    torch.set_num_threads(1)
    if args.memory:
        memory(args.memory)
        sys.exit()
    found = [one(), many()]
    peaks = {who: peak(who) for who in ("lorafold", "PEFT")}
    met = found[0]["share"] <= 1 and peaks["lorafold"] <= peaks["PEFT"]
    report(QUESTION, found, {"steps": found, "peak": peaks, "met": met}, args.save)
