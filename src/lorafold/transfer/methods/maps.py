"""From sums to maps: orthogonal ones by the polar factor, linear ones by ridge regression.

With rows x_s and x_t of one site and C_st = Σ x_sᵀ x_t (less the means where `centre`),

    C_ss^{-w/2} C_st C_tt^{-w/2} = P Λ Qᵀ,      x_t ≈ x_s · C_ss^{-w/2} P Qᵀ C_tt^{w/2}

which for w = 0 is orthogonal Procrustes, T = P Qᵀ, and for w = 1 canonical correlation. A direction
without energy (Λ small against its largest) has no polar factor but noise's, and is left out. Heads
are mapped each for itself. Everything in float64.

Source: Schönemann, A generalized solution of the orthogonal Procrustes problem (1966); partial
whitening: Kessy, Lewin & Strimmer, Optimal whitening and decorrelation (2018), arXiv:1512.00809.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..align.covariances import FIELDS, Moments
from ..alignment import Heading

Blocks = tuple[tuple[Tensor, Tensor], ...]  # channels of the source and of the target

FLOOR = 1e-6  # relative Λ, which is an energy: below it the activations' own rounding speaks


@dataclass(frozen=True, eq=False)
class Map:
    """What one side of a linear map of the source is in the target.

    Args:
        forward: (d_s, d_t), x_t ≈ x_s @ forward. back: (d_t, d_s), x_s ≈ x_t @ back.
        rank: directions that have energy. full: directions that there could be.
    """

    forward: Tensor
    back: Tensor
    rank: int
    full: int


def together(sums: Sequence[Moments]) -> Moments:
    """Sums of several sites of one space as one, each site with the same weight."""
    if len(sums) == 1:
        return sums[0]
    count, parts = 0, []
    for m in sums:
        energy = float((m.ss.diagonal().sum() * m.tt.diagonal().sum()).sqrt())
        c = 1 / energy if energy > 0 else 0.0
        parts.append(Moments(m.count, *(getattr(m, f) * c for f in FIELDS)))
        count += m.count
    found = parts[0]
    for m in parts[1:]:
        found = found + m
    return replace(found, count=count)


def procrustes(m: Moments, blocks: Blocks | None, whiten: float) -> Map:
    """The polar factor's map, block by block where there are heads.

    Args:
        m: sums, centred or not. blocks: channels that belong together. whiten: w, in [0, 1].
    """
    if blocks is None:
        return _polar(m, whiten)
    forward = m.st.new_zeros(m.st.shape)
    back = m.st.new_zeros(m.st.T.shape)
    rank = full = 0
    for s, t in blocks:
        one = _polar(m.part(s, t), whiten)
        forward[s[:, None], t] = one.forward
        back[t[:, None], s] = one.back
        rank, full = rank + one.rank, full + one.full
    return Map(forward, back, rank, full)


def _polar(m: Moments, whiten: float) -> Map:
    if not whiten:
        T, rank = _polar_factor(m.st)
        return Map(T, T.T, rank, min(m.st.shape))
    down_s, up_s = _powers(m.ss, whiten / 2)
    down_t, up_t = _powers(m.tt, whiten / 2)
    T, rank = _polar_factor(down_s @ m.st @ down_t)
    return Map(down_s @ T @ up_t, down_t @ T.T @ up_s, rank, min(m.st.shape))


def _polar_factor(C: Tensor) -> tuple[Tensor, int]:
    """P Qᵀ of the directions that have energy, and how many they are."""
    P, values, Q = torch.linalg.svd(C, full_matrices=False)
    kept = values > FLOOR * values[0]
    return P[:, kept] @ Q[kept], int(kept.sum())


def _powers(C: Tensor, half: float) -> tuple[Tensor, Tensor]:
    """C^{-half} and C^{half}, on the directions that have energy."""
    values, V = torch.linalg.eigh(C)
    kept = values > FLOOR * values[-1].clamp_min(0)
    values, V = values[kept], V[:, kept]
    return (V * values**-half) @ V.T, (V * values**half) @ V.T


def ridge(m: Moments) -> Map:
    """Ridge regressions either way, λ = tr(S) / (n − 1)."""
    forward = torch.linalg.solve(ridged(m.ss, m.count), m.st)
    back = torch.linalg.solve(ridged(m.tt, m.count), m.st.T)
    size = min(m.st.shape)
    return Map(forward, back, size, size)


def ridged(C: Tensor, count: int) -> Tensor:
    """C + λI with λ = tr(C) / (n − 1); 1 where C is zero."""
    weight = C.diagonal().sum() / max(count - 1, 1)
    weight = torch.where(weight > 0, weight, torch.ones_like(weight))
    return C + weight * torch.eye(len(C), dtype=C.dtype, device=C.device)


def explained(m: Moments, forward: Tensor) -> float | None:
    """R²: the share of ‖X_t‖² that X_s @ forward explains; None without rows or energy."""
    total = float(m.tt.diagonal().sum())
    if not m.count or total <= 0:
        return None
    both = 2 * float((forward * m.st).sum()) - float((forward * (m.ss @ forward)).sum())
    return both / total


def blocks_of(heading: Heading | None, source: int, target: int) -> Blocks | None:
    """The channels of paired heads; None where the side has none.

    Args:
        heading: ((head of the target, heads of the source), …). source, target: channels of a head.
    """
    if heading is None:
        return None
    of_s, of_t = torch.arange(source), torch.arange(target)
    return tuple((torch.cat([of_s + k * source for k in s]), of_t + t * target) for t, s in heading)
