"""Does a merged checkpoint hold what it should? Tensor by tensor, from files.

For every weight that the adapter changes, D = W_merged − W_base is compared with c · ΔW. The error
that storing W + c ΔW in the checkpoint's dtype makes is known, so what is left beyond it was done
by something else. A weight is `applied` where D is ΔW but for rounding; else `not applied` where D
is nothing; else of `wrong strength` where D is c ΔW with the c of least squares; else some `other
change`. All other tensors must be the base's.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import MismatchError, RefusedError
from ..files import load
from ..files.base import Weights, read_base
from ..lowrank import LowRank
from ..placing import Placement, Spot, Step, changed, placed
from .checkpoint import FLOATS, same

Verdict = Literal["applied", "not applied", "wrong strength", "other change", "missing"]
Progress = Callable[[int, int, str], object]

# Beyond rounding: what half-precision arithmetic on ΔW itself adds, as a share of it.
_ARITHMETIC = 0.01
_ROUNDING = 1.2
_ALIKE = 0.9
_NEAR = 0.03  # or a tenth of the rounding, which moves c as well
_HIDES = 0.5  # rounding, as a share of ‖ΔW‖, from which other strengths look the same
_CHUNK = 1 << 21  # numbers
_CHANGED = "changed"
_GONE, _NEW = "not in the merged checkpoint", "only in the merged checkpoint"
_FORM = "the merged checkpoint stores it in another form"
_TURNED = "the whole weight is stored transposed"


@dataclass(frozen=True)
class Finding:
    """What became of one part of an adapter.

    Args:
        verdict: one of `Verdict`.
        c: of least squares; None where it says nothing.
        rounding: error of storing W + c ΔW in the checkpoint's dtype, as a share of ‖ΔW‖.
        unexplained: ‖D − c ΔW‖ as a share of ‖ΔW‖, rounding included.
        why: more, where there is more to say.
    """

    verdict: Verdict
    c: float | None = None
    rounding: float = 0.0
    unexplained: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class Verification:
    """What `verify_merge` found.

    Args:
        parts: {module path or key of an extra: what became of it}.
        others: {tensor that the adapter leaves alone: how it differs}.
        compared: how many tensors it leaves alone.
    """

    parts: Mapping[str, Finding]
    others: Mapping[str, str]
    compared: int

    @property
    def ok(self) -> bool:
        """Whether all of the adapter is applied, and nothing else happened."""
        return not self.others and all(f.verdict == "applied" for f in self.parts.values())

    @property
    def counts(self) -> dict[str, int]:
        """{verdict: how many}, of those that there are."""
        found: dict[str, int] = {}
        for f in self.parts.values():
            found[f.verdict] = found.get(f.verdict, 0) + 1
        return found

    @property
    def says(self) -> str:
        """What most likely happened, in a line; "" where all is well or nothing fits."""
        verdicts = self.counts
        differ = sum(why == _CHANGED for why in self.others.values())
        if differ > self.compared / 2 > 0:
            return "most tensors that the adapter leaves alone differ: it is another base"
        if set(verdicts) == {"applied"}:
            return _renamed(self.others)
        if set(verdicts) == {"not applied"}:
            return "the adapter was not merged"
        if set(verdicts) == {"applied", "not applied"}:
            return "the adapter was merged in part"
        whys = {f.why for f in self.parts.values() if f.verdict != "applied"}
        return next(iter(whys)) if len(whys) == 1 else ""


def _renamed(others: Mapping[str, str]) -> str:
    """How the names differ, where all that do have a prefix before them, or have lost it."""
    gone, new = ({k for k, why in others.items() if why == what} for what in (_GONE, _NEW))
    if (prefix := _prefix(gone, new)) is not None:
        return f"the names of its tensors have {prefix!r} before them"
    prefix = _prefix(new, gone)
    return "" if prefix is None else f"the names of its tensors lack {prefix!r}"


def verify_merge(
    base: str | os.PathLike[str],
    adapter: Adapter | str | os.PathLike[str],
    merged: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
) -> Verification:
    """Check a merged checkpoint against its base and the adapter, tensor by tensor.

    Works on what PEFT, mergekit or `merge_into_weights` wrote: safetensors, whole or in shards.

    Args:
        base, merged: folders, or safetensors files.
        adapter: an `Adapter`, or what `lf.load` takes.
        progress: called with done, total and the part.

    Raises:
        FileError: no safetensors there.
        MismatchError: nothing of the adapter is in the base.
        RefusedError: the adapter is no plain update, or a weight is quantised.

    Not for: an adapter on a running model (`live.verify`).
    """
    if not isinstance(adapter, Adapter):
        adapter = load(adapter)
    if adapter.refusal is not None:
        raise RefusedError(adapter.refusal)
    before, after = (Weights(read_base(path), adapter.parts.names()) for path in (base, merged))
    plans = [placed(adapter.parts, w.named) for w in (before, after)]
    if not plans[0].spots:
        raise MismatchError(f"nothing of the adapter has a place in {base}: is it the base?")
    check = _Check(adapter, before, after, plans[0].changes(adapter.value_at))
    twins: dict[str, list[Spot]] = {spot.part: [] for spot in plans[0].spots}
    for spot in plans[1].spots:
        twins.setdefault(spot.part, []).append(spot)
    parts = _without_place(plans[0])
    # Updates first: what they are added to is told by them.
    for k, spot in enumerate(sorted(plans[0].spots, key=lambda spot: spot.what != "update")):
        if progress is not None:
            progress(k, len(plans[0].spots), spot.part)
        there = twins[spot.part]
        if not there:
            found = Finding("missing", why="not in the merged checkpoint, or misshapen")
        else:  # a part of two tied weights has a spot for each, in one order
            found = check.found(spot, there.pop(0) if there[1:] else there[0], parts)
        if spot.part not in parts or parts[spot.part].verdict == "applied":
            parts[spot.part] = found
    parts = {spot.part: parts[spot.part] for spot in plans[0].spots} | parts
    touched = {piece.key for plan in plans for spot in plan.spots for piece in spot.pieces}
    others, compared = _others(before, after, touched)
    return Verification(parts, others, compared)


def _without_place(plan: Placement) -> dict[str, Finding]:
    """Parts that the base itself has no place for."""
    found = {part: Finding("missing", why=f"{why} (base)") for part, why in plan.unplaced.items()}
    return found | {part: Finding("missing", why=m.says) for part, m in plan.wrong.items()}


@dataclass(frozen=True)
class _Check:
    """An adapter, its base, what a merge made of it, and {key: what should happen to it}."""

    adapter: Adapter
    before: Weights
    after: Weights
    steps: Mapping[str, list[Step]]

    def found(self, spot: Spot, other: Spot, parts: Mapping[str, Finding]) -> Finding:
        """What became of a part whose place in the merged checkpoint is `other`."""
        counter = spot.what != "update" and not self.adapter.extras[spot.part].is_floating_point()
        for weights, place in () if counter else ((self.before, spot), (self.after, other)):
            for piece in place.pieces:
                dtype = weights.dtype(piece.key)
                if dtype not in FLOATS:
                    raise RefusedError(
                        f"{weights.files.path} is quantised: {piece.key!r} is {dtype}, and what a "
                        "merge did to it can't be told from rounding"
                    )
        if len(spot.pieces) != len(other.pieces):
            return Finding("missing", why=_FORM)
        value = self.adapter.value_at(spot)
        if isinstance(value, LowRank):
            return self._of_update(value, spot, other)
        verdicts: set[Verdict] = set()
        for piece, twin in zip(spot.pieces, other.pieces, strict=True):
            W, W1 = self.before.read(piece.key), self.after.read(twin.key)
            above = [s.part for s, _ in self.steps.get(piece.key, ()) if s.what == "update"]
            if above:  # PEFT saves the weight of an embedding beside the update of it
                verdicts |= {parts[part].verdict for part in above}
            elif same(spot.replaced(W, piece, value), W1):
                verdicts.add("applied")
            else:
                verdicts.add("not applied" if same(W, W1) else "other change")
        return Finding(verdicts.pop() if len(verdicts) == 1 else "other change")

    def _below(self, key: str) -> Tensor:
        """What an update of a tensor is added to: the base's, or what takes its place first."""
        steps = [step for step in self.steps.get(key, ()) if step[0].what != "update"]
        return changed(self.before.read(key), steps, self.adapter.value_at)

    def _of_update(self, u: LowRank, spot: Spot, other: Spot) -> Finding:
        """The verdict on one update."""
        pairs = []
        for piece, twin in zip(spot.pieces, other.pieces, strict=True):
            W, delta = spot.update(self._below(piece.key), piece, u)
            W1, _ = other.update(self.after.read(twin.key), twin, u)
            if W1.shape != W.shape:
                turned = W1.shape == W.mT.shape
                return (
                    Finding("other change", why=_TURNED)
                    if turned
                    else Finding("missing", why=_FORM)
                )
            if not torch.isfinite(W1).all():
                return Finding("other change", why="it holds numbers that are not finite")
            pairs.append((W, W1, delta))
        return _verdict(u, pairs)


