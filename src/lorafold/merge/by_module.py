"""Merging as tasks: a pure function of one module of all adapters, of a few modules at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..collection.elsewhere import Elsewhere
from ..collection.stack import Stack
from ..errors import MismatchError
from ..lowrank import LowRank
from .algebra import searched, spectral
from .algebra.core import Cut, Members
from .algebra.spaces import in_core, in_delta, in_factors, in_halves
from .methods import Job

_TOGETHER = 1 << 24  # float32 bytes of the factors that are merged in one task elsewhere


@dataclass(frozen=True, eq=False)
class Found:
    """Merged modules.

    Args:
        modules: path → update. cuts: ‖cut away‖² and ‖all‖² of each that was cut, in order.
        digests: (position, path) → digest, of what was read elsewhere.
    """

    modules: Mapping[str, LowRank]
    cuts: Sequence[tuple[float, float]]
    digests: Mapping[tuple[int, str], bytes]


def together(stacks: Sequence[Stack], dense: bool) -> Iterator[list[Stack]]:
    """Modules in the runs that tasks elsewhere take; each alone where it is merged as a matrix."""
    run: list[Stack] = []
    for stack in stacks:
        run.append(stack)
        if dense or sum(s.nbytes for s in run) >= _TOGETHER:
            yield run
            run = []
    if run:
        yield run


def of_modules(job: Job, paths: Sequence[str]) -> Job:
    """What of a job concerns some modules, and can be pickled."""
    own = {**job.options, "progress": None, "score": None, "heads": None}
    if own.get("grams") is not None:
        own["grams"] = {
            name: {path: grams[path] for path in paths if path in grams}
            for name, grams in own["grams"].items()
        }
    return replace(job, options=own, said={})


@torch.no_grad()
def merged_modules(job: Job, stacks: Sequence[Stack], names: tuple[str, ...]) -> Found:
    """Some modules of all adapters, merged.

    Args:
        stacks: the modules, each of the adapters that have it. names: of all.

    Raises:
        MismatchError: naming the module.
    """
    modules: dict[str, LowRank] = {}
    cuts: list[tuple[float, float]] = []
    digests: dict[tuple[int, str], bytes] = {}
    factor = job.options["lambda_"]
    for stack in stacks:
        path = stack.path
        taken = stack.read.take_digests() if isinstance(stack.read, Elsewhere) else {}
        try:
            found = _merged(job, _members(job, stack, names))
            if isinstance(found, Cut):
                cuts.append((found.lost, found.size))
                found = found.update
            found = _by_itself(found)
            modules[path] = found if factor == 1 else found * factor
        except MismatchError as e:  # what says nothing of where has it said here
            named = repr(path) in str(e)
            raise MismatchError(f"{e}" if named else f"module {path!r}: {e}") from e
        digests |= {(i, path): digest for i, digest in taken.items()}
    return Found(modules, cuts, digests)


def _members(job: Job, stack: Stack, names: tuple[str, ...]) -> Members:
    updates: list[LowRank | None] = [None] * len(names)
    there = stack.members.tolist()
    for i, u in zip(there, stack.several(there), strict=True):
        extreme = u.scale != 0 and not 2.0**-60 < abs(u.scale) < 2.0**60
        updates[i] = u.unscaled() if extreme else u
    weights, kept = job.weights.at(stack.path), job.densities.at(stack.path)
    return Members(stack.path, names, tuple(updates), weights, kept, job.seed)


def _by_itself(u: LowRank) -> LowRank:
    """The same in tensors of one layout and no others' memory: what is sent is what stays."""
    A, B = (_own(t) for t in (u.A, u.B))
    return u if A is u.A and B is u.B else LowRank(A, B, u.scale)


def _own(t: Tensor) -> Tensor:
    if t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _merged(job: Job, members: Members) -> LowRank | Cut:
    """One module."""
    if len(members.names) == 1 and (job.space == "core" or set(members.densities) == {1.0}):
        return _alone(job, members)
    calm = spectral.calibrated(members) if job.options["pico"] else members
    found = _by_method(job, calm)
    if not job.options["pico"]:
        return found
    if isinstance(found, Cut):
        return replace(found, update=spectral.recalibrated(found.update, members))
    return spectral.recalibrated(found, members)


def _alone(job: Job, members: Members) -> LowRank:
    """A single adapter: itself, times its weight; rules that divide by weights leave the sign."""
    (u,), (w,) = members.there, members.weights
    if job.method == "slerp" or job.rule.divide != "no":
        w = 0.0 if w == 0 else 1.0 if job.rule.divide == "signed" else math.copysign(1.0, w)
    return u if w == 1 else w * u


def _by_method(job: Job, members: Members) -> LowRank | Cut:
    o = job.options
    if job.entrywise:
        if job.rule.sums and job.space != "factors":
            rank = o.get("rank")
            return spectral.linear(members) if rank is None else spectral.linear_cut(members, rank)
        if job.space == "delta":
            return in_delta(job.rule, members, o["rank"])
        if job.space == "factors":
            return in_factors(job.rule, members)
        return in_core(job.rule, members)
    return _METHODS[job.method](job, members)


_METHODS: dict[str, Callable[[Job, Members], LowRank]] = {
    "slerp": lambda job, m: spectral.slerp(m),
    "knots": lambda job, m: in_halves(job.rule, m),
    "tsv": lambda job, m: spectral.tsv(m),
    "iso_c": lambda job, m: spectral.iso_c(m),
    "iso_cts": lambda job, m: spectral.iso_cts(m, job.options["common"]),
    "lego": lambda job, m: spectral.lego(m, job.options["rank"]),
    "ctm": lambda job, m: spectral.ctm(m, job.rule, job.options["rank"], job.options["beta"]),
    "regmean": lambda job, m: searched.regmean(
        m, job.options["grams"], job.options["off_diagonal"]
    ),
}
