"""The first pass over a collection: what its modules are like, and the plans worth writing.

Every module's singular values (r×r work) and init groups; where sharing may pay, the fitted sides.
All forms are tried on a few modules; the others follow those that won there.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ..collection.batch import Block, Factors, norms, singular_values
from ..collection.collection import Collection
from ..collection.groups import init_groups, probes
from ..errors import MismatchError
from .options import Options, Progress
from .planning.costs import Costs
from .planning.forms import Planner
from .planning.plan import ModulePlan

_PROBES = 4  # modules on which all forms are tried before the others follow the winners
_LARGEST = 1e37  # of a singular value: coefficients are float32
_NEAR = 1.05  # plans predicted within this factor of the smallest are written out and compared,
# where the collection stays in memory; otherwise the smallest is written, and nothing else is read


class Survey:
    """What is known of a collection before it is written.

    Args:
        collection: the adapters. options: how to fold. tolerances: (folded,) each adapter's bound.
        progress: called with (done, total, stage).

    Attributes:
        stacks: module path → the folded adapters that have it. costs: what forms cost.
        groups: side → (folded,) init groups; singular_values: path → (N, r) by row of the stack.
            Both after `measure`.
    """

    def __init__(
        self,
        collection: Collection,
        options: Options,
        tolerances: np.ndarray,
        progress: Progress | None = None,
    ) -> None:
        self.collection = collection
        self.options = options
        self.tolerances = tolerances
        self.progress = progress or (lambda done, total, stage: None)
        stacks = {p: collection.stack(p) for p in collection.paths}
        self.stacks = {p: s for p, s in stacks.items() if s is not None}
        self.groups: dict[str, np.ndarray] = {}
        self.singular_values: dict[str, np.ndarray] = {}
        self.costs = Costs(options, tolerances**2)

    def measure(self) -> None:
        """Init groups and every module's singular values."""
        count = self.collection.folded
        if count > 1:
            stacks = list(self.stacks.values())
            self.groups = {side: init_groups(stacks, count, side) for side in "UV"}
        for k, (path, stack) in enumerate(self.stacks.items()):
            self.progress(k, 2 * len(self.stacks), "measuring")
            S = [self._spectra(f).cpu().numpy() for f in stack.factors()]
            stack.forget()
            width = max(s.shape[1] for s in S)
            self._found(path, np.concatenate([_wide(s, width) for s in S]))

    def _found(self, path: str, S: np.ndarray) -> None:
        """Keep a module's singular values, which float32 must hold."""
        top = S.max(1, initial=0.0)
        if not (top <= _LARGEST).all():
            row = int(np.flatnonzero(~(top <= _LARGEST))[0])
            name = self.collection.names[int(self.stacks[path].members[row])]
            raise MismatchError(
                f"adapter {name!r}: its update at {path!r} is of norm {top[row]:.3g}, and float32 "
                f"coefficients go up to {_LARGEST:g}; leave it out, or use form='exact'"
            )
        self.singular_values[path] = S

    def _spectra(self, f: Factors) -> torch.Tensor:
        """Singular values (n, r); where no bits depend on them, what has their norm, (n, 1)."""
        if self.options.tolerance is None and self.options.form == "flat":
            return norms(f)
        exact = self.options.tolerance is not None and self.tolerances.min(initial=1.0) < 0.01
        return singular_values(f, exact)

    def know(self, path: str, factors: Factors, block: Block) -> None:
        """Take in a module that was read and decomposed elsewhere."""
        self.stacks[path].hold(factors, block)
        self._found(path, block.S.cpu().numpy())

    def plans(self, many: int) -> Iterator[dict[str, ModulePlan]]:
        """The plans worth writing, the cheapest by prediction first.

        Args:
            many: torch threads that flat sides are worth.
        """
        planner = Planner(self.costs, self.groups, many)
        forms = self._forms()
        if len(forms) == 1 or not self.stacks:
            yield self._each(planner, forms)
            return
        paths = list(self.stacks)
        won: dict[str, float] = {}
        totals: dict[str, float] = {}
        for j in probes(len(paths), _PROBES):
            plans = self._candidates(planner, paths[j], forms)
            for plan in plans:
                totals[plan.form] = totals.get(plan.form, 0.0) + plan.nbytes
            won[plans[0].form] = won.get(plans[0].form, 0.0) + plans[0].nbytes
        near = _NEAR if self.collection.stays else 1.0
        smallest = min(totals.values())
        worth = [f for f in forms if f in won or totals.get(f, np.inf) < near * smallest]
        mix: dict[str, ModulePlan] = {}
        sizes: dict[str, float] = dict.fromkeys(worth, 0.0)
        for path in paths:
            plans = self._candidates(planner, path, worth)
            mix[path] = plans[0]
            by_form = {plan.form: plan.nbytes for plan in plans}
            for form in worth:
                sizes[form] += by_form.get(form, by_form.get("svd", plans[0].nbytes))
        yield mix
        cost = sum(plan.nbytes for plan in mix.values())
        for form in worth:
            differs = any(plan.form != form for plan in mix.values())
            if differs and sizes[form] < near * cost:
                yield self._each(planner, [form, "svd"] if form == "flat" else [form])

    def _forms(self) -> list[str]:
        form = self.options.form
        if form != "auto":
            return [form]
        if self.options.tolerance is None or self.collection.folded < 2:
            return ["svd"]
        # Flat before those that keep the decomposed stack in memory.
        return ["svd", "flat", "input", "output", "shared"]

    def _each(self, planner: Planner, forms: list[str]) -> dict[str, ModulePlan]:
        plans = {}
        for path, stack in self.stacks.items():
            found = self._candidates(planner, path, forms)
            if not found:
                raise MismatchError(
                    f"form 'flat' needs one rank at each module; {path!r} has ranks "
                    f"{sorted(set(stack.ranks.tolist()))}: resize the adapters, or take "
                    "another form"
                )
            plans[path] = found[0]
        return plans

    def _candidates(self, planner: Planner, path: str, forms: list[str]) -> list[ModulePlan]:
        stack = self.stacks[path]
        plans = planner.candidates(stack, self.singular_values[path], forms)
        for plan in plans:
            plan.release()
        stack.forget()
        return plans

    def plain_svd_nbytes(self) -> int:
        """Bytes that truncated SVD of each adapter in float16 takes at the same tolerance.

        Directions are kept over all modules by energy per byte, the best a truncation can do.
        """
        if self.options.tolerance is None:
            return 0
        total = 0
        for i, tolerance in enumerate(self.tolerances):
            energy, width = [], []
            for path, stack in self.stacks.items():
                row = np.searchsorted(stack.members, i)
                if row < len(stack) and stack.members[row] == i:
                    energy.append(self.singular_values[path][row] ** 2)
                    width.append(np.full(len(energy[-1]), sum(stack.shape)))
            if not energy:
                continue
            e, w = np.concatenate(energy), np.concatenate(width)
            order = np.argsort(-e / w, kind="stable")
            left = e.sum() - np.cumsum(e[order])
            kept = 1 + int((left > tolerance**2 * e.sum()).sum())
            total += 2 * int(w[order][:kept].sum())
        return total

    def totals(self) -> np.ndarray:
        """(folded,) squared norms of the adapters."""
        total = np.zeros(self.collection.folded)
        for path, stack in self.stacks.items():
            total[stack.members] += (self.singular_values[path] ** 2).sum(1)
        return total

    @property
    def cuts(self) -> bool:
        """Whether a rank or an energy drops directions of an adapter's own."""
        o = self.options
        return o.form in ("svd", "auto") and (o.rank is not None or o.energy is not None)

    def cut(self, block: Block) -> Block:
        """The block without the directions that a rank or an energy drops."""
        if not self.cuts:
            return block
        S = block.S.cpu().numpy()
        keep = self.costs.used(S)
        return Block(
            block.members,
            block.U,
            torch.where(torch.as_tensor(keep, device=block.S.device), block.S, 0.0),
            block.V,
        )


def _wide(S: np.ndarray, width: int) -> np.ndarray:
    """(n, r) singular values with zeros to (n, width)."""
    return np.pad(S, ((0, 0), (0, width - S.shape[1])))
