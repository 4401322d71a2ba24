"""`overlap`: norms, angles and shares against dense algebra and scipy's principal angles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import lorafold as lf

SHAPES = {"layers.0.q": (24, 40), "layers.0.v": (12, 40), "layers.1.q": (24, 40)}


@pytest.fixture(scope="module")
def pair(make_adapter):
    """Ranks 2 and 5, with a module each that the other lacks."""
    a = make_adapter({**SHAPES, "only.a": (6, 8)}, 2, seed=1)
    b = make_adapter({**SHAPES, "only.b": (6, 8)}, 5, seed=2, scale=0.5)
    return a, b


def spaces(W, rank):
    U, _, Vh = np.linalg.svd(W)
    return U[:, :rank], Vh[:rank].T


def test_it_is_dense_algebra(pair, dense):
    linalg = pytest.importorskip("scipy.linalg", reason="scipy is the reference")
    a, b = pair
    found = lf.overlap(a, b)
    assert (found.only_in_a, found.only_in_b) == (("only.a",), ("only.b",))
    assert [m.path for m in found.modules] == list(SHAPES)
    assert found.norm_a == pytest.approx(a.norm(), rel=1e-5)
    assert found.norm_b == pytest.approx(b.norm(), rel=1e-5)
    assert found.distance == pytest.approx(a.distance(b), rel=1e-5)
    assert found.cosine == pytest.approx(a.cosine(b), abs=1e-6)
    totals = np.zeros(4)
    for m in found.modules:
        W, X = dense(a[m.path]).numpy(), dense(b[m.path]).numpy()
        (U, V), (P, Q) = spaces(W, 2), spaces(X, 5)
        assert m.norm_a == pytest.approx(np.linalg.norm(W), rel=1e-5)
        assert m.norm_b == pytest.approx(np.linalg.norm(X), rel=1e-5)
        assert m.distance == pytest.approx(np.linalg.norm(W - X), rel=1e-5)
        cosine = (W * X).sum() / np.linalg.norm(W) / np.linalg.norm(X)
        assert m.cosine == pytest.approx(cosine, abs=1e-6)
        np.testing.assert_allclose(m.angles_out, np.sort(linalg.subspace_angles(U, P)), atol=1e-5)
        np.testing.assert_allclose(m.angles_in, np.sort(linalg.subspace_angles(V, Q)), atol=1e-5)
        both = np.linalg.norm(W) ** 2 + np.linalg.norm(X) ** 2
        out = np.linalg.norm(U.T @ X) ** 2 + np.linalg.norm(P.T @ W) ** 2
        into = np.linalg.norm(X @ V) ** 2 + np.linalg.norm(W @ Q) ** 2
        assert m.shared_out == pytest.approx(out / both, rel=1e-4)
        assert m.shared_in == pytest.approx(into / both, rel=1e-4)
        inside = np.linalg.norm(U.T @ X @ V), np.linalg.norm(P.T @ W @ Q)
        assert m.interference_a == pytest.approx(inside[0] / np.linalg.norm(W), rel=1e-4)
        assert m.interference_b == pytest.approx(inside[1] / np.linalg.norm(X), rel=1e-4)
        totals += out, into, inside[0] ** 2, inside[1] ** 2
    both = found.norm_a**2 + found.norm_b**2
    assert found.shared_out == pytest.approx(totals[0] / both, rel=1e-4)
    assert found.shared_in == pytest.approx(totals[1] / both, rel=1e-4)
    assert found.interference_a == pytest.approx(math.sqrt(totals[2]) / found.norm_a, rel=1e-4)
    assert found.interference_b == pytest.approx(math.sqrt(totals[3]) / found.norm_b, rel=1e-4)
    assert found.interference == (found.interference_a + found.interference_b) / 2


def test_it_is_one_whatever_the_gauge_and_the_order(pair, regauged):
    a, b = pair
    one, two, back = lf.overlap(a, b), lf.overlap(regauged(a, 1), b.nested()), lf.overlap(b, a)
    for other in (two, back):
        for field in ("distance", "cosine", "shared_out", "shared_in", "interference"):
            assert getattr(one, field) == pytest.approx(getattr(other, field), rel=1e-4, abs=1e-6)
    assert back.interference_a == pytest.approx(one.interference_b)
    np.testing.assert_allclose(one.modules[0].angles_in, two.modules[0].angles_in, atol=1e-4)


def test_the_same_and_the_opposite_and_a_multiple(pair):
    a, _ = pair
    for c in (1, -1, 1000):
        found = lf.overlap(a, c * a)
        assert found.cosine == pytest.approx(math.copysign(1, c), abs=1e-6)
        assert (found.shared_in, found.shared_out) == pytest.approx((1, 1))
        assert found.interference_a == pytest.approx(abs(c), rel=1e-5)
        for m in found.modules:
            assert m.angles_out.max() < 1e-6
    assert lf.overlap(a, a).distance < 1e-6 * a.norm()


def test_a_common_start_is_seen_on_one_side_alone(dense):
    """The same A: all of the input side is shared, the output side by chance, cosine near 0."""
    g = torch.Generator().manual_seed(7)
    A = torch.randn(4, 256, generator=g)
    a, b = (lf.Adapter({"q": lf.LowRank(A, torch.randn(256, 4, generator=g))}) for _ in range(2))
    found = lf.overlap(a, b)
    assert found.shared_in == pytest.approx(1, abs=1e-6)
    assert found.shared_out < 0.1
    assert abs(found.cosine) < 0.1
    assert found.modules[0].angles_in.max() < 1e-5
    apart = lf.overlap(a, lf.Adapter({"q": lf.LowRank(torch.randn(4, 256), torch.randn(256, 4))}))
    assert apart.interference < found.interference


def test_zero_updates_and_dead_directions(make_adapter):
    a = make_adapter({"q": (6, 5)}, 2, seed=1)
    zero = lf.Adapter({"q": lf.LowRank(a["q"].A, 0 * a["q"].B)})
    for found in (lf.overlap(a, zero), lf.overlap(zero, a)):
        assert found.cosine == found.shared_in == found.shared_out == found.interference == 0
        assert found.distance == pytest.approx(a.norm())
        assert len(found.modules[0].angles_in) == 0
    assert lf.overlap(zero, zero).distance == 0
    u = a["q"]
    rank_one = lf.LowRank(torch.cat([u.A[:1], u.A[:1]]), torch.cat([u.B[:, :1], u.B[:, :1]], 1))
    assert len(lf.overlap(a, lf.Adapter({"q": rank_one})).modules[0].angles_in) == 1
    huge = lf.overlap(1e30 * a, 1e30 * a)
    assert huge.cosine == pytest.approx(1)
    nothing = lf.overlap(a, make_adapter({"v": (6, 5)}, 2, seed=1))
    assert (nothing.modules, nothing.cosine) == ((), 0)
    assert nothing.distance == pytest.approx(math.sqrt(2) * a.norm(), rel=0.5)


def test_one_module_of_two_kinds(make_adapter):
    a = make_adapter({"m": (8, 27)}, 2)
    conv = lf.Adapter(a.modules, layouts={"m": lf.Layout("conv", (3, 3, 3))})
    with pytest.raises(lf.MismatchError, match="'m' is of kind linear in one adapter and conv in"):
        lf.overlap(a, conv)
    assert lf.overlap(conv, conv).cosine == pytest.approx(1)


def test_what_is_refused(pair, make_adapter, tmp_path):
    a, b = pair
    lf.save(a, tmp_path / "a")
    assert lf.overlap(tmp_path / "a", b).cosine == pytest.approx(a.cosine(b), abs=1e-6)
    dora = make_adapter(SHAPES, 2, config={"use_dora": True})
    with pytest.raises(lf.RefusedError, match="'b' can't be compared: this is a DoRA"):
        lf.overlap(a, dora)
    with pytest.raises(lf.MismatchError, match=r"'layers\.0\.q' is \(24, 40\) in one adapter and"):
        lf.overlap(a, make_adapter({"layers.0.q": (8, 8)}, 2))
    one, other = (make_adapter(SHAPES, 2, base_model=name) for name in ("x", "y"))
    with pytest.raises(lf.MismatchError, match=r"different bases: 'x' and 'y'"):
        lf.overlap(one, other)
    with pytest.raises(lf.FileError):
        lf.overlap(tmp_path / "nothing", a)
    with pytest.raises(lf.MismatchError, match="must be a path or an Adapter"):
        lf.overlap(a, None)
