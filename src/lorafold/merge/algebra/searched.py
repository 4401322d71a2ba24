"""Methods that look at more than the adapters: a score to be raised, or the layers' inputs.

LoraHub: Huang et al. 2024 (arXiv:2307.13269). RegMean: Jin et al. 2023 (arXiv:2212.09849).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import MismatchError
from ...lowrank import LowRank
from .core import Members, side_by_side, spans_of

_FIRST_STEP, _SMALLEST = 0.3, 1e-3


def searched_weights(
    score: Callable[[list[float]], float],
    count: int,
    *,
    budget: int,
    bound: float,
    penalty: float,
    seed: int,
) -> list[float]:
    """LoraHub's weights: those of the largest score − penalty · mean |w|, without gradients.

    A (1+1) evolution strategy: one step at a time from equal weights, longer after a success,
    shorter after a failure, so that about one in five succeeds (Rechenberg 1973). The paper runs
    Nevergrad's optimiser on the same objective.

    Args:
        score: of weights; higher is better.
        count: how many weights. budget: how often the score is asked for.
        bound: the weights stay within ± bound.

    Raises:
        MismatchError: a score that is no number.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)

    def value(w: Tensor) -> float:
        found = score(w.tolist())
        try:  # a tensor or an array of one number is one as well
            number = math.nan if isinstance(found, str) else float(found)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            number = math.nan
        if math.isnan(number):
            raise MismatchError(f"score must return a number, it returned {found!r}")
        return number - penalty * float(w.abs().mean())

    best = torch.full((count,), 1 / count, dtype=torch.float64)
    top, step = value(best), _FIRST_STEP
    for _ in range(budget - 1):
        moved = best + step * torch.randn(count, generator=generator, dtype=torch.float64)
        moved = moved.clamp(-bound, bound)
        found = value(moved)
        if found > top:
            best, top, step = moved, found, step * 1.5
        else:
            step = max(_SMALLEST, step * 1.5**-0.25)
    return best.tolist()


def regmean(
    members: Members, grams: Mapping[str, Mapping[str, Tensor]], off_diagonal: float
) -> LowRank:
    """The update whose outputs are nearest to every adapter's own, on that adapter's own inputs.

    ΔW = (Σ w ΔW_i G_i) (Σ w G_i)⁻¹ with G = Σ x xᵀ over the layer's inputs, off the diagonal
    times `off_diagonal`; the factors of A G stand for ΔW G, so that the rank is Σr at most.

    Args:
        grams: {name: {module: (in, in)}}.

    Raises:
        MismatchError: one is missing, or of another shape, or they don't span the inputs.
    """
    inner = members.shape[1]
    _, A = side_by_side(members.there)
    A, spans = A.double(), spans_of(members.updates)
    total = torch.zeros(inner, inner, dtype=torch.float64, device=A.device)
    mixed = torch.zeros_like(A)
    parts: list[Tensor] = []
    for i, (name, w) in enumerate(zip(members.names, members.weights, strict=True)):
        G = _gram(grams, name, members.path, inner).to(total)
        G = off_diagonal * G + (1 - off_diagonal) * torch.diag(G.diagonal())
        total += w * G
        span, u = spans[i], members.updates[i]
        if u is not None and span is not None:
            mixed[span] = w * (A[span] @ G)
            parts.append(u.B.double() * u.scale)
    solved, info = torch.linalg.solve_ex(total, mixed.T)
    if int(info) or not bool(torch.isfinite(solved).all()):
        raise MismatchError(
            f"module {members.path!r}: the Gram matrices are singular; give more inputs than "
            f"{inner}, or off_diagonal below 1"
        )
    return LowRank(solved.T.float().contiguous(), torch.cat(parts, 1).float())


def _gram(grams: Mapping[str, Mapping[str, Any]], name: str, path: str, inner: int) -> Tensor:
    found = grams[name].get(path)
    if not isinstance(found, Tensor):
        has = "none" if found is None else f"a {type(found).__name__}, which is no tensor,"
        raise MismatchError(
            f"grams has {has} for module {path!r} of {name!r}: give {{name: {{module: Σ x xᵀ}}}}"
        )
    if tuple(found.shape) != (inner, inner):
        raise MismatchError(
            f"grams[{name!r}][{path!r}] must be ({inner}, {inner}), found {tuple(found.shape)}"
        )
    if not bool(torch.isfinite(found).all()):
        raise MismatchError(f"grams[{name!r}][{path!r}] holds numbers that are not finite")
    return found


def check_grams(grams: Any, names: Sequence[str]) -> None:
    """Refuse what is no mapping of the sources' names.

    Raises:
        MismatchError: naming what is missing.
    """
    given = grams if isinstance(grams, Mapping) else {}
    missing = [n for n in names if not isinstance(given.get(n), Mapping)]
    if missing:
        raise MismatchError(f"grams lack {', '.join(map(repr, missing))}: give one for each source")
