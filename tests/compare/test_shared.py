"""`shared_spectrum`: shares against dense eigenvalues, vLoRA's variances, and random controls."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lorafold as lf

SHAPES = {"layers.0.q": (24, 40), "layers.1.q": (24, 40)}


def by_eigenvalues(G):
    values = np.linalg.eigvalsh(G)[::-1].clip(0)
    return values.cumsum() / values.sum()


@pytest.mark.parametrize("count", [2, 30])
def test_shares_are_those_of_the_dense_stack(make_adapter, deltas, count):
    """With fewer directions than coordinates, and with more."""
    few = {"layers.0.q": (24, 40)}
    sources = {
        f"a{k}": make_adapter(SHAPES if k else few, 1 + k % 4, seed=k, scale=1 + k % 3)
        for k in range(count)
    }
    found = lf.shared_spectrum(sources)
    assert [(r.path, r.side) for r in found.rows] == [
        (p, side) for p in sorted(SHAPES) for side in ("out", "in")
    ]
    total, held = 0.0, 0.0
    for row in found.rows:
        W = np.stack(deltas([a for a in sources.values()], row.path))
        if row.side == "in":
            W = W.transpose(0, 2, 1)
        wanted = by_eigenvalues(np.einsum("nij,nkj->ik", W, W))
        np.testing.assert_allclose(row.energy, wanted[: len(row.energy)], atol=1e-5)
        assert row.energy[-1] == pytest.approx(1, abs=1e-5)
        assert row.size == pytest.approx((W**2).sum(), rel=1e-4)
        assert row.adapters == sum(row.path in a for a in sources.values())
        assert row.rank == sum(a[row.path].rank for a in sources.values() if row.path in a)
        assert (np.diff(row.control) >= -1e-9).all()
        total, held = total + row.size, held + row.size * wanted[2]
    assert found.share(3) == pytest.approx(held / total, rel=1e-4)
    assert found.share(1000) == pytest.approx(1, abs=1e-5)


def test_what_is_unrelated_shares_what_chance_has(make_adapter):
    sources = [make_adapter(SHAPES, 2, seed=k) for k in range(12)]
    found = lf.shared_spectrum(sources)
    for k in (1, 4, 8):
        assert found.share(k) == pytest.approx(found.control(k), abs=0.03)


def test_what_is_shared_lies_above_the_control():
    """One A for all: four directions hold the inputs, and the outputs are chance's."""
    g = torch.Generator().manual_seed(0)
    A = torch.randn(4, 64, generator=g)
    sources = [lf.Adapter({"q": lf.LowRank(A, torch.randn(48, 4, generator=g))}) for _ in range(10)]
    out, into = lf.shared_spectrum(sources).rows
    assert into.energy[3] == pytest.approx(1, abs=1e-5)
    assert into.control[3] < 0.4
    assert out.energy[3] == pytest.approx(out.control[3], abs=0.05)


def test_it_is_one_whatever_the_gauge(make_adapter, regauged):
    sources = [make_adapter(SHAPES, 4, seed=k) for k in range(3)]
    one = lf.shared_spectrum(sources)
    other = lf.shared_spectrum([regauged(a, k) for k, a in enumerate(sources)])
    for x, y in zip(one.rows, other.rows, strict=True):
        np.testing.assert_allclose(x.energy, y.energy, atol=1e-4)
        np.testing.assert_allclose(x.control, y.control, atol=1e-4)


def test_a_large_side_is_looked_at_through_its_first_directions(make_adapter, monkeypatch, deltas):
    sources = [make_adapter({"q": (150, 200)}, 8, seed=k) for k in range(40)]
    whole = lf.shared_spectrum(sources)
    monkeypatch.setattr("lorafold.compare.shared._WHOLE", 100)
    part = lf.shared_spectrum(sources)
    for x, y in zip(whole.rows, part.rows, strict=True):
        assert len(y.energy) == 64
        np.testing.assert_allclose(y.energy[:16], x.energy[:16], rtol=0.02)
        assert (y.energy <= x.energy[:64] + 1e-6).all()


