"""Fill the pages' measured parts from benchmarks/results, or check that they are what is there.

    python tools/readme_numbers.py --write
    python tools/readme_numbers.py --check        # exit status 1 where a page differs

Two parts of the README lie between markers: what `lorafold demo` printed, and the table of
measurements. Results are kept by machine; of several that measured one row, the README shows the
less flattering. Where none did the row is left out; where a file lacks a number that the row needs,
this script fails. The tables of docs/loadings.md, merge.md, nested.md, qlora.md, steering.md and
transfer.md lie between markers, too: each shows one run whole, of several machines the first.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TABLED = ("loadings", "merge", "nested", "qlora", "steering", "transfer")
PAGES = [README, *(ROOT / "docs" / f"{name}.md" for name in TABLED)]
RESULTS = ROOT / "benchmarks" / "results"
WIDTH = 88

Result = dict[str, Any]
Cells = tuple[str, str, str, float]  # what, ours, the peer's, and the larger the more flattering


def _size(number: float) -> str:
    from lorafold.cli._output import size

    return size(number)


def _demo(r: Result) -> list[Cells]:
    at = next(k for k, row in enumerate(r["rows"]) if row["library"] == "lib")
    ours, same_error, same_bytes = r["rows"][at : at + 3]
    kept, worst = ours["retention_mean"], ours["retention_min"]
    what = f"{r['adapters']} trained adapters at 10 % error"
    return [
        (
            f"{what}: bytes",
            f"{_size(ours['bytes'])}: {ours['times_float16']:.2f}× below float16 files, "
            f"{ours['times_float32']:.2f}× below float32",
            f"truncated SVD, same error: {_size(same_error['bytes'])}",
            ours["times_float16"],
        ),
        (
            f"{what}: share of the lift kept",
            f"{kept:.1%} on average, {worst:.1%} at worst",
            f"truncated SVD, same bytes: {same_bytes['retention_mean']:.1%}, "
            f"{same_bytes['retention_min']:.1%}",
            worst,
        ),
    ]


def _fold_bytes(r: Result) -> list[Cells]:
    rows = []
    for key, sizes in r.items():
        if not key.endswith(", 10%"):
            continue
        peer = sizes["vLoRA"]
        them = f"vLoRA: {_size(peer)}" if peer else "vLoRA: does not reach the error"
        times = sizes["float16"] / sizes["auto"]
        ours = f"{_size(sizes['auto'])}: {times:.1f}× below float16"
        what = f"48 made-up adapters, {key.partition(',')[0]}, at 10 % error"
        rows.append((what, ours, them, times))
    return rows


def _fold_flat(r: Result) -> list[Cells]:
    what = "16 shared directions of 128 adapters × 4 modules, 4096×4096, rank 16"
    peer = f"vLoRA: {r['seconds: vLoRA from_adapters']:.1f} s"
    fit, fold = r["seconds: lorafold fit"], r["seconds: lorafold fold"]
    return [
        (
            f"{what}: the fit",
            f"{fit:.2f} s, {r['fit_times_faster']:.0f}× faster",
            peer,
            r["fit_times_faster"],
        ),
        (
            f"{what}: with errors, digests and writing",
            f"{fold:.2f} s, {r['fold_times_faster']:.0f}× faster",
            f"{peer}, the fit alone",
            r["fold_times_faster"],
        ),
    ]


def _coder(r: Result) -> list[Cells]:
    rows: list[Cells] = []
    for key, found in r.items():
        if key.startswith("packaged adapters") and key.endswith((" 4 bits", " 2 bits")):
            bits = key.rpartition(", ")[2]
            rows.append(
                (
                    f"error of the trained adapters at {bits} a number",
                    f"{found['error']:.1%}",
                    f"absmax rounding, same bytes: {found['absmax']:.1%}",
                    -found["error"],
                )
            )
    rate = r["bytes_per_second"]
    return [*rows, ("coding 100 MB of adapters, two cores", f"{rate / 1e6:.0f} MB/s", "", rate)]


def _fold_memory(r: Result) -> list[Cells]:
    ours = f"{r['share']:.0%} of the collection, {_size(r['peak_above_import_bytes'])}"
    what = f"peak memory of folding {_size(r['collection_bytes'])} from disk"
    return [(what, ours, "", -r["share"])]


def _fold_growth(r: Result) -> list[Cells]:
    grows = r["seconds_grow"]
    return [
        (
            f'time of folding {r["adapters_grow"]:g} times as many adapters, `form="auto"`',
            f"{grows['auto']:.1f}×",
            f'`form="svd"`: {grows["svd"]:.1f}×',
            -grows["auto"],
        ),
        (
            f"peak memory of folding 512 MiB under a limit of {_size(r['limit'])}",
            _size(r["peak"]),
            "",
            -r["peak"],
        ),
    ]


def _fold_scale(r: Result) -> list[Cells]:
    ratios, svd = r["ratios"], r["runs"]["svd"]["seconds"]
    auto, two = (r["runs"][run]["seconds"] for run in ("auto", "auto, two workers"))
    size = r["bytes"] / 2**20
    what = f"folding {r['adapters']} unrelated adapters × {r['modules']} modules of a 7B Llama"
    return [
        (
            f"{what}, one core",
            f"{size / auto:.0f} MiB/s",
            f'`form="svd"`: {size / svd:.0f} MiB/s',
            -ratios["auto / svd"],
        ),
        (
            f"{what}, two workers",
            f"{size / two:.0f} MiB/s, {ratios['two workers']:.2f}× one worker",
            f"{ratios['two workers / none']:.2f}× this process without workers",
            ratios["two workers"],
        ),
        (
            "the same where all have one start",
            f"{ratios['auto / svd, one start']:.2f}× the time of",
            '`form="svd"`',
            -ratios["auto / svd, one start"],
        ),
    ]


def _fold_many(r: Result) -> list[Cells]:
    ray = r["runs"]["10,000, Ray"]
    return [
        (
            "10,000 small adapters folded on two cores through Ray, every error verified",
            f"{ray['seconds'] / 60:.1f} min, peak of the driver {_size(ray['peak'])}",
            "the same bytes by two workers",
            -ray["seconds"],
        ),
        (
            "seconds an adapter at 10,000, next to 1,000",
            f"{r['growth']:.2f}×",
            "",
            -r["growth"],
        ),
    ]


def _reading(r: Result) -> list[Cells]:
    ours, alone = (r["seconds"][w] for w in ("together", "module by module"))
    return [
        (
            f"{r['adapters']} packaged adapters, {r['modules']} modules, read from a library",
            f"{1e3 * ours:.0f} ms",
            f"module by module: {1e3 * alone:.0f} ms",
            -ours,
        )
    ]


def _library_ops(r: Result) -> list[Cells]:
    return [
        (
            "`add` to a library of 1,000",
            f"{r['ratio']:.2f}× the time of",
            "reading the adapter and projecting it",
            -r["ratio"],
        ),
        ("files opened for a library of 10,000", f"{r['opens']}", "", -r["opens"]),
    ]


def _large_library(r: Result) -> list[Cells]:
    one, all_ = r["1000"], r["100000"]
    times = ("open", "read one", "add", "remove")

    def shown(row: Result) -> str:
        return ", ".join(f"{what} {1e3 * row[what]:.3g} ms" for what in times)

    readers = r["readers"]["in one process"]
    return [
        ("a library of 100,000", shown(all_), f"one of 1,000: {shown(one)}", -all_["add"]),
        (
            f"{readers['readers']:,} readers of it in one process",
            f"{readers['open files']} open files, {_size(readers['bytes each'])} of memory each",
            "",
            -readers["bytes each"],
        ),
    ]


def _command_line(r: Result) -> list[Cells]:
    took = r["seconds"]
    verbs = ", ".join(f"`{v}` {took[f'lorafold {v}']:.2f} s" for v in ("ls", "rm", "info"))
    return [
        (
            "a library of 1,000 on the command line, processor time",
            verbs,
            f"importing torch: {took['import torch']:.1f} s",
            -max(took[f"lorafold {v}"] for v in ("ls", "rm", "info")),
        )
    ]


def _lowrank_svd(r: Result) -> list[Cells]:
    return [
        (
            "SVD of a 4096×4096 update of rank 16",
            f"{1e3 * r['seconds_factored_4096']:.0f} ms",
            f"dense SVD of a 1024×1024 matrix: {1e3 * r['seconds_dense_1024']:.0f} ms",
            r["seconds_dense_1024"] / r["seconds_factored_4096"],
        )
    ]


def _resize(r: Result) -> list[Cells]:
    return [
        (
            "a 4096×4096 update of rank 16, moved to another width",
            f"{1e3 * r['seconds_factored']:.0f} ms",
            f"by dense SVD: {r['seconds_dense']:.0f} s",
            r["times_faster"],
        )
    ]


def _copy_distance(r: Result) -> list[Cells]:
    rows = {row["the base is moved by"]: row for row in r["rows"]}
    near, far = rows["noise, 0.2 of every matrix"], rows["noise, 0.7 of every matrix"]
    kept = near["mean of the lift"]
    return [
        (
            f"an adapter copied to a base whose weights are {near['distance']:.0%} off",
            f"{kept:.0%} of its lift is left",
            f"{far['distance']:.0%} off: {far['mean of the lift']:.0%}",
            kept,
        )
    ]


def _qlora(r: Result) -> list[Cells]:
    four, peer = r["formats"]["nf4, 64"], r["against PEFT"]
    ms = peer["training step ms"]
    return [
        (
            "a base in nf4, groups of 64",
            f"{four['÷ float32']:.1f}× below float32, {four['weights']:.1%} off in the weights; "
            f"adapters trained in float32 keep {four['lift']:.1%} of their lift",
            "",
            four["lift"],
        ),
        (
            "a QLoRA training step, one thread",
            f"{ms['lorafold']:.0f} ms, the same losses",
            f"PEFT on bitsandbytes: {ms['PEFT on bitsandbytes']:.0f} ms",
            ms["PEFT on bitsandbytes"] / ms["lorafold"],
        ),
    ]


def _qlora_train(r: Result) -> list[Cells]:
    rows: list[Cells] = []
    for name in r["runs"]:
        found = {row[_GAINED]: row for row in r["shares"] if row["of"] == name}
        ours, peer, elsewhere = (found[k] for k in ("nf4", "PEFT, nf4", "nf4, run in float32"))
        rows.append(
            (
                f"training on an NF4 base, {name}: of what the loss falls by in float32",
                f"{ours['mean']:.1%}, worst seed {ours['worst']:.1%}; moved to the float32 base "
                f"{elsewhere['mean']:.1%}",
                f"PEFT on bitsandbytes: {peer['mean']:.1%}",
                ours["worst"],
            )
        )
    return rows


def _attach(r: Result) -> list[Cells]:
    rows: list[Cells] = []
    for label, found in r["steps"].items():
        rows.append(
            (
                f"a forward with adapters attached: {label}",
                f"{found['lorafold / base']:.2f}× the base's time",
                f"PEFT: {found['PEFT / base']:.2f}×",
                found["PEFT / base"] / found["lorafold / base"],
            )
        )
    ours, peer = (r["switch"][who]["switch ms"] for who in ("adapter", "vLoRA set_task"))
    rows.append(
        (
            "another adapter, the whole model",
            f"{ours:.2f} ms",
            f"vLoRA's `set_task`: {peer:.0f} ms",
            peer / ours,
        )
    )
    ours, peer = (r["attach, ms"][who] for who in ("61st to 64th", "PEFT, 61st to 64th"))
    rows.append(
        ("attaching the 64th adapter", f"{ours:.1f} ms", f"PEFT: {peer:.0f} ms", peer / ours)
    )
    name = "pissa_niter_4"
    ours, peer = (r["begin"][f"{who} {name}"]["ms"] for who in ("lorafold", "PEFT"))
    what = f'fresh factors by `init="{name}"`, the whole model'
    return [*rows, (what, f"{ours:.0f} ms", f"PEFT: {peer:.0f} ms", peer / ours)]


def _attach_library(r: Result) -> list[Cells]:
    return [
        (
            "a library of 1,000 attached, 64 rows all different, hidden 2048: throughput of base",
            f"{r['throughput']:.0%}",
            f"64 separate adapters: {r['throughput_separate']:.0%}",
            r["throughput"],
        )
    ]


def _packed(r: Result) -> list[Cells]:
    rows: list[Cells] = []
    for hidden, found in r.items():
        ours, padded = found["seconds"]["packed"], found["seconds"]["padded"]
        what = f"64 sequences of 8 to 60 tokens, an adapter each, hidden {hidden}: end to end"
        rows.append((what, f"{1e3 * ours:.0f} ms", f"padded: {1e3 * padded:.0f} ms", padded / ours))
    return rows


def _merge(r: Result) -> list[Cells]:
    rows: list[Cells] = []
    for row in r["peft"]:
        kind, _, width = row["what"].partition(", ")
        how = "to rank 16" if kind == "svd" else "by TIES, in the joint space"
        ours = f"{row['lorafold ms/layer']:.1f} ms a layer, {row['times faster']:.0f}× faster"
        what = f"merging 8 adapters of rank 16 {how}, {width}"
        peer = f"PEFT, `{kind}`: {row['PEFT ms/layer']:,.0f} ms"
        rows.append((what, ours, peer, row["times faster"]))
    for row in r["files"]:
        ours = f"{row['seconds']:.1f} s, {row['times']:.1f}× reading and writing them"
        what = f"merging from files to file, {row['what'].partition(', files')[0]}"
        rows.append((what, ours, "", 1 / row["times"]))
    return rows


def _merge_quality(r: Result) -> list[Cells]:
    named = {row["method"]: row for row in r["rows"]}
    rows: list[Cells] = []
    for size in sorted({len(g) for g in r["groups"]}):
        methods = [row for name, row in named.items() if name != "best single adapter"]
        best = max(methods, key=lambda row: row[f"{size}: mean"])
        ours = f"{best[f'{size}: mean']:.1%} by `{best['method']}`"
        plain, single = (named[n][f"{size}: mean"] for n in ("linear", "best single adapter"))
        peer = f"task arithmetic: {plain:.1%}; one adapter alone: {single:.1%}"
        what = f"lift of trained tasks kept when {size} adapters are merged"
        rows.append((what, ours, peer, best[f"{size}: mean"]))
    return rows


def _overlap_forecast(r: Result) -> list[Cells]:
    row = next(row for row in r["rows"] if row["forecast"].startswith("interference"))
    found = row["rank correlation at weight 1"]
    what = f"`overlap`'s forecast against what merging {r['pairs']} pairs cost a task"
    return [(what, f"rank correlation {found:.2f}", "", found)]


def _route(r: Result) -> list[Cells]:
    lift = {row["router"]: row["lift"] for row in r["rows"]}
    chosen = r["chosen"]
    found = lift[chosen]
    cost, base = r["arrow_seconds"], r["arrow_seconds"]["base"]
    return [
        (
            f"share of the oracle's lift on 31 tasks, by what held-out examples chose ({chosen})",
            f"{found:.1%}",
            f"an even mix of all: {lift['even mix of all']:.1%}",
            found,
        ),
        (
            "Arrow over 16 adapters, token by token",
            f"{cost['lorafold'] / base:.1f}× the base's time",
            f"PEFT: {cost['peft'] / base:.1f}×",
            base / cost["lorafold"],
        ),
    ]


def _similarity(r: Result) -> list[Cells]:
    rows = []
    for key, what in (("unrelated", "unrelated"), ("alike", "all alike")):
        found = r[key]
        peak = _size(found["peak"])
        rows.append(
            (
                f"all pairs of {r['adapters']:,} adapters × 64 modules, 2 GiB of files, {what}",
                f"{found['seconds']:.0f} s, {peak} at most",
                f"{found['gflops']:.0f} GFLOP/s by plain products in the same run",
                1 / found["seconds"],
            )
        )
    return rows


def _transfer(r: Result) -> list[Cells]:
    def mean(method: str, texts: int) -> float:
        found = [
            row["mean"] for row in r["rows"] if (row["method"], row["texts"]) == (method, texts)
        ]
        return statistics.fmean(found)

    texts = r["main"]
    moved, trained = (statistics.fmean(row[key] for row in r["trained"]) for key in _TRAINED)
    others = {"`svd`": ("svd", 0), "`procrustes`": ("procrustes", texts)}
    others["no transfer, trained on the same texts' labels"] = (_LABELS, texts)
    return [
        (
            f"lift of a native adapter kept on another base, {texts} texts, `distill`",
            f"{mean('distill', texts):.0%}",
            "; ".join(f"{what}: {round(mean(*row), 2) + 0:.0%}" for what, row in others.items()),
            mean("distill", texts),
        ),
        (
            "the same after a tenth of the native training steps",
            f"{moved:.0%}",
            f"as many steps from scratch: {trained:.0%}",
            moved,
        ),
    ]


def _transfer_encoders(r: Result) -> list[Cells]:
    means = {row["method"]: row["mean"] for row in r["rows"]}
    moved, trained = (statistics.fmean(row[key] for row in r["trained"]) for key in _TRAINED)
    best = max(means, key=lambda name: means[name])
    others = [name for name in ("functional", "distill", "procrustes", "svd") if name != best]
    what = "lift of a native adapter kept on a larger sentence encoder (MiniLM to MPNet)"
    return [
        (
            f"{what}, `{best}`",
            f"{means[best]:.0%}",
            "; ".join(f"`{name}`: {round(means[name], 2) + 0:.0%}" for name in others),
            means[best],
        ),
        (
            f"{what}, after a tenth of the native training steps",
            f"{moved:.0%}",
            f"as many steps from scratch: {trained:.0%}",
            moved,
        ),
    ]


def _train(r: Result) -> list[Cells]:
    one, many = r["steps"]
    mine, theirs = (r["peak"][who] for who in ("lorafold", "PEFT"))
    return [
        (
            f"a training step, {one['what']}: time by PEFT's",
            f"{one['share']:.2f}×, memory above the model's {_size(mine)}",
            f"PEFT: {_size(theirs)}",
            -one["share"],
        ),
        (
            f"a training step of {many['what']}: time by PEFT's",
            f"{many['share']:.2f}×, one batch",
            "PEFT: a step of each in turn",
            -many["share"],
        ),
    ]


def _steering(r: Result) -> list[Cells]:
    rows = []
    level = max(row["KL"] for row in r["rows"] if row["way"] == "dial")
    for trait in dict.fromkeys(row["trait"] for row in r["rows"]):
        won = {
            row["way"]: row["margin"]
            for row in r["rows"]
            if (row["trait"], row["KL"]) == (trait, level)
        }
        others = {k: v for k, v in won.items() if k != "dial" and v is not None}
        peers = "; ".join(f"{way}: {margin:.2f}" for way, margin in others.items())
        rows.append(
            (
                f"steering to {trait} at KL {level:g}: margin won, nats a token",
                f"{won['dial']:.2f}",
                peers,
                won["dial"] - max(others.values()),
            )
        )
    return rows


def _nested(r: Result) -> list[Cells]:
    area = {row["way"]: row["AURAC log2"][0] for row in r["rows"]}
    once = {way: found for way, found in area.items() if way not in ("prefixes", "one run a rank")}
    best = max(once, key=lambda way: once[way])
    others = "; ".join(f"{way}: {found:.2f}" for way, found in area.items() if way != best)
    what = "bits a byte off the base's loss, mean over log₂ of ranks 1 … 16, one adapter for all"
    return [(what, f"{once[best]:.2f} by {best}", others, once[best])]


def _controller(r: Result) -> list[Cells]:
    rows: list[Cells] = []
    for data in dict.fromkeys(row["data"] for row in r["rows"]):
        named = {row["way"]: row for row in r["rows"] if row["data"] == data}
        found = {way: row["bits"][0] for way, row in named.items()}
        mine = found.pop("controller")
        others = "; ".join(f"{way}: {bits:.2f}" for way, bits in found.items())
        what = f"held-out bits a byte after training under the controller, {data}"
        rows.append((what, f"{mine:.2f}", others, -mine))
    return rows


def _vllm_serve(r: Result) -> list[Cells]:
    share = r["likeliest"] / r["tokens"]
    what = f"vLLM {r['vllm']} on a library: {r['folders']} names, strengths, ranks and mixes"
    return [(what, f"{r['likeliest']} of {r['tokens']} tokens as by `attach`", "–", share)]


def _serve_speed(r: Result) -> list[Cells]:
    rows: list[Cells] = []
    for count in (16, 64):
        found = r[f"requests_{count}"]
        peer = found["peft_generate"] / found["adapters"]
        rows.append(
            (
                f"{count} requests on a base of 8 layers, 768 wide, one of 32 adapters each: "
                "tokens a second by those without",
                f"{found['kept']:.0%}" if found["kept"] < 1 else "no difference above the noise",
                f"PEFT's `generate(adapter_names=…)`: {peer:.2f}× ours",
                found["kept"],
            )
        )
    times = r["demo"]["rows_to_packed"]
    what = "64 requests on the demo's base and a processor, its 31 adapters: the `rows` engine"
    return [*rows, (what, f"{times:.1f}× the tokens a second of", "the `packed` engine", times)]


def _serve_load(r: Result) -> list[Cells]:
    what = f"{r['seconds'] / 60:.0f} min of {r['clients']} clients, 64 adapters that come and go"
    lost = f"{r['lost']} of {r['whole']:,} answers lost, {r['wrong']} of {r['sampled']} wrong"
    grown = f"memory {r['second_half_growth']:+.1%} in the second half"
    return [(what, f"{lost}; {grown}", "", -r["lost"] - r["wrong"] - r["second_half_growth"])]


def _loadings(r: Result) -> list[Cells]:
    """A row for each library that knows tasks; LoRA and random sides beside."""
    found = {row["way"]: row for row in r["rows"]}

    def kept(way: str) -> str:
        return f"{found[way]['retention'][0]:.2f} with {found[way]['numbers']:,} numbers"

    rows: list[Cells] = []
    for way in ("kin, one side", "kin, both sides", "strangers, both sides"):
        whose, sides = way.split(", ")
        others = [f"{way}, extra 2", "LoRA, rank 1", "LoRA, rank 4", f"random, {sides}"]
        beside = "; ".join(f"{other}: {kept(other)}" for other in others)
        what = f"a new task's lift by LoRA's at rank 16, trained in {sides} of {whose}"
        rows.append((what, kept(way), beside, found[way]["retention"][0]))
    return rows


def _attacks(r: Result) -> list[Cells]:
    lost = {row["attack"]: row["lost or damaged"] for row in r["rows"]}
    files, kinds = r["mutations"], len(r["mutations"]["verdicts"])
    wrong = lost["mutated files read"]
    killed = lost["writers killed"] + lost["repairs killed"]
    kills = f"{r['kills']['kills']} writers and {r['repairs']['repairs killed']} repairs"
    return [
        (
            f"{kinds} kinds of file, {files['each']:,} random mutations of each, read",
            f"{wrong} read wrong, crashed or hung",
            "",
            -wrong,
        ),
        (f"{kills} of a library killed at random", f"{killed} lost or damaged", "", -killed),
    ]


_LABELS = "no transfer: labels of the same texts"
_TRAINED = ("moved, trained", "fresh, trained")
_AFTER = ("moved", *_TRAINED)
_GAINED = "share of what float32 gains"
ROWS: dict[str, Callable[[Result], list[Cells]]] = {
    "demo": _demo,
    "coder": _coder,
    "fold_bytes": _fold_bytes,
    "fold_flat": _fold_flat,
    "fold_memory": _fold_memory,
    "fold_growth": _fold_growth,
    "fold_scale": _fold_scale,
    "fold_many": _fold_many,
    "reading": _reading,
    "library_ops": _library_ops,
    "large_library": _large_library,
    "command_line": _command_line,
    "lowrank_svd": _lowrank_svd,
    "resize": _resize,
    "copy_distance": _copy_distance,
    "attach": _attach,
    "attach_library": _attach_library,
    "packed": _packed,
    "qlora": _qlora,
    "qlora_train": _qlora_train,
    "merge": _merge,
    "merge_quality": _merge_quality,
    "similarity": _similarity,
    "overlap_forecast": _overlap_forecast,
    "route": _route,
    "transfer": _transfer,
    "transfer_encoders": _transfer_encoders,
    "train": _train,
    "steering": _steering,
    "nested": _nested,
    "controller": _controller,
    "loadings": _loadings,
    "serve_speed": _serve_speed,
    "serve_load": _serve_load,
    "vllm_serve": _vllm_serve,
    "attacks": _attacks,
}


def table(results: Path = RESULTS) -> str:
    """The measurements in Markdown, each row with a link to its script."""
    lines = ["| measured | lorafold | beside it | script |", "|---|---|---|---|"]
    for name, rows in ROWS.items():
        found: dict[str, Cells] = {}
        for path in sorted(results.glob(f"*/{name}.json")):
            result = json.loads(path.read_text(encoding="utf-8"))["result"]
            try:
                cells = rows(result)
            except (KeyError, StopIteration) as e:
                shown = path.relative_to(results)
                raise SystemExit(f"{shown} does not hold what its row needs: {e!r}") from e
            for row in cells:
                found[row[0]] = min(row, found.get(row[0], row), key=lambda r: r[3])
        link = f"[{name}.py](benchmarks/{name}.py)"
        lines += [
            f"| {what} | {us} | {peer or '–'} | {link} |" for what, us, peer, _ in found.values()
        ]
    return "\n".join(lines)


def demo_output(results: Path = RESULTS) -> str:
    """What `lorafold demo` printed, up to where it explains its columns."""
    from rich.console import Console

    from lorafold.cli.demo import _show

    runs = [
        json.loads(p.read_text(encoding="utf-8"))["result"] for p in results.glob("*/demo.json")
    ]
    runs = [r for r in runs if r.get("moved")] or runs  # as it prints today
    found = min(runs, key=lambda r: min(_demo(r), key=lambda cells: cells[3])[3])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        _show(Console(width=WIDTH, highlight=False, markup=False, emoji=False), found)
    shown, _, rest = printed.getvalue().partition("\nkept: ")
    written = rest[rest.index("Written to") :].rstrip()
    return f"```text\n$ lorafold demo\n{shown.rstrip()}\n\n[…]\n\n{written}\n```"


def _markdown(heads: list[str], rows: list[list[str]]) -> str:
    first, *others = (f"| {' | '.join(cells)} |" for cells in [heads, *rows])
    return "\n".join([first, f"|{'---|' * len(heads)}", *others])


def quality_table(r: Result) -> str:
    """Retention by method and size of group, the best for the middle size first."""
    sizes = sorted({len(g) for g in r["groups"]})
    heads = [h for n in sizes for h in (f"of {n}: mean, worst", "with noise")]

    def cells(row: dict[str, Any]) -> list[str]:
        found = [row["method"]]
        for n in sizes:
            noise = row.get(f"{n}: with noise")
            found.append(f"{row[f'{n}: mean']:.2f}, {row[f'{n}: worst']:.2f}")
            found.append("–" if noise is None else f"{noise:.2f}")
        return found

    ordered = sorted(r["rows"], key=lambda row: -row[f"{sizes[len(sizes) // 2]}: mean"])
    return _markdown(["method", *heads], [cells(row) for row in ordered])


def speed_table(r: Result) -> str:
    """Milliseconds a layer beside PEFT's, and as the layer grows."""
    beside = [
        [
            row["what"],
            f"{row['lorafold ms/layer']:.1f}",
            f"{row['PEFT ms/layer']:,.0f}",
            f"{row['times faster']:.0f}×",
        ]
        for row in r["peft"]
    ]
    methods = [key for key in r["growth"][0] if key != "width"]
    grown = [[str(row["width"]), *(f"{row[m]:.0f}" for m in methods)] for row in r["growth"]]
    heads = ["8 adapters of rank 16", "lorafold, ms a layer", "PEFT, ms a layer", "faster"]
    return "\n\n".join(
        [
            _markdown(heads, beside),
            _markdown(["layer's width", *(m.replace(" ms", ", ms") for m in methods)], grown),
        ]
    )


