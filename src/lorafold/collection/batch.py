from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import MismatchError
from ..lowrank import LowRank

_BAD_GAUGE = 1e-4  # relative eigenvalue of A Aᵀ below which directions are formed in float64
_QUICK = 1e3  # ‖A Aᵀ‖ ‖(A Aᵀ)⁻¹‖ up to which float32 Grams give directions
_CANCELS = 1e-12  # ‖B A‖² below this share of (Σ ‖b_k‖ ‖a_k‖)²: float64 Grams hold but rounding
_LEAST, _MOST = 2.0**-112, 2.0**120  # largest numbers of a factor between keep their digits
_LOW, _HIGH = 2.0**-60, 2.0**100  # squared norms between have good float32 Grams
_LARGE = 1 << 14  # numbers of a factor that are worth a call of their own
_NOISE = 1e-7  # relative singular value below which a float32 product holds nothing but rounding


@dataclass(frozen=True)
class Block:
    """Some adapters' updates at one module, decomposed: ΔW_i = U_i diag(S_i) V_iᵀ.

    Args:
        members: (n,) positions of the adapters in the collection.
        U: (n, out, r), S: (n, r) descending, V: (n, in, r); float32 (S float64); dead directions
            have zero columns and S = 0.
    """

    members: np.ndarray
    U: Tensor
    S: Tensor
    V: Tensor

    def take(self, rows: np.ndarray) -> Block:
        """The block of some of its rows."""
        if len(rows) == len(self.members):
            return self  # rows ascend: it is all of them
        index = torch.as_tensor(rows, device=self.U.device)
        return Block(self.members[rows], self.U[index], self.S[index], self.V[index])

    def factors(self) -> Factors:
        """The same updates as U S and Vᵀ, an even gauge."""
        return Factors(self.members, self.U * self.S.to(self.U.dtype)[:, None, :], self.V.mT)

    def square(self) -> Tensor:
        """‖ΔW_i‖², (n,) float64."""
        square: Tensor = (self.S**2).sum(1)
        return square


@dataclass(frozen=True)
class Factors:
    """Some adapters' updates at one module as they come: ΔW_i = B_i A_i, scale in B.

    Args:
        members: (n,) positions of the adapters in the collection.
        B: (n, out, r), A: (n, r, in), zero-padded to the largest rank.
    """

    members: np.ndarray
    B: Tensor
    A: Tensor

    def take(self, rows: np.ndarray) -> Factors:
        """The block of some of its rows."""
        if len(rows) == len(self.members):
            return self  # rows ascend: it is all of them
        index = torch.as_tensor(rows, device=self.B.device)
        return Factors(self.members[rows], self.B[index], self.A[index])

    def split(self, counts: Sequence[int]) -> list[Factors]:
        """The first so many of them, the next so many, and so on: views."""
        ends = np.cumsum(counts).tolist()
        spans = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
        return [Factors(self.members[s], self.B[s], self.A[s]) for s in spans]

    def factors(self) -> Factors:
        """These, as `Block.factors` gives them."""
        return self

    def square(self) -> Tensor:
        """‖ΔW_i‖², (n,) float64."""
        return squared_norms(self.B, self.A)

    def decomposed(self) -> Block:
        """The updates by their singular values."""
        return Block(self.members, *decompose(self.B, self.A))

    def quickly_decomposed(self) -> tuple[Block, np.ndarray]:
        """The same from float32 Grams, and (n,) where that holds.

        U S Vᵀ is the update as before. But directions are orthonormal to 1e-4 at worst, and less so
        those below 1e-2 of the largest singular value, of which ones below 1e-3 may be missing.
        """
        G_A, G_B = quick_gram(self.A.mT), quick_gram(self.B)
        length = G_A.diagonal(0, 1, 2).sqrt().clamp_min(1e-300)
        even = G_A / (length[:, :, None] * length[:, None, :])
        root, inverse, condition = _quick_roots(even)
        good = _gauges_are_good(G_B, G_A) & (condition < _QUICK)
        good &= held_by_float32(_traces(G_A)) & held_by_float32(_traces(G_B))
        root, inverse = length[:, :, None] * root, inverse / length[:, :, None]
        found = Block(self.members, *_directions(self.B, self.A, G_B, root, inverse))
        return found, good.cpu().numpy()


def side_by_side(blocks: Sequence[Factors]) -> Factors:
    """Blocks of one shape and rank, at several modules maybe, as one."""
    if len(blocks) == 1:
        return blocks[0]
    members = np.concatenate([f.members for f in blocks])
    return Factors(members, torch.cat([f.B for f in blocks]), torch.cat([f.A for f in blocks]))