def test_in_factors_it_is_vloras_variance_explained(make_adapter):
    ops = pytest.importorskip("vlora.ops")
    sources = {f"a{k}": make_adapter(SHAPES, 4, seed=k, scale=1.0) for k in range(6)}
    found = lf.shared_spectrum(sources, space="factors")
    assert [r.side for r in found.rows] == ["B", "A", "B", "A"]
    for row in found.rows:
        flat = torch.stack([getattr(a[row.path], row.side).flatten() for a in sources.values()])
        _, values, _ = ops.compute_svd(flat, num_components=None, center=True)
        wanted = ops.explained_variance_ratio(values).numpy()
        np.testing.assert_allclose(row.energy[: len(wanted)], wanted, atol=1e-4)
        np.testing.assert_allclose(row.energy, row.control, atol=0.1)


def test_a_common_start_looks_shared_in_factors():
    g = torch.Generator().manual_seed(0)
    A = torch.randn(4, 64, generator=g)

    def task():
        near = A + 0.01 * torch.randn(4, 64, generator=g)
        return lf.Adapter({"q": lf.LowRank(near, torch.randn(48, 4, generator=g))})

    found = lf.shared_spectrum([task() for _ in range(6)], space="factors")
    assert found.rows[1].size < 0.01 * found.rows[0].size  # what is not the mean


def test_edges(make_adapter, tmp_path):
    one = lf.shared_spectrum(make_adapter(SHAPES, 2))
    assert one.share(2) == pytest.approx(1)
    assert one.control(2) == pytest.approx(1)
    alone = lf.shared_spectrum(make_adapter(SHAPES, 2), space="factors")
    assert (alone.share(1), alone.control(1)) == (0, 0)
    zero = lf.shared_spectrum([0.0 * make_adapter(SHAPES, 2, seed=k) for k in range(2)])
    assert (zero.share(1), zero.control(1)) == (0, 0)
    sizes = [make_adapter(SHAPES, 2, seed=1), 1e25 * make_adapter(SHAPES, 2, seed=2)]
    assert lf.shared_spectrum(sizes).share(2) == pytest.approx(1)
    mixed = [make_adapter(SHAPES, 2, seed=1), make_adapter(SHAPES, 6, seed=2)]
    assert lf.shared_spectrum(mixed, space="factors").share(1) == pytest.approx(1)


@pytest.mark.parametrize("space", ["delta", "factors"])
def test_sizes_far_apart_in_any_order(make_adapter, space):
    """Of other ranks each, so that they come one after another: the largest has the energy."""
    shapes = {"q": (24, 40), "wide": (6, 5)}
    tiny, huge = 1e-20 * make_adapter(shapes, 2, seed=1), 1e20 * make_adapter(shapes, 4, seed=2)
    mid = make_adapter(shapes, 8, seed=3)
    for sources in ({"t": tiny, "h": huge, "m": mid}, {"h": huge, "m": mid, "t": tiny}):
        found = lf.shared_spectrum(sources, space=space)
        for row in found.rows:
            assert np.isfinite(row.energy).all()
            assert np.isfinite(row.control).all()
            if space == "delta":
                assert row.size == pytest.approx(huge[row.path].norm() ** 2, rel=1e-5)
                S = huge[row.path].spectrum().double().numpy() ** 2
                wanted = (S.cumsum() / S.sum())[:4]
                np.testing.assert_allclose(row.energy[: len(wanted)], wanted, rtol=1e-4)


def test_what_is_refused(make_adapter):
    a = make_adapter(SHAPES, 2)
    with pytest.raises(lf.MismatchError, match="space must be 'delta' or 'factors', found 'core'"):
        lf.shared_spectrum(a, space="core")
    with pytest.raises(lf.MismatchError, match="empty"):
        lf.shared_spectrum([])
    dora = make_adapter(SHAPES, 2, config={"use_dora": True})
    with pytest.raises(lf.RefusedError, match="'d' can't be compared: this is a DoRA"):
        lf.shared_spectrum({"a": a, "d": dora})
    for k in (0, -1, 1.5, True):
        with pytest.raises(lf.MismatchError, match="k must be"):
            lf.shared_spectrum(a).share(k)


def test_nothing_global_is_touched(make_adapter):
    before = torch.get_rng_state()
    found = [lf.shared_spectrum([make_adapter(SHAPES, 2)], seed=s) for s in (0, 0, 1)]
    assert torch.equal(before, torch.get_rng_state())
    assert (found[0].rows[0].control == found[1].rows[0].control).all()
