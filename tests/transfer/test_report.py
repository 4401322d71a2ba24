"""`transfer_report` against dense float64 algebra, and where there is nothing to divide by."""

import json

import pytest
import torch

import lorafold as lf
from lorafold.transfer.report import RANK_TOLERANCE


def update(out=20, inner=30, rank=6, scale=0.5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return lf.LowRank(
        torch.randn(rank, inner, generator=g), torch.randn(out, rank, generator=g), scale
    )


def dense(u):
    return u.scale * u.B.double() @ u.A.double()


def cosines(u, v):
    """(out side, in side), from full decompositions."""
    (U, _, V), (X, _, Y) = (torch.linalg.svd(dense(w)) for w in (u, v))
    ranks = [min(5, int(torch.linalg.matrix_rank(dense(w)))) for w in (u, v)]
    return [
        torch.linalg.svdvals(P[:, : ranks[0]].T @ Q[:, : ranks[1]]) for P, Q in ((U, X), (V.T, Y.T))
    ]


@pytest.mark.parametrize("ranks", [(6, 6), (6, 3), (1, 9), (2, 20)])
def test_it_says_what_dense_algebra_says(ranks):
    u, v = (update(rank=r, seed=r + 10 * k) for k, r in enumerate(ranks))
    found = lf.transfer_report(u, v)
    W, V = dense(u), dense(v)
    assert found.error == pytest.approx(float((V - W).norm() / W.norm()), rel=1e-6)
    assert found.norm_ratio == pytest.approx(float(V.norm() / W.norm()), rel=1e-6)
    assert found.rank_ratio == ranks[1] / ranks[0]
    out, into = cosines(u, v)
    assert found.cosines_out == pytest.approx(out.tolist(), abs=1e-6)
    assert found.cosines_in == pytest.approx(into.tolist(), abs=1e-6)
    assert found.cosine == pytest.approx(float(torch.cat([out, into]).mean()), abs=1e-6)


def test_what_comes_back_has_no_error():
    u = update()
    same = lf.transfer_report(u, lf.LowRank(u.A.clone(), u.B.clone(), u.scale))
    assert (same.error, same.norm_ratio, same.rank_ratio) == (0.0, 1.0, 1.0)
    gauge = lf.transfer_report(u, u.balanced())
    assert gauge.error < 1e-6
    assert gauge.cosine == pytest.approx(1, abs=1e-9)


def test_the_error_is_no_square():
    u = update()
    assert lf.transfer_report(u, 0.5 * u).error == pytest.approx(0.5)


def test_small_differences_are_seen():
    u = update()
    v = lf.LowRank(u.A.double() * (1 + 1e-9), u.B.double(), u.scale)
    assert lf.transfer_report(u, v).error == pytest.approx(1e-9, rel=1e-3)


def test_other_shapes_have_no_error():
    u = update()
    both = lf.transfer_report(u, update(21, 31))
    assert both.error is both.cosines_out is both.cosines_in is both.cosine is None
    assert both.norm_ratio > 0
    one = lf.transfer_report(u, lf.LowRank(u.A, torch.randn(40, 6), u.scale))
    assert one.error is one.cosines_out is None
    assert one.cosines_in is not None
    assert one.cosine == pytest.approx(sum(one.cosines_in) / 5)


ZERO = lf.LowRank(torch.zeros(2, 30), torch.randn(20, 2))


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (ZERO, ZERO, (0.0, None, None)),
        (ZERO, update(), (None, None, None)),
        (update(), ZERO, (1.0, 0.0, 0.0)),
        (update(), 0.0 * update(), (1.0, 0.0, 0.0)),
    ],
)
def test_nothing_is_divided_by_zero(before, after, said):
    for report in (
        lf.transfer_report(before, after),
        lf.transfer_report(lf.Adapter({"q": before}), lf.Adapter({"q": after})),
    ):
        assert (report.norm_ratio, report.rank_ratio) == said[1:]
        assert report.error is None if said[0] is None else report.error == pytest.approx(said[0])
        assert report.cosine is None
        assert report.cosines_out == report.cosines_in == ()
        json.dumps(report.to_dict(), allow_nan=False)


def test_ranks_are_numerical_and_the_tolerance_is_told():
    u = update(rank=3)
    doubled = lf.LowRank(torch.cat([u.A, u.A]), torch.cat([u.B, u.B], 1))
    found = lf.transfer_report(u, doubled)
    assert found.rank_ratio == 1.0
    assert found.modules[0].ranks == (3, 3)
    assert found.rank_tolerance == RANK_TOLERANCE
    B = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2 * RANK_TOLERANCE, 0.0], [0, 0, RANK_TOLERANCE / 2]])
    assert lf.transfer_report(u, lf.LowRank(torch.eye(3), B)).modules[0].ranks == (3, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_is_no_rank(dtype):
    """An update of rank 3 that was decomposed in float32 at rank 8 has rank 3 still."""
    u = update(400, 300, rank=3)
    padded = lf.LowRank(torch.cat([u.A] * 4), torch.cat([u.B] * 4, 1), u.scale).to(dtype=dtype)
    assert lf.transfer_report(padded, padded.balanced()).modules[0].ranks == (3, 3)


def test_an_adapter_is_reported_module_by_module():
    a = lf.Adapter({"q": update(seed=1), "k": update(seed=2), "v": update(seed=3)})
    b = lf.Adapter({"q": 0.5 * a["q"], "k": a["k"], "new": update(seed=4)})
    found = lf.transfer_report(a, b)
    q, k, new = found.modules
    assert (q.error, k.error, new.error) == (pytest.approx(0.5), 0.0, None)
    assert new.sources == ()
    assert found.without == {"v": "not in the result"}
    apart = (0.25 * a["q"].norm() ** 2 + a["v"].norm() ** 2 + b["new"].norm() ** 2) ** 0.5
    assert found.error == pytest.approx(apart / a.norm(), rel=1e-6)
    assert found.norm_ratio == pytest.approx(b.norm() / a.norm(), rel=1e-6)


def test_it_is_printed_in_a_line_and_as_text_in_a_notebook():
    a = lf.Adapter({"<b>": update()})
    found = lf.transfer_report(a, 0.5 * a)
    assert repr(found) == (
        "TransferReport(1 modules, error 0.5, norm ratio 0.5, rank ratio 1, cosine 1)"
    )
    page = found._repr_html_()
    assert "&lt;b&gt;" in page
    assert "<b>&lt;b" not in page.replace("<b>TransferReport", "")
    assert "20×30" in page


def test_bad_input_is_told():
    u = update()
    with pytest.raises(lf.MismatchError, match="found LowRank and Adapter"):
        lf.transfer_report(u, lf.Adapter({"q": u}))
    with pytest.raises(lf.MismatchError, match="found str and LowRank"):
        lf.transfer_report("path", u)
    with pytest.raises(lf.RefusedError, match="DoRA"):
        lf.transfer_report(lf.Adapter({"q": u}, config={"use_dora": True}), lf.Adapter({"q": u}))
