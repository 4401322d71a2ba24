"""What each adapter may lose (or take) at each module, and the account kept while it is written.

An adapter's bits are water-filled over all of its modules, which fixes what each may lose. While
the library is written module by module, what one leaves of its budget goes to the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...collection.stack import Stack
from ..coding.bits import bits_for_bytes, bits_for_error, predicted_error
from ..coding.record import Target
from ..options import Options
from .plan import ModulePlan

SLACK = 0.005  # share of the squared tolerance kept back for modules that overshoot by a little
_CHUNK = 256  # adapters whose bits are allocated at once


def module_budgets(
    options: Options,
    tolerances: np.ndarray,
    stacks: Mapping[str, Stack],
    singular_values: Mapping[str, np.ndarray],
    plans: Mapping[str, ModulePlan],
) -> dict[str, Target]:
    """What each module may lose (or take) of each adapter, water-filled over its modules.

    Args:
        tolerances: (N,) of the adapters. singular_values: path → (n, r) by row of the stack.
    """
    if options.tolerance is None and not options.coded:
        amount = float(options.bits or 32)
        return {p: Target("bits", np.full(len(s), amount)) for p, s in stacks.items()}
    count = len(tolerances)
    amounts = {p: np.zeros(len(s)) for p, s in stacks.items()}
    rows = {p: _row_of(s, count) for p, s in stacks.items()}
    for start in range(0, count if plans else 0, _CHUNK):
        members = np.arange(start, min(start + _CHUNK, count))
        there = {p: rows[p][members] for p in plans}
        _fill(options, tolerances[members], singular_values, plans, there, amounts)
    return {p: Target("bytes" if options.coded else "error", a) for p, a in amounts.items()}


def _fill(
    options: Options,
    tolerances: np.ndarray,
    singular_values: Mapping[str, np.ndarray],
    plans: Mapping[str, ModulePlan],
    rows: Mapping[str, np.ndarray],
    amounts: dict[str, np.ndarray],
) -> None:
    """The amounts of some adapters, whose rows in each module are given (−1: it has none)."""
    energy, widths, rates, spans, total = [], [], [], {}, np.zeros(len(tolerances))
    at = 0
    for path, plan in plans.items():
        row = rows[path]
        there = row >= 0
        piece = np.zeros((len(row), plan.energy.shape[1]))
        piece[there] = plan.energy[row[there]]
        total[there] += (singular_values[path][row[there]] ** 2).sum(1)
        energy.append(piece)
        widths.append(plan.widths)
        rates.append(np.full(len(plan.widths), options.bits if plan.rate is None else plan.rate))
        spans[path] = slice(at, at + piece.shape[1])
        at += piece.shape[1]
    E, cost = np.concatenate(energy, 1), np.concatenate(widths) / 8
    if options.coded:
        shared = any(plan.rate is not None for plan in plans.values())
        bits = _averaging(E, cost, np.concatenate(rates), shared)
        spread = np.ones(len(tolerances))
    else:
        allowed = (1 - SLACK) * tolerances**2 * total
        bits = bits_for_error(E, cost, True, allowed)
        # What the levels leave of the budget is spread in proportion, so that the sum is it.
        spent = np.asarray(predicted_error(E, True, bits))
        spread = np.divide(allowed, spent, out=np.ones_like(spent), where=spent > 0)
    for path, span in spans.items():
        row = rows[path]
        if options.coded:
            value = (bits[:, span] * cost[span]).sum(1)
        else:
            value = np.asarray(predicted_error(E[:, span], True, bits[:, span]))
        amounts[path][row[row >= 0]] = (value * spread)[row >= 0]


def _averaging(E: np.ndarray, cost: np.ndarray, rates: np.ndarray, shared: bool) -> np.ndarray:
    """Bits (N, k) of components at these bytes a bit (k,) and average bits (k,).

    Args:
        shared: the average is one over all adapters, as where they share bases. Cores have few
            components, so what one can't spend of its average is much of it; those that are the
            least short of a step take it instead.
    """
    budget = ((E > 0) * cost * rates).sum(1)
    bits = bits_for_bytes(E, cost, True, budget)
    if not shared:
        return bits
    left = budget - (bits * cost).sum(1)
    step = np.where(E > 0, cost, np.inf).min(1)
    order = np.argsort(-left / step, kind="stable")
    more = order[np.cumsum(step[order]) <= left.sum()]
    budget[more] += (step - left)[more]
    bits[more] = bits_for_bytes(E[more], cost, True, budget[more] * (1 + 1e-12))
    return bits


def _row_of(stack: Stack, count: int) -> np.ndarray:
    rows = np.full(count, -1)
    rows[stack.members] = np.arange(len(stack))
    return rows


class Ledger:
    """What each adapter may still lose: the budgets of its modules, and what is carried over.

    Args:
        targets: path → what the module may lose (or take). tolerances: (N,) of the adapters.
        total: (N,) their squared norms.
        first, rows: of a part of a ledger: its first adapter's position, and path → the first row.
    """

    def __init__(
        self,
        targets: Mapping[str, Target],
        tolerances: np.ndarray,
        total: np.ndarray,
        first: int = 0,
        rows: Mapping[str, int] | None = None,
    ) -> None:
        self.total = total
        self._targets, self._tolerances = targets, tolerances
        self._first, self._rows = first, rows or {}
        self._carry = np.zeros(len(total))
        self._slack = 0.9 * SLACK * tolerances**2 * total

    def part(self, first: int, end: int, rows: Mapping[str, tuple[int, int]]) -> Ledger:
        """That of some adapters alone, at its beginning.

        Args:
            first, end: their positions. rows: path → (first, end) of their rows in the stack.
        """
        here = slice(first, end)
        targets = {p: self._targets[p].take(np.arange(*span)) for p, span in rows.items()}
        starts = {p: start for p, (start, _) in rows.items()}
        return Ledger(targets, self._tolerances[here], self.total[here], first, starts)

    def __lorafold_key__(self) -> Any:
        targets = list(self._targets.values())
        amounts = [t.amount for t in targets]
        kinds = [f"{t.kind} {t.summed} {len(t.amount)}" for t in targets]
        joined = np.concatenate(amounts) if amounts else np.zeros(0)
        first = self._first, list(self._targets), kinds
        return first, joined, self._tolerances, self.total, self._rows

    def target(
        self, path: str, rows: np.ndarray, members: np.ndarray, share: float = 1.0
    ) -> Target:
        """What some rows of a module are to meet, with a share of what is carried over."""
        target = self._targets[path].take(rows - self._rows.get(path, 0))
        if target.kind != "error":
            return target
        carry = share * self._carry[members - self._first]
        return Target("error", np.maximum(target.amount + carry, 0.3 * target.amount))

    def limit(self, path: str, rows: np.ndarray, members: np.ndarray) -> np.ndarray:
        """The most a module may lose so that the adapter's sum can still hold."""
        there = members - self._first
        amount = self._targets[path].amount[rows - self._rows.get(path, 0)]
        most: np.ndarray = amount + self._carry[there]
        most += self._slack[there]
        return most

    def in_sum(self, paths: Sequence[str], member: int) -> tuple[Target, float]:
        """For modules of one adapter, which has one row in each: what they are to meet in sum, and
        the most that they may lose.
        """
        amounts = np.array([self._targets[path].amount[0] for path in paths])
        kind = self._targets[paths[0]].kind
        if kind != "error":
            return Target(kind, amounts, summed=True), np.inf
        total = float(amounts.sum())
        carried = float(self._carry[member])
        share = max(1 + carried / total, 0.3) if total > 0 else 1.0
        return Target(kind, share * amounts, summed=True), total + carried + float(
            self._slack[member]
        )

    def book(self, path: str, rows: np.ndarray, members: np.ndarray, error: np.ndarray) -> None:
        """Take account of what a module has lost."""
        amount = self._targets[path].amount[rows - self._rows.get(path, 0)]
        self._carry[members - self._first] += amount - error