def joined_factors(
    members: np.ndarray,
    parts: Sequence[tuple[Tensor, Tensor, float]],
    device: torch.device | str | None = None,
) -> Factors:
    """Updates (B, A, scale) of one shape as one batch, each scale multiplied into B."""
    B, A, scales = zip(*parts, strict=True)
    r = max(a.shape[0] for a in A)
    lefts = _stacked([_padded(b, 1, r) for b in B], device)
    rights = _stacked([_padded(a, 0, r) for a in A], device)
    if any(scale != 1 for scale in scales):
        lefts *= torch.tensor(scales, dtype=lefts.dtype, device=lefts.device)[:, None, None]
    norms = torch.stack([torch.linalg.vector_norm(X, dim=(1, 2)) for X in (lefts, rights)])
    if not bool(held_by_float32(norms.double() ** 2).all()):
        top = torch.stack([X.abs().amax((1, 2)) for X in (lefts, rights)])
        for k in torch.nonzero(~((top > _LEAST) & (top < _MOST)).all(0))[:, 0].tolist():
            if scales[k] and B[k].any() and A[k].any():  # not just zero
                u = LowRank(A[k], B[k], scales[k]).unscaled(torch.float32)
                lefts[k], rights[k] = _padded(u.B, 1, r), _padded(u.A, 0, r)
    return Factors(members, lefts, rights)


def _padded(t: Tensor, axis: int, r: int) -> Tensor:
    short = r - t.shape[axis]
    if not short:
        return t
    return torch.nn.functional.pad(t, (0, short) if axis == 1 else (0, 0, 0, short))


def _stacked(parts: Sequence[Tensor], device: torch.device | str | None) -> Tensor:
    """One fresh float32 tensor of them all; of small ones few operations, whatever their number."""
    if parts[0].numel() >= _LARGE:
        shape = len(parts), *parts[0].shape
        found = torch.empty(shape, dtype=torch.float32, device=device or parts[0].device)
        for one, t in zip(found, parts, strict=True):
            one.copy_(t.detach())
        return found
    if len({(t.dtype, t.device) for t in parts}) > 1:
        parts = [t.to(device, torch.float32) for t in parts]
    return torch.stack(list(parts)).to(device, torch.float32)


