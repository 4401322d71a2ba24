"""`transfer`: an adapter of one base made into one of another base.

What is checked and what is done for every method alike lies here: shapes or bases, the rank of the
result, its config, where it comes from, the report. How a module gets across is a method's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, Literal, TypeAlias

from .. import __version__
from ..adapter import ORIGIN, Adapter
from ..collection.sources import named_handles
from ..errors import MismatchError, RefusedError, UnknownNameError
from ..lowrank import LowRank
from ..prefixes import regauged
from ..thin import threads
from ..words import did_you_mean, warn
from .bases import name_of_base
from .job import Job, Method, Moved, Progress, Transfer
from .methods import aligned, plain
from .methods.auto import auto
from .methods.copy import copy
from .methods.distill import DEFAULTS, distill
from .methods.vocabulary import vocabulary
from .report import report_of
from .shapes import places_given, places_in, shape_of

KEY = "lorafold_transfer"
_ONE = "update"  # what a LowRank is called within an adapter of its own


@dataclass(frozen=True)
class Way:
    """A method of the table.

    Args:
        run: from a `Job` to what it `Moved`.
        takes: its own options and their defaults.
        bases: it needs both bases, or an alignment of them; else shapes are enough.
    """

    run: Method
    takes: Mapping[str, Any] = field(default_factory=dict)
    bases: bool = True


# fmt: off
Name: TypeAlias = Literal[
    "truncate", "interpolate", "svd", "copy", "procrustes", "functional", "vocabulary", "auto",
    "distill",
]
# fmt: on
_IN_ONE_GAUGE = ("copy", "truncate", "interpolate")  # rank k of the result is rank k of the source
_RUN: dict[str, Any] = {"tokenizers": None, "roles": ()}
_MAPS: dict[str, Any] = {"centre": False, "whiten": 0.0, "scale": True, "threshold": None}

METHODS: dict[str, Way] = {
    "truncate": Way(plain.truncate, {"rescale": False}, bases=False),
    "interpolate": Way(plain.interpolate, {"rescale": False}, bases=False),
    "svd": Way(plain.svd, {"rescale": False}, bases=False),
    "copy": Way(copy, {"unchecked": False}, bases=False),
    "procrustes": Way(aligned.procrustes, {**_RUN, **_MAPS}),
    "functional": Way(aligned.functional, {**_RUN, **_MAPS, "after": None}),
    "vocabulary": Way(vocabulary, {**_RUN, "scale": True}),
    "auto": Way(auto, _RUN),
    "distill": Way(distill, {**_RUN, **DEFAULTS}),
}


def transfer(
    adapter: Any,
    source: Any = None,
    target: Any = None,
    *,
    method: Name | None = None,
    shape: Any = None,
    texts: Sequence[str] | None = None,
    alignment: Any = None,
    rank: int | None = None,
    energy: float | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Transfer:
    """Move an adapter to another base model, or an update to another shape.

    Args:
        adapter: an `Adapter` or a path; or one `LowRank`, with `shape=`.
        source, target: the base that it was trained on and the one that it is for: folders, models
            or state dicts. `target` alone is enough for the plain resizings, which need its shapes.
        method: "truncate", "interpolate", "svd" (the plain resizings) or "copy"; between two bases
            "procrustes", "functional", "vocabulary", "distill", or "auto", which tries these. By
            default "svd" where only shapes are known, else "procrustes".
        shape: instead of bases, (out, in) for a `LowRank`, {module path or pattern: (out, in)} for
            an adapter, patterns as in PEFT's `rank_pattern`; modules that none names keep theirs.
        texts, alignment: what the methods between two bases learn from.
        rank: of the result at most; one above min(out, in) is kept only where it is asked for here.
            energy: instead, the share of each result's ‖ΔW‖² to keep.
        progress: called with done, total, what.
        options: the method's own. Plain resizings: `rescale=True` multiplies by √(d_s/d_t), with
            d = √(out · in). "copy": `unchecked=True` doesn't compare the two bases' weights.
            Between bases: `tokenizers=`, `roles=` as in `lf.align`; "procrustes", "functional":
            `centre=True`, `whiten=` 0 … 1, `scale=False` (no least-squares factor), `threshold=`
            (modules of less R² are dropped), "functional" alone `after="procrustes"`; "distill":
            `steps=`, `rate=`.

    Returns:
        A `Transfer`: `.adapter`, of the kind that was given, and `.report`.

    Raises:
        MismatchError: arguments that don't belong together or don't fit the adapter.
        UnknownNameError: no such method or option.
        RefusedError: ΔW algebra would be wrong for the adapter.

    Not for: another rank on the same base (`Adapter.resize`).

    Examples:
        >>> import torch, lorafold as lf
        >>> u = lf.LowRank(torch.randn(2, 8), torch.randn(4, 2))
        >>> moved = lf.transfer(u, shape=(6, 12))
        >>> moved.adapter.shape, round(moved.report.norm_ratio, 4)
        ((6, 12), 1.0)
    """
    _check_cut(rank, energy)
    one = isinstance(adapter, LowRank)
    if one:
        if shape is None:
            raise MismatchError("a LowRank has no module path: give shape=(out, in), not bases")
        given, shape = Adapter({_ONE: adapter}), {_ONE: shape_of(shape)}
    else:
        given = _loaded(adapter)
    if shape is not None and not (source is target is texts is alignment is None):
        raise MismatchError("give shape=, or bases; not both")
    if method is None:
        known = shape is not None or (source is None and alignment is None)
        method = "svd" if known else "procrustes"
    way, own = way_of(method, options)
    job = Job(given, source, target, {}, texts, alignment, rank, energy, own, progress)
    job, without = _placed(job, way, method, shape)
    with threads(None if way.bases else 1):  # thin algebra waits more on threads than it works
        moved = way.run(job)
        moved = replace(moved, modules={p: _cut(u, job) for p, u in moved.modules.items()})
    moved = replace(moved, without={**without, **moved.without})
    return _transfer(job, moved, method, one)


def _loaded(adapter: Any) -> Adapter:
    handle = named_handles({"adapter": adapter})["adapter"]
    if handle.refusal is not None:
        name = getattr(handle, "path", None) or "the adapter"
        raise RefusedError(f"{name} can't be transferred: {handle.refusal}")
    found: Adapter = adapter if isinstance(adapter, Adapter) else handle.load()
    if not found.modules:
        raise MismatchError("there are no updates in the adapter: nothing to transfer")
    return found


def _check_cut(rank: Any, energy: Any) -> None:
    if rank is not None and energy is not None:
        raise MismatchError("give rank or energy, not both")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, Integral) or rank < 1):
        raise MismatchError(f"rank must be a whole number of at least 1, found {rank!r}")
    if energy is not None and not (isinstance(energy, int | float) and 0 < energy <= 1):
        raise MismatchError(f"energy must lie in (0, 1], found {energy!r}")


def way_of(method: str, options: Mapping[str, Any]) -> tuple[Way, dict[str, Any]]:
    """The method of that name, and its options, each of them there.

    Raises:
        UnknownNameError: no such method or option.
    """
    if method not in METHODS:
        raise UnknownNameError(f"no method {method!r}; {did_you_mean(str(method), METHODS)}")
    way = METHODS[method]
    for name in options:
        if name not in way.takes:
            hint = did_you_mean(name, way.takes) if way.takes else "it has none"
            raise UnknownNameError(f"method {method!r} has no option {name!r}; {hint}")
    return way, {**way.takes, **options}


def _placed(job: Job, way: Way, method: str, shape: Any) -> tuple[Job, dict[str, str]]:
    """The job with each module's place, where shapes are enough; and what has none."""
    if way.bases:
        if shape is not None:
            raise MismatchError(
                f"method {method!r} needs the two bases, and shape= says nothing of them"
            )
        if job.alignment is None and (job.source is None or job.target is None):
            raise MismatchError(f"method {method!r} needs both bases, or an alignment of them")
        return job, {}
    if shape is not None:
        return replace(job, places=places_given(job.adapter, shape)), {}
    if job.target is None:
        raise MismatchError(f"method {method!r} needs shape= or a target")
    places, without = places_in(job.adapter, job.target)
    return replace(job, places=places), without


