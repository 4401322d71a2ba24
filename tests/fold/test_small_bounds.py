"""Bounds so small that float32 itself counts: what is read keeps them, and `verify` says so."""

import pytest

import lorafold as lf

SHAPES = {"q": (48, 32), "v": (24, 32)}


@pytest.fixture(scope="module")
def kin(make_adapter):
    """Small steps from one start, and a scale that is no power of two."""
    first = make_adapter(SHAPES, 4, seed=0)

    def one(i):
        step = make_adapter(SHAPES, 4, seed=i + 1)
        modules = {
            p: lf.LowRank(u.A + 0.05 * step[p].A, u.B + 0.05 * step[p].B, 0.3)
            for p, u in first.items()
        }
        return lf.Adapter(modules)

    return {f"a{i}": one(i) for i in range(12)}


def relative_error(dense, a, b):
    lost = sum(float((dense(u) - dense(b[p])).square().sum()) for p, u in a.modules.items())
    return (lost / sum(float(dense(u).square().sum()) for u in a.modules.values())) ** 0.5


@pytest.mark.parametrize("form", ["flat", "shared", "input", "output", "svd"])
@pytest.mark.parametrize("tolerance", [1e-5, 1e-6, 2e-7, 3e-8])
def test_what_is_read_keeps_its_bound(kin, dense, form, tolerance):
    first = dict(list(kin.items())[:10])
    lib = lf.fold(first, tolerance=tolerance, form=form)
    lib.add(kin["a10"], "a10")
    lib.add(kin["a11"], "a11", tolerance=tolerance / 2)
    for name, a in kin.items():
        error = relative_error(dense, a, lib[name])
        assert error <= lib.error(name) <= (tolerance / 2 if name == "a11" else tolerance)
    assert lib.verify(kin).keys() == kin.keys()


@pytest.mark.parametrize("form", ["flat", "shared"])
def test_what_is_folded_again_keeps_its_bound(kin, dense, form):
    lib = lf.fold(kin, tolerance=1e-6, form=form)
    lib.refold(3e-6, form="svd")
    for name, a in kin.items():
        assert relative_error(dense, a, lib[name]) <= 3e-6
    lib.refold(2e-6, sources=kin, form=form)
    lib.verify(kin)


def test_no_verified_error_is_float32_rounding(kin):
    """An adapter that is read as it was has no error, however it is measured."""
    lib = lf.fold(kin, tolerance=1e-7, form="svd")
    for name, error in lib.verify(kin).items():
        assert error <= lib.error(name) + 1e-12
