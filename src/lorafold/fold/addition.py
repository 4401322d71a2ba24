"""One new adapter in a library: its modules on the present bases, those of one shape together.

`fold` goes module by module over many adapters; here there is one adapter and many modules, each a
few numbers on bases of its own. What costs is the number of operations, so a batch has a row for
each module of one shape: one decomposition, one projection, one rotation and rounding for all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapter import Adapter, Layout
from ..collection.batch import (
    Block,
    Factors,
    decompose,
    joined_factors,
    squared_norms,
    squared_residuals,
)
from ..collection.collection import Collection
from ..collection.limits import block_bytes
from ..collection.sources import Handle, named_handles
from ..collection.stack import Stack
from ..errors import MismatchError, RefusedError, ToleranceError
from ..files import open_adapter
from ..lowrank import LowRank
from ..thin import thin, threads
from ..words import warn
from .coding.bases import Bases, Basis, Side, basis_of, projected, residual, weighted_norms
from .coding.flat_part import FlatSide, OtherLengthError, code_parts, flattened
from .coding.record import Coded, Target, code
from .contents import Contents
from .one_pass import adapter_entries, in_one_gauge
from .options import Kept, Options
from .passes.survey import Survey
from .passes.write import Builder, check_contract
from .planning.budget import Ledger
from .planning.costs import Costs
from .planning.plan import FlatBases, ModulePlan, Shared
from .store.entries import ModuleEntry
from .store.manifest import Manifest
from .store.shard_writer import ShardWriter
from .store.store import Transaction

_CLOSE = 0.25  # of the bytes without shared sides: an update that the bases hold well
_SPENT, _AIM = 0.98, 0.995  # of the allowed error: enough of it used, and what to try for
_LOST = 0.95  # an error from which what is stored is no adapter any more
_NEW_BITS = 5  # of directions that `add` appends to a shared basis

Numbered = tuple[int, Basis | None]
Core = tuple[Tensor, Tensor]


def one_handle(adapter: Any) -> tuple[str | None, Handle]:
    """The default name (None for an `Adapter` object) and the handle of a single source."""
    if isinstance(adapter, Adapter):
        return None, open_adapter(adapter)
    found = named_handles(adapter)
    if len(found) != 1:
        raise MismatchError(f"add takes one adapter at a time; {adapter!r} stands for {len(found)}")
    return next(iter(found.items()))


@thin
def projection(
    c: Contents, adapter: Any, least: float | None = None
) -> tuple[dict[str, Tensor | tuple[Tensor, Tensor]], float, dict[str, float]]:
    """An adapter's loadings on the present bases by module, and errors; see `Projection`.

    Args:
        least: share of it below which a warning tells that the bases don't cover it.

    Raises:
        MismatchError: it has a module of another shape; a share that is none.
        RefusedError: ΔW algebra would be wrong.
    """
    share = isinstance(least, Real) and not isinstance(least, bool)
    if least is not None and not (share and 0 <= least <= 1):
        raise MismatchError(f"warn must be a share, 0 … 1, found {least!r}")
    _, handle = one_handle(adapter)
    if handle.refusal:
        raise RefusedError(handle.refusal)
    loadings: dict[str, Tensor | tuple[Tensor, Tensor]] = {}
    lost: dict[str, float] = {}
    sizes: dict[str, float] = {}
    for path in handle.shapes:
        u = handle.read(path).to(c.device)
        c.manifest.check_shape(path, u.shape)
        block = _block_of(u)
        sizes[path] = float((block.S**2).sum())
        j = c.manifest.numbers.get(path)
        if j is not None and (flat := flat_bases(c, j, u.rank)):
            f = joined_factors(block.members, [(u.B, u.A, u.scale)])
            parts = code_parts(f, flat.A, flat.B, 0, flat.wide)
            lost[path] = float(squared_residuals(f.B, f.A, parts.B, parts.A))
            loadings[path] = (
                flat.A.loadings(flattened(f, "A"))[0] * flat.A.lengths,
                flat.B.loadings(flattened(f, "B"))[0] * flat.B.lengths,
            )
            continue
        sides = None if j is None else nearest_sides(c, j, block)
        if sides is None:
            lost[path] = sizes[path]
            continue
        (_, U), (_, V) = sides
        f = block.factors()
        left, right = projected(f, U, V)
        lost[path] = float(squared_norms(*residual(f, left, right, U, V)))
        loadings[path] = (left @ right)[0]
    errors = {path: _relative(lost[path], size) for path, size in sizes.items()}
    error = _relative(math.fsum(lost.values()), math.fsum(sizes.values()))
    covered = max(0.0, 1 - error)
    if least is not None and covered < least:
        worst = max(errors, key=lambda path: errors[path])
        warn(
            f"the library's shared bases cover {covered:.1%} of the adapter, less than "
            f"{least:.1%} (least at {worst!r}: {max(0.0, 1 - errors[worst]):.1%}): Library.add "
            "brings directions of its own"
        )
    return loadings, error, errors


def _relative(lost: float, size: float) -> float:
    return (lost / size) ** 0.5 if size > 0 else 0.0


def _block_of(u: LowRank) -> Block:
    """One update as a block."""
    return joined_factors(np.zeros(1, np.int64), [(u.B, u.A, u.scale)]).decomposed()


def write_added(
    c: Contents,
    t: Transaction,
    name: str,
    handle: Handle,
    tolerance: float | None,
    form: Kept | None,
) -> tuple[ShardWriter, Manifest]:
    """Write an adapter into a shard of its own.

    Returns:
        The shard, and the manifest with it, where it takes the place of one of its name.
    """
    before = t.manifest
    bound = before.options.tolerance if tolerance is None else tolerance
    exact = form == "exact" or before.options.form == "exact" or bound == 0
    exact = exact or in_one_gauge(handle)
    options = before.options
    if bound is not None:
        options = Options(options.form if form is None else form, bound)
    collection = Collection(
        {name: handle},
        exact={name} if exact else (),
        block_bytes=block_bytes("1GiB"),
        device=c.device,
        before={m.path: m.shape for m in before.modules},
    )
    bounds = np.full(collection.folded, bound or 0.0)
    survey = Survey(collection, options, bounds)
    builder = Builder(survey, before.next_id)
    with threads(1):
        if form == "svd" and bound is not None:  # to the bytes that a fold of it alone would have
            survey.measure()
            (plans,), ahead = survey.plans(), None
        else:
            adding = Adding(c, survey, own_sides=form == "svd")
            adding.plan()
            plans, ahead = adding.plans, adding.coded
        (writer,) = builder.writers(t, plans)
        written = builder.write_plans([writer], plans, ahead)
    (entry,) = adapter_entries(
        collection, written, bounds, before.options, before.config, first=before.next_id
    )
    if bound is not None and collection.folded:
        check_contract([name], np.array([entry.error]), bounds)
    if bound is None and entry.error >= _LOST:
        raise ToleranceError(
            f"{name!r} would come out at error {entry.error:.3g}: the library is folded by size, "
            "and its bases hold next to nothing of it; give tolerance= to keep it within a bound, "
            "or add it with form='exact' and refold at the size wanted: that finds bases for all"
        )
    old = before.adapters.get(name)
    known = len(before.modules)
    longer = [m.extended(w.bases) for m, w in zip(before.modules, written.modules, strict=False)]
    modules = (*longer, *written.modules[known:])
    entry = dataclasses.replace(
        entry,
        order=entry.order if old is None else old.order,
        layouts=own_layouts(modules, handle),
    )
    manifest = before.changed([entry]).holding(written.holds)
    return writer, dataclasses.replace(manifest, modules=modules)


def own_layouts(modules: tuple[ModuleEntry, ...], handle: Handle) -> dict[str, Layout]:
    """Layouts that differ from the library's for the module."""
    own = {m.path: handle.layouts.get(m.path, Layout()) for m in modules if m.path in handle.shapes}
    return {
        m.path: own[m.path]
        for m in modules
        if m.path in own and own[m.path] != (m.layout or Layout())
    }


