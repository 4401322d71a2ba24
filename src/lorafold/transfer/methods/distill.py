"""`distill`: a short training of the target's factors for what the adapter changes in predictions.

What a module should give is not asked of the source's module, whose inner coordinates the target
doesn't share, but of what both predict in the end: the loss is the divergence of `judge.py`, whose
goal is made of the two bases and the adapter alone. There are no labels: the texts' own next tokens
are not looked at. It is a training all the same, done for every adapter anew.

With d the width that a module reads, its update is ΔW = B A / √d, A drawn from [−1, 1] and B zero,
and Adam takes `steps` steps on both at one `rate`, which rises for the first tenth and falls to 0.
In these units a step changes what B and A give by as much whatever d is, as the rates of LoRA+ do.

Source: Hinton et al., Distilling the knowledge in a neural network (2015), arXiv:1503.02531; Hayou
et al., LoRA+: Efficient low rank adaptation of large models (2024), arXiv:2402.12354.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

import torch

from ...errors import MismatchError
from ...lowrank import LowRank
from ..align.bases import shape_of
from ..align.batches import Batch
from ..align.recording import adapted
from ..job import Job, Moved, Progress
from .judge import Goal, Judge, judge_of, remembered
from .running import both_bases, goals, texts_of

DEFAULTS: Mapping[str, Any] = {"steps": 80, "rate": 0.05}
_NOTHING = 1e-6  # nats a token: what rounding alone makes of an adapter that does nothing
_AT_ONCE = 512  # tokens of a step: more steps are worth more than larger ones


def distill(job: Job) -> Moved:
    """The update that changes predictions as the source's does, as far as a short fit leads."""
    steps, rate = _checked(job.options)
    with both_bases(job) as (source, target):
        batches = texts_of(job, source, target, _AT_ONCE)
        fitted = [batch for batch in batches if not batch.held]
        held = [batch for batch in batches if batch.held]
        goes = goals(job, source, target)
        judge = judge_of(source, target, job.adapter.modules, fitted)
        goal, judged = remembered(judge), held or fitted
        before = judge.value({}, judged, goal)
        if before <= _NOTHING:
            raise MismatchError(
                f"the adapter changes what the source predicts on these texts by {before:.3g} a "
                "token: does it do anything on them?"
            )
        modules = _fitted(judge, goal, fitted, goes.ranks, steps, rate, job.progress)
        with _blaming(rate, steps):
            after = judge.value(modules, judged, goal)
        if not after < before:
            raise MismatchError(
                f"{steps} steps lead from a divergence of {before:.3g} to {after:.3g}, which is no "
                f"less: give a lower rate= than {rate:g}, or other texts"
            )
        said = {
            "by": judge.by,
            "divergence": [before, after],
            "texts": sum(len(batch.source.ids) for batch in batches),
            "held": sum(len(batch.source.ids) for batch in held),
        }
    return Moved(modules, goes.sources, without=goes.without, said=said)


def _checked(options: Mapping[str, Any]) -> tuple[int, float]:
    steps, rate = options["steps"], options["rate"]
    if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1:
        raise MismatchError(f"steps must be a whole number of at least 1, found {steps!r}")
    if isinstance(rate, bool) or not isinstance(rate, Real) or not 0 < float(rate) <= 1:
        raise MismatchError(f"rate must be a number above 0 and at most 1, found {rate!r}")
    return int(steps), float(rate)


def _fitted(
    judge: Judge,
    goal: Goal,
    batches: Sequence[Batch],
    ranks: Mapping[str, int],
    steps: int,
    rate: float,
    progress: Progress | None,
) -> dict[str, LowRank]:
    """The updates after the steps.

    Args:
        ranks: {path in the target: rank}.

    Raises:
        MismatchError: predictions are no numbers any more.
    """
    updates = _start(judge, ranks)
    leaves = [factor for u in updates.values() for factor in (u.A, u.B)]
    optimizer = torch.optim.Adam(leaves, lr=rate, betas=(0.9, 0.95))
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min((k + 1) / warmup, (steps - k) / (steps + 1 - warmup))
    )
    for k, batch in enumerate(itertools.islice(_shuffled(batches), steps)):
        wanted = goal(batch)
        with torch.enable_grad(), adapted(judge.target.model, updates), _blaming(rate, k):
            loss = judge.distance(wanted, judge.said(batch)) / batch.count
            slopes = torch.autograd.grad(loss, leaves, allow_unused=True)
        for factor, slope in zip(leaves, slopes, strict=True):
            factor.grad = slope
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(k + 1, steps, f"divergence {float(loss):.3f}")
    return {p: LowRank(u.A.detach() * u.scale, u.B.detach()) for p, u in updates.items()}


@contextmanager
def _blaming(rate: float, steps: int) -> Iterator[None]:
    """Predictions that are no numbers are the fit's where those of the bases, made before, are."""
    try:
        yield
    except MismatchError as e:
        raise MismatchError(
            f"after {steps} steps predictions are NaN or infinite: give a lower rate= than {rate:g}"
        ) from e


def _start(judge: Judge, ranks: Mapping[str, int]) -> dict[str, LowRank]:
    """Updates of zero, whose factors take gradients."""
    model, device = judge.target.model, judge.target.device
    generator = torch.Generator().manual_seed(0)
    found = {}
    for path, rank in ranks.items():
        out, inner = shape_of(model, path)
        A = 2 * torch.rand(rank, inner, generator=generator, dtype=torch.float32) - 1
        B = torch.zeros(out, rank, dtype=torch.float32, device=device)
        factors = A.to(device).requires_grad_(), B.requires_grad_()
        found[path] = LowRank(*factors, scale=inner**-0.5)
    return found


def _shuffled(batches: Sequence[Batch]) -> Iterator[Batch]:
    """All of them in one order after another, without end."""
    generator = torch.Generator().manual_seed(0)
    while True:
        for k in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[k]
