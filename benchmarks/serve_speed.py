"""What do adapters cost a server's engine, in tokens a second?

A Llama of 8 layers, 768 wide (2,048 in between), with random weights, and 32 adapters of rank 8 on
q, v and down: 16 requests of 64 tokens that get 64 more, through the rows engine, each with an
adapter of its own and without, in turn. The claim:

- With adapters it keeps at least 85 % of its tokens a second.

64 requests are shown beside, and PEFT: `generate` with `adapter_names` on the same requests, all of
one length so that it need not pad. Both greedy; the texts must agree but for ties. On the demo's
base, with its 31 adapters and 64 requests of unlike lengths, a second claim:

- On a processor the rows engine makes at least twice the packed engine's tokens a second.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # see attach.py

import torch
from _common import arguments, llama, report

import lorafold as lf
from lorafold.demo.model import base_dir, data_dir
from lorafold.serve import Limits, Piece, Request, Room, Sampling, read_base
from lorafold.serve.adapters import Attachments
from lorafold.serve.run.loop import Looping
from lorafold.serve.run.rows import RowsEngine

QUESTION = "tokens a second of the rows engine, 32 adapters against none, and PEFT's adapter_names"
WIDTH, BETWEEN, LAYERS, RANK, ADAPTERS, PROMPT, NEW, VOCABULARY = 768, 2048, 8, 8, 32, 64, 64, 1024
TARGETS = ("q_proj", "v_proj", "down_proj")
MANY, SHORTEST = 64, 10  # requests on the demo's base, and the tokens of the shortest prompt
KEPT, ROWS_TO_PACKED = 0.85, 2.0
_PEERS = 2  # runs of PEFT's, which take long, after the one that warms up


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer, to try it out")


def adapters_of(model: torch.nn.Module) -> dict[str, lf.Adapter]:
    g = torch.Generator().manual_seed(1)
    layers: dict[str, Any] = {p: m for p, m in model.named_modules() if p.endswith(TARGETS)}
    config = {"r": RANK, "lora_alpha": RANK, "target_modules": list(TARGETS)}
    return {
        f"a{i}": lf.Adapter(
            {
                path: lf.LowRank(
                    torch.randn(RANK, m.in_features, generator=g) / m.in_features**0.5,
                    torch.randn(m.out_features, RANK, generator=g) / m.in_features**0.5,
                )
                for path, m in layers.items()
            },
            config=config,
        )
        for i in range(ADAPTERS)
    }


class Run:
    """Requests through an engine, all at once."""

    def __init__(self, engine: Looping, prompts: list[list[int]], names: list[str]) -> None:
        self.engine, self.names, self.prompts = engine, names, prompts
        self.left = threading.Semaphore(0)

    def once(self) -> tuple[float, list[list[int]]]:
        """(seconds, the tokens of each)."""
        tokens: list[list[int]] = [[] for _ in self.prompts]
        begun = time.perf_counter()
        for i, prompt in enumerate(self.prompts):
            mix = {self.names[i % len(self.names)]: 1.0} if self.names else {}
            rules = Sampling(temperature=0)
            self.engine.submit(Request(prompt, NEW, self.told(tokens[i]), mix, sampling=rules))
        for _ in self.prompts:
            self.left.acquire()
        return time.perf_counter() - begun, tokens

    def told(self, tokens: list[int]) -> Any:
        def tell(piece: Piece) -> None:
            if piece.token is not None:
                tokens.append(piece.token)
            if piece.reason is not None:
                self.left.release()

        return tell


def peft_runner(adapters: dict[str, lf.Adapter], prompts: torch.Tensor, layers: int) -> Any:
    """`generate` of PEFT on the same requests."""
    import tempfile

    from peft import PeftModel

    model = llama(WIDTH, BETWEEN, 12, layers, VOCABULARY)
    with tempfile.TemporaryDirectory() as folder:
        for name, adapter in adapters.items():
            lf.save(adapter, f"{folder}/{name}")
        wrapped = PeftModel.from_pretrained(model, f"{folder}/a0", adapter_name="a0")
        for name in list(adapters)[1:]:
            wrapped.load_adapter(f"{folder}/{name}", adapter_name=name)
    wrapped.eval()
    names = [f"a{i % ADAPTERS}" for i in range(len(prompts))]

    def once() -> tuple[float, list[list[int]]]:
        begun = time.perf_counter()
        with torch.no_grad():
            found = wrapped.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                adapter_names=names,
                max_new_tokens=NEW,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return time.perf_counter() - begun, found[:, PROMPT:].tolist()

    return once


def same(ours: list[list[int]], peers: list[list[int]]) -> float:
    """The share of requests with one text; the rest parted at a tie."""
    return sum(a == b for a, b in zip(ours, peers, strict=True)) / len(ours)


def attach(engine: Any, adapters: dict[str, lf.Adapter]) -> None:
    """Start an engine, with adapters."""
    engine.start()
    add = engine.attachments.add
    for name, adapter in adapters.items():
        engine.call(lambda n=name, a=adapter: add(a, n, engine.trial)).result()


def in_turn(
    ways: dict[str, Any], repeats: int
) -> tuple[dict[str, float], dict[str, Any], dict[str, list[float]]]:
    """Median tokens a second of each, its texts, and seconds; the first run warms up."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    texts: dict[str, Any] = {}
    for repeat in range(repeats + 1):
        for way, once in ways.items():
            if way == "peft" and repeat > _PEERS:
                continue
            took, texts[way] = once()
            if repeat:
                times[way].append(took)
    speed = {way: len(texts[way]) * NEW / statistics.median(t) for way, t in times.items()}
    return speed, texts, times


