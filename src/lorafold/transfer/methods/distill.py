"""`distill`: a few natural-gradient steps towards what the adapter changes in the predictions.

What a module should give is not asked of the source's module, whose inner coordinates the target
doesn't share, but of what both predict in the end (`judge.py`). With x what a module sees and g the
gradient of that divergence with respect to what it gives, summed over all tokens,

    S = Σ xᵀx,   C = Σ gᵀx,   F = Σ fᵀf (f: the gradient for a token drawn from what is predicted)

the step is the reduced-rank solution of the quadratic model with Kronecker-factored curvature,

    K = F^{-1/2} C S^{-1/2} = P Λ Qᵀ,     B = −η F^{-1/2} P Λ,     A = Qᵀ S^{-1/2}

cut to the source's rank in that metric after each of `rounds` steps; η is the best of a few by the
divergence itself. There are no labels: the texts' own next tokens are not looked at. It is a fit by
second-order steps all the same, and takes a backward pass a round: more than an alignment, and it
is done for every adapter anew.

Source: Martens & Grosse, Optimizing neural networks with Kronecker-factored approximate curvature
(2015), arXiv:1503.05671; Hinton et al., Distilling the knowledge in a neural network (2015),
arXiv:1503.02531.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ...errors import MismatchError
from ...lowrank import LowRank
from ..align.batches import Batch
from ..align.recording import Site, adapted, recording, tracing
from ..job import Job, Moved
from .judge import Goal, Judge, Modules, judge_of, remembered
from .running import both_bases, goals, texts_of

_SHARE = 0.25  # of the divergence, that the first step tried would take away were it linear
_NOTHING = 1e-6  # nats a token: what rounding alone makes of an adapter that does nothing
_TRIES = 12  # times that η is doubled or halved


def distill(job: Job) -> Moved:
    """The update that changes predictions as the source's does, as far as a few steps lead."""
    rounds, damping = _checked(job.options)
    with both_bases(job) as (source, target):
        batches = texts_of(job, source, target)
        fitted = [batch for batch in batches if not batch.held]
        held = [batch for batch in batches if batch.held]
        goes = goals(job, source, target)
        judge = judge_of(source, target, job.adapter.modules, fitted)
        modules, values = steps(
            judge,
            fitted,
            goes.ranks,
            rounds=rounds,
            damping=damping,
            progress=job.progress,
        )
        if not modules:
            raise MismatchError(
                f"no step lowers the divergence {values[0]:.3g} that the adapter makes on these "
                "texts: does it do anything on them?"
            )
        said = {
            "by": judge.by,
            "divergence": values,
            "texts": sum(len(batch.source.ids) for batch in batches),
        }
        if held:
            said["held"] = [judge.value({}, held), judge.value(modules, held)]
    return Moved(modules, goes.sources, without=goes.without, said=said)


def _checked(options: Mapping[str, Any]) -> tuple[int, float]:
    rounds, damping = options["rounds"], options["damping"]
    if isinstance(rounds, bool) or not isinstance(rounds, Integral) or rounds < 1:
        raise MismatchError(f"rounds must be a whole number of at least 1, found {rounds!r}")
    if isinstance(damping, bool) or not isinstance(damping, Real) or not 0 < float(damping) < 1e6:
        raise MismatchError(f"damping must be a number above 0, found {damping!r}")
    return int(rounds), float(damping)


@dataclass(frozen=True, eq=False)
class _Curve:
    """The sums of one module: S (in, in), C (out, in), F (out, out), float64."""

    S: Tensor
    C: Tensor
    F: Tensor

    def __add__(self, other: _Curve) -> _Curve:
        return _Curve(self.S + other.S, self.C + other.C, self.F + other.F)


@dataclass(frozen=True, eq=False)
class _Step:
    """A module's direction, B A, what a unit of it takes from the summed divergence to first order,
    and the square roots of its metric and their inverses.
    """

    A: Tensor
    B: Tensor
    gain: float
    roots: tuple[Tensor, Tensor]
    inverse: tuple[Tensor, Tensor]

    def taken(self, u: LowRank | None, eta: float, rank: int) -> LowRank:
        """u + η B A, cut to the rank in the metric of S and F."""
        A, B = self.A, eta * self.B
        if u is not None:
            A = torch.cat([u.A.to(A), A])
            B = torch.cat([u.scale * u.B.to(B), B], 1)
        Q_B, R_B = torch.linalg.qr(self.roots[1] @ B)
        Q_A, R_A = torch.linalg.qr((A @ self.roots[0]).T)
        U, values, V = torch.linalg.svd(R_B @ R_A.T)
        root = values[:rank].sqrt()
        B = self.inverse[1] @ (Q_B @ (U[:, :rank] * root))
        A = (root[:, None] * V[:rank]) @ Q_A.T @ self.inverse[0]
        return LowRank(A.float(), B.float())


