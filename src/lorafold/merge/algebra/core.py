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
from itertools import accumulate

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
        return torch.rand(*shape, generator=generator, dtype=torch.float32)

    @cached_property
    def joint(self) -> Joint:
        """The joint row and column space."""
        return _joint(self)


@dataclass(frozen=True, eq=False)
class Joint:
    """ΔW_i = U C_i Vᵀ for every member; in float64, but for B and A, which are as they came.

    Args:
        B: (out, R), A: (R, in) and T_U: (R, p), T_V: (R, q), of which U and V are the products.
        sizes_B, sizes_A: (R,) norms of the columns of B and the rows of A.
        energies: (p,) eigenvalues of Σ ΔW ΔWᵀ, descending.
        left: Uᵀ [s_1 B_1 … s_N B_N] (p, R). right: A V (R, q). spans: each member's in R.
    """

    B: Tensor
    A: Tensor
    T_U: Tensor
    T_V: Tensor
    sizes_B: Tensor
    sizes_A: Tensor
    energies: Tensor
    left: Tensor
    right: Tensor
    spans: tuple[slice | None, ...]

    @cached_property
    def U(self) -> Tensor:
        """(out, p), orthonormal; the largest direction first, its sign fixed."""
        return self.B.double() @ self.T_U

    @cached_property
    def V(self) -> Tensor:
        """(in, q), in the same way."""
        return self.A.double().T @ self.T_V

    @property
    def lefts(self) -> list[Tensor | None]:
        """Uᵀ s_i B_i (p, r_i) of every member."""
        return [None if s is None else self.left[:, s] for s in self.spans]

    @cached_property
    def cores(self) -> list[Tensor | None]:
        """C_i (p, q) of every member."""
        return [None if s is None else self.left[:, s] @ self.right[s] for s in self.spans]

    @property
    def zero(self) -> Tensor:
        """A core (p, q) of zeros."""
        return self.T_U.new_zeros(self.T_U.shape[1], self.T_V.shape[1])

    def lifted(self, M: Tensor) -> LowRank:
        """U M Vᵀ of a core M (p, q), float32, of rank min(p, q)."""
        p, q = M.shape
        size = float(torch.linalg.matrix_norm(M))
        even = math.sqrt(size / math.sqrt(min(p, q))) if size > 0 else 1.0  # B and A of one size
        M, T_U, T_V = M / even, self.T_U, self.T_V
        if p <= q:
            T_V = T_V @ M.T
            parts = (self.sizes_B[:, None] * T_U * M.norm(dim=1), self.sizes_A[:, None] * T_V)
        else:
            T_U = T_U @ M
            parts = (self.sizes_B[:, None] * T_U, self.sizes_A[:, None] * T_V * M.norm(dim=0))
        # Products in float32, unless parts that are far larger than the result cancel in them.
        clear = all(bool(part.norm() <= _CANCEL * M.norm()) for part in parts)
        dtype = torch.float32 if clear else torch.float64
        left, right = self.B.to(dtype) @ T_U.to(dtype), T_V.T.to(dtype) @ self.A.to(dtype)
        (left if p <= q else right).mul_(even)
        return LowRank(right.float(), left.float())


@dataclass(frozen=True, eq=False)
class Cut:
    """A result that was cut to a rank: ‖cut away‖² and ‖all‖²."""

    update: LowRank
    lost: float
    size: float


def _joint(members: Members) -> Joint:
    there, spans = members.there, spans_of(members.updates)
    B, A = side_by_side(there)
    scales = B.new_tensor([u.scale for u in there for _ in range(u.rank)], dtype=torch.float64)
    (G_B, far_B), (G_A, far_A) = _gram(B.T), _gram(A)
    sizes = G_B.diagonal().sqrt(), G_A.diagonal().sqrt()
    G_B *= scales * scales[:, None]
    (energies, T_U), (_, T_V) = _directions(G_B, G_A, spans), _directions(G_A, G_B, spans)
    T_U, T_V = T_U * signs((scales * far_B) @ T_U), T_V * signs(far_A @ T_V)
    left, right = T_U.T @ G_B, G_A @ T_V
    zero = not float(energies[0]) > 0  # then both are a column of zeros
    if not zero and not (_is_identity(left @ T_U) and _is_identity(T_V.T @ right)):
        return _by_decomposition(B.double() * scales, A.double(), spans)
    return Joint(B, A, scales[:, None] * T_U, T_V, *sizes, energies, left, right, spans)


