"""How much of each task's lift is left after a merge, by every method?

The demo's adapters in pairs, fours and eights. Retention of a task is (base − merged) / (base −
adapter), in loss on the second half of its held-out text; the factor λ of each method is chosen on
the first halves, among a few. Beside it: the best single adapter of each group, and each method
with *random* adapters of the same ranks and norms in the place of all the others. Where that does
as well, the method does nothing for the others that noise would not, and what is left of a task
says how well it survives noise.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from _common import arguments, report

import lorafold as lf
from lorafold.demo.model import data_dir
from lorafold.demo.run import Judge

QUESTION = "merging trained adapters: the share of each task's lift that is kept"
FACTORS = (0.5, 1.0, 2.0)
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "linear, pico": {"pico": True},
    "magnitude": {"density": 0.3},
    "ties": {"density": 0.3},
    "ties, delta": {"density": 0.3, "space": "delta"},
    "ties, pico": {"density": 0.3, "pico": True},
    "dare": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "della": {"density": 0.5},
    "breadcrumbs": {"density": 0.5},
    "knots": {"density": 0.3},
    "tsv": {},
    "tsv, pico": {"pico": True},
    "iso_c": {},
    "iso_cts": {},
    "lego": {},
    "ctm": {},
    "factors (PEFT's linear)": {"space": "factors"},
}
Group = tuple[str, ...]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--fours", type=int, default=1)
    parser.add_argument("--eights", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))


def groups(names: Sequence[str], pairs: int, fours: int, eights: int) -> list[Group]:
    """Seeded groups; no two of a size share a task while there are tasks left."""
    found = []
    for size, count in ((2, pairs), (4, fours), (8, eights)):
        shuffled = random.Random(size).sample(list(names), len(names))
        found += [tuple(shuffled[k * size : (k + 1) * size]) for k in range(count)]
    return found


def noise_like(adapter: lf.Adapter, seed: int) -> lf.Adapter:
    """Random factors of the same ranks, scaled to the same norm at each module."""
    g = torch.Generator().manual_seed(seed)
    modules = {}
    for path, u in adapter.modules.items():
        B, A = torch.randn(u.B.shape, generator=g), torch.randn(u.A.shape, generator=g)
        v = lf.LowRank(A, B)
        modules[path] = v * (u.norm() / v.norm())
    return lf.Adapter(modules, base_model=adapter.base_model)


class Table:
    """Retentions, asked of the model."""

    def __init__(self, judge: Judge, adapters: Mapping[str, lf.Adapter]) -> None:
        self._judge, self._adapters = judge, adapters
        self._own: dict[tuple[str, int], float] = {}

    def retention(self, name: str, merged: lf.Adapter, part: int) -> float:
        base = self._judge.loss(name, None, part)
        if (name, part) not in self._own:
            self._own[name, part] = self._judge.loss(name, self._adapters[name], part)
        return (base - self._judge.loss(name, merged, part)) / (base - self._own[name, part])

    def kept(self, group: Group, merged: lf.Adapter, part: int) -> list[float]:
        return [self.retention(name, merged, part) for name in group]


def merged_by(method: str, sources: Mapping[str, lf.Adapter], factor: float) -> lf.Adapter:
    name = method.partition(",")[0].partition(" (")[0]
    kwargs = dict(METHODS[method])
    if name == "factors":
        name, sources = "linear", {n: padded(a) for n, a in sources.items()}
    return lf.merge(dict(sources), name, lambda_=factor, **kwargs)


def padded(adapter: lf.Adapter, rank: int = 16) -> lf.Adapter:
    """Zeros up to one rank, which PEFT needs to average A and B."""
    modules = {}
    for path, u in adapter.modules.items():
        more = rank - u.rank
        A, B = (
            torch.nn.functional.pad(t, p) for t, p in ((u.A, (0, 0, 0, more)), (u.B, (0, more)))
        )
        modules[path] = lf.LowRank(A, B, u.scale)
    return lf.Adapter(modules, base_model=adapter.base_model)


def of_method(
    method: str, table: Table, adapters: Mapping[str, lf.Adapter], wanted: Sequence[Group]
) -> dict[str, Any]:
    """Retentions of one method by size of the group, at the factor that is best on first halves."""
    start = time.perf_counter()

    def run(factor: float, part: int) -> dict[Group, list[float]]:
        return {
            group: table.kept(
                group, merged_by(method, {n: adapters[n] for n in group}, factor), part
            )
            for group in wanted
        }

    def mean(found: Mapping[Group, list[float]], size: int) -> float:
        return statistics.fmean(x for g, xs in found.items() if len(g) == size for x in xs)

    sizes = sorted({len(g) for g in wanted})
    first = {f: run(f, 0) for f in FACTORS}
    best = {size: max(FACTORS, key=lambda f: mean(first[f], size)) for size in sizes}
    row: dict[str, Any] = {"method": method}
    for size in sizes:
        xs, control = [], []
        for group in (g for g in wanted if len(g) == size):
            real = {n: adapters[n] for n in group}
            xs += table.kept(group, merged_by(method, real, best[size]), 1)
            for k, n in enumerate(group):
                others = {m: a if m == n else noise_like(a, k) for m, a in real.items()}
                control.append(table.retention(n, merged_by(method, others, best[size]), 1))
        row |= {
            f"{size}: λ": best[size],
            f"{size}: mean": statistics.fmean(xs),
            f"{size}: worst": min(xs),
            f"{size}: with noise": statistics.fmean(control),
        }
    row["seconds"] = time.perf_counter() - start
    return row


def of_best_single(
    table: Table, adapters: Mapping[str, lf.Adapter], wanted: Sequence[Group]
) -> dict[str, Any]:
    """No merge at all: the one adapter of the group that serves the group best."""
    row: dict[str, Any] = {"method": "best single adapter"}
    for size in sorted({len(g) for g in wanted}):
        xs = []
        for group in (g for g in wanted if len(g) == size):
            each = {n: table.kept(group, adapters[n], 0) for n in group}
            best = max(group, key=lambda n: statistics.fmean(each[n]))
            xs += table.kept(group, adapters[best], 1)
        row |= {
            f"{size}: λ": 1.0,
            f"{size}: mean": statistics.fmean(xs),
            f"{size}: worst": min(xs),
            f"{size}: with noise": float("nan"),
        }
    return row


def main() -> None:
    args = arguments(QUESTION, options)
    torch.set_num_threads(1)
    folder = data_dir() / "adapters"
    names = sorted(p.name for p in folder.iterdir())
    adapters = {n: lf.load(folder / n) for n in names}
    quiet: Callable[[str], None] = lambda name: None  # noqa: E731
    table = Table(Judge(names, quiet), adapters)
    wanted = groups(names, args.pairs, args.fours, args.eights)
    import warnings

    warnings.simplefilter("ignore", UserWarning)  # modules that some lack
    rows = [of_best_single(table, adapters, wanted)]
    for method in args.methods:
        rows.append(of_method(method, table, adapters, wanted))
        print(rows[-1], flush=True)
    shown = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    finite = [{k: v for k, v in row.items() if v == v} for row in rows]  # noqa: PLR0124 (NaN)
    result = {"factors": FACTORS, "groups": [list(g) for g in wanted], "rows": finite}
    report(QUESTION, shown, result, args.save)


if __name__ == "__main__":
    main()
