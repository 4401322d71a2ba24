"""The first pass over a collection: what its modules are like, and the plans worth writing.

Every module's singular values (r×r work) and init groups; where sharing may pay, the fitted sides.
All forms are tried on a few modules; the others follow those that won there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

import numpy as np

from ...collection.batch import Block, Factors
from ...collection.collection import Collection
from ...collection.groups import init_groups, probes
from ...collection.stack import Stack, batches, parts_of
from ...errors import MismatchError
from ...scale.engine import Engine, Task
from ...words import from_to
from ..options import Options, Progress
from ..planning.costs import Costs
from ..planning.forms import Planner
from ..planning.plan import ModulePlan
from .tasks import candidates, measured, wide

_PROBES = 4  # modules on which all forms are tried before the others follow the winners
_LARGEST = 1e37  # of a singular value: coefficients are float32
_NEAR = 1.05  # plans predicted within this factor of the smallest are written out and compared
_LITTLE = 1 << 20  # numbers, where the collection has no more: there predictions are poor, and of a
# larger one that never gained a hundredth


class Survey:
    """What is known of a collection before it is written.

    Args:
        collection: the adapters. options: how to fold. tolerances: (folded,) each adapter's bound.
        progress: called with (done, total, stage). engine: who does the work.

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
        engine: Engine | None = None,
    ) -> None:
        self.collection = collection
        self.options = options
        self.engine = engine or Engine()
        self.tolerances = tolerances
        self.progress = progress or (lambda done, total, stage: None)
        stacks = {p: collection.stack(p) for p in collection.paths}
        self.stacks = {p: s for p, s in stacks.items() if s is not None}
        self.groups: dict[str, np.ndarray] = {}
        self.singular_values: dict[str, np.ndarray] = {}
        self.costs = Costs(options.bare(), tolerances**2)

    def measure(self) -> None:
        """Init groups and every module's singular values."""
        count = self.collection.folded
        if count > 1:
            stacks = list(self.stacks.values())
            self.groups = {side: init_groups(stacks, count, side, self.engine) for side in "UV"}
        by_path: dict[str, list[np.ndarray]] = {path: [] for path in self.stacks}
        total = len(self.collection.blocks if self.engine.spread else self.stacks)
        done = 0
        for spectra, digests in self.engine.map(measured, self._measuring()):
            self.progress(done, 2 * total, "measuring")
            done += 1 if self.engine.spread else len(spectra)
            self.collection.know(digests)
            for path, S in spectra.items():
                by_path[path].append(S)
        for path, found in by_path.items():
            width = max(S.shape[1] for S in found)
            self._found(path, np.concatenate([wide(S, width) for S in found]))

    def _measuring(self) -> Iterator[Task]:
        """Elsewhere a task is a block of adapters, whose files nobody else reads; here it is a
        module, which so is read once for all that is done with it.
        """
        together = batches(self.stacks.values())
        if not self.engine.spread:
            for stacks in together:
                name = from_to("module", [stack.path for stack in stacks])
                yield Task(name, (self.costs, [stacks], self.collection.blocks))
            return
        for first, end, parts in self.blocks():
            theirs = [[parts[s.path] for s in stacks if s.path in parts] for stacks in together]
            own = [stacks for stacks in theirs if stacks]
            yield Task(self.collection.called(first, end), (self.costs, own, [(first, end)]))

    def blocks(self) -> Iterator[tuple[int, int, dict[str, Stack]]]:
        """The adapters that are worked on together: first and end, and path → what they have."""
        return parts_of(self.stacks.values(), self.collection.blocks)

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

    def know(self, path: str, factors: Factors, block: Block) -> None:
        """Take in a module that was read and decomposed elsewhere."""
        self.stacks[path].hold(factors, block)
        self._found(path, block.S.cpu().numpy())

    def plans(self) -> Iterator[dict[str, ModulePlan]]:
        """The plans worth writing, the cheapest by prediction first."""
        forms = self._forms()
        if len(forms) == 1 or not self.stacks:
            yield self._each(forms)
            return
        paths = list(self.stacks)
        won: dict[str, float] = {}
        totals: dict[str, float] = {}
        probed = [paths[j] for j in probes(len(paths), _PROBES)]
        tried = dict(zip(probed, self._candidates(probed, forms), strict=True))
        for plans in tried.values():
            for plan in plans:
                totals[plan.form] = totals.get(plan.form, 0.0) + plan.nbytes
            won[plans[0].form] = won.get(plans[0].form, 0.0) + plans[0].nbytes
        near = _NEAR if self.collection.num_parameters <= _LITTLE else 1.0
        smallest = min(totals.values())
        # Nothing is cheaper to plan than "svd", and it is there at every module.
        near_it = [f for f in forms[1:] if f in won or totals.get(f, np.inf) < near * smallest]
        worth = ["svd", *near_it]
        mix: dict[str, ModulePlan] = {}
        sizes: dict[str, float] = dict.fromkeys(worth, 0.0)
        known = {path: [p for p in plans if p.form in worth] for path, plans in tried.items()}
        others = [path for path in paths if path not in known]
        found = zip(others, self._candidates(others, worth), strict=True)
        for path, plans in chain(known.items(), found):
            mix[path] = plans[0]
            by_form = {plan.form: plan.nbytes for plan in plans}
            for form in worth:
                sizes[form] += by_form.get(form, by_form.get("svd", plans[0].nbytes))
        yield {path: mix[path] for path in paths}
        cost = sum(plan.nbytes for plan in mix.values())
        for form in worth:
            differs = any(plan.form != form for plan in mix.values())
            if differs and sizes[form] < near * cost:
                yield self._each([form, "svd"] if form == "flat" else [form])

    def _forms(self) -> list[str]:
        form = self.options.form
        if form != "auto":
            return [form]
        if self.options.tolerance is None or self.collection.folded < 2:
            return ["svd"]
        # Flat before those that keep the decomposed stack in memory.
        return ["svd", "flat", "input", "output", "shared"]

    def _each(self, forms: list[str]) -> dict[str, ModulePlan]:
        plans = {}
        for path, found in zip(self.stacks, self._candidates(self.stacks, forms), strict=True):
            if not found:
                raise MismatchError(
                    f"form 'flat' needs one rank at each module; {path!r} has ranks "
                    f"{sorted(set(self.stacks[path].ranks.tolist()))}: resize the adapters, or "
                    "take another form"
                )
            plans[path] = found[0]
        return plans

    def _candidates(self, paths: Iterable[str], forms: list[str]) -> Iterator[list[ModulePlan]]:
        """Of some modules, the plans in each of `forms` that applies, cheapest first."""
        planner = Planner(self.costs, self.groups)
        # Those that share nothing look at no update: nothing to send anywhere.
        engine = Engine() if forms == ["svd"] else self.engine
        tasks = [
            Task(
                f"module {path!r}", (planner, self.stacks[path], self.singular_values[path], forms)
            )
            for path in paths
        ]
        return engine.map(candidates, tasks)

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