def decompose(B: Tensor, A: Tensor, most: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Batched singular value decomposition of B_i A_i from r×r Grams.

    Args:
        B: (n, out, r). A: (n, r, in). most: directions wanted at most; all when None.

    Returns:
        U (n, out, m), S (n, k) float64 descending, V (n, in, m) with k = min(r, out, in), and m the
        smaller of k and `most`.

    Raises:
        MismatchError: singular values beyond float64.
    """
    G_A, G_B = gram(A.mT), gram(B)
    squares = torch.cat([_traces(G_A), _traces(G_B)])
    if not bool((held_by_float32(squares) | (squares == 0)).all()):
        units = [power_of_two(X.abs().amax((1, 2), keepdim=True).double()) for X in (B, A)]
        B, A = ((X / unit).to(X.dtype) for X, unit in zip((B, A), units, strict=True))
        U, S, V = _decomposed(B, A, gram(B), gram(A.mT), most)
        S = S * units[0][:, 0] * units[1][:, 0]
        if not bool(S.isfinite().all()):
            raise MismatchError("the numbers of a factor are too large to multiply")
        return U, S, V
    return _decomposed(B, A, G_B, G_A, most)


def _decomposed(
    B: Tensor, A: Tensor, G_B: Tensor, G_A: Tensor, most: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`decompose` of factors that lie in the middle of float32's range, from their Grams."""
    root, inverse, bad = _roots(G_A)
    U, S, V = _directions(B, A, G_B, root, inverse, most, wide=bad)
    for i in _cancelling(S.square().sum(1), G_B, G_A):
        left, s, right = LowRank(A[i], B[i]).svd()
        S[i] = torch.where(_NOISE * s[0] < s, s, 0.0).double()
        live = S[i, : U.shape[2]] > 0
        U[i], V[i] = left[:, : len(live)] * live, right[: len(live)].T * live
    return U, S, V


def _directions(
    B: Tensor,
    A: Tensor,
    G_B: Tensor,
    root: Tensor,
    inverse: Tensor,
    most: int | None = None,
    wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V by the root of A's Gram, and its inverse; views of (n, m, out) and (n, m, in).

    Args:
        wide: the columns of A (or B) nearly cancel: float32 products would lose them.
    """
    square, Z = torch.linalg.eigh(root.mT @ G_B @ root)
    k = min(B.shape[1], B.shape[2], A.shape[2])
    S = square.clamp_min(0).sqrt().flip(1)[:, :k]
    S = torch.where(_NOISE * S[:, :1] < S, S, 0.0)
    Z, wanted = Z.flip(2)[:, :, :k][:, :, :most], S[:, :most]
    S_inverse = torch.where(wanted > 0, 1 / wanted.clamp_min(1e-300), 0.0)
    to_U = root @ Z * S_inverse[:, None, :]
    to_V = inverse @ Z * (wanted > 0)[:, None, :]
    dtype = torch.float64 if wide else B.dtype
    U, V = ((Y.mT.to(dtype) @ X.to(dtype)).to(X.dtype).mT for X, Y in ((B.mT, to_U), (A, to_V)))
    return U, S, V


def _cancelling(square: Tensor, G_B: Tensor, G_A: Tensor) -> list[int]:
    """The rows whose factors, with these Grams, are so much larger than their product's norm,
    squared, that Grams do not tell it: QRs do, row by row.
    """
    terms = (G_B.diagonal(0, 1, 2) * G_A.diagonal(0, 1, 2)).sqrt().sum(1)
    found: list[int] = (square < _CANCELS * terms**2).nonzero()[:, 0].tolist()
    return found


def _roots(G: Tensor) -> tuple[Tensor, Tensor, bool]:
    """R with R Rᵀ = G, the transpose of its (pseudo-)inverse, and whether any of G is badly
    conditioned; batched. Cholesky's factor where it is good: a tenth of the eigenvectors' time.
    """
    root, inverse, condition = _quick_roots(G)
    if bool((condition < 1 / _BAD_GAUGE).all()):
        return root, inverse, False
    lam, W = torch.linalg.eigh(G)
    top = lam[:, -1:].clamp_min(torch.finfo(lam.dtype).tiny)
    alive = lam > 1e-14 * top
    root = torch.where(alive, lam, 0.0).clamp_min(0).sqrt()
    inverse = torch.where(alive, 1 / root.clamp_min(1e-300), 0.0)
    bad = bool((alive & (lam < _BAD_GAUGE * top)).any())
    return W * root[:, None, :], W * inverse[:, None, :], bad


def _quick_roots(G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cholesky's factors, the transposes of their inverses, and ‖G‖ ‖G⁻¹‖ (n,); of a matrix that
    has no factor, those of 1, and infinity.
    """
    L, failed = torch.linalg.cholesky_ex(G)
    one = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    none = failed > 0
    L = torch.where(none[:, None, None], one, L)
    inverse = torch.linalg.solve_triangular(L, one.expand_as(L), upper=False)
    condition = torch.linalg.matrix_norm(G) * torch.linalg.matrix_norm(inverse.mT @ inverse)
    return L, inverse.mT, torch.where(none, torch.inf, condition)


def gram(X: Tensor) -> Tensor:
    """Batched XᵀX in float64, (n, d, r) → (n, r, r)."""
    if X.dtype != torch.float64:
        X = X.double()
    return X.mT @ X


def quick_gram(X: Tensor) -> Tensor:
    """`gram` by float32 products: good to 1e-6, whatever the size of X."""
    G = (X.mT @ X).double()
    odd = torch.nonzero(~held_by_float32(_traces(G)))[:, 0]
    top = X[odd].abs().amax((1, 2)).double()
    if not bool(top.any()):  # zeros, if any, are held too
        return G
    unit = torch.ones(len(X), dtype=torch.float64, device=X.device)
    unit[odd] = power_of_two(top)
    Y = (X / unit[:, None, None]).to(X.dtype)
    return (Y.mT @ Y).double() * unit[:, None, None] ** 2


def held_by_float32(square: Tensor) -> Tensor:
    """Whether vectors of these squared norms have good inner products in float32; not NaN's."""
    return (square > _LOW) & (square < _HIGH)


def power_of_two(size: Tensor) -> Tensor:
    """The power of two next above each size, 1 for 0. Division by it is exact."""
    power: Tensor = torch.where(size > 0, size / torch.frexp(size)[0], 1.0)
    return power


def sizes(X: Tensor) -> Tensor:
    """The norms of a batch, (n,) float64."""
    size: Tensor = torch.linalg.vector_norm(X, dim=(1, 2)).double()
    if bool(held_by_float32(size**2).all()):
        return size
    exact: Tensor = torch.linalg.vector_norm(X, dim=(1, 2), dtype=torch.float64)
    return exact


def squared_norms(B: Tensor, A: Tensor) -> Tensor:
    """‖B_i A_i‖² for a batch, (n,) float64; B (n, out, r), A (n, r, in)."""
    G_B, G_A = gram(B), gram(A.mT)
    square = (G_B * G_A).sum((1, 2)).clamp_min(0)
    for i in _cancelling(square, G_B, G_A):
        square[i] = LowRank(A[i], B[i]).norm() ** 2
    return square


def squared_differences(B: Tensor, A: Tensor, B_hat: Tensor, A_hat: Tensor) -> Tensor:
    """‖B_i A_i − B̂_i Â_i‖² for a batch, (n,) float64.

    The factors are concatenated and their Grams taken in float64: exact to 1e-8 of the norm,
    where the expansion in float32 is off by 2e-4; and where that is not enough, their QRs.
    """
    B, A = torch.cat([B, -B_hat.to(B.dtype)], 2), torch.cat([A, A_hat.to(A.dtype)], 1)
    return squared_norms(B, A)


def squared_residuals(B: Tensor, A: Tensor, B_hat: Tensor, A_hat: Tensor) -> Tensor:
    """‖B_i A_i − B̂_i Â_i‖² for factors in one gauge and of one rank, (n,) float64.

    B A − B̂ Â = (B − B̂) Â + B (A − Â): both parts are as small as the error, so that float32 Grams
    do. Where the parts cancel, as in a bad gauge, `squared_differences` is asked; and where squares
    may be lost.
    """
    E_B, E_A = B - B_hat, A - A_hat
    EE_B, BB, EB_B = E_B.mT @ E_B, B.mT @ B, E_B.mT @ B
    HH_A, EE_A, HE_A = A_hat @ A_hat.mT, E_A @ E_A.mT, A_hat @ E_A.mT
    square = _inner(EE_B, HH_A) + _inner(BB, EE_A) + 2 * _inner(EB_B, HE_A)
    parts = _traces(EE_B) * _traces(HH_A) + _traces(BB) * _traces(EE_A)
    good = (square > 1e-4 * parts) & held_by_float32(_traces(BB)) & held_by_float32(_traces(HH_A))
    poor = torch.nonzero(~good)[:, 0]
    if len(poor):
        square[poor] = squared_differences(B[poor], A[poor], B_hat[poor], A_hat[poor])
    return square.clamp_min(0)


def even_gauge(f: Factors, exact: bool = True) -> tuple[Factors, Tensor, Tensor, bool]:
    """Updates in factors whose float32 products are good: as they are, unless their gauge is bad.

    Args:
        exact: take the Grams in float64, otherwise good to 1e-6 only.

    Returns:
        The factors, BᵀB and A Aᵀ (n, r, r) float64, and whether the factors are the given ones.
    """
    G_B, G_A = (gram(X) if exact else quick_gram(X) for X in (f.B, f.A.mT))
    if _gauge_is_good(G_B, G_A):
        return f, G_B, G_A, True
    even = f.decomposed().factors()
    return even, gram(even.B), gram(even.A.mT), False


def _inner(X: Tensor, Y: Tensor) -> Tensor:
    """Σ x y of each pair of a batch, (n,) float64."""
    return (X.double() * Y.double()).sum((1, 2))


def _traces(G: Tensor) -> Tensor:
    return G.diagonal(0, 1, 2).double().sum(1)


def norms(factors: Factors) -> Tensor:
    """‖B_i A_i‖ of each member, (n, 1) float64, as `singular_values(exact=False)` would add up."""
    G_A, G_B = (quick_gram(X) for X in (factors.A.mT, factors.B))
    if _gauge_is_good(G_B, G_A):
        return _inner(G_B, G_A).sqrt()[:, None]
    exact: Tensor = torch.linalg.vector_norm(singular_values(factors), dim=1, keepdim=True)
    return exact


def _gauge_is_good(G_B: Tensor, G_A: Tensor) -> bool:
    """Whether Grams good to 1e-6 hold ‖B A‖²: the factors are not far larger than their product."""
    return bool(_gauges_are_good(G_B, G_A).all())


def _gauges_are_good(G_B: Tensor, G_A: Tensor) -> Tensor:
    """The same of each, (n,)."""
    return _traces(G_B) * _traces(G_A) <= 1e3 * _inner(G_B, G_A)


def singular_values(factors: Factors, exact: bool = True) -> Tensor:
    """(n, r) float64 singular values, descending, without the vectors.

    Args:
        exact: take the Grams in float64; in float32, half the work, values below 3e-4 of the
            largest are lost in rounding. Factors far larger than their product (a bad gauge) are
            taken in float64 all the same.
    """
    right, left = factors.A.mT, factors.B
    G_A, G_B = (gram(X) if exact else quick_gram(X) for X in (right, left))
    if not exact and not _gauge_is_good(G_B, G_A):
        return singular_values(factors)
    root, failed = torch.linalg.cholesky_ex(G_A)
    if bool(failed.any()):
        lam, W = torch.linalg.eigh(G_A)
        root = W * lam.clamp_min(0).sqrt()[:, None, :]
    squares = torch.linalg.eigvalsh(root.mT @ G_B @ root)
    S: Tensor = squares.clamp_min(0).sqrt().flip(1)
    for i in _cancelling(S.square().sum(1), G_B, G_A):
        found = LowRank(factors.A[i], factors.B[i]).spectrum()
        S[i, : len(found)] = found.double()
        S[i, len(found) :] = 0
    return S