def _cut(u: LowRank, job: Job) -> LowRank:
    """The update at the rank that it is to have."""
    if job.energy is not None:
        return u.truncate(energy=job.energy)
    most = min(u.shape) if job.rank is None else job.rank
    return u.truncate(rank=most) if u.rank > most else u


def _transfer(job: Job, moved: Moved, method: str, one: bool) -> Transfer:
    """The result around what a method moved."""
    before = job.adapter
    if not moved.modules:
        raise MismatchError(f"method {method!r} moved none of the {len(before.modules)} modules")
    # Heads, biases and tokens are in the source's coordinates, too.
    same = not METHODS[method].bases and all(
        moved.modules.get(p) is not None and moved.modules[p].shape == u.shape
        for p, u in before.modules.items()
    )
    extras = dict(before.extras) if same else {}
    left = tuple(key for key in before.extras if key not in extras)
    if left:
        warn(
            f"{len(left)} tensors beside the updates belong to the source and are left "
            f"behind: {', '.join(map(repr, left[:5]))}"
        )
    report = report_of(
        before.modules,
        moved.modules,
        sources=moved.sources,
        fits=moved.fits,
        distances=moved.distances,
        dropped=moved.dropped,
        without=moved.without,
        left_behind=left,
        method=method,
        said=moved.said,
    )
    if one:
        return Transfer(moved.modules[_ONE], report)
    name = name_of_base(job.target)
    facts: dict[str, Any] = {"lorafold": __version__, "method": method}
    facts |= {"from": before.base_model, "to": name}
    facts |= {"digest": before.digest, "without": dict(moved.without)}
    facts |= {"dropped": dict(moved.dropped), "said": dict(moved.said)}
    ranks = [sorted(u.rank for u in of.modules.values()) for of in (before, moved)]
    as_they_are = method in _IN_ONE_GAUGE and ranks[0] == ranks[1]
    kept = before.config if as_they_are else regauged(before.config)
    config = {**kept, ORIGIN: {"metadata": {KEY: json.dumps(facts, default=str)}}}
    if name is not None:
        config["base_model_name_or_path"] = name
    layouts = {p: lay for p, lay in moved.layouts.items() if p in moved.modules}
    base = name or before.base_model
    return Transfer(Adapter(moved.modules, extras, config, base, layouts), report)
