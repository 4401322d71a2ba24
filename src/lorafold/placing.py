"""Where each part of an adapter goes in a base, whether it fits, and the weight with it.

`placed` answers the first two by names and shapes alone, for a state dict and for files on the
disk; `changed` does the third, one tensor at a time. Replacements come first (a module saved
whole, a bias), then what goes into them (token rows, a LoRA bias), then W + c · ΔW.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from .errors import MismatchError
from .lowrank import LowRank
from .naming import Base, Held, Piece, Shape, is_head
from .parts import (
    LINEAR,
    Layout,
    Parts,
    extra_kind,
    extra_places,
    lora_bias_path,
    scaling,
    token_indices,
)

NOT_THERE = "not in the base"
OTHER_FORM = "the base stores this module in another form"
NO_WEIGHT = "no change of a weight"

_NO_PLACE = ("dora magnitude", "grouped convolution")
_ORDER = {"whole": 0, "bias": 1, "rows": 1, "update": 2}


@dataclass(frozen=True)
class Spot:
    """One part of an adapter at its place.

    Args:
        part: module path, or key of an extra tensor.
        what: it takes the tensor's place, is added to a bias, takes rows' places, or is ΔW.
        held: the tensor that it changes, as the base holds it.
        layout: of an update.
        turned: the weight holds an update's transpose.
        scale: of a bias.
        rows: that are replaced.
    """

    part: str
    what: Literal["whole", "bias", "rows", "update"]
    held: Held
    layout: Layout = LINEAR
    turned: bool = False
    scale: float = 1.0
    rows: tuple[int, ...] = ()

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The base's tensors that are changed."""
        if self.layout.expert is None:
            return self.held.pieces
        there = self.held.of_experts
        return there.get(None, ()) + there.get(self.layout.expert[0], ())

    def replaced(self, W: Tensor, piece: Piece, value: Tensor) -> Tensor:
        """A new tensor: W with what takes a place, or is added to a bias, in its dtype."""
        if self.what == "rows":
            new = W.clone()
            new[list(self.rows)] = value.to(new)
            return new
        value = _cut(value.detach(), piece)
        if self.what == "whole" and not piece.is_part:
            return value.to(W, copy=True)
        new = W.clone()
        there = _region(new, piece)
        if self.what == "bias":
            value = there.float() + value.float().to(there.device) * self.scale
        there.copy_(value)
        return new

    def is_part(self, W: Tensor, piece: Piece) -> bool:
        """Whether an update changes only a part of the base's tensor."""
        return piece.is_part or (
            self.layout.expert is not None and piece.expert is None and W.ndim == 3
        )

    def update(self, W: Tensor, piece: Piece, u: LowRank) -> tuple[Tensor, Tensor]:
        """What of W an update changes (a view), and ΔW in that shape, float32 at least.

        Raises:
            MismatchError: the weight is not floating point.
        """
        if not W.is_floating_point():
            raise MismatchError(
                f"{piece.key!r} is {W.dtype}: dequantise it before adding an update"
            )
        there = _region(W, piece)
        if self.layout.expert is not None and piece.expert is None and W.ndim == 3:
            there = W[self.layout.expert[0]]
        if piece.rows is not None:
            start, stop = piece.rows
            u = (
                LowRank(u.A[:, start:stop], u.B, u.scale)
                if self.turned
                else LowRank(u.A, u.B[start:stop], u.scale)
            )
        delta = u.dense().to(W.device)
        if self.layout.kind == "conv":
            delta = delta.reshape(len(delta), *self.layout.kernel)
        return there, delta.T if self.turned else delta


Step: TypeAlias = tuple[Spot, Piece]
Values: TypeAlias = Callable[[Spot], "LowRank | Tensor"]


@dataclass(frozen=True)
class Misfit:
    """A part that does not fit: the shape that it needs, the shape that is there, a message."""

    expected: Shape
    found: Shape
    says: str


