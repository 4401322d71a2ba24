"""Spans of a stack against dense eigenvectors and the dense Tucker error, sketched and not."""

import gc
import weakref

import numpy as np
import pytest
import torch

from lorafold.collection.stack import Stack
from lorafold.fold.coding.bases import basis_of
from lorafold.fold.options import Options
from lorafold.fold.planning import directions as spans
from lorafold.fold.planning.directions import Spans
from lorafold.fold.planning.sharing import Needs

OUT, INN = 60, 44
EVERYONE = [("U", 0), ("V", 0)]


def stack_of(updates, block_bytes=1 << 20):
    reads = []

    def read(i):
        reads.append(i)
        return updates[i]

    ranks = np.array([u.rank for u in updates])
    stack = Stack("m", updates[0].shape, np.arange(len(updates)), ranks, read, block_bytes)
    return stack, reads


def weights_of(updates, dense):
    return np.array([1 / float(dense(u).norm()) ** 2 if u.norm() else 0.0 for u in updates])


def unfolded(updates, weights, dense, side):
    """(d, ·) float64: Y with Y Yᵀ = Σ w ΔW ΔWᵀ, or Σ w ΔWᵀ ΔW."""
    parts = [float(w) ** 0.5 * dense(u) for u, w in zip(updates, weights, strict=True)]
    return torch.cat(parts, 1) if side == "U" else torch.cat([p.T for p in parts], 1)


class All:
    """Everything is wanted, and a sketch is never good enough."""

    most = None

    def settled(self, missed):
        return False

    def enough(self, energies, further):
        return False

    def needed(self, energies):
        return len(energies)


class Settled(All):
    def settled(self, missed):
        return True


class Most(All):
    def __init__(self, most):
        self.most = most


@pytest.fixture
def sketching(monkeypatch):
    """Sides as short as in a test are sketched, too."""
    monkeypatch.setattr(spans, "_WHOLE", 4)
    monkeypatch.setattr(spans, "_DIAGONALISED", 4)
    monkeypatch.setattr(spans, "_WIDTHS", (12, 20, 28))
    monkeypatch.setattr(spans, "_MARGIN", 5)


@pytest.fixture
def kin(make_update):
    """Updates with 6 common directions on both sides and their own noise, of unequal norms."""
    g = torch.Generator().manual_seed(5)
    U, V = torch.randn(OUT, 6, generator=g), torch.randn(6, INN, generator=g)
    updates = []
    for i in range(30):
        rank = 2 + i % 3
        u = make_update(OUT, INN, rank, seed=i)
        B = U @ torch.randn(6, rank, generator=g) + 0.3 * u.B
        A = torch.randn(rank, 6, generator=g) @ V / 5 + 0.3 * u.A
        updates.append(type(u)(A, B, 10.0 ** (i % 3)))
    return updates


def everyone(stack):
    return {key: np.zeros(len(stack), np.int64) for key in EVERYONE}


def check_orthonormal(X, atol=1e-4):
    torch.testing.assert_close(X.T @ X, torch.eye(X.shape[1]), atol=atol, rtol=0)


# 7 adapters have fewer columns than coordinates, 30 have more.
@pytest.mark.parametrize("count", [7, 30])
@pytest.mark.parametrize("block_bytes", [1, 4 * 104 * 4 * 5, 1 << 22])
def test_without_a_sketch_the_spectrum_is_the_dense_one(kin, dense, count, block_bytes):
    updates = kin[:count]
    stack, _ = stack_of(updates, block_bytes)
    weights = weights_of(updates, dense)
    found = Spans(stack, weights, everyone(stack), All())
    for (side, _), spectra in found.spectra.items():
        Y = unfolded(updates, weights, dense, side)
        U, S, _ = torch.linalg.svd(Y, full_matrices=False)
        shares = (S**2 / (S**2).sum()).numpy()
        spectrum = spectra[0]
        k = len(spectrum.energies)
        assert k == min(sum(u.rank for u in updates), *Y.shape[:1])
        np.testing.assert_allclose(spectrum.energies, shares[:k], atol=1e-6)
        check_orthonormal(spectrum.directions)
        overlap = torch.linalg.svdvals(spectrum.directions[:, :6].double().T @ U[:, :6])
        assert abs(overlap - 1).max() < 1e-4
        assert spectrum.seen == 1
        assert abs(spectrum.tail(4) - shares[4:].sum()) < 1e-6
        assert spectrum.least(4) == spectrum.tail(4)
        assert spectrum.tail(0) == 1


