"""Updates at norm 1, their inner products in tiles, and their sketches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lorafold as lf
from lorafold.collection.units import WIDTH, Sketch, add_inner_products, units_of


def inner_products(updates, dense):
    flat = np.stack([dense(u).numpy().ravel() for u in updates])
    return flat @ flat.T


@pytest.fixture
def updates(make_update):
    return [make_update(30, 50, 1 + k % 3, seed=k, scale=10.0 ** (k - 4)) for k in range(9)]


def test_factors_lie_side_by_side(updates, dense):
    found = units_of(range(9), updates)
    assert sorted(x.rank for x in found) == [1, 2, 3]
    assert sorted(np.concatenate([x.members for x in found]).tolist()) == list(range(9))
    for x in found:
        f = x.factors()
        for k, i in enumerate(x.members):
            assert x.norms[k] == pytest.approx(updates[i].norm(), rel=1e-5)
            whole = x.scales[k] * (f.B[k].double() @ f.A[k].double())
            assert float((whole - dense(updates[i])).norm()) < 1e-5 * x.norms[k]


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e12, 1e18])
def test_extreme_factors_and_gauges(make_update, dense, size):
    """Together with a zero update and a modest one, none of which the others disturb."""
    u, v = make_update(6, 8, 2, seed=1), make_update(6, 8, 2, seed=2)
    odd = lf.LowRank(u.A * size, u.B * size)
    far = lf.LowRank(v.A * 1e18, v.B * 1e-18)
    zero = lf.LowRank(v.A, 0 * v.B)
    updates = [odd, v, far, zero, -2.0 * v]
    total = np.zeros((5, 5))
    xs = units_of(range(5), updates)
    add_inner_products(total, xs, xs)
    wanted = inner_products(updates, dense)
    scale = np.sqrt(np.outer(wanted.diagonal(), wanted.diagonal()))
    assert (np.abs(total - wanted) <= 1e-5 * scale).all()
    assert total[1, 2] == pytest.approx(wanted[1, 1], rel=1e-5)
    assert (total[3] == 0).all()


@pytest.mark.parametrize("tile", [1, 4, 512])
def test_inner_products_by_tiles(updates, dense, monkeypatch, tile):
    monkeypatch.setattr("lorafold.collection.units._TILE", tile)
    wanted = inner_products(updates, dense)
    size = np.sqrt(np.outer(wanted.diagonal(), wanted.diagonal()))
    whole, parts = np.zeros((9, 9)), np.zeros((9, 9))
    xs = units_of(range(9), updates)
    add_inner_products(whole, xs, xs)
    np.testing.assert_allclose(whole / size, wanted / size, atol=1e-6)
    low, high = units_of(range(4), updates[:4]), units_of(range(4, 9), updates[4:])
    for a, b in ((low, low), (low, high), (high, high)):
        add_inner_products(parts, a, b)
    np.testing.assert_allclose(parts / size, wanted / size, atol=1e-6)


def test_only_tiles_with_what_is_wanted(updates, dense, monkeypatch):
    monkeypatch.setattr("lorafold.collection.units._TILE", 1)
    wanted = np.zeros((9, 9), bool)
    wanted[0, 5] = wanted[5, 0] = True
    found = np.zeros((9, 9))
    xs = units_of(range(9), updates)
    add_inner_products(found, xs, xs, wanted)
    assert set(zip(*np.nonzero(found), strict=True)) == {(0, 5), (5, 0)}
    assert found[0, 5] == pytest.approx(inner_products(updates, dense)[0, 5], rel=1e-3)


def test_too_large_is_said(make_update):
    with pytest.raises(lf.MismatchError, match=r"'q_proj' .*too large"):
        u = make_update(4, 4, 2, dtype=torch.float64)
        units_of([0], [lf.LowRank(u.A * 1e100, u.B)], "q_proj")


def test_sketches_keep_inner_products_in_the_mean(make_update):
    updates = [make_update(100, 120, 3, seed=k) for k in range(2)]
    updates = [u * (1 / u.norm()) for u in updates]
    (x,) = units_of(range(2), updates)
    cosine = updates[0].inner(updates[1])
    scales = torch.from_numpy(x.scales)[:, None]
    sketches = [scales * s for seed in range(200) for s in Sketch((100, 120), "q", seed).of(x)]
    draws = [s @ s.T for s in sketches]
    mean, deviation = torch.stack(draws).mean(0), torch.stack(draws).std(0)
    assert deviation[0, 1] < 2 / WIDTH**0.5
    for wanted, i, j in ((1, 0, 0), (1, 1, 1), (cosine, 0, 1)):
        assert abs(mean[i, j] - wanted) < 5 * deviation[i, j] / len(draws) ** 0.5


def test_a_sketch_is_its_seed_and_its_module(make_update):
    (x,) = units_of([0], [make_update(100, 120, 3)])

    def of(path, seed):
        return torch.cat(Sketch((100, 120), path, seed).of(x))

    assert torch.equal(of("q", 0), of("q", 0))
    assert not torch.equal(of("q", 0), of("q", 1))
    assert not torch.equal(of("q", 0), of("v", 0))
    first, second = Sketch((100, 120), "q", 0).of(x)
    assert not torch.equal(first, second)
    (y,) = units_of([0], [make_update(8, 9, 3)])
    first, second = Sketch((8, 9), "q", 0).of(y)
    assert torch.equal(first, second)
    assert float(first.norm()) * y.scales[0] == pytest.approx(y.norms[0], rel=1e-5)
