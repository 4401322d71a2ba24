"""How fast is merging, next to PEFT's, and next to reading and writing the files?

Eight adapters of rank 16 on square layers of width d, as `add_weighted_adapter` merges them on a
live model: by `svd` to rank 16, where both give the same, and by TIES. PEFT's `ties_svd` looks at
the entries of ΔW; so does `space="delta"`, which must agree with it. The default, `space="core"`,
is another rule, of another cost: it grows with d, not with d³. PEFT's time at the larger width is
that of one layer.

Then a real shape from files to file: four adapters of rank 16 on the 224 layers of a 7B Llama, by
`linear` and by `ties`, against reading the inputs and writing the result as it is written.

What else runs on the machine must neither flatter nor harm. Beside PEFT a time is the lower of two,
seconds on the clock and seconds of the processor, as each has to wait for it (threads do so
passively, which costs none). From files to file the fastest of a few runs counts, on either side.
"""

from __future__ import annotations

import argparse
import contextlib
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported
os.environ.setdefault("KMP_BLOCKTIME", "0")

import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from _common import arguments, report, seconds
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import lorafold as lf

QUESTION = "merging eight adapters of rank 16: lorafold against PEFT, and from files to file"
COUNT, RANK, LAYERS = 8, 16, 4
AT_LEAST = {("svd", 1024): 30, ("svd", 2048): 100, ("ties", 1024): 40, ("ties", 2048): 300}
AT_MOST = {"linear": 3, "ties": 12}  # times reading and writing
NAMES = [f"a{i}" for i in range(COUNT)]
WEIGHTS = [1.0] * COUNT
DENSITY = 0.5


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 2048], help="of layers")
    parser.add_argument("--layers", type=int, default=32, help="of the Llama")
    parser.add_argument("--repeats", type=int, default=5, help="of lorafold's runs")


def peft_model(width: int, layers: int) -> Any:
    """Linear layers with eight adapters of normal factors."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    targets = [str(i) for i in range(layers)]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
    model = get_peft_model(base, config, adapter_name=NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_" in key:
                p.normal_(std=0.1)
    return model


def adapters_of(model: Any, layers: int) -> dict[str, lf.Adapter]:
    found = {}
    for name in NAMES:
        modules = {}
        for i in range(layers):
            layer = model.base_model.model[i]
            A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
            modules[str(i)] = lf.LowRank(A.detach().clone(), B.detach().clone())
        found[name] = lf.Adapter(modules)
    return found


def clock_and_processor(fn: Any) -> tuple[float, float]:
    """Seconds of one call, and those that its threads worked."""
    start = time.process_time()
    took = seconds(fn)
    return took, time.process_time() - start


def peft_seconds(model: Any, kind: str, **more: Any) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return clock_and_processor(
            lambda: model.add_weighted_adapter(
                NAMES, WEIGHTS, "merged", combination_type=kind, **more
            )
        )


def apart(model: Any, merged: lf.Adapter) -> float:
    """How far PEFT's merged adapter and ours are apart, at worst."""
    worst = 0.0
    for i, u in merged.items():
        D = model.base_model.model[int(i)].get_delta_weight("merged").detach()
        worst = max(worst, float(torch.linalg.norm(u.dense() - D) / torch.linalg.norm(D)))
    return worst


