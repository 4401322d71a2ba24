"""What does a new task keep when it trains by numbers in the sides that a library's adapters share?

Every way gets the same base, batches, steps and schedule, and tasks that no library has seen. What
is reported is what training takes off the base's loss on held-out text, in bits a byte, and the
share of it in that of `lf.LoRA` of rank 16 (retention). The libraries:

- kin: an A is trained on six tasks at once and then frozen; in it a B is trained for each of them.
  Folded with form "input" they have that A in common (V; a new task trains the other factor), and
  with form "shared" at a rank the main directions of their Bs, too (U and V; a core trains).
- strangers: the packaged adapters, but those of the tasks here. They don't share: folded to 10 %
  each keeps sides of its own. Common sides of a rank are forced upon them with form "shared", and
  how far the library is off on its own adapters is printed.
- random: what has the sizes of kin and knows no task. The control: what training in any sides does.

A and batches have a new seed in every run; the libraries are made once. Each way's peak learning
rate is the best of a few on a task and a seed that are neither reported nor in a library.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _common import arguments, report
from _training import (
    LENGTH,
    Text,
    bits,
    fresh,
    in_parallel,
    mean_sd,
    shown,
    text_of,
    train,
)

import lorafold as lf
from lorafold.demo.model import Llama, data_dir

QUESTION = "new tasks by numbers in a library's shared sides: bits a byte below the base"
TASKS, SEEDS, STEPS = ("dates", "roman"), (0, 1, 2), 40
KIN = ("html_help", "csv_facts", "hexadecimal", "hexdump", "base64", "add")
TUNING_TASK, TUNING_SEED = "number_words", 100
WINDOWS = 4  # of a step
FULL, BOTH = 16, 32  # ranks: of LoRA and of a common A; of both sides
LIBRARIES = ("kin, one side", "kin, both sides", "strangers, both sides")
CONTROLS = ("random, one side", "random, both sides")
Way = tuple[str, int]  # "LoRA" and a rank, or a library and directions of the task's own
WAYS: tuple[Way, ...] = (
    *(("LoRA", rank) for rank in (1, 4, FULL)),
    *((name, extra) for name in LIBRARIES for extra in (0, 2)),
    *((name, 0) for name in CONTROLS),
)
KIN_RATE, COMMON_STEPS = 4e-3, 3 * STEPS
GRID, GRID_OF_CORES = (4e-3, 1.6e-2), (1.6e-2, 6.4e-2)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="one task, seed and learning rate")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at the same time")


def lora(rank: int, seed: int) -> lf.LoRA:
    return lf.LoRA(rank, alpha=2 * rank, seed=seed)


def common_A(folder: Path) -> Path:
    """Where an A is, trained on all of the kin's tasks at once, by parameter."""
    texts = [text_of(task) for task in KIN]
    mixed = Text("kin", torch.cat([t.train for t in texts]), texts[0].heldout)
    live = fresh(lora(FULL, 0))
    train(live, mixed, steps=COMMON_STEPS, rate=KIN_RATE, seed=0, windows=WINDOWS)
    kept = {n: p.detach() for n, p in live.model.named_parameters() if n.endswith(".A")}
    torch.save(kept, folder / "A.pt")
    return folder / "A.pt"


def kin(text: Text, task: str, rate: float, common: Path) -> lf.Adapter:
    """A task's adapter in an A that stays as it is."""
    torch.set_num_threads(1)
    live = fresh(lora(FULL, 0))
    A = torch.load(common)
    for name, p in live.model.named_parameters():
        if name in A:
            p.data.copy_(A[name])
            p.requires_grad_(False)
    train(live, text, steps=STEPS, rate=rate, seed=0, windows=WINDOWS)
    return live.adapter("default")


def like(adapter: lf.Adapter, count: int) -> dict[str, lf.Adapter]:
    """Random adapters of another's sizes, with one A."""
    g = torch.Generator().manual_seed(0)
    A = {name: torch.randn(part.A.shape, generator=g) for name, part in adapter.items()}
    return {
        f"random{i}": lf.Adapter(
            {n: lf.LowRank(A[n], torch.randn(p.B.shape, generator=g)) for n, p in adapter.items()}
        )
        for i in range(count)
    }


