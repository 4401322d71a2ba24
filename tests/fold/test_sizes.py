"""Factors of any size: what is told is true, and as many bytes hold as much."""

import math

import pytest
import torch

import lorafold as lf

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
    lib.add(new, "new")
    everyone = {**sources, "new": new}
    for name, adapter in everyone.items():
        found = error(adapter, lib[name])
        assert lib.error(name) == pytest.approx(found, rel=1e-3, abs=1e-7), (form, options, name)
        assert found <= options.get("tolerance", 2.0) * (1 + 1e-6), (form, options, name)
    lib.verify(everyone)
    told = [lib.error(name) for name in everyone]
    bits = [lib.entry(name)["bits"] for name in everyone]
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
