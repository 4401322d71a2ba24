"""Adapters that are alike in known ways, and dense cosines of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lorafold as lf

SHAPES = {"layers.0.q": (24, 40), "layers.0.v": (12, 40), "layers.1.q": (24, 40)}


@pytest.fixture(scope="session")
def deltas(dense):
    """deltas(adapters, path) -> ΔW (out, in) float64 arrays, zero where there is none."""

    def stack(adapters, path):
        shape = next(a[path].shape for a in adapters if path in a)
        return [dense(a[path]).numpy() if path in a else np.zeros(shape) for a in adapters]

    return stack


@pytest.fixture(scope="session")
def dense_cosines(deltas):
    """dense_cosines(adapters, paths=None) -> (N, N), from the matrices themselves."""

    def cosines(adapters, paths=None):
        paths = paths or sorted({p for a in adapters for p in a})
        flat = np.concatenate(
            [np.stack(deltas(adapters, p)).reshape(len(adapters), -1) for p in paths], 1
        )
        norms = np.linalg.norm(flat, axis=1)
        unit = np.divide(flat, norms[:, None], out=np.zeros_like(flat), where=norms[:, None] > 0)
        return unit @ unit.T

    return cosines


@pytest.fixture(scope="session")
def regauged():
    """regauged(Adapter, seed) -> the same updates in another gauge and at another scale."""

    def changed(adapter, seed):
        g = torch.Generator().manual_seed(seed)
        modules = {}
        for path, u in adapter.modules.items():
            G = torch.randn(u.rank, u.rank, generator=g, dtype=torch.float64) + 3 * torch.eye(
                u.rank
            )
            A = torch.linalg.solve(G, u.A.double()) * 7
            modules[path] = lf.LowRank(A.float(), (u.B.double() @ G * u.scale / 21).float(), 3.0)
        return lf.Adapter(modules)

    return changed


@pytest.fixture(scope="session")
def blend():
    """blend(a, b, c) -> an adapter of a's norm whose cosine with a is c, b being unrelated."""

    def mixed(a, b, c):
        b = b * (a.norm() / b.norm())
        b = b - (a.inner(b) / a.norm() ** 2) * a
        return c * a + ((1 - c**2) ** 0.5 * a.norm() / b.norm()) * b

    return mixed