def retention_table(r: Result) -> str:
    """Retention by method, number of texts and target; and after some training."""
    targets = list(dict.fromkeys(row["target"] for row in r["rows"]))
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row in r["rows"]:
        found.setdefault((row["method"], row["texts"]), {})[row["target"]] = row

    def cell(row: Any) -> str:
        if row is None:
            return "–"
        return ", ".join(f"{round(row[key], 2) + 0:.2f}" for key in ("mean", "worst"))

    def rough(seconds: float) -> str:
        return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"

    def seconds(rows: list[Any]) -> str:
        once = statistics.fmean(row["align s"] or 0.0 for row in rows)
        each = rough(statistics.fmean(row["move s"] for row in rows))
        return f"{rough(once)} + {each}" if once else each

    heads = ["method", "texts", *(f"`{t}`: mean, worst" for t in targets), "seconds"]
    shown = [
        [
            method,
            str(texts or "–"),
            *(cell(rows.get(t)) for t in targets),
            seconds([*rows.values()]),
        ]
        for (method, texts), rows in found.items()
    ]
    after: dict[str, dict[str, str]] = {}
    for row in r["trained"]:
        after.setdefault(row["task"], {})[row["target"]] = ", ".join(
            f"{row[k]:.2f}" for k in _AFTER
        )
    heads_after = ["task", *(f"`{t}`: moved, trained on, from scratch" for t in targets)]
    shown_after = [[task, *(cells.get(t, "–") for t in targets)] for task, cells in after.items()]
    return _markdown(heads, shown) + "\n\n" + _markdown(heads_after, shown_after)


