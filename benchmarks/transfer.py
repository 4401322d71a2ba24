"""How much of an adapter's lift arrives on another base, by method and by number of texts?

The demo's adapters, moved from its first base to three others: a wider one, a narrower one with
more layers, and one with byte pairs and fewer heads of keys and values. Retention of a task is
(base − moved) / (base − native), in loss on its held-out text, where `native` is an adapter trained
on the target by the same recipe (measured by tools/make_demo.py, and packaged). Below zero the
adapter does harm.

The calibration texts are pieces of 256 characters, half of them of the bases' own corpus, half of
the kind that the adapters were trained on, and nothing of the held-out texts. One alignment of a
pair of bases serves all adapters, and is made of all tasks' texts; `distill` and `auto` look at one
adapter, and get texts of its task. `distill` takes 80 steps of 512 tokens, however many texts there
are: its settings were chosen on `sql_inserts` and `dates` moved to `wide`.

Two controls: random factors with the norms and ranks of what `svd` gives; and no transfer at all,
fresh factors trained on the next tokens of the very texts that `distill` has, for as many steps of
as many tokens. At the end the moved adapters are trained on for a tenth of the native steps, next
to fresh ones trained for as long by the same recipe, its schedule shortened.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _common import arguments, report, table_of
from rich.console import Console
from torch import Tensor

import lorafold as lf
from lorafold.demo.model import BASES, base_dir, data_dir, heldout_loss, load_base, tokens_of
from lorafold.transfer.methods.distill import DEFAULTS

QUESTION = "adapters moved to other bases: the share of a native adapter's lift that arrives"
PIECE = 256
COUNTS = (1, 10, 100)
PLAIN = ("truncate", "interpolate", "svd")
ALIGNED: dict[str, dict[str, Any]] = {
    "procrustes": {"method": "procrustes"},
    "functional": {"method": "functional"},
    "functional after procrustes": {"method": "functional", "after": "procrustes"},
}
PARTS = ("plain", "aligned", "distill", "labels", "auto")
HIDDEN = ("retention", "said")
LABELS = "no transfer: labels of the same texts"
LABELS_RATE = 5e-3  # the best of the same two tasks, too


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--targets", nargs="+", default=list(BASES[1:]), choices=BASES[1:])
    parser.add_argument("--tasks", type=int, default=8, help="how many of them, every kind alike")
    parser.add_argument("--counts", nargs="+", type=int, default=list(COUNTS), help="of texts")
    parser.add_argument("--more", nargs="*", type=int, default=[1000], help="for alignments alone")
    parser.add_argument("--labels", type=int, default=8, help="tasks of the control with labels")
    parser.add_argument("--tuned", type=int, default=8, help="tasks that are trained on")
    parser.add_argument("--auto", type=int, default=1, help="tasks of `auto`, which runs all")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--jobs", type=int, default=1, help="targets at the same time")
    parser.add_argument("--quick", action="store_true", help="one target, two tasks, 10 texts")


def sources() -> Any:
    """The texts' makers, which lie beside the demo's."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
    import demo_sources
    import demo_tasks

    return demo_sources, demo_tasks


@functools.cache
def training_text(task: str) -> bytes:
    text: bytes = next(t for t in sources()[1].TASKS if t.name == task).training_text()
    return text


