"""What do adapters cost a server's engine, in tokens a second?

A Llama of 8 layers, 768 wide, with random weights, and 32 adapters of rank 8 on q, v and down: 16
requests of 64 tokens that get 64 more, through the rows engine, each with an adapter of its own and
without, in turn. The claim:

- With adapters it keeps at least 85 % of its tokens a second.

64 requests are shown beside, and PEFT: `generate` with `adapter_names` on the same requests, all of
one length so that it need not pad. Both greedy; the texts must agree but for ties.
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
from lorafold.serve import Limits, Piece, Request, Sampling
from lorafold.serve.adapters import Attachments
from lorafold.serve.run.rows import RowsEngine

QUESTION = "tokens a second of the rows engine, 32 adapters against none, and PEFT's adapter_names"
WIDTH, LAYERS, RANK, ADAPTERS, PROMPT, NEW, VOCABULARY = 768, 8, 8, 32, 64, 64, 1024
TARGETS = ("q_proj", "v_proj", "down_proj")
KEPT = 0.85


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

    def __init__(self, engine: RowsEngine, prompts: torch.Tensor, named: bool) -> None:
        self.engine, self.named = engine, named
        self.prompts = prompts.tolist()
        self.left = threading.Semaphore(0)

    def once(self) -> tuple[float, list[list[int]]]:
        """(seconds, the tokens of each)."""
        tokens: list[list[int]] = [[] for _ in self.prompts]
        begun = time.perf_counter()
        for i, prompt in enumerate(self.prompts):
            mix = {f"a{i % ADAPTERS}": 1.0} if self.named else {}
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

    model = llama(WIDTH, 2 * WIDTH, 12, layers, VOCABULARY)
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


def main() -> None:
    chosen = arguments(QUESTION, options)
    model = llama(WIDTH, 2 * WIDTH, 12, chosen.layers, VOCABULARY)
    adapters = adapters_of(model)
    limits = Limits(PROMPT + NEW, VOCABULARY, 64, 64, 256)
    engine = RowsEngine(model, Attachments(model, 64, torch.float32), limits)
    engine.start()
    add = engine.attachments.add
    for name, adapter in adapters.items():
        engine.call(lambda n=name, a=adapter: add(a, n, engine.trial)).result()
    g = torch.Generator().manual_seed(2)
    rows, result = [], {}
    for count in (16, 64):
        prompts = torch.randint(VOCABULARY, (count, PROMPT), generator=g)
        ways = {
            "no adapter": Run(engine, prompts, False).once,
            f"{ADAPTERS} adapters": Run(engine, prompts, True).once,
            "peft": peft_runner(adapters, prompts, chosen.layers),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        texts = {}
        for repeat in range(chosen.repeats + 1):
            for way, once in ways.items():
                took, texts[way] = once()
                if repeat:  # the first warms up
                    times[way].append(took)
        speed = {way: count * NEW / statistics.median(t) for way, t in times.items()}
        plain, own, peft = speed.values()
        agree = same(texts[f"{ADAPTERS} adapters"], texts["peft"])
        rows.append(
            {
                "requests": count,
                "no adapter, tokens/s": plain,
                f"{ADAPTERS} adapters": own,
                "kept": own / plain,
                "PEFT generate": peft,
                "same texts": agree,
            }
        )
        result[f"requests_{count}"] = {
            "no_adapter": plain,
            "adapters": own,
            "kept": own / plain,
            "peft_generate": peft,
            "same_texts": agree,
        }
    engine.stop(10)
    report(QUESTION, rows, result, chosen.save)
    assert result["requests_16"]["same_texts"] >= 0.9
    assert result["requests_16"]["kept"] >= KEPT, "adapters cost more than the claim"


if __name__ == "__main__":
    main()