@dataclass(frozen=True)
class Placement:
    """Where the parts of an adapter go.

    Args:
        base: into which.
        spots: what has a place and fits.
        unplaced: {part: why it has no place}.
        wrong: {part: what does not fit}.
    """

    base: Base
    spots: tuple[Spot, ...] = ()
    unplaced: Mapping[str, str] = field(default_factory=dict)
    wrong: Mapping[str, Misfit] = field(default_factory=dict)

    def touches(self, modules: Iterable[str]) -> bool:
        """Whether any of the modules has a place; any part at all, where there are none."""
        only_updates = any(True for _ in modules)
        return any(spot.what == "update" or not only_updates for spot in self.spots)

    def changes(self, value: Values | None = None) -> dict[str, list[Step]]:
        """{key of the base: what happens to it, in this order}.

        An output layer that shares the embedding's weight is among them, under a key that the
        base does not have, where the two come to differ.

        Args:
            value: of a spot. Without, two modules saved whole count as different.
        """
        found: dict[str, list[Step]] = {}
        for spot in sorted(self.spots, key=lambda spot: _ORDER[spot.what]):
            for piece in spot.pieces:
                found.setdefault(piece.key, []).append((spot, piece))
        if self.base.tied is not None:
            head, embedding = self.base.tied
            alike = same_steps(found.get(head, []), found.get(embedding, []), value)
            if head not in self.base.tensors:
                if alike:
                    found.pop(head, None)
                else:
                    found.setdefault(head, [])
            bias = self.base.tied_bias
            if bias is not None and not alike:
                found.setdefault(bias[0], list(found.get(bias[1], [])))
        return found

    def untied(self, value: Values | None = None) -> str | None:
        """The key of an output layer that no longer shares the embedding's weight."""
        if self.base.tied is None:
            return None
        head, embedding = self.base.tied
        found = self.changes(value)
        same = same_steps(found.get(head, []), found.get(embedding, []), value)
        return None if same or (head not in self.base.tensors and head not in found) else head


def same_steps(a: list[Step], b: list[Step], value: Values | None) -> bool:
    """Whether the same happens to two tensors that are equal before."""

    def same(x: Spot, y: Spot) -> bool:
        if x.part == y.part:
            return True
        if value is None or (x.what, x.rows) != (y.what, y.rows) or x.what not in ("whole", "rows"):
            return False
        s, t = value(x), value(y)
        assert isinstance(s, Tensor)
        assert isinstance(t, Tensor)
        return s.dtype == t.dtype and torch.equal(s, t)

    return len(a) == len(b) and all(same(x, y) for (x, _), (y, _) in zip(a, b, strict=True))


def placed(parts: Parts, base: Base, renumbered: Callable[[str], str] = str) -> Placement:
    """Find the place of every part, by names and shapes alone.

    Args:
        parts: of an adapter.
        base: a state dict's or files' tensors.
        renumbered: from a name of the adapter to the one that the base has for it.

    Raises:
        MismatchError: the config lacks what a bias is scaled by.
    """
    spots: list[Spot] = []
    unplaced: dict[str, str] = {}
    wrong: dict[str, Misfit] = {}
    for path in parts.modules:
        name = renumbered(parts.layout(path).weight_name(path))
        held = base.find(name)
        if held is None:
            inside = base.below(name.rpartition(".")[0])
            unplaced[path] = OTHER_FORM if inside else _why(base, name)
        else:
            spots.append(Spot(path, "update", held, parts.layout(path)))
    spots = _oriented(spots, parts, wrong)
    for key in parts.extras:
        kind = extra_kind(key, parts.config)
        if kind == "training state" or "original_module" in key.split("."):
            continue  # no part of the effect, or the untrained twin of a saved module
        names = [renumbered(name) for name in extra_places(key, parts.config)]
        held = next((h for name in names if (h := base.find(name)) is not None), None)
        if held is None:
            unplaced[key] = NO_WEIGHT if kind in _NO_PLACE else _why(base, names[-1])
            continue
        spot = _extra(key, kind, held, parts)
        if isinstance(spot, Misfit):
            wrong[key] = spot
            continue
        spots.append(spot)
    return Placement(base, (*spots, *_shared(spots, parts, base)), unplaced, wrong)


def _why(base: Base, name: str) -> str:
    if is_head(name) and (embedding := base.embedding()) is not None:
        return f"not in the base, whose embedding is {embedding!r}"
    return NOT_THERE