def _gram(X: Tensor) -> tuple[Tensor, Tensor]:
    """X Xᵀ (R, R), and `along` of the rows of X (R, n), in float64."""
    X = X.double()
    return X @ X.T, along(X.T)


def _is_identity(M: Tensor) -> bool:
    """Whether M is; UᵀU is not where a bad gauge made the Grams lose their small parts."""
    return bool((M - torch.eye(len(M), dtype=M.dtype, device=M.device)).abs().max() < 1e-8)


def _by_decomposition(B: Tensor, A: Tensor, spans: tuple[slice | None, ...]) -> Joint:
    """By QR and SVD: several times slower, and right in any gauge."""
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    cores = [R_B[:, s] @ R_A[:, s].T for s in spans if s is not None]
    P_U, S, _ = thin_svd(torch.cat(cores, 1))
    P_V, _, _ = thin_svd(torch.cat([C.T for C in cores], 1))
    P_U, P_V = P_U * signs(along(Q_B) @ P_U), P_V * signs(along(Q_A) @ P_V)
    sizes = S.new_ones(Q_B.shape[1]), S.new_ones(Q_A.shape[1])
    return Joint(Q_B, Q_A.T, P_U, P_V, *sizes, S.square(), P_U.T @ R_B, R_A.T @ P_V, spans)


def side_by_side(updates: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
    """[B_1 … B_N] (out, Σr) and [A_1; … ; A_N] (Σr, in), without scales; float32 at least."""
    device, double = updates[0].A.device, torch.float64
    dtype = double if any(double in (u.A.dtype, u.B.dtype) for u in updates) else torch.float32
    B = torch.cat([u.B.to(device, dtype) for u in updates], 1)
    return B, torch.cat([u.A.to(device, dtype) for u in updates])


def spans_of(updates: Sequence[LowRank | None]) -> tuple[slice | None, ...]:
    """Where each lies in `side_by_side`."""
    ends = list(accumulate(0 if u is None else u.rank for u in updates))
    return tuple(
        None if u is None else slice(end - u.rank, end)
        for u, end in zip(updates, ends, strict=True)
    )


def _directions(G: Tensor, G_other: Tensor, spans: Sequence[slice | None]) -> tuple[Tensor, Tensor]:
    """Eigenvalues (k,) descending of Σ ΔW ΔWᵀ = B H Bᵀ, and T (Σr, k) with eigenvectors B T.

    Args:
        G: BᵀB. G_other: A Aᵀ, of which H is the part within each update.
    """
    root = torch.zeros_like(G)
    for span in spans:
        if span is not None:
            root[span, span] = _root(G_other[span, span])
    values, W = torch.linalg.eigh(root.T @ G @ root)
    values, W = values.flip(0).clamp_min(0), W.flip(1)
    kept = max(1, int((values > NOISE**2 * values[0]).sum()))
    values = values[:kept]
    inverse = torch.where(values > 0, 1 / values.sqrt().clamp_min(1e-300), 0.0)
    return values, root @ W[:, :kept] * inverse


def _root(H: Tensor) -> Tensor:
    """R with R Rᵀ = H: any does, and Cholesky's is quick."""
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(H)
    if bool(failed):
        values, W = torch.linalg.eigh(H)
        root = W * values.clamp_min(0).sqrt()
    return root


def along(X: Tensor) -> Tensor:
    """How far each column of X (n, k) goes along (sin 1, sin 2, …), (k,)."""
    return torch.arange(1, len(X) + 1, dtype=X.dtype, device=X.device).sin() @ X


def signs(far: Tensor) -> Tensor:
    """±1 for each column, −1 where it goes against `along`: it and its opposite become one."""
    return torch.where(far < 0, -1.0, 1.0).to(far)


def thin_svd(M: Tensor, scale: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), S (k,), Vᵀ (k, n) of a small matrix, over what is not zero.

    Args:
        scale: what M was summed from is of this size: less than its rounding is zero.
    """
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    k = int((max(float(S[0]), scale) * NOISE < S).sum()) if len(S) else 0
    return U[:, :k], S[:k], Vh[:k]
