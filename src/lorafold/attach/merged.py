"""Merging into the weights of a running model, and back to the bit.

The layer gets a new parameter W + Σ c ΔW, and the old one is kept: unmerging puts it back, never
subtracts. As it is the layer's parameter that is exchanged and not its contents, a weight that is
tied to another layer's stays as it is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import MismatchError
from ..layers.modes import evaluating, outside_inference_mode
from .selection import Row, Selection, parsed

if TYPE_CHECKING:
    from .live import Live


@outside_inference_mode
def merge_into(live: Live, what: Any, *, c: Any, rank: Any, keep: bool) -> int:
    """See `Live.merge`."""
    if live.merged:
        raise MismatchError(f"{_listed(live.merged)} merged already: unmerge() first")
    row = row_to_merge(live, what, c, rank)
    if live._selection is not None and not live._selection.uniform:
        bare = next((i for i, r in enumerate(live._selection.rows) if not r.mix), None)
        if bare is not None:
            raise MismatchError(
                f"row {bare} in use is the base's, and a merge would change it: choose other rows"
            )
    weights = {k: nn.Parameter(W, requires_grad=False) for k, W in _merged(live, row).items()}
    kept = {key: _owner(live, key)[0][_owner(live, key)[1]] for key in weights}
    for key, old in kept.items():
        weights[key].requires_grad_(old is not None and old.requires_grad)
    _put(live, weights)
    live._merged = (row, kept)
    live._show(live._selection)
    if not keep:
        live._merged = None
        # The new weights require, once detached, what the old ones did.
        for key, old in kept.items():
            live.board.frozen.exchanged(old, weights[key])
        for name, value in row.mix:
            if value != 0:
                live.remove(name)
        return 0
    return sum(p.nbytes for p in kept.values() if p is not None)


def unmerge_from(live: Live) -> None:
    """See `Live.unmerge`."""
    if live._merged is None:
        raise MismatchError("nothing is merged")
    _put(live, live._merged[1])
    live._merged = None
    live._show(live._selection)


Key = tuple[str, str]  # path of a module, name of its parameter (dotted, in a saved module)


def _merged(live: Live, row: Row) -> dict[Key, Tensor]:
    """Every weight that a mix changes, as the sum."""
    found: dict[Key, Tensor] = {}
    for site in [*live.patches.values(), *live.experts.values(), *live.saved.values()]:
        found |= {(site.path, name): W for name, W in site.merged(row).items()}
    return found


def _owner(live: Live, key: Key) -> tuple[dict[str, nn.Parameter | None], str]:
    """The dict that holds a parameter, and its name in it."""
    inner, _, name = key[1].rpartition(".")
    module = live.layer(key[0]).get_submodule(inner)
    return module._parameters, name


def _put(live: Live, weights: Mapping[Key, nn.Parameter | None]) -> None:
    for key, weight in weights.items():
        parameters, name = _owner(live, key)
        parameters[name] = weight


def verified(live: Live, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """See `Live.verify`."""
    if live.merged:
        raise MismatchError(f"{_listed(live.merged)} merged: unmerge() before verify()")
    row = row_to_merge(live, None, None, None)
    before = live._selection
    try:
        with evaluating(live.model):
            live._show(Selection((row,)))
            attached = live.model(*args, **kwargs)
            merge_into(live, dict(row.mix), c=None, rank=row.rank, keep=True)
            try:
                merged = live.model(*args, **kwargs)
            finally:
                unmerge_from(live)
    finally:
        live._show(before)
    return _difference(attached, merged)


def row_to_merge(live: Live, what: Any, c: Any, rank: Any) -> Row:
    """The mix that is meant: what is given, what runs, or the only adapter."""
    if what is not None:
        selection = parsed(what, c, rank, live.names)
    elif live._selection is not None and live._selection.on:
        selection = live._selection
    elif len(live.names) == 1:
        selection = parsed(live.names[0], c, rank, live.names)
    else:
        raise MismatchError(f"say which: there are {len(live.names)} adapters, and none runs")
    if not selection.uniform:
        raise MismatchError("rows of a batch can't be merged: give one mix, {name: weight}")
    live._check_rank(selection.rows[0])
    return selection.rows[0]


def _listed(names: Mapping[str, float]) -> str:
    verb = "is" if len(names) == 1 else "are"
    return f"{', '.join(map(repr, names))} {verb}"


def _difference(x: Any, y: Any) -> float:
    """The largest difference between the floating point tensors of two outputs."""
    if isinstance(x, Tensor):
        if not x.is_floating_point():
            return 0.0
        return float((x.double() - y.double()).abs().max()) if x.numel() else 0.0
    if isinstance(x, Mapping):
        return max((_difference(x[key], y[key]) for key in x), default=0.0)
    if isinstance(x, list | tuple):
        return max((_difference(a, b) for a, b in zip(x, y, strict=True)), default=0.0)
    return 0.0
