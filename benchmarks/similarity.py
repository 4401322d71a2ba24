"""All pairs of 1,000 adapters in under a minute, from files, in under 2 GiB of memory?

1,000 unrelated adapters of 64 modules (1024×1024, rank 8, bfloat16: 2 GiB) on the disk, compared by
a fresh process: its seconds and its peak memory, beside the rate of plain float32 products in the
same process. The same with every pair computed (`exact=True`), whose matrix the sketched one is
held against, and with 1,000 that are all alike (every pair lies above the threshold), which may
take two minutes. vLoRA compares adapters in memory, by flattened factors: at a size that it can do,
its seconds and what it says of unrelated adapters that started from the same A. The seconds of the
processor are for a machine that is busy: on two idle cores it takes half of them, or a little more.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _common import arguments, report

import lorafold as lf

QUESTION = "All pairs of adapters × 64 modules (1024×1024, rank 8, bf16), from disk"
MODULES, D, RANK = 64, 1024, 8
LIMITS = {"unrelated": 60.0, "alike": 120.0}  # seconds
MEMORY = 2.0  # GiB
PEER = 100  # adapters that vLoRA compares

_RUN = """
import json, pathlib, sys, time
import numpy as np, torch
import lorafold as lf
x = torch.randn(2048, 2048)
x @ x
start = time.perf_counter()
for _ in range(10):
    x @ x
rate = 10 * 2 * 2048**3 / (time.perf_counter() - start)
def peak():  # of this process: what `getrusage` says may be its parent's
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
idle = peak()
start, cpu = time.perf_counter(), time.process_time()
s = lf.similarity(sys.argv[1], exact=sys.argv[2] == "exact")
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
near = int((np.triu(s.matrix, 1) >= s.threshold).sum())
np.save(sys.argv[3], s.matrix)
print(json.dumps({"seconds": seconds, "cpu seconds": cpu, "peak": peak(), "idle": idle,
    "gflops": rate / 1e9, "error": s.error, "near": near, "exact share": float(s.known.mean())}))
"""


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=1000, help="adapters (1000)")
    parser.add_argument("--kinds", nargs="+", default=["unrelated", "exact", "alike"])


def make(folder: Path, count: int, alike: bool) -> int:
    """Write the collection; the bytes of its files."""
    g = torch.Generator().manual_seed(0)
    starts = [(torch.randn(RANK, D, generator=g), torch.randn(D, RANK, generator=g))]
    starts *= MODULES
    total = 0
    for i in range(count):
        modules = {}
        for m, (A, B) in enumerate(starts):
            own = torch.randn(RANK, D, generator=g), torch.randn(D, RANK, generator=g)
            share = 0.1 if alike else 1.0
            mixed = [(1 - share) * x + share * y for x, y in zip((A, B), own, strict=True)]
            factors = ((x / 32).bfloat16() for x in mixed)
            modules[f"layers.{m}.q_proj"] = lf.LowRank(*factors, 2.0)
        config = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["q_proj"]}
        lf.save(lf.Adapter(modules, config=config), folder / f"a{i:04d}")
        total += (folder / f"a{i:04d}" / "adapter_model.safetensors").stat().st_size
    return total


def run(folder: Path, kind: str, target: Path) -> dict[str, float]:
    """What a fresh process measures."""
    command = [sys.executable, "-c", _RUN, str(folder), kind, str(target)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(lines)
    return found


def row_of(kind: str, nbytes: int, found: dict[str, float]) -> dict[str, Any]:
    return {
        "kind": kind,
        "files GiB": nbytes / 2**30,
        "seconds": found["seconds"],
        "cpu s": found["cpu seconds"],
        "peak GiB": found["peak"] / 2**30,
        "GFLOP/s": found["gflops"],
        "error": found["error"],
        "near": found["near"],
    }


def peer(folder: Path) -> dict[str, float]:
    """vLoRA and lorafold on a hundred adapters; and on two tasks of one start."""
    import time

    from vlora.analysis import compute_similarity_matrix
    from vlora.io import LoRAWeights

    def weights(adapter: lf.Adapter) -> LoRAWeights:
        return LoRAWeights(
            layer_names=list(adapter),
            lora_a={p: u.A.float() for p, u in adapter.modules.items()},
            lora_b={p: u.B.float() for p, u in adapter.modules.items()},
            rank=RANK,
        )

    places = sorted(folder.iterdir())[:PEER]
    start = time.perf_counter()
    compute_similarity_matrix([weights(lf.load(p)) for p in places])
    theirs = time.perf_counter() - start
    start = time.perf_counter()
    lf.similarity(places, exact=True)
    ours = time.perf_counter() - start
    g = torch.Generator().manual_seed(0)
    A = torch.randn(RANK, D, generator=g)
    pair = [
        lf.Adapter({"q": lf.LowRank(A, 0.2 * torch.randn(D, RANK, generator=g))}) for _ in range(2)
    ]
    return {
        "vlora seconds": theirs,
        "lorafold seconds": ours,
        "vlora, one start": float(compute_similarity_matrix([weights(a) for a in pair])[0, 1]),
        "lorafold, one start": float(lf.similarity(pair).matrix[0, 1]),
    }


def main() -> None:
    args = arguments(QUESTION, options)
    import numpy as np

    result: dict[str, object] = {"adapters": args.count}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        for alike in sorted({kind == "alike" for kind in args.kinds}):
            folder = place / ("alike" if alike else "unrelated")
            nbytes = make(folder, args.count, alike)
            for kind in (k for k in args.kinds if (k == "alike") == alike):
                found = run(folder, kind, place / f"{kind}.npy")
                rows.append(row_of(kind, nbytes, found))
                result[kind] = found
                print(kind, found, flush=True)
            if not alike:
                result["peer"] = peer(folder)
            for path in folder.rglob("*.safetensors"):
                path.unlink()
        if {"unrelated", "exact"} <= set(args.kinds):
            off = ~np.eye(args.count, dtype=bool)
            sketched, exact = (np.load(place / f"{k}.npy")[off] for k in ("unrelated", "exact"))
            result["rms of sketches"] = float(np.sqrt(np.mean((sketched - exact) ** 2)))
            result["largest of sketches"] = float(np.abs(sketched - exact).max())
    result["met"] = {
        str(row["kind"]): row["seconds"] < LIMITS[row["kind"]] and row["peak GiB"] < MEMORY
        for row in rows
        if row["kind"] in LIMITS
    }
    report(QUESTION, rows, result, args.save)


if __name__ == "__main__":
    main()
