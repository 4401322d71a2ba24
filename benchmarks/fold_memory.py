"""How much memory does folding a collection from disk take?

256 adapters of 64 modules (1024×1024, rank 8, bfloat16, 0.5 GiB of files) are folded at the default
tolerance. The peak resident memory of that process, above one that only imports lorafold and torch,
must stay below a quarter of the collection's bytes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from _common import arguments, report

import lorafold as lf

QUESTION = "Peak memory of folding 256 adapters × 64 modules (1024×1024, rank 8, bf16) from disk"
COUNT, MODULES, D, RANK = 256, 64, 1024, 8
AT_MOST = 0.25

_PEAK = (
    "print('peak', __import__('resource').getrusage(__import__('resource').RUSAGE_SELF).ru_maxrss)"
)
_IMPORT = "import lorafold, torch, lorafold.fold.fold"
_FOLD = """
import sys, time
start = time.perf_counter()
lib = lorafold.fold(sys.argv[1], sys.argv[2], form=sys.argv[3])
print('seconds', time.perf_counter() - start)
print('bytes', lib.nbytes)
print('error', max(lib.error(name) for name in lib.names))
"""


def make(folder: Path) -> int:
    """Write the collection; the bytes of its files."""
    g = torch.Generator().manual_seed(0)
    total = 0
    for i in range(COUNT):
        modules = {}
        for m in range(MODULES):
            A = (torch.randn(RANK, D, generator=g) / 32).bfloat16()
            B = (torch.randn(D, RANK, generator=g) / 32).bfloat16()
            modules[f"layers.{m}.q_proj"] = lf.LowRank(A, B, 2.0)
        config = {
            "peft_type": "LORA",
            "r": RANK,
            "lora_alpha": 2 * RANK,
            "target_modules": ["q_proj"],
        }
        lf.save(lf.Adapter(modules, config=config), folder / f"a{i:03d}")
        total += (folder / f"a{i:03d}" / "adapter_model.safetensors").stat().st_size
    return total


def run(script: str, *args: str) -> dict[str, float]:
    """The numbers that a fresh process prints, by name."""
    command = [sys.executable, "-c", script, *args]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")
    return {name: float(value) for name, value in (line.split() for line in lines if line)}


def main() -> None:
    args = arguments(QUESTION, lambda p: p.add_argument("--form", default="auto"))
    with tempfile.TemporaryDirectory() as folder:
        size = make(Path(folder) / "in")
        idle = run(f"{_IMPORT}\n{_PEAK}")["peak"] * 1024
        fold = run(f"{_IMPORT}\n{_FOLD}\n{_PEAK}", f"{folder}/in", f"{folder}/lib", args.form)
    above = fold["peak"] * 1024 - idle
    rows = [
        {"what": "collection", "MiB": size / 2**20, "of the collection": 1.0},
        {"what": "only imports", "MiB": idle / 2**20, "of the collection": idle / size},
        {"what": "fold, above that", "MiB": above / 2**20, "of the collection": above / size},
        {
            "what": "library",
            "MiB": fold["bytes"] / 2**20,
            "of the collection": fold["bytes"] / size,
        },
    ]
    result = {
        "form": args.form,
        "collection_bytes": size,
        "peak_above_import_bytes": above,
        "share": above / size,
        "at_most": AT_MOST,
        "met": above / size < AT_MOST,
        "library_bytes": fold["bytes"],
        "largest_error": fold["error"],
        "seconds": fold["seconds"],
    }
    report(QUESTION, rows, result, args.save)


if __name__ == "__main__":
    main()