def _shared(spots: list[Spot], parts: Parts, base: Base) -> list[Spot]:
    """What also happens to a tensor that shares the weight of another.

    PEFT loads stored base weights into the one parameter. An output layer follows the rows that
    were trained in its embedding, unless it has its own.
    """
    rows = {spot.held.pieces[0].key for spot in spots if spot.what == "rows"}
    found = []
    for spot in spots:
        held, piece = spot.held, spot.held.pieces[0]
        follows = spot.what == "rows" and not is_head(held.name)
        loaded = spot.what == "whole" and extra_kind(spot.part, parts.config) == "base weight"
        for key in base.ties(piece.key) if held.whole and (follows or loaded) else ():
            if key != piece.key and not (follows and key in rows):
                like = None if key in base.tensors else piece.key
                twin = Held(key, held.shape, held.dtype, (Piece(key, like=like),))
                found.append(replace(spot, held=twin))
    return found


def _oriented(spots: list[Spot], parts: Parts, wrong: dict[str, Misfit]) -> list[Spot]:
    """Updates that fit, each with whether its weight holds the transpose."""
    shapes = {spot.part: spot.held.shape for spot in spots}
    transposed = bool(parts.config.get("fan_in_fan_out"))
    flips = orientations(parts.modules, parts.layouts, shapes, transposed)
    found = []
    for spot in spots:
        out, inner = parts.modules[spot.part]
        fitting = spot.layout.shapes(out, inner)
        there = spot.held.shape
        if not spot.held.dtype.is_floating_point:
            found.append(spot)  # quantised: the shape says nothing
            continue
        if there not in fitting:
            key = spot.held.pieces[0].key if spot.held.whole else spot.held.name
            says = f"{key!r} has shape {there}, the update fits {fitting[0]}"
            wrong[spot.part] = Misfit(fitting[0], there, says)
            continue
        turned = spot.layout.kind == "embedding"
        if spot.layout.kind in ("linear", "expert"):
            turned = there[-2:] == (inner, out) and (out != inner or flips[spot.part])
        found.append(replace(spot, turned=turned))
    return found


def _extra(key: str, kind: str, held: Held, parts: Parts) -> Spot | Misfit:
    """Where an extra tensor goes, if it fits."""
    shape = parts.extras[key]
    if kind == "trained tokens":
        path = held.name.removesuffix(".weight")
        rows = tuple(token_indices(parts.config, path))
        most = max(rows, default=-1) + 1
        if len(rows) != shape[0] or most > held.shape[0] or min(rows, default=0) < 0:
            says = (
                f"{key!r} holds {shape[0]} token rows, but trainable_token_indices in the config "
                f"names {len(rows)} up to {most - 1} for {path!r} (which has {held.shape[0]} rows)"
            )
            return Misfit((max(most, shape[0]), *shape[1:]), held.shape, says)
        if shape[1:] == held.shape[1:] and held.whole:
            return Spot(key, "rows", held, rows=rows)
    elif shape == held.shape:
        if kind == "lora bias":
            return Spot(key, "bias", held, scale=scaling(parts.config, lora_bias_path(key))[1])
        return Spot(key, "whole", held)
    says = (
        f"{key!r} has shape {shape}, but {held.name!r} in the base has {held.shape}: resize the "
        "base (for example its vocabulary) as it was when the adapter was trained"
    )
    return Misfit(shape, held.shape, says)


def applied(plan: Placement, state: Mapping[str, Tensor], value: Values) -> dict[str, Tensor]:
    """A state dict with everything applied; what shares memory and changes alike still does."""
    result = dict(state)
    changes = plan.changes(value)
    done: set[str] = set()
    for key, steps in changes.items():
        tied = [other for other in plan.base.ties(key) if other in done]
        twin = next((k for k in tied if same_steps(changes[k], steps, value)), None)
        result[key] = (
            changed(state[plan.base.source(key)], steps, value) if twin is None else result[twin]
        )
        done.add(key)
    return result


