"""How long does reading adapters back from a library take?

The 31 packaged adapters (792 modules), folded at 10 % error, each decoded by `lib[name]`: at most
100 ms for all. Beside it one module at a time, as before small ones were decoded together; and
the same with a neighbour at work on every core, where anything shared between threads waits. With
the threads that the process has.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from _common import arguments, report, seconds

import lorafold as lf
from lorafold.demo.model import data_dir

QUESTION = "Reading the 31 packaged adapters from a library"
AT_MOST = 0.1


def whole(lib: lf.Library) -> None:
    for name in lib:
        lib[name]


def by_module(lib: lf.Library) -> None:
    for name in lib:
        for path in lib.contents.shapes(lib.contents.entry(name)):
            lib.update(name, path)


def work() -> None:
    torch.set_num_threads(1)
    x = torch.ones(512, 512)
    while True:
        x @ x


@contextmanager
def neighbours() -> Iterator[None]:
    """Another process at work for each core."""
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=work, daemon=True) for _ in range(os.cpu_count() or 1)]
    for other in others:
        other.start()
    try:
        seconds(lambda: [other.join(1) for other in others])  # until they are at work
        yield
    finally:
        for other in others:
            other.terminate()
            other.join()


def measured(folder: str, repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {"together": [], "module by module": []}
    for _ in range(repeats):
        for what, read in (("together", whole), ("module by module", by_module)):
            with lf.Library.open(folder) as lib:
                times[what].append(seconds(lambda lib=lib, read=read: read(lib)))
    return times


def main() -> None:
    args = arguments(QUESTION, lambda p: p.add_argument("--repeats", type=int, default=15))
    with tempfile.TemporaryDirectory() as folder:
        sources = sorted(Path(data_dir() / "adapters").iterdir())
        lib = lf.fold(sources, f"{folder}/lib", tolerance=0.1)
        modules = sum(len(lib[name]) for name in lib)
        for name in lib:  # one by one gives the same
            for path, u in lib[name].modules.items():
                alone = lib.update(name, path)
                assert torch.equal(alone.A, u.A)
                assert torch.equal(alone.B, u.B)
        times = measured(f"{folder}/lib", args.repeats)
        with neighbours():
            times |= {f"{what}, busy cores": t for what, t in measured(f"{folder}/lib", 3).items()}
    rows = [
        {"read": what, "median, ms": 1e3 * statistics.median(t), "least, ms": 1e3 * min(t)}
        for what, t in times.items()
    ]
    result = {
        "adapters": len(sources),
        "modules": modules,
        "threads": torch.get_num_threads(),
        "seconds": {what: statistics.median(t) for what, t in times.items()},
        "least": {what: min(t) for what, t in times.items()},
        "at_most": AT_MOST,
        "met": statistics.median(times["together"]) <= AT_MOST,
    }
    report(QUESTION, rows, result, args.save)


if __name__ == "__main__":
    main()
