"""The account of each adapter's error while a collection is written module by module."""

from __future__ import annotations

import numpy as np

from .record import Target

SLACK = 0.005  # share of the squared tolerance kept back for modules that overshoot by a little


class Ledger:
    """What each adapter may still lose: the budgets of its modules, and what is carried over."""

    def __init__(
        self, targets: dict[str, Target], tolerances: np.ndarray, total: np.ndarray
    ) -> None:
        self.total = total
        self._targets = targets
        self._carry = np.zeros(len(total))
        self._slack = 0.9 * SLACK * tolerances**2 * total

    def target(self, path: str, rows: np.ndarray, members: np.ndarray) -> Target:
        target = self._targets[path].take(rows)
        if target.kind != "error":
            return target
        return Target(
            "error", np.maximum(target.amount + self._carry[members], 0.3 * target.amount)
        )

    def limit(self, path: str, rows: np.ndarray, members: np.ndarray) -> np.ndarray:
        """The most a module may lose so that the adapter's sum can still hold."""
        most: np.ndarray = self._targets[path].amount[rows] + self._carry[members]
        most += self._slack[members]
        return most

    def book(self, path: str, rows: np.ndarray, members: np.ndarray, error: np.ndarray) -> None:
        self._carry[members] += self._targets[path].amount[rows] - error
