"""Updates that are zero, in all adapters or in some: nothing to share, nothing to store."""

import pytest
import torch

import lorafold as lf
from lorafold.errors import ToleranceError

OUT, IN, RANK, COUNT = 12, 16, 2, 4
SIZES = ({"tolerance": 0.1}, {"tolerance": 0.99}, {"bits": 2}, {"bits": 32}, {"rank": 1})
FORMS = ("auto", "svd", "input", "output", "shared", "flat")


def zero(g, which):
    A, B = torch.randn(RANK, IN, generator=g), torch.randn(OUT, RANK, generator=g)
    if which == "scale":
        return lf.LowRank(A, B, 0.0)
    if which == "product":  # neither factor is zero
        return lf.LowRank(torch.cat([A, A]), torch.cat([B, -B], 1))
    if which == "float32":  # no product of floats holds it
        return lf.LowRank(1e-22 * A, 1e-22 * B)
    return lf.LowRank(A * (which == "B"), B * (which == "A"))


def frozen(which):
    """Adapters of one start; "b" is zero in all of them."""
    return {name: replaced(a, b=which) for name, a in kin().items()}


def replaced(adapter, **which):
    g = torch.Generator().manual_seed(1)
    return lf.Adapter({**adapter.modules, **{p: zero(g, w) for p, w in which.items()}})


def kin():
    g = torch.Generator().manual_seed(0)
    starts = [torch.randn(RANK, IN, generator=g) for _ in range(2)]

    def trained(k):
        A = starts[k % 2] + 0.01 * torch.randn(RANK, IN, generator=g)
        return lf.LowRank(A, torch.randn(OUT, RANK, generator=g))

    return {f"t{k}": lf.Adapter({"a": trained(k), "b": trained(k)}) for k in range(COUNT)}


CASES = {
    "frozen B": lambda: frozen("B"),
    "frozen A": lambda: frozen("A"),
    "frozen both": lambda: frozen("both"),
    "frozen by scale": lambda: frozen("scale"),
    "frozen by cancelling": lambda: frozen("product"),
    "too small for floats": lambda: frozen("float32"),
    "too small in a group": lambda: {
        n: replaced(a, b="float32") if n in ("t1", "t3") else a for n, a in kin().items()
    },
    "a group of two": lambda: {
        n: replaced(a, b="B") if n in ("t1", "t3") else a for n, a in kin().items()
    },
    "all but one": lambda: {n: a if n == "t2" else replaced(a, b="B") for n, a in kin().items()},
    "one adapter": lambda: {**kin(), "t1": replaced(kin()["t1"], a="B", b="A")},
    "all adapters": lambda: {n: replaced(a, a="B", b="both") for n, a in kin().items()},
}


def error(adapter, stored):
    """‖ΔŴ − ΔW‖ / ‖ΔW‖ on dense float64 matrices; of a zero adapter ‖ΔŴ‖."""
    W, V = (
        torch.cat([(u.scale * (u.B.double() @ u.A.double())).ravel() for u in a.modules.values()])
        for a in (adapter, stored)
    )
    size = float(W.norm())
    return float((V - W).norm()) / (size if size > 1e-6 else 1.0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_zero_updates_in_every_form(case, form):
    sources = CASES[case]()
    for size in SIZES:
        lib = lf.fold(sources, form=form, **size)
        for name, adapter in sources.items():
            found = error(adapter, lib[name])
            assert found <= size.get("tolerance", 2.0) + 1e-6, (size, name)
            assert lib.error(name) == pytest.approx(found, abs=1e-4), (size, name)
        never = replaced(kin()["t0"], a="A", b="B")
        assert lib.add(never, "never trained") == 0
        assert lib["never trained"].norm() == 0
        try:
            lib.add(kin()["t0"], "trained")
        except ToleranceError:
            assert "tolerance" not in size  # zeros have no bases for it
            continue
        assert lib.error("trained") == pytest.approx(error(kin()["t0"], lib["trained"]), abs=1e-4)


@pytest.mark.parametrize("form", ["auto", "shared", "flat"])
@pytest.mark.parametrize("case", ["frozen B", "a group of two", "one adapter"])
def test_zero_updates_are_folded_anew(case, form):
    sources = CASES[case]()
    size = {"rank": RANK} if form == "flat" else {"tolerance": 0.1}
    lib = lf.fold(sources, form=form, **size)
    lib.refold()
    for name, adapter in sources.items():
        assert error(adapter, lib[name]) <= lib.error(name) + 1e-6
        assert "tolerance" not in size or lib.error(name) <= 0.1


def test_a_zero_adapter_among_flat_ones_is_zero():
    """Its loadings would make it something else, with an error of 0 stated."""
    sources = CASES["one adapter"]()
    lib = lf.fold(sources, form="flat", rank=1)
    assert lib["t1"].norm() == 0
    assert lib.verify(sources)["t1"] == 0
