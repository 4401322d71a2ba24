"""Adapters that run at any rank: which way of training them is worth most?

Every way gets the same base, tasks, batches, steps and schedule, and is then run at ranks 1, 2, 4,
8 and 16. The score at a rank is what the adapter takes off the base's loss on held-out text, in
bits a byte. AURAC, the area under score against rank, is the trapezoid rule over these five ranks
divided by the length of the axis: on an axis of ranks (where 8 … 16 is more than half of it) and on
one of their logarithms (where each doubling counts alike).

- nested: `lf.LoRA(nested=…)`, the mean of all prefixes' updates in one forward.
- DyLoRA: one prefix a step, `lf.train.RandomRank`.
- re-gauged: plain training at rank 16, then `Adapter.nested()`; and the same after DyLoRA.
- prefixes: the same plain training, cut as it is.
- one run a rank: five adapters, trained for one rank each. A ceiling, at five times the cost.

Each way's peak learning rate is the best of a few on a task and a seed that are not reported
(`--tune` prints them). The cost is that of a step beside a plain one, steps in turn.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from _common import arguments, interleaved, report
from _training import (
    LENGTH,
    TARGETS,
    WINDOWS,
    Text,
    batches,
    bits,
    fresh,
    in_parallel,
    loss_of,
    mean_sd,
    optimizer_of,
    shown,
    text_of,
    train,
)

import lorafold as lf
from lorafold.demo.model import Llama

QUESTION = (
    "adapters that run at any rank: bits a byte taken off the base's loss, by way of training"
)
RANKS = (1, 2, 4, 8, 16)
FULL = RANKS[-1]
TASKS = ("html_help", "sql_inserts", "json_facts", "sort_letters", "roman", "dates")
SEEDS = (0, 1, 2)
STEPS = 80
TUNING_TASK, TUNING_SEED = "csv_facts", 100
GRID = (4e-3, 8e-3, 1.6e-2)
NESTED, DYLORA, DYLORA_GAUGED = "nested", "DyLoRA", "DyLoRA, re-gauged"
GAUGED, PREFIXES, APART = "re-gauged", "prefixes", "one run a rank"
# The best of GRID on TUNING_TASK, by AURAC on the axis of logarithms; one run a rank at rank 2.
RATES = {NESTED: 4e-3, DYLORA: 8e-3, PREFIXES: 4e-3, APART: 8e-3}
Scores = dict[int, float]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tune", action="store_true", help="print scores over learning rates")
    parser.add_argument("--quick", action="store_true", help="one task, one seed, 20 steps")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at the same time")


def aurac(scores: Mapping[int, float], *, log: bool) -> float:
    """The normalised area under score against rank."""
    at = {k: math.log2(k) if log else float(k) for k in RANKS}
    pieces = ((at[b] - at[a]) * (scores[a] + scores[b]) / 2 for a, b in itertools.pairwise(RANKS))
    return sum(pieces) / (at[RANKS[-1]] - at[RANKS[0]])


class Way:
    """A way of training: what is attached, and what runs in a step."""

    def __init__(self, method: str, seed: int, rank: int = FULL) -> None:
        nested = RANKS if method == NESTED else None
        self.live = fresh(lf.LoRA(rank, alpha=2 * rank, targets=TARGETS, seed=seed, nested=nested))
        self.method, self.seed = method, seed
        self._random = lf.train.RandomRank(self.live, RANKS[: RANKS.index(rank) + 1], seed=seed)

    def running(self, step: int) -> Any:
        rank = self._random.at(step) if self.method == DYLORA else None
        return self.live.use("default", rank=rank)


def trained(method: str, text: Text, seed: int, rate: float, steps: int, rank: int = FULL) -> Any:
    way = Way(method, seed, rank)
    train(way.live, text, steps=steps, rate=rate, seed=seed, running=way.running)
    return way.live


def scores_of(live: lf.Live, text: Text, base: float, ranks: Sequence[int] = RANKS) -> Scores:
    """Bits a byte below the base's loss, at each rank."""
    found = {}
    for rank in ranks:
        with live.use("default", rank=rank):
            found[rank] = base - bits(live.model, text)
    return found


def regauged(live: lf.Live) -> lf.Live:
    """The same update on a fresh base, with its prefixes in the order of singular values."""
    return lf.attach(Llama().eval(), live.adapter("default").nested())


