"""How good and how fast is the coder?

At 4, 3, 2 and 1 average bits: the measured error of coded adapters against the predicted one
(within 5 %, 10 % where d < 512), and against plain absmax rounding of A's rows and B's columns with
float16 scales at the same bytes (at 1 bit: sign · mean |x|). On the packaged adapters and on
exponential spectra. And the rate at which 100 MB of adapters are coded: 30 MB/s or more.
"""

from __future__ import annotations

import statistics

import numpy as np
import torch
from _common import arguments, report, seconds

import lorafold as lf
from lorafold.collection.batch import Block, Factors, decompose, squared_differences
from lorafold.demo.model import data_dir
from lorafold.fold.coding.bits import predicted_error
from lorafold.fold.coding.record import Target, code

QUESTION = "Coder: error against its prediction and against absmax rounding; rate"
BITS = (4, 3, 2, 1)
RATE_AT_LEAST = 30e6


def exponential(d: int, rank: int, seed: int) -> lf.LowRank:
    """An update with singular values 0.8^k, in the gauge that training would leave."""
    g = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(d, rank, generator=g))[0] for _ in range(2))
    S = 0.8 ** torch.arange(rank)
    return lf.LowRank(S.sqrt()[:, None] * V.T, U * S.sqrt())


def absmax(X: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows rounded to 2^bits − 1 even levels under their largest entry; sign · mean at 1 bit."""
    if bits == 1:
        return X.sign() * X.abs().mean(1, keepdim=True).half().float()
    top = 2 ** (bits - 1) - 1
    scale = (X.abs().amax(1, keepdim=True) / top).half().float().clamp_min(1e-12)
    return (X / scale).round().clamp(-top, top) * scale


def errors(updates: list[lf.LowRank], bits: int) -> tuple[float, float, float]:
    """Relative error over all modules of one adapter: measured, predicted, absmax."""
    total = coded_error = predicted = plain = 0.0
    for u in updates:
        B, A = (u.scale * u.B.float())[None], u.A.float()[None]
        block = Block(np.zeros(1, int), *decompose(B, A))
        energy = block.S.numpy() ** 2
        cost = np.full(energy.shape[1], sum(u.shape) / 8)
        budget = np.array([bits * cost.sum() * u.rank / energy.shape[1]])
        target = Target("bytes", budget)
        coded = code(Factors(block.members, B, A), target, block=block)
        total += float(energy.sum())
        coded_error += float(coded.squared_error[0])
        predicted += float(np.asarray(predicted_error(energy, True, target.bits(energy, cost)))[0])
        rough = absmax(B[0].T, bits).T[None], absmax(A[0], bits)[None]
        plain += float(squared_differences(B, A, *rough)[0])
    return tuple((e / total) ** 0.5 for e in (coded_error, predicted, plain))  # type: ignore[return-value]


def rate() -> float:
    """Bytes of float32 factors that are folded per second, in memory, at 4 average bits."""
    sources = {
        f"a{i}": lf.Adapter({f"m{k}": exponential(4096, 16, 64 * i + k) for k in range(4)})
        for i in range(48)
    }
    size = 4 * sum(a.num_parameters for a in sources.values())
    times = [seconds(lambda: lf.fold(sources, form="svd", bits=4)) for _ in range(4)]
    return size / statistics.median(times[1:])


def main() -> None:
    args = arguments(QUESTION)
    demo = sorted((data_dir() / "adapters").iterdir())
    collections = {"packaged adapters, d = 128 … 384": [list(lf.load(p).values()) for p in demo]}
    for d in (128, 512, 1024, 4096):
        collections[f"exponential, d = {d}"] = [[exponential(d, 16, s) for s in range(4)]]
    rows, result = [], {"met": {}}
    for name, adapters in collections.items():
        margin = 0.05 if "512" in name or "1024" in name or "4096" in name else 0.10
        for bits in BITS:
            found = np.array([errors(updates, bits) for updates in adapters])
            measured, predicted, plain = (float(x) for x in found.mean(0))
            off = float(np.abs(found[:, 0] / found[:, 1] - 1).max())
            rows.append(
                {"what": f"{name}, {bits} bits", "error": measured, "predicted": predicted,
                 "largest deviation": f"{off:.1%}", "absmax": plain}
            )  # fmt: skip
            result[f"{name}, {bits} bits"] = {
                "error": measured, "predicted": predicted, "largest_deviation": off,
                "absmax": plain,
            }  # fmt: skip
            result["met"][f"{name}, {bits} bits"] = off <= margin and bool(
                (found[:, 0] < found[:, 2]).all()
            )
    result["bytes_per_second"] = rate()
    result["met"]["rate ≥ 30 MB/s"] = result["bytes_per_second"] >= RATE_AT_LEAST
    rows.append({"what": "fold of 100 MB, MB/s", "error": result["bytes_per_second"] / 1e6,
                 "predicted": "", "largest deviation": "", "absmax": ""})  # fmt: skip
    report(QUESTION, rows, result, args.save)


if __name__ == "__main__":
    main()
