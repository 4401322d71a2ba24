"""Does folding grow with the adapters alone, up to ten thousand, and in how much memory?

100, 1,000 and 10,000 small adapters (8 modules of 64×64, rank 4, twenty starts, written as PEFT
writes them) folded under `memory="64MiB"`, each in a process of its own, with two workers; then the
10,000 once more through Ray on this machine, byte for byte the same, and every stated error
verified against the files. The seconds an adapter should not grow, nor the peak of the driver.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from _common import arguments, report

import lorafold as lf

QUESTION = "Folding 100, 1,000 and 10,000 small adapters on two cores, and through Ray"
COUNTS, MODULES, D, RANK, STARTS = (100, 1_000, 10_000), 8, 64, 4, 20
GROWTH_AT_MOST = 1.5  # of the seconds an adapter, from 1,000 to 10,000

_FOLD = """
import pathlib, resource, sys, time
import lorafold, torch
lorafold.fold
def peak(who):
    return resource.getrusage(who).ru_maxrss << 10
sources = sorted(pathlib.Path(sys.argv[1]).iterdir())[:int(sys.argv[3])]
idle, start = peak(resource.RUSAGE_SELF), time.perf_counter()
lib = lorafold.fold(sources, sys.argv[2], memory="64MiB", overwrite=True, **eval(sys.argv[4]))
print('seconds', time.perf_counter() - start)
print('peak', peak(resource.RUSAGE_SELF) - idle)
print('workers_peak', peak(resource.RUSAGE_CHILDREN))
print('bytes', lib.nbytes)
if sys.argv[5] == 'verify':
    start = time.perf_counter()
    errors = lib.verify(sources)
    print('verified', len(errors))
    print('largest', max(errors.values()))
    print('verifying', time.perf_counter() - start)
"""


def make(folder: Path) -> None:
    """Write the largest collection; the smaller ones are the first of it."""
    g = torch.Generator().manual_seed(0)
    first = torch.randn(STARTS, MODULES, RANK, D, generator=g)
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["q_proj", "v_proj"],
    }
    for i in range(max(COUNTS)):
        modules = {}
        for m in range(MODULES):
            A = first[i % STARTS, m] + 0.2 * torch.randn(RANK, D, generator=g)
            path = f"model.layers.{m // 2}.self_attn.{'qv'[m % 2]}_proj"
            modules[path] = lf.LowRank(A, torch.randn(D, RANK, generator=g))
        lf.save(lf.Adapter(modules, config=config), folder / f"a{i:05d}")


def run(folder: Path, library: str, count: int, options: str, then: str = "") -> dict[str, float]:
    """The numbers that a fresh process prints, by name."""
    command = [sys.executable, "-c", _FOLD, str(folder / "in"), str(folder / library)]
    done = subprocess.run(
        [*command, str(count), options, then], check=True, capture_output=True, text=True
    )
    lines = (line.split() for line in done.stdout.splitlines())
    return {words[0]: float(words[1]) for words in lines if len(words) == 2}


def main() -> None:
    args = arguments(QUESTION)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder / "in")
        found = {
            f"{count:,}, two workers": run(folder, f"lib{count}", count, "{'workers': 2}")
            for count in COUNTS
        }
        most = max(COUNTS)
        key = f"{most:,}, Ray"
        found[key] = run(folder, "ray", most, "{'executor': 'ray'}", "verify")
        one, other = (
            {p.name: p.read_bytes() for p in (folder / lib).iterdir() if p.name[0] != "."}
            for lib in (f"lib{most}", "ray")
        )
        assert one == other, "Ray made other bytes"
    assert found[key]["verified"] == most
    per = {count: found[f"{count:,}, two workers"]["seconds"] / count for count in COUNTS}
    growth = per[most] / per[1_000]
    rows = [
        {
            "run": key,
            "seconds": r["seconds"],
            "peak of the driver, MiB": r["peak"] / 2**20,
            "library, MiB": r["bytes"] / 2**20,
        }
        for key, r in found.items()
    ]
    result = {
        "runs": found,
        "seconds_an_adapter": {str(count): s for count, s in per.items()},
        "growth": growth,
        "same_bytes": True,
        "largest_error": found[key]["largest"],
        "met": {"growth": growth <= GROWTH_AT_MOST},
    }
    report(QUESTION, rows, result, args.save)


if __name__ == "__main__":
    main()