def changed(
    W: Tensor,
    steps: Iterable[Step],
    value: Values,
    c: float = 1.0,
    add: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """A tensor of the base with everything applied that happens to it.

    Args:
        W: not changed, unless `add` is given.
        steps: as `Placement.changes` says.
        value: of a spot: the update, or the extra tensor.
        c: the dial: W + c · ΔW, and W + c (W' − W) where W' takes its place.
        add: adds an update to what it changes, in place; summed in float32 at least by default.

    Raises:
        MismatchError: the weight of an update is not floating point.
    """
    new = W
    updates = []
    for spot, piece in steps:
        v = value(spot)
        if isinstance(v, LowRank):
            updates.append((spot, piece, v if c == 1 else c * v))
        else:
            new = spot.replaced(new, piece, v)
    if c != 1 and new is not W and W.is_floating_point():  # a counter has no share
        wide = torch.promote_types(W.dtype, torch.float32)
        new = (W.to(wide) + c * (new.to(wide) - W.to(wide))).to(W.dtype)
    own = new is not W or add is not None
    for spot, piece, u in updates:
        if not own and spot.is_part(new, piece):
            new, own = new.clone(), True
        there, delta = spot.update(new, piece, u)
        if add is not None:
            add(there, delta)
        elif there is new:
            new, own = (new.to(delta.dtype) + delta).to(new.dtype), True
        else:
            there.copy_(there.to(delta.dtype) + delta)
    return new


def _cut(value: Tensor, piece: Piece) -> Tensor:
    """What of a model's tensor a piece holds."""
    if piece.expert is not None:
        value = value[piece.expert]
    return value if piece.rows is None else value[piece.rows[0] : piece.rows[1]]


def _region(W: Tensor, piece: Piece) -> Tensor:
    """The part of the base's tensor that a piece is, a view."""
    if piece.entry is not None:
        W = W[piece.entry]
    return W if piece.into is None else W[piece.into[0] : piece.into[1]]


def orientations(
    modules: Mapping[str, tuple[int, int]],
    layouts: Mapping[str, Layout],
    weights: Mapping[str, tuple[int, ...]],
    transposed: bool,
) -> dict[str, bool]:
    """Whether each module's weight is stored (in, out).

    A square weight fits both ways. Its kin of another shape shows which one is meant, where the
    config doesn't: it has one `fan_in_fan_out` for all layers, and none for experts.

    Args:
        modules: {module path: (out, in)}.
        layouts: {module path: Layout}; plain linear where none is given.
        weights: {module path: shape of its weight}, of those that are there.
        transposed: the config's `fan_in_fan_out`.
    """
    found: dict[tuple[str, str], bool] = {}
    for p, weight in weights.items():
        layout, shape = layouts.get(p, LINEAR), modules[p]
        if layout.kind in ("linear", "expert") and shape[0] != shape[1]:
            found[_kin(p, layout)] = weight[-2:] != shape
    result = {}
    for p in weights:
        layout = layouts.get(p, LINEAR)
        default = layout.transposed if layout.kind == "expert" else transposed
        result[p] = found.get(_kin(p, layout), default)
    return result


def _kin(path: str, layout: Layout) -> tuple[str, str]:
    """What layers stored alike have in common: the last name, or the module of the experts."""
    parts = path.split(".")
    return layout.kind, ".".join(parts[:-1]) if layout.kind == "expert" else parts[-1]


def check_replicated(state: Iterable[str], config: Mapping[str, Any], paths: Iterable[str]) -> None:
    """Refuse a base without the replicated layers that the adapter was trained on.

    Its layer numbers count the replicas, so they would hit the wrong layers of the plain base.

    Raises:
        MismatchError: naming the numbers of layers.
    """
    ranges = config.get("layer_replication")
    stack = next((m[1] for p in paths if (m := re.match(r"(.*?\.|)\d+\.", p))), None)
    if not ranges or stack is None:
        return
    expected = sum(stop - start for start, stop in ranges)
    pattern = re.compile(rf"{re.escape(stack)}(\d+)\.")
    found = len({m[1] for key in state if (m := pattern.match(key))})
    if found != expected:
        raise MismatchError(
            f"the adapter belongs to {expected} layers (layer_replication {ranges}), the base "
            f"has {found} under {stack!r}: give the one with its layers replicated"
        )


def added(W: Tensor, u: LowRank, layout: Layout, transposed: bool, key: str) -> Tensor:
    """W + ΔW in W's shape and dtype.

    Args:
        transposed: the layer stores (in, out) (`fan_in_fan_out`); decides only where both fit.

    Raises:
        MismatchError: the update does not fit the weight, or the weight is not floating point.
    """
    held = Held(key, tuple(W.shape), W.dtype, (Piece(key),))
    wrong: dict[str, Misfit] = {}
    parts = Parts({key: u.shape}, {}, {"fan_in_fan_out": transposed}, {key: layout})
    spots = _oriented([Spot(key, "update", held, layout)], parts, wrong)
    for misfit in wrong.values():
        raise MismatchError(misfit.says)
    return changed(W, [(spots[0], held.pieces[0])], lambda _: u)