@dataclass(frozen=True)
class Batch:
    """Modules of one shape and rank, a row each."""

    paths: list[str]
    factors: Factors
    block: Block

    @cached_property
    def even(self) -> Factors:
        """The updates in a gauge whose products are good."""
        return self.block.factors()

    @property
    def shape(self) -> tuple[int, int]:
        return self.block.U.shape[1], self.block.V.shape[1]

    def take(self, rows: list[int]) -> Batch:
        """Some of the rows, in order."""
        if len(rows) == len(self.paths):
            return self
        index = np.array(rows)
        return Batch(
            [self.paths[k] for k in rows], self.factors.take(index), self.block.take(index)
        )


@dataclass
class Adding:
    """How each module of one new adapter is stored in the present bases.

    Args:
        contents: of the library. survey: of the collection that is the adapter alone.
        own_sides: keep it off the shared bases.

    Attributes:
        plans: module path → plan, after `plan`.
    """

    contents: Contents
    survey: Survey
    own_sides: bool
    plans: dict[str, ModulePlan] = field(default_factory=dict)
    _batches: list[Batch] = field(default_factory=list)
    _cores: dict[str, Core] = field(default_factory=dict)  # of those that are only projected

    def plan(self) -> None:
        """Decompose the modules, and choose among the ways to store each."""
        self._batches = _decomposed(self.survey)
        numbers = self.contents.manifest.numbers
        for batch in self._batches:
            self._plan_without_sharing(batch)
            if self.own_sides:
                continue
            sides: dict[int, tuple[Numbered, Numbered]] = {}
            for k, path in enumerate(batch.paths):
                j = numbers.get(path)
                if j is None:
                    continue
                if "A0" in self.contents.modules[j].bases:
                    stack, S = self._module(path)
                    if bases := flat_bases(self.contents, j, int(stack.ranks[0])):
                        self.plans[path] = _flat_plan(self.survey.costs, stack, S, bases)
                elif found := nearest_sides(self.contents, j, batch.block.take(np.array([k]))):
                    sides[k] = found
            for rows in _alike({k: _widths(*pair) for k, pair in sides.items()}):
                self._plan_shared(batch.take(rows), [sides[k] for k in rows])

    def _module(self, path: str) -> tuple[Stack, np.ndarray]:
        return self.survey.stacks[path], self.survey.singular_values[path]

    def _plan_without_sharing(self, batch: Batch) -> None:
        costs = self.survey.costs
        S = batch.block.S.cpu().numpy()
        energy, widths = S**2 * costs.used(S), np.full(S.shape[1], float(sum(batch.shape)))
        sizes = costs.record_sizes(energy, widths, costs.budgets[0] * (S**2).sum(1))
        for k, path in enumerate(batch.paths):
            self.plans[path] = ModulePlan("svd", energy[k : k + 1], widths, float(sizes[k]))

    def _plan_shared(self, batch: Batch, sides: list[tuple[Numbered, Numbered]]) -> None:
        """Plans of modules whose bases are of the same widths, one product for all."""
        costs = self.survey.costs
        plans, (left, right) = _on_bases(self.contents, costs, batch, sides)
        tolerance = costs.options.tolerance
        for k, (path, plan) in enumerate(zip(batch.paths, plans, strict=True)):
            best = plan
            # Where the bases nearly hold the update, neither longer ones nor none can be smaller.
            if tolerance is not None and plan.nbytes > _CLOSE * self.plans[path].nbytes:
                one = batch.take([k])
                longer = [
                    _on_bases(self.contents, costs, one, [pair])[0][0]
                    for pair in _extended(one.block, sides[k], tolerance)
                ]
                best = min([plan, self.plans[path], *longer], key=lambda p: p.nbytes)
            self.plans[path] = best
            if best is plan:
                self._cores[path] = left[k : k + 1], right[k : k + 1]

    def coded(self, ledger: Ledger) -> dict[str, Coded]:
        """Every module that has no flat bases, coded to its budget."""
        found: dict[str, Coded] = {}
        for batch in self._batches:
            keys = {}
            for k, path in enumerate(batch.paths):
                plan = self.plans[path]
                if plan.flat is None:
                    keys[k] = (*_widths(*_sides_of(plan)), path in self._cores)
            for rows in _alike(keys):
                part = batch.take(rows)
                coded = self._within(part, ledger)
                for k, path in enumerate(part.paths if coded else ()):
                    assert coded is not None
                    found[path] = coded.take(np.array([k]))
        return found

    def _within(self, batch: Batch, ledger: Ledger) -> Coded | None:
        """The rows coded and booked; None where they miss their bound, and go one by one then."""
        target, most = ledger.in_sum(batch.paths, 0)
        best: Coded | None = None
        for _ in range(3):
            coded = self._code(batch, target)
            lost = float(coded.squared_error.sum())
            if lost > most and best is not None:
                break
            best = coded if lost <= most else None
            # Short vectors lose less to rounding than is predicted: what that leaves is spent, too.
            if target.kind != "error" or _SPENT * most <= lost <= most:
                break
            factor = min(_AIM * most / max(lost, 1e-300), 1.25)
            target = target.take(np.arange(len(batch.paths)), factor)
        if best is not None and target.kind == "error":
            one = np.zeros(1, np.int64)
            for k, path in enumerate(batch.paths):
                ledger.book(path, one, one, best.squared_error[k : k + 1])
        return best

    def _code(self, batch: Batch, target: Target) -> Coded:
        sides = [_sides_of(self.plans[path]) for path in batch.paths]
        U, V = (_together([pair[side][1] for pair in sides]) for side in range(2))
        numbers = [(u if U else None, v if V else None) for (u, _), (v, _) in sides]
        core = None
        if batch.paths[0] in self._cores:
            known = [self._cores[path] for path in batch.paths]
            core = torch.cat([left for left, _ in known]), torch.cat([right for _, right in known])
        block = self.survey.costs.cut(batch.block)
        return code(batch.factors, target, numbers, U, V, block=block, core=core)


