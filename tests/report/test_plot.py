"""matplotlib's pictures: axes in, axes out, the right numbers on them, names as they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lorafold as lf

mpl = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("scipy", reason="scipy is not installed")
mpl.use("agg")


@pytest.fixture(autouse=True)
def plt():
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


@pytest.fixture(scope="module")
def few(collection):
    return collection(10)


def drawn(ax):
    """Draw all of it: what a name can break is broken here."""
    ax.figure.canvas.draw()
    return ax


def test_axes_in_axes_out(plt, few):
    a = next(iter(few.values()))
    calls = [
        (lf.plot.spectrum, a),
        (lf.plot.rank_curve, few),
        (lf.plot.similarity, lf.similarity(few)),
        (lf.plot.anatomy, a),
        (lf.plot.anatomy, lf.anatomy(a)),
    ]
    for draw, what in calls:
        _, ax = plt.subplots()
        before = len(plt.get_fignums())
        assert draw(what, ax) is ax
        assert len(plt.get_fignums()) == before, "no figure of its own"
        assert drawn(draw(what)) is not ax


def test_spectrum_is_that_of_the_dense_update(make_update, dense):
    u = make_update(9, 7, 3, spectrum=[4.0, 2.0, 0.5])
    ax = lf.plot.spectrum(lf.Adapter({"layers.0.q": u}))
    (line,) = ax.lines
    S = torch.linalg.svdvals(dense(u))[:3]
    assert np.allclose(line.get_ydata(), S / S[0], rtol=1e-5)
    assert list(line.get_xdata()) == [1, 2, 3]


def test_spectrum_of_a_zero_update_is_empty(make_update):
    ax = drawn(lf.plot.spectrum(lf.Adapter({"q": 0.0 * make_update(4, 3, 2)})))
    assert not any(len(line.get_ydata()) for line in ax.lines)


def test_rank_curve_has_a_line_each_or_quantiles(few, collection):
    ax = drawn(lf.plot.rank_curve(few))
    assert len(ax.lines) == len(few) + 1
    assert ax.lines[-1].get_ydata()[-1] == pytest.approx(1)
    many = drawn(lf.plot.rank_curve(collection(40, layers=1)))
    assert len(many.lines) == 1
    assert len(many.collections) == 2


def test_rank_curve_reads_folders(few, tmp_path):
    for k, a in enumerate(few.values()):
        lf.save(a, tmp_path / "adapters" / f"a{k}")
    assert len(lf.plot.rank_curve(tmp_path / "adapters").lines) == len(few) + 1
    lib = lf.fold(tmp_path / "adapters", tolerance=0.1)
    assert len(lf.plot.rank_curve(lib).lines) == len(few) + 1
    with pytest.raises(lf.MismatchError, match="every update is zero"):
        lf.plot.rank_curve({"zero": 0.0 * next(iter(few.values()))})


def test_similarity_names_like_beside_like(few):
    ax = drawn(lf.plot.similarity(lf.similarity(few)))
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert len(names) == len(few)
    assert names == [label.get_text() for label in ax.get_xticklabels()]
    bold = names.index("<b>bold</b>")
    assert any("alert(1)" in names[k] for k in (bold - 1, bold + 1) if 0 <= k < len(names))
    assert r"\$x_1\$" in names  # no formula
    assert ax.images[0].get_array().shape == (len(few), len(few))


def test_similarity_of_many_leaves_names_out(collection):
    ax = drawn(lf.plot.similarity(lf.similarity(collection(50, layers=1))))
    assert ax.get_yticklabels() == []
    assert "50 adapters" in ax.get_xlabel()


def test_anatomy_rings_what_stands_out(make_adapter, shapes):
    modules = dict(make_adapter(shapes(8), 3))
    odd = "model.layers.5.mlp.up_proj"
    modules[odd] = 40.0 * modules[odd]
    a = lf.Adapter(modules)
    ax = drawn(lf.plot.anatomy(a))
    rings = [c for c in ax.collections if c.get_label() == "stands out"]
    places = {tuple(map(float, p)) for p in rings[0].get_offsets()}
    assert any(x == 5 and y == pytest.approx(a[odd].norm(), rel=1e-4) for x, y in places)


def test_names_of_modules_are_no_formulas(make_update):
    a = lf.Adapter({f"layers.{n}.$x_1$^": make_update(4, 3, 2, seed=n) for n in range(3)})
    for ax in (drawn(lf.plot.spectrum(a)), drawn(lf.plot.anatomy(a))):
        assert len(ax.lines) >= 1


def test_what_is_no_adapter():
    with pytest.raises(lf.MismatchError, match="expected an Adapter, found str"):
        lf.plot.spectrum("adapters/sql")
    with pytest.raises(lf.MismatchError, match=r"lf\.similarity gives, found list"):
        lf.plot.similarity([])
    with pytest.raises(lf.MismatchError, match="found int"):
        lf.plot.anatomy(1)


def test_where_all_are_refused_it_says_why(make_adapter, shapes):
    dora = make_adapter(shapes(1), config={"use_dora": True})
    with pytest.raises(lf.RefusedError, match="nothing to measure: 'd': this is a DoRA"):
        lf.plot.rank_curve({"d": dora})


def test_without_matplotlib_it_says_what_to_install(make_adapter, monkeypatch, shapes):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    monkeypatch.delitem(__import__("sys").modules, "matplotlib.pyplot", raising=False)
    with pytest.raises(lf.errors.MissingExtraError, match=r"pip install 'lorafold\[plot\]'"):
        lf.plot.spectrum(make_adapter(shapes(1)))
