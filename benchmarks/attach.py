"""What does it cost to run, switch, attach and begin adapters on a model?

A Llama of 4 layers, hidden size 1024, with random weights; q, k, v and o carry rank 16; 2 threads;
PEFT and vLoRA in the same process, in turn, with the same adapters. The claims:

- 64 adapters in a batch of 64 single tokens, in an order of their own: at most 1.25 times the
  base's time, and at most a third of the overhead of PEFT's `adapter_names`. It is a forward of one
  token without a cache: attention over a context would add the same to all of them, and make the
  ratio look better. The vocabulary is small for the same reason: no large head hides the rest.
- One adapter on 32 × 16 tokens: not slower than PEFT. Eight adapters on them: not slower either.
- Another adapter, rank or c: less than 1 ms for the whole model, where vLoRA's `set_task`
  reconstructs every ΔW. What the first forward afterwards takes longer is listed too, and what it
  takes to choose anew for each of 64 rows.
- The 64th adapter is attached in the time of the first ones, within half.
- `init="pissa_niter_4"` is not slower than PEFT's, and explains as much of the weights.
"""

from __future__ import annotations

import copy
import itertools
import os
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# Before torch starts its threads. One that waits by spinning holds the core that another process
# has taken its partner's from, and each parallel region then costs a slice of the scheduler's.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import peft
import torch
import vlora
from _common import arguments, interleaved, llama, report, seconds, table_of
from rich.console import Console

import lorafold as lf

QUESTION = "Adapters on a running model (Llama-shaped, hidden 1024, 4 layers, q/k/v/o, rank 16)"
HIDDEN, LAYERS, RANK, ALPHA, VOCABULARY, ADAPTERS = 1024, 4, 16, 32, 1024, 64
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
PATHS = [f"model.layers.{i}.self_attn.{t}" for i in range(LAYERS) for t in TARGETS]
EQUAL = 1e-4
OVER_BASE, LESS_OVERHEAD, SWITCH_MS, ALIKE = 1.25, 3.0, 1.0, 1.5
VLORA_TASKS = 8  # few, so that reconstructing them is exact, and cheap

Rows = list[dict[str, Any]]
Result = dict[str, Any]


def base_model() -> Any:
    return llama(HIDDEN, 2816, 16, LAYERS, VOCABULARY).requires_grad_(False)


def make_adapters() -> dict[str, lf.Adapter]:
    g = torch.Generator().manual_seed(1)
    root = HIDDEN**0.5
    return {
        f"a{i}": lf.Adapter(
            {
                path: lf.LowRank(
                    torch.randn(RANK, HIDDEN, generator=g) / root,
                    torch.randn(HIDDEN, RANK, generator=g) / root,
                    ALPHA / RANK,
                )
                for path in PATHS
            }
        )
        for i in range(ADAPTERS)
    }


def lora_config(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, **options)


def on_peft(model: Any, adapters: Mapping[str, lf.Adapter]) -> tuple[Any, list[float]]:
    """The same adapters on a copy of the model, and how long PEFT took to add each."""
    names = list(adapters)
    theirs = peft.get_peft_model(copy.deepcopy(model), lora_config(), adapter_name=names[0])
    times = []
    for k, name in enumerate(names):

        def add(k: int = k, name: str = name) -> None:
            if k:
                theirs.add_adapter(name, lora_config())
            weights = {}
            for path, u in adapters[name].modules.items():
                weights[f"base_model.model.{path}.lora_A.weight"] = u.A
                weights[f"base_model.model.{path}.lora_B.weight"] = u.B
            peft.set_peft_model_state_dict(theirs, weights, adapter_name=name)

        times.append(seconds(add))
    theirs.requires_grad_(False)
    return theirs.eval(), times