def _decomposed(survey: Survey) -> list[Batch]:
    """The adapter's modules in batches; the stacks keep what is theirs until they are written."""
    collection = survey.collection
    alike: dict[tuple[Any, ...], list[str]] = {}
    for path, stack in survey.stacks.items():
        alike.setdefault((stack.shape, int(stack.ranks[0])), []).append(path)
    batches = []
    for ((out, inner), r), paths in alike.items():
        size = max(1, collection.block_bytes // (4 * r * (out + inner)))
        for start in range(0, len(paths), size):
            part = paths[start : start + size]
            reads = [collection.read(0, path) for path in part]
            factors = joined_factors(
                np.zeros(len(part), np.int64),
                [(u.B, u.A, u.scale) for u in reads],
                survey.stacks[part[0]].device,
            )
            block = Block(factors.members, *decompose(factors.B, factors.A))
            for k, path in enumerate(part):
                row = slice(k, k + 1)
                own = Factors(factors.members[row], factors.B[row], factors.A[row])
                parts = block.U[row], block.S[row], block.V[row]
                survey.know(path, own, Block(own.members, *parts))
            batches.append(Batch(part, factors, block))
    return batches


def _alike(keys: Mapping[int, Any]) -> list[list[int]]:
    """The rows with equal keys, together."""
    found: dict[Any, list[int]] = {}
    for row, key in keys.items():
        found.setdefault(key, []).append(row)
    return list(found.values())


def _on_bases(
    c: Contents, costs: Costs, batch: Batch, sides: list[tuple[Numbered, Numbered]]
) -> tuple[list[ModulePlan], Core]:
    """A plan for each row on bases that are there, all of the same widths, and the cores."""
    U, V = (_together([pair[side][1] for pair in sides]) for side in range(2))
    core = projected(batch.even, U, V)
    S = batch.block.S.cpu().numpy()
    missed = batch.block.square() - weighted_norms(*core, U, V)
    tails = missed.clamp_min(0).cpu().numpy()
    width = sum(d if b is None else b.rank for b, d in zip((U, V), batch.shape, strict=True))
    energy, widths = costs.components(S, tails, float(width), float(sum(batch.shape)))
    sizes = costs.record_sizes(energy, widths, costs.budgets[0] * (S**2).sum(1))
    plans = []
    for k, (path, ((u, basis_U), (v, basis_V))) in enumerate(zip(batch.paths, sides, strict=True)):
        fresh = sum(len(b.record) for b in (basis_U, basis_V) if b is not None)
        plan = ModulePlan(
            c.modules[c.manifest.numbers[path]].form,
            energy[k : k + 1],
            widths,
            float(sizes[k]) + fresh,
            None if basis_U is None else Shared(np.array([u]), {u: basis_U}),
            None if basis_V is None else Shared(np.array([v]), {v: basis_V}),
        )
        plans.append(plan)
    return plans, core


def _widths(U: Numbered, V: Numbered) -> tuple[int, int]:
    """Of a pair of sides; −1 where one is the adapter's own."""
    return tuple(-1 if b is None else b.rank for _, b in (U, V))  # type: ignore[return-value]


def _together(bases: list[Basis | None]) -> Side:
    """One side of a batch, whose rows all have a basis there, or none has."""
    there = [b for b in bases if b is not None]
    return Bases(there) if there else None


def _sides_of(plan: ModulePlan) -> tuple[Numbered, Numbered]:
    """The numbers and bases of a plan for a single adapter."""
    found: list[Numbered] = []
    for shared in (plan.U, plan.V):
        g = -1 if shared is None else int(shared.groups[0])
        found.append((g, None if shared is None else shared.bases[g]))
    return found[0], found[1]


def nearest_sides(c: Contents, j: int, block: Block) -> tuple[Numbered, Numbered] | None:
    """The module's bases that miss least of an update; None where it shares nothing.

    Returns:
        ((number, U), (number, V)); a side that is the adapter's own is (−1, None).
    """
    sides = c.sides(j).items()
    found = {s: [(n, b) for n, b in enumerate(bases) if b.columns.shape[1]] for s, bases in sides}
    if not found["U"] and not found["V"]:
        return None
    chosen: list[Numbered] = []
    for side, X in (("U", block.U), ("V", block.V)):
        if len(found[side]) == 1:
            chosen.append(found[side][0])
            continue
        best: Numbered = (-1, None)
        least = np.inf
        for number, basis in found[side]:
            miss = X - basis.columns @ basis.coordinates(X)
            lost = float(((miss.double() ** 2).sum(1) * block.S**2).sum())
            if lost < least:
                best, least = (number, basis), lost
        chosen.append(best)
    return chosen[0], chosen[1]


def _extended(
    block: Block, sides: tuple[Numbered, Numbered], tolerance: float
) -> list[tuple[Numbered, Numbered]]:
    """The sides with what the bases miss of the update appended to one, or to each."""
    (u, U), (v, V) = sides
    longer = []
    for basis, X, side in ((U, block.U, "U"), (V, block.V, "V")):
        longer.append(
            None if basis is None else _appended(basis, X, block.S, side, 0.5 * tolerance**2)
        )
    options: list[tuple[Numbered, Numbered]] = []
    if longer[0] is not None:
        options.append(((u, longer[0]), (v, V)))
    if longer[1] is not None:
        options.append(((u, U), (v, longer[1])))
    if longer[0] is not None and longer[1] is not None:
        options.append(((u, longer[0]), (v, longer[1])))
    return options


def _appended(basis: Basis, X: Tensor, S: Tensor, side: str, share: float) -> Basis | None:
    """The basis with the missing directions of X that matter; None if none does."""
    total = float((S**2).sum())
    if not total > 0:
        return None
    missing = ((X - basis.columns @ basis.coordinates(X)) * S.to(X.dtype)[:, None, :])[0]
    directions, strength, _ = torch.linalg.svd(missing, full_matrices=False)
    energy = (strength.double() ** 2).cpu().numpy() / total
    tail = energy[::-1].cumsum()[::-1]
    count = int((tail > share / 2).sum())
    if count == 0:
        return None
    fresh = basis_of(directions, np.where(np.arange(len(energy)) < count, _NEW_BITS, 0), side)
    return Basis(torch.cat([basis.columns, fresh.columns], 1), fresh.record, fresh.rank)


def flat_bases(c: Contents, j: int, rank: int) -> FlatBases | None:
    """The module's flat sides; None where it has none for adapters of this rank."""
    module = c.modules[j]
    if "A0" not in module.bases:
        return None
    out, inner = module.shape
    try:
        A, B = (FlatSide(c.basis(j, side, 0, rank), b"") for side in "AB")
    except OtherLengthError:
        return None
    if A.rows.shape[1] != rank * inner or B.rows.shape[1] != rank * out:
        return None  # decoded before, for another rank
    return FlatBases(A, B, module.wide)


def _flat_plan(costs: Costs, stack: Stack, S: np.ndarray, bases: FlatBases) -> ModulePlan:
    plan = costs.on_flat_sides(stack, S, bases)
    svd = costs.on_own_sides(stack, S)
    return plan if costs.options.tolerance is None or plan.nbytes <= svd.nbytes else svd
