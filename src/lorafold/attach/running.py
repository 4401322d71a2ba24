"""What runs: what `use` chose, what runs in the background, and what is merged.

`show` alone writes what the sites of a model run.

Kept rounds run in the background of whatever is current. Their updates are joined at each layer
into one pair of factors, their coefficients in B; a dense ΔW never appears. A gate says when they
run: "current", only where a current adapter has c ≠ 0, so that the reference pass c = 0 is the
pristine base; "always"; or a function of the rows' coefficients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import MismatchError, RefusedError, UnknownNameError
from ..layers.modes import outside_inference_mode
from ..layers.targets import matches, pattern_hint, shown
from ..lowrank import LowRank
from ..words import did_you_mean
from .choices import Choice, Choices
from .guard import Pauses
from .run.active import KEPT, Active, Rule
from .run.board import Board, Site
from .run.patch import Patch
from .run.slots import Slots
from .selection import Row, Selection, prefix
from .sources import Source, Trained

Gate: TypeAlias = "str | Callable[[Tensor], Any]"
MOST_SIZES = 64  # of selections whose tensors are remembered
BASE = Selection((Row(),))


@dataclass(frozen=True)
class Merged:
    """What is merged into the weights.

    Args:
        row: the mix. kept: {(module, parameter): what stood there}. untied: configurations that
            said before that output layer and embedding are one weight.
    """

    row: Row
    kept: Mapping[tuple[str, str], nn.Parameter | None]
    untied: Sequence[Any] = ()


class Running:
    """What runs on a model.

    Args:
        board, sites, sources, slots: the model's.

    Attributes:
        merged: what is merged into the weights, None for nothing. pauses: of the trained ranks.
        gate: see `Live.gate`. kept: {name: c} of the background.
    """

    def __init__(
        self,
        board: Board,
        sites: Mapping[str, Site],
        sources: Mapping[str, Source],
        slots: Slots,
    ) -> None:
        self._board, self._sites, self._sources, self._slots = board, sites, sources, slots
        self.pauses = Pauses(board, sources)
        self.merged: Merged | None = None
        self.gate: Gate = "current"
        self.kept: dict[str, float] = {}
        self._background: dict[str, dict[str, LowRank]] = {}  # what is kept, as it was then
        self._choices = Choices()
        self._shown: Selection | None = None
        self._active: dict[tuple[int, int, bool, Rule | None], Active] = {}
        self._made_for = -1  # version of the slots that `_active` was made for
        board.connect(self.refresh, self.summed)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_active": {}}

    # Choices

    @property
    def selection(self) -> Selection | None:
        """What is chosen now; None for nothing."""
        return self._choices.last

    @property
    def merged_mix(self) -> dict[str, float]:
        """{name: c} of what is merged."""
        return {} if self.merged is None else dict(self.merged.row.mix)

    def check(self, selection: Selection) -> None:
        """Raise where a selection can't run: ranks, experts by rows, what is merged."""
        for row in selection.rows:
            if row.rank is not None:
                self.check_rank(row)
        self._refuse_experts(selection, (*selection.names, *self.kept))
        if selection.tokens is not None:
            _refuse_by_token(selection, self._sources, self._sites.values())
        if self.merged is not None:
            dialled = (name in self.merged_mix for row in selection.rows for name, _ in row.mix)
            if any(dialled) or not all(row.mix for row in selection.rows):
                raise MismatchError(
                    "no dial reaches what is merged into the weights "
                    f"({', '.join(map(repr, self.merged_mix))}): unmerge() first"
                )

    def _refuse_experts(self, selection: Selection | None, names: Iterable[str]) -> None:
        if selection is None or selection.uniform:
            return
        for site in (s for s in self._sites.values() if not s.knows_rows):
            for name in names:
                if site.has(name) or self._sources[name].update(site.path) is not None:
                    raise RefusedError(
                        f"{name!r} updates the experts of {site.path!r}, where routing hides the "
                        "rows of a batch: use one mix for the whole batch"
                    )

    def check_rank(self, row: Row) -> None:
        """Raise a `MismatchError` for a rank prefix that nothing has."""
        if row.rank is None:
            return
        most = max((self._sources[name].rank for name, _ in row.mix), default=None)
        ranks = row.rank if isinstance(row.rank, Mapping) else {}
        for target in ranks:
            if not any(matches(target, path) for path in self._slots.patches):
                said = f"{shown(target)}, which is no attached module{pattern_hint(target)}"
                raise MismatchError(f"rank= names {said}")
        for k in ranks.values() if isinstance(row.rank, Mapping) else [row.rank]:
            if most is not None and k > most:
                raise MismatchError(
                    f"rank {k} is above that of every module; the largest is {most}"
                )

    def choose(self, selection: Selection) -> Choice:
        """Have a checked selection run from now on, or until its block ends."""
        self.show(selection)
        return self._choices.lay(selection)

    @contextmanager
    def during(self, choice: Choice) -> Iterator[None]:
        """Run what was chosen for the length of a block, and what ran before after it."""
        choice.keep_only(self._sources)
        if self._shown is not choice.selection:  # others have chosen since
            self.show(choice.selection)
        block = self._choices.begin(choice)
        try:
            yield
        finally:
            self._choices.end(block)
            self.show(self.selection)

    def forget(self, name: str) -> None:
        """Nobody runs an adapter any more, in the background neither."""
        self._choices.leave_out([name])
        if name in self.kept:
            self.drop(name)
        self.show(self.selection)

    # What the sites run

    @outside_inference_mode
    def show(self, selection: Selection | None) -> None:
        """Make a checked selection the one that runs."""
        running = BASE if selection is None else selection
        gates = self._gates(selection)
        if self.merged is not None:
            running = running.without(self.merged_mix)
        self.pauses.note()
        packed = None
        # Adapters at c = 0 are shown as well: for a compiled graph that is no other graph.
        if not running.uniform or any(row.mix for row in running.rows) or any(gates):
            try:
                self._load(running)
                active = self._sized(running)
                if running.tokens is not None and not active.weighs(running):
                    active.weigh(running, _numbers(running, self._sources, self._slots.patches))
            except BaseException:
                if selection is not self._shown:  # what runs may have left its slots
                    self.show(self._shown)
                raise
            keys = _keys(running, self._sources) if active.trained else {}
            paths = list(self._slots.patches)
            powers = {n: self._sources[n].prefixes.power for n in running.names}
            active.set(running, self._slots.places, keys, gates, powers, paths)
            packed = active.packed
            for patch, now in zip(self._slots.patches.values(), active.layers, strict=True):
                if patch.now is not now:  # at most layers it is: nothing is called for them
                    patch.show(now)
        else:
            for patch in self._slots.patches.values():
                patch.show(None)
        self._shown = selection
        self._board.show(None if selection is None else running, packed)
        self.pauses.show(selection)

    def refresh(self) -> None:
        """Show the sites anew what runs: layers came, or moved to another device."""
        self._active.clear()
        self.show(self.selection)

    def preload(self, name: str) -> None:
        """Write an adapter into a slot, if one is free."""
        if len(self._slots.places) < self._slots.capacity:
            self._write(name, ())

    def summed(self, path: str, row: Row) -> LowRank | None:
        """What a mix adds to one layer's weight; None for nothing."""
        total: LowRank | None = None
        for name, c in row.mix:
            u = self._sources[name].update(path)
            if u is None or c == 0:
                continue
            k = prefix(row.rank, path, u.rank)
            if k == 0:
                continue
            factor = self._sources[name].prefixes.factor(u.rank, k)
            part = c * factor * (u if k == u.rank else u.prefix(k))
            total = part if total is None else total + part
        return total

    def _load(self, selection: Selection) -> None:
        """Have every adapter of a selection in a slot."""
        wanted = [n for n in selection.names if self._sources[n].in_slots]
        if len(wanted) > self._slots.limit:
            raise MismatchError(
                f"{len(wanted)} adapters at once do not fit in {self._slots.limit} slots: attach "
                "with a larger slots="
            )
        for name in wanted:
            if name not in self._slots.places:
                self._write(name, wanted)
            self._slots.touch(name)

    def _write(self, name: str, wanted: Any) -> None:
        slot = self._slots.take(name, wanted)
        try:
            with torch.no_grad():
                self._sources[name].load(self._slots, slot)
        except BaseException:
            self._slots.release(name)  # half of it may be there
            raise

    def _sized(self, selection: Selection) -> Active:
        """The tensors of selections of one size."""
        if self._made_for != self._slots.version:  # banks came or grew
            self._active.clear()
            self._made_for = self._slots.version
        packed = selection.lengths is not None
        rule = None if selection.tokens is None else type(selection.tokens).weights
        size = (selection.height, selection.width, packed, rule)
        if size in self._active:
            self._active[size] = self._active.pop(size)  # the last used goes last
            return self._active[size]
        if len(self._active) >= MOST_SIZES:
            del self._active[next(iter(self._active))]
        patches, tables = self._slots.patches, self._slots.tables
        sources = [s for s in self._sources.values() if isinstance(s, Trained)]
        trained = {s.key: s.table(patches) for s in sources}
        if self.kept:
            ranks = [p.fresh[KEPT].rank if KEPT in p.fresh else 0 for p in patches.values()]
            trained[KEPT] = (torch.tensor(ranks), torch.ones(len(ranks), dtype=torch.float64))
        members = {g: [g in p.banks for p in patches.values()] for g in tables}
        members |= {key: [key in p.fresh for p in patches.values()] for key in trained}
        devices = [p.device for p in patches.values()]
        dtype = torch.promote_types(torch.float32, self._slots.dtype)
        for patch in patches.values():
            for p in patch.fresh.parameters():
                dtype = torch.promote_types(dtype, p.dtype)
        self._active[size] = Active(*size, tables, trained, members, devices, dtype)
        return self._active[size]

    # The background, and what is merged

    def set_gate(self, gate: Any) -> None:
        """See `Live.gate`."""
        if gate not in ("current", "always") and not callable(gate):
            raise MismatchError(f"gate must be 'current', 'always' or a function, found {gate!r}")
        before, self.gate = self.gate, gate
        try:
            self.show(self.selection)
        except BaseException:
            self.gate = before
            raise

    def keep(self, name: str, c: float) -> None:
        """Have an adapter run in the background, as it is now.

        Raises:
            RefusedError: it holds more than updates of layers, or experts where rows are in use.
        """
        self._refuse_experts(self.selection, [name])
        self._background[name], self.kept[name] = self._updates(name), c
        self._choices.leave_out([name])
        self._rebuild()

    def keep_again(self, name: str) -> None:
        """Another adapter has taken the place of one that is kept."""
        if name in self.kept:
            self._background[name] = self._updates(name)
            self._rebuild()

    def drop(self, name: str) -> None:
        """Take an adapter out of the background.

        Raises:
            UnknownNameError: it is not there.
        """
        if name not in self.kept:
            raise UnknownNameError(f"{name!r} is not kept; {did_you_mean(str(name), self.kept)}")
        del self.kept[name], self._background[name]
        self._rebuild()

    def set_merged(self, merged: Merged | None) -> None:
        """This is merged into the weights now, and no longer runs beside them."""
        self.merged = merged
        kept = {} if merged is None else merged.kept
        for path, site in self._sites.items():
            site.stands_for({n: W for (p, n), W in kept.items() if p == path and W is not None})
        self.show(self.selection)

    @outside_inference_mode
    def _updates(self, name: str) -> dict[str, LowRank]:
        more = [s.path for s in self._sites.values() if not isinstance(s, Patch) and s.has(name)]
        if more:
            raise no_background(name, more[0])
        source = self._sources[name]
        return {path: u for path in self._slots.patches if (u := source.update(path)) is not None}

    @outside_inference_mode
    def _rebuild(self) -> None:
        """Make every layer's background from what is kept now."""
        for path, patch in self._slots.patches.items():
            kept = [(self._background[name], c) for name, c in self.kept.items()]
            patch.keep([c * found[path] for found, c in kept if path in found])
        self.refresh()

    def _gates(self, selection: Selection | None) -> list[float]:
        """How much of the background each row gets: none where the base was asked for."""
        if not self.kept:
            return [0.0] * (1 if selection is None else len(selection.rows))
        if selection is None:
            return [float(self.gate == "always")]
        gates = _gates_of(self.gate, selection)
        return [g if row.mix else 0.0 for g, row in zip(gates, selection.rows, strict=True)]