def encoders_table(r: Result) -> str:
    """Both encoders before and after training; retention by method; and after some training."""
    tasks = [row["task"] for row in r["trained"]]
    heads = ["encoder", "task", "steps", "bare: MRR, R@1", "its own adapter: MRR, R@1", "seconds"]
    known = [
        [
            row["encoder"],
            row["task"],
            str(row["steps"]),
            *(f"{row[f'{k} MRR']:.3f}, {row[f'{k} R@1']:.2f}" for k in ("base", "adapter")),
            f"{row['seconds']:.0f}",
        ]
        for row in r["known"]
    ]
    moved = [
        [
            row["method"],
            str(row["texts"] or "–"),
            *("–" if row[task] is None else f"{row[task]:.2f}" for task in tasks),
            f"{row['align s']:.0f} + {row['move s']:.0f}"
            if row["align s"]
            else f"{row['move s']:.2g}",
        ]
        for row in r["rows"]
    ]
    after = [
        [row["task"], str(row["steps"]), *(f"{row[k]:.2f}" for k in _AFTER)] for row in r["trained"]
    ]
    return "\n\n".join(
        [
            _markdown(heads, known),
            _markdown(["MiniLM to MPNet", "texts", *tasks, "seconds"], moved),
            _markdown(["task", "steps", *_AFTER], after),
        ]
    )


