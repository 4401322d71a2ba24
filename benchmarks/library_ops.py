"""What do `fold`, `add` and `open` cost in a large library?

Folding 1,000 adapters of one family: under three minutes. `add` to that library against what it
can't do without, reading the adapter's file and projecting it on the library's bases: at most twice
that. Opening a library of 10,000 names: under 10 opens of files. All on one thread.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from _common import arguments, report, seconds

import lorafold as lf

QUESTION = "Folding 1,000; add against reading and projecting; files opened for 10,000 names"
D, RANK, WIDTH, MODULES = 4096, 16, 32, 8
AT_MOST, OPENS_AT_MOST, FOLD_AT_MOST = 2.0, 10, 180.0


def family(count: int, d: int, modules: int, seed: int = 0) -> dict[str, lf.Adapter]:
    """Adapters on common sides of `WIDTH` directions."""
    g = torch.Generator().manual_seed(seed)
    sides = [
        [torch.linalg.qr(torch.randn(d, min(WIDTH, d), generator=g))[0] for _ in range(2)]
        for _ in range(modules)
    ]

    def update(U: torch.Tensor, V: torch.Tensor) -> lf.LowRank:
        A = torch.randn(RANK, V.shape[1], generator=g) @ V.T
        return lf.LowRank(A.bfloat16(), (U @ torch.randn(U.shape[1], RANK, generator=g)).bfloat16())

    return {
        f"a{i}": lf.Adapter({f"layers.{m}.q_proj": update(*sides[m]) for m in range(modules)})
        for i in range(count)
    }


def add_and_read(folder: Path, repeats: int) -> dict[str, float]:
    """Seconds of folding, and the medians of adding and of reading with projecting, in turn."""
    adapters = family(1000 + repeats, D, MODULES)
    names = list(adapters)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"]}
    for name in names[1000:]:
        lf.save(lf.Adapter(adapters[name].modules, config=config), folder / name)
    sources = {n: adapters[n] for n in names[:1000]}
    folding = seconds(lambda: lf.fold(sources, folder / "lib", form="shared"))
    lib = lf.Library.open(folder / "lib")
    times: dict[str, list[float]] = {"add": [], "read and project": []}
    for name in names[1000:]:
        times["read and project"].append(seconds(lambda n=name: lib.project(lf.load(folder / n))))
        times["add"].append(seconds(lambda n=name: lib.add(folder / n)))
    assert max(lib.error(n) for n in lib) <= 0.1
    return {"fold": folding, **{name: statistics.median(t) for name, t in times.items()}}


def opens_of(folder: Path, count: int) -> tuple[int, float]:
    """Files opened by `Library.open` of a library of `count` names, and its seconds."""
    lf.fold(family(count, 16, 2), folder / "many", form="svd")
    seen: list[str] = []
    watching = True

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event == "open":
            seen.append(os.fspath(str(arguments[0])))

    lf.Library.open(folder / "many").close()  # what is imported on first use is not counted
    sys.addaudithook(hook)
    start = time.perf_counter()
    lib = lf.Library.open(folder / "many")
    took = time.perf_counter() - start
    watching = False
    assert len(lib) == count
    return len(seen), took


def main() -> None:
    args = arguments(QUESTION, lambda p: p.add_argument("--repeats", type=int, default=15))
    # All of it is thin. Where another process uses the second core, sharing each product with a
    # thread there makes reading and projecting ten times as slow, and the ratio look good.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        medians = add_and_read(Path(folder), args.repeats)
        opens, took = opens_of(Path(folder), 10_000)
    ratio = medians["add"] / medians["read and project"]
    rows = [
        {"what": "fold 1,000, s", "value": medians["fold"]},
        {"what": "read and project, ms", "value": 1e3 * medians["read and project"]},
        {"what": "add to 1,000, ms", "value": 1e3 * medians["add"]},
        {"what": "add / (read and project)", "value": ratio},
        {"what": "files opened for 10,000 names", "value": opens},
        {"what": "seconds to open 10,000 names", "value": took},
    ]
    result = {
        **{f"seconds: {name}": t for name, t in medians.items()},
        "ratio": ratio,
        "opens": opens,
        "seconds_to_open": took,
        "met": {
            "fold ≤ 3 min": medians["fold"] <= FOLD_AT_MOST,
            "add ≤ 2×": ratio <= AT_MOST,
            "opens < 10": opens < OPENS_AT_MOST,
        },
    }
    report(QUESTION, rows, result, args.save)


if __name__ == "__main__":
    main()
