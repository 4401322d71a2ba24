"""What shared sides would cost at one module, and the plan of what is cheapest.

At a tolerance t an adapter may lose t² ‖ΔW_i‖². A shared side spends a part θ of that on its own
dropped directions and rounding, and in return every update needs only its coordinates. The
prediction runs over a few θ and over who shares (nobody, the init groups, everybody) on either
side, on spectra alone. What wins is then fitted, and its real tails replace the guess.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from ...collection.stack import Stack
from ..coding.bases import bases_of
from ..coding.bits import bits_for_error
from ..coding.codebook import DISTORTION
from ..options import Options
from .averaging import Columns, averaged_bits
from .costs import Costs, reaching
from .directions import Groups, Key, Spans, Spectrum
from .plan import ModulePlan, Shared

_THETAS = (0.03, 0.1, 0.25, 0.5)  # shares of the tolerance that a shared side may spend
_SETTLED = 0.1  # of the smallest of these shares: what a sketch may miss unasked
_FINE = 0.01  # tolerances below this need float64 Grams
_HELD_BLOCKS = 64  # groups whose sides take more bytes than so many blocks are not looked at
_COLUMNS = 1024  # of a side that a search holds at most, about
SIDES = {"input": "V", "output": "U", "shared": "UV"}  # form -> the sides that are shared

Choice = int | None  # number of a partition; None for a side that is each adapter's own
_Chosen = tuple[str, int, Key | None, dict[int, Spectrum]]


class Sharing:
    """The ways to share sides at one module.

    Args:
        costs: of plans, under the fold's options. init_groups: side → (N_all,) init groups.
        stack: the updates. S: (N, r) their singular values. forms: those that will be asked for.
    """

    def __init__(
        self,
        costs: Costs,
        init_groups: Mapping[str, np.ndarray],
        stack: Stack,
        S: np.ndarray,
        forms: Sequence[str],
    ) -> None:
        self._costs, self._init_groups, self._stack, self._S = costs, init_groups, stack, S
        norms = (S**2).sum(1)
        weights = np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)
        self._groups: dict[Key, np.ndarray] = {
            (side, k): groups
            for side in sorted({side for form in forms for side in SIDES[form]})
            for k, groups in enumerate(self._partitions(side))
        }
        self._side_bits: dict[tuple[Key | None, float], dict[int, np.ndarray]] = {}
        self._averages: dict[tuple[Choice, Choice], tuple[list[dict[int, np.ndarray]], float]] = {}
        shares = {1 / len(SIDES[form]) for form in forms}
        tolerance = costs.budgets[stack.members].min() ** 0.5
        self._spans = Spans(
            stack,
            weights,
            self._groups,
            Needs(costs.options, shares),
            exact=costs.options.tolerance is not None and tolerance < _FINE,
        )

    def plan(self, form: str, limit: float) -> ModulePlan | None:
        """The best plan of a form, fitted; None where it is predicted to be above `limit` bytes."""
        choices = [
            [k for s, k in self._groups if s == side] if side in SIDES[form] else [None]
            for side in "UV"
        ]
        thetas = _THETAS if self._costs.options.tolerance is not None else (1.0,)
        ways = [
            (self._predicted(theta, U, V), theta, U, V)
            for U, V in product(*choices)
            for theta in thetas
        ]
        size, theta, U, V = min(ways, key=lambda way: way[0])
        return None if size > limit else self._fitted(form, theta, U, V)

    def _partitions(self, side: str) -> list[np.ndarray]:
        everyone = np.zeros(len(self._stack), np.int64)
        groups = self._init_groups.get(side)
        if groups is None:
            return [everyone]
        mine = groups[self._stack.members]
        if not (mine >= 0).any() or (mine == mine[0]).all():
            return [everyone]
        d = self._stack.shape[0 if side == "U" else 1]
        room, kept = _HELD_BLOCKS * self._stack.block_bytes, []
        numbers, sizes = np.unique(mine[mine >= 0], return_counts=True)
        for g in numbers[np.argsort(-sizes, kind="stable")].tolist():  # the largest first
            alone = int((mine == g).sum()) < 2
            room -= 4 * d * min(int(self._stack.ranks[mine == g].sum()), d, _COLUMNS)
            if alone or room < 0:
                break
            kept.append(g)
        mine = np.where(np.isin(mine, kept), mine, -1)
        return [everyone, mine] if (mine >= 0).any() else [everyone]

    def _chosen(self, U: Choice, V: Choice) -> list[_Chosen]:
        """Side, its length, the partition and its spectra, for either side."""
        found: list[_Chosen] = []
        for side, d, k in zip("UV", self._stack.shape, (U, V), strict=True):
            key: Key | None = None if k is None else (side, k)
            found.append((side, d, key, {} if key is None else self._spans.spectra[key]))
        return found

    def _predicted(self, theta: float, U: Choice, V: Choice) -> float:
        """Bytes of a sharing, from spectra alone."""
        stack, S = self._stack, self._S
        share = 1 / sum(k is not None for k in (U, V))
        found, rate = self._levels(theta, U, V)
        total = 0.0
        widths = np.zeros(len(stack))
        spent = np.zeros(len(stack))
        for (_, d, key, spectra), levels_of in zip(self._chosen(U, V), found, strict=True):
            if key is None:
                widths += d
                continue
            groups = self._groups[key]
            widths[groups < 0] += d
            for g in spectra:
                levels = levels_of[g]
                if not len(levels):  # nothing to share
                    widths[groups == g] += d
                    continue
                total += levels.sum() * d / 8 + 3 * (levels > 0).sum()
                widths[groups == g] += (levels > 0).sum()
                spent[groups == g] += theta * share
        allowed = self._costs.allowed(stack, S) * (1 - spent)
        for width in np.unique(widths):
            rows = widths == width
            sizes = self._costs.record_sizes(
                S[rows] ** 2, np.full(S.shape[1], width), allowed[rows], rate
            )
            total += float(sizes.sum())
        return total

    def _levels(
        self, theta: float, U: Choice, V: Choice
    ) -> tuple[list[dict[int, np.ndarray]], float | None]:
        """Bits of the directions on either side by group; the average that is left for cores."""
        sides = self._chosen(U, V)
        if self._costs.options.coded:
            if (U, V) not in self._averages:
                self._averages[U, V] = self._averaged(sides)
            return self._averages[U, V]
        share = 1 / sum(key is not None for _, _, key, _ in sides)
        return [
            self._side_levels(key, d, spectra, theta * share) for _, d, key, spectra in sides
        ], None

    def _side_levels(
        self, key: Key | None, d: int, spectra: dict[int, Spectrum], share: float
    ) -> dict[int, np.ndarray]:
        """Bits of each direction of a side that may spend `share` of the squared tolerance."""
        found = self._side_bits.get((key, share))
        if found is None:
            found = self._side_bits[key, share] = self._bits_of_directions(d, spectra, share)
        return found

    def _bits_of_directions(
        self, d: int, spectra: dict[int, Spectrum], share: float
    ) -> dict[int, np.ndarray]:
        o = self._costs.options
        energies = {g: s.energies[: s.directions.shape[1]] for g, s in spectra.items()}
        if o.tolerance is None:
            bits = 32 if o.bits is None else int(o.bits)
            kept = {
                g: len(e) if o.energy is None else reaching(e, o.energy)
                for g, e in energies.items()
            }
            return {g: np.where(np.arange(len(e)) < kept[g], bits, 0) for g, e in energies.items()}
        alike: dict[int, list[int]] = {}  # there may be a group for every two adapters
        for g, e in energies.items():
            alike.setdefault(len(e), []).append(g)
        found: dict[int, np.ndarray] = {}
        for count, groups in alike.items():
            missed = np.array([spectra[g].tail(count) for g in groups])
            budgets = np.maximum(share * o.tolerance**2 - missed, 0.0)
            rows = bits_for_error(np.stack([energies[g] for g in groups]), d / 8, False, budgets)
            found |= dict(zip(groups, rows, strict=True))
        return {g: found[g] for g in energies}

    def _averaged(self, sides: list[_Chosen]) -> tuple[list[dict[int, np.ndarray]], float]:
        """As `_levels`, where an average number of bits holds over bases and cores together."""
        o = self._costs.options
        assert o.bits is not None
        own = np.zeros(len(self._stack))
        columns, names = [], []
        for at, (_, d, key, spectra) in enumerate(sides):
            groups = np.full(len(own), -1) if key is None else self._groups[key]
            own += d * (groups < 0)
            for g, s in spectra.items():
                energies = s.energies[: s.directions.shape[1]]
                if o.energy is not None:
                    energies = energies[: reaching(energies, o.energy)]
                users = groups == g
                columns.append(Columns(d, users, energies * users.sum()))
                names.append((at, g))
        given = o.rank is not None or o.energy is not None
        found, rate = averaged_bits(o.bits, columns, self._S, own, keep_all=given)
        levels: list[dict[int, np.ndarray]] = [{}, {}]
        for (at, g), bits in zip(names, found, strict=True):
            missing = sides[at][3][g].directions.shape[1] - len(bits)
            levels[at][g] = np.pad(bits, (0, missing))
        return levels, rate

    def _fitted(self, form: str, theta: float, U: Choice, V: Choice) -> ModulePlan:
        sides = self._chosen(U, V)
        shared = [key is not None for _, _, key, _ in sides]
        levels, rate = self._levels(theta, U, V)
        directions = [{g: s.directions for g, s in spectra.items()} for *_, spectra in sides]
        certificate: dict[str, float] | None = None
        if all(shared) and all((self._groups[key] == 0).all() for *_, key, _ in sides if key):
            ranks = [max(1, int((found[0] > 0).sum())) for found in levels]
            certificate = self._alternated(sides, ranks, directions)
        plans: list[Shared | None] = []
        bases: list[tuple[Key, Groups] | None] = []
        for (side, _, key, _), bits, found in zip(sides, levels, directions, strict=True):
            if key is None:
                plans.append(None)
                bases.append(None)
                continue
            at_least = {}
            for g, X in found.items():
                if X.shape[1]:  # otherwise zero in all of the group: nothing to share
                    kept = np.arange(X.shape[1]) < max(1, (bits[g] > 0).sum())
                    at_least[g] = np.where(kept, np.maximum(bits[g][: X.shape[1]], 1), 0)
            coded = bases_of({g: found[g] for g in at_least}, at_least, side)
            there = np.where(np.isin(self._groups[key], list(coded)), self._groups[key], -1)
            plans.append(Shared(there, coded) if coded else None)
            bases.append((key, coded))
        tails = self._spans.missed(bases[0], bases[1])
        return self._costs.on_shared_sides(
            form, self._stack, self._S, tails, plans[0], plans[1], certificate, rate
        )

    def _alternated(self, sides: Any, ranks: list[int], directions: Any) -> dict[str, float]:
        """HOOI on the one pair of sides; the certificate of what it keeps. Replaces directions.

        Returns:
            tail_out, tail_in: what no basis of this rank can avoid to miss. achieved: what the pair
            misses. bound: on that, the sum of what its HOSVD start misses on either side.
        """
        (_, _, key_U, sU), (_, _, key_V, sV) = sides
        ranks = [min(r, s[0].directions.shape[1]) for r, s in zip(ranks, (sU, sV), strict=True)]
        U, V, kept = self._spans.tucker((key_U, key_V), (ranks[0], ranks[1]))
        directions[0][0], directions[1][0] = U, V
        return {
            "tail_out": sU[0].least(ranks[0]),
            "tail_in": sV[0].least(ranks[1]),
            "achieved": max(0.0, 1 - kept),
            "bound": sU[0].tail(ranks[0]) + sV[0].tail(ranks[1]),
        }


class Needs:
    """How far to look for the directions of shared sides (a `spans.Wish`).

    Args:
        options: of the fold. shares: parts of what sides may spend that one of them gets.
    """

    def __init__(self, options: Options, shares: set[float]) -> None:
        self._options = options
        self.most = options.rank
        self._budgets: list[float] = []
        if options.tolerance is not None:
            self._budgets = [x * s * options.tolerance**2 for x in _THETAS for s in shares]

    def settled(self, missed: float) -> bool:
        return missed <= _SETTLED * min(self._budgets) if self._budgets else missed <= self._lost()

    def _lost(self) -> float:
        """A share that is small beside what rounding at an average number of bits loses."""
        o = self._options
        return _SETTLED * DISTORTION[int(np.ceil(o.bits))] if o.bits and o.coded else 1e-12

    def enough(self, energies: np.ndarray, further: int) -> bool:
        weakest = float(energies[-1]) if len(energies) else 0.0
        missed = max(0.0, 1 - float(energies.sum()))
        if self._options.energy is not None:
            short = self._options.energy - (1 - missed)
            return short <= 0 or short > further * weakest
        if not self._budgets:
            return weakest * further <= self._lost()
        for budget in self._budgets:
            if missed > budget:
                reached = missed - budget <= further * weakest
            else:
                reached = bits_for_error(energies, 1.0, False, budget - missed)[-1] > 0
            if reached:
                return False
        return True

    def needed(self, energies: np.ndarray) -> int:
        count = len(energies)
        if not self._budgets or not count:
            return count
        missed = max(0.0, 1 - float(energies.sum()))
        within = [b - missed for b in self._budgets if b >= missed]
        if not within:
            return count
        return int((bits_for_error(energies, 1.0, False, min(within)) > 0).sum())