def kept_of(times: dict[str, list[float]]) -> float:
    """The median share that a run with adapters keeps of the one before it, without: a machine's
    speed changes from minute to minute.
    """
    pairs = zip(times["none"], times["own"], strict=True)
    return statistics.median(none / own for none, own in pairs)


def on_the_demo(repeats: int) -> dict[str, float]:
    """Tokens a second of rows and packed, 64 requests through 64 rows, 31 adapters."""
    adapters = {p.name: lf.load(p) for p in sorted((data_dir() / "adapters").iterdir())}
    g = torch.Generator().manual_seed(3)
    lengths = torch.randint(SHORTEST, PROMPT, (MANY,), generator=g).tolist()
    prompts = [torch.randint(32, 127, (n,), generator=g).tolist() for n in lengths]
    room = Room(rows=MANY, length=PROMPT + NEW, adapters=len(adapters))
    engines = {}
    for kind in ("rows", "packed"):
        engines[kind] = read_base(base_dir(), "demo", engine=kind, room=room, device="cpu").engine
        attach(engines[kind], adapters)
    ways = {kind: Run(engine, prompts, list(adapters)).once for kind, engine in engines.items()}
    speed, texts, _ = in_turn(ways, repeats)
    for engine in engines.values():
        engine.stop(10)
    agree = same(texts["rows"], texts["packed"])
    return {**speed, "rows_to_packed": speed["rows"] / speed["packed"], "same_texts": agree}


def main() -> None:
    chosen = arguments(QUESTION, options)
    demo = on_the_demo(chosen.repeats)
    model = llama(WIDTH, BETWEEN, 12, chosen.layers, VOCABULARY)
    adapters = adapters_of(model)
    limits = Limits(PROMPT + NEW, VOCABULARY, 64, 64, 256)
    engine = RowsEngine(model, Attachments(model, 64, torch.float32), limits)
    attach(engine, adapters)
    g = torch.Generator().manual_seed(2)
    rows, result = [], {"demo": demo}
    for count in (16, 64):
        prompts = torch.randint(VOCABULARY, (count, PROMPT), generator=g)
        ways = {
            "none": Run(engine, prompts.tolist(), []).once,
            "own": Run(engine, prompts.tolist(), list(adapters)).once,
            "peft": peft_runner(adapters, prompts, chosen.layers),
        }
        speed, texts, times = in_turn(ways, chosen.repeats)
        kept, agree = kept_of(times), same(texts["own"], texts["peft"])
        rows.append(
            {
                "requests": count,
                "no adapter, tokens/s": speed["none"],
                f"{ADAPTERS} adapters": speed["own"],
                "kept": kept,
                "PEFT generate": speed["peft"],
                "same texts": agree,
            }
        )
        result[f"requests_{count}"] = {
            "no_adapter": speed["none"],
            "adapters": speed["own"],
            "kept": kept,
            "peft_generate": speed["peft"],
            "same_texts": agree,
        }
    engine.stop(10)
    print(
        f"Demo's base, {MANY} requests: rows {demo['rows']:.0f} tokens/s, "
        f"packed {demo['packed']:.0f} ({demo['rows_to_packed']:.1f}×)"
    )
    report(QUESTION, rows, result, chosen.save)
    assert min(demo["same_texts"], result["requests_16"]["same_texts"]) >= 0.9
    assert result["requests_16"]["kept"] >= KEPT, "adapters cost more than the claim"
    assert demo["rows_to_packed"] >= ROWS_TO_PACKED, "rows are nearer to packed than the claim"


if __name__ == "__main__":
    main()
