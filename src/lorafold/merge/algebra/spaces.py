"""Where the rules that act entry by entry find their entries: three spaces, three rules.

`core`: the cores in the joint space, lossless and small. `delta`: the entries of ΔW itself, dense,
one adapter at a time; the result has full rank and is cut. `factors`: A and B apart, each with the
root of scale and weight, as PEFT does it: an approximation, with cross terms between adapters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import MismatchError
from ...lowrank import LowRank, from_svd
from .core import Cut, Members
from .rules import Rule, combined

_EXACT = 1024  # up to this size the whole SVD is taken
_MORE, _PASSES = 16, 6  # directions and passes beyond what a randomised one needs


def in_core(rule: Rule, members: Members) -> LowRank:
    """The rule on the cores."""
    joint = members.joint
    M = combined(rule, joint.cores, members.weights, members.densities, members.uniforms)
    return joint.lifted(joint.zero if M is None else M)


def in_halves(rule: Rule, members: Members) -> LowRank:
    """The rule on Uᵀ ΔW_i (p, in): the joint row space, the columns as they are."""
    joint = members.joint
    entries = [
        None if u is None or L is None else L @ u.A.to(L)
        for u, L in zip(members.updates, joint.lefts, strict=True)
    ]
    M = combined(rule, entries, members.weights, members.densities, members.uniforms)
    if M is None:
        M = joint.U.new_zeros(joint.U.shape[1], members.shape[1])
    # √ of the size on either side: in half precision neither may overflow.
    size = float(torch.linalg.matrix_norm(M)) or 1.0
    even = math.sqrt(size / math.sqrt(M.shape[0]))
    return LowRank((M / even).float(), (joint.U * even).float())


def in_factors(rule: Rule, members: Members) -> LowRank:
    """The rule on A and B apart.

    Raises:
        MismatchError: ranks differ.
    """
    if len(set(members.ranks)) > 1:
        raise MismatchError(
            f"module {members.path!r} has ranks {sorted(set(members.ranks))}: space='factors' "
            "needs equal ones; use space='core'"
        )
    A, B = (_side(rule, members, side) for side in ("A", "B"))
    return LowRank(A, B)


def _side(rule: Rule, members: Members, side: str) -> Tensor:
    """The rule on all A's, or all B's, each times the root of its scale; signs go with A."""
    entries: list[Tensor | None] = []
    weights = []
    for u, w in zip(members.updates, members.weights, strict=True):
        sign = 1.0
        if u is None:
            entries.append(None)
        else:
            entries.append((u.A if side == "A" else u.B).float() * abs(u.scale) ** 0.5)
            sign = math.copysign(1.0, w * u.scale) if side == "A" else 1.0
        weights.append(sign * math.sqrt(abs(w)))

    def draw(i: int, shape: Sequence[int]) -> Tensor:
        return members.uniforms(i, shape, side)

    found = combined(rule, entries, weights, members.densities, draw)
    return torch.zeros_like(next(x for x in entries if x is not None)) if found is None else found


def in_delta(rule: Rule, members: Members, rank: int | None) -> Cut:
    """The rule on the entries of ΔW, cut to a rank: Σr where it is None."""
    pairs = zip(members.updates, members.weights, strict=True)
    entries = (None if u is None or w == 0 else u.dense() for u, w in pairs)  # one at a time
    M = combined(rule, entries, members.weights, members.densities, members.uniforms)
    if M is None:
        M = torch.zeros(members.shape, dtype=torch.float32)
    most = min(members.shape)
    return cut(M, min(most, rank or sum(members.ranks)))


def cut(M: Tensor, rank: int) -> Cut:
    """The best (or, of a large M, nearly the best) matrix of that rank."""
    if min(M.shape) <= _EXACT or rank > min(M.shape) // 4:
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    else:
        U, S, Vh = _randomised_svd(M, rank + _MORE)
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    size = float(M.double().square().sum())
    lost = float((M - U * S @ Vh).double().square().sum())
    return Cut(from_svd(U, S, Vh), lost, size)


def _randomised_svd(M: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading part of an SVD by subspace iteration (Halko, Martinsson & Tropp 2011)."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(M.shape[1], rank, generator=generator, dtype=torch.float32).to(M)
    for _ in range(_PASSES):
        X = torch.linalg.qr(M.T @ torch.linalg.qr(M @ X)[0])[0]
    U, S, Wh = torch.linalg.svd(M @ X, full_matrices=False)
    return U, S, Wh @ X.T
