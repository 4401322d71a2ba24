"""Do packed rows of mixed lengths run faster than padded ones, each with an adapter of its own?

64 sequences of 8 to 60 tokens, each with its own adapter of rank 16 on q, k, v and o, through a
Llama of 2 layers with random weights: padded to the longest as 64 rows, and end to end in one row
with `use([…], lengths=[…])`. The claim:

- Everything but attention takes the share of the time that tokens are of places (about .55), and at
  most 1.25 times that.

Attention is shown apart, as it depends on the kernel and not on lorafold: padded with a mask;
packed, sequence by sequence, which is what a kernel for unequal lengths does; and packed with a
dense block-diagonal mask, whose cost grows with the square of the batch.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # see attach.py

import torch
import torch.nn.functional as F
from _common import arguments, interleaved, llama, report
from transformers import AttentionInterface

import lorafold as lf

QUESTION = "64 sequences of 8 to 60 tokens, 64 adapters: packed against padded rows"
ROWS, SHORTEST, LONGEST, RANK, VOCABULARY = 64, 8, 60, 16, 256
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
EQUAL, SLACK = 1e-4, 1.25


def no_attention(module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
    """Every token sees itself only: what is left is everything but attention."""
    return v.transpose(1, 2).contiguous(), None


def adapters_of(model: torch.nn.Module) -> dict[str, lf.Adapter]:
    g = torch.Generator().manual_seed(1)
    layers: dict[str, Any] = {p: m for p, m in model.named_modules() if p.endswith(TARGETS)}
    return {
        f"a{i}": lf.Adapter(
            {
                path: lf.LowRank(
                    torch.randn(RANK, m.in_features, generator=g) / m.in_features**0.5,
                    torch.randn(m.out_features, RANK, generator=g) / m.in_features**0.5,
                )
                for path, m in layers.items()
            }
        )
        for i in range(ROWS)
    }


def attention(lengths: list[int], heads: int, dim: int, repeats: int) -> dict[str, float]:
    """Seconds of one layer's attention in three ways."""
    padded = torch.randn(3, ROWS, heads, LONGEST, dim)
    own = torch.tensor(lengths)[:, None] > torch.arange(LONGEST)
    mask = own[:, None, None] & torch.ones(LONGEST, LONGEST, dtype=torch.bool).tril()
    mask[:, :, :, 0] = True  # padding sees something, so that it is a number
    packed = torch.cat([padded[:, i, :, :n] for i, n in enumerate(lengths)], 2)[:, None]
    of = torch.repeat_interleave(torch.tensor(lengths))
    block = (of[:, None] == of[None]).tril()
    ends = list(itertools.accumulate(lengths, initial=0))

    def by_sequence() -> torch.Tensor:
        parts = [packed[:, :, :, a:b] for a, b in itertools.pairwise(ends)]
        found = [F.scaled_dot_product_attention(*part, is_causal=True) for part in parts]
        return torch.cat(found, 2)

    dense = F.scaled_dot_product_attention(*packed, attn_mask=block)
    torch.testing.assert_close(by_sequence(), dense, rtol=EQUAL, atol=EQUAL)
    return interleaved(
        {
            "padded": lambda: F.scaled_dot_product_attention(*padded, attn_mask=mask),
            "packed, by sequence": by_sequence,
            "packed, dense mask": lambda: F.scaled_dot_product_attention(*packed, attn_mask=block),
        },
        repeats,
    )


def measured(hidden: int, repeats: int) -> dict[str, float]:
    """Medians of padded and packed rows at one width, checked to give the same."""
    heads = hidden // 64
    model = llama(hidden, 11 * hidden // 4, heads, 2, VOCABULARY).requires_grad_(False)
    model.set_attn_implementation("no_attention")
    live = lf.attach(model, adapters_of(model))
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (ROWS,), generator=g).tolist()
    lengths[0] = LONGEST
    tokens = torch.randint(0, VOCABULARY, (ROWS, LONGEST), generator=g)
    packed = torch.cat([tokens[i, :n] for i, n in enumerate(lengths)])[None]
    at = torch.cat([torch.arange(n) for n in lengths])[None]
    names: list[Any] = live.names

    def rows(what: list[Any] | None) -> Any:
        live.use(what)
        return model(tokens, use_cache=False).logits

    def end_to_end(what: list[Any] | None) -> Any:
        live.use(what, lengths=None if what is None else lengths)
        return model(packed, position_ids=at, use_cache=False).logits

    with torch.no_grad():
        wanted = torch.cat([part[:n] for part, n in zip(rows(names), lengths, strict=True)])
        difference = float((end_to_end(names)[0] - wanted).abs().max())
        assert difference <= EQUAL * float(wanted.abs().max()), f"they differ by {difference}"
        found = interleaved(
            {
                "padded": lambda: rows(names),
                "packed": lambda: end_to_end(names),
                "padded, base": lambda: rows(None),
                "packed, base": lambda: end_to_end(None),
            },
            repeats,
        )
        apart = attention(lengths, heads, hidden // heads, repeats)
    share = sum(lengths) / (ROWS * LONGEST)
    return {"share of places": share, **found, **{f"attention {k}": v for k, v in apart.items()}}


def main() -> None:
    def options(parser: Any) -> None:
        parser.add_argument("--repeats", type=int, default=9, help="calls that count")
        parser.add_argument("--hidden", type=int, nargs="+", default=[512, 1024], help="widths")

    given = arguments(QUESTION, options)
    AttentionInterface.register("no_attention", no_attention)
    found = {hidden: measured(hidden, given.repeats) for hidden in given.hidden}
    table, result = [], {}
    for hidden, times in found.items():
        ratio = times["packed"] / times["padded"]
        over = {k: times[k] / times[f"{k}, base"] - 1 for k in ("padded", "packed")}
        table.append(
            {
                "hidden": hidden,
                "tokens": times["share of places"],
                "padded s": times["padded"],
                "packed s": times["packed"],
                "ratio": ratio,
                "+ adapters": f"{over['padded']:+.0%}, {over['packed']:+.0%}",
                **{
                    f"{how}, ms": 1e3 * times[f"attention {key}"]
                    for how, key in (
                        ("attention padded", "padded"),
                        ("by sequence", "packed, by sequence"),
                        ("dense mask", "packed, dense mask"),
                    )
                },
            }
        )
        result[str(hidden)] = {
            "seconds": times,
            "packed over padded": ratio,
            "as tokens over places": ratio <= SLACK * times["share of places"],
        }
    report(QUESTION, table, result, given.save)


if __name__ == "__main__":
    main()
