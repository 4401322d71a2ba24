"""3-D expert parameters: W + c · ΔW stands in for W while the experts' module runs.

Routing gives each expert the tokens it likes, so the rows of a batch are no longer seen: one mix
runs for the whole batch. The sums are made for each forward pass and let go after it; this is the
one place where a dense update is formed while a model runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..adapter import Adapter
from ..errors import MismatchError, RefusedError
from ..layout import Layout, add_updates, weight_key
from ..lowrank import LowRank
from .swap import Swapped

if TYPE_CHECKING:
    from .core import Core
    from .selection import Row, Selection


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
        from .merging import update_at

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


def expert_modules(live: Core, name: str, adapter: Adapter) -> dict[str, nn.Module]:
    """{path: experts' module} that an adapter's experts belong to.

    Raises:
        MismatchError: a parameter is not in the model, or has another shape; naming it.
        RefusedError: the module has a forward of its own on the instance.
    """
    there = dict(live.model.named_modules())
    found: dict[str, nn.Module] = {}
    for path, u in adapter.items():
        layout = adapter.layout(path)
        if layout.kind != "expert":
            continue
        owner = owner_of(path, layout)
        module = there.get(owner)
        W = None if module is None else module._parameters.get(layout.parameter)
        if module is None or W is None:
            raise MismatchError(
                f"adapter {name!r} updates {path!r}, and the model has no such parameter"
            )
        if "forward" in vars(module):
            raise RefusedError(f"module {owner!r} has a forward of its own on the instance")
        assert layout.expert is not None
        if sorted(W.shape[-2:]) != sorted(u.shape) or (
            W.ndim == 3 and W.shape[0] != layout.expert[1]
        ):
            raise MismatchError(
                f"{path!r} takes updates of {tuple(W.shape)}, the adapter has {layout.expert[1]} "
                f"experts of {u.shape}"
            )
        found[owner] = module
    return found


def refuse_rows(selection: Selection, patches: Mapping[str, ExpertsPatch], live: Core) -> None:
    """Raise a `RefusedError` where rows of a batch would need experts of their own."""
    if selection.uniform:
        return
    for path, patch in patches.items():
        for name in selection.names:
            if any(live.update(name, p) is not None for p in patch.layouts):
                raise RefusedError(
                    f"{name!r} updates the experts of {path!r}, where routing hides the rows of a "
                    "batch: use one mix for the whole batch"
                )