def logits(model: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    found: torch.Tensor = model(tokens, use_cache=False, **options).logits
    return found


def same(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference of two outputs; none above EQUAL."""
    difference = float((ours - theirs).abs().max())
    assert difference <= EQUAL, f"the outputs differ by {difference}"
    return difference


def runs(
    model: Any, live: Any, theirs: Any, tokens: torch.Tensor, use: Any, repeats: int
) -> dict[str, float]:
    """Medians of base, lorafold and PEFT, in turn, with `use` a name or a list of names."""

    def base() -> torch.Tensor:
        live.use(None)
        return logits(model, tokens)

    def ours() -> torch.Tensor:
        live.use(use)  # the choice is part of the step
        return logits(model, tokens)

    def peers() -> torch.Tensor:
        if isinstance(use, str):
            theirs.set_adapter(use)
            return logits(theirs, tokens)
        return logits(theirs, tokens, adapter_names=use)

    difference = same(ours(), peers())
    assert float((ours() - base()).abs().max()) > 100 * EQUAL, "no adapter ran"
    times = interleaved({"base": base, "lorafold": ours, "PEFT": peers}, repeats)
    return {**times, "difference": difference}


def steps(model: Any, live: Any, theirs: Any, repeats: int) -> tuple[Rows, Result]:
    """Forwards: 64 adapters on single tokens; one and eight on segments."""
    g = torch.Generator().manual_seed(2)
    shuffled = [f"a{i}" for i in torch.randperm(ADAPTERS, generator=g).tolist()]
    token = torch.randint(VOCABULARY, (ADAPTERS, 1), generator=g)
    segments = torch.randint(VOCABULARY, (32, 16), generator=g)
    cases: dict[str, tuple[torch.Tensor, Any]] = {
        "64 adapters, 64 × 1 token": (token, shuffled),
        "1 adapter, 32 × 16 tokens": (segments, "a5"),
        "8 adapters, 32 × 16 tokens": (segments, [f"a{3 * (i % 8)}" for i in range(32)]),
    }
    rows, result = [], {}
    for label, (tokens, use) in cases.items():
        t = runs(model, live, theirs, tokens, use, repeats)
        # An overhead that is lost in the noise counts as a thousandth of the base.
        over = max(t["lorafold"] - t["base"], t["base"] / 1000)
        peft_over = t["PEFT"] - t["base"]
        numbers = {
            "base ms": 1e3 * t["base"],
            "lorafold ms": 1e3 * t["lorafold"],
            "PEFT ms": 1e3 * t["PEFT"],
            "lorafold / base": t["lorafold"] / t["base"],
            "PEFT / base": t["PEFT"] / t["base"],
            "overhead PEFT / lorafold": peft_over / over,
        }
        rows.append({"step": label, **numbers})
        result[label] = {**numbers, "difference": t["difference"]}
    return rows, result


def switches(model: Any, live: Any, twin: Any, adapters: Any, repeats: int) -> tuple[Rows, Result]:
    """Switching for the whole model, and what the first forward afterwards takes longer.

    Args:
        twin: a copy of the model, for vLoRA.
    """
    token = torch.zeros(1, 1, dtype=torch.int64)
    tasks = dict(list(adapters.items())[:VLORA_TASKS])
    weights = [
        vlora.LoRAWeights(
            layer_names=PATHS,
            lora_a={p: a[p].A for p in PATHS},
            lora_b={p: a[p].scale * a[p].B for p in PATHS},
            rank=RANK,
        )
        for a in tasks.values()
    ]
    subspace = vlora.SharedSubspace.from_adapters(weights, num_components=VLORA_TASKS)
    theirs = vlora.VLoRAModel(twin, subspace)
    theirs.set_task("task_3")
    live.use("a3")
    difference = same(logits(model, token), logits(theirs, token))
    names = list(adapters)

    def turns(*options: Callable[[], object]) -> Callable[[], object]:
        order = itertools.cycle(options)

        def fn() -> None:
            next(order)()

        return fn

    switch = {
        "adapter": turns(lambda: live.use("a1"), lambda: live.use("a2")),
        "rank": turns(lambda: live.use("a1", rank=4), lambda: live.use("a1", rank=8)),
        "c": turns(lambda: live.use("a1", c=0.5), lambda: live.use("a1", c=-1.0)),
        "two adapters": turns(
            lambda: live.use({"a1": 0.5, "a2": 1.0}), lambda: live.use({"a3": 0.5, "a2": 1.0})
        ),
        "adapter of 64 rows": turns(lambda: live.use(names), lambda: live.use(names[::-1])),
        "vLoRA set_task": turns(
            lambda: theirs.set_task("task_1"), lambda: theirs.set_task("task_2")
        ),
    }
    rows, result = [], {"difference": difference}
    for label, fn in switch.items():
        run = theirs if "vLoRA" in label else model
        batch = token.expand(64, 1) if "rows" in label else token

        def forward(run: Any = run, batch: torch.Tensor = batch) -> None:
            logits(run, batch)

        # Between two forwards, as it happens: nothing that a switch needs is in a cache.
        times = [(seconds(fn), seconds(forward), seconds(forward)) for _ in range(2 * repeats)]
        after = statistics.median(first - later for _, first, later in times)
        numbers = {
            "switch ms": 1e3 * statistics.median(t for t, _, _ in times),
            "first forward, extra ms": 1e3 * after,
        }
        rows.append({"switch of": label, **numbers})
        result[label] = numbers
    return rows, result


def attaching(model: Any, adapters: Any, repeats: int) -> tuple[Rows, Result]:
    """The first adapters after the slots are reserved, and the last ones."""
    first, last, whole = [], [], []
    (head, *rest) = adapters
    for _ in range(repeats):
        whole.append(seconds(lambda: lf.attach(model, {head: adapters[head]}, slots=ADAPTERS)))
        live = lf.Live.of(model)
        times = [seconds(lambda n=n, live=live: live.add(adapters[n], n)) for n in rest]
        first.append(statistics.median(times[:4]))
        last.append(statistics.median(times[-4:]))
        live.detach()
    _, peft_times = on_peft(model, adapters)
    numbers = {
        "attach the first, slots reserved": 1e3 * statistics.median(whole),
        "2nd to 5th": 1e3 * statistics.median(first),
        "61st to 64th": 1e3 * statistics.median(last),
        "PEFT, 2nd to 5th": 1e3 * statistics.median(peft_times[1:5]),
        "PEFT, 61st to 64th": 1e3 * statistics.median(peft_times[-4:]),
    }
    rows = [{"attach": label, "ms": ms} for label, ms in numbers.items()]
    ratio = numbers["61st to 64th"] / numbers["2nd to 5th"]
    return rows, {**numbers, "64th / 1st": ratio}


def beginnings(model: Any, repeats: int) -> tuple[Rows, Result]:
    """PiSSA's start at the same layers; the share of the weights' energy it takes."""
    tokens = torch.arange(16)[None]
    expected = logits(model, tokens)
    found: dict[str, Any] = {}

    def ours(init: str) -> None:
        spec = lf.LoRA(rank=RANK, alpha=ALPHA, targets=TARGETS, init=init, seed=0)
        found[f"lorafold {init}"] = lf.attach(model, spec)

    def peers(init: str, bases: Iterator[Any]) -> None:
        config = lora_config(init_lora_weights=init)
        found[f"PEFT {init}"] = peft.get_peft_model(next(bases), config)

    times: dict[str, list[float]] = {}
    energy: dict[str, float] = {}
    for k in range(repeats):
        for init in ("pissa_niter_4", "pissa") if k < 3 else ("pissa_niter_4",):
            bases = iter([copy.deepcopy(model)])
            label = f"PEFT {init}"
            times.setdefault(label, []).append(seconds(lambda i=init, b=bases: peers(i, b)))
            theirs = found.pop(label)
            same(logits(theirs.eval(), tokens), expected)
            energy[label] = explained(
                {p: theirs.get_submodule(f"base_model.model.{p}") for p in PATHS}
            )
            label = f"lorafold {init}"
            times.setdefault(label, []).append(seconds(lambda i=init: ours(i)))
            live = found.pop(label)
            same(logits(model, tokens), expected)
            energy[label] = sum(
                f.scale**2 * float((f.B @ f.A).square().sum())
                for f in live._state.trained("default").fresh.values()
            )
            live.detach()
    most = energy["lorafold pissa"]
    rows = [
        {
            "start": label,
            "ms": 1e3 * statistics.median(values),
            "of the best energy": energy[label] / most,
        }
        for label, values in sorted(times.items())
    ]
    return rows, {row["start"]: {k: row[k] for k in list(row)[1:]} for row in rows}


def explained(layers: Mapping[str, Any]) -> float:
    """‖ΔW‖² of a PEFT model's adapters."""
    return sum(float(layer.get_delta_weight("default").square().sum()) for layer in layers.values())


def met(step: Result, switch: Result, attach: Result, begin: Result) -> dict[str, bool]:
    rows, one, eight = step.values()
    niter = {k: v["ms"] for k, v in begin.items() if "niter" in k}
    least = min(v["of the best energy"] for k, v in begin.items() if k == "PEFT pissa_niter_4")
    return {
        f"64 adapters ≤ {OVER_BASE} × base": rows["lorafold / base"] <= OVER_BASE,
        f"overhead {LESS_OVERHEAD:g} × smaller than PEFT's": rows["overhead PEFT / lorafold"]
        >= LESS_OVERHEAD,
        "one adapter not slower than PEFT": one["lorafold ms"] <= one["PEFT ms"],
        "eight adapters not slower than PEFT": eight["lorafold ms"] <= eight["PEFT ms"],
        f"a switch of adapter, rank or c < {SWITCH_MS:g} ms": all(
            switch[k]["switch ms"] < SWITCH_MS for k in ("adapter", "rank", "c", "two adapters")
        ),
        f"64th adapter ≤ {ALIKE} × the first": attach["64th / 1st"] <= ALIKE,
        "pissa_niter_4 not slower than PEFT": niter["lorafold pissa_niter_4"]
        <= niter["PEFT pissa_niter_4"],
        "pissa_niter_4 as good as PEFT's": begin["lorafold pissa_niter_4"]["of the best energy"]
        >= least - 1e-3,
    }


def main() -> None:
    args = arguments(QUESTION, lambda p: p.add_argument("--repeats", type=int, default=15))
    torch.set_num_threads(2)
    warnings.filterwarnings("ignore", module="peft")
    model, adapters = base_model(), make_adapters()
    theirs, _ = on_peft(model, adapters)
    twin = copy.deepcopy(model)
    live = lf.attach(model, adapters, slots=ADAPTERS)
    tables = []
    with torch.inference_mode():
        rows, step = steps(model, live, theirs, args.repeats)
        tables.append(rows)
        rows, switch = switches(model, live, twin, adapters, args.repeats)
        tables.append(rows)
    del theirs
    live.detach()
    with torch.no_grad():
        rows, attach = attaching(model, adapters, max(3, args.repeats // 3))
        tables.append(rows)
        rows, begin = beginnings(model, args.repeats)
        tables.append(rows)
    result = {
        "steps": step,
        "switch": switch,
        "attach, ms": attach,
        "begin": begin,
        "met": met(step, switch, attach, begin),
    }
    for rows in tables[:-1]:
        Console(width=120).print(table_of(rows))
    report(QUESTION, tables[-1], result, args.save)


if __name__ == "__main__":
    main()