def steering_table(r: Result) -> str:
    """What each way of steering wins and costs at each level of KL."""
    heads = ["trait", "way", "KL", "margin", "won", "in text", "NLL", "repeated", "met"]

    def cells(row: dict[str, Any]) -> list[str]:
        first = [row["trait"], row["way"], f"{row['KL']:.2g}"]
        if not row["met"]:
            return [*first, *(["–"] * 5), "0"]
        spread = "" if row["±"] is None else f" ± {row['±']:.2f}"
        shares = (f"{100 * row[k]:+.0f} %" for k in ("won", "in text"))
        own = [f"{row['margin']:.2f}{spread}", *shares, f"{row['NLL']:+.3f}"]
        return [*first, *own, f"{100 * row['repeated']:+.0f} %", str(row["met"])]

    return _markdown(heads, [cells(row) for row in r["rows"]])


def qlora_table(r: Result) -> str:
    """Held-out losses by base and run, mean over seeds."""
    runs = r["runs"]
    heads = ["held-out loss", *runs]
    ends = next(iter(runs.values()))[0]
    shown = [
        [end, *(f"{statistics.fmean(run[end] for run in found):.3f}" for found in runs.values())]
        for end in ends
    ]
    return _markdown(heads, shown)


def _spread(cell: Any) -> str:
    """A mean and its deviation, or what is there."""
    return f"{cell[0]:.2f} ± {cell[1]:.2f}" if isinstance(cell, list) else str(cell)


