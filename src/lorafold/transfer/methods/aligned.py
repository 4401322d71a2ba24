"""`procrustes` and `functional`: an update moved by what an alignment knows, module by module.

With x_s and x_t what a pair of maps sees, T_in and T_out the maps of their two sides (`maps.py`),

    procrustes    A_t = A_s T_in,  B_t = T_outᵀ B_s                  in new coordinates
    functional    the ΔW_t with ‖H ΔW_tᵀ − D‖² + λ‖ΔW_t‖² smallest at the source's rank,
                  H = the x_t,  D = x_s ΔW_sᵀ T_out,  λ = tr(HᵀH) / (n − 1)

D has the columns of B_t and so the source's rank: the reduced-rank ridge (S = HᵀH + λI,
K = S^{-1/2} HᵀD = P Λ Qᵀ, A = PᵀS^{-1/2}, B = QΛ) is A_t = A_s C_st S^{-1} with that same B_t. It
takes sums and no texts. After procrustes it is fitted to D − H ΔW_pᵀ, which has these columns too:
the ridge then pulls towards procrustes instead of zero. In the end a number multiplies the update,
so that its effect is the nearest to D.

Source: Izenman, Reduced-rank regression for the multivariate linear model (1975).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ...errors import MismatchError
from ...lowrank import LowRank
from ...roles import Role
from ..align.bases import Part
from ..align.covariances import Moments
from ..alignment import Alignment
from ..job import Job, Moved
from .maps import Map, blocks_of, explained, ridged, together
from .maps import procrustes as polar
from .pair import alignment_of, assembled, parts_in


@dataclass(frozen=True, eq=False)
class Effect:
    """An update on its way: what of the source it is, and what is known of the two sides.

    Args:
        A: (r, in), B: (out, r): of one linear map of the source, float64.
        input: sums of its inputs and their counterparts.
        inner, outer: the maps of input and output.
    """

    A: Tensor
    B: Tensor
    input: Moments
    inner: Map
    outer: Map

    @property
    def moved(self) -> Tensor:
        """B_t, (out of the target, r)."""
        return self.outer.forward.T @ self.B


Fit = Callable[[Effect], Tensor]  # to A_t (r, in of the target)


def procrustes(job: Job) -> Moved:
    """The update in the target's coordinates."""
    return turned(job, alignment_of(job))


def turned(job: Job, alignment: Alignment) -> Moved:
    """`procrustes` by an alignment from wherever."""
    return _each(job, alignment, lambda e: e.A @ e.inner.back.T)


def functional(job: Job) -> Moved:
    """The update whose effect on the target's activations is nearest to the source's."""
    return _each(job, alignment_of(job), _after_procrustes if job.options["after"] else _fitted)


def _fitted(e: Effect) -> Tensor:
    S = ridged(e.input.tt, e.input.count)
    found: Tensor = torch.linalg.solve(S, e.input.st.T @ e.A.T).T
    return found


def _after_procrustes(e: Effect) -> Tensor:
    A = e.A @ e.inner.back.T
    missing = e.input.st.T @ e.A.T - e.input.tt @ A.T
    found: Tensor = A + torch.linalg.solve(ridged(e.input.tt, e.input.count), missing).T
    return found


def _each(job: Job, alignment: Alignment, fit: Fit) -> Moved:
    given = parts_in(job.adapter, alignment)
    maps = _Maps(alignment, *_checked(job.options))
    found: dict[Part, LowRank] = {}
    fits: dict[str, float] = {}
    dropped: dict[str, str] = {}
    effects = [0.0, 0.0]
    for k, (role, u) in enumerate(given.pairs):
        join = alignment.joins[role]
        if job.progress is not None:
            job.progress(k, len(given.pairs), join.target.path)
        e = maps.effect(role, u)
        r2, least = maps.fit(role), job.options["threshold"]
        if least is not None and r2 is not None and r2 < least:
            dropped[join.source.path] = f"R² {r2:.2f} of its alignment, below {least:g}"
            continue
        A, B = fit(e), e.moved
        factor = _nearest(e, A, B) if job.options["scale"] else 1.0
        found[join.target] = LowRank(A.float(), B.float(), factor / join.shared)
        seen = maps.effects(role, e, factor * A, B)
        if seen is not None:
            effects = [a + b for a, b in zip(effects, seen, strict=True)]
        if r2 is not None:
            fits[join.target.path] = min(r2, fits.get(join.target.path, r2))
    modules, sources = assembled(found, given, alignment)
    return Moved(
        modules,
        sources,
        fits=fits,
        dropped=dropped,
        without=given.without,
        said={
            "effect": effects[0] / effects[1] if effects[1] > 0 else None,
            "texts": alignment.texts,
            "tokens": alignment.tokens,
            "directions": maps.deficient(),
            "layers": {side: list(of) for side, of in alignment.layers.items()},
        },
    )


