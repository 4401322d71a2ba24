"""Does folding take time in proportion to the adapters, and no more memory for more of them?

128, 256 and 512 adapters of 1 MiB (16 modules of 512×512, rank 16, float32) under `memory="64MiB"`,
in the forms "svd" and "auto", each in a process of its own. Four init groups, so that sharing is
tried. From 128 to 512 the seconds of the processor must grow less than sixfold, and the peak above
a process that only imports lorafold and torch stay below twice the limit.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from _common import arguments, report

import lorafold as lf

QUESTION = "Folding 128, 256 and 512 adapters of 1 MiB under memory='64MiB': time and peak memory"
COUNTS, MODULES, D, RANK, GROUPS = (128, 256, 512), 16, 512, 16, 4
LIMIT = 64 << 20
GROWTH_AT_MOST, PEAK_AT_MOST = 6.0, 2 * LIMIT

_FOLD = """
import pathlib, resource, sys, time
import lorafold, torch, lorafold.fold.fold
torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
sources = sorted(pathlib.Path(sys.argv[1]).iterdir())[:int(sys.argv[4])]
idle, start, wall = peak(), time.process_time(), time.perf_counter()
lib = lorafold.fold(sources, sys.argv[2], form=sys.argv[3], memory="64MiB", overwrite=True)
print('seconds', time.perf_counter() - wall)
print('processor', time.process_time() - start)
print('peak', peak() - idle)
print('bytes', lib.nbytes)
print('error', max(lib.error(name) for name in lib.names))
"""


def make(folder: Path) -> None:
    """Write the largest collection; the smaller ones are the first of it."""
    starts = torch.Generator().manual_seed(0)
    first = torch.randn(GROUPS, MODULES, RANK, D, generator=starts)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"]}
    for i in range(max(COUNTS)):
        g = torch.Generator().manual_seed(i + 1)
        modules = {}
        for m in range(MODULES):
            A = first[i % GROUPS, m] + 0.3 * torch.randn(RANK, D, generator=g)
            modules[f"layers.{m}.q_proj"] = lf.LowRank(A, torch.randn(D, RANK, generator=g))
        lf.save(lf.Adapter(modules, config=config), folder / f"a{i:03d}")


def run(*args: str) -> dict[str, float]:
    """The numbers that a fresh process prints, by name."""
    command = [sys.executable, "-c", _FOLD, *args]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")
    return {name: float(value) for name, value in (line.split() for line in lines if line)}


def main() -> None:
    args = arguments(QUESTION)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / "in")
        for count in COUNTS:
            for form in ("svd", "auto"):
                found[form, count] = run(f"{folder}/in", f"{folder}/lib", form, str(count))
    rows = [
        {
            "form": form,
            "adapters": count,
            "seconds": r["seconds"],
            "of the processor": r["processor"],
            "peak above imports, MiB": r["peak"] / 2**20,
            "library, MiB": r["bytes"] / 2**20,
            "largest error": r["error"],
        }
        for (form, count), r in found.items()
    ]
    assert all(r["error"] <= 0.1 for r in found.values())
    small, large = min(COUNTS), max(COUNTS)
    grows = {f: found[f, large]["processor"] / found[f, small]["processor"] for f, _ in found}
    peak = max(r["peak"] for r in found.values())
    result = {
        **{f"{form}, {count}": r for (form, count), r in found.items()},
        "adapters_grow": large / small,
        "seconds_grow": grows,
        "peak": peak,
        "limit": LIMIT,
        "met": {
            "time": max(grows.values()) <= GROWTH_AT_MOST,
            "peak": peak <= PEAK_AT_MOST,
        },
    }
    report(QUESTION, rows, result, args.save)


if __name__ == "__main__":
    main()
