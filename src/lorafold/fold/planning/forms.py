"""What each module's updates are stored as: the forms' costs predicted, the cheapest chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ...collection.stack import Stack
from ...words import note
from .costs import Costs, reaching
from .flat import coded_side, flat_spectra, predicted_nbytes
from .plan import FlatBases, ModulePlan
from .sharing import SIDES, Sharing

_HOPELESS = 1.03  # times the size without sharing: predictions are a little above what comes out
_FLAT_THETAS = (0.9, 0.5, 0.25)


@dataclass(frozen=True)
class Planner:
    """Chooses among the forms at each module.

    Args:
        costs: what they cost under the fold's options. groups: side → (N_all,) init groups.
    """

    costs: Costs
    groups: Mapping[str, np.ndarray]

    def candidates(self, stack: Stack, S: np.ndarray, forms: Sequence[str]) -> list[ModulePlan]:
        """A fitted plan for each of `forms` that applies, cheapest first.

        Args:
            S: (N, r) singular values by row of the stack.
        """
        if not S.any():  # zero in all adapters: nothing to share, and nothing to store
            return [replace(self.costs.on_own_sides(stack, S), form=forms[0])]
        sharing: Sharing | None = None
        plans: list[ModulePlan] = []
        limit = np.inf
        if len(forms) > 1:
            # What is predicted to be far above the plan without sharing isn't worth fitting.
            plans.append(self.costs.on_own_sides(stack, S))
            limit = _HOPELESS * plans[0].nbytes
        failed = False
        for form in forms:
            if form == "svd" or (len(stack) < 2 and form != "flat"):
                if not plans:
                    plans.append(self.costs.on_own_sides(stack, S))
                continue
            try:
                if form == "flat":
                    plans += self._flat(stack, S, limit)
                else:
                    sharing = sharing or Sharing(
                        self.costs, self.groups, stack, S, [f for f in forms if f in SIDES]
                    )
                    plans += [plan for plan in [sharing.plan(form, limit)] if plan is not None]
            except torch.linalg.LinAlgError as e:  # type: ignore[attr-defined]
                failed = True
                note(f"form {form!r} is left out at module {stack.path!r}: {e}")
        if failed and not plans:
            plans.append(self.costs.on_own_sides(stack, S))
        return sorted(
            (p for p in plans if p.form in forms or failed or len(stack) < 2),
            key=lambda p: p.nbytes,
        )

    def _flat(self, stack: Stack, S: np.ndarray, limit: float) -> list[ModulePlan]:
        """The form `flat` in one plan, or none where ranks differ."""
        o = self.costs.options
        if set(stack.ranks[S.any(1)].tolist()) != {int(stack.ranks.max())}:
            return []  # only zero updates may be of a lower rank
        spectra = flat_spectra(stack, o.rank, every=o.tolerance is None and o.rank is None)
        if o.tolerance is None:
            bits = 32 if o.bits is None else int(np.ceil(o.bits))
            counts = {
                side: o.rank if o.energy is None else reaching(s.energies, o.energy)
                for side, s in spectra.items()
            }
            sides = {
                side: coded_side(s, side, count=counts[side], bits=bits)
                for side, s in spectra.items()
            }
            return [self.costs.on_flat_sides(stack, S, FlatBases(sides["A"], sides["B"], bits > 8))]
        plans: list[ModulePlan] = []
        missed = sum(s.missed for s in spectra.values())
        rest = self.costs.of_residuals(stack, S, np.minimum(missed, 1.0) * (S**2).sum(1))
        for theta in _FLAT_THETAS:
            budget = theta * o.tolerance**2 / 2
            size = sum(predicted_nbytes(s, budget) for s in spectra.values()) + rest
            # The sides, and what they can't hold, must be worth it before any loadings.
            if size > min([limit / _HOPELESS, *(plan.nbytes for plan in plans)]):
                continue
            sides = {side: coded_side(s, side, budget=budget) for side, s in spectra.items()}
            bases = FlatBases(sides["A"], sides["B"], False)
            plans.append(self.costs.on_flat_sides(stack, S, bases))
            plans[-1].release()
        return sorted(plans, key=lambda plan: plan.nbytes)[:1]