def test_a_sketch_bounds_the_tail_from_both_sides(kin, dense, sketching):
    stack, _ = stack_of(kin, 1)
    weights = weights_of(kin, dense)
    for wish in (Settled(), All(), Most(6)):
        found = Spans(stack, weights, everyone(stack), wish)
        for (side, _), spectra in found.spectra.items():
            Y = unfolded(kin, weights, dense, side)
            S2 = torch.linalg.svdvals(Y) ** 2
            shares = (S2 / S2.sum()).numpy()
            spectrum = spectra[0]
            check_orthonormal(spectrum.directions)
            assert (spectrum.energies <= shares[: len(spectrum.energies)] + 1e-7).all()
            for rank in range(1, 7):
                X = spectrum.directions[:, :rank].double()
                missed = float((Y - X @ (X.T @ Y)).square().sum() / Y.square().sum())
                assert abs(spectrum.tail(rank) - missed) < 1e-6  # what these do miss
                best = float(shares[rank:].sum())
                assert spectrum.least(rank) - 1e-7 <= best <= missed + 1e-7
                # The common directions stand out: any sketch finds them.
                assert rank < 6 or missed < best * 1.2
            assert spectrum.seen < 1
    # A first look, a wider one, and one of known width.
    widths = [
        len(Spans(stack, weights, everyone(stack), w).spectra["U", 0][0].energies)
        for w in (Settled(), All(), Most(6))
    ]
    assert widths == [12, 28, 6]


def test_a_sketch_that_never_is_enough_gives_way_to_the_whole(kin, dense, sketching, monkeypatch):
    monkeypatch.setattr(spans, "_DIAGONALISED", 100)
    stack, _ = stack_of(kin)
    found = Spans(stack, weights_of(kin, dense), everyone(stack), All())
    assert [len(found.spectra[key][0].energies) for key in EVERYONE] == [OUT, INN]
    assert all(found.spectra[key][0].seen == 1 for key in EVERYONE)


@pytest.mark.parametrize("values", [[5.0, 3.0, 2.0, 1.0, 0.5], [1.0] * 5])
def test_two_products_find_a_low_rank_stack_exactly(make_update, dense, sketching, values):
    g = torch.Generator().manual_seed(1)
    U = torch.linalg.qr(torch.randn(OUT, 5, generator=g))[0] * torch.tensor(values)
    V = torch.linalg.qr(torch.randn(INN, 5, generator=g))[0]
    u = make_update(4, 4, 3)
    updates = [
        type(u)(torch.randn(3, 5, generator=g) @ V.T, U @ torch.randn(5, 3, generator=g))
        for _ in range(20)
    ]
    stack, _ = stack_of(updates)
    found = Spans(stack, weights_of(updates, dense), everyone(stack), Settled())
    for key in EVERYONE:
        assert found.spectra[key][0].tail(5) < 1e-6
        assert found.spectra[key][0].tail(4) > 1e-3


def test_nothing_gives_no_directions(make_update):
    u = make_update(OUT, INN, 2)
    zero = type(u)(u.A, torch.zeros_like(u.B))
    for count in (1, 40):
        stack, _ = stack_of([zero] * count)
        found = Spans(stack, np.zeros(count), everyone(stack), All())
        assert all(found.spectra[key][0].directions.shape[1] == 0 for key in EVERYONE)


