"""Modules that are saved whole beside an adapter (`modules_to_save`: a classifier, a head).

Every module in it that has parameters keeps its own, W, and gets a copy with the adapter's, W', as
its child. With coefficient c it runs with W + c (W' − W): the copy for c = 1, itself for c = 0, to
the bit. (Containers get no child: they would run it.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...errors import MismatchError

if TYPE_CHECKING:
    from ..state import Core


Mix = tuple[tuple[str, float], ...]


class SavedPatch(nn.Module):
    """The copies of one module that adapters brought or train.

    Args:
        live: the handle. path: of the module.

    Attributes:
        keys: name → key of its copy.
    """

    def __init__(self, live: Core, path: str) -> None:
        super().__init__()
        self.live, self.path = live, path
        self.copies = nn.ModuleDict()
        self.keys: dict[str, str] = {}

    def put(self, name: str, module: nn.Module) -> None:
        """Add a copy."""
        key = next(k for i in range(len(self.copies) + 1) if (k := f"s{i}") not in self.copies)
        self.keys[name], self.copies[key] = key, module

    def drop(self, name: str) -> None:
        """Remove a copy, if there is one."""
        if name in self.keys:
            del self.copies[self.keys.pop(name)]

    def copy_of(self, name: str) -> nn.Module:
        """An adapter's copy."""
        return self.copies[self.keys[name]]

    def forward(self, layer: Any, y: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer's output as the selection wants it."""
        selection = self.live.running()
        if selection is None or not self.keys:
            return y
        mixes = [self._mix(row.mix) if row.on else () for row in selection.rows]
        if selection.uniform:
            return self._run(layer, mixes[0], args, kwargs) if mixes[0] else y
        if not isinstance(y, Tensor) or y.shape[0] % len(mixes):
            raise MismatchError(
                f"module {self.path!r} is saved with an adapter, and its output can't be told "
                f"apart by {len(mixes)} rows"
            )
        m = y.shape[0] // len(mixes)
        for mix in dict.fromkeys(mixes):
            if mix:
                chosen = torch.tensor([own == mix for own in mixes], device=y.device)
                chosen = chosen.repeat_interleave(m).view(-1, *[1] * (y.ndim - 1))
                y = torch.where(chosen, self._run(layer, mix, args, kwargs), y)
        return y

    def weights(self, layer: nn.Module, mix: Mix) -> dict[str, Tensor]:
        """{parameter: W + Σ c (W' − W)}."""
        own = {n: p for n, p in layer.named_parameters() if not n.startswith("lorafold.")}
        found = {}
        for name, W in own.items():
            total = W.detach().float()
            for adapter, c in mix:
                total = total + c * (self.copy_of(adapter).get_parameter(name).float() - W.float())
            found[name] = total.to(W.dtype)
        return found

    def _mix(self, mix: Mix) -> Mix:
        return tuple((name, c) for name, c in mix if name in self.keys and c != 0)

    def _run(self, layer: Any, mix: Mix, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        first = self.copy_of(mix[0][0])
        if len(mix) == 1 and mix[0][1] == 1:
            return first(*args, **kwargs)
        return functional_call(first, self.weights(layer, mix), args, dict(kwargs))
