"""What each module's updates are stored as: the forms' costs predicted, the cheapest chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ...collection.batch import squared_residuals
from ...collection.limits import threads
from ...collection.stack import Stack
from ..coding.record import predicted_nbytes
from ..options import Options
from . import flat
from .costs import _there
from .plan import FlatBases, ModulePlan, Shared
from .sharing import SIDES, Sharing

_HOPELESS = 1.1  # times the size without sharing
_FLAT_THETAS = (0.9, 0.5, 0.25)


@dataclass
class Planner:
    """Chooses among the forms at each module.

    Args:
        options: how to fold. budgets: (N_all,) allowed relative squared error of each adapter.
        groups: side → (N_all,) init groups. flat_threads: torch threads that flat sides are worth.
    """

    options: Options
    budgets: np.ndarray
    groups: dict[str, np.ndarray] = field(default_factory=dict)
    flat_threads: int | None = None

    def svd(self, stack: Stack, S: np.ndarray) -> ModulePlan:
        """Own sides: the plan that is always there."""
        energy = S**2 * self.kept(S)
        widths = np.full(S.shape[1], float(sum(stack.shape)))
        nbytes = float(self.record_sizes(energy, widths, self.allowed(stack, S)).sum())
        return ModulePlan("svd", energy, widths, nbytes)

    def candidates(self, stack: Stack, S: np.ndarray, forms: Sequence[str]) -> list[ModulePlan]:
        """A fitted plan for each of `forms` that applies, cheapest first.

        Args:
            S: (N, r) singular values by row of the stack.
        """
        sharing: Sharing | None = None
        plans: list[ModulePlan] = []
        limit = np.inf
        if len(forms) > 1:
            # What is predicted to be far above the plan without sharing isn't worth fitting.
            plans.append(self.svd(stack, S))
            limit = _HOPELESS * plans[0].nbytes
        for form in forms:
            if form == "svd" or (len(stack) < 2 and form != "flat"):
                if not plans:
                    plans.append(self.svd(stack, S))
            elif form == "flat":
                with threads(self.flat_threads):
                    plans += self._flat(stack, S, limit)
            else:
                sharing = sharing or Sharing(self, stack, S, [f for f in forms if f in SIDES])
                plans += [plan for plan in [sharing.plan(form, limit)] if plan is not None]
        return sorted(
            (p for p in plans if p.form in forms or len(stack) < 2), key=lambda p: p.nbytes
        )

    # Helpers on budgets

    def kept(self, S: np.ndarray) -> np.ndarray:
        """True for the own directions that a rank or an energy keeps."""
        o = self.options
        if o.rank is not None:
            return np.arange(S.shape[1]) < np.full((len(S), 1), o.rank)
        if o.energy is not None:
            before = np.cumsum(S**2, 1) - S**2
            kept: np.ndarray = before < o.energy * (S**2).sum(1, keepdims=True)
            return kept
        return np.ones(S.shape, bool)

    def allowed(self, stack: Stack, S: np.ndarray) -> np.ndarray:
        allowed: np.ndarray = self.budgets[stack.members] * (S**2).sum(1)
        return allowed

    def record_sizes(
        self,
        energy: np.ndarray,
        widths: np.ndarray,
        budget: np.ndarray,
        rate: float | None = None,
    ) -> np.ndarray:
        """(n,) bytes of records with these components (n, k) of these widths (k,).

        Args:
            budget: (n,) squared error of each; not looked at where a size is asked for.
            rate: average bits, where these are not the options'.
        """
        o = self.options
        if o.tolerance is None:
            bits = (32.0 if o.bits is None else o.bits) if rate is None else rate
            size: np.ndarray = ((energy > 0) * widths).sum(1) * bits / 8
            return size
        return predicted_nbytes(energy, widths, budget)

    def components(
        self, S: np.ndarray, tails: np.ndarray, width: float, full: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """What may be coded of updates on shared sides: energies (n, k or 2k) and their widths.

        Args:
            S: (n, k) singular values. tails: (n,) squared norm that the sides miss.
            width: numbers a component on the sides. full: numbers of one on sides of its own.
        """
        norms = (S**2).sum(1, keepdims=True)
        share = np.divide(tails[:, None], norms, out=np.zeros_like(norms), where=norms > 0)
        share = share.clip(0, 1)
        core, rest = S**2 * (1 - share), S**2 * share
        widths = np.full(S.shape[1], width)
        if self.options.tolerance is None:
            return core, widths
        return (
            np.concatenate([core, rest], 1),
            np.concatenate([widths, np.full(S.shape[1], full)]),
        )

    # Shared sides

    def on_sides(
        self,
        form: str,
        stack: Stack,
        S: np.ndarray,
        tails: np.ndarray,
        U: Shared | None,
        V: Shared | None,
        certificate: dict[str, float] | None = None,
        rate: float | None = None,
    ) -> ModulePlan:
        """The plan of a stack on sides that are there: cores, and where these miss it residuals.

        Args:
            tails: (N,) squared norm that the sides miss of each update. rate: see `ModulePlan`.
        """
        width = np.zeros(len(stack))
        nbytes = 0.0
        for shared, d in zip((U, V), stack.shape, strict=True):
            if shared is None:
                width += d
                continue
            width += np.array(
                [shared.bases[g].rank if g >= 0 else d for g in shared.groups.tolist()]
            )
            nbytes += sum(len(b.record) for b in shared.bases.values())
        energy, widths = self.components(S, tails, float(width.mean()), float(sum(stack.shape)))
        if self.options.coded:
            energy = energy * _there(energy, U, V)
        nbytes += float(self.record_sizes(energy, widths, self.allowed(stack, S), rate).sum())
        return ModulePlan(form, energy, widths, nbytes, U, V, certificate=certificate, rate=rate)

    # Flattened factors

    def _flat(self, stack: Stack, S: np.ndarray, limit: float) -> list[ModulePlan]:
        """The form `flat` in one plan, or none where ranks differ."""
        o = self.options
        if len(set(stack.ranks.tolist())) > 1:
            return []
        spectra = {side: flat.flat_spectrum(stack, side, o.rank) for side in "AB"}
        if o.tolerance is None:
            bits = 32 if o.bits is None else int(np.ceil(o.bits))
            counts = {
                side: o.rank if o.energy is None else flat_count(s, o.energy)
                for side, s in spectra.items()
            }
            sides = {
                side: flat.coded_side(s, side, count=counts[side], bits=bits)
                for side, s in spectra.items()
            }
            return [self.flat_plan(stack, S, FlatBases(sides["A"], sides["B"], bits > 8))]
        plans: list[ModulePlan] = []
        for theta in _FLAT_THETAS:
            size = sum(
                flat.predicted_nbytes(s, theta * o.tolerance**2 / 2) for s in spectra.values()
            )
            # The sides alone, before any loadings, must be worth it.
            if size > min([limit / _HOPELESS, *(plan.nbytes for plan in plans)]):
                continue
            sides = {
                side: flat.coded_side(s, side, budget=theta * o.tolerance**2 / 2)
                for side, s in spectra.items()
            }
            plans.append(self.flat_plan(stack, S, FlatBases(sides["A"], sides["B"], False)))
            plans[-1].release()
        return sorted(plans, key=lambda plan: plan.nbytes)[:1]

    def flat_plan(self, stack: Stack, S: np.ndarray, bases: FlatBases) -> ModulePlan:
        """The plan of a stack on flat sides that are there."""
        fixed = flat.part_nbytes(bases.A, bases.B, bases.wide)
        nbytes = len(bases.A.record) + len(bases.B.record) + float(fixed * len(stack))
        widths = np.full(S.shape[1], float(sum(stack.shape)))
        if self.options.tolerance is None:
            return ModulePlan("flat", np.zeros_like(S), widths, nbytes, flat=bases, fixed=fixed)
        tails = []
        for f in stack.factors():
            parts = flat.code_parts(f, bases.A, bases.B, 0, bases.wide)
            tails.append(squared_residuals(f.B, f.A, parts.B, parts.A).cpu().numpy())
        energy = np.repeat(np.concatenate(tails)[:, None] / S.shape[1], S.shape[1], 1)
        over = energy.sum(1) > self.allowed(stack, S)
        if over.any():
            nbytes += float(
                predicted_nbytes(energy[over], widths, self.allowed(stack, S)[over]).sum()
            )
        return ModulePlan("flat", energy, widths, nbytes, flat=bases, fixed=fixed)


def flat_count(s: flat.FlatSpectrum, energy: float) -> int:
    """Directions of a flat side that keep this share of the centred energy."""
    before = np.cumsum(s.energies) - s.energies
    return int((before < energy * s.energies.sum()).sum())
