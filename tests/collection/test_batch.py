"""Decompositions of many updates at once, whatever their numbers' size."""

import numpy as np
import pytest
import torch

from lorafold.collection.batch import Factors, decompose, side_by_side
from lorafold.errors import MismatchError


def factors():
    torch.manual_seed(0)
    B, A = torch.randn(3, 8, 2), torch.randn(3, 2, 6)
    B[1] = 0  # a zero update among them
    return B, A


@pytest.mark.parametrize("powers", [(0, 0), (100, 20), (-120, -3), (126, -100), (-60, 126)])
def test_sizes_only_scale_the_singular_values(powers):
    B, A = factors()
    b, a = (2.0**p for p in powers)
    U, S, V = decompose(B * b, A * a)
    dense = B.double() @ A.double()
    assert torch.allclose((U.double() * (S / b / a)[:, None, :]) @ V.double().mT, dense, atol=1e-5)
    assert torch.equal(S[1], torch.zeros(2, dtype=torch.float64))
    assert torch.allclose(S, torch.linalg.svdvals(dense)[:, :2] * b * a, rtol=1e-5)


def test_rows_of_one_batch_may_be_of_any_sizes():
    B, A = factors()
    sizes = torch.tensor([2.0**120, 1.0, 2.0**-120])[:, None, None]
    S = decompose(B * sizes, A)[1]
    assert torch.allclose(S, decompose(B, A)[1] * sizes[:, 0].double(), rtol=1e-6)


def test_what_float64_cannot_hold_is_told():
    B, A = (t.double() * 1e300 for t in factors())
    with pytest.raises(MismatchError, match="too large"):
        decompose(B, A)


def dense(f):
    return f.B.double() @ f.A.double()


def quick(B, A):
    block, good = Factors(np.arange(len(B)), B, A).quickly_decomposed()
    back = (block.U.double() * block.S[:, None, :]) @ block.V.double().mT
    return block, good, back


@pytest.mark.parametrize("spread", [1.0, 1e-3])
@pytest.mark.parametrize("lengths", ["one", "falling"])
def test_directions_from_quick_grams_are_the_updates(spread, lengths):
    g = torch.Generator().manual_seed(0)
    B, A = torch.randn(5, 96, 8, generator=g), torch.randn(5, 8, 160, generator=g)
    falling = torch.logspace(0, np.log10(spread), 8)
    B = B * falling
    if lengths == "falling":  # as in the balanced gauge
        A = A * falling[:, None]
    block, good, back = quick(B, A)
    assert good.all()
    W = B.double() @ A.double()
    size = W.norm(dim=(1, 2))
    assert ((back - W).norm(dim=(1, 2)) < 1e-6 * size).all()
    S = torch.linalg.svdvals(W)[:, :8]
    assert ((block.S - S).abs() < 2e-6 * S[:, :1] + 1e-7 * S[:, :1] ** 2 / S).all()
    for X in (block.U, block.V):  # the strong ones are orthonormal
        strong = X[:, :, :3].double()
        assert ((strong.mT @ strong - torch.eye(3)).abs() < 1e-3).all()


def test_what_quick_grams_do_not_hold_is_told():
    g = torch.Generator().manual_seed(1)
    B, A = torch.randn(4, 96, 4, generator=g), torch.randn(4, 4, 160, generator=g)
    A[1, 3] = A[1, 2] + 1e-3 * A[1, 3]  # two rows nearly the same
    B[2, :, 1], A[2, 1] = -B[2, :, 0] + 1e-3 * B[2, :, 1], A[2, 0]  # factors nearly cancel
    A[3, 3] = 0  # a row of nothing, as padding leaves it
    good = quick(B, A)[1]
    assert good.tolist() == [True, False, False, False]
    assert not quick(B * 1e25, A)[1].any()


def test_blocks_side_by_side_are_their_rows():
    g = torch.Generator().manual_seed(2)
    several = [
        Factors(np.arange(n), torch.randn(n, 9, 2, generator=g), torch.randn(n, 2, 7, generator=g))
        for n in (3, 1)
    ]
    joined = side_by_side(several)
    assert joined.members.tolist() == [0, 1, 2, 0]
    assert torch.equal(dense(joined), torch.cat([dense(f) for f in several]))
