"""3-D expert parameters: W + c · ΔW stands in for W while the experts' module runs.

Routing gives each expert the tokens it likes, so the rows of a batch are no longer seen: one mix
runs for the whole batch. The sums are made for each forward pass and let go after it; this is the
one place where a dense update is formed while a model runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ...layers.swap import Swapped
from ...lowrank import LowRank
from ...parts import Layout
from ...placing import add_updates, weight_key

if TYPE_CHECKING:
    from ..selection import Row
    from ..state import Core


class AttachedExperts(Swapped):
    """Mixed into the class of a module with attached expert parameters."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        child: Any = self.lorafold
        with child.standing_in(self):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class ExpertsPatch(nn.Module):
    """What is added to the parameters of one experts' module.

    Args:
        live: the handle. path: of the module.

    Attributes:
        layouts: {path of an update: its layout} of everything that was attached here.
    """

    def __init__(self, live: Core, path: str) -> None:
        super().__init__()
        self.live, self.path = live, path
        self.layouts: dict[str, Layout] = {}

    def weights(self, module: nn.Module, row: Row) -> dict[str, Tensor]:
        """{parameter's name: W + c · ΔW} of the parameters that a mix changes."""
        from ..state import update_at

        found = {path: update_at(self.live, path, row) for path in self.layouts}
        updates: dict[str, LowRank] = {path: u for path, u in found.items() if u is not None}
        base = {f"{self.path}.{n}": p.detach() for n, p in module.named_parameters(recurse=False)}
        changed = {weight_key(base, path, self.layouts[path]) for path in updates}
        state = dict(base)
        device = next(iter(base.values())).device
        add_updates(state, {p: u.to(device) for p, u in updates.items()}, self.layouts, False)
        return {key.rpartition(".")[2]: state[key] for key in changed if key is not None}

    @contextlib.contextmanager
    def standing_in(self, module: Any) -> Iterator[None]:
        """Run the module with what is in use; an instance's attribute hides its parameter."""
        row = self.live.uniform_row()
        weights = {} if row is None else self.weights(module, row)
        try:
            vars(module).update(weights)
            yield
        finally:
            for name in weights:
                del vars(module)[name]


def owner_of(path: str, layout: Layout) -> str:
    """The path of the experts' module that an update at `path` belongs to."""
    parameter = path.rpartition("[")[0] if path.endswith("]") else path
    return parameter.rpartition(".")[0]
