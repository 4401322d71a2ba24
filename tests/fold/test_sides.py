"""Shared sides against dense eigenvectors and the dense Tucker error."""

import numpy as np
import pytest
import torch

from lorafold.fold import sides
from lorafold.fold.allocate import bits_for_error
from lorafold.fold.sides import (
    alternate,
    basis_of,
    core_svd,
    leading_directions,
    projected,
    read_basis,
    residual,
    side_columns,
)
from lorafold.fold.stack import Block, decompose

D, K = 60, 5


def spectrum_columns(count, values, seed=0, d=D):
    """(d, count) float32 with these singular values."""
    g = torch.Generator().manual_seed(seed)
    k = len(values)
    U = torch.linalg.qr(torch.randn(d, k, generator=g, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(count, k, generator=g, dtype=torch.float64))[0]
    return (U * torch.tensor(values, dtype=torch.float64) @ V.T).float()


def same_spaces(found, expected, atol):
    """Whether two orthonormal bases span one space, whatever their signs and order."""
    overlap = torch.linalg.svdvals(found.double().T @ expected.double())
    return bool((overlap - 1).abs().max() < atol)


VALUES = [8.0, 4.0, 2.0, 1.0, 0.5, 0.01, 0.01]


# 30 columns are fewer than 60 coordinates, 200 are more: the Gram of either side.
@pytest.mark.parametrize("count", [30, 200])
def test_leading_directions_are_the_dense_ones(count):
    Y = spectrum_columns(count, VALUES)
    found = leading_directions(lambda: iter(Y.split(16, 1)), D, count, K)
    U, S, _ = torch.linalg.svd(Y.double(), full_matrices=False)
    assert found.directions.shape == (D, K)
    for k in range(K):
        assert same_spaces(found.directions[:, : k + 1], U[:, : k + 1], 1e-4)
    shares = (S**2 / (S**2).sum()).numpy()
    np.testing.assert_allclose(found.energies, shares[:K], rtol=1e-4)
    assert abs(found.tail(3) - shares[3:].sum()) < 1e-6
    assert abs(found.tail(0) - 1) < 1e-12


@pytest.mark.parametrize("count", [50, 200])
def test_the_sketch_agrees_with_the_exact_path(monkeypatch, count):
    Y = spectrum_columns(count, VALUES)
    exact = leading_directions(lambda: iter(Y.split(16, 1)), D, count, K)
    monkeypatch.setattr(sides, "_EXACT", 8)
    sketched = leading_directions(lambda: iter(Y.split(16, 1)), D, count, K)
    np.testing.assert_allclose(sketched.energies, exact.energies, rtol=1e-3)
    for k in range(K):
        assert same_spaces(sketched.directions[:, : k + 1], exact.directions[:, : k + 1], 1e-3)
    eye = torch.eye(K)
    torch.testing.assert_close(sketched.directions.T @ sketched.directions, eye, atol=1e-4, rtol=0)


def test_the_sketch_never_claims_more_than_there_is(monkeypatch):
    g = torch.Generator().manual_seed(1)
    Y = torch.randn(300, 400, generator=g)  # a flat spectrum, the worst case for a sketch
    monkeypatch.setattr(sides, "_EXACT", 8)
    found = leading_directions(lambda: iter([Y]), 300, 400, 20)
    captured = (found.directions.double().T @ Y.double()).square().sum() / Y.double().square().sum()
    assert abs(found.energies.sum() - captured) < 0.02 * captured
    best = torch.linalg.svdvals(Y.double())[:20].square().sum() / Y.double().square().sum()
    assert found.energies.sum() <= best * (1 + 1e-6)


def test_nothing_gives_no_directions():
    found = leading_directions(lambda: iter([torch.zeros(D, 4)]), D, 4, K)
    assert found.directions.shape[1] == len(found.energies) == 0


def block_of(updates):
    B = torch.stack([u.B * u.scale for u in updates])
    A = torch.stack([u.A for u in updates])
    return Block(np.arange(len(updates)), *decompose(B, A))


@pytest.fixture
def kin(make_update):
    """Updates with common directions on both sides and their own noise, of very unequal norms."""
    g = torch.Generator().manual_seed(5)
    U, V = torch.randn(40, 6, generator=g), torch.randn(6, 28, generator=g)
    updates = []
    for i in range(7):
        u = make_update(40, 28, 3, seed=i)
        B = U @ torch.randn(6, 3, generator=g) + 0.4 * u.B
        A = torch.randn(3, 6, generator=g) @ V / 5 + 0.4 * u.A
        updates.append(type(u)(A, B, 10.0 ** (i % 3)))
    return updates


def dense_error(W, U, V):
    """Σ w ‖ΔW − UUᵀ ΔW VVᵀ‖² over normalised updates, as a share."""
    U, V = U.double(), V.double()
    kept = U @ (U.T @ W @ V) @ V.T
    return float((W - kept).square().sum() / W.square().sum())


@pytest.mark.parametrize(("ru", "rv"), [(2, 2), (4, 3), (6, 6), (1, 8), (21, 21)])
def test_hooi_is_certified_and_never_worse_than_hosvd(kin, dense, ru, rv):
    block = block_of(kin)
    W = torch.stack([dense(u) / dense(u).norm() for u in kin])
    weights = np.array([1 / float(dense(u).norm()) ** 2 for u in kin])
    count = sum(u.rank for u in kin)
    start = {}
    for side, d in (("U", 40), ("V", 28)):
        start[side] = leading_directions(
            lambda side=side: side_columns([block], weights, side), d, count, d
        )
    U0, V0 = start["U"].directions[:, :ru], start["V"].directions[:, :rv]
    U, V, kept = alternate(lambda: iter([block]), weights, U0, V0, count)
    achieved = dense_error(W, U, V)
    tail_out, tail_in = start["U"].tail(ru), start["V"].tail(rv)
    # The tails are those of the dense unfoldings.
    unfolded_out = torch.linalg.svdvals(W.permute(1, 0, 2).reshape(40, -1)) ** 2 / len(kin)
    unfolded_in = torch.linalg.svdvals(W.permute(2, 0, 1).reshape(28, -1)) ** 2 / len(kin)
    assert abs(tail_out - float(unfolded_out[ru:].sum())) < 1e-5
    assert abs(tail_in - float(unfolded_in[rv:].sum())) < 1e-5
    assert abs(achieved - (1 - kept)) < 1e-5
    assert max(tail_out, tail_in) - 1e-6 <= achieved <= tail_out + tail_in + 1e-6
    assert achieved <= dense_error(W, U0, V0) + 1e-6


def test_hooi_improves_on_its_start_where_there_is_something_to_gain(kin, dense):
    block = block_of(kin)
    W = torch.stack([dense(u) / dense(u).norm() for u in kin])
    weights = np.array([1 / float(dense(u).norm()) ** 2 for u in kin])
    g = torch.Generator().manual_seed(0)
    U0 = torch.linalg.qr(torch.randn(40, 3, generator=g))[0]
    V0 = torch.linalg.qr(torch.randn(28, 3, generator=g))[0]
    U, V, _ = alternate(lambda: iter([block]), weights, U0, V0, 21)
    assert dense_error(W, U, V) < 0.8 * dense_error(W, U0, V0)


@pytest.mark.parametrize("bits", [1, 3, 8, 16, 32])
def test_coordinates_on_a_coded_basis_are_least_squares(kin, dense, bits):
    block = block_of(kin)
    found = leading_directions(lambda: side_columns([block], np.ones(7), "V"), 28, 21, 10)
    basis = basis_of(found.directions, np.full(10, bits), "V")
    again = read_basis(basis.record, 28, "V")
    assert torch.equal(again.columns, basis.columns)
    assert (basis.rank, basis.fresh) == (10, 10)
    X = torch.stack([u.A.T for u in kin])
    expected = torch.linalg.lstsq(basis.columns.double().expand(7, -1, -1), X.double()).solution
    torch.testing.assert_close(basis.coordinates(X).double(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(basis.columns.norm(dim=0), torch.ones(10), atol=2e-3, rtol=0)


@pytest.mark.parametrize("which", ["U", "V", "both"])
def test_core_plus_residual_is_the_update(kin, dense, which):
    block = block_of(kin)
    bases = {}
    for side, d in (("U", 40), ("V", 28)):
        directions = torch.linalg.qr(torch.randn(d, 4, generator=torch.Generator().manual_seed(d)))[
            0
        ]
        bases[side] = basis_of(directions, np.full(4, 3), side)
    U = bases["U"] if which != "V" else None
    V = bases["V"] if which != "U" else None
    left, right = projected(block, U, V)
    rest_B, rest_A = residual(block, left, right, U, V)
    W = torch.stack([dense(u) for u in kin])
    core = left.double() @ right.double()
    if U is not None:
        core = U.columns.double() @ core
    if V is not None:
        core = core @ V.columns.double().T
    rest = rest_B.double() @ rest_A.double()
    norm = torch.linalg.matrix_norm(W)
    assert (torch.linalg.matrix_norm(core + rest - W) / norm).max() < 1e-5
    # Least squares: what is left has no part in the sides.
    inside = rest
    if U is not None:
        inside = U.columns.double().T @ inside
    if V is not None:
        inside = inside @ V.columns.double()
    assert (torch.linalg.matrix_norm(inside) / norm).max() < 1e-4
    P, S, Q = core_svd(left, right)
    back = P.double() * S[:, None] @ Q.double().mT
    assert (torch.linalg.matrix_norm(back - left.double() @ right.double()) / norm).max() < 1e-5


def test_a_budget_decides_how_many_directions_and_bits(kin):
    block = block_of(kin)
    found = leading_directions(lambda: side_columns([block], np.ones(7), "U"), 40, 21, 40)
    sizes = []
    for budget in (0.3, 0.05, 1e-3):
        left = budget - found.tail(len(found.energies))
        levels = bits_for_error(found.energies, 5.0, False, left)
        basis = basis_of(found.directions, levels, "U")
        U = torch.linalg.qr(basis.columns.double())[0]
        Y = torch.cat(list(side_columns([block], np.ones(7), "U")), 1).double()
        lost = float((Y - U @ (U.T @ Y)).square().sum() / Y.square().sum())
        assert lost <= budget * 1.1
        sizes.append(len(basis.record))
    assert sizes == sorted(sizes)
