"""Factors of any size: what is told is true, and as many bytes hold as much."""

import logging
import math

import numpy as np
import pytest
import torch

import lorafold as lf
from lorafold.collection.batch import joined_factors, singular_values
from lorafold.errors import MismatchError, ToleranceError
from lorafold.fold.coding.bases import Basis
from lorafold.fold.coding.record import Target
from lorafold.fold.passes.coder import code_as_planned
from lorafold.fold.planning.plan import ModulePlan, Shared
from lorafold.fold.planning.sharing import Sharing

OUT, IN, RANK, COUNT = 24, 20, 3, 4
FORMS = ("svd", "input", "output", "shared", "flat")
OPTIONS = ({"tolerance": 0.05}, {"bits": 16}, {"rank": 2, "bits": 4})
# Powers of two of A and of B, by adapter and module.
EVEN = {
    "B tiny": lambda i, j: (0, -100),
    "B huge": lambda i, j: (0, 100),
    "B small": lambda i, j: (0, -17),
    "both huge": lambda i, j: (50, 50),
    "far apart": lambda i, j: (80, -70),
}
MIXED = {
    "by module": lambda i, j: (0, (-100, 100)[j]),
    "by adapter": lambda i, j: (0, (-90, 90, 0, 17)[i % 4]),
    "by both": lambda i, j: ((-40, 40, 0, 30)[(i + j) % 4], (-50, 20, 0)[(3 * i + j) % 3]),
    "one is tiny": lambda i, j: (0, -100 * (i == 2)),
}


def kin(exponents):
    """Small steps from one start, at sizes of their own; the last is not folded."""
    g = torch.Generator().manual_seed(0)
    starts = {
        p: (torch.randn(RANK, IN, generator=g), torch.randn(OUT, RANK, generator=g)) for p in "pq"
    }
    found = {}
    for i in range(COUNT + 1):
        modules = {}
        for j, (path, (A, B)) in enumerate(starts.items()):
            a, b = (2.0**e for e in exponents(i, j))
            near_A = A + 0.2 * torch.randn(RANK, IN, generator=g)
            near_B = B + 0.2 * torch.randn(OUT, RANK, generator=g)
            modules[path] = lf.LowRank(near_A * a, near_B * b)
        found[f"a{i}"] = lf.Adapter(modules)
    return found, found.pop(f"a{COUNT}")


def error(adapter, stored):
    """‖ΔŴ − ΔW‖ / ‖ΔW‖ on dense float64 matrices."""
    W, V = (
        torch.cat([(u.scale * (u.B.double() @ u.A.double())).ravel() for u in a.modules.values()])
        for a in (adapter, stored)
    )
    return float((V - W).norm() / W.norm())


def checked(sources, new, form, options):
    """Errors and bits as told, the new adapter's last, where dense matrices say the same."""
    lib = lf.fold(sources, form=form, **options)
    lib.project(new)
    try:
        lib.add(new, "new")
    except ToleranceError:
        assert "tolerance" not in options  # by size, and far from the bases
        lib.add(new, "new", form="exact")
    everyone = {**sources, "new": new}
    for name, adapter in everyone.items():
        found = error(adapter, lib[name])
        assert lib.error(name) == pytest.approx(found, rel=1e-3, abs=1e-7), (form, options, name)
        assert found <= options.get("tolerance", 2.0) * (1 + 1e-6), (form, options, name)
    lib.verify(everyone)
    told = [lib.error(name) for name in everyone]
    bits = [lib.entry(name).get("bits", 0) for name in everyone]
    if "rank" in options:
        return told, bits
    lib.refold(sources=everyone)
    for name, adapter in everyone.items():
        assert lib.error(name) == pytest.approx(error(adapter, lib[name]), rel=1e-3, abs=1e-7)
    return told, bits


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_size_changes_nothing(form, options):
    told, bits = checked(*kin(lambda i, j: (0, 0)), form, options)
    for case, exponents in EVEN.items():
        other = checked(*kin(exponents), form, options)
        # But for a number that rounding puts on the other side of a threshold.
        assert other[0] == pytest.approx(told, rel=0.1, abs=1e-7), case
        assert other[1] == pytest.approx(bits, rel=0.02), case


@pytest.mark.parametrize("form", [*FORMS, "auto"])
@pytest.mark.parametrize("case", MIXED)
def test_sizes_beside_each_other(case, form):
    for options in OPTIONS:
        checked(*kin(MIXED[case]), form, options)


def test_what_is_tiny_beside_the_mean_is_nothing_rather_than_noise():
    sources, _ = kin(MIXED["one is tiny"])
    lib = lf.fold(sources, form="flat", rank=1)
    assert lib.error("a2") == 1
    assert lib["a2"].norm() == 0
    assert lib.error("a1") < 1


def test_the_largest_floats_are_folded():
    """Their squares are beyond float32, and so are sums of a few."""
    sources, _ = kin(lambda i, j: (-60, 120))
    assert all(math.isfinite(a.norm()) for a in sources.values())
    for form in FORMS:
        lib = lf.fold(sources, form=form, tolerance=0.05)
        assert all(error(a, lib[n]) <= 0.05 for n, a in sources.items())


# A, B and the scale, whose product is 1e-30 … 1e30 while parts of it leave float32.
APART = [(1e30, 1e-30, 1e-30), (1e30, 1.0, 1e-60), (1e-30, 1.0, 1e52), (1e-30, 1e30, 1e30)]