def _verdict(u: LowRank, pairs: list[tuple[Tensor, Tensor, Tensor]]) -> Finding:
    """What became of an update, by W, what it is now, and ΔW, of every piece."""
    sums = [_products(W, W1, delta) for W, W1, delta in pairs]
    along, size = (math.fsum(x[i] for x in sums) for i in (0, 1))
    if size == 0:
        still = all(same(W, W1) for W, W1, _ in pairs)
        return Finding("applied" if still else "other change", why="the update is zero")
    c = along / size

    tried: tuple[tuple[Verdict, float], ...] = (
        ("applied", 1.0),
        ("not applied", 0.0),
        ("wrong strength", c),
    )
    for verdict, strength in tried:
        miss, rounding = _shares(pairs, strength, size)
        if abs(strength) > 1.5:  # merged n times, it was rounded n times, much the same way
            rounding = max(rounding, abs(strength) * _shares(pairs, 1.0, size)[1])
        if miss <= _ROUNDING * rounding + _ARITHMETIC * abs(strength) + 1e-6:
            near = max(_NEAR, rounding / 10)
            why = _why_strength(c, u, near) if verdict == "wrong strength" else ""
            if verdict == "applied" and rounding > _HIDES:
                untouched = _shares(pairs, 0.0, size)[0] == 0
                hold = "hold it" if untouched else "tell: rounding hides most of it"
                why = f"the dtype is too coarse to {hold}"
            return Finding(verdict, c, rounding, miss, why)
    miss, rounding = _shares(pairs, c, size)
    if all(_is_turned(*pair) for pair in pairs):
        return Finding("other change", c, rounding, miss, "ΔW was added transposed")
    if all(_is_square(W) for W, _, _ in pairs):
        turned = _shares([(W, W1.mT, delta) for W, W1, delta in pairs], 1.0, size)
        if turned[0] <= _ROUNDING * turned[1] + _ARITHMETIC:
            return Finding("other change", c, rounding, miss, _TURNED)
    return Finding("other change", c, rounding, miss)


