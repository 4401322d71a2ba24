"""`copy`: the same factors on another base of the same shapes, and how far the two are apart.

An update belongs to the coordinates of its base. A base that was trained on from the same weights
still has them; one that was trained from another start has others, however alike the two behave.
‖W_t − W_s‖ / ‖W_s‖ over all weights tells which it is: small for the first, about √2 for the
second. It is read tensor by tensor, both bases never in memory at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import MismatchError
from ..bases import Tensors, tensors_of
from ..job import Job, Moved

# What to expect: up to this relative distance of the weights. See docs/transfer.md for the runs.
_NEAR, _KIN = 0.2, 0.7
_CHUNK = 1 << 22
_EXPECT = {
    "near": "nearly the same weights: expect it to do what it did",
    "kin": "one made from the other, and far: expect a part of the effect, and measure it",
    "strangers": "don't: the weights are too far apart (two independent trainings: 1.41)",
}


def copy(job: Job) -> Moved:
    """The factors as they are, where shapes are equal."""
    modules, without, layouts = {}, {}, {}
    for path, place in job.places.items():
        u = job.adapter.modules[path]
        if place.shape != u.shape:
            without[path] = f"{u.shape} in the adapter, {place.shape} in the target"
        else:
            modules[place.path], layouts[place.path] = u, place.layout
    if not modules:
        first, why = next(iter(without.items()))
        raise MismatchError(f"copy needs equal shapes: {first!r} is {why}; use another method")
    if job.source is None or job.options["unchecked"]:
        return Moved(modules, {}, layouts, without=without)
    found = _compared(job, list(modules))
    return Moved(modules, {}, layouts, without=without, distances=found.modules, said=found.said())


@dataclass
class _Apart:
    """How far two bases are apart: squares summed over all tensors, ratios of the modules."""

    apart: float = 0.0
    size: float = 0.0
    compared: int = 0
    missed: list[str] = field(default_factory=list)
    modules: dict[str, float] = field(default_factory=dict)

    def said(self) -> dict[str, Any]:
        """As the report has it."""
        distance = math.sqrt(self.apart / self.size) if self.size > 0 else 0.0
        kind = "near" if distance <= _NEAR else "kin" if distance <= _KIN else "strangers"
        return {
            "base_distance": distance,
            "tensors_compared": self.compared,
            "tensors_not_compared": len(self.missed),
            "expect": _EXPECT[kind],
        }


def _compared(job: Job, paths: list[str]) -> _Apart:
    """All tensors of the source against the target's.

    Raises:
        MismatchError: none of them can be compared, or one is not finite.
    """
    source, target = tensors_of(job.source), tensors_of(job.target)
    keys, there = _keys(source, job, paths), target.named(source.keys)
    found = _Apart()
    for k, key in enumerate(source.keys):
        if job.progress is not None:
            job.progress(k, len(source.keys), key)
        held = there.find(key)
        W = source.read(key)
        if held is None or not held.whole or held.shape != W.shape or not W.is_floating_point():
            found.missed.append(key)
            continue
        V = target.read(held.pieces[0].like or held.pieces[0].key)
        if not V.is_floating_point():
            found.missed.append(key)
            continue
        size, apart = _squares(W, V.to(W.device), key)
        found.size, found.apart = found.size + size, found.apart + apart
        found.compared += 1
        for path in keys.get(key, ()):
            found.modules[path] = math.sqrt(apart / size) if size > 0 else 0.0
    if not found.compared:
        raise MismatchError(
            f"no weight of the two bases can be compared: {len(found.missed)} tensors, e.g. "
            f"{found.missed[0]!r}; unchecked=True copies without"
        )
    return found


def _keys(source: Tensors, job: Job, paths: list[str]) -> dict[str, list[str]]:
    """{key of the source: the modules whose weight it is}."""
    names = {path: job.adapter.layout(path).weight_name(path) for path in paths}
    base = source.named(names.values())
    found: dict[str, list[str]] = {}
    for path, name in names.items():
        held = base.find(name)
        for piece in () if held is None else held.pieces:
            found.setdefault(piece.like or piece.key, []).append(path)
    return found


def _squares(W: Tensor, V: Tensor, key: str) -> tuple[float, float]:
    """‖W‖² and ‖V − W‖², in float64, a few numbers at a time.

    Raises:
        MismatchError: they are not finite.
    """
    size = apart = 0.0
    for a, b in zip(*(torch.split(t.reshape(-1), _CHUNK) for t in (W, V)), strict=True):
        wide = a.double()
        size += float(wide.square().sum())
        apart += float((b.double() - wide).square().sum())
    if not math.isfinite(size + apart):
        raise MismatchError(f"{key!r} holds NaN or infinite values in one of the bases")
    return size, apart
