"""One module of all adapters, and the space that they span together.

With B = [s₁B₁ … s_N B_N] and A = [A₁; … ; A_N], the eigenvectors U (out, p) of Σ ΔW ΔWᵀ and
V (in, q) of Σ ΔWᵀ ΔW hold every update: ΔW_i = U C_i Vᵀ with a core C_i (p, q), p and q at most Σr.
They depend on the updates alone, neither on how they are factored nor on their order, as a basis
from a QR of the factors would. Everything comes from the (Σr)² Grams of B and A in float64:

    Y = [s_i B_i (A_i A_iᵀ)^½],   Yᵀ Y = W Λ Wᵀ,   U = Y W Λ^-½,

and V likewise, so that nothing of the size (out, in) is made, and no QR of a tall matrix.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...lowrank import LowRank

# Directions of the stack below this share of the largest hold what float32 factors are rounded by.
NOISE = 1e-6
_CANCEL = 100.0  # so many times the result may the parts of a float32 product be


@dataclass(frozen=True, eq=False)
class Members:
    """One module of all adapters.

    Args:
        path: the module's.
        names: the adapters'.
        updates: each adapter's, None where it has no such module: it counts as zero.
        weights: each adapter's. densities: the share of entries that each keeps.
        seed: of the random masks.
    """

    path: str
    names: tuple[str, ...]
    updates: tuple[LowRank | None, ...]
    weights: tuple[float, ...]
    densities: tuple[float, ...]
    seed: int = 0

    @property
    def present(self) -> list[int]:
        """Positions of the adapters that have the module."""
        return [i for i, u in enumerate(self.updates) if u is not None]

    @property
    def there(self) -> list[LowRank]:
        """The updates that are there."""
        return [u for u in self.updates if u is not None]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.there[0].shape

    @property
    def ranks(self) -> list[int]:
        """Of the updates that are there."""
        return [u.rank for u in self.there]

    def uniforms(self, i: int, shape: Sequence[int], side: str = "") -> Tensor:
        """Numbers in [0, 1) that depend on seed, name, module and side only, (*shape) float32."""
        words = f"{self.seed}\0{self.names[i]}\0{self.path}\0{side}"
        digest = hashlib.sha256(words.encode("utf-8", "surrogatepass")).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.rand(*shape, generator=generator)

    @cached_property
    def joint(self) -> Joint:
        """The joint row and column space."""
        return _joint(self)


@dataclass(frozen=True, eq=False)
class Joint:
    """ΔW_i = U C_i Vᵀ for every member; all in float64.

    Args:
        B: (out, R), A: (R, in) and T_U: (R, p), T_V: (R, q), of which U and V are the products.
        energies: (p,) eigenvalues of Σ ΔW ΔWᵀ, descending.
        lefts: Uᵀ s_i B_i (p, r_i), None for who is not there. rights: A_i V (r_i, q).
    """

    B: Tensor
    A: Tensor
    T_U: Tensor
    T_V: Tensor
    energies: Tensor
    lefts: tuple[Tensor | None, ...]
    rights: tuple[Tensor | None, ...]

    @cached_property
    def U(self) -> Tensor:
        """(out, p), orthonormal; the largest direction first, its sign fixed."""
        return self.B @ self.T_U

    @cached_property
    def V(self) -> Tensor:
        """(in, q), in the same way."""
        return self.A.T @ self.T_V

    @cached_property
    def cores(self) -> list[Tensor | None]:
        """C_i (p, q) of every member."""
        pairs = zip(self.lefts, self.rights, strict=True)
        return [None if L is None or R is None else L @ R for L, R in pairs]

    @property
    def zero(self) -> Tensor:
        """A core (p, q) of zeros."""
        return self.T_U.new_zeros(self.T_U.shape[1], self.T_V.shape[1])

    def lifted(self, M: Tensor) -> LowRank:
        """U M Vᵀ of a core M (p, q), float32, of rank min(p, q)."""
        p, q = M.shape
        size = float(torch.linalg.matrix_norm(M))
        even = math.sqrt(size / math.sqrt(min(p, q))) if size > 0 else 1.0  # B and A of one size
        M = M / even
        B, A, T_U, T_V = self.B, self.A, self.T_U, self.T_V
        if p <= q:
            parts = ((B, T_U * M.norm(dim=1)), (A, T_V := T_V @ M.T))
        else:
            parts = ((B, T_U := T_U @ M), (A, T_V * M.norm(dim=0)))
        # Products in float32, unless parts that are far larger than the result cancel in them.
        if all(bool(X.norm() * T.norm() <= _CANCEL * M.norm()) for X, T in parts):
            B, A, T_U, T_V = B.float(), A.float(), T_U.float(), T_V.float()
        left, right = (B @ T_U).float(), (T_V.T @ A).float()
        (left if p <= q else right).mul_(even)
        return LowRank(right, left)


@dataclass(frozen=True, eq=False)
class Cut:
    """A result that was cut to a rank: ‖cut away‖² and ‖all‖²."""

    update: LowRank
    lost: float
    size: float


def _joint(members: Members) -> Joint:
    B, A, spans = stacked(members.updates, members.shape)
    G_B, G_A = B.T @ B, A @ A.T
    (energies, T_U), (_, T_V) = _directions(G_B, G_A, spans), _directions(G_A, G_B, spans)
    zero = not float(energies[0]) > 0  # then both are a column of zeros
    if not zero and not (_is_orthonormal(T_U, G_B) and _is_orthonormal(T_V, G_A)):
        return _by_decomposition(B, A, spans)
    return _signed(B, A, T_U, T_V, energies, (G_B @ T_U).T, G_A @ T_V, spans)


def _signed(
    B: Tensor,
    A: Tensor,
    T_U: Tensor,
    T_V: Tensor,
    energies: Tensor,
    left: Tensor,
    right: Tensor,
    spans: Sequence[slice | None],
) -> Joint:
    """The space, the signs of its directions fixed, and who has what of left and right."""
    signs_U, signs_V = column_signs(B, T_U), column_signs(A.T, T_V)
    left, right = left * signs_U[:, None], right * signs_V
    lefts = tuple(None if s is None else left[:, s] for s in spans)
    rights = tuple(None if s is None else right[s] for s in spans)
    return Joint(B, A, T_U * signs_U, T_V * signs_V, energies, lefts, rights)


def _is_orthonormal(T: Tensor, G: Tensor) -> bool:
    """Whether B T is, for G = BᵀB; not where a bad gauge made the Grams lose their small parts."""
    off = T.T @ G @ T
    off.diagonal().sub_(1)
    return bool(off.abs().max() < 1e-8)


def _by_decomposition(B: Tensor, A: Tensor, spans: Sequence[slice | None]) -> Joint:
    """By QR and SVD: several times slower, and right in any gauge."""
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    cores = [R_B[:, s] @ R_A[:, s].T for s in spans if s is not None]
    P, S, _ = thin_svd(torch.cat(cores, 1))
    P_V, _, _ = thin_svd(torch.cat([C.T for C in cores], 1))
    return _signed(Q_B, Q_A.T, P, P_V, S.square(), P.T @ R_B, R_A.T @ P_V, spans)


def stacked(
    updates: Sequence[LowRank | None], shape: tuple[int, int]
) -> tuple[Tensor, Tensor, list[slice | None]]:
    """[s_i B_i] (out, Σr) and [A_i] (Σr, in) in float64, and where each update lies in them."""
    there = [u for u in updates if u is not None]
    device = there[0].A.device if there else None
    spans: list[slice | None] = []
    at = 0
    for u in updates:
        spans.append(None if u is None else slice(at, at + u.rank))
        at += 0 if u is None else u.rank
    B = torch.empty(shape[0], at, dtype=torch.float64, device=device)
    A = torch.empty(at, shape[1], dtype=torch.float64, device=device)
    for u, span in zip(updates, spans, strict=True):
        if u is not None and span is not None:
            B[:, span].copy_(u.B).mul_(u.scale)
            A[span] = u.A
    return B, A, spans


def _directions(G: Tensor, G_other: Tensor, spans: Sequence[slice | None]) -> tuple[Tensor, Tensor]:
    """Eigenvalues (k,) descending of Σ ΔW ΔWᵀ = B H Bᵀ, and T (Σr, k) with eigenvectors B T.

    Args:
        G: BᵀB. G_other: A Aᵀ, of which H is the part within each update.
    """
    within = torch.zeros_like(G)
    for span in spans:
        if span is not None:
            within[span, span] = G_other[span, span]
    root, failed = torch.linalg.cholesky_ex(within)  # any root of H does; this one is quick
    if bool(failed):
        values, W = torch.linalg.eigh(within)
        root = W * values.clamp_min(0).sqrt()
    values, W = torch.linalg.eigh(root.T @ G @ root)
    values, W = values.flip(0).clamp_min(0), W.flip(1)
    kept = max(1, int((values > NOISE**2 * values[0]).sum()))
    values = values[:kept]
    inverse = torch.where(values > 0, 1 / values.sqrt().clamp_min(1e-300), 0.0)
    return values, root @ W[:, :kept] * inverse


def along(X: Tensor) -> Tensor:
    """How far each column of X (n, k) goes along (sin 1, sin 2, …), (k,)."""
    return torch.arange(1, len(X) + 1, dtype=X.dtype, device=X.device).sin() @ X


def column_signs(X: Tensor, T: Tensor | None = None) -> Tensor:
    """±1 for each column of X, or of X T, −1 where it points against (sin 1, sin 2, …): it and
    its opposite become one.
    """
    far = along(X) if T is None else along(X) @ T
    return torch.where(far < 0, -1.0, 1.0).to(X)


def thin_svd(M: Tensor, scale: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), S (k,), Vᵀ (k, n) of a small matrix, over what is not zero.

    Args:
        scale: what M was summed from is of this size: less than its rounding is zero.
    """
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    k = int((max(float(S[0]), scale) * NOISE < S).sum()) if len(S) else 0
    return U[:, :k], S[:k], Vh[:k]