def test_groups_have_spans_of_their_own(kin, dense):
    groups = np.array([0, 1, -1] * 10)
    stack, _ = stack_of(kin, 4 * 104 * 4 * 5)
    weights = weights_of(kin, dense)
    found = Spans(stack, weights, {("V", 1): groups}, All()).spectra["V", 1]
    assert sorted(found) == [0, 1]
    for g, spectrum in found.items():
        rows = np.flatnonzero(groups == g)
        Y = unfolded([kin[i] for i in rows], weights[rows], dense, "V")
        S2 = torch.linalg.svdvals(Y) ** 2
        np.testing.assert_allclose(spectrum.energies[:6], (S2 / S2.sum())[:6], atol=1e-6)


def test_a_bad_gauge_finds_the_same_spans(kin, dense):
    g = torch.Generator().manual_seed(0)
    bad = []
    for u in kin:
        P, Q = (torch.linalg.qr(torch.randn(u.rank, u.rank, generator=g))[0] for _ in "PQ")
        G = (P * torch.logspace(0, 4, u.rank) @ Q).double()
        A = torch.linalg.solve(G, u.A.double())
        bad.append(type(u)(A.float(), (u.B.double() @ G).float(), u.scale))
    weights = weights_of(kin, dense)
    pair = [Spans(s, weights, everyone(s), All()) for s in (stack_of(kin)[0], stack_of(bad)[0])]
    for key in EVERYONE:
        good, other = (p.spectra[key][0] for p in pair)
        np.testing.assert_allclose(good.energies[:6], other.energies[:6], atol=1e-5)
        overlap = torch.linalg.svdvals(good.directions[:, :6].T @ other.directions[:, :6])
        assert abs(overlap - 1).max() < 1e-3


# Both sides


def tucker_error(updates, weights, dense, U, V):
    """Σ w ‖ΔW − UUᵀ ΔW VVᵀ‖² as a share."""
    U, V = U.double(), V.double()
    lost = total = 0.0
    for u, w in zip(updates, weights, strict=True):
        W = dense(u)
        lost += w * float((W - U @ (U.T @ W @ V) @ V.T).square().sum())
        total += w * float(W.square().sum())
    return lost / total


@pytest.mark.parametrize(("ru", "rv"), [(2, 2), (4, 3), (6, 6), (1, 8), (10, 10)])
@pytest.mark.parametrize("sketched", [False, True])
@pytest.mark.parametrize("block_bytes", [1, 1 << 22])
def test_hooi_is_certified_and_never_worse_than_hosvd(
    request, kin, dense, ru, rv, sketched, block_bytes
):
    if sketched:
        request.getfixturevalue("sketching")
    stack, _ = stack_of(kin, block_bytes)
    weights = weights_of(kin, dense)
    found = Spans(stack, weights, everyone(stack), Settled() if sketched else All())
    sU, sV = (found.spectra[key][0] for key in EVERYONE)
    U, V, kept = found.tucker(tuple(EVERYONE), (ru, rv))
    check_orthonormal(U)
    check_orthonormal(V)
    achieved = tucker_error(kin, weights, dense, U, V)
    assert abs(achieved - (1 - kept)) < 1e-5
    hosvd = tucker_error(kin, weights, dense, sU.directions[:, :ru], sV.directions[:, :rv])
    assert achieved <= hosvd + 1e-6
    assert hosvd <= sU.tail(ru) + sV.tail(rv) + 1e-6
    # What no pair of this rank can avoid: the dense tails, which `least` is below.
    best = []
    for side, rank, s in (("U", ru, sU), ("V", rv, sV)):
        S2 = torch.linalg.svdvals(unfolded(kin, weights, dense, side)) ** 2
        best.append(float(S2[rank:].sum() / S2.sum()))
        assert s.least(rank) <= best[-1] + 1e-6
    assert max(best) <= achieved + 1e-6


