"""Decompositions of many updates at once, whatever their numbers' size."""

import pytest
import torch

from lorafold.collection.batch import decompose
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
