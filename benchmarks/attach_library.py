"""Does a library on shared sides run 64 different adapters at nearly the base's speed?

1,000 adapters on common sides of 32 directions, folded with both sides shared, attached to a Llama
of hidden size 2048 without being reconstructed; a decode step of 64 single tokens, each with its
own adapter. The claims: at least 80 % of the base's throughput; less traffic than 64 separate
adapters in slots, and less time; memory on the device no more than the library and the slots.
"""

from __future__ import annotations

import torch
from _common import arguments, interleaved, report, seconds
from library_ops import RANK, WIDTH
from transformers import LlamaConfig, LlamaForCausalLM

import lorafold as lf

QUESTION = "A library of 1,000 names on shared sides, 64 rows all different, d = 2048: throughput"
D, LAYERS, BATCH, AT_LEAST, EQUAL = 2048, 2, 64, 0.8, 1e-4
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
PATHS = [f"model.layers.{i}.self_attn.{t}" for i in range(LAYERS) for t in TARGETS]


def family(count: int) -> dict[str, lf.Adapter]:
    """Adapters whose updates all lie in 32 directions a side at each module."""
    g = torch.Generator().manual_seed(0)
    sides = {
        p: [torch.linalg.qr(torch.randn(D, WIDTH, generator=g))[0] for _ in range(2)] for p in PATHS
    }

    def update(U: torch.Tensor, V: torch.Tensor) -> lf.LowRank:
        A = torch.randn(RANK, WIDTH, generator=g) @ V.T
        B = 0.05 * U @ torch.randn(WIDTH, RANK, generator=g)
        return lf.LowRank(A.bfloat16(), B.bfloat16())

    return {f"a{i}": lf.Adapter({p: update(*sides[p]) for p in PATHS}) for i in range(count)}


def bandwidth() -> float:
    """Bytes a second that a copy of 256 MB reads and writes."""
    a = torch.empty(64_000_000)
    b = torch.empty_like(a)
    return 2 * a.nbytes / min(seconds(lambda: b.copy_(a)) for _ in range(5))


def main() -> None:
    args = arguments(QUESTION, lambda p: p.add_argument("--count", type=int, default=1000))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=D, intermediate_size=5504, num_hidden_layers=LAYERS,
        num_attention_heads=16, num_key_value_heads=16,
    )  # fmt: skip
    base, shared, separate = (LlamaForCausalLM(config).eval() for _ in range(3))
    for other in (shared, separate):
        other.load_state_dict(base.state_dict())
    adapters = family(args.count)
    library = lf.fold(adapters, form="shared", rank=WIDTH)
    names = [f"a{(37 * i) % args.count}" for i in range(BATCH)]
    by_library = lf.attach(shared, library, slots=BATCH)
    one_by_one = lf.attach(separate, {n: library[n] for n in names}, slots=BATCH)
    by_library.use(names)
    one_by_one.use(names)
    tokens = torch.randint(0, 1024, (BATCH, 1))
    with torch.no_grad():
        apart = float((shared(tokens).logits - separate(tokens).logits).abs().max())
        assert apart < EQUAL, apart
        times = interleaved(
            {
                "base": lambda: base(tokens),
                "library on shared sides": lambda: shared(tokens),
                "64 separate adapters": lambda: separate(tokens),
            },
            repeats=21,
            warmup=3,
        )
    extra = {
        "library on shared sides": traffic(by_library),
        "64 separate adapters": traffic(one_by_one),
    }
    weights = sum(p.nbytes for p in base.parameters())
    speed = bandwidth()
    rows = [
        {
            "what": name,
            "ms": 1e3 * t,
            "throughput of base": times["base"] / t,
            "MiB read beside the weights": extra.get(name, 0) / 2**20,
            "share of bandwidth": (weights + extra.get(name, 0)) / t / speed,
        }
        for name, t in times.items()
    ]
    kept = times["base"] / times["library on shared sides"]
    on_device = traffic(by_library)
    result = {
        **{f"seconds: {name}": t for name, t in times.items()},
        "throughput": kept,
        "throughput_separate": times["base"] / times["64 separate adapters"],
        "traffic": extra,
        "bytes_on_device": on_device,
        "bytes_of_library": library.nbytes,
        "bytes_of_files": library.file_bytes,
        "met": {
            f"throughput ≥ {AT_LEAST:.0%}": kept >= AT_LEAST,
            "less traffic": extra["library on shared sides"] < extra["64 separate adapters"],
            "memory": on_device <= library.nbytes + slots_nbytes(by_library),
        },
    }
    report(QUESTION, rows, result, args.save)


def slots_nbytes(live: lf.Live) -> int:
    """Bytes of the slots of a handle."""
    return sum(
        b.A.nbytes + b.Bt.nbytes
        for p in live._state.slots.patches.values()
        for b in p.banks.values()
    )


def traffic(live: lf.Live) -> int:
    """Bytes of factors and sides that one step reads: every slot is used once."""
    return sum(b.nbytes for p in live._state.slots.patches.values() for b in p.banks.values())


if __name__ == "__main__":
    main()