def test_hooi_finds_what_hosvd_does_not(make_update, dense):
    """Where no direction stands out, the sides have to be chosen for each other."""
    g = torch.Generator().manual_seed(0)
    u = make_update(4, 4, 3)
    updates = [
        type(u)(torch.randn(3, INN, generator=g), torch.randn(OUT, 3, generator=g))
        for _ in range(6)
    ]
    stack, _ = stack_of(updates)
    weights = weights_of(updates, dense)
    found = Spans(stack, weights, everyone(stack), All())
    U, V, _ = found.tucker(tuple(EVERYONE), (3, 3))
    start = [found.spectra[key][0].directions[:, :3] for key in EVERYONE]
    assert tucker_error(updates, weights, dense, U, V) < 0.99 * tucker_error(
        updates, weights, dense, *start
    )


@pytest.mark.parametrize("which", ["U", "V", "both"])
@pytest.mark.parametrize("sketched", [False, True])
def test_what_coded_bases_will_miss(request, kin, dense, which, sketched):
    if sketched:
        request.getfixturevalue("sketching")
    groups = {"U": np.array([0, 0, 1] * 10), "V": np.array([0, -1, 0] * 10)}
    stack, _ = stack_of(kin, 4 * 104 * 4 * 5)
    weights = weights_of(kin, dense)
    wanted = {(side, 3): g for side, g in groups.items()}
    found = Spans(stack, weights, wanted, Settled() if sketched else All())
    sides, projectors = {}, {}
    for side in "UV":
        if which in (side, "both"):
            bases = {
                g: basis_of(s.directions[:, :5], np.full(5, 4), side)
                for g, s in found.spectra[side, 3].items()
            }
            sides[side] = ((side, 3), bases)
            Q = {g: torch.linalg.qr(b.columns.double())[0] for g, b in bases.items()}
            projectors[side] = {g: q @ q.T for g, q in Q.items()}
    tails = found.missed(sides.get("U"), sides.get("V"))
    for k, u in enumerate(kin):
        W = held = dense(u)
        if "U" in projectors:
            held = projectors["U"][groups["U"][k]] @ held
        if "V" in projectors and groups["V"][k] >= 0:
            held = held @ projectors["V"][groups["V"][k]]
        lost = float((W - held).square().sum())
        assert abs(tails[k] - lost) < (0.15 if sketched else 1e-4) * lost + 1e-6 * weights[k] ** -1


def test_coordinates_are_kept_only_where_there_is_room(kin, dense):
    weights = weights_of(kin, dense)
    for block_bytes, kept in ((1 << 20, True), (64, False)):
        stack, reads = stack_of(kin, block_bytes)
        found = Spans(stack, weights, everyone(stack), All())
        before = len(reads)
        found.tucker(tuple(EVERYONE), (3, 3))
        assert (len(reads) == before) == kept


# How far to look


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_directions_that_would_get_no_bit_are_not_looked_for(share):
    needs = Needs(Options("shared", tolerance=0.1), {share})
    steep = 0.5 ** np.arange(1, 30)
    assert needs.settled(1e-5)
    assert not needs.settled(1e-3)
    assert needs.enough(steep, 1000)
    assert not needs.enough(steep[:4], 1000)
    assert 5 < needs.needed(steep) < 25
    # What is spread too thinly over too many for any budget: further ones can't change that.
    assert needs.enough(np.full(64, 1e-3), 400)
    assert not needs.enough(np.full(64, 1e-3), 1000)


def test_a_rank_or_an_energy_says_how_far():
    assert Needs(Options("shared", rank=7), {0.5}).most == 7
    needs = Needs(Options("shared", energy=0.9), {0.5})
    assert needs.enough(np.array([0.5, 0.4]), 100)
    assert not needs.enough(np.array([0.5, 0.3]), 100)
    assert needs.enough(np.array([0.5, 0.001]), 100)
    assert not needs.settled(1e-9)


def test_spans_are_freed_at_once(kin, dense):
    stack, _ = stack_of(kin)
    found = Spans(stack, weights_of(kin, dense), everyone(stack), All())
    held = [weakref.ref(X) for s in found._searches.values() for _, X in s.coordinates]
    assert held
    gc.disable()
    try:
        del found
        assert all(ref() is None for ref in held)
    finally:
        gc.enable()
