"""The plain resizings: against dense float64 algebra, at every edge."""

import pytest
import torch

import lorafold as lf

METHODS = ("truncate", "interpolate", "svd")
SHAPES = [(48, 96), (8, 64), (20, 80), (48, 40), (32, 64), (5, 3), (1, 1)]


def update(out=32, inner=64, rank=6, scale=0.5, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, inner, generator=g), torch.randn(out, rank, generator=g)
    return lf.LowRank(A.to(dtype), B.to(dtype), scale)


def dense(u):
    return u.scale * u.B.double() @ u.A.double()


def lines(old, new):
    """The (new, old) matrix of linear interpolation between channels at (i + ½)/n."""
    R = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        at = min(max((i + 0.5) * old / new - 0.5, 0.0), old - 1.0)
        low = min(int(at), old - 1)
        high = min(low + 1, old - 1)
        R[i, low] += 1 - (at - low)
        R[i, high] += at - low
    return R


def reference(method, u, shape):
    out, inner = shape
    W = dense(u)
    if method == "interpolate":
        return lines(W.shape[0], out) @ W @ lines(W.shape[1], inner).T
    new = torch.zeros(shape, dtype=torch.float64)
    m, n = min(out, W.shape[0]), min(inner, W.shape[1])
    new[:m, :n] = W[:m, :n]
    return new


def close(u, W, tolerance=1e-5):
    return (dense(u) - W).norm() <= tolerance * max(W.norm(), 1e-30)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 6, 40])
def test_it_is_what_dense_algebra_makes(method, shape, rank):
    u = update(rank=rank)
    moved = lf.transfer(u, shape=shape, method=method).adapter
    assert moved.shape == shape
    assert moved.rank == min(rank, *shape)
    assert close(moved, reference(method, u, shape))
