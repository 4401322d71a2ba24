"""Methods on singular directions. All but `linear` and `slerp` work in the joint space.

TSV: Gargiulo et al. 2025 (arXiv:2412.00081). Iso-C, Iso-CTS: Marczak et al. 2025
(arXiv:2502.04959). KnOTS: Stoica et al. 2025 (arXiv:2410.19735). LoRA-LEGO: Zhao et al. 2025
(arXiv:2409.16167). CtM: He et al. 2026 (arXiv:2606.03723). Pico: Tang & Yang 2026
(arXiv:2604.16826). What the papers say of a d×d weight holds here of the joint space, whose
dimension takes the place of d; singular values that are zero have no directions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...collection.batch import decompose
from ...errors import MismatchError
from ...lowrank import LowRank, from_svd
from .core import NOISE, Cut, Joint, Members, along, side_by_side, signs, thin_svd
from .rules import Rule, combined

_ALIKE = 0.9995  # cosine from which a great circle is taken for a line
_SWEEPS, _STILL = 200, 1e-12
_ROUNDS = 100

_Triples = tuple[Tensor, Tensor, Tensor]  # U (p, k), S (k,), Vᵀ (k, q)


def linear(members: Members) -> LowRank:
    """Σ w ΔW, exactly: the factors side by side, ranks add up."""
    parts = [
        (u, w * u.scale)
        for u, w in zip(members.updates, members.weights, strict=True)
        if u is not None and w != 0
    ]
    if not parts:
        u = members.there[0]
        return LowRank(u.A[:1].float(), torch.zeros_like(u.B[:, :1]).float())
    B, A = side_by_side([u for u, _ in parts])
    return LowRank(A, B.mul_(B.new_tensor([scale for u, scale in parts for _ in range(u.rank)])))


def linear_cut(members: Members, rank: int) -> Cut:
    """The best update of a rank for Σ w ΔW, from the Grams of its factors: as `truncate` has it."""
    whole = linear(members)
    U, S, V = (x[0] for x in decompose(whole.B[None], whole.A[None], rank))
    kept = from_svd(U, S[:rank].to(U), V.T)
    return Cut(kept, float(S[rank:].square().sum()), float(S.square().sum()))


def slerp(members: Members) -> LowRank:
    """Along the great circle between two updates, by Shoemake's formula on their entries.

    The weights say where: w₂ / (w₁ + w₂) of the way. Between (nearly) parallel updates, or where
    one is zero, along the line.
    """
    first, second = members.weights
    if first + second == 0:
        raise MismatchError("slerp needs weights that do not add up to zero")
    t = second / (first + second)
    a, b = members.updates
    weights = (1 - t, t)
    if a is not None and b is not None:
        size = a.norm() * b.norm()
        cosine = max(-1.0, min(1.0, a.inner(b) / size)) if size > 0 else 1.0
        if abs(cosine) <= _ALIKE:
            angle = math.acos(cosine)
            weights = math.sin((1 - t) * angle), math.sin(t * angle)
            weights = weights[0] / math.sin(angle), weights[1] / math.sin(angle)
    return linear(dataclasses.replace(members, weights=weights))


def tsv(members: Members) -> LowRank:
    """Task singular vectors: the first R/N directions of each update, made orthogonal together."""
    joint = members.joint
    each = max(1, min(joint.zero.shape) // len(members.names))
    parts = [
        (U[:, :each], w * S[:each], Vh[:each])
        for w, (U, S, Vh) in zip(members.weights, _svds(joint), strict=True)
    ]
    U, S, Vh = _side_by_side(parts)
    return joint.lifted(_polar(U) * S @ _polar(Vh))


def iso_c(members: Members) -> LowRank:
    """Σ w ΔW with every singular value set to their mean."""
    joint = members.joint
    M, size = _total(joint, members.weights)
    U, S, Vh = thin_svd(M, size)
    return joint.lifted(S.mean() * U @ Vh if len(S) else joint.zero)


def iso_cts(members: Members, common: float) -> LowRank:
    """Iso-C of the leading directions of Σ w ΔW and, of each update, the leading rest.

    Args:
        common: the share of the joint space that is common.
    """
    joint, n = members.joint, len(members.names)
    M, size = _total(joint, members.weights)
    R = min(M.shape)
    each = round((R - int(R * common)) / n)
    k = max(0, R - each * n)
    U, S, Vh = thin_svd(M, size)
    shared = U[:, :k]
    parts = [(shared, S[:k], Vh[:k])]
    for w, C in zip(members.weights, joint.cores, strict=True):
        if C is not None and each and w != 0:
            norm = abs(w) * float(torch.linalg.matrix_norm(C, 2))
            P, s, Qh = thin_svd(w * (C - shared @ (shared.T @ C)), norm)
            parts.append((P[:, :each], s[:each], Qh[:each]))
    U, S, Vh = _side_by_side(parts)
    return joint.lifted(S.mean() * _polar(U) @ _polar(Vh) if len(S) else joint.zero)


def ctm(members: Members, rule: Rule, rank: int | None, beta: float) -> LowRank:
    """Compress, then merge: the rule on every update's share in one rank-r space.

    The space is Tucker-2's of the updates, of sizes β·own + (1 − β)·mean: HOSVD, then HOOI.

    Args:
        rank: of the space and the result; the largest of the updates' where None.
    """
    joint = members.joint
    there = [C for C in joint.cores if C is not None]
    norms = torch.stack([torch.linalg.matrix_norm(C) for C in there])
    sizes = beta * norms + (1 - beta) * norms.mean()
    factors = torch.where(norms > 0, sizes / norms.clamp_min(1e-300), 0.0)
    X = torch.stack(there) * factors[:, None, None]
    U, V = _shared_space(X, min(rank or max(members.ranks), *X.shape[1:]))
    cores = [None if C is None else U.T @ C @ V for C in joint.cores]
    M = combined(rule, cores, members.weights, members.densities, members.uniforms)
    if M is None:
        return joint.lifted(joint.zero)
    P, S, Qh = torch.linalg.svd(M)
    left, right = joint.U @ (U @ P), (Qh @ V.T) @ joint.V.T
    update = from_svd(left, S, right)
    return update.to(dtype=torch.float32)


def _shared_space(X: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """U (p, k), V (q, k) that maximise Σ ‖Uᵀ X_i V‖² from X (N, p, q), in alternation."""
    V = _leading(torch.einsum("npq,npr->qr", X, X), k)
    U = _leading(torch.einsum("npq,nrq->pr", X, X), k)
    before = -1.0
    for _ in range(_SWEEPS):
        XV = X @ V
        U = _leading(torch.einsum("npk,nrk->pr", XV, XV), k)
        UX = U.T @ X
        V = _leading(torch.einsum("nkq,nkr->qr", UX, UX), k)
        energy = float((UX @ V).square().sum())
        if energy <= before * (1 + _STILL):
            break
        before = energy
    return U, V


def _leading(G: Tensor, k: int) -> Tensor:
    """The k eigenvectors of the largest eigenvalues."""
    vectors: Tensor = torch.linalg.eigh(G)[1]
    return vectors.flip(1)[:, :k]


def lego(members: Members, rank: int | None) -> LowRank:
    """LoRA-LEGO: rank-one pieces of all updates in k clusters, each cluster one piece.

    A piece is (√σ u, √σ v) of a singular triple, taken with the sign that is nearer to its
    cluster (where both are as near, with the sign that `signs` fixes). A centroid gets the
    mean norm of its pieces; all are scaled by √(r / k).

    Args:
        rank: k; the largest of the updates' where None.
    """
    joint = members.joint
    units, weights = [], []
    for w, (U, S, Vh) in zip(members.weights, _svds(joint), strict=True):
        root = S.sqrt()[:, None]
        if w != 0:
            root *= signs(along(joint.U @ U))[:, None]
            left, right = root * U.T, root * Vh
            units.append(torch.cat([math.copysign(1.0, w) * left, right], 1))
            weights += [abs(w)] * len(S)
    if not weights:
        return joint.lifted(joint.zero)
    p, pool = joint.U.shape[1], torch.cat(units)
    # In an order of their own: of two that are as far from all the same one must come first.
    order = ((pool[:, :p] @ along(joint.U)) * (pool[:, p:] @ along(joint.V))).argsort()
    pool, shares = pool[order], pool.new_tensor(weights)[order]
    r = max(members.ranks)
    k = min(rank or r, len(pool))
    centres = _centroids(pool, shares, k) * (r / k) ** 0.25
    B, A = joint.U @ centres[:, :p].T, centres[:, p:] @ joint.V.T
    return LowRank(A.float().contiguous(), B.float().contiguous())


def _centroids(pool: Tensor, weights: Tensor, k: int) -> Tensor:
    """k centroids (k, d) of pieces (n, d) up to their sign, each of its pieces' mean norm.

    Lloyd's algorithm from the largest piece, then always the one farthest from all taken: nothing
    is drawn. Of those that are alike but for rounding the first is taken.
    """
    norms = torch.linalg.vector_norm(pool, dim=1)
    chosen = [int(_first_largest(norms[None]))]
    distance = _distances(pool, pool[chosen])[:, 0]
    while len(chosen) < k:
        chosen.append(int(_first_largest(distance[None])))
        distance = torch.minimum(distance, _distances(pool, pool[chosen[-1:]])[:, 0])
    centres = pool[chosen]
    nearest = _first_largest(-_distances(pool, centres), norms.max().square())
    shares, totals = _shares(nearest, weights, k)
    for _ in range(_ROUNDS):
        products = (pool * centres[nearest]).sum(1)
        # Pieces of one update are orthogonal: which sign is nearer must not be up to rounding.
        clear = -NOISE * norms * torch.linalg.vector_norm(centres[nearest], dim=1)
        signs = torch.where(products < clear, -1.0, 1.0)
        # A cluster that lost all of its pieces keeps its centre.
        means = (shares * signs) @ pool / totals.clamp_min(1e-300)
        centres = torch.where(totals > 0, means, centres)
        before = nearest
        nearest = _first_largest(-_distances(pool, centres), norms.max().square())
        shares, totals = _shares(nearest, weights, k)
        if torch.equal(nearest, before):
            break
    sizes = torch.linalg.vector_norm(centres, dim=1, keepdim=True)
    wanted = torch.where(totals > 0, shares @ norms[:, None] / totals.clamp_min(1e-300), sizes)
    scaled: Tensor = centres * (wanted / sizes.clamp_min(1e-300))
    return scaled


def _first_largest(values: Tensor, size: Tensor | None = None) -> Tensor:
    """Of each row (n, k) the place of the first entry that is its largest, but for rounding.

    Args:
        size: of what the entries come from; the largest of each row where None.
    """
    largest = values.amax(1, keepdim=True)
    slack = NOISE * (largest if size is None else size)
    return (values >= largest - slack).to(torch.uint8).argmax(1)


def _shares(nearest: Tensor, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Weight of each piece in each cluster (k, n), and of each cluster (k, 1)."""
    shares = torch.nn.functional.one_hot(nearest, k).T * weights
    return shares, shares.sum(1, keepdim=True)


