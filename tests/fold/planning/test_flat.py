"""Flattened factors against a dense principal component analysis in float64."""

import numpy as np
import pytest
import torch

from lorafold.collection.batch import Factors
from lorafold.collection.stack import Stack
from lorafold.fold.coding import flat_part
from lorafold.fold.planning import flat
from lorafold.lowrank import LowRank

N, OUT, INN, R = 8, 20, 12, 3


@pytest.fixture
def updates():
    """Updates in one gauge: a common start plus two directions and a little noise."""
    g = torch.Generator().manual_seed(0)
    A0, B0 = torch.randn(R, INN, generator=g), torch.randn(OUT, R, generator=g)
    dA = torch.randn(2, R, INN, generator=g)
    dB = torch.randn(2, OUT, R, generator=g)
    found = []
    for _ in range(N):
        w = torch.randn(2, generator=g)
        A = A0 + torch.einsum("k,kri->ri", w, dA) + 0.05 * torch.randn(R, INN, generator=g)
        B = B0 + torch.einsum("k,kor->or", w, dB) + 0.05 * torch.randn(OUT, R, generator=g)
        found.append(LowRank(A, B, 0.5))
    return found


def stack_of(updates, block_bytes=1 << 20):
    def read(i):
        return updates[i]

    ranks = np.full(len(updates), R)
    return Stack("m", (OUT, INN), np.arange(len(updates)), ranks, read, block_bytes)


def flattened(updates, side):
    rows = [u.A if side == "A" else u.scale * u.B for u in updates]
    return torch.stack([t.double().reshape(-1) for t in rows])


def factors(updates):
    return next(iter(stack_of(updates).factors()))


def coded(updates, side, count, bits):
    s = flat.flat_spectra(stack_of(updates))[side]
    return flat.coded_side(s, side, flat.levels_at(s, count, bits))


def ways(spectra, updates, budgets):
    return flat.ways_within(spectra, np.array([u.norm() ** 2 for u in updates]), R, budgets)


