"""`anatomy`: measures against dense algebra, families, and what stands out."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

import lorafold as lf
from lorafold.compare.anatomy import families_of

LAYERS = 12
SHAPES = {f"layers.{n}.self_attn.{p}": (24, 40) for n in range(LAYERS) for p in ("q", "v")}


@pytest.fixture(scope="module")
def plain(make_update):
    """One spectrum everywhere, norms that grow along the depth."""
    spectrum = [4.0, 2.0, 1.0, 0.5]
    return lf.Adapter(
        {
            p: make_update(*shape, 4, seed=k, spectrum=spectrum) * (1 + 0.2 * (k // 2))
            for k, (p, shape) in enumerate(SHAPES.items())
        }
    )


def changed(adapter, path, update):
    return dataclasses.replace(adapter, modules={**adapter.modules, path: update})


def test_measures_are_those_of_dense_algebra(make_adapter, dense):
    a = make_adapter({"x.0.q": (24, 40), "x.0.v": (6, 5)}, {"x.0.q": 5, "x.0.v": 8}, seed=1)
    found = lf.anatomy(a)
    assert found.norm == pytest.approx(a.norm(), rel=1e-5)
    for m in found.modules:
        W = dense(a[m.path])
        S = torch.linalg.svdvals(W)[: min(a[m.path].rank, *W.shape)]
        np.testing.assert_allclose(m.spectrum, S.numpy(), rtol=1e-4)
        p = S**2 / (S**2).sum()
        assert m.norm == pytest.approx(float(W.norm()), rel=1e-5)
        assert m.stable_rank == pytest.approx(float((S**2).sum() / S[0] ** 2), rel=1e-4)
        assert m.participation_ratio == pytest.approx(float(1 / (p**2).sum()), rel=1e-4)
        assert m.entropy == pytest.approx(float(-(p * p.log()).sum()), rel=1e-4)
        rows, columns = W.norm(dim=1), W.norm(dim=0)
        assert (m.row, m.column) == (int(rows.argmax()), int(columns.argmax()))
        assert m.row_norm == pytest.approx(float(rows.max()), rel=1e-5)
        assert m.column_norm == pytest.approx(float(columns.max()), rel=1e-5)
        assert (m.shape, m.rank, m.depth) == (a[m.path].shape, a[m.path].rank, 0)


def test_measures_of_known_spectra(make_update):
    even = lf.anatomy(lf.Adapter({"q": make_update(8, 9, 4, spectrum=[3.0] * 4)})).modules[0]
    assert even.stable_rank == pytest.approx(4, rel=1e-4)
    assert even.participation_ratio == pytest.approx(4, rel=1e-4)
    assert even.entropy == pytest.approx(math.log(4), rel=1e-4)
    one = lf.anatomy(lf.Adapter({"q": make_update(8, 9, 1, spectrum=[3.0])})).modules[0]
    assert (one.stable_rank, one.participation_ratio) == pytest.approx((1, 1))
    assert one.entropy == pytest.approx(0, abs=1e-6)


def test_nothing_depends_on_the_gauge(plain, regauged):
    one, other = lf.anatomy(plain), lf.anatomy(regauged(plain, 1))
    for m, n in zip(one.modules, other.modules, strict=True):
        assert (m.path, m.family, m.row, m.column) == (n.path, n.family, n.row, n.column)
        assert m.norm == pytest.approx(n.norm, rel=1e-4)
        assert m.entropy == pytest.approx(n.entropy, rel=1e-3)


def test_a_trend_along_depth_is_no_anomaly(plain):
    assert lf.anatomy(plain, threshold=4.5).anomalies == ()


@pytest.mark.parametrize("measure", ["norm", "stable_rank", "entropy", "row", "column"])
def test_what_stands_out_is_found(plain, make_update, measure):
    path = "layers.7.self_attn.q"
    u = plain[path]
    if measure == "norm":
        odd = 4 * u
    elif measure in ("row", "column"):
        U, V = torch.zeros(24, 1), torch.ones(1, 40)
        U[3] = 1
        odd = (
            lf.LowRank(V, U)
            if measure == "row"
            else lf.LowRank(torch.eye(40)[5:6], torch.ones(24, 1))
        )
        odd = odd * (u.norm() / odd.norm())
    else:
        odd = make_update(24, 40, 4, seed=3, spectrum=[2.3] * 4)
        odd = odd * (u.norm() / odd.norm())
    found = lf.anatomy(changed(plain, path, odd), threshold=4.5).anomalies
    assert {a.path for a in found} == {path}
    assert measure in {a.measure for a in found}
    assert [abs(a.z) for a in found] == sorted((abs(a.z) for a in found), reverse=True)
    (one,) = (a for a in found if a.measure == measure)
    assert one.family == "q"
    assert (one.z > 0) == (one.value > one.expected)
    if measure == "norm":
        assert one.value == pytest.approx(4 * one.expected, rel=0.1)


def test_a_zero_module_among_others_stands_out(plain):
    u = plain["layers.3.self_attn.v"]
    found = lf.anatomy(changed(plain, "layers.3.self_attn.v", lf.LowRank(u.A, 0 * u.B)))
    assert found.anomalies[0].path == "layers.3.self_attn.v"
    assert found.anomalies[0].value == 0
    (m,) = (m for m in found.modules if m.path == "layers.3.self_attn.v")
    assert (m.norm, m.stable_rank, m.participation_ratio, m.entropy, m.row_norm) == (0,) * 5
    zero = lf.anatomy(lf.Adapter({p: lf.LowRank(u.A, 0 * u.B) for p, u in plain.modules.items()}))
    assert (zero.norm, zero.anomalies) == (0, ())


@pytest.mark.parametrize("c", [1e-25, 1e25])
def test_a_factor_for_all_changes_norms_only(make_adapter, c):
    a = make_adapter({f"layers.{n}.q": (9, 7) for n in range(5)}, 3)
    one, other = lf.anatomy(a), lf.anatomy(c * a)
    for m, scaled in zip(one.modules, other.modules, strict=True):
        assert (m.row, m.column) == (scaled.row, scaled.column)
        assert scaled.row_norm / c == pytest.approx(m.row_norm, rel=1e-5)
        assert scaled.column_norm / c == pytest.approx(m.column_norm, rel=1e-5)
        assert scaled.stable_rank == pytest.approx(m.stable_rank, rel=1e-5)


def test_few_of_a_kind_say_nothing(make_adapter):
    a = make_adapter({f"layers.{n}.q": (8, 8) for n in range(3)}, 2)
    assert lf.anatomy(changed(a, "layers.1.q", 1e6 * a["layers.1.q"])).anomalies == ()


def test_families():
    found = families_of(
        [
            *("model.layers.0.self_attn.q_proj", "model.layers.11.self_attn.q_proj"),
            *("model.layers.3.mlp.experts.7.up", "model.layers.3.mlp.experts.gate_up[5]"),
            *("encoder.block.2.layer.0.SelfAttention.k", "decoder.block.2.layer.1.EncDec.k"),
            *("decoder.block.2.layer.0.SelfAttention.k", "lm_head", "0", "conv2d.weight1"),
        ]
    )
    assert list(found.values()) == [
        *(("q_proj", 0), ("q_proj", 11), ("up", 3), ("gate_up", 3)),
        *(("encoder.block.layer.SelfAttention.k", 2), ("EncDec.k", 2)),
        *(("decoder.block.layer.SelfAttention.k", 2), ("lm_head", None), ("", 0)),
        ("weight1", None),
    ]
    assert families_of([]) == {}


def test_families_of_an_adapter_go_along_the_depth(plain):
    shuffled = dataclasses.replace(plain, modules=dict(reversed(plain.modules.items())))
    for family in lf.anatomy(shuffled).families.values():
        assert [m.depth for m in family] == list(range(LAYERS))


def test_paths_and_what_is_refused(plain, make_adapter, tmp_path):
    lf.save(plain, tmp_path / "a")
    assert lf.anatomy(tmp_path / "a").norm == pytest.approx(plain.norm(), rel=1e-5)
    dora = make_adapter(SHAPES, 2, config={"use_dora": True})
    with pytest.raises(lf.RefusedError, match="can't be measured: this is a DoRA"):
        lf.anatomy(dora)
    with pytest.raises(lf.FileError):
        lf.anatomy(tmp_path / "nothing")
    for threshold in (0, -1, float("nan"), "3", True, None):
        with pytest.raises(lf.MismatchError, match="threshold must be a number above 0"):
            lf.anatomy(plain, threshold=threshold)
    extras = lf.Adapter({}, {"head.weight": torch.ones(2)})
    assert lf.anatomy(extras).modules == ()