def steps(
    judge: Judge,
    batches: Sequence[Batch],
    ranks: Mapping[str, int],
    *,
    rounds: int,
    damping: float,
    progress: Any = None,
) -> tuple[dict[str, LowRank], list[float]]:
    """The modules after the steps, and the divergence before each and after the last.

    Args:
        batches: to fit on. ranks: {path in the target: rank}.
    """
    now: dict[str, LowRank] = {}
    count = sum(batch.count for batch in batches)
    goal = remembered(judge, batches)
    values = [judge.value(now, batches, goal)]
    for k in range(rounds if values[0] > _NOTHING else 0):
        if progress is not None:
            progress(k, rounds, f"divergence {values[-1]:.3f}")
        found = _steps(judge, goal, batches, ranks, now, damping, k)
        gain = sum(step.gain for step in found.values())
        if not gain > 0:
            break
        eta = _SHARE * values[-1] * count / gain
        tried: dict[float, tuple[float, dict[str, LowRank]]] = {}
        for _ in range(_TRIES):
            for one in (eta, 2 * eta, eta / 2):
                if one not in tried:
                    modules = {p: s.taken(now.get(p), one, ranks[p]) for p, s in found.items()}
                    tried[one] = judge.value(modules, batches, goal), modules
            best = min(tried, key=lambda one: tried[one][0])
            if best == eta:
                break
            eta = best
        if not tried[eta][0] < values[-1]:
            break
        value, now = tried[eta]
        values.append(value)
    return now, values


def _steps(
    judge: Judge,
    goal: Goal,
    batches: Sequence[Batch],
    ranks: Mapping[str, int],
    now: Modules,
    damping: float,
    seed: int,
) -> dict[str, _Step]:
    """Each module's direction from where it is."""
    generator = torch.Generator(judge.target.device).manual_seed(seed)
    sums: dict[str, _Curve] = {}
    for batch in batches:
        for path, curve in _curves(judge, goal(batch), batch, list(ranks), now, generator).items():
            sums[path] = sums[path] + curve if path in sums else curve
    count = sum(batch.count for batch in batches)
    return {path: _step(curve, ranks[path], damping, count) for path, curve in sums.items()}


def _curves(
    judge: Judge,
    goal: Tensor,
    batch: Batch,
    paths: list[str],
    now: Modules,
    generator: torch.Generator,
) -> dict[str, _Curve]:
    """The sums of one batch."""
    model = judge.target.model
    sites: list[Site] = [(p, end) for p in paths for end in ("in", "out")]
    with (
        torch.enable_grad(),
        adapted(model, now),
        recording(model, sites, None) as seen,
        tracing(model),
    ):
        said = judge.said(batch)
        outs = [seen[p, "out"] for p in paths]
        slopes = torch.autograd.grad(judge.distance(goal, said), outs, retain_graph=True)
        drawn = torch.autograd.grad(judge.drawn(said, generator), outs)
    rows = batch.target.mask.flatten().bool()
    squares: dict[int, Tensor] = {}  # queries, keys and values see one tensor
    found = {}
    for path, *both in zip(paths, slopes, drawn, strict=True):
        x = seen[path, "in"]
        inner, g, f = (_rows(v, rows) for v in (x, *both))
        if id(x) not in squares:
            squares[id(x)] = (inner.T @ inner).double()
        found[path] = _Curve(squares[id(x)], (g.T @ inner).double(), (f.T @ f).double())
    return found


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    """The tokens that are there; products of one batch in float32, which are added in float64."""
    return x.detach().reshape(-1, x.shape[-1])[rows.to(x.device)].float()


def _step(curve: _Curve, rank: int, damping: float, count: int) -> _Step:
    root_S, inverse_S = _roots(curve.S, damping)
    root_F, inverse_F = _roots(curve.F / count, damping)
    U, values, V = torch.linalg.svd(inverse_F @ curve.C @ inverse_S, full_matrices=False)
    B = -inverse_F @ (U[:, :rank] * values[:rank])
    gain = float(values[:rank].square().sum())
    return _Step(V[:rank] @ inverse_S, B, gain, (root_S, root_F), (inverse_S, inverse_F))


def _roots(C: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(C + δI)^{1/2} and its inverse, δ = damping · tr(C) / d."""
    values, V = torch.linalg.eigh(C)
    mean = values.clamp_min(0).mean()
    values = values.clamp_min(0) + damping * torch.where(mean > 0, mean, torch.ones_like(mean))
    root = values.sqrt()
    return (V * root) @ V.T, (V / root) @ V.T
