"""What every benchmark shares: medians, a description of the machine, a table, one JSON line.

A script asks one question, runs its peer in the same process, checks that both gave the same
answer, and ends with `report(...)`. Nothing that names a host, a user or a path is recorded.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "numpy", "safetensors", "peft", "vlora-dev", "bitsandbytes", "torchao")


def arguments(question: str, add: Callable[[argparse.ArgumentParser], object] | None = None) -> Any:
    """The command line of a benchmark: `--save`, and what `add(parser)` adds."""
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results")
    if add is not None:
        add(parser)
    return parser.parse_args()


def llama(hidden: int, intermediate: int, heads: int, layers: int, vocabulary: int) -> Any:
    """A Llama with random weights, the same at every call, for evaluation."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).eval()


def seconds(fn: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def median_seconds(fn: Callable[[], object], repeats: int = 5, warmup: int = 1) -> float:
    """The median over `repeats` calls, after `warmup` calls that do not count."""
    for _ in range(warmup):
        fn()
    return statistics.median(seconds(fn) for _ in range(repeats))


def interleaved(
    fns: Mapping[str, Callable[[], object]], repeats: int = 5, warmup: int = 1
) -> dict[str, float]:
    """Medians of several functions called in turn, so that a busy moment hits all of them."""
    for _ in range(warmup):
        for fn in fns.values():
            fn()
    times: dict[str, list[float]] = {name: [] for name in fns}
    for _ in range(repeats):
        for name, fn in fns.items():
            times[name].append(seconds(fn))
    return {name: statistics.median(values) for name, values in times.items()}


def machine() -> dict[str, Any]:
    """Processor, cores and memory; no name of a host."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    described: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": cores,
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        described["memory_gib"] = round(size / 2**30, 1)
    if "torch" in sys.modules:
        import torch

        described["torch_threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            described["gpu"] = torch.cuda.get_device_name()
    return described


def _kind_of(machine: Mapping[str, Any]) -> str:
    """A folder's name for machines of one kind: what computes, and on how many cores."""
    words = re.sub(r"\(\w+\)|@.*|Processor|CPU", " ", machine.get("gpu", machine["processor"]))
    return "-".join([*re.findall(r"[a-z0-9]+", words.lower()), f"{machine['cores']}-cores"])


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def versions() -> dict[str, str]:
    """Versions of Python, lorafold and the packages that benchmarks lean on."""
    import lorafold

    found = {"python": platform.python_version(), "lorafold": lorafold.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def table_of(rows: Sequence[Mapping[str, object]], title: str | None = None) -> Table:
    """A table of `rows`, dicts with the same keys."""
    table = Table(title=title, title_justify="left")
    for column in rows[0] if rows else ():
        table.add_column(column, justify="left" if column == next(iter(rows[0])) else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    return table


def report(
    question: str,
    rows: Sequence[Mapping[str, object]],
    result: Mapping[str, Any],
    save: bool = False,
) -> None:
    """Print the question, a table of `rows` (dicts with the same keys), and one JSON line.

    Args:
        result: the answer, in numbers; it is kept with machine, versions and date.
        save: write the JSON to benchmarks/results/<machine>/<script>.json as well.
    """
    name = Path(sys.argv[0]).stem
    Console().print(table_of(rows, question))
    record = {
        "benchmark": name,
        "question": question,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "result": dict(result),
    }
    if save:
        folder = RESULTS / _kind_of(record["machine"])
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=2, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(json.dumps(record, ensure_ascii=False), flush=True)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