def _checked(options: Mapping[str, Any]) -> tuple[bool, float]:
    whiten = options["whiten"]
    if isinstance(whiten, bool) or not isinstance(whiten, Real) or not 0 <= float(whiten) <= 1:
        raise MismatchError(f"whiten must lie in [0, 1], found {whiten!r}")
    least = options["threshold"]
    if least is not None and (isinstance(least, bool) or not isinstance(least, Real)):
        raise MismatchError(f"threshold must be an R² or None, found {least!r}")
    if options.get("after") not in (None, "procrustes"):
        raise MismatchError(f"after must be 'procrustes' or None, found {options['after']!r}")
    return bool(options["centre"]), float(whiten)


def _nearest(e: Effect, A: Tensor, B: Tensor) -> float:
    """The number that brings the effect of B A nearest to the source's, mapped: ⟨D, E⟩ / ‖E‖²."""
    gram = B.T @ B
    both = float((((e.A @ e.input.st) @ A.T) * gram).sum())
    own = float((((A @ e.input.tt) @ A.T) * gram).sum())
    return both / own if own > 0 else 0.0


class _Maps:
    """The maps of an alignment's sides, each made once."""

    def __init__(self, alignment: Alignment, centre: bool, whiten: float) -> None:
        self._alignment, self._centre, self._whiten = alignment, centre, whiten
        self._made: dict[tuple[str, ...], Map] = {}

    def effect(self, role: Role, u: LowRank) -> Effect:
        """The update of a role with the maps of its two sides."""
        dtype, device = torch.float64, u.A.device
        return Effect(
            u.scale * u.A.to(dtype),
            u.B.to(dtype),
            self._alignment.all_of(self._alignment.joins[role].input).to(device),
            self._side(role, "input", device),
            self._side(role, "output", device),
        )

    def _side(self, role: Role, end: str, device: torch.device) -> Map:
        names = self._alignment.space(role, end)
        if names not in self._made:
            join = self._alignment.joins[role]
            heads = join.source.heads, join.target.heads
            dims = [0 if of is None else of.dim for of in heads]
            blocks = blocks_of(getattr(join, f"{end}_heads"), dims[0], dims[1])
            sums = [self._alignment.all_of(name).to(device) for name in names]
            sums = [m.centred() for m in sums] if self._centre else sums
            self._made[names] = polar(together(sums), blocks, self._whiten)
        return self._made[names]

    def effects(self, role: Role, e: Effect, A: Tensor, B: Tensor) -> tuple[float, float] | None:
        """How much of ‖D‖² the update explains on the held-out texts, and ‖D‖²; None without any.

        D is in the target's coordinates only as far as the map of the outputs is right, so what is
        explained counts by that map's R².
        """
        join = self._alignment.joins[role]
        m, out = (self._alignment.held.get(name) for name in (join.input, join.output))
        if m is None or out is None:
            return None
        right = explained(out, self._made[self._alignment.space(role, "output")].forward.to(out.st))
        m, gram = m.to(A.device), B.T @ B
        left = [(e.A @ m.ss @ e.A.T), (e.A @ m.st @ A.T), (A @ m.tt @ A.T)]
        whole, both, own = (float((x * gram).sum()) for x in left)
        return min(max(right or 0.0, 0.0), 1.0) * (2 * both - own), whole

    def fit(self, role: Role) -> float | None:
        """R² of the worse of its two sides on the held-out texts; None without any."""
        found = []
        for end in ("input", "output"):
            m = self._alignment.held.get(getattr(self._alignment.joins[role], end))
            if m is None:
                return None
            forward = self._made[self._alignment.space(role, end)].forward
            found.append(explained(m.centred(), forward.to(m.st)))
        known = [r2 for r2 in found if r2 is not None]
        return min(known, default=None)

    def deficient(self) -> dict[str, str]:
        """{side: how many of its directions have energy}, where not all do."""
        return {k[0]: f"{m.rank} of {m.full}" for k, m in self._made.items() if m.rank < m.full}