@pytest.mark.parametrize("sizes", APART)
def test_a_scale_that_factors_cannot_take(sizes):
    plain, new = kin(lambda i, j: (0, 0))
    size = math.prod(sizes)

    def moved(adapter):
        a, b, scale = sizes
        return lf.Adapter({p: lf.LowRank(u.A * a, u.B * b, scale) for p, u in adapter.items()})

    sources = {name: moved(a) for name, a in plain.items()}
    for form, options in (("auto", OPTIONS[0]), ("flat", {"rank": 1}), ("svd", OPTIONS[2])):
        checked(sources, moved(new), form, options)
    a, b = sources["a0"], sources["a1"]
    apart = plain["a0"].distance(plain["a1"])
    assert a.distance(b) / size == pytest.approx(apart, rel=1e-4)
    assert a.distance(0.5 * b) / size == pytest.approx(
        plain["a0"].distance(0.5 * plain["a1"]), rel=1e-4
    )
    for method in ("linear", "ties"):
        merged, wanted = (
            lf.merge({"a": x, "b": y}, method) for x, y in ((a, b), (plain["a0"], plain["a1"]))
        )
        assert error((size / wanted.norm()) * wanted, (1 / wanted.norm()) * merged) < 1e-3


@pytest.mark.parametrize("size", [1e-36, 1e-44, 1e-60])
@pytest.mark.parametrize("form", ["svd", "shared", "flat", "auto"])
def test_what_no_coefficient_holds_is_kept_or_told_as_lost(form, size):
    plain, _ = kin(lambda i, j: (0, 0))
    h = math.sqrt(size)
    tiny = lf.Adapter({p: lf.LowRank(h * u.A, h * u.B) for p, u in plain["a0"].items()})
    sources = {"tiny": tiny, "a1": plain["a1"]}
    for options in OPTIONS:
        lib = lf.fold(sources, form=form, **options)
        found = tiny.distance(lib["tiny"]) / tiny.norm()
        assert lib.error("tiny") == pytest.approx(found, rel=1e-3, abs=1e-6)
        assert found <= options.get("tolerance", 2.0)


def test_what_is_too_large_for_float32_is_refused_by_name():
    plain, _ = kin(lambda i, j: (0, 0))
    huge = lf.Adapter({p: lf.LowRank(1e20 * u.A, 1e20 * u.B) for p, u in plain["a0"].items()})
    with pytest.raises(MismatchError, match="adapter 'huge'.*'p'.*form='exact'"):
        lf.fold({"a": plain["a1"], "huge": huge}, tolerance=0.1)
    lib = lf.fold({"a": plain["a1"], "huge": huge}, form="exact")
    assert lib.verify({"huge": huge}) == {"huge": 0.0}


@pytest.mark.parametrize("share", [1e-4, 1e-6, 1e-9])
@pytest.mark.parametrize("form", ["svd", "shared"])
def test_factors_that_nearly_cancel(form, share):
    """What a library keeps within its bound is not refused by `verify`."""
    g = torch.Generator().manual_seed(0)

    def near(seed):
        B, A = torch.randn(OUT, RANK, generator=g), torch.randn(RANK, IN, generator=g)
        apart = B + share * torch.randn(OUT, RANK, generator=g, dtype=torch.float64)
        return lf.Adapter({"q": lf.LowRank(torch.cat([A, -A]), torch.cat([apart.to(B), B], 1))})

    sources = {name: near(k) for k, name in enumerate("abc")}
    if form == "svd":
        wide = sources["a"]["q"].to(dtype=torch.float64)
        assert sources["a"].norm() == pytest.approx(float((wide.B @ wide.A).norm()), rel=1e-5)
    lib = lf.fold(sources, form=form, tolerance=0.01)
    assert all(e <= 0.01 for e in lib.verify(sources).values())
    for name, adapter in sources.items():
        if adapter.norm() > 0:  # of 1e-9 nothing is left in float32
            assert lib.error(name) == pytest.approx(error(adapter, lib[name]), rel=1e-3, abs=1e-7)


class _Log(logging.Handler):
    def __init__(self):
        super().__init__()
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


def test_a_form_that_fails_is_dropped_and_told(monkeypatch):
    sources, _ = kin(lambda i, j: (0, 0))
    log = _Log()
    logger = logging.getLogger("lorafold")
    monkeypatch.setattr(logger, "level", logging.INFO)
    monkeypatch.setattr(logger, "handlers", [log])

    def fails(self, form, limit):
        raise torch.linalg.LinAlgError("singular")

    monkeypatch.setattr(Sharing, "plan", fails)
    for form in ("auto", "shared"):
        log.said.clear()
        lib = lf.fold(sources, form=form, tolerance=0.05)
        assert all(error(a, lib[n]) <= 0.05 for n, a in sources.items())
        assert any("'shared' is left out at module 'p'" in text for text in log.said)


def test_updates_that_singular_sides_cannot_hold_get_their_own():
    sources, _ = kin(lambda i, j: (0, 0))
    f = joined_factors(
        np.arange(2), [(u.B, u.A, u.scale) for u in (sources["a0"]["p"], sources["a1"]["p"])]
    )
    twice = Basis(torch.ones(OUT, 2), b"", 0)
    S = singular_values(f).numpy()
    sides = Shared(np.zeros(2, int), {0: twice})
    plan = ModulePlan("output", S**2, np.full(RANK, 40.0), 0.0, sides)
    amount = 0.01 * (S**2).sum(1)
    coded = code_as_planned(f, np.arange(2), plan, Target("error", amount))
    assert (coded.squared_error <= amount * 1.1).all()
    assert all(record[1] == 0 for record in coded.records)  # both sides are its own