def no_background(name: str, path: str) -> RefusedError:
    """The error for an adapter that is more than updates of layers."""
    return RefusedError(
        f"{name!r} also holds {path!r} (experts, or a module saved whole), which can't run in the "
        "background: merge it instead (live.merge)"
    )


def _gates_of(gate: Gate, selection: Selection) -> list[float]:
    if gate == "always":
        return [1.0] * len(selection.rows)
    if gate == "current":
        return [float(row.on) for row in selection.rows]
    assert callable(gate)
    c = torch.zeros(len(selection.rows), selection.width, dtype=torch.float64)
    for i, row in enumerate(selection.rows):
        for j, (_, value) in enumerate(row.mix):
            c[i, j] = value
    values = torch.as_tensor(gate(c), dtype=torch.float64).flatten()
    if values.numel() not in (1, len(c)):
        raise MismatchError(f"the gate gave {values.numel()} values for {len(c)} rows")
    if not bool(values.isfinite().all()):
        raise MismatchError(f"the gate gave {values.tolist()}, which is not finite")
    found: list[float] = values.expand(len(c)).tolist()
    return found


def _keys(selection: Selection, sources: Mapping[str, Source]) -> dict[str, str]:
    """{name: key} of the trained adapters of a selection."""
    chosen = {name: sources[name] for row in selection.rows for name, _ in row.mix}
    return {name: s.key for name, s in chosen.items() if isinstance(s, Trained)}


