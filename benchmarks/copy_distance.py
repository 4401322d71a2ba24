"""How far may two bases be apart for an adapter of one to work on the other as it is?

The demo's base is moved away from itself: by noise on every matrix, and along what other adapters
were trained to. What an adapter takes off the loss on such a base is set beside what it takes off
on its own. `copy` says what to expect from the distance ‖W_t − W_s‖ / ‖W_s‖ over all weights by
this table. The last row, another base of the same shapes, is its own with the hidden units of every
MLP in another order, which computes the same function.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

import torch
from _common import arguments, report
from torch import Tensor

import lorafold as lf
from lorafold.demo.model import data_dir, heldout_loss, load_base
from lorafold.demo.run import halves

QUESTION = "the share of an adapter's lift that is left on a base at a distance"
NOISE = (0.1, 0.2, 0.3, 0.5, 0.7)
TIMES = (1, 2, 4)
EVERY = 4  # one task in so many

State = dict[str, Tensor]


def noisy(state: State, share: float) -> State:
    g = torch.Generator().manual_seed(0)
    return {
        k: W + share * W.norm() / math.sqrt(W.numel()) * torch.randn(W.shape, generator=g)
        if W.ndim == 2
        else W
        for k, W in state.items()
    }


def reordered(state: State) -> State:
    """The hidden units of every MLP in another order."""
    g, new = torch.Generator().manual_seed(0), dict(state)
    for key in state:
        if key.endswith("mlp.down_proj.weight"):
            order = torch.randperm(state[key].shape[1], generator=g)
            new[key] = state[key][:, order]
            for name in ("gate", "up"):
                other = key.replace("down", name)
                new[other] = state[other][order]
    return new


def moved(state: State, others: list[lf.Adapter]) -> Iterator[tuple[str, State]]:
    """Names, and the base moved away from itself."""
    for share in NOISE:
        yield f"noise, {share:g} of every matrix", noisy(state, share)
    for times in TIMES:
        yield f"{times} × what another adapter adds", (times * others[0]).apply_to(state)
    yield "all other adapters' updates", sum(others[1:], others[0]).apply_to(state)
    yield "MLPs' hidden units reordered", reordered(state)


def distance(a: State, b: State) -> float:
    apart = math.fsum(float((b[k].double() - a[k].double()).square().sum()) for k in a)
    return math.sqrt(apart / math.fsum(float(W.double().square().sum()) for W in a.values()))


def main() -> None:
    args = arguments(QUESTION)
    config, state = load_base()
    names = sorted(path.name for path in (data_dir() / "adapters").iterdir())
    adapters = {name: lf.load(data_dir() / "adapters" / name) for name in names}
    tasks = names[::EVERY]
    texts = {n: halves((data_dir() / "heldout" / f"{n}.txt").read_bytes())[1] for n in tasks}

    def lift(name: str, base: State) -> float:
        before = heldout_loss(config, base, texts[name])
        return before - heldout_loss(config, adapters[name].apply_to(base), texts[name])

    own = {name: lift(name, state) for name in tasks}
    rows = []
    for what, base in moved(state, [adapters[n] for n in names if n not in tasks]):
        kept = [lift(name, base) / own[name] for name in tasks]
        rows.append(
            {
                "the base is moved by": what,
                "distance": distance(state, base),
                "mean of the lift": statistics.mean(kept),
                "least": min(kept),
            }
        )
    report(QUESTION, rows, {"tasks": tasks, "rows": rows}, args.save)


if __name__ == "__main__":
    main()
