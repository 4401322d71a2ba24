"""`auto`: every method that its inputs allow, judged on texts that none of them has seen.

The score is the share of the divergence between the source with its adapter and the bare target
(`judge.py`) that the update takes away on the held-out texts: 1 where the target says what the
source says, 0 for no update, below it where the update does harm. It stands for the share of the
adapter's lift that will be kept. Below `LEAST` the advice is "don't".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ...errors import LorafoldError, MismatchError
from ...words import warn
from ..align.batches import HELD
from ..job import Job, Moved
from .aligned import functional, procrustes
from .distill import distill
from .judge import judge_of
from .pair import alignment_of
from .running import both_bases, goals, texts_of
from .vocabulary import vocabulary

LEAST = 0.2
_PLAIN = {"centre": False, "whiten": 0.0, "scale": True}
_WAYS: dict[str, tuple[Callable[[Job], Moved], Mapping[str, Any]]] = {
    "procrustes": (procrustes, _PLAIN),
    "functional": (functional, {**_PLAIN, "after": None}),
    "functional after procrustes": (functional, {**_PLAIN, "after": "procrustes"}),
    "vocabulary": (vocabulary, {"scale": True}),
    "distill": (distill, {"rounds": 6, "damping": 0.1}),
}


def auto(job: Job) -> Moved:
    """What predicts the source's effect best on held-out texts, of all that can be tried."""
    with both_bases(job) as (source, target):
        batches = texts_of(job, source, target)
        held = [batch for batch in batches if batch.held]
        if not held:
            raise MismatchError(
                f"auto judges on every {HELD}th text: give {HELD} texts or more, or name a method"
            )
        goals(job, source, target)  # refuses an adapter of another base before anything is made
        judge = judge_of(
            source, target, job.adapter.modules, [batch for batch in batches if not batch.held]
        )
        bare = judge.value({}, held)
        shared = replace(job, source=source.model, target=target.model, options=_of(job))
        shared = replace(shared, alignment=alignment_of(shared))
        scores: dict[str, float] = {}
        found: dict[str, Moved] = {}
        skipped: dict[str, str] = {}
        for name, (run, options) in _WAYS.items():
            try:
                found[name] = run(replace(shared, options={**options, **_of(job)}))
            except LorafoldError as e:
                skipped[name] = str(e)
                continue
            left = judge.value(found[name].modules, held)
            scores[name] = 1 - left / bare if bare > 0 else 0.0
    ranked = sorted(scores, key=scores.__getitem__, reverse=True)
    if not ranked:
        raise MismatchError(f"no method can be tried: {next(iter(skipped.values()))}")
    best = ranked[0]
    margin = scores[best] - scores[ranked[1]] if len(ranked) > 1 else None
    worth = scores[best] >= LEAST
    if not worth:
        warn(
            f"don't use this adapter: the best method, {best!r}, takes away {scores[best]:.0%} of "
            f"what the target lacks on held-out texts, and {LEAST:.0%} is the least that is of use"
        )
    said = {
        "chosen": best,
        "scores": scores,
        "margin": margin,
        "advice": "use" if worth else "don't",
        "skipped": skipped,
    }
    return replace(found[best], said={**found[best].said, **said})


def _of(job: Job) -> dict[str, Any]:
    return {name: job.options[name] for name in ("tokenizers", "roles")}