def _refuse_by_token(
    selection: Selection, sources: Mapping[str, Source], sites: Iterable[Site]
) -> None:
    """Refuse what has no inputs that a token's weights could be found in."""
    others = [s for s in sites if not (isinstance(s, Patch) and s.kind.linear)]
    for name in selection.names:
        if isinstance(sources[name], Trained):
            raise RefusedError(
                f"{name!r} is trained here, and only adapters that stay as they are can be weighed "
                "token by token: save it and attach that"
            )
        for site in others:
            if site.has(name) or sources[name].update(site.path) is not None:
                raise RefusedError(
                    f"{name!r} changes {site.path!r}, which is no linear layer, and only those are "
                    "weighed token by token: leave it out, or use one mix"
                )


def _numbers(
    selection: Selection, sources: Mapping[str, Source], patches: Mapping[str, Patch]
) -> list[tuple[Tensor, ...]]:
    """What a selection's tokens are weighed by, layer by layer."""
    assert selection.tokens is not None
    found: list[tuple[Tensor, ...]] = []
    for path, patch in patches.items():
        modules = [(name, sources[name].part(path)) for name in selection.mixed]
        linear, inner = patch.kind.linear, patch.dims[1]
        found.append(selection.tokens.numbers(modules, selection.width, inner) if linear else ())
    return found
