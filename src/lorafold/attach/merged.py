"""Merging into the weights of a running model, and back to the bit.

The layer gets a new parameter W + Σ c ΔW, and the old one is kept: unmerging puts it back, never
subtracts. As it is the layer's parameter that is exchanged and not its contents, a weight that is
tied to another layer's stays as it is there; while the two differ, the model's configuration does
not call them one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MismatchError
from ..layers.modes import evaluating, outside_inference_mode
from ..layers.ties import say_tied, say_untied
from .choices import Choice
from .running import Merged
from .selection import Row, Selection
from .state import State

Key = tuple[str, str]  # path of a module, name of its parameter (dotted, in a saved module)


@outside_inference_mode
def merge_into(state: State, what: Any, *, c: Any, rank: Any, keep: bool) -> int:
    """See `Live.merge`."""
    running = state.running
    if running.merged is not None:
        raise MismatchError(f"{_names(running.merged_mix)} merged already: unmerge() first")
    row = _mix_to_merge(state, what, c, rank)
    if running.selection is not None and not running.selection.uniform:
        bare = next((i for i, r in enumerate(running.selection.rows) if not r.mix), None)
        if bare is not None:
            raise MismatchError(
                f"row {bare} in use is the base's, and a merge would change it: choose other rows"
            )
    sums = {(s.path, n): W for s in state.sites.values() for n, W in s.merged(row).items()}
    kept = {key: _owner(state, key)[0][_owner(state, key)[1]] for key in sums}
    weights = _parameters(sums, kept)
    _put(state, weights)
    running.set_merged(Merged(row, kept, say_untied(state.model)))
    if keep:
        return sum(p.nbytes for p in kept.values() if p is not None)
    for site in state.sites.values():
        site.settle()
    running.set_merged(None)
    for key, old in kept.items():
        state.board.frozen.exchanged(old, weights[key])
    for name, value in row.mix:
        if value != 0:
            state.remove(name)
    return 0


def unmerge_from(state: State) -> None:
    """See `Live.unmerge`."""
    if state.running.merged is None:
        raise MismatchError("nothing is merged")
    _put(state, state.running.merged.kept)
    say_tied(state.running.merged.untied)
    state.running.set_merged(None)


def verified(state: State, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """See `Live.verify`."""
    if state.running.merged is not None:
        raise MismatchError(f"{_names(state.running.merged_mix)} merged: unmerge() before verify()")
    row = _mix_to_merge(state, None, None, None)
    with evaluating(state.model), state.running.during(Choice(Selection((row,)))):
        attached = state.model(*args, **kwargs)
        merge_into(state, dict(row.mix), c=None, rank=row.rank, keep=True)
        try:
            merged = state.model(*args, **kwargs)
        finally:
            unmerge_from(state)
    return _difference(attached, merged)


def _mix_to_merge(state: State, what: Any, c: Any, rank: Any) -> Row:
    """The mix that is meant: what is given, what runs, or the only adapter."""
    names, chosen = list(state.sources), state.running.selection
    if what is not None:
        selection = Selection.of(what, c, rank, state.sources)
    elif chosen is not None and chosen.on:
        selection = chosen
    elif len(names) == 1:
        selection = Selection.of(names[0], c, rank, state.sources)
    else:
        raise MismatchError(f"say which: there are {len(names)} adapters, and none runs")
    if selection.tokens is not None:
        raise MismatchError(
            "weights that every token has of its own can't be merged: give one mix, {name: weight}"
        )
    if not selection.uniform:
        raise MismatchError("rows of a batch can't be merged: give one mix, {name: weight}")
    state.running.check_rank(selection.rows[0])
    return selection.rows[0]


def _parameters(
    sums: Mapping[Key, Tensor], kept: Mapping[Key, nn.Parameter | None]
) -> dict[Key, nn.Parameter]:
    """The new parameters; one for what was one before, where it comes to the same."""
    found: dict[Key, nn.Parameter] = {}
    tied: dict[int, Key] = {}
    for key, W in sums.items():
        old = kept[key]
        first = tied.setdefault(id(old), key)
        if first != key and old is not None and torch.equal(W, sums[first]):
            found[key] = found[first]
            continue
        found[key] = nn.Parameter(W, requires_grad=old is not None and old.requires_grad)
    return found


def _owner(state: State, key: Key) -> tuple[dict[str, nn.Parameter | None], str]:
    """The dict that holds a parameter, and its name in it."""
    inner, _, name = key[1].rpartition(".")
    return state.module(key[0]).get_submodule(inner)._parameters, name


def _put(state: State, weights: Mapping[Key, nn.Parameter | None]) -> None:
    for key, weight in weights.items():
        parameters, name = _owner(state, key)
        parameters[name] = weight


def _names(names: Mapping[str, float]) -> str:
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
