"""What each module's updates are stored as: the forms' costs predicted, the cheapest chosen.

At a tolerance t an adapter may lose t² ‖ΔW_i‖². A shared side spends a part θ of that on its own
dropped directions and rounding, and in return every update needs only its coordinates; the
prediction runs over a few θ and over who shares (nobody, the init groups, everybody) on either
side, on spectra alone. What wins is then fitted, and its real tails replace the guess.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch

from . import flat
from .allocate import bits_for_error
from .module_plan import FlatBases, ModulePlan, Shared, basis_at, side_pairs
from .record import predicted_nbytes
from .sides import (
    Basis,
    Spectrum,
    alternate,
    leading_directions,
    projected,
    side_columns,
    weighted_norms,
)
from .stack import Block, Stack, squared_residuals

FORMS = ("auto", "svd", "input", "output", "shared", "flat", "exact")
_THETAS = (0.03, 0.1, 0.25, 0.5)  # shares of the tolerance that a shared side may spend
_HOPELESS = 1.1  # times the size without sharing
_FLAT_THETAS = (0.9, 0.5, 0.25)


@dataclass(frozen=True)
class Options:
    """How a library is folded; see `fold`."""

    form: str = "auto"
    tolerance: float | None = None
    rank: int | None = None
    energy: float | None = None
    bits: float | None = None
    retention: float | None = None  # recorded only: each adapter's own tolerance came from it

    @property
    def coded(self) -> bool:
        """Whether an average number of bits decides (not a tolerance, not floats)."""
        return self.bits is not None and self.bits <= 8


@dataclass
class Planner:
    """Chooses among the forms at each module.

    Args:
        options: how to fold. budgets: (N_all,) allowed relative squared error of each adapter.
        groups: side → (N_all,) init groups.
    """

    options: Options
    budgets: np.ndarray
    groups: dict[str, np.ndarray] = field(default_factory=dict)
    _spectra_found: dict[tuple[str, bytes], dict[int, Spectrum]] = field(default_factory=dict)

    def svd(self, stack: Stack, S: np.ndarray) -> ModulePlan:
        """Own sides: the plan that is always there."""
        energy = S**2 * self.kept(S)
        widths = np.full(S.shape[1], float(sum(stack.shape)))
        nbytes = self._records(energy, widths, self._allowed(stack, S))
        return ModulePlan("svd", energy, widths, nbytes)

    def candidates(self, stack: Stack, S: np.ndarray, forms: Sequence[str]) -> list[ModulePlan]:
        """A fitted plan for each of `forms` that applies, cheapest first.

        Args:
            S: (N, r) singular values by row of the stack.
        """
        self._spectra_found.clear()
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
                plans += self._flat(stack, S, limit)
            else:
                plans += self._sharing(stack, S, form, limit)
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

    def _allowed(self, stack: Stack, S: np.ndarray) -> np.ndarray:
        allowed: np.ndarray = self.budgets[stack.members] * (S**2).sum(1)
        return allowed

    def _records(self, energy: np.ndarray, widths: np.ndarray, budget: np.ndarray) -> float:
        return float(self.record_sizes(energy, widths, budget).sum())

    def record_sizes(
        self, energy: np.ndarray, widths: np.ndarray, budget: np.ndarray
    ) -> np.ndarray:
        """(n,) bytes of records with these components (n, k) of these widths (k,).

        Args:
            budget: (n,) squared error of each; not looked at where a size is asked for.
        """
        o = self.options
        if o.tolerance is None:
            bits = 32.0 if o.bits is None else o.bits
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

    def _sharing(self, stack: Stack, S: np.ndarray, form: str, limit: float) -> list[ModulePlan]:
        """The best fitted plan of one form, or none where nothing is shared."""
        choices = {
            "U": self._partitions(stack, "U") if form in ("output", "shared") else [None],
            "V": self._partitions(stack, "V") if form in ("input", "shared") else [None],
        }
        norms = (S**2).sum(1)
        weights = np.zeros(int(stack.members.max()) + 1)
        weights[stack.members] = np.where(norms > 0, 1 / np.where(norms > 0, norms, 1), 0)
        spectra = {
            side: [
                None if p is None else self._spectra(stack, weights, p, side) for p in choices[side]
            ]
            for side in "UV"
        }
        best: tuple[float, float, int, int] | None = None
        thetas = _THETAS if self.options.tolerance is not None else (1.0,)
        for (a, U), (b, V) in product(enumerate(spectra["U"]), enumerate(spectra["V"])):
            for theta in thetas:
                size = self._predict(stack, S, theta, (choices["U"][a], U), (choices["V"][b], V))
                if best is None or size < best[0]:
                    best = (size, theta, a, b)
        assert best is not None
        size, theta, a, b = best
        if size > limit:
            return []
        return [
            self._fitted(
                stack,
                S,
                weights,
                form,
                theta,
                (choices["U"][a], spectra["U"][a]),
                (choices["V"][b], spectra["V"][b]),
            )
        ]

    def _partitions(self, stack: Stack, side: str) -> list[Any]:
        everyone = np.zeros(len(stack), np.int64)
        groups = self.groups.get(side)
        if groups is None:
            return [everyone]
        mine = groups[stack.members]
        if not (mine >= 0).any() or (mine == mine[0]).all():
            return [everyone]
        sizes = {g: int((mine == g).sum()) for g in np.unique(mine[mine >= 0])}
        mine = np.where(np.isin(mine, [g for g, n in sizes.items() if n > 1]), mine, -1)
        return [everyone, mine] if (mine >= 0).any() else [everyone]

    def _spectra(
        self, stack: Stack, weights: np.ndarray, groups: np.ndarray, side: str
    ) -> dict[int, Spectrum]:
        d = stack.shape[0 if side == "U" else 1]
        most = d if self.options.rank is None else self.options.rank
        known = self._spectra_found.get((side, groups.tobytes()))
        if known is not None:
            return known
        found: dict[int, Spectrum] = {}
        self._spectra_found[side, groups.tobytes()] = found
        for g in np.unique(groups[groups >= 0]):
            rows = groups == g
            inside = np.zeros(len(weights))
            inside[stack.members[rows]] = weights[stack.members[rows]]
            count = int(stack.ranks[rows].sum())
            columns = partial(_weighted, stack, inside, side)
            found[int(g)] = leading_directions(columns, d, count, most)
        return found

    def _levels(self, spectrum: Spectrum, d: int, theta: float, share: float) -> np.ndarray:
        """Bits of each direction of a side that may spend `share` of the tolerance."""
        o = self.options
        if o.tolerance is not None:
            budget = max(
                theta * share * o.tolerance**2 - spectrum.tail(len(spectrum.energies)), 0.0
            )
            cost = np.full(len(spectrum.energies), d / 8)
            return bits_for_error(spectrum.energies, cost, np.zeros(len(cost), bool), budget)
        kept = len(spectrum.energies)
        if o.energy is not None:
            before = np.cumsum(spectrum.energies) - spectrum.energies
            kept = int((before < o.energy * spectrum.energies.sum()).sum())
        bits = 32 if o.bits is None else int(np.ceil(o.bits))
        return np.where(np.arange(len(spectrum.energies)) < kept, bits, 0)

    def _predict(self, stack: Stack, S: np.ndarray, theta: float, *sides: tuple[Any, Any]) -> float:
        """Bytes of a sharing, from spectra alone."""
        shared = sum(groups is not None for groups, _ in sides)
        total = 0.0
        widths = np.zeros(len(stack))
        spent = np.zeros(len(stack))
        for (groups, spectra), d in zip(sides, stack.shape, strict=True):
            if groups is None:
                widths += d
                continue
            widths[groups < 0] += d
            for g, spectrum in spectra.items():
                levels = self._levels(spectrum, d, theta, 1 / shared)
                total += levels.sum() * d / 8 + 3 * (levels > 0).sum()
                widths[groups == g] += (levels > 0).sum()
                spent[groups == g] += theta / shared
        allowed = self._allowed(stack, S) * (1 - spent)
        for width in np.unique(widths):
            rows = widths == width
            total += self._records(S[rows] ** 2, np.full(S.shape[1], width), allowed[rows])
        return total

    def _fitted(
        self,
        stack: Stack,
        S: np.ndarray,
        weights: np.ndarray,
        form: str,
        theta: float,
        *sides: tuple[Any, Any],
    ) -> ModulePlan:
        shared: list[Shared | None] = []
        certificate: dict[str, Any] = {}
        count = sum(groups is not None for groups, _ in sides)
        both = count == 2 and all((groups == 0).all() for groups, _ in sides)
        levels = [
            None
            if groups is None
            else {g: self._levels(s, d, theta, 1 / count) for g, s in spectra.items()}
            for (groups, spectra), d in zip(sides, stack.shape, strict=True)
        ]
        directions = [
            None if spectra is None else {g: s.directions for g, s in spectra.items()}
            for _, spectra in sides
        ]
        if both:
            certificate = self._alternated(stack, weights, sides, levels, directions)
        for side, (groups, _), chosen, found in zip("UV", sides, levels, directions, strict=True):
            if groups is None:
                shared.append(None)
                continue
            assert chosen is not None
            assert found is not None
            bases = {}
            for g, bits in chosen.items():
                kept = np.arange(len(bits)) < max(1, (bits > 0).sum())
                levels_kept = np.where(kept, np.maximum(bits, 1), 0)
                bases[g] = coded_basis_of(found[g], levels_kept, side)
            shared.append(Shared(groups, bases))
        return self.with_sides(form, stack, S, shared[0], shared[1], certificate or None)

    def with_sides(
        self,
        form: str,
        stack: Stack,
        S: np.ndarray,
        U: Shared | None,
        V: Shared | None,
        certificate: Any = None,
    ) -> ModulePlan:
        """The plan of a stack on sides that are there, from what these really miss."""
        tails = self._tails(stack, S, U, V)
        nbytes, energy, widths = self._with_tails(stack, S, tails, U, V)
        return ModulePlan(form, energy, widths, nbytes, U, V, certificate=certificate)

    def _alternated(
        self, stack: Stack, weights: np.ndarray, sides: Any, levels: Any, directions: Any
    ) -> dict[str, float]:
        """HOOI on the one pair of sides; the certificate of what it keeps. Replaces directions."""
        (_, sU), (_, sV) = sides
        ranks = [max(1, int((levels[k][0] > 0).sum())) for k in range(2)]
        U, V, kept = alternate(
            stack.blocks, weights, sU[0].directions[:, : ranks[0]], sV[0].directions[:, : ranks[1]]
        )
        tails = sU[0].tail(ranks[0]), sV[0].tail(ranks[1])
        directions[0][0], directions[1][0] = U, V
        levels[0][0] = levels[0][0][: U.shape[1]]
        levels[1][0] = levels[1][0][: V.shape[1]]
        return {
            "tail_out": tails[0],
            "tail_in": tails[1],
            "achieved": max(0.0, 1 - kept),
            "bound": sum(tails),
        }

    def _tails(self, stack: Stack, S: np.ndarray, U: Shared | None, V: Shared | None) -> np.ndarray:
        """(N,) squared norm that the coded sides miss of each update."""
        tails = np.zeros(len(stack))
        for block, rows in numbered(stack):
            for (u, v), members in side_pairs(rows, U, V).items():
                part = block.take(members)
                bases = basis_at(U, u), basis_at(V, v)
                if bases == (None, None):
                    continue
                left, right = projected(part, *bases)
                # A least-squares projection is orthogonal to what it misses. This is a guess for
                # planning only, good to 1e-7 of the norm.
                missed = (part.S**2).sum(1) - weighted_norms(left, right, *bases)
                tails[rows[members]] = missed.clamp_min(0).cpu().numpy()
        return tails

    def _with_tails(
        self, stack: Stack, S: np.ndarray, tails: np.ndarray, U: Shared | None, V: Shared | None
    ) -> tuple[float, np.ndarray, np.ndarray]:
        """Predicted bytes, and the components: core at its widths, residual at full width."""
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
        return nbytes + self._records(energy, widths, self._allowed(stack, S)), energy, widths

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
        over = energy.sum(1) > self._allowed(stack, S)
        if over.any():
            nbytes += float(
                predicted_nbytes(energy[over], widths, self._allowed(stack, S)[over]).sum()
            )
        return ModulePlan("flat", energy, widths, nbytes, flat=bases, fixed=fixed)


def flat_count(s: flat.FlatSpectrum, energy: float) -> int:
    """Directions of a flat side that keep this share of the centred energy."""
    before = np.cumsum(s.energies) - s.energies
    return int((before < energy * s.energies.sum()).sum())


def coded_basis_of(directions: torch.Tensor, levels: np.ndarray, side: str) -> Basis:
    """Code the leading directions at these bits."""
    from .sides import basis_of

    return basis_of(directions[:, : len(levels)], levels[: directions.shape[1]], side)


def numbered(stack: Stack) -> Iterator[tuple[Block, np.ndarray]]:
    """The stack's blocks, each with its rows in the stack."""
    start = 0
    for block in stack.blocks():
        yield block, np.arange(start, start + len(block.members))
        start += len(block.members)


def _weighted(stack: Stack, weights: np.ndarray, side: str) -> Iterator[torch.Tensor]:
    for block in stack.blocks():
        rows = np.flatnonzero(weights[block.members] > 0)
        if len(rows):
            yield from side_columns([block.take(rows)], weights, side)
