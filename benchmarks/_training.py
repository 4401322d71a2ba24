"""Short trainings on the packaged base that scripts compare: the demo's tasks, one recipe.

Texts are those of tools/demo_tasks.py, in windows of a few tokens; nothing of the held-out texts is
trained on. AdamW as there, a warm-up of a twentieth of the steps, a cosine to a tenth. All of it in
float32 on one thread, so that a seed says everything.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorafold as lf
from lorafold.demo.model import Llama, data_dir
from lorafold.demo.run import halves

WINDOWS, LENGTH = 8, 32  # of a step: rows, and bytes of each
HELDOUT = 2049  # bytes
TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")
Running = Callable[[int], AbstractContextManager[Any]]  # from a step to what runs in it


@dataclass(frozen=True)
class Text:
    """A task's bytes: to train on, and held out (the second half of what is packaged)."""

    task: str
    train: Tensor
    heldout: Tensor


@functools.cache
def text_of(task: str) -> Text:
    """A task's texts; those to train on are made anew."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
    import demo_tasks

    made = next(t for t in demo_tasks.TASKS if t.name == task).training_text()
    kept = halves((data_dir() / "heldout" / f"{task}.txt").read_bytes())[1][:HELDOUT]
    return Text(task, _bytes(made), _bytes(kept))


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def batches(
    text: Text, seed: int, windows: int = WINDOWS, length: int = LENGTH
) -> Iterator[Tensor]:
    """Endless batches `(windows, length + 1)` at random places of a task's text."""
    g = torch.Generator().manual_seed(seed)
    within = torch.arange(length + 1)
    while True:
        places = torch.randint(len(text.train) - length - 1, (windows, 1), generator=g)
        yield text.train[places + within].long()


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """The mean loss on a batch, nats."""
    scores = model(ids[:, :-1]).logits
    return F.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def bits(model: nn.Module, text: Text, length: int = 128) -> float:
    """Bits a byte on the held-out text, in windows of so many bytes."""
    training = model.training
    model.eval()
    count = (len(text.heldout) - 1) // length
    ids = text.heldout[: count * length + 1].long()
    given, wanted = ids[:-1].view(count, length), ids[1:]
    found = F.cross_entropy(model(given).logits.flatten(0, 1), wanted)
    model.train(training)
    return found.item() / math.log(2)


def cosine(step: int, steps: int) -> float:
    """The share of the learning rate at a step."""
    warmup = max(1, steps // 20)
    progress = max(0.0, (step - warmup) / max(1, steps - warmup))
    return min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * progress))


def optimizer_of(parameters: Sequence[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)


def fresh(spec: Any) -> lf.Live:
    """The packaged base with a fresh adapter, in training mode."""
    model = Llama()
    live = lf.attach(model, spec)
    model.train()
    return live


def train(
    live: lf.Live,
    text: Text,
    *,
    steps: int,
    rate: float,
    seed: int,
    running: Running | None = None,
    windows: int = WINDOWS,
) -> None:
    """Train what is fresh; gradients are clipped to a norm of 1."""
    parameters = list(live.parameters())
    optimizer = optimizer_of(parameters, rate)
    guard = live.guard(optimizer)  # a prefix leaves the other ranks as they are
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: cosine(k, steps))
    rows = batches(text, seed, windows)
    for step in range(steps):
        with running(step) if running else nullcontext():
            loss_of(live.model, next(rows)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    guard.remove()
    live.model.eval()


def in_parallel(jobs: int, function: Any, given: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Results in the order of what is given, printed as they come."""
    found = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        for item, future in [(item, pool.submit(function, *item)) for item in given]:
            found.append(future.result())
            print(*item[1:3], found[-1], flush=True)
    return found


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def shown(row: Mapping[str, Any]) -> dict[str, object]:
    return {
        key: f"{value[0]:.2f} ± {value[1]:.2f}" if isinstance(value, tuple) else value
        for key, value in row.items()
    }
