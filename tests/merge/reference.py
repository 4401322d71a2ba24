"""The published formulas on dense matrices in float64, written anew with NumPy.

`joint(D)` gives the joint space of dense updates; a method of `lf.merge` that works there must
agree with the same formula on the cores, lifted again.
"""

from __future__ import annotations

import numpy as np

TINY = 1e-6  # of the largest: what a float32 factor is rounded by


def joint(deltas):
    """U, V and cores of dense updates: eigenvectors of Σ D Dᵀ and Σ Dᵀ D with eigenvalue > 0."""
    U, V = (_span(sum(d @ d.T for d in deltas)), _span(sum(d.T @ d for d in deltas)))
    return U, V, [U.T @ d @ V for d in deltas]


def _span(G):
    values, vectors = np.linalg.eigh(G)
    return vectors[:, values > 1e-11 * values[-1]][:, ::-1]


def svd(M, size=None):
    U, s, Vh = np.linalg.svd(M, full_matrices=False)
    k = int((s > TINY * (size or s[0])).sum())
    return U[:, :k], s[:k], Vh[:k]


def polar(X):
    U, s, Vh = np.linalg.svd(X, full_matrices=False)
    live = s > TINY * s[0]
    return U[:, live] @ Vh[live]


def top(x, share):
    """x with all but the share of largest entries zeroed."""
    k = int(share * x.size + 1e-9)
    order = np.argsort(-np.abs(x), axis=None, kind="stable")
    kept = np.zeros(x.size)
    kept[order[:k]] = 1
    return x * kept.reshape(x.shape)


def middle(x, density, gamma):
    n = x.size
    order = np.argsort(-np.abs(x), axis=None, kind="stable")
    kept = np.zeros(n)
    first = int(gamma * n)
    kept[order[first : first + int(density * n)]] = 1
    return x * kept.reshape(x.shape)


def disjoint(xs, weights):
    """Yadav et al.: the weighted mean of those that have the elected sign."""
    total = sum(w * x for w, x in zip(weights, xs, strict=True))
    elected = np.where(total >= -1e-12, 1, -1)
    above, below = np.zeros_like(total), np.zeros_like(total)
    for w, x in zip(weights, xs, strict=True):
        kept = np.sign(w * x) == elected
        above += np.where(kept, w * x, 0)
        below += np.where(kept, abs(w), 0)
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def ties(xs, weights, density):
    return disjoint([top(x, density) for x in xs], weights)


def della(xs, weights, density, epsilon, uniforms):
    """Deep et al.: keep with a probability that grows with the rank in the row, rescale, elect."""
    kept = []
    for x, u in zip(xs, uniforms, strict=True):
        p = np.empty_like(x)
        for i, row in enumerate(np.abs(x)):
            rank = np.empty(len(row))
            rank[np.argsort(row)] = np.arange(len(row))
            p[i] = density - epsilon + 2 * epsilon * rank / (len(row) - 1)
        kept.append(np.where(u < p, x / p, 0))
    return disjoint(kept, weights)


def tsv(cores, weights):
    R, n = min(cores[0].shape), len(cores)
    U, s, Vh = [], [], []
    for w, C in zip(weights, cores, strict=True):
        if np.abs(C).max() > 0:
            u, x, v = svd(C)
            k = R // n
            U.append(u[:, :k]), s.append(w * x[:k]), Vh.append(v[:k])
    return polar(np.hstack(U)) @ np.diag(np.hstack(s)) @ polar(np.vstack(Vh))


def iso_c(cores, weights):
    U, s, Vh = svd(sum(w * C for w, C in zip(weights, cores, strict=True)))
    return s.mean() * U @ Vh


def iso_cts(cores, weights, common):
    M = sum(w * C for w, C in zip(weights, cores, strict=True))
    R, n = min(M.shape), len(cores)
    each = round((R - int(R * common)) / n)
    U, s, Vh = (
        x[..., : R - each * n] if i < 2 else x[: R - each * n] for i, x in enumerate(svd(M))
    )
    Us, ss, Vs = [U], [s], [Vh]
    for w, C in zip(weights, cores, strict=True):
        if w and np.abs(C).max() > 0 and each:
            u, x, v = svd(w * (C - U @ U.T @ C), abs(w) * np.linalg.norm(C, 2))
            Us.append(u[:, :each]), ss.append(x[:each]), Vs.append(v[:each])
    return np.hstack(ss).mean() * polar(np.hstack(Us)) @ polar(np.vstack(Vs))


def knots(deltas, weights, density):
    """Stoica et al.: one SVD of the updates side by side, the rule on S Vᵀ of each, over σ > 0."""
    U, s, Vh = svd(np.hstack(deltas))
    parts = np.split(s[:, None] * Vh, len(deltas), axis=1)
    return U @ ties(parts, weights, density)


def ctm(deltas, weights, rank, beta, rule):
    """He et al.: HOSVD and HOOI on rescaled updates, the rule on what their space holds."""
    norms = [np.linalg.norm(d) for d in deltas]
    X = [
        d / n * (beta * n + (1 - beta) * np.mean(norms)) for d, n in zip(deltas, norms, strict=True)
    ]
    V = np.linalg.svd(np.vstack(X))[2][:rank].T
    for _ in range(3000):
        U = np.linalg.svd(np.hstack([x @ V for x in X]))[0][:, :rank]
        V = np.linalg.svd(np.hstack([x.T @ U for x in X]))[0][:, :rank]
    return U @ rule([U.T @ d @ V for d in deltas], weights) @ V.T


def lego(deltas, weights, k):
    """Zhao et al.: pieces (√σ u, √σ v), clustered up to sign, centroids of mean norm, √(r/k)."""
    pieces, shares, ranks = [], [], []
    for d, w in zip(deltas, weights, strict=True):
        U, s, Vh = svd(d)
        ranks.append(len(s))
        for j in range(len(s)):
            sign = np.sign(np.sin(np.arange(1, len(U) + 1)) @ U[:, j])
            u, v = np.sqrt(s[j]) * U[:, j] * sign * np.sign(w), np.sqrt(s[j]) * Vh[j] * sign
            pieces.append(np.concatenate([u, v])), shares.append(abs(w))
    pieces, shares = np.array(pieces), np.array(shares)

    def apart(a, b):
        return min(((a - b) ** 2).sum(), ((a + b) ** 2).sum())

    centres = [pieces[np.argmax((pieces**2).sum(1))]]
    while len(centres) < k:
        centres.append(pieces[np.argmax([min(apart(p, c) for c in centres) for p in pieces])])
    for _ in range(50):
        near = np.array([np.argmin([apart(p, c) for c in centres]) for p in pieces])
        for j in range(k):
            mine = near == j
            if mine.any():
                signs = np.where(pieces[mine] @ centres[j] < -1e-6, -1, 1)
                centres[j] = (shares[mine] * signs) @ pieces[mine] / shares[mine].sum()
    out = np.zeros(deltas[0].shape)
    for j in range(k):
        mine = near == j
        norm = shares[mine] @ np.sqrt((pieces[mine] ** 2).sum(1)) / shares[mine].sum()
        c = centres[j] / np.linalg.norm(centres[j]) * norm
        out += np.outer(c[: len(out)], c[len(out) :])
    return np.sqrt(max(ranks) / k) * out


def pico(deltas):
    """Tang & Yang, with the B's in the gauge in which their Gram is that of ΔW."""
    n = len(deltas)
    values, U = np.linalg.eigh(sum(d @ d.T for d in deltas))
    damped = (U * (1 / (1 + (n - 1) * values / values.sum()))) @ U.T
    return [damped @ d for d in deltas]
