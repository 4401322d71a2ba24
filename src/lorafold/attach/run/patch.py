"""What is added to one attached layer: the child that its class hands each output to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import RefusedError
from ...layers.sites import Place
from ...layers.storage import is_quantized
from ...layers.swap import device_of, input_of
from ...placing import added
from ..selection import Row
from .active import KEPT, ActiveAt
from .bank import Bank
from .board import Board, Site
from .factors import Factors, Kept
from .grouping import Grouping
from .packed import Segments, block_size


class Patch(Site):
    """What is added to one layer's output.

    Args:
        place: the layer. index: of the layer in the tables.

    Attributes:
        kind: of the layer. dims: (out, in) of its updates.
        banks: by group, the adapters in slots. fresh: by key, the trainable ones.
        keys: name → key of a trainable one.
        now: what is active, None for nothing.
    """

    def __init__(self, board: Board, path: str, place: Place, index: int) -> None:
        super().__init__(board, path, place.layer)
        self.index, self.kind, self.dims = index, place.kind, place.dims
        self.knows_rows = not board.rows.routed(path)
        self.banks = nn.ModuleDict()
        self.fresh = nn.ModuleDict()
        self.keys: dict[str, str] = {}
        self.now: ActiveAt | None = None
        self.train(place.layer.training)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "now": None}  # views of tensors that a copy makes anew

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.board.moved()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        own = next(iter([*self.parameters(), *self.buffers()]), None)
        return device_of(self.module) if own is None else own.device

    def has(self, name: str) -> bool:
        return name in self.keys

    def put(self, name: str, key: str, fresh: Factors) -> None:
        """Add an adapter's trainable factors."""
        fresh.train(self.training)
        self.keys[name], self.fresh[key] = key, fresh

    def drop(self, name: str) -> None:
        if name in self.keys:
            del self.fresh[self.keys.pop(name)]

    def merged(self, row: Row) -> dict[str, Tensor]:
        u = self.board.summed(self.path, row)
        if u is None:
            return {}
        layer = self.module
        if is_quantized(layer):
            raise RefusedError(
                f"module {self.path!r} is quantised: merging would quantise the sum again. Replace "
                "it by a float layer first (lf.dequantize), or keep the adapter attached"
            )
        W: Tensor = layer.weight.detach()
        layout, key = self.kind.layout(layer), f"{self.path}.weight"
        return {"weight": added(W, u.to(W.device), layout, self.kind.transposed, key)}

    def keep(self, updates: list[Any]) -> None:
        """Run updates, each with its coefficient, in the background; none for no background."""
        if updates:
            self.fresh[KEPT] = Kept(self.kind, updates, self.device)
        elif KEPT in self.fresh:
            del self.fresh[KEPT]

    def show(self, now: ActiveAt | None) -> None:
        """This is active from now on."""
        if self.now is not now:  # setting a module's attribute is slow
            vars(self)["now"] = now

    def forward(self, layer: Any, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output with what is active added."""
        if self.board.stale:
            self.board.refresh()
        now = self.now
        if now is None or y.numel() == 0:  # an expert that no token goes to, for one
            return y
        x = input_of(args, kwargs)
        if self.keys and torch.is_grad_enabled():
            self.board.note_run()
        if now.active.uniform and not _is_recorded(y):
            return self._uniform(layer, y, x, now)
        return self._rows(layer, y, x, now)

    def _uniform(self, layer: Any, y: Tensor, x: Tensor, now: ActiveAt) -> Tensor:
        for group, items in now.items.items():
            bank: Any = self.banks[group]
            y = bank.uniform(layer, y, x, items)
        for key, coefficient, k in now.trained:
            fresh: Any = self.fresh[key]
            y = fresh.uniform(layer, y, x, coefficient, k)
        return y

    def _rows(self, layer: Any, y: Tensor, x: Tensor, now: ActiveAt) -> Tensor:
        active = now.active
        lead, recorded = self._lead(layer, y), _is_recorded(y)
        if not recorded and not now.runs:
            return y
        if active.packed is not None:
            return self._packed(layer, y, x, now, lead, recorded)
        if active.rule is not None and self.kind.linear:
            return self._by_token(layer, y, x, now, recorded)
        convolved = self.kind.channel != -1
        self.board.rows.check(self.path, lead, self.time_first, recorded, convolved)
        swapped = self.time_first and len(lead) > 1
        if swapped:
            x, y = x.transpose(0, 1), y.transpose(0, 1)
        by = None if recorded else active.grouped(y.device)
        out = self._summed(layer, y, x, now, by)
        # In this order: what a graph looks at, it is compiled again for.
        if recorded or not active.all_on:
            out = _selected(now.on, out, y)
        return out.transpose(0, 1) if swapped else out

    def _packed(
        self,
        layer: Any,
        y: Tensor,
        x: Tensor,
        now: ActiveAt,
        lead: tuple[int, ...],
        recorded: bool,
    ) -> Tensor:
        """The tokens of packed rows, as rows of one token or as blocks of several."""
        active = now.active
        tokens, one = self.board.rows.packed_as(self.path, lead, self.time_first, y.device)
        assert active.packed is not None
        flat = y.reshape(tokens, y.shape[-1])
        inputs = x.reshape(tokens, *x.shape[len(lead) :])
        row = active.packed.row_of(y.device, tokens, one)
        by = None if recorded or not self.kind.linear else active.grouped(y.device, one)
        if by is not None:
            here = now.gathered(row) if now.trained_w else now
            out = self._summed(layer, flat, inputs, here, by)
        else:
            size = block_size(tokens, len(now.ids), now.ranks)
            blocks = active.blocks(y.device, tokens, one, size)
            cut = (-1, size)
            placed = self._summed(
                layer,
                flat[blocks.source].reshape(*cut, flat.shape[1]),
                inputs[blocks.source].reshape(*cut, *inputs.shape[1:]),
                now.gathered(blocks.row),
                None,
            )
            out = placed.reshape(-1, flat.shape[1])[blocks.place]
        return _selected(now.on[row], out, flat).view(y.shape)

    def _by_token(self, layer: Any, y: Tensor, x: Tensor, now: ActiveAt, recorded: bool) -> Tensor:
        """y plus what every token gets of each adapter."""
        out = flat = y.reshape(-1, y.shape[-1])
        x = x.reshape(-1, x.shape[-1])
        for group, w in now.weighed(x).items():
            out = self.bank(group).rows(layer, out, x, now.ids, w)
        for key, w in now.trained_w.items():
            out = self.trained(key).rows(layer, out, x, w)
        if recorded or not now.active.all_on:
            out = _selected(now.on, out, flat)
        return out.view(y.shape)

    def _summed(
        self,
        layer: Any,
        y: Tensor,
        x: Tensor,
        now: ActiveAt,
        by: Grouping | Segments | None,
    ) -> Tensor:
        """y plus what every row runs, also what is selected away afterwards."""
        for group, w in now.w.items():
            bank: Any = self.banks[group]
            if by is None or not bank.kind.linear:
                y = bank.rows(layer, y, x, now.ids, w[:, None])
            else:
                y = bank.grouped(y, x, by, by.w[group][self.index])
        for key, w in now.trained_w.items():
            fresh: Any = self.fresh[key]
            y = fresh.rows(layer, y, x, w, None if _is_recorded(y) else now.rows_of(key))
        return y

    def _lead(self, layer: Any, y: Tensor) -> tuple[int, ...]:
        """The axes of the output that are not channels; none where there is no batch."""
        if self.kind.channel == -1:
            return y.shape[:-1]
        packed = self.now is not None and self.now.active.packed is not None
        return () if packed or y.ndim != layer.weight.ndim else y.shape[:1]

    def bank(self, group: str) -> Bank:
        """One of its banks."""
        found: Any = self.banks[group]
        return found  # type: ignore[no-any-return]

    def trained(self, key: str) -> Factors:
        """One of its trainable adapters."""
        found: Any = self.fresh[key]
        return found  # type: ignore[no-any-return]


def _selected(on: Tensor, out: Tensor, y: Tensor) -> Tensor:
    """Rows of the base are selected, so that they are the base's to the bit."""
    chosen = on.repeat_interleave(y.shape[0] // len(on), 0)
    return torch.where(chosen.view(-1, *[1] * (y.ndim - 1)), out, y)


def _is_recorded(y: Tensor) -> bool:
    """Whether what runs now will be run again for other adapters: in a graph of either kind."""
    return torch.compiler.is_compiling() or (y.is_cuda and torch.cuda.is_current_stream_capturing())