def _shares(
    pairs: list[tuple[Tensor, Tensor, Tensor]], c: float, size: float
) -> tuple[float, float]:
    """‖D − c ΔW‖ and the rounding of W + c ΔW over all pieces, as shares of ‖ΔW‖ = √size."""
    both = [_misses(*pair, c) for pair in pairs]
    miss, rounding = (math.fsum(column) for column in zip(*both, strict=True))
    return math.sqrt(miss / size), math.sqrt(rounding / size)


def _products(W: Tensor, W1: Tensor, delta: Tensor) -> tuple[float, float]:
    """⟨D, ΔW⟩ and ‖ΔW‖²."""
    along = size = 0.0
    for a, b, d in _rows(W, W1, delta):
        along += float(((b - a) * d).sum())
        size += float(d.square().sum())
    return along, size


def _misses(W: Tensor, W1: Tensor, delta: Tensor, c: float) -> tuple[float, float]:
    """‖D − c ΔW‖², and ‖e‖² for the rounding e of W + c ΔW to the dtype of W1."""
    miss = rounding = 0.0
    for a, b, d in _rows(W, W1, delta):
        wanted = a + c * d
        miss += float((b - wanted).square().sum())
        rounding += float((wanted.to(W1.dtype).double() - wanted).square().sum())
    return miss, rounding