def cell(text: Text, seed: int, steps: int, rates: Mapping[str, float]) -> dict[str, Scores]:
    """All ways on one task with one seed."""
    torch.set_num_threads(1)
    base = bits(Llama(), text)
    found: dict[str, Scores] = {}
    for method in (NESTED, DYLORA):
        live = trained(method, text, seed, rates[method], steps)
        found[method] = scores_of(live, text, base)
        if method == DYLORA:
            found[DYLORA_GAUGED] = scores_of(regauged(live), text, base)
    plain = trained(PREFIXES, text, seed, rates[PREFIXES], steps)
    found[GAUGED] = scores_of(regauged(plain), text, base)
    found[PREFIXES] = scores_of(plain, text, base)
    found[APART] = {FULL: found[PREFIXES][FULL]}
    for rank in RANKS[:-1]:
        live = trained(APART, text, seed, rates[APART], steps, rank)
        found[APART] |= scores_of(live, text, base, [rank])
    return found


def step_costs() -> dict[str, float]:
    """The time of a step of each way beside a plain one."""
    text = text_of(TUNING_TASK)
    jobs = {}
    for method in (PREFIXES, NESTED, DYLORA):
        way = Way(method, 0)
        optimizer = optimizer_of(list(way.live.parameters()), 1e-3)
        way.live.guard(optimizer)
        rows, steps = batches(text, 0), iter(range(10**6))

        def step(
            way: Way = way, optimizer: Any = optimizer, rows: Any = rows, at: Any = steps
        ) -> None:
            with way.running(next(at)):
                loss_of(way.live.model, next(rows)).backward()
            optimizer.step()
            optimizer.zero_grad()

        jobs[method] = step
    times = interleaved(jobs, repeats=25, warmup=2)
    return {method: time / times[PREFIXES] for method, time in times.items()}


def summary(cells: Sequence[Mapping[str, Scores]], costs: Mapping[str, float]) -> list[Any]:
    """Each way's means and deviations over tasks and seeds, and next to re-gauging."""
    rows = []
    for method in cells[0]:
        mine = [c[method] for c in cells]
        row: dict[str, Any] = {"way": method}
        areas = [aurac(scores, log=True) for scores in mine]
        apart = [a - aurac(c[GAUGED], log=True) for a, c in zip(areas, cells, strict=True)]
        row["AURAC linear"] = mean_sd([aurac(scores, log=False) for scores in mine])
        row["AURAC log2"] = mean_sd(areas)
        row["log2 − re-gauged"] = mean_sd(apart)
        row["better in"] = f"{sum(a > 0 for a in apart)} of {len(apart)}"
        row |= {f"rank {k}": mean_sd([s[k] for s in mine]) for k in RANKS}
        row["step"] = {APART: float(len(RANKS)), GAUGED: 1.0, DYLORA_GAUGED: costs[DYLORA]}.get(
            method
        ) or costs[method]
        rows.append(row)
    return rows


def tuning(text: Text, method: str, rank: int, rate: float) -> dict[str, Any]:
    """Scores at one learning rate on a task that is not reported."""
    torch.set_num_threads(1)
    base = bits(Llama(), text)
    live = trained(method, text, TUNING_SEED, rate, STEPS, rank)
    ranks = RANKS if rank == FULL else [rank]
    found = {"task": text.task, "way": method, "rank": rank, "rate": rate}
    found |= {f"at {k}": v for k, v in scores_of(live, text, base, ranks).items()}
    if method == PREFIXES:
        again = scores_of(regauged(live), text, base)
        found |= {f"re-gauged at {k}": v for k, v in again.items()}
    return found


def main() -> None:
    args = arguments(QUESTION, options)
    torch.set_num_threads(1)
    if args.tune:
        ways = [(m, FULL) for m in (NESTED, DYLORA, PREFIXES)] + [(APART, 2)]
        in_parallel(
            args.jobs,
            tuning,
            [(text_of(TUNING_TASK), *w, r) for w in ways for r in GRID],
        )
        return
    tasks, seeds, steps = (TASKS[-1:], SEEDS[:1], 20) if args.quick else (TASKS, SEEDS, STEPS)
    costs = step_costs()
    print("a step beside a plain one:", costs, flush=True)
    keys = [(task, seed) for task in tasks for seed in seeds]
    cells = in_parallel(args.jobs, cell, [(text_of(t), seed, steps, RATES) for t, seed in keys])
    rows = summary(cells, costs)
    kept = [{"task": t, "seed": s, "scores": c} for (t, s), c in zip(keys, cells, strict=True)]
    settings = {"steps": steps, "rates": RATES, "windows": WINDOWS, "length": LENGTH}
    tuned = {"task": TUNING_TASK, "seed": TUNING_SEED, "grid": GRID}
    result = {"rows": rows, "cells": kept, **settings, "tuned on": tuned}
    report(QUESTION, [shown(row) for row in rows], result, args.save and not args.quick)


if __name__ == "__main__":
    main()
