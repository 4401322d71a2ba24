"""3-D expert parameters: W + c · ΔW stands in for W while the experts' module runs.

Routing gives each expert the tokens it likes, so the rows of a batch are no longer seen: one mix
runs for the whole batch. The sums are made for each forward pass and let go after it; this is the
one place where a dense update is formed while a model runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ...layers.swap import Swapped
from ...lowrank import LowRank
from ...naming import Base
from ...parts import Layout, Parts
from ...placing import applied, placed
from ..selection import Row
from .board import Board, Site


class AttachedExperts(Swapped):
    """Mixed into the class of a module with attached expert parameters."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        child: Any = self.lorafold
        with child.standing_in():
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class Experts(Site):
    """What is added to the parameters of one experts' module."""

    knows_rows = False

    def __init__(self, board: Board, path: str, module: nn.Module) -> None:
        super().__init__(board, path, module)
        self._layouts: dict[str, dict[str, Layout]] = {}  # by name, {path of an update: its layout}

    def has(self, name: str) -> bool:
        return name in self._layouts

    def put(self, name: str, layouts: Mapping[str, Layout]) -> None:
        """An adapter has updates at these paths."""
        self._layouts[name] = dict(layouts)

    def drop(self, name: str) -> None:
        self._layouts.pop(name, None)

    def merged(self, row: Row) -> dict[str, Tensor]:
        layouts = {p: own for n, _ in row.mix for p, own in self._layouts.get(n, {}).items()}
        found = {path: self.board.summed(path, row) for path in layouts}
        updates: dict[str, LowRank] = {path: u for path, u in found.items() if u is not None}
        own = self.module.named_parameters(recurse=False)
        state = {f"{self.path}.{n}": p.detach() for n, p in own}
        parts = Parts({p: u.shape for p, u in updates.items()}, {}, {}, layouts)
        plan = placed(parts, Base.of_state(state))
        device = next(iter(state.values())).device
        moved = {p: u.to(device) for p, u in updates.items()}
        new = applied(plan, state, lambda spot: moved[spot.part])
        return {key.rpartition(".")[2]: W for key, W in new.items() if W is not state[key]}

    @contextlib.contextmanager
    def standing_in(self) -> Iterator[None]:
        """Run the module with what is in use; an instance's attribute hides its parameter."""
        row = self.board.row
        weights = {} if row is None else self.merged(row)
        try:
            vars(self.module).update(weights)
            yield
        finally:
            for name in weights:
                del vars(self.module)[name]