def _rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors a few rows at a time, in float64."""
    step = max(1, _CHUNK // max(1, tensors[0][0].numel()))
    for at in range(0, len(tensors[0]), step):
        yield tuple(t[at : at + step].double() for t in tensors)


def _is_turned(W: Tensor, W1: Tensor, delta: Tensor) -> bool:
    """Whether the change is along ΔWᵀ."""
    if not _is_square(W):
        return False
    D, turned = (W1.double() - W.double()), delta.T.double()
    size = float(torch.linalg.matrix_norm(D) * torch.linalg.matrix_norm(turned))
    return size > 0 and float((D * turned).sum()) / size > _ALIKE


def _is_square(W: Tensor) -> bool:
    return W.ndim == 2 and W.shape[0] == W.shape[1]


def _why_strength(c: float, u: LowRank, near: float) -> str:
    """What makes such a c, within a share of it."""
    root = math.sqrt(u.rank)
    known = (
        (2.0, "it was merged twice"),
        (3.0, "it was merged three times"),
        (-1.0, "it was subtracted"),
        (root, "it was scaled as with use_rslora, by √r too much"),
        (1 / root, "it was scaled as without use_rslora, by √r too little"),
        (1 / u.scale if u.scale else 0.0, "it was merged without its scale α/r"),
    )
    return ", or ".join(why for value, why in known if value and abs(c / value - 1) < near)


def _others(before: Weights, after: Weights, touched: set[str]) -> tuple[dict[str, str], int]:
    """How the tensors that the adapter leaves alone differ, and how many they are."""
    found, compared = {}, 0
    twins = _twins(before.keys, after.keys)
    alone = set(after.keys) - set(twins.values())
    for key, twin in [*twins.items(), *((k, k) for k in after.keys if k in alone)]:
        sides = ((before, key), (after, twin))
        if key in touched or twin in touched:
            continue
        if twin not in after:
            found[key] = _GONE
        elif key not in before:
            found[key] = _NEW
        elif all(k not in w.named.tensors and w.named.source(k) not in touched for w, k in sides):
            pass  # the embedding, which is compared itself
        else:
            compared += 1
            if not same(before.read(key), after.read(twin)):
                found[key] = _CHANGED
    return found, compared


def _twins(before: Sequence[str], after: Sequence[str]) -> dict[str, str]:
    """{name in the base: what the merged checkpoint calls it}.

    The same, or without the prefix of a base model or with it (`transformer.h.0…`, `h.0…`):
    transformers reads either.
    """
    gone, new = set(before) - set(after), set(after) - set(before)
    for fewer, more, names in ((gone, new, before), (new, gone, after)):
        prefix = _prefix(fewer, more)
        if prefix and not any(name.startswith(prefix) for name in names):
            longer = {k: prefix + k for k in fewer}
            renamed = longer if fewer is gone else {v: k for k, v in longer.items()}
            return {key: renamed.get(key, key) for key in before}
    return {key: key for key in before}


def _prefix(fewer: Set[str], more: Set[str]) -> str | None:
    """The prefix that makes each of the one names one of the others."""
    longest = max(fewer, key=len, default="")
    for name in more if longest else ():
        prefix = name.removesuffix(longest)
        if prefix not in ("", name) and {prefix + k for k in fewer} <= more:
            return prefix
    return None
