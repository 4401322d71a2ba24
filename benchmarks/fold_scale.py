"""What does folding cost on one core and on two, and where does the time go?

Adapters of a 7B Llama's shapes in bfloat16 (7 modules a layer, 4096 and 11008 wide, rank 16),
unrelated ones and others of one start, folded at 10 % error, each run in a process of its own, in
turn: form "auto" and "svd" with one thread, "auto" by one worker and by two, and, where the
repository's history has it, the code of commit 8739e31 with all threads. "auto" should cost at most
1.3 × "svd" where nothing is shared and 2 × where something is; two workers be 1.6 × one, and 4 ×
that commit, whose reading back is to be halved. Two workers by none stand beside: these spare a
start and the work directory. Beside the clock stands the processor's time, which tells more
on a machine with others at work, and what of it the start of a second worker takes. Then one run
under a profiler: seconds and nanoseconds a number for each part, next to the nanoseconds that a
copy of one number in memory takes, below which none can come.
"""

from __future__ import annotations

import cProfile
import io
import os
import pstats
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _common import arguments, report, table_of
from rich.console import Console

import lorafold as lf

QUESTION = "Folding bfloat16 adapters of a 7B Llama: forms, workers, and where the time goes"
BEFORE = "8739e31"
WIDE, MIDDLE, RANK = 4096, 11008, 16
SHAPES = {
    **{f"self_attn.{name}_proj": (WIDE, WIDE) for name in "qkvo"},
    "mlp.gate_proj": (MIDDLE, WIDE),
    "mlp.up_proj": (MIDDLE, WIDE),
    "mlp.down_proj": (WIDE, MIDDLE),
}
REPEATS = 2
AT_MOST = {"auto / svd": 1.3, "auto / svd, one start": 2.0}
AT_LEAST = {"two workers": 1.6, "two workers / before": 4.0, "reading / before": 2.0}

_FOLD = """
import resource, sys, time
import lorafold, torch
def processor():
    both = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(r.ru_utime + r.ru_stime for r in both)
lorafold.fold, torch.zeros(8, 8) @ torch.zeros(8, 8)
options = eval(sys.argv[3])
start, used = time.perf_counter(), processor()
lib = lorafold.fold(sys.argv[1] + "/*", sys.argv[2], overwrite=True, **options)
print("seconds", time.perf_counter() - start)
print("processor", processor() - used)
print("bytes", lib.nbytes)
start = time.perf_counter()
for name in lib.names:
    lib[name]
print("reading", time.perf_counter() - start)
"""
# What a worker does before its first task; it does not end, it is ended.
_START = """
import gc, os
gc.disable()
import lorafold.scale.worker, lorafold.fold.passes.tasks
os._exit(0)
"""
# What a part is called, and the functions that it is.
PARTS = {
    "reading the files": [("adapter_file.py", "read")],
    "joining blocks": [("batch.py", "joined_factors"), ("batch.py", "side_by_side")],
    "Grams": [("batch.py", "quick_gram"), ("batch.py", "gram")],
    "directions": [("batch.py", "_directions")],
    "rotating": [("rotation.py", "quick_rotate"), ("rotation.py", "unrotate")],
    "quantising": [("codebook.py", "round_into")],
    "measuring what is lost": [("pairs.py", "_products")],
    "bits": [("bits.py", "bits_for_error")],
    "records": [("pairs.py", "written")],
}


def make(folder: Path, layers: int, count: int, one_start: bool) -> None:
    """Write the adapters; with one start their A's are near one another."""
    g = torch.Generator().manual_seed(0)
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": [name.split(".")[1] for name in SHAPES],
    }
    paths = {f"model.layers.{k}.{n}": s for k in range(layers) for n, s in SHAPES.items()}
    first = {p: torch.randn(RANK, s[1], generator=g) for p, s in paths.items() if one_start}
    for i in range(count):
        modules = {}
        for path, (out, inner) in paths.items():
            A = torch.randn(RANK, inner, generator=g)
            if one_start:
                A = first[path] + 0.05 * A
            B = torch.randn(out, RANK, generator=g)
            modules[path] = lf.LowRank((0.01 * A).bfloat16(), (0.01 * B).bfloat16())
        lf.save(lf.Adapter(modules, config=config), folder / f"a{i}")