def _distances(pool: Tensor, centres: Tensor) -> Tensor:
    """Squared distances (n, k), each with the nearer of the two signs."""
    squares = pool.square().sum(1)[:, None] + centres.square().sum(1)
    return (squares - 2 * (pool @ centres.T).abs()).clamp_min(0)


def calibrated(members: Members) -> Members:
    """Pico: every update with the output directions that all share damped.

    A direction with the share s of the stack's energy is scaled by 1 / (1 + (N − 1) s). The paper
    takes directions and shares from the B's; here they are those of Σ ΔW ΔWᵀ, which no gauge moves.
    """
    joint = members.joint
    n, total = len(members.present), joint.energies.sum()
    if n < 2 or not total > 0:
        return members
    damped = joint.U / (1 + (n - 1) * joint.energies / total)
    updates = [
        None if u is None or L is None else LowRank(u.A.double(), damped @ L)
        for u, L in zip(members.updates, joint.lefts, strict=True)
    ]
    return dataclasses.replace(members, updates=tuple(updates))


def recalibrated(update: LowRank, members: Members) -> LowRank:
    """Pico's last step: the merged update with the mean norm of those it was merged from."""
    pairs = [
        (abs(w), u.norm())
        for w, u in zip(members.weights, members.updates, strict=True)
        if u is not None
    ]
    total, size = sum(w for w, _ in pairs), update.norm()
    summed = sum(w * norm for w, norm in pairs)
    if (
        len(pairs) < 2 or total == 0 or size <= NOISE * summed
    ):  # rounding of what cancels is not blown up
        return update
    return update * (summed / total / size)


def _side_by_side(parts: list[_Triples]) -> _Triples:
    """The singular triples of all as those of one."""
    U, S, Vh = zip(*parts, strict=True)
    return torch.cat(U, 1), torch.cat(S), torch.cat(Vh)


def _svds(joint: Joint) -> list[_Triples]:
    """Singular triples of every core; none of an update that is not there."""
    nothing = joint.zero
    none = (nothing[:, :0], nothing[0, :0], nothing[:0])
    return [none if C is None else thin_svd(C) for C in joint.cores]


def _total(joint: Joint, weights: Sequence[float]) -> tuple[Tensor, float]:
    """Σ w C and how large what was summed is."""
    M, size = joint.zero, 0.0
    for C, w in zip(joint.cores, weights, strict=True):
        if C is not None:
            M = M + w * C
            size += abs(w) * float(torch.linalg.matrix_norm(C))
    return M, size


def _polar(X: Tensor) -> Tensor:
    """The nearest matrix whose nonzero singular values are all 1."""
    if 0 in X.shape:
        return X
    U, _, Vh = thin_svd(X)
    return U @ Vh
