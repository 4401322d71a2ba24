"""Sums over paired tokens: all that is kept of the activations of two bases.

Of rows x_s (d_s,) and x_t (d_t,) that belong to the same place of the same text,

    n,  Σ x_s,  Σ x_t,  Σ x_sᵀ x_s,  Σ x_sᵀ x_t,  Σ x_tᵀ x_t

in float64 over batches: means, covariances, cross-covariances, and with them every orthogonal map,
every ridge regression and every share of explained variance, of any subset of channels. They add up
over texts, so a text is seen once and nothing of it stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FIELDS = ("s", "t", "ss", "st", "tt")


@dataclass(frozen=True, eq=False)
class Moments:
    """The sums of one site.

    Args:
        count: n. s, t: (d_s,), (d_t,). ss, st, tt: (d_s, d_s), (d_s, d_t), (d_t, d_t), not centred.
    """

    count: int
    s: Tensor
    t: Tensor
    ss: Tensor
    st: Tensor
    tt: Tensor

    def __add__(self, other: Moments) -> Moments:
        sums = (getattr(self, f) + getattr(other, f) for f in FIELDS)
        return Moments(self.count + other.count, *sums)

    def to(self, device: torch.device) -> Moments:
        """The same sums there."""
        return Moments(self.count, *(getattr(self, f).to(device) for f in FIELDS))

    def part(self, source: Tensor | None, target: Tensor | None) -> Moments:
        """Those of some channels: indices of either side, all where None."""
        s, t, ss, st, tt = (getattr(self, f) for f in FIELDS)
        if source is not None:
            s, ss, st = s[source], ss[source][:, source], st[source]
        if target is not None:
            t, tt, st = t[target], tt[target][:, target], st[:, target]
        return Moments(self.count, s, t, ss, st, tt)

    def centred(self) -> Moments:
        """Those of the rows less their means."""
        n = max(self.count, 1)
        s, t = self.s, self.t
        return Moments(
            self.count,
            torch.zeros_like(s),
            torch.zeros_like(t),
            self.ss - torch.outer(s, s) / n,
            self.st - torch.outer(s, t) / n,
            self.tt - torch.outer(t, t) / n,
        )

    @property
    def is_finite(self) -> bool:
        """Whether no activation was NaN or infinite."""
        return all(bool(getattr(self, f).sum().isfinite()) for f in FIELDS)


def moments_of(x_s: Tensor, x_t: Tensor) -> Moments:
    """Those of rows (n, d_s) and (n, d_t) that belong together.

    The products of a batch are taken in float32 at least, as its activations are, and added up in
    float64.
    """
    work = torch.promote_types(torch.promote_types(x_s.dtype, x_t.dtype), torch.float32)
    a, b = x_s.to(work), x_t.to(x_s.device, work)
    sums = a.sum(0), b.sum(0), a.T @ a, a.T @ b, b.T @ b
    return Moments(len(a), *(x.double() for x in sums))


def added(sums: dict[str, Moments], more: Mapping[str, Moments]) -> None:
    """Add what a batch gave to the sums, site by site."""
    for site, m in more.items():
        sums[site] = sums[site] + m if site in sums else m


def cka(m: Moments) -> float:
    """Linear CKA of the two sides, in [0, 1]: ‖S_st‖² / (‖S_ss‖ ‖S_tt‖), centred.

    Source: Kornblith et al., Similarity of Neural Network Representations Revisited (2019),
    arXiv:1905.00414.
    """
    c = m.centred()
    scale = float(c.ss.norm() * c.tt.norm())
    return float((c.st**2).sum()) / scale if scale > 0 else 0.0