def run(
    source: str, folder: Path, options: str, threads: int, code: Path | None
) -> dict[str, float]:
    """The numbers that a fresh process prints, by name."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # a package that is installed is compiled once
    if code is not None:
        env["PYTHONPATH"] = str(code)
    command = [sys.executable, "-c", _FOLD, str(folder / source), str(folder / "lib"), options]
    lines = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout
    return {name: float(value) for name, value in map(str.split, lines.splitlines())}


def code_of(commit: str, folder: Path) -> Path | None:
    """The package as it was at a commit; None where the history lacks it."""
    root = Path(__file__).parents[1]
    found = subprocess.run(
        ["git", "-C", root, "archive", commit, "src"], capture_output=True, check=False
    )
    if found.returncode:
        return None
    with tarfile.open(fileobj=io.BytesIO(found.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder / "src"


def where_the_time_goes(folder: Path) -> tuple[list[dict[str, Any]], float]:
    """Each part's seconds, share and nanoseconds a number; nanoseconds of copying one."""
    torch.set_num_threads(1)
    profiler = cProfile.Profile()
    start = time.perf_counter()
    profiler.enable()
    lf.fold(f"{folder}/alone/*", folder / "lib", overwrite=True)
    profiler.disable()
    whole = time.perf_counter() - start
    stats: Any = pstats.Stats(profiler)
    spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for (file, _, function), (_, _, _, cumulative, _) in stats.stats.items():
        for name, found in PARTS.items():
            if (Path(file).name, function) in found:
                spent[name] += cumulative
    spent["the rest"] = whole - sum(spent.values())
    numbers = sum(a.num_parameters for a in map(lf.load, sorted((folder / "alone").iterdir())))
    rows = [
        {"part": name, "seconds": s, "share": s / whole, "ns a number": 1e9 * s / numbers}
        for name, s in sorted(spent.items(), key=lambda item: -item[1])
    ]
    x = torch.randn(1 << 22)
    y = torch.empty_like(x)
    copies = [_seconds(lambda: y.copy_(x)) for _ in range(9)]
    return rows, 1e9 * statistics.median(copies) / len(x)


def start_of_a_worker() -> float:
    """Seconds of the processor."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", _START], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _seconds(fn: Any) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def main() -> None:
    def more(p: Any) -> None:
        p.add_argument("--layers", type=int, default=32, help="of 32 layers, so many")
        p.add_argument("--adapters", type=int, default=12, help="so many")

    args = arguments(QUESTION, more)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder / "alone", args.layers, args.adapters, one_start=False)
        make(folder / "kin", args.layers, args.adapters, one_start=True)
        before = code_of(BEFORE, folder / "before")
        runs: dict[str, tuple[str, str, int, Path | None]] = {
            "svd": ("alone", "{'form': 'svd'}", 1, None),
            "auto": ("alone", "{}", 1, None),
            "auto, one worker": ("alone", "{'workers': 1}", 1, None),
            "auto, two workers": ("alone", "{'workers': 2}", 1, None),
            "svd, one start": ("kin", "{'form': 'svd'}", 1, None),
            "auto, one start": ("kin", "{}", 1, None),
        }
        if before is not None:
            runs["auto, before"] = ("alone", "{}", os.cpu_count() or 1, before)
        taken: dict[str, list[dict[str, float]]] = {key: [] for key in runs}
        for _ in range(REPEATS):
            for key, (source, options, threads, code) in runs.items():
                taken[key].append(run(source, folder, options, threads, code))
        found = {
            key: {what: statistics.median(r[what] for r in several) for what in several[0]}
            for key, several in taken.items()
        }
        for key in ("auto, one worker", "auto, two workers"):
            assert found[key]["bytes"] == found["auto"]["bytes"]
        start = statistics.median(start_of_a_worker() for _ in range(3))
        parts, copy = where_the_time_goes(folder)
        size = sum(p.stat().st_size for p in (folder / "alone").rglob("*.safetensors"))
    rows = [
        {
            "run": key,
            "seconds": r["seconds"],
            "of the processor": r["processor"],
            "MiB/s of the files": size / 2**20 / r["seconds"],
            "reading all back": r["reading"],
            "library, MiB": r["bytes"] / 2**20,
        }
        for key, r in found.items()
    ]
    second = {key: r["seconds"] for key, r in found.items()}
    ratios = {
        "auto / svd": second["auto"] / second["svd"],
        "auto / svd, one start": second["auto, one start"] / second["svd, one start"],
        "two workers": second["auto, one worker"] / second["auto, two workers"],
        "two workers / none": second["auto"] / second["auto, two workers"],
    }
    if before is not None:
        ratios["two workers / before"] = second["auto, before"] / second["auto, two workers"]
        ratios["reading / before"] = found["auto, before"]["reading"] / found["auto"]["reading"]
    met = {key: ratios[key] <= limit for key, limit in AT_MOST.items()}
    met |= {key: ratios[key] >= limit for key, limit in AT_LEAST.items() if key in ratios}
    console = Console()
    console.print(table_of(parts, f"Where the time goes; a copy of a number takes {copy:.2f} ns"))
    share = start / found["auto, two workers"]["processor"]
    console.print(f"The second worker's start takes {start:.1f} s of a processor, {share:.0%}")
    result = {
        "adapters": args.adapters,
        "modules": args.layers * len(SHAPES),
        "bytes": size,
        "runs": found,
        "ratios": ratios,
        "parts": {row["part"]: row["seconds"] for row in parts},
        "copy_ns": copy,
        "start_of_a_worker": start,
        "met": met,
    }
    report(QUESTION, rows, result, args.save)
    found_so = [{"ratio": k, "measured": v, "met": met.get(k, "–")} for k, v in ratios.items()]
    console.print(table_of(found_so))


if __name__ == "__main__":
    main()
