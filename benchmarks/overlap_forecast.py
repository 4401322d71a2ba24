"""Does what two adapters overlap in forecast what merging them costs?

Pairs of the demo's adapters, merged by `linear` at weight 1 and ½ each. For each of the two tasks
the loss of retention, 1 − (base − merged) / (base − adapter) in loss on held-out text, is ranked
beside what `overlap` says of the pair: Spearman's correlation over all tasks of all pairs, printed
whatever it is.
"""

from __future__ import annotations

import argparse
import itertools
import random
import warnings
from collections.abc import Callable

import numpy as np
import torch
from _common import arguments, report
from merge_quality import Table

import lorafold as lf
from lorafold.demo.model import data_dir
from lorafold.demo.run import Judge

QUESTION = "Does what two adapters overlap in forecast what merging them costs each?"
WEIGHTS = (1.0, 0.5)

# Of a task's own adapter a and the other one, b, as `overlap(a, b)` has them.
FORECASTS: dict[str, Callable[[lf.Overlap], float]] = {
    "interference_a": lambda o: o.interference_a,
    "‖b‖ / ‖a‖": lambda o: o.norm_b / o.norm_a,
    "shared_out": lambda o: o.shared_out,
    "shared_in": lambda o: o.shared_in,
    "-cosine": lambda o: -o.cosine,
}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=int, default=60)


def ranks(values: list[float]) -> np.ndarray:
    """Ranks, the mean of them for equals."""
    x = np.asarray(values)
    found: np.ndarray = (x[:, None] > x).sum(1) + 0.5 * (x[:, None] == x).sum(1)
    return found


def spearman(x: list[float], y: list[float]) -> float:
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def of_pairs(values: list[float]) -> list[float]:
    """The mean of the two tasks of each pair."""
    return [(x + y) / 2 for x, y in zip(values[::2], values[1::2], strict=True)]


def main() -> None:
    args = arguments(QUESTION, options)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)  # modules that some lack
    folder = data_dir() / "adapters"
    names = sorted(p.name for p in folder.iterdir())
    adapters = {n: lf.load(folder / n) for n in names}
    table = Table(Judge(names, lambda name: None), adapters)
    pairs = random.Random(0).sample(list(itertools.combinations(names, 2)), args.pairs)
    forecasts: dict[str, list[float]] = {name: [] for name in FORECASTS}
    losses: dict[float, list[float]] = {w: [] for w in WEIGHTS}
    for pair in pairs:
        two = {n: adapters[n] for n in pair}
        for w in WEIGHTS:
            merged = lf.merge(two, weights=[w, w])
            losses[w] += [1 - kept for kept in table.kept(pair, merged, 1)]
        for own, other in (pair, pair[::-1]):
            found = lf.overlap(adapters[own], adapters[other])
            for name, forecast in FORECASTS.items():
                forecasts[name].append(forecast(found))
    rows = [
        {"forecast": f"{name}, of a task"}
        | {f"rank correlation at weight {w:g}": spearman(values, losses[w]) for w in WEIGHTS}
        for name, values in forecasts.items()
    ]
    rows.append(
        {"forecast": "interference, of a pair"}
        | {
            f"rank correlation at weight {w:g}": spearman(
                of_pairs(forecasts["interference_a"]), of_pairs(losses[w])
            )
            for w in WEIGHTS
        }
    )
    result = {
        "pairs": len(pairs),
        "rows": rows,
        "median loss of retention": {f"{w:g}": float(np.median(losses[w])) for w in WEIGHTS},
    }
    report(QUESTION, rows, result, args.save)


if __name__ == "__main__":
    main()