def calibration(tasks: Sequence[str], count: int) -> list[str]:
    """Pieces in a fixed random order: of documentation, and of the tasks' texts in turn."""
    prose = "\n".join(text for _, text in sources()[0].prose("train"))
    rng = random.Random(0)

    def piece(text: str) -> str:
        at = rng.randrange(max(1, len(text) - PIECE))
        return text[at : at + PIECE]

    own = [training_text(task).decode("utf-8", "ignore") for task in tasks]
    order = rng.sample(own, len(own))
    return [piece(prose if k % 2 else order[k // 2 % len(order)]) for k in range(count)]


def spread(tasks: Sequence[str], count: int) -> list[str]:
    """So many of them, evenly: texts come first, then algorithms."""
    return [tasks[k * len(tasks) // count] for k in range(min(count, len(tasks)))]


class Target:
    """A base to move to, and what is known of the tasks on it."""

    def __init__(self, name: str) -> None:
        self.name, self.folder = name, base_dir(name)
        self.config, self.state = load_base(name)
        self.known = json.loads((self.folder / "tasks.json").read_text())

    def kept(self, task: str, state: Mapping[str, Tensor]) -> float:
        """The retention of a task under these weights."""
        text = (data_dir() / "heldout" / f"{task}.txt").read_bytes()
        tokens = tokens_of(text, self.folder)
        loss = heldout_loss(self.config, dict(state), text, tokens=tokens)
        base, native = (self.known[task][f"{key}_loss"] for key in ("base", "native"))
        return float((base - loss) / (base - native))

    def tokens(self, text: str | bytes) -> Tensor:
        return torch.tensor(
            tokens_of(text.encode() if isinstance(text, str) else text, self.folder)
        )

    def fresh(self, recipe: Any) -> Any:
        from demo_native import fresh

        return fresh(self.state, recipe)

    def trained(
        self, start: Any, tokens: Tensor, recipe: Any, steps: int, share: float = 1.0
    ) -> dict[str, tuple[Tensor, Tensor, float]]:
        """The factors after some steps from these, of so much of the recipe's batches."""
        from demo_native import trained
        from make_demo import BASES as SHAPES

        windows = max(1, round(share * SHAPES[self.name].native_batch))
        found: dict[str, tuple[Tensor, Tensor, float]] = trained(
            self.config, self.state, start, tokens, recipe, steps=steps, windows=windows
        )
        return found


def noise_like(adapter: lf.Adapter) -> lf.Adapter:
    """Random factors of the same ranks, scaled to the same norm at each module."""
    g = torch.Generator().manual_seed(0)
    modules = {}
    for path, u in adapter.modules.items():
        B, A = torch.randn(u.B.shape, generator=g), torch.randn(u.A.shape, generator=g)
        v = lf.LowRank(A, B)
        modules[path] = v * (u.norm() / v.norm())
    return lf.Adapter(modules)


class Moving:
    """The methods from the first base to one target: rows, and what was moved."""

    def __init__(self, target: Target, tasks: Sequence[str]) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.target, self.tasks = target, tasks
        folders = base_dir(), target.folder
        self.bases = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in folders]
        self.tokenizers = tuple(AutoTokenizer.from_pretrained(f) for f in folders)
        self.adapters = {task: lf.load(data_dir() / "adapters" / task) for task in tasks}
        self.rows: list[dict[str, Any]] = []
        self.found: dict[tuple[str, int], dict[str, lf.Adapter]] = {}

    def between(self, task: str, method: str, **options: Any) -> lf.Transfer:
        return lf.transfer(self.adapters[task], *self.bases, method=method, **options)

    def without_texts(self) -> None:
        for method in PLAIN:
            self.add(method, lambda task, method=method: self.between(task, method))
        with_tokens = {"tokenizers": self.tokenizers}
        self.add("vocabulary", lambda task: self.between(task, "vocabulary", **with_tokens))
        self.add("random, norms of svd", self.control)

    def control(self, task: str) -> lf.Transfer:
        moved = self.between(task, "svd")
        return replace(moved, adapter=noise_like(moved.adapter))

    def aligned(self, count: int) -> None:
        texts = calibration(self.tasks, count)
        start = time.perf_counter()
        alignment = lf.align(*self.bases, texts, tokenizers=self.tokenizers)
        took = time.perf_counter() - start
        for name, options in ALIGNED.items():

            def moved(task: str, options: Any = options) -> lf.Transfer:
                return lf.transfer(self.adapters[task], alignment=alignment, **options)

            self.add(name, moved, texts=count, align=took)

    def each_alone(self, method: str, count: int, tasks: Sequence[str]) -> None:
        def moved(task: str) -> lf.Transfer:
            texts = calibration([task], count)
            return self.between(task, method, texts=texts, tokenizers=self.tokenizers)

        self.add(method, moved, texts=count, tasks=tasks)

    def labelled(self, count: int, tasks: Sequence[str]) -> None:
        """No transfer: the texts' next tokens, in as many steps of as many tokens as `distill`."""
        from make_demo import RECIPES

        def moved(task: str) -> lf.Adapter:
            recipe = replace(RECIPES[task], learning_rate=LABELS_RATE)
            tokens = self.target.tokens("".join(calibration([task], count)))
            start, steps = self.target.fresh(recipe), DEFAULTS["steps"]
            factors = self.target.trained(start, tokens, recipe, steps, share=1 / 4)
            return lf.Adapter(
                {name.removesuffix(".weight"): lf.LowRank(*f) for name, f in factors.items()}
            )

        self.add(LABELS, moved, texts=count, tasks=tasks)

    def add(
        self,
        method: str,
        moved: Callable[[str], lf.Transfer | lf.Adapter],
        texts: int = 0,
        align: float | None = None,
        tasks: Sequence[str] | None = None,
    ) -> None:
        """A method's row: retentions, what `auto` said, and the seconds a move took."""
        kept: dict[str, float] = {}
        found: dict[str, lf.Adapter] = {}
        took, said = [], {}
        for task in tasks or self.tasks:
            start = time.perf_counter()
            try:
                result = moved(task)
            except lf.errors.LorafoldError as e:
                print(f"{method}, {texts} texts: {e}", flush=True)
                return
            took.append(time.perf_counter() - start)
            found[task] = getattr(result, "adapter", result)
            kept[task] = self.target.kept(task, found[task].apply_to(self.target.state))
            if method == "auto":
                told = result.report.said
                said[task] = {key: told[key] for key in ("chosen", "scores", "advice")}
        row = {
            "target": self.target.name,
            "method": method,
            "texts": texts,
            "tasks": len(kept),
            "mean": statistics.fmean(kept.values()),
            "worst": min(kept.values()),
            "align s": align,
            "move s": statistics.median(took),
        }
        print(row, {task: told["chosen"] for task, told in said.items()}, flush=True)
        self.rows.append({**row, "retention": kept, **({"said": said} if said else {})})
        self.found[method, texts] = found


# Training on


def tuning(target: Target, adapters: Mapping[str, lf.Adapter]) -> list[dict[str, Any]]:
    """A tenth of the native steps, from the moved adapter and from a fresh one."""
    from demo_native import with_factors
    from make_demo import RECIPES

    rows = []
    for task, adapter in adapters.items():
        recipe, steps = RECIPES[task], target.known[task]["steps"] // 10
        tokens, new = target.tokens(training_text(task)), target.fresh(recipe)
        scale = next(iter(new.values()))[2]
        start = {f"{p}.weight": (u.A, u.B * (u.scale / scale), scale) for p, u in adapter.items()}

        def kept(factors: Any, task: str = task) -> float:
            return target.kept(task, with_factors(target.state, factors))

        rows.append(
            {
                "target": target.name,
                "task": task,
                "steps": steps,
                "moved": kept(start),
                "moved, trained": kept(target.trained(start, tokens, recipe, steps)),
                "fresh, trained": kept(target.trained(new, tokens, recipe, steps)),
            }
        )
        print(rows[-1], flush=True)
    return rows


def rounded(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is shown of them."""
    return [
        {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items() if k not in HIDDEN}
        for row in rows
    ]


def of_target(name: str, args: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All rows of one target: of the moves, and of the training after them."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)  # modules without a counterpart
    sources()
    target, most = Target(name), max(args.counts)
    tasks = spread(list(target.known), args.tasks)
    moving, wanted = Moving(target, tasks), args.only
    if "plain" in wanted:
        moving.without_texts()
    for count in args.counts:
        if "aligned" in wanted:
            moving.aligned(count)
        if "distill" in wanted:
            moving.each_alone("distill", count, tasks)
        if "labels" in wanted and count > 1:  # a window takes more than one text
            moving.labelled(count, spread(tasks, args.labels))
    for count in args.more if "aligned" in wanted else ():
        moving.aligned(count)
    if "auto" in wanted:
        moving.each_alone("auto", most, spread(tasks, args.auto))
    moved = moving.found.get(("distill", most), {})
    return moving.rows, tuning(
        target, {task: moved[task] for task in spread(list(moved), args.tuned)}
    )


def main() -> None:
    args = arguments(QUESTION, options)
    torch.set_num_threads(1)
    if args.quick:
        args.targets, args.counts, args.more, args.tasks = args.targets[:1], [10], [], 2
        args.labels = args.tuned = args.auto = 1
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        found = list(pool.map(of_target, args.targets, itertools.repeat(args)))
    rows, trained = ([row for part in parts for row in part] for parts in zip(*found, strict=True))
    if trained:
        Console().print(table_of(rounded(trained), "a tenth of the native steps"))
    result = {"piece": PIECE, "main": max(args.counts), "rows": rows, "trained": trained}
    report(QUESTION, rounded(rows), result, args.save)


if __name__ == "__main__":
    main()
