"""What each module's updates are stored as: the forms' costs predicted, the cheapest chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ...collection.stack import Stack
from ...words import note
from .costs import Costs, reaching
from .flat import coded_sides, flat_spectra, levels_at, ways_within
from .plan import ModulePlan
from .sharing import SIDES, Sharing

_HOPELESS = 1.03  # times the size without sharing: predictions are a little above what comes out
# What flat sides may miss of the squared tolerance. Of those predicted to be near the smallest the
# coarsest is coded, as what is over at one module may be left at others; and what it then misses
# may make others look smaller, which are coded too.
_THETAS = tuple((0.97 * 0.9 ** np.arange(21)).tolist())
_NEAR, _TRIES, _SMALLER = 1.01, 3, 0.98


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
            levels = {
                side: levels_at(s, reaching(s.energies, o.energy) if o.energy else o.rank, bits)
                for side, s in spectra.items()
            }
            return [self.costs.on_flat_sides(stack, S, coded_sides(spectra, levels, bits > 8))]
        budgets = [theta * o.tolerance**2 for theta in _THETAS]
        ways = ways_within(spectra, (S**2).sum(1), int(stack.ranks.max()), budgets)
        best: ModulePlan | None = None
        times: np.ndarray | float = 1.0
        for _ in range(_TRIES):
            missed = [noise + times * rest for noise, rest in (way.missed for way in ways)]
            rests = [self.costs.of_residuals(stack, S, m) for m in missed]
            sizes = [way.nbytes + rest for way, rest in zip(ways, rests, strict=True)]
            least = min(sizes)
            # Better by little isn't worth it, of what is without sharing either.
            if least > _SMALLER * (limit / _HOPELESS if best is None else best.nbytes):
                break
            way = ways.pop(next(k for k, size in enumerate(sizes) if size <= _NEAR * least))
            plan = self.costs.on_flat_sides(stack, S, coded_sides(spectra, way.levels))
            plan.release()
            if best is None or plan.nbytes < best.nbytes:
                best = plan
            noise, rest = way.missed
            little = 0.05 * noise + 1e-300  # of a rest smaller than this it is not told
            times = np.maximum((plan.energy.sum(1) - noise + little) / (rest + little), 0.1)
        return [] if best is None else [best]
