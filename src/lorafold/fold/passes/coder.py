"""Coding blocks of a module as it was planned: to their budgets, and measured on what they give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ...collection.batch import Block, Factors
from ...collection.stack import Stack, alike, joint
from ...words import note
from ..coding.flat_part import read_parts
from ..coding.record import Coded, Target, code, decode, exact_record
from ..planning.budget import Ledger
from ..planning.costs import Costs, flat_parts
from ..planning.plan import FlatBases, ModulePlan, basis_at, side_pairs

_ATTEMPTS = 5  # more, to get a module within its bound, before it is stored exactly
_FINE = 1e-4  # a bound below which float32 itself counts: what is read back is what is measured
_ROUNDING = 5e-8  # of Σ ‖b_k‖ ‖a_k‖: what another order of the decoder's sums may change


@dataclass(frozen=True)
class Coder:
    """Codes blocks to what a ledger leaves them.

    Args:
        costs: of plans, under the fold's options and bounds.
    """

    costs: Costs

    @property
    def fine(self) -> bool:
        """Whether a bound is so small that what is measured must be what is read back."""
        bounded = self.costs.options.tolerance is not None
        return bounded and self.costs.budgets.min(initial=1.0) < _FINE**2

    def coded(
        self,
        stack: Stack,
        plan: ModulePlan,
        ledger: Ledger,
        known: Sequence[Coded] | None = None,
        first: int = 0,
    ) -> Iterator[tuple[np.ndarray, Coded]]:
        """Each block's adapters, and their records at a module; the ledger is kept.

        Args:
            stack: some or all of the module's updates. plan: of the module, for all of them.
            known: what was coded and booked already, a block each.
            first: the row in `plan` and `ledger` of the stack's first update.
        """
        if known is not None:
            for rows, coded in zip(stack.blocks, known, strict=True):
                yield stack.members[rows], coded
            return
        for number, here in enumerate(stack.blocks):
            one = _Block(first + here, here - here[0], stack.part(number), plan)
            target = ledger.target(stack.path, one.rows, one.members)
            made = None if plan.parts is None else plan.parts.take(one.rows)
            if made is None or (made.squared_error > target.amount).any():
                block = one.stack.decomposed
                if self.costs.cuts and plan.flat is None:
                    block = self.costs.cut(block or one.factors.decomposed())
                made = code_as_planned(one.factors, one.rows, plan, target, block)
            yield one.members, self._booked(one, target, made, ledger)

    def batched(self, plan: ModulePlan) -> bool:
        """Whether a module may be coded together with others."""
        own = plan.U is None and plan.V is None and plan.flat is None
        return own and self.costs.options.tolerance is not None and not self.fine

    def together(
        self,
        parts: Mapping[str, Stack],
        plans: Mapping[str, ModulePlan],
        ledger: Ledger,
        first: Mapping[str, int],
    ) -> dict[str, Coded]:
        """One block at several modules that are `batched`, coded and booked.

        Args:
            parts: path → the block. first: path → its first row in the plan and the ledger.
        """
        found: dict[str, Coded] = {}
        for some in alike(parts.values()):
            blocks, targets = [], []
            f, several = joint(some)
            for stack, own in zip(some, several, strict=True):
                here = np.arange(len(stack))
                one = _Block(first[stack.path] + here, here, stack, plans[stack.path], own)
                blocks.append(one)
                targets.append(ledger.target(stack.path, one.rows, one.members, 1 / len(some)))
            amounts = np.concatenate([target.amount for target in targets])
            coded = code(f, Target("error", amounts))
            start = 0
            for one, target in zip(blocks, targets, strict=True):
                end = start + len(one.rows)
                part = coded.take(np.arange(start, end))
                found[one.stack.path] = self._booked(one, target, part, ledger)
                start = end
        return found

    def _booked(self, one: _Block, target: Target, coded: Coded, ledger: Ledger) -> Coded:
        """What is kept of a block that was coded to a target; the ledger is told."""
        if target.kind != "error":
            return coded
        if self.fine:
            coded = _as_read(one, coded)
        coded = _not_bulky(one, self._enforced(one, target, coded, ledger))
        ledger.book(one.stack.path, one.rows, one.members, coded.squared_error)
        return coded

    def _enforced(self, block: _Block, target: Target, coded: Coded, ledger: Ledger) -> Coded:
        """Code again what overshot; at last store it exactly."""
        rows = block.rows
        factor, limit = np.ones(len(rows)), ledger.limit(block.stack.path, rows, block.members)
        for _ in range(_ATTEMPTS):
            over = np.flatnonzero(coded.squared_error > limit)
            if not len(over):
                return coded
            # On top of what earlier attempts asked for, which was not enough.
            factor[over] *= 0.97 * limit[over] / coded.squared_error[over]
            again = block.take(over)
            redone = code_as_planned(
                again.factors, again.rows, block.plan, target.take(over, factor[over])
            )
            if self.fine:
                redone = _as_read(again, redone)
            coded = coded.replaced(over, redone)
        return _exact_rows(block, np.flatnonzero(coded.squared_error > limit), coded)


@dataclass(frozen=True)
class _Block:
    """Some updates at a module: their rows in the plan, and in a stack of one block."""

    rows: np.ndarray
    in_stack: np.ndarray
    stack: Stack
    plan: ModulePlan
    read: Factors | None = None

    @property
    def members(self) -> np.ndarray:
        members: np.ndarray = self.stack.members[self.in_stack]
        return members

    @cached_property
    def factors(self) -> Factors:
        """As read; only where they are needed."""
        return (self.read or self.stack.block).take(self.in_stack)

    def take(self, some: np.ndarray) -> _Block:
        return _Block(self.rows[some], self.in_stack[some], self.stack, self.plan, self.read)


def _as_read(block: _Block, coded: Coded) -> Coded:
    """The same, its errors measured in float64 on what the records decode to.

    What codes many at once multiplies in another order than what reads one, and small errors are no
    larger than what that changes.
    """
    plan, stack = block.plan, block.stack

    def basis(side: str, number: int, count: int) -> Tensor:
        if side in "AB":
            assert plan.flat is not None
            return (plan.flat.A if side == "A" else plan.flat.B).rows
        found = basis_at(plan.U if side == "U" else plan.V, number)
        assert found is not None
        return found.columns[:, :count]

    error = np.zeros(len(coded.records))
    for k, record in enumerate(coded.records):
        source = stack.update(int(block.in_stack[k]))
        stored = decode(record, stack.shape, basis, stack.device)
        wide = [u.to(stack.device, torch.float64) for u in (source, stored)]
        lost = (wide[0] - wide[1]).norm()
        size = float((wide[1].B.norm(dim=0) * wide[1].A.norm(dim=1)).sum())
        rounded = _ROUNDING * size if lost > 0 else 0.0
        error[k] = lost**2 + rounded**2
    return Coded(coded.records, error, coded.payload)


def _not_bulky(block: _Block, coded: Coded) -> Coded:
    """Records that outgrew the tensors that they stand for give way to these."""
    itemsize = 4  # float32 at most; smaller dtypes are caught by their own record's length
    raw = sum(block.stack.shape) * block.stack.ranks[block.in_stack]
    bulky = np.array([len(r) for r in coded.records]) > itemsize * raw
    return _exact_rows(block, np.flatnonzero(bulky), coded, only_smaller=True)


def _exact_rows(block: _Block, rows: np.ndarray, coded: Coded, only_smaller: bool = False) -> Coded:
    found = {}
    for k in rows.tolist():
        record = exact_record(block.stack.update(int(block.in_stack[k])))
        if not only_smaller or len(record) < len(coded.records[k]):
            found[k] = record
    sizes = np.array([len(record) for record in found.values()], float)
    by = Coded(list(found.values()), np.zeros(len(found)), sizes)
    return coded.replaced(np.array(list(found), int), by)


def code_as_planned(
    f: Factors, rows: np.ndarray, plan: ModulePlan, target: Target, block: Block | None = None
) -> Coded:
    """Code some updates, each with the sides it has.

    Args:
        f: as they came. rows: of the stack. block: their decomposition where it is known; without
            it only those that share nothing are decomposed, and those in a bad gauge.
    """
    if plan.flat is not None:
        return _code_flat(f, rows, plan, plan.flat, target)
    result = Coded.nothing(len(rows))
    for (u, v), members in side_pairs(rows, plan.U, plan.V).items():
        U, V = basis_at(plan.U, u), basis_at(plan.V, v)
        numbers = [(u if U else None, v if V else None)] * len(members)
        known = None if block is None else block.take(members)
        some, wanted = f.take(members), target.take(members)
        try:
            part = code(some, wanted, numbers, U, V, block=known)
        except torch.linalg.LinAlgError as e:  # type: ignore[attr-defined]
            if U is None and V is None:
                raise
            note(f"form {plan.form!r}: {len(members)} updates get sides of their own: {e}")
            part = code(some, wanted, block=known)
        result = result.replaced(members, part)
    return result


def _code_flat(
    f: Factors, rows: np.ndarray, plan: ModulePlan, flat: FlatBases, target: Target
) -> Coded:
    """Flat parts, and where these miss the target a residual of the adapter's own."""
    if plan.parts is not None:
        coded = plan.parts.take(rows)
    else:
        assert plan.squares is not None
        coded = flat_parts(f, flat, plan.squares[rows], rows)
    over = np.flatnonzero(coded.squared_error > target.amount)
    if target.kind == "error" and len(over):
        f, held = f.take(over), coded.take(over)
        B, A = read_parts(held.records, f, flat.A, flat.B)
        B, A = torch.cat([f.B, -B], 2), torch.cat([f.A, A], 1)
        rest = code(Factors(f.members, B, A), target.take(over))
        records = [a + b for a, b in zip(held.records, rest.records, strict=True)]
        more = Coded(records, rest.squared_error, rest.payload + held.payload)
        coded = coded.replaced(over, more)
    return coded
