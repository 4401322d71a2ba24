"""`merge`: many adapters into one, module by module, from files.

Sources are opened by their headers and read one module at a time; a module that some lack counts
as zero there, and is listed. What a rule gives is what is returned: nothing is cut unless asked for
(in `space="delta"`, where results have full rank, it must be, and the error is told).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..adapter import ORIGIN, Adapter, merged_config
from ..collection.collection import Collection
from ..collection.elsewhere import Said
from ..collection.sources import Handle, named_handles
from ..collection.stack import Stack
from ..errors import MismatchError, RefusedError
from ..files import open_adapter
from ..lowrank import LowRank
from ..parts import check_bias_scales
from ..prefixes import regauged
from ..scale.engine import Crew, Task
from ..words import from_to, warn
from .algebra import searched
from .by_module import merged_modules, of_modules, together
from .methods import Job, Name, Space, job_of
from .provenance import origin
from .weights import PerAdapter

_DENSE = 4  # modules that are merged as matrices at the same time, at most


def merge(
    sources: Any,
    method: Name = "linear",
    *,
    weights: Any = None,
    space: Space = "core",
    seed: int = 0,
    executor: Executor | str | None = None,
    workers: int | None = None,
    work: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Adapter:
    """Merge adapters of any ranks and targets over one base into one.

    Args:
        sources: paths, globs, folders of adapters, "LIB:name", libraries, `Adapter`s, {name: any of
            these}, or a list of them; read module by module.
        method: "linear" (task arithmetic), "magnitude", "ties", "dare", "dare_ties", "della",
            "breadcrumbs", "slerp", "knots", "tsv", "iso_c", "iso_cts", "lego", "ctm", "lorahub" or
            "regmean".
        weights: one number each, {name: number} or {name: {pattern: number}} with patterns as in
            PEFT's `rank_pattern`; negative ones subtract. By default 1/N each, and 1 each for
            "tsv", "iso_c" and "iso_cts", which sum.
        space: where the rules that act entry by entry act: "core" (the joint row and column space,
            lossless), "delta" (the entries of ΔW, dense, cut at `rank=`, by default Σr) or
            "factors" (A and B apart, PEFT's approximation).
        seed: of random masks, each of which depends on it, the adapter's name and the module.
        executor, workers, work: who merges the modules, as in `fold`; the result is the same, to
            the last bit, whoever does. The scores of "lorahub" are asked for in this process.
        options: the method's own: `density=` (or `drop_rate=`), `gamma=`, `epsilon=`, `rank=`,
            `rule=`, `common=`, `beta=`, `score=`, `budget=`, `grams=`, …; and for any method
            `lambda_=` (a factor), `pico=True` (calibrates first), `heads=` (whose extras to keep)
            and `progress=` (called with done, total, module).

    Returns:
        An `Adapter` of the exact result, of rank Σr at most; `.resize` cuts it. Saved, its file and
        model card tell where it comes from.

    Raises:
        MismatchError: shapes, bases or extras that disagree, no sources, values out of range.
        UnknownNameError: no such method, option or source.
        RefusedError: ΔW algebra would be wrong for a source.
        FileError: a source that can't be read, or an executor that fails.

    Not for: an adapter into a checkpoint (`merge_into_weights`), several adapters on a running
    model (`attach` and `live.use({…})`).

    Examples:
        >>> import torch
        >>> import lorafold as lf
        >>> u = lambda: lf.LowRank(torch.randn(2, 8), torch.randn(4, 2))
        >>> a, b = lf.Adapter({"q_proj": u()}), lf.Adapter({"q_proj": u()})
        >>> merged = lf.merge({"sql": a, "law": b}, weights=[0.7, 0.3])
        >>> merged.distance(0.7 * a + 0.3 * b) < 1e-5 * merged.norm()
        True
    """
    crew = Crew(executor, workers, work)
    handles = named_handles(sources)
    return run(handles, job_of(method, tuple(handles), weights, space, seed, options), crew)


@torch.no_grad()
def run(handles: Mapping[str, Handle], job: Job, crew: Crew | None = None) -> Adapter:
    """The merged adapter of a job on opened sources.

    Args:
        crew: who merges the modules; this process where None.

    Raises:
        RefusedError: ΔW algebra would be wrong for one; naming it, the reason and the remedy.
    """
    crew = crew or Crew()
    for name, handle in handles.items():
        if handle.refusal is not None:
            raise RefusedError(f"{name!r} can't be merged: {handle.refusal}")
    if job.method == "lorahub" and len(handles) > 1:
        # Every candidate needs all of them: they are read once.
        handles = {name: open_adapter(h.load()) for name, h in handles.items()}
        job = _searched(handles, job)
    return _Run(handles, job, crew).adapter()


def _searched(handles: Mapping[str, Handle], job: Job) -> Job:
    """A linear job with the weights that score best."""
    o = job.options
    plain = replace(job, method="linear", options={**o, "pico": False, "progress": None})

    def with_weights(w: list[float]) -> Job:
        return replace(plain, weights=PerAdapter(tuple(w), 0.0))

    found = searched.searched_weights(
        lambda w: o["score"](_Run(handles, with_weights(w), Crew(), quiet=True).adapter()),
        len(handles),
        budget=o["budget"],
        bound=o["bound"],
        penalty=o["penalty"],
        seed=job.seed,
    )
    return replace(with_weights(found), options=o)


@dataclass(frozen=True, eq=False)
class _Extras:
    """What is carried along: tensors and config."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]


class _Run:
    """One merge: opened sources and a job."""

    def __init__(
        self, handles: Mapping[str, Handle], job: Job, crew: Crew, quiet: bool = False
    ) -> None:
        self._given, self._job, self._crew, self._quiet = handles, job, crew, quiet
        self._collection = Collection(handles, exact=(), block_bytes=1 << 20)
        self._names = tuple(self._collection.names)
        self._handles = self._collection.handles
        self._paths = self._collection.paths
        job.weights.check_paths(self._paths, "weights")
        job.densities.check_paths(self._paths, "density")
        self._collection.check_layouts()
        if job.method == "regmean":
            searched.check_grams(job.options["grams"], self._names)

    def adapter(self) -> Adapter:
        """The result."""
        extras = self._extras()
        modules, error = self._modules()
        missing = self._collection.missing
        if missing and not self._quiet:
            shown = "; ".join(f"{p!r} in {', '.join(who)}" for p, who in list(missing.items())[:5])
            more = "; …" if len(missing) > 5 else ""
            warn(
                f"counted as zero where missing, {len(missing)} of {len(self._paths)} modules: "
                f"{shown}{more}"
            )
        config = regauged(extras.config)
        if not self._quiet:
            facts = self._facts(error, missing)
            config[ORIGIN] = origin(facts, self._collection.base_model)
        layouts = {p: lay for p, lay in self._collection.layouts.items() if p in modules}
        base = self._collection.base_model
        merged = Adapter(modules, extras.tensors, config, base, layouts)
        if not self._quiet and not any(u.norm() for u in modules.values()):
            rule = "its weights are 0, or its rule keeps no entry (a higher density keeps more)"
            warn(f"the merged adapter's updates are all zero: {rule}")
        return merged

    def _modules(self) -> tuple[dict[str, LowRank], float | None]:
        """The merged modules; and how far those that were cut are off, relative to all of them."""
        job = self._job
        modules: dict[str, LowRank] = {}
        cuts: list[tuple[float, float]] = []
        progress: Callable[[int, int, str], object] | None = job.options["progress"]
        found = (self._collection.stack(path) for path in self._paths)
        stacks = [stack for stack in found if stack is not None]
        dense = job.space == "delta"
        here = min(torch.get_num_threads(), _DENSE) if dense else 1
        with self._crew.engine(self, at_once=here) as engine:
            if engine.spread:
                runs = list(together(stacks, dense))
                tasks = [self._task([stack.path for stack in run], run) for run in runs]
            else:
                runs = [[stack] for stack in stacks]
                tasks = [Task(run[0].path, (job, run, self._names)) for run in runs]
            results = engine.map(merged_modules, tasks)
            for run in runs:
                if progress is not None:
                    progress(len(modules), len(self._paths), run[0].path)
                merged = next(results)
                self._collection.know(merged.digests)
                modules.update(merged.modules)
                cuts += merged.cuts
        lost, size = (math.fsum(column) for column in zip(*cuts, strict=True)) if cuts else (0, 0)
        return modules, math.sqrt(lost / size) if size > 0 else None

    def __lorafold_key__(self) -> Any:
        return Said(self._given), of_modules(self._job, self._paths)

    def _task(self, paths: list[str], run: list[Stack]) -> Task:
        return Task(from_to("module", paths), (of_modules(self._job, paths), run, self._names))

    def _extras(self) -> _Extras:
        """Extras that are equal or one-sided, or those of the source that was chosen.

        Raises:
            MismatchError: two differ and none was chosen.
        """
        chosen = self._job.options["heads"]
        if chosen is not None:
            handle = self._handles[self._names.index(chosen)]
            return _Extras(handle.read_extras(), handle.config)
        tensors: dict[str, Tensor] = {}
        owner: dict[str, str] = {}
        config: Mapping[str, Any] = {}
        keys: list[tuple[list[str], Mapping[str, Any]]] = []
        for name, handle in zip(self._names, self._handles, strict=True):
            extras = handle.read_extras()
            for key, t in extras.items():
                old = tensors.setdefault(key, t)
                if old is not t and (old.dtype != t.dtype or not torch.equal(old, t)):
                    raise MismatchError(
                        f"{owner[key]!r} and {name!r} carry {key!r} with different values: "
                        f"say whose heads and tokens to keep with heads=, e.g. {owner[key]!r}"
                    )
                owner.setdefault(key, name)
            keys.append((list(extras), handle.config))
            config = merged_config(config, handle.config) if len(keys) > 1 else handle.config
        for mine, own in keys:
            check_bias_scales(mine, own, config)
        return _Extras(tensors, config)

    def _facts(self, error: float | None, missing: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """What is told of the merge."""
        given = self._job.weights.given
        sources = []
        for i, name in enumerate(self._names):
            own = self._handles[i].read_extras()
            weight = dict(w) if isinstance(w := given[i], Mapping) else w
            digest = self._collection.digest(i, own)
            sources.append({"name": name, "weight": weight, "digest": digest})
        facts: dict[str, Any] = {**self._job.said, "sources": sources}
        if missing:
            facts["missing"] = {path: list(who) for path, who in missing.items()}
        if error is not None:
            facts["error"] = error
        return facts