@pytest.mark.parametrize("side", ["A", "B"])
def test_columns_in_pieces_give_the_gram_of_the_whole(updates, side, monkeypatch):
    monkeypatch.setattr(flat, "_PIECE", 1)  # pieces of 256 columns at least
    X = flattened(updates, side).float().repeat(1, 50)
    gram, mean, squares = flat._gram_by_columns([X[:3], X[3:]])
    X = X.double()
    centred = X - X.mean(0)
    torch.testing.assert_close(mean.double(), X.mean(0), atol=1e-5, rtol=0)
    assert (gram - centred @ centred.T).norm() < 1e-5 * (centred @ centred.T).norm()
    torch.testing.assert_close(squares, X.square().sum(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_the_spectrum_is_the_dense_pca(updates, side, block_bytes):
    X = flattened(updates, side)
    s = flat.flat_spectra(stack_of(updates, block_bytes))[side]
    centred = X - X.mean(0)
    _, S, Vh = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(s.mean.double(), X.mean(0), atol=1e-6, rtol=0)
    assert len(s.energies) == N - 1  # the mean takes one
    np.testing.assert_allclose(s.energies, (S**2)[: N - 1].numpy(), rtol=1e-3)  # float32 Gram
    directions = s.directions(np.arange(N - 1)).double()
    overlap = (directions @ Vh[: N - 1].T).diagonal().abs()
    assert (overlap - 1).abs().max() < 1e-3
    rebuilt = s.mean.double() + torch.as_tensor(s.loadings) @ directions
    assert (rebuilt - X).norm() < 1e-4 * X.norm()
    np.testing.assert_allclose(s.norms, X.square().sum(1), rtol=1e-5)
    assert len(flat.flat_spectra(stack_of(updates), 2)[side].energies) == 2


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("power", [-100, 0, 100])
def test_a_sketch_finds_what_the_whole_has(updates, side, power, monkeypatch):
    """The two directions in common are found, what it misses is stated, every row is read thrice,
    and no pair of them together.
    """
    sized = [LowRank(u.A * 2.0**power, u.B * 2.0**power, u.scale) for u in updates]
    whole = flat.flat_spectra(stack_of(sized, 1), 2)[side]
    monkeypatch.setattr(flat, "_GRAM", 0)
    monkeypatch.setattr(flat, "_MARGIN", 2)
    reads = np.zeros(N, int)

    def read(i):
        reads[i] += 1
        return sized[i]

    stack = Stack("m", (OUT, INN), np.arange(N), np.full(N, R), read, 1)
    s = flat.flat_spectra(stack, 2)[side]
    assert (s.loadings, len(s.energies), len(s.norms)) == (None, 2, N)
    assert set(reads) == {3 if power == 0 else 4}  # once more where squares are lost
    assert s.unit == whole.unit
    assert (s.unit == 1) == (power == 0)
    torch.testing.assert_close(s.mean, whole.mean, atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(s.energies, whole.energies, rtol=1e-2)
    directions = s.directions(np.arange(2))
    overlap = (directions @ whole.directions(np.arange(2)).T).square().sum() / 2
    assert overlap > 0.999
    X = flattened(sized, side) / s.unit - s.mean.double()
    lost = (X - X @ directions.double().T @ directions.double()).square().sum()
    assert abs(s.missed - float(lost) / s.total) < 1e-5
    # A budget that the sketch can't reach is left to residuals, and not given up.
    way = ways({"A": s, "B": s}, sized, [s.missed / 4])[0]
    assert all((levels > 0).all() for levels in way.levels.values())


def test_identical_adapters_are_their_mean(updates):
    same = [updates[0]] * 4
    A, B = (coded(same, side, None, 32) for side in "AB")
    assert A.count == B.count == 0
    parts = flat_part.code_parts(factors(same), A, B, 0, True)
    W = updates[0].scale * updates[0].B @ updates[0].A
    torch.testing.assert_close(parts.B[0] @ parts.A[0], W, atol=1e-5, rtol=1e-5)


def test_loadings_are_least_squares_on_what_was_coded(updates):
    for side in "AB":
        rough = coded(updates, side, 2, 3)
        X = flattened(updates, side)
        loads = rough.loadings(X.float()).double()
        basis, mean = rough.rows[1:].double(), rough.rows[0].double()
        expected = torch.linalg.lstsq(basis.T, (X - mean).T).solution.T
        torch.testing.assert_close(loads, expected, rtol=1e-3, atol=1e-3)
        rebuilt = rough.rebuilt(loads.float()).double()
        torch.testing.assert_close(rebuilt, mean + expected @ basis, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("count", [0, 2, 7])
def test_a_record_decodes_to_what_was_measured(updates, wide, count):
    bases = {side: coded(updates, side, count, 32 if wide else 6) for side in "AB"}
    parts = flat_part.code_parts(factors(updates), bases["A"], bases["B"], 5, wide)
    assert {len(r) for r in parts.records} == {flat_part.part_nbytes(bases["A"], bases["B"], wide)}

    def basis(side, number, rank):
        assert (number, rank) == (5, R)
        read = flat_part.read_side(bases[side].record, rank * (INN if side == "A" else OUT), side)
        assert torch.equal(read.rows, bases[side].rows)
        return read.rows

    for i, record in enumerate(parts.records):
        left, right, end = flat_part.decode_part(b"??" + record, 2, (OUT, INN), basis)
        assert end == len(record) + 2
        torch.testing.assert_close(left, parts.B[i], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(right, parts.A[i], atol=1e-5, rtol=1e-5)
    B, A = flat_part.read_parts(parts.records, factors(updates), bases["A"], bases["B"])
    torch.testing.assert_close(B, parts.B, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(A, parts.A, atol=1e-5, rtol=1e-5)


def test_a_budget_is_kept_as_expected(updates):
    spectra, budgets = flat.flat_spectra(stack_of(updates)), (0.1, 1e-3, 1e-5)
    whole = sum(u.norm() ** 2 for u in updates)
    sizes = []
    for budget, way in zip(budgets, ways(spectra, updates, budgets), strict=True):
        bases = flat.coded_sides(spectra, way.levels)
        parts = flat_part.code_parts(factors(updates), bases.A, bases.B, 0, False)
        pairs = zip(updates, parts.B, parts.A, strict=True)
        missed = np.array([float((u.dense() - B @ A).square().sum()) for u, B, A in pairs])
        assert missed.sum() < 1.3 * budget * whole + 1e-9
        assert 0.5 * way.missed.sum() < missed.sum() < 1.5 * way.missed.sum()
        sizes.append(len(bases.A.record) + len(bases.B.record))
    assert sizes == sorted(sizes)


def test_a_gauge_breaks_it(updates):
    """The negative control: the same ΔW in gauges of their own has no two common directions."""
    g = torch.Generator().manual_seed(1)
    turned = []
    for u in updates:
        G = torch.randn(R, R, generator=g) + 2 * torch.eye(R)
        turned.append(LowRank(torch.linalg.solve(G, u.A), u.B @ G, u.scale))
        torch.testing.assert_close(turned[-1].dense(), u.dense(), atol=1e-3, rtol=1e-3)
    share = {}
    for name, who in (("one gauge", updates), ("own gauges", turned)):
        e = flat.flat_spectra(stack_of(who))["A"].energies
        share[name] = e[:2].sum() / e.sum()
    assert share["one gauge"] > 0.99
    assert share["own gauges"] < 0.9


def test_factors_are_flattened_row_by_row():
    f = Factors(
        np.zeros(1, int), torch.arange(6.0).reshape(1, 3, 2), torch.arange(8.0).reshape(1, 2, 4)
    )
    assert flat_part.flattened(f, "A").tolist() == [list(range(8))]
    assert flat_part.flattened(f, "B").tolist() == [list(range(6))]


@pytest.mark.parametrize("bits", [4, 16, 32])
@pytest.mark.parametrize("power", [-100, -17, 17, 100])
def test_a_size_is_one_number_of_a_side(updates, bits, power):
    """Records are the same bit for bit, and a side is but for the one scale of its rows."""

    def sides_and_records(size):
        found = [LowRank(u.A * size, u.B / size, u.scale) for u in updates]
        sides = {side: coded(found, side, 3, bits) for side in "AB"}
        parts = flat_part.code_parts(factors(found), sides["A"], sides["B"], 0, bits > 8)
        return sides, parts.records

    (plain, records), (sized, others) = (sides_and_records(s) for s in (1.0, 2.0**power))
    assert others == records
    for side in "AB":
        here, there = plain[side].record, sized[side].record
        assert here[:3] + here[7:] == there[:3] + there[7:]  # f32 t after u16 and u8
