"""`auto`: every method that its inputs allow, judged on texts that none of them has seen.

The score is the share of the divergence between the source with its adapter and the bare target
(`judge.py`) that the update takes away on the held-out texts: 1 where the target says what the
source says, 0 for no update, below it where the update does harm. It stands for the share of the
adapter's lift that will be kept. Below `LEAST` the advice is "don't".

Of an alignment alone, without bases or texts, only the effects of single modules can be judged, on
the sums that were held out of it: how much of the source's the moved one explains. That says
whether a module was understood, and not what becomes of the whole: there is no advice to use it.
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
from .distill import DEFAULTS, distill
from .judge import judge_of, remembered
from .pair import alignment_of
from .running import both_bases, goals, texts_of
from .vocabulary import vocabulary

LEAST = 0.2
_PLAIN = {"centre": False, "whiten": 0.0, "scale": True, "threshold": None}
_OF_SUMS = ("procrustes", "functional", "functional after procrustes")
_WAYS: dict[str, tuple[Callable[[Job], Moved], Mapping[str, Any]]] = {
    "procrustes": (procrustes, _PLAIN),
    "functional": (functional, {**_PLAIN, "after": None}),
    "functional after procrustes": (functional, {**_PLAIN, "after": "procrustes"}),
    "vocabulary": (vocabulary, {"scale": True}),
    "distill": (distill, DEFAULTS),
}


def auto(job: Job) -> Moved:
    """What predicts the source's effect best on held-out texts, of all that can be tried."""
    if job.alignment is not None and None in (job.source, job.target, job.texts):
        return _by_sums(job)
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
        goal = remembered(judge)
        bare = judge.value({}, held, goal)
        own = {"tokenizers": (source.tokenizer, target.tokenizer), "roles": job.options["roles"]}
        shared = replace(job, source=source.model, target=target.model, options=own)
        shared = replace(shared, alignment=alignment_of(shared))
        scores: dict[str, float] = {}
        found: dict[str, Moved] = {}
        skipped: dict[str, str] = {}
        for name, (run, options) in _WAYS.items():
            try:
                found[name] = run(replace(shared, options={**options, **own}))
            except LorafoldError as e:
                skipped[name] = str(e)
                continue
            left = judge.value(found[name].modules, held, goal)
            scores[name] = 1 - left / bare if bare > 0 else 0.0
    return _best(scores, found, skipped, whole=True)


def _by_sums(job: Job) -> Moved:
    """The best of the methods that an alignment is enough for, by its held-out sums."""
    scores: dict[str, float] = {}
    found: dict[str, Moved] = {}
    for name in _OF_SUMS:
        run, options = _WAYS[name]
        found[name] = run(replace(job, options={**options, **job.options}))
        fits = found[name].said["effect"]
        if fits is None:
            raise MismatchError(
                f"auto judges on every {HELD}th text, and the alignment holds none back: make it "
                f"of {HELD} texts or more, or name a method"
            )
        scores[name] = fits
    return _best(scores, found, {}, whole=False)


def _best(
    scores: Mapping[str, float],
    found: Mapping[str, Moved],
    skipped: Mapping[str, str],
    whole: bool,
) -> Moved:
    """The one with the highest score, and what is to be said of all.

    Args:
        whole: whether the scores are of the whole model's predictions.
    """
    ranked = sorted(scores, key=lambda name: scores[name], reverse=True)
    if not ranked:
        raise MismatchError(f"no method can be tried: {next(iter(skipped.values()))}")
    best = ranked[0]
    if scores[best] < LEAST:
        advice = "don't"
        warn(
            f"don't use this adapter: the best method, {best!r}, reaches {scores[best]:.0%} of the "
            f"source's effect on held-out texts, and {LEAST:.0%} is the least that is of use"
        )
    else:
        advice = "use" if whole else "measure: give both bases and texts to have it judged"
    said = {
        "chosen": best,
        "scores": dict(scores),
        "margin": scores[best] - scores[ranked[1]] if len(ranked) > 1 else None,
        "advice": advice,
        "skipped": dict(skipped),
    }
    return replace(found[best], said={**found[best].said, **said})
