"""Is the SVD of an update from its factors fast enough to be done everywhere?

The claim: at d=4096, r=16, `LowRank.svd()` takes no more than 1/30 of `torch.linalg.svd` of the
dense product at d=1024, a matrix 16 times smaller. Both are compared where both can run, d=1024.
"""

from __future__ import annotations

import torch
from _common import arguments, interleaved, report

from lorafold import LowRank

QUESTION = "svd() at d=4096, r=16 against torch.linalg.svd of the dense product at d=1024"
RANK, LARGE, SMALL = 16, 4096, 1024
AT_LEAST = 30


def update(d: int, seed: int) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(RANK, d, generator=g) / d**0.5
    return LowRank(A, torch.randn(d, RANK, generator=g), scale=2.0)


def disagreement(u: LowRank) -> float:
    """How far the two decompositions are apart, relative to ‖ΔW‖: values and rebuilt matrix."""
    U, S, Vh = u.svd()
    D = u.dense()
    values = torch.linalg.svdvals(D)[:RANK]
    apart = [torch.linalg.norm(S - values), torch.linalg.norm(U * S @ Vh - D)]
    return float(max(apart) / torch.linalg.norm(D))


def main() -> None:
    args = arguments(QUESTION)
    large, small = update(LARGE, 0), update(SMALL, 1)
    apart = disagreement(small)
    assert apart < 1e-5, f"the decompositions disagree by {apart}"
    D = small.dense()
    medians = interleaved(
        {
            f"LowRank.svd, d={LARGE}": large.svd,
            f"LowRank.svd, d={SMALL}": small.svd,
            f"torch.linalg.svd, d={SMALL}": lambda: torch.linalg.svd(D, full_matrices=False),
        },
        repeats=9,
    )
    ours, same_size, theirs = medians.values()
    rows = [
        {"what": name, "median ms": 1e3 * t, "times faster than dense": theirs / t}
        for name, t in medians.items()
    ]
    result = {
        "seconds_factored_4096": ours,
        "seconds_factored_1024": same_size,
        "seconds_dense_1024": theirs,
        "times_faster": theirs / ours,
        "at_least": AT_LEAST,
        "met": theirs / ours >= AT_LEAST,
        "relative_disagreement": apart,
    }
    report(QUESTION, rows, result, args.save)


if __name__ == "__main__":
    main()
