"""How long do commands take that read a library's lists alone: `ls`, `rm`, `info LIB`?

Each in a process of its own, on a library of 1,000 adapters, in turn with what they can't do
without (Python itself) and with what they do without (importing torch). The goal, 0.3 seconds, is
of the processor's time, which a busy machine changes less than the clock's.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from _common import arguments, report

import lorafold as lf

QUESTION = "Processor seconds of ls, rm and info in a library of 1,000, next to importing torch"
AT_MOST = 0.3
COMMANDS = {
    "Python alone": ["-c", "pass"],
    "lorafold --help": ["-m", "lorafold", "--help"],
    "lorafold ls": ["-m", "lorafold", "ls", "lib"],
    "lorafold rm": ["-m", "lorafold", "rm", "lib", "a0"],
    "lorafold info": ["-m", "lorafold", "info", "lib"],
    "import torch": ["-c", "import torch"],
}


def library(folder: Path) -> None:
    """A library of 1,000 adapters of 8 modules at `folder/lib`."""
    g = torch.Generator().manual_seed(0)

    def update() -> lf.LowRank:
        return lf.LowRank(torch.randn(2, 32, generator=g), torch.randn(32, 2, generator=g))

    adapters = {
        f"a{i}": lf.Adapter({f"layers.{m}.q_proj": update() for m in range(8)}) for i in range(1000)
    }
    lf.fold(adapters, folder / "lib", form="svd").close()


def processor_seconds(words: list[str], folder: Path) -> float:
    """What a new Python took, in its own code and in the system's."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = {**os.environ, "PYTHONPATH": str(Path(lf.__file__).parents[1])}
    subprocess.run([sys.executable, *words], cwd=folder, env=env, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    args = arguments(QUESTION, lambda p: p.add_argument("--repeats", type=int, default=9))
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        library(here)
        shutil.copytree(here / "lib", here / "whole")
        for _ in range(args.repeats + 1):
            for name, words in COMMANDS.items():
                times[name].append(processor_seconds(words, here))
            shutil.rmtree(here / "lib")
            shutil.copytree(here / "whole", here / "lib")
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}
    rows = [{"process": name, "processor seconds": seconds} for name, seconds in medians.items()]
    ours = [medians[f"lorafold {verb}"] for verb in ("ls", "rm", "info")]
    result = {"seconds": medians, "met": {"< 0.3 s": max(ours) < AT_MOST}}
    report(QUESTION, rows, result, args.save)


if __name__ == "__main__":
    main()