def libraries(folder: Path, jobs: int) -> dict[str, dict[str, float]]:
    """Fold them into the folder, by name; how far each is off on its own adapters."""
    common = common_A(folder)
    made = in_parallel(jobs, kin, [(text_of(t), t, KIN_RATE, common) for t in KIN])
    apart = {*TASKS, TUNING_TASK}
    packaged = sorted((data_dir() / "adapters").iterdir())
    sources: dict[str, Any] = {
        "kin": dict(zip(KIN, made, strict=True)),
        "strangers": [str(path) for path in packaged if path.name not in apart],
        "random": like(made[0], len(KIN)),
    }
    errors = {}
    for name in (*LIBRARIES, *CONTROLS):
        whose, _, sides = name.partition(", ")
        form, rank = ("input", FULL) if sides == "one side" else ("shared", BOTH)
        library = lf.fold(sources[whose], folder / name, form=form, rank=rank)
        off = [library.error(one) for one in library.names]
        errors[name] = {"least": min(off), "mean": sum(off) / len(off), "most": max(off)}
    return errors


def lift(text: Text, way: Way, rate: float, seed: int, folder: Path, base: float) -> dict[str, Any]:
    """Bits a byte below the base's after training, and how many numbers trained."""
    torch.set_num_threads(1)
    name, size = way
    if name == "LoRA":
        live = fresh(lora(size, seed))
    else:
        live = fresh(lf.Loadings(lf.Library.open(folder / name), extra=size, seed=seed))
    numbers = sum(p.numel() for p in live.parameters())
    train(live, text, steps=STEPS, rate=rate, seed=seed, windows=WINDOWS)
    found = {"lift": base - bits(live.model, text), "numbers": numbers}
    return {"task": text.task, "way": way, "rate": rate, "seed": seed, **found}


def label(way: Way) -> str:
    name, size = way
    if name == "LoRA":
        return f"LoRA, rank {size}"
    return f"{name}, extra {size}" if size else name


def summary(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each way's lift and its share of LoRA's at full rank, over tasks and seeds."""
    lifts = {(r["way"], r["task"], r["seed"]): r["lift"] for r in runs}
    rows = []
    for way in dict.fromkeys(r["way"] for r in runs):
        mine = [r for r in runs if r["way"] == way]
        kept = [r["lift"] / lifts[("LoRA", FULL), r["task"], r["seed"]] for r in mine]
        rows.append(
            {
                "way": label(way),
                "numbers": mine[0]["numbers"],
                "bits below base": mean_sd([r["lift"] for r in mine]),
                "retention": mean_sd(kept),
                "worst": round(min(kept), 3),
            }
        )
    return rows


def main() -> None:
    args = arguments(QUESTION, options)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        errors = libraries(folder, args.jobs)
        print("libraries, off on their own adapters:", errors, flush=True)
        tasks, seeds, few = (TASKS[:1], SEEDS[:1], 1) if args.quick else (TASKS, SEEDS, 2)
        texts = {task: text_of(task) for task in (*tasks, TUNING_TASK)}
        base = {task: bits(Llama(), text) for task, text in texts.items()}

        def lifts(tasks: Sequence[str], tried: Sequence[tuple[Way, float, int]]) -> Any:
            given = [(texts[t], *one, folder, base[t]) for t in tasks for one in tried]
            return in_parallel(args.jobs, lift, given)

        grids = {w: GRID_OF_CORES if w[0].endswith("both sides") else GRID for w in WAYS}
        tuned = lifts([TUNING_TASK], [(w, r, TUNING_SEED) for w in WAYS for r in grids[w][:few]])
        best = {r["way"]: r["rate"] for r in sorted(tuned, key=lambda r: r["lift"])}
        runs = lifts(tasks, [(w, best[w], s) for s in seeds for w in WAYS])
    rows = summary(runs)
    settings = {"steps": STEPS, "windows": WINDOWS, "bytes": LENGTH, "kin": KIN, "errors": errors}
    result = {"rows": rows, "runs": runs, "tuned": tuned, **settings}
    report(QUESTION, [shown(row) for row in rows], result, args.save and not args.quick)


if __name__ == "__main__":
    main()
