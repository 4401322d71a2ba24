"""What do 256 different adapters cost a decode step on a GPU?

A Llama of 4 layers, hidden size 4096, bfloat16, with random weights; q, k, v and o carry rank 16;
256 rows of one token, each with its own adapter, in an order of their own; PEFT's `adapter_names`
in turn, with the same adapters. Measured eagerly and as a replayed CUDA graph, in which the choice
is changed by `use` between replays. The claims: eagerly at most a third of PEFT's overhead; a
replayed graph follows the choice. The ratio to the base is stated: 256 adapters of rank 16 are
twice as many bytes as a weight, so it cannot be near 1.

Without a CUDA device there is nothing to measure: the script says so, and keeps no result.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import peft
import torch
from _common import arguments, llama, report

import lorafold as lf

QUESTION = "256 adapters on 256 rows (GPU, bfloat16, Llama-shaped, hidden 4096, q/k/v/o, rank 16)"
HIDDEN, LAYERS, RANK, ALPHA, VOCABULARY, ADAPTERS = 4096, 4, 16, 32, 1024, 256
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
PATHS = [f"model.layers.{i}.self_attn.{t}" for i in range(LAYERS) for t in TARGETS]
LESS_OVERHEAD = 3.0
EQUAL = 0.02  # of the largest logit: bfloat16 keeps 8 bits, and the order of sums differs


def base_model() -> Any:
    with torch.device("cuda"):
        model = llama(HIDDEN, 11008, 32, LAYERS, VOCABULARY).to(torch.bfloat16)
    return model.requires_grad_(False)


def make_adapters() -> dict[str, lf.Adapter]:
    g = torch.Generator(device="cuda").manual_seed(1)
    root = HIDDEN**0.5
    options: Any = {"generator": g, "device": "cuda", "dtype": torch.bfloat16}
    return {
        f"a{i}": lf.Adapter(
            {
                path: lf.LowRank(
                    torch.randn(RANK, HIDDEN, **options) / root,
                    torch.randn(HIDDEN, RANK, **options) / root,
                    ALPHA / RANK,
                )
                for path in PATHS
            }
        )
        for i in range(ADAPTERS)
    }


def on_peft(model: Any, adapters: dict[str, lf.Adapter]) -> Any:
    """The same adapters on a copy of the model."""

    def config() -> peft.LoraConfig:
        return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)

    first = next(iter(adapters))
    theirs = peft.get_peft_model(
        copy.deepcopy(model), config(), adapter_name=first, autocast_adapter_dtype=False
    )
    for name, a in adapters.items():
        if name != first:
            theirs.add_adapter(name, config(), autocast_adapter_dtype=False)
        for path, u in a.modules.items():
            layer = theirs.get_submodule(f"base_model.model.{path}")
            layer.lora_A[name].weight.data.copy_(u.A)
            layer.lora_B[name].weight.data.copy_(u.B)
    return theirs.requires_grad_(False).eval()


def milliseconds(fns: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Medians by CUDA events of functions called in turn."""
    times: dict[str, list[float]] = {name: [] for name in fns}
    for k in range(repeats + 3):
        for name, fn in fns.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            fn()
            end.record()
            torch.cuda.synchronize()
            if k >= 3:  # the first ones warm up
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def recorded(model: Any, tokens: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A CUDA graph of the model's forward, and the logits that each replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            logits(model, tokens)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = logits(model, tokens)
    return graph, out


def logits(model: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    # A mask that is ready is not looked into, so that the forward can be recorded.
    mask = torch.zeros(len(tokens), 1, 1, 1, dtype=torch.bfloat16, device=tokens.device)
    found: torch.Tensor = model(tokens, attention_mask=mask, use_cache=False, **options).logits
    return found


def same(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    assert difference <= EQUAL, f"the outputs differ by {difference} of the largest"
    return difference


def main() -> None:
    args = arguments(QUESTION, lambda p: p.add_argument("--repeats", type=int, default=30))
    if not torch.cuda.is_available():
        print("No CUDA device here: nothing was measured.")
        return
    model, adapters = base_model(), make_adapters()
    theirs = on_peft(model, adapters)
    order = torch.randperm(ADAPTERS, generator=torch.Generator().manual_seed(2)).tolist()
    names = [f"a{i}" for i in order]
    tokens = torch.randint(VOCABULARY, (ADAPTERS, 1), device="cuda")
    with torch.no_grad():
        plain = logits(model, tokens)
        base_graph, _ = recorded(model, tokens)
        live = lf.attach(model, adapters, slots=ADAPTERS)
        live.use(names)
        difference = same(logits(model, tokens), logits(theirs, tokens, adapter_names=names))
        graph, out = recorded(model, tokens)
        follows = followed(live, model, tokens, graph, out, names)
        assert float((out - plain).abs().max()) > 0, "no adapter ran"

        def base() -> None:
            live.use(None)
            logits(model, tokens)

        def ours() -> None:
            live.use(names)
            logits(model, tokens)

        t = milliseconds(
            {
                "base": base,
                "lorafold": ours,
                "PEFT": lambda: logits(theirs, tokens, adapter_names=names),
                "base, graph": base_graph.replay,
                "lorafold, graph": graph.replay,
            },
            args.repeats,
        )
    rows = [
        {
            "decode step": label,
            "ms": ms,
            "over base": ms / t["base, graph" if "graph" in label else "base"],
        }
        for label, ms in t.items()
    ]
    less = (t["PEFT"] - t["base"]) / max(t["lorafold"] - t["base"], t["base"] / 1000)
    result = {
        "ms": t,
        "lorafold / base": t["lorafold"] / t["base"],
        "lorafold / base, graph": t["lorafold, graph"] / t["base, graph"],
        "PEFT / base": t["PEFT"] / t["base"],
        "overhead PEFT / lorafold": less,
        "difference": difference,
        "met": {
            f"overhead {LESS_OVERHEAD:g} × smaller than PEFT's": less >= LESS_OVERHEAD,
            "a replayed graph follows the choice": follows,
        },
    }
    report(QUESTION, rows, result, args.save)


def followed(
    live: Any,
    model: Any,
    tokens: torch.Tensor,
    graph: torch.cuda.CUDAGraph,
    out: torch.Tensor,
    names: list[str],
) -> bool:
    """Whether replays give what other choices give eagerly."""
    for choice in (names[::-1], names):
        live.use(choice)
        graph.replay()
        same(out, logits(model, tokens))
    return True


if __name__ == "__main__":
    main()
