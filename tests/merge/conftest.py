"""Adapters to be merged, and how far a result is from a dense one."""

from __future__ import annotations

import numpy as np
import pytest

import lorafold as lf

SHAPES = {"layers.0.q": (24, 40), "layers.0.v": (12, 40), "layers.1.q": (24, 40)}


@pytest.fixture(scope="session")
def three(make_adapter):
    """{name: Adapter} of ranks 2, 8 and 16 with scales of their own; the last lacks a module."""
    few = {p: s for p, s in SHAPES.items() if p != "layers.1.q"}
    v = "layers.0.v"
    return {
        "sql": make_adapter(SHAPES, dict.fromkeys(SHAPES, 2), seed=1, scale=2.0),
        "law": make_adapter(SHAPES, {p: 8 if p != v else 5 for p in SHAPES}, seed=2, scale=0.5),
        "art": make_adapter(few, {p: 16 if p != v else 3 for p in few}, seed=3, scale=1.0),
    }


@pytest.fixture(scope="session")
def deltas(dense):
    """deltas({name: Adapter}, path) -> [ΔW (out, in) float64 arrays], zero where there is none."""

    def stack(adapters, path):
        shape = next(a[path].shape for a in adapters.values() if path in a)
        return [dense(a[path]).numpy() if path in a else np.zeros(shape) for a in adapters.values()]

    return stack


@pytest.fixture(scope="session")
def off(dense):
    """off(Adapter, {path: array}) -> largest ‖ΔW − array‖ / ‖array‖ of any module."""

    def worst(merged, wanted):
        assert set(merged) == set(wanted)
        return max(
            np.linalg.norm(dense(merged[p]).numpy() - w) / np.linalg.norm(w)
            for p, w in wanted.items()
        )

    return worst


@pytest.fixture(scope="session")
def regauged():
    """regauged(Adapter, seed) -> the same updates in another gauge and at another scale."""

    def changed(adapter, seed):
        rng = np.random.default_rng(seed)
        modules = {}
        for path, u in adapter.modules.items():
            G = rng.standard_normal((u.rank, u.rank)) + 3 * np.eye(u.rank)
            A = np.linalg.solve(G, u.A.double().numpy()) * 7
            B = u.B.double().numpy() @ G * u.scale / 7 / 3
            modules[path] = lf.LowRank(_float(A), _float(B), 3.0)
        return lf.Adapter(modules)

    return changed


def _float(x):
    import torch

    return torch.from_numpy(np.ascontiguousarray(x)).float()