def ranks_table(r: Result) -> str:
    """Scores by way of training: both areas, each rank, and the cost of a step."""
    keys = [key for key in r["rows"][0] if key not in ("way", "step", "better in")]
    heads = ["way", *keys, "a step"]
    cells = [
        [row["way"], *(_spread(row[key]) for key in keys), f"{row['step']:.2f}×"]
        for row in r["rows"]
    ]
    return _markdown(heads, cells)


def controller_table(r: Result) -> str:
    """How runs end, by data and way."""
    keys = ["data", "way", "bits", "bits − fixed", "better in", "broken", "shocks survived"]
    cells = [
        [*(_spread(row[key]) for key in keys), f"{row['rank']:.1f} of 16"] for row in r["rows"]
    ]
    return _markdown([*keys, "rank trained"], cells)


def loadings_table(r: Result) -> str:
    """What trains, the lift and its share of LoRA's, by way."""
    heads = ["way", "numbers", "bits below the base", "retention", "worst"]
    cells = [
        [
            row["way"],
            f"{row['numbers']:,}",
            _spread(row["bits below base"]),
            _spread(row["retention"]),
            f"{row['worst']:.2f}",
        ]
        for row in r["rows"]
    ]
    return _markdown(heads, cells)


TABLES: dict[str, list[tuple[str, str, Callable[[Result], str]]]] = {
    "loadings.md": [("ways", "loadings", loadings_table)],
    "merge.md": [("quality", "merge_quality", quality_table), ("speed", "merge", speed_table)],
    "qlora.md": [("qlora", "qlora_train", qlora_table)],
    "steering.md": [("ways", "steering", steering_table)],
    "transfer.md": [
        ("retention", "transfer", retention_table),
        ("encoders", "transfer_encoders", encoders_table),
    ],
    "nested.md": [
        ("ranks", "nested", ranks_table),
        ("controller", "controller", controller_table),
    ],
}


