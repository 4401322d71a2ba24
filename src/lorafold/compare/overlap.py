"""`overlap`: where two adapters act alike, module by module, and what merging them would cost.

With the decompositions ΔW = U S Vᵀ of both at a module, U_aᵀ U_b and V_aᵀ V_b (r×r) hold the
principal angles between their output and input spaces (Björck & Golub 1973), and

    shared_out = (‖P_a ΔW_b‖² + ‖P_b ΔW_a‖²) / (‖ΔW_a‖² + ‖ΔW_b‖²),   P = U Uᵀ,

is the share of their energy that lies in the space of the other (by chance r/out); on the input
side likewise. Merged, each adapter also gets what the other makes of its inputs and writes to its
outputs: ‖P_a ΔW_b Q_a‖ beside ‖ΔW_a‖, Q = V Vᵀ, which is `interference_a`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapter import Adapter
from ..collection.sources import named_handles
from ..errors import MismatchError, RefusedError
from ..lowrank import LowRank, cosine
from ..thin import threads

_DEAD = 1e-6  # relative singular value of a direction that float32 factors hold nothing of


@dataclass(frozen=True, eq=False)
class ModuleOverlap:
    """Two updates at one module.

    Args:
        path: the module. norm_a, norm_b: ‖ΔW‖ of each. distance: ‖ΔW_a − ΔW_b‖. cosine: 0 where
            one is zero.
        angles_out, angles_in: (k,) principal angles between their column and row spaces, in
            radians, ascending; k is the smaller rank.
        shared_out, shared_in: share of their energy in the other's column or row space.
        interference_a: what b does in a's input and output space, relative to a; 0 where a is zero.
            interference_b: the other way round.
    """

    path: str
    norm_a: float
    norm_b: float
    distance: float
    cosine: float
    angles_out: np.ndarray
    angles_in: np.ndarray
    shared_out: float
    shared_in: float
    interference_a: float
    interference_b: float


@dataclass(frozen=True, eq=False)
class Overlap:
    """Two adapters compared. Made by `overlap`; over all modules, one that only one has is zero.

    Not for: which of many are alike (`similarity`).

    Args:
        norm_a, norm_b, distance, cosine, shared_out, shared_in, interference_a, interference_b: as
            in `ModuleOverlap`, over all modules.
        modules: those that both have, in a's order. only_in_a, only_in_b: the paths of the rest.
    """

    norm_a: float
    norm_b: float
    distance: float
    cosine: float
    shared_out: float
    shared_in: float
    interference_a: float
    interference_b: float
    modules: tuple[ModuleOverlap, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]

    @property
    def interference(self) -> float:
        """Forecast of what merging costs: the mean of what each does to the other; 0 is nothing."""
        return (self.interference_a + self.interference_b) / 2

    def __repr__(self) -> str:
        return (
            f"Overlap(cosine {self.cosine:.4f}, shared {self.shared_out:.3f} out and "
            f"{self.shared_in:.3f} in, interference {self.interference:.3f})"
        )


def overlap(
    a: Any, b: Any, *, progress: Callable[[int, int, str], object] | None = None
) -> Overlap:
    """Compare two adapters module by module, of any ranks and targets over one base.

    Args:
        a, b: an `Adapter` or a path each. progress: called with (done, total, module).

    Returns:
        An `Overlap`.

    Raises:
        MismatchError: they belong to different bases, or a module has two shapes or kinds.
        RefusedError: ΔW algebra would be wrong for one.

    Not for: configs and heads (`lorafold diff` shows those too).

    Source: Björck & Golub, Numerical methods for computing angles between linear subspaces (1973).

    Examples:
        >>> import torch, lorafold as lf
        >>> u = lf.LowRank(torch.randn(2, 32), torch.randn(16, 2))
        >>> found = lf.overlap(lf.Adapter({"q_proj": u}), lf.Adapter({"q_proj": 2 * u}))
        >>> round(found.cosine, 4), round(found.modules[0].shared_in, 4)
        (1.0, 1.0)
    """
    mine, theirs = _one(a, "a"), _one(b, "b")
    if mine.base_model and theirs.base_model and mine.base_model != theirs.base_model:
        raise MismatchError(
            f"the adapters belong to different bases: {mine.base_model!r} and "
            f"{theirs.base_model!r}; if these are one, load them with one base_model="
        )
    return compared(mine, theirs, progress)


def _one(source: Any, letter: str) -> Adapter:
    found = named_handles({letter: source})[letter]
    if found.refusal is not None:
        name = getattr(found, "path", None) or letter
        raise RefusedError(f"{str(name)!r} can't be compared: {found.refusal}")
    return found.load()


def compared(
    a: Adapter, b: Adapter, progress: Callable[[int, int, str], object] | None = None
) -> Overlap:
    """`overlap` of two adapters, whatever their bases are called."""
    both = [p for p in a.modules if p in b.modules]
    for path in both:
        mine, theirs = ((x.kind, x.kernel) for x in (a.layout(path), b.layout(path)))
        if mine != theirs:
            raise MismatchError(
                f"module {path!r} is of kind {mine[0]} in one adapter and {theirs[0]} in the other"
            )
    found = []
    with threads(1):  # thin algebra on several waits more than it works
        for k, path in enumerate(both):
            if progress is not None:
                progress(k, len(both), path)
            found.append(_Sides(path, a.modules[path], b.modules[path]))
    only_a = {p: u.norm() for p, u in a.modules.items() if p not in b.modules}
    only_b = {p: u.norm() for p, u in b.modules.items() if p not in a.modules}
    modules = tuple(s.overlap() for s in found)
    norms = (
        math.hypot(*(m.norm_a for m in modules), *only_a.values()),
        math.hypot(*(m.norm_b for m in modules), *only_b.values()),
    )
    inner = math.fsum(s.inner for s in found)
    return Overlap(
        *norms,
        math.hypot(*(m.distance for m in modules), *only_a.values(), *only_b.values()),
        cosine(inner, *norms),
        *_shares(found, math.hypot(*norms)),
        *_relative([s.inside for s in found], norms),
        modules,
        tuple(only_a),
        tuple(only_b),
    )


class _Sides:
    """Two updates of one shape by their singular values, and the r×r products of their spaces."""

    def __init__(self, path: str, u: LowRank, v: LowRank) -> None:
        if u.shape != v.shape:
            raise MismatchError(
                f"module {path!r} is {u.shape} in one adapter and {v.shape} in the other"
            )
        self.path = path
        self.distance = (u - v).norm()
        (U, S, V), (X, T, Y) = _decomposed(u), _decomposed(v)
        self.norms = float(S.norm()), float(T.norm())
        self.out, self.into = U.T @ X, V.T @ Y
        self.inner = float((S[:, None] * self.out * self.into * T).sum())
        # On the output and on the input side; and what each does within the other.
        self.shared = tuple(
            math.hypot(float((M * T).norm()), float((S[:, None] * M).norm()))
            for M in (self.out, self.into)
        )
        self.inside = (
            float((self.out * T @ self.into.T).norm()),
            float((self.out.T * S @ self.into).norm()),
        )

    def overlap(self) -> ModuleOverlap:
        return ModuleOverlap(
            self.path,
            *self.norms,
            self.distance,
            cosine(self.inner, *self.norms),
            _angles(self.out),
            _angles(self.into),
            *_shares([self], math.hypot(*self.norms)),
            *_relative([self.inside], self.norms),
        )


def _decomposed(u: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), S (k,), V (in, k) in float64 (angles are cosines near 1), without dead ones."""
    U, S, Vh = u.to(dtype=torch.float64).svd()
    alive = _DEAD * S[:1] < S
    return U[:, alive], S[alive], Vh[alive].T


def _angles(M: Tensor) -> np.ndarray:
    """Principal angles from the product of two orthonormal bases, ascending."""
    if 0 in M.shape:
        return np.zeros(0)
    angles: np.ndarray = torch.linalg.svdvals(M).clamp(0, 1).arccos().cpu().numpy()
    return angles


def _shares(found: Sequence[_Sides], norm: float) -> tuple[float, float]:
    """Shared energy on the output and input side, of two adapters whose norms make `norm`."""
    out, into = (math.hypot(*(s.shared[k] for s in found)) for k in (0, 1))
    return (min(1.0, (out / norm) ** 2), min(1.0, (into / norm) ** 2)) if norm > 0 else (0.0, 0.0)


def _relative(inside: Sequence[tuple[float, float]], norms: Iterable[float]) -> tuple[float, float]:
    """What each does within the other, relative to it; nothing within a zero one."""
    first, second = (
        math.hypot(*(pair[k] for pair in inside)) / norm if norm > 0 else 0.0
        for k, norm in enumerate(norms)
    )
    return first, second
