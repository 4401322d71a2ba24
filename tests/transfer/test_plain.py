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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_any_dtype(method, dtype):
    u = update(dtype=dtype)
    moved = lf.transfer(u, shape=(40, 50), method=method).adapter
    assert close(moved, reference(method, u, (40, 50)), 1e-5)
    wide = torch.promote_types(dtype, torch.float32)
    assert moved.A.dtype == (dtype if method == "truncate" else wide)


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_update_stays_one(method):
    u = lf.LowRank(torch.zeros(3, 6), torch.randn(5, 3))
    for shape in SHAPES:
        moved = lf.transfer(u, shape=shape, method=method)
        assert dense(moved.adapter).norm() == 0
        report = moved.report
        assert report.norm_ratio is None
        assert report.rank_ratio is None
        assert report.error in (None, 0.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1e-18, 1e18])
def test_tiny_and_huge_updates(method, size):
    u = update()
    u = lf.LowRank(u.A * size**0.5, u.B * size**0.5, 1.0)
    moved = lf.transfer(u, shape=(48, 40), method=method)
    assert close(moved.adapter, reference(method, u, (48, 40)))
    assert 0 < moved.report.norm_ratio < 2


@pytest.mark.parametrize("method", METHODS)
def test_the_gauge_means_nothing(method):
    u = update(dtype=torch.float64)
    G = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    v = lf.LowRank(torch.linalg.solve(G, u.A), u.B @ G, u.scale)
    moved = [lf.transfer(x, shape=(20, 90), method=method).adapter for x in (u, v)]
    assert close(moved[0], dense(moved[1]), 1e-12)


def test_a_random_gauge_would_matter_to_other_resizings():
    """The control: interpolating along the ranks too is no statement on the update."""
    u = update(dtype=torch.float64)
    G = torch.diag(torch.linspace(1, 3, 6, dtype=torch.float64))
    v = lf.LowRank(torch.linalg.solve(G, u.A), u.B @ G, u.scale)
    less = [x.scale * x.B @ lines(6, 3).T @ lines(6, 3) @ x.A for x in (u, v)]
    assert (less[0] - less[1]).norm() > 0.1 * less[0].norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_truncate_is_bit_for_bit_in_the_overlap(shape):
    u = update(rank=2, dtype=torch.bfloat16)
    moved = lf.transfer(u, shape=shape, method="truncate", rank=2).adapter
    m, n = min(32, shape[0]), min(64, shape[1])
    assert moved.scale == u.scale
    assert torch.equal(moved.A[:, :n], u.A[:, :n])
    assert torch.equal(moved.B[:m], u.B[:m])
    assert not moved.A[:, n:].any()
    assert not moved.B[m:].any()


def test_svd_is_balanced():
    moved = lf.transfer(update(), shape=(48, 40)).adapter
    S = moved.spectrum()
    for gram in (moved.A @ moved.A.T, moved.B.T @ moved.B):
        assert torch.allclose(gram, torch.diag(S), atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_above_the_new_sides_is_kept_only_where_asked_for(method):
    u = update(rank=16)
    less, same, most = (
        lf.transfer(u, shape=(8, 64), method=method, rank=rank).adapter for rank in (None, 16, 99)
    )
    assert (less.rank, same.rank, most.rank) == (8, 16, 16)
    for moved in (less, same, most):
        assert close(moved, reference(method, u, (8, 64)))


@pytest.mark.parametrize("method", METHODS)
def test_a_cut_is_the_best_of_its_rank(method):
    u = update()
    W = reference(method, u, (20, 90))
    S = torch.linalg.svdvals(W)
    moved = lf.transfer(u, shape=(20, 90), method=method, rank=2).adapter
    assert moved.rank == 2
    assert (dense(moved) - W).norm() <= S[2:].norm() * (1 + 1e-5)
    share = S.square().cumsum(0) / S.square().sum()
    moved = lf.transfer(u, shape=(20, 90), method=method, energy=0.7).adapter
    assert moved.rank == int((share < 0.7).sum()) + 1


@pytest.mark.parametrize("method", METHODS)
def test_the_scale_rule_is_off_unless_asked_for(method):
    u = update()
    plain = lf.transfer(u, shape=(48, 96), method=method).adapter
    ruled = lf.transfer(u, shape=(48, 96), method=method, rescale=True).adapter
    factor = ((32 * 64) ** 0.5 / (48 * 96) ** 0.5) ** 0.5
    assert close(ruled, factor * dense(plain))


def test_without_a_method_a_shape_means_svd():
    moved = lf.transfer(update(), shape=(48, 96))
    assert moved.report.method == "svd"
    assert isinstance(moved.adapter, lf.LowRank)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_given_is_changed(method):
    u = update()
    A, B, state = u.A.clone(), u.B.clone(), torch.get_rng_state()
    lf.transfer(u, shape=(48, 40), method=method)
    assert torch.equal(A, u.A)
    assert torch.equal(B, u.B)
    assert torch.equal(state, torch.get_rng_state())


# Layers that are no plain linear ones


def test_a_convolution_is_resized_by_channels():
    layout = lf.Layout("conv", kernel=(4, 3, 3))
    a = lf.Adapter({"conv": update(8, 36)}, layouts={"conv": layout})
    for method in METHODS:
        moved = lf.transfer(a, shape={"conv": (10, 54)}, method=method).adapter
        assert moved.layout("conv").kernel == (6, 3, 3)
        W, new = dense(a["conv"]).reshape(8, 4, 9), dense(moved["conv"]).reshape(10, 6, 9)
        for tap in range(9):
            one = lf.LowRank(torch.eye(4), W[:, :, tap].float())
            assert (new[:, :, tap] - reference(method, one, (10, 6))).norm() < 1e-4
    with pytest.raises(lf.MismatchError, match="9 numbers an input channel: 40 columns"):
        lf.transfer(a, shape={"conv": (8, 40)})


def test_tokens_are_not_interpolated():
    a = lf.Adapter({"wte": update(8, 36)}, layouts={"wte": lf.Layout("embedding")})
    with pytest.raises(lf.RefusedError, match="'wte' is an embedding"):
        lf.transfer(a, shape={"wte": (8, 40)}, method="interpolate")
    moved = lf.transfer(a, shape={"wte": (12, 36)}, method="interpolate").adapter
    assert moved.layout("wte").kind == "embedding"
    assert close(moved["wte"], reference("interpolate", a["wte"], (12, 36)))
