"""Coded bases, and updates in their coordinates, against dense algebra."""

import numpy as np
import pytest
import torch

from lorafold.collection.batch import Block, decompose
from lorafold.fold.coding import bases as module
from lorafold.fold.coding.bases import bases_of, basis_of, projected, read_basis, residual
from lorafold.fold.coding.bits import bits_for_error


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


def directions_of(kin, dense, side):
    """All left (or right) directions of the unfolded stack and their energies, densely."""
    W = torch.cat([dense(u) if side == "U" else dense(u).T for u in kin], 1)
    U, S, _ = torch.linalg.svd(W, full_matrices=False)
    return U.float(), (S**2 / (S**2).sum()).numpy()


@pytest.mark.parametrize("bits", [1, 3, 8, 16, 32])
def test_coordinates_on_a_coded_basis_are_least_squares(kin, dense, bits):
    basis = basis_of(directions_of(kin, dense, "V")[0][:, :10], np.full(10, bits), "V")
    again = read_basis(basis.record, 28, "V")
    assert torch.equal(again.columns, basis.columns)
    assert (basis.rank, basis.fresh) == (10, 10)
    X = torch.stack([u.A.T for u in kin])
    expected = torch.linalg.lstsq(basis.columns.double().expand(7, -1, -1), X.double()).solution
    torch.testing.assert_close(basis.coordinates(X).double(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(basis.columns.norm(dim=0), torch.ones(10), atol=2e-3, rtol=0)


@pytest.mark.parametrize("together", [1, 1 << 22])
def test_bases_coded_together_are_those_coded_apart(together, monkeypatch):
    monkeypatch.setattr(module, "_TOGETHER", together)
    g = torch.Generator().manual_seed(0)
    directions, levels = {}, {}
    for group, bits in {3: [8, 4, 0], 0: [2], 7: [32, 16, 5, 5], 5: [0, 1]}.items():
        directions[group] = torch.linalg.qr(torch.randn(28, len(bits), generator=g))[0]
        levels[group] = np.array(bits)
    found = bases_of(directions, levels, "V")
    assert list(found) == list(directions)
    for group, basis in found.items():
        alone = basis_of(directions[group], levels[group], "V")
        assert basis.record == alone.record
        assert torch.equal(basis.columns, alone.columns)
        assert torch.equal(basis.columns, read_basis(basis.record, 28, "V").columns)
    assert bases_of({}, {}, "V") == {}


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
    left, right = projected(block.factors(), U, V)
    rest_B, rest_A = residual(block.factors(), left, right, U, V)
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


def test_a_budget_decides_how_many_directions_and_bits(kin, dense):
    directions, energies = directions_of(kin, dense, "U")
    sizes = []
    for budget in (0.3, 0.05, 1e-3):
        levels = bits_for_error(energies, 5.0, False, budget)
        basis = basis_of(directions, levels, "U")
        U = torch.linalg.qr(basis.columns.double())[0]
        Y = torch.cat([dense(u) for u in kin], 1)
        lost = float((Y - U @ (U.T @ Y)).square().sum() / Y.square().sum())
        assert lost <= budget * 1.1
        sizes.append(len(basis.record))
    assert sizes == sorted(sizes)
