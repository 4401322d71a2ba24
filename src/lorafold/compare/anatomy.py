"""`anatomy`: what an adapter does, module by module, and which modules stand out.

All from the singular values σ of ΔW and its row and column norms, in factored form:

    stable rank           ‖ΔW‖² / σ₁²                 how many directions as strong as the first
    participation ratio   (Σσ²)² / Σσ⁴                how many directions carry the energy
    entropy               −Σ p ln p, p = σ²/Σσ²       the same in nats; e^entropy directions

A module stands out where a measure is far from what a robust line through its family says for its
depth: the modules whose paths differ in indices alone (all q_proj), the slope the median of all
slopes between two of them (Theil 1950, Sen 1968). How far is a robust z, by the median absolute
deviation (Iglewicz & Hoaglin 1993, who mark 3.5).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch

from ..collection.sources import named_handles
from ..errors import MismatchError, RefusedError
from ..lowrank import LowRank
from ..thin import threads

_MAD = 1.4826  # of a normal distribution: its deviation over its median absolute deviation
_SPREAD = 0.1  # natural logarithms: a family more even than that is even
_FEW = 4  # modules below which a family says nothing
_LEAST = 1e-6  # relative to its family, what counts as zero


@dataclass(frozen=True, eq=False)
class ModuleAnatomy:
    """One update, measured.

    Args:
        path: the module. family: what it has in common with its likes in other layers, as "q_proj".
        depth: the first index in its path; None where there is none.
        shape: (out, in). rank: of the factors. norm: ‖ΔW‖.
        stable_rank, participation_ratio: in directions. entropy: in nats. All 0 for a zero update.
        row: index of the row of ΔW with the largest norm, row_norm. column, column_norm: likewise.
        spectrum: (min(r, out, in),) singular values, descending.
    """

    path: str
    family: str
    depth: int | None
    shape: tuple[int, int]
    rank: int
    norm: float
    stable_rank: float
    participation_ratio: float
    entropy: float
    row: int
    row_norm: float
    column: int
    column_norm: float
    spectrum: np.ndarray


# What is looked at for anomalies, as numbers above 0 of which logarithms are taken.
_MEASURES: dict[str, Callable[[ModuleAnatomy], float]] = {
    "norm": lambda m: m.norm,
    "stable_rank": lambda m: m.stable_rank,
    "entropy": lambda m: math.exp(m.entropy),
    "row": lambda m: m.row_norm / m.norm if m.norm > 0 else 0.0,
    "column": lambda m: m.column_norm / m.norm if m.norm > 0 else 0.0,
}


@dataclass(frozen=True)
class Anomaly:
    """A module that differs from its family.

    Args:
        path, family: the module's. measure: "norm", "stable_rank", "entropy" (as directions,
            e^entropy), "row" or "column" (the largest, as a share of the norm).
        value: what it is. expected: what its family says for its depth. z: how many robust
            deviations lie between them, in logarithms.
    """

    path: str
    family: str
    measure: str
    value: float
    expected: float
    z: float


@dataclass(frozen=True, eq=False)
class Anatomy:
    """An adapter, measured. Made by `anatomy`.

    Not for: comparing adapters (`similarity`, `overlap`).

    Args:
        norm: ‖ΔW‖ over all modules. modules: each of them, as in the adapter.
        anomalies: the largest deviation first.
    """

    norm: float
    modules: tuple[ModuleAnatomy, ...]
    anomalies: tuple[Anomaly, ...]

    def __repr__(self) -> str:
        return (
            f"Anatomy({len(self.modules)} modules, norm {self.norm:.4g}, "
            f"{len(self.anomalies)} anomalies)"
        )

    @property
    def families(self) -> dict[str, tuple[ModuleAnatomy, ...]]:
        """Family → its modules, from the first layer to the last."""
        return grouped(self.modules)


def anatomy(adapter: Any, *, threshold: float = 3.5) -> Anatomy:
    """Measure every module of an adapter, and find those that differ from their family.

    Args:
        adapter: an `Adapter`, a path or LIB:NAME.
        threshold: robust deviations from which on a module is an anomaly.

    Returns:
        An `Anatomy`.

    Raises:
        MismatchError: a threshold that is no number above 0.
        RefusedError: ΔW algebra would be wrong for it.
        FileError: it can't be read.

    Not for: a judgement of quality: what differs may be right.

    Examples:
        >>> import torch, lorafold as lf
        >>> u = lambda: lf.LowRank(torch.randn(4, 32), torch.randn(16, 4))
        >>> a = lf.Adapter({f"layers.{n}.q_proj": 100 * u() if n == 5 else u() for n in range(9)})
        >>> found = lf.anatomy(a).anomalies[0]
        >>> found.path, found.measure
        ('layers.5.q_proj', 'norm')
    """
    if isinstance(threshold, bool) or not isinstance(threshold, Real) or not threshold > 0:
        raise MismatchError(f"threshold must be a number above 0, found {threshold!r}")
    handle = named_handles({"adapter": adapter})["adapter"]
    if handle.refusal is not None:
        name = getattr(handle, "path", None) or "the adapter"
        raise RefusedError(f"{name} can't be measured: {handle.refusal}")
    families = families_of(handle.shapes)
    with threads(1):  # thin algebra on several waits more than it works
        modules = tuple(_measured(p, *families[p], handle.read(p)) for p in handle.shapes)
    return Anatomy(
        math.hypot(*(m.norm for m in modules)), modules, tuple(_anomalies(modules, threshold))
    )


def _measured(path: str, family: str, depth: int | None, u: LowRank) -> ModuleAnatomy:
    U, S, Vh = u.svd()
    energy = S.double() ** 2
    total = float(energy.sum())
    p = energy / total if total > 0 else energy
    top = float(S[0])
    weights = S / top if top > 0 else S  # so that no square overflows
    rows = top * torch.linalg.vector_norm(U * weights, dim=1).double()
    columns = top * torch.linalg.vector_norm(weights[:, None] * Vh, dim=0).double()
    row, column = int(rows.argmax()), int(columns.argmax())
    square = float((p**2).sum())
    return ModuleAnatomy(
        path,
        family,
        depth,
        u.shape,
        u.rank,
        math.sqrt(total),
        1 / float(p[0]) if total > 0 else 0.0,
        1 / square if total > 0 else 0.0,
        float(torch.special.entr(p).sum()),
        row,
        float(rows[row]),
        column,
        float(columns[column]),
        S.double().cpu().numpy(),
    )


# Families


def families_of(paths: Iterable[str]) -> dict[str, tuple[str, int | None]]:
    """Path → family and depth.

    A family has the paths that differ in indices alone. It is called by as many of the last
    components as tell it from the others.

    Examples:
        >>> families_of(["h.0.attn.q", "h.1.attn.q", "h.0.mlp.up[3]"])["h.1.attn.q"]
        ('q', 1)
    """
    patterns = {path: re.sub(r"\[\d+\]$|(?<![^.])\d+(?![^.])", "", path) for path in paths}
    words = {p: [w for w in p.split(".") if w] or [p] for p in dict.fromkeys(patterns.values())}
    names = {}
    for pattern, own in words.items():
        for k in range(1, len(own) + 1):
            names[pattern] = ".".join(own[-k:])
            if sum(w[-k:] == own[-k:] for w in words.values()) == 1:
                break
    return {path: (names[pattern], _depth(path)) for path, pattern in patterns.items()}


def _depth(path: str) -> int | None:
    return next((int(part) for part in path.split(".") if part.isdecimal()), None)


def grouped(modules: Sequence[ModuleAnatomy]) -> dict[str, tuple[ModuleAnatomy, ...]]:
    """Family → its modules by depth."""
    found: dict[str, list[ModuleAnatomy]] = {}
    for m in modules:
        found.setdefault(m.family, []).append(m)
    return {
        family: tuple(sorted(ms, key=lambda m: -1 if m.depth is None else m.depth))
        for family, ms in found.items()
    }


# What stands out


def _anomalies(modules: Sequence[ModuleAnatomy], threshold: float) -> list[Anomaly]:
    found = []
    for family, members in grouped(modules).items():
        if len(members) < _FEW:
            continue
        depth = np.array([0 if m.depth is None else m.depth for m in members], float)
        for measure, value in _MEASURES.items():
            values = np.array([value(m) for m in members])
            expected, z = _off_line(depth, values)
            found += [
                Anomaly(m.path, family, measure, float(v), float(e), float(d))
                for m, v, e, d in zip(members, values, expected, z, strict=True)
                if abs(d) > threshold
            ]
    return sorted(found, key=lambda a: -abs(a.z))


def _off_line(x: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a robust line of logarithms along x expects, and how far off each value is."""
    top = np.median(values[values > 0]) if (values > 0).any() else 1.0
    y = np.log(np.maximum(values, _LEAST * top))
    depths = np.unique(x)
    levels = np.array([np.median(y[x == d]) for d in depths])
    rise, run = levels[:, None] - levels, depths[:, None] - depths
    slope = np.median(rise[run > 0] / run[run > 0]) if len(depths) > 1 else 0.0
    line = slope * x
    line += np.median(y - line)
    off = y - line
    return np.exp(line), off / max(_MAD * float(np.median(np.abs(off))), _SPREAD)
