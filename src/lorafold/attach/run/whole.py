"""Modules that are saved whole beside an adapter (`modules_to_save`: a classifier, a head).

Every module in it that has parameters keeps its own, W, and gets a copy with the adapter's, W', as
its child. With coefficient c it runs with W + c (W' − W): the copy for c = 1, itself for c = 0, to
the bit; where others are merged into W, W' differs from what that was before. Itself it runs only
where that is asked for. (Containers get no child: they would run it.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...errors import MismatchError
from ...layers.swap import CHILD, Swapped
from ..selection import Row
from .board import Board, Site

Mix = tuple[tuple[str, float], ...]


class AttachedWhole(Swapped):
    """Mixed into the class of a module that adapters have copies of."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.lorafold(super().forward, args, kwargs)  # type: ignore[misc]


class Whole(Site):
    """The copies of one module that adapters brought or train.

    Attributes:
        keys: name → key of its copy.
    """

    def __init__(self, board: Board, path: str, module: nn.Module) -> None:
        super().__init__(board, path, module)
        self.copies = nn.ModuleDict()
        self.keys: dict[str, str] = {}
        self._before: dict[str, Tensor] = {}  # what the copies differ from, where others are merged

    def has(self, name: str) -> bool:
        return name in self.keys

    def put(self, name: str, module: nn.Module) -> None:
        """Add a copy."""
        key = next(k for i in range(len(self.copies) + 1) if (k := f"s{i}") not in self.copies)
        self.keys[name], self.copies[key] = key, module

    def drop(self, name: str) -> None:
        if name in self.keys:
            del self.copies[self.keys.pop(name)]

    def copy_of(self, name: str) -> nn.Module:
        """An adapter's copy."""
        return self.copies[self.keys[name]]

    def merged(self, row: Row) -> dict[str, Tensor]:
        mix = self._mix(row)
        return self._weights(mix) if mix else {}

    def stands_for(self, kept: Mapping[str, Tensor]) -> None:
        self._before = {name: W.detach() for name, W in kept.items()}

    @torch.no_grad()
    def settle(self) -> None:
        for name, before in self._before.items():
            W = self.module.get_parameter(name)
            for copy in self.copies.values():
                copy.get_parameter(name).add_((W - before).to(W))

    def forward(
        self, base: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """What the module gives as the selection wants it.

        Args:
            base: the module's own forward.
        """
        selection, packed = self.board.running, self.board.rows.packed is not None
        mixes = [()] if selection is None else [self._mix(row) for row in selection.rows]
        y: Any = None if all(mixes) and not packed else base(*args, **kwargs)
        found = {mix: self._run(mix, args, kwargs) for mix in dict.fromkeys(mixes) if mix}
        if not found:
            return y
        if len(mixes) == 1 and not packed:
            return found[mixes[0]]
        y = y if y is not None else found[mixes[0]]
        rows = self._rows(y, len(mixes))
        for mix, own in found.items():
            # The last is the base's, for what no packed row has.
            chosen = torch.tensor([*(mix == other for other in mixes), False], device=y.device)
            y = torch.where(chosen[rows], own, y)
        return y

    def _rows(self, y: Any, count: int) -> Tensor:
        """Which row each entry of the output is of, in as many axes as that has."""
        if not isinstance(y, Tensor) or y.ndim == 0:
            raise MismatchError(
                f"module {self.path!r} is saved with an adapter, and its output can't be told "
                "apart by rows: use one mix for the whole batch"
            )
        lead, rows = y.shape[:-1] or y.shape, self.board.rows
        if rows.packed is not None:
            tokens, one = rows.packed_as(self.path, lead, self.time_first, y.device)
            row = rows.packed.row_of(y.device, tokens, one).clamp(max=count)
            return row.view(*lead, *[1] * (y.ndim - len(lead)))
        rows.check(self.path, lead, self.time_first, torch.compiler.is_compiling())
        axis = int(self.time_first and len(lead) > 1)
        row = torch.arange(count, device=y.device).repeat_interleave(y.shape[axis] // count)
        return row.view(-1, *[1] * (y.ndim - 1 - axis))

    def _weights(self, mix: Mix) -> dict[str, Tensor]:
        own = {n: p for n, p in self.module.named_parameters() if not n.startswith(f"{CHILD}.")}
        found = {}
        for name, W in own.items():
            total = W.detach().to(torch.promote_types(torch.float32, W.dtype))
            before = self._before.get(name, W).to(total)
            for adapter, c in mix:
                total = total + c * (self.copy_of(adapter).get_parameter(name).to(total) - before)
            found[name] = total.to(W.dtype)
        return found

    def _mix(self, row: Row) -> Mix:
        """What of a row runs here."""
        if row.rank == 0:
            return ()
        return tuple((name, c) for name, c in row.mix if name in self.keys and c != 0)

    def _run(self, mix: Mix, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        first = self.copy_of(mix[0][0])
        if len(mix) == 1 and mix[0][1] == 1 and not self._before:
            return first(*args, **kwargs)
        return functional_call(first, self._weights(mix), args, dict(kwargs))