def parts_of(page: Path, results: Path) -> dict[str, str]:
    """{marker: content} of a page; nothing of what was not measured."""
    if page == README:
        found = {"numbers": table(results)}
        return found | ({"demo": demo_output(results)} if any(results.glob("*/demo.json")) else {})
    found = {}
    for marker, name, shown in TABLES[page.name]:
        for path in sorted(results.glob(f"*/{name}.json"))[:1]:
            found[marker] = shown(json.loads(path.read_text(encoding="utf-8"))["result"])
    return found


def filled(text: str, results: Path = RESULTS, page: Path = README) -> str:
    """A page with its parts as the results have them."""
    for name, content in parts_of(page, results).items():
        marked = re.compile(rf"<!-- {name} -->\n.*?<!-- /{name} -->", re.DOTALL)
        if len(marked.findall(text)) != 1:
            raise SystemExit(f"{page.name} must have one pair of markers for {name!r}")
        block = f"<!-- {name} -->\n{content}\n<!-- /{name} -->"
        text = marked.sub(lambda _, block=block: block, text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--write", action="store_true", help="write the pages")
    how.add_argument("--check", action="store_true", help="only say whether they are up to date")
    arguments = parser.parse_args()
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = filled(before, page=page)
        if arguments.write:
            page.write_text(after, encoding="utf-8")
        elif after != before:
            sys.exit(f"{page.name} differs from benchmarks/results: run {sys.argv[0]} --write")


if __name__ == "__main__":
    main()