def median(fn: Any, repeats: int) -> float:
    fn()
    times = sorted(seconds(fn) for _ in range(repeats))
    return times[len(times) // 2]


def against_peft(width: int, repeats: int) -> list[dict[str, Any]]:
    rows = []
    layers = LAYERS if width <= 2048 else 1  # PEFT takes minutes a layer
    for kind, run in (
        ("svd", lambda a: lf.merge(a, weights=WEIGHTS, rank=RANK)),
        ("ties", lambda a: lf.merge(a, "ties", density=DENSITY)),
    ):
        model = peft_model(width, layers)
        ours = adapters_of(model, layers)
        if kind == "svd":
            theirs = peft_seconds(model, "svd", svd_rank=RANK)
            gap = apart(model, run(ours))
        else:
            theirs = peft_seconds(model, "ties_svd", svd_rank=COUNT * RANK, density=DENSITY)
            gap = apart(model, lf.merge(ours, "ties", density=DENSITY, space="delta"))
        # Of a million entries one or two sum to nothing but rounding, and elect either sign.
        assert gap < 5e-3, f"{kind} at {width}: PEFT and lorafold disagree by {gap}"
        run(ours)
        runs = [clock_and_processor(lambda: run(ours)) for _ in range(repeats)]  # noqa: B023
        mine = statistics.median(min(run) for run in runs)
        rows.append(
            {
                "what": f"{kind}, d={width}",
                "lorafold ms/layer": 1e3 * mine / layers,
                "PEFT ms/layer": 1e3 * min(theirs) / layers,
                "times faster": min(theirs) / mine,
                "at least": AT_LEAST.get((kind, width), 0),
                "apart": gap,
            }
        )
    return rows


def growth(repeats: int) -> list[dict[str, Any]]:
    """Our own time a layer, up to d=4096."""
    rows = []
    for width in (1024, 2048, 4096):
        g = torch.Generator().manual_seed(0)
        some = {
            name: lf.Adapter(
                {
                    "q": lf.LowRank(
                        torch.randn(RANK, width, generator=g), torch.randn(width, RANK, generator=g)
                    )
                }
            )
            for name in NAMES
        }
        row: dict[str, Any] = {"width": width}
        for method in ("linear", "ties", "tsv", "iso_c", "knots"):
            row[f"{method} ms"] = 1e3 * median(lambda m=method: lf.merge(some, m), repeats)  # noqa: B023
        rows.append(row)
    return rows


def llama_shapes(layers: int) -> dict[str, tuple[int, int]]:
    h, f = 4096, 11008
    each = {
        **{f"self_attn.{n}_proj": (h, h) for n in "qkvo"},
        "mlp.gate_proj": (f, h),
        "mlp.up_proj": (f, h),
        "mlp.down_proj": (h, f),
    }
    return {f"model.layers.{i}.{n}": s for i in range(layers) for n, s in each.items()}


def from_files(layers: int) -> list[dict[str, Any]]:
    """Four adapters of a Llama, merged from files to file."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shapes = llama_shapes(layers)
        for n in range(4):
            g = torch.Generator().manual_seed(n)
            modules = {
                p: lf.LowRank(
                    torch.randn(RANK, inn, generator=g), torch.randn(out, RANK, generator=g), 2.0
                )
                for p, (out, inn) in shapes.items()
            }
            lf.save(lf.Adapter(modules), root / f"a{n}")
        sources = [root / f"a{n}" for n in range(4)]
        rows: list[dict[str, Any]] = []
        floors = []
        for method in ("linear", "ties"):
            kwargs = {} if method == "linear" else {"density": DENSITY}
            out = root / "out"
            times = []
            for _ in range(3):
                start = time.perf_counter()
                lf.save(lf.merge(sources, method, **kwargs), out, overwrite=True)
                times.append(time.perf_counter() - start)
                floors.append(read_and_written(sources, out / "adapter_model.safetensors", root))
            rows.append(
                {
                    "what": f"{method}, 4 × {len(shapes)} modules, files to file",
                    "seconds": min(times),
                    "at most": AT_MOST[method],
                    "rank": lf.files.open_adapter(out).shapes[next(iter(shapes))][2],
                }
            )
        floor = min(floors)
        return [{**r, "reading and writing": floor, "times": r["seconds"] / floor} for r in rows]


def read_and_written(sources: list[Path], result: Path, root: Path) -> float:
    """Seconds to read all inputs and to write the result's tensors, flushed to the disk."""
    tensors = {k: t.clone() for k, t in load_file(result).items()}
    start = time.perf_counter()
    for source in sources:
        for t in load_file(source / "adapter_model.safetensors").values():
            t.clone()  # mapped until then
    save_file(tensors, root / "written.safetensors")
    with open(root / "written.safetensors", "rb") as f:
        os.fsync(f.fileno())
    took = time.perf_counter() - start
    with contextlib.suppress(OSError):
        os.remove(root / "written.safetensors")
    return took


def main() -> None:
    args = arguments(QUESTION, options)
    peft_rows = [row for width in args.widths for row in against_peft(width, args.repeats)]
    growth_rows = growth(args.repeats)
    file_rows = from_files(args.layers)
    from _common import table_of
    from rich.console import Console

    Console().print(table_of(growth_rows, "milliseconds a layer as it grows"))
    Console().print(table_of(file_rows, "from files to file"))
    result = {
        "peft": peft_rows,
        "growth": growth_rows,
        "files": file_rows,
        "met": all(r["times faster"] >= r["at least"] for r in peft_rows)
        and all(r["times"] <= r["at most"] for r in file_rows),
    }
    report(QUESTION, peft_rows, result, args.save)


if __name__ == "__main__":
    main()
