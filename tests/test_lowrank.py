"""`LowRank` against dense float64 algebra, on prescribed spectra, edges and laws."""

import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorafold.errors import MismatchError
from lorafold.lowrank import LowRank, from_svd, kept_directions

SHAPES = [(40, 30, 4), (1, 7, 1), (7, 1, 1), (5, 8, 5), (6, 4, 9), (30, 40, 1), (12, 12, 12)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
GEOMETRIC = [2.0**-i for i in range(8)]
seeds = st.integers(0, 10**6)
sizes = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 9))
scales = st.floats(0.05, 20) | st.floats(-20, -0.05)


def error(u, reference, dense):
    return float((dense(u) - reference).norm() / reference.norm())


def optimum(spectrum, k):
    """Eckart–Young: the relative error of the best rank-k approximation."""
    square = [s * s for s in spectrum]
    return math.sqrt(math.fsum(square[k:]) / math.fsum(square))


# Measures


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_measure_equals_the_dense_one(shape, dtype, make_update, dense):
    u = make_update(*shape, seed=1, scale=-1.7, dtype=dtype)
    v = make_update(*shape, seed=2, scale=0.3, dtype=dtype)
    D, E = dense(u), dense(v)
    near = 1e-12 if dtype == torch.float64 else 2e-6
    S = torch.linalg.svdvals(D)[: u.rank]
    assert u.norm() == pytest.approx(float(D.norm()), rel=near)
    assert abs(u.inner(v) - float((D * E).sum())) <= near * float(D.norm() * E.norm())
    assert torch.allclose(u.spectrum().double(), S, rtol=0, atol=near * float(S[0]))
    assert torch.allclose(u.dense().double(), D, rtol=0, atol=near * float(D.norm()))
    assert float((u - v).norm()) == pytest.approx(float((D - E).norm()), rel=near)
    assert u.shape == D.shape == shape[:2]
    assert (u.rank, u.num_parameters) == (shape[2], shape[2] * sum(shape[:2]))


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_is_one(shape, make_update, dense):
    u = make_update(*shape, seed=3, scale=-2.0)
    U, S, Vh = (t.double() for t in u.svd())
    k = min(u.rank, *u.shape)
    assert (U.shape, S.shape, Vh.shape) == ((shape[0], k), (k,), (k, shape[1]))
    assert float((U * S @ Vh - dense(u)).norm()) <= 1e-6 * u.norm()
    assert torch.allclose(U.T @ U, torch.eye(k, dtype=U.dtype), atol=1e-5)
    assert torch.allclose(Vh @ Vh.T, torch.eye(k, dtype=U.dtype), atol=1e-5)
    assert bool((S >= 0).all())
    assert bool((S.diff() <= 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_prescribed_spectrum_is_found(dtype, make_update):
    u = make_update(50, 40, 8, spectrum=GEOMETRIC, scale=0.25, dtype=dtype)
    near = 1e-12 if dtype == torch.float64 else 1e-6
    assert u.spectrum().tolist() == pytest.approx(GEOMETRIC, abs=near)
    assert u.svd()[1].tolist() == pytest.approx(GEOMETRIC, abs=near)
    assert u.norm() == pytest.approx(math.sqrt(sum(s * s for s in GEOMETRIC)), rel=near)


def test_results_are_float32_or_float64_where_a_factor_is():
    for a, b, expected in [
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float64, torch.float64),
    ]:
        u = LowRank(torch.ones(2, 3, dtype=a), torch.ones(4, 2, dtype=b))
        made = [*u.svd(), u.spectrum(), u.dense(), u.balanced().A, u.truncate(rank=1).B, (u + u).A]
        assert {t.dtype for t in made} == {expected}


@pytest.mark.parametrize("relative", [1e-2, 1e-5])
@pytest.mark.parametrize("scales", [(2.0, 2.0), (2.0, 0.3)])
def test_a_small_difference_is_measured_and_the_gram_formula_would_not(
    relative, scales, make_update, dense
):
    u = make_update(512, 384, 16, seed=4, scale=scales[0])
    noise = make_update(512, 384, 16, seed=5)
    A = (u.A.double() + relative * noise.A.double()).float()
    v = LowRank(A, u.B * (scales[0] / scales[1]), scales[1])
    true = float((dense(u) - dense(v)).norm())
    assert 0.5 * relative < true / u.norm() < 2 * relative
    assert (u - v).norm() == pytest.approx(true, rel=0.05)

    square = u.inner(u) + v.inner(v) - 2 * u.inner(v)
    gram = math.sqrt(max(square, 0.0))
    if relative == 1e-5:
        assert abs(gram - true) > 0.05 * true
    else:
        assert gram == pytest.approx(true, rel=0.05)


@given(seeds, sizes)
def test_nothing_depends_on_the_gauge(seed, size):
    g = torch.Generator().manual_seed(seed)
    out, inn, r = size
    A, B, A2, B2, G = (
        torch.randn(*s, generator=g, dtype=torch.float64)
        for s in [(r, inn), (out, r), (r, inn), (out, r), (r, r)]
    )
    G = G + 4 * r * torch.eye(r, dtype=torch.float64)
    u, v, w = LowRank(A, B, 0.7), LowRank(torch.linalg.solve(G, A), B @ G, 0.7), LowRank(A2, B2)
    size = u.norm() * w.norm() + 1e-12
    assert v.norm() == pytest.approx(u.norm(), rel=1e-9)
    assert abs(v.inner(w) - u.inner(w)) <= 1e-9 * size
    assert (v - w).norm() == pytest.approx((u - w).norm(), rel=1e-9)
    assert (v - u).norm() <= 1e-9 * u.norm()
    assert torch.allclose(v.spectrum(), u.spectrum(), atol=1e-9 * float(u.norm()))
    (U, _, Vh), (U2, _, Vh2) = u.svd(), v.svd()
    # Singular vectors are defined up to sign: u_i v_iᵀ is what must agree.
    assert torch.allclose(U[:, :1] @ Vh[:1], U2[:, :1] @ Vh2[:1], atol=1e-6)
    x = torch.randn(3, inn, generator=g, dtype=torch.float64)
    assert torch.allclose(u(x), v(x), atol=1e-9 * float(u.norm()) * float(x.norm()))


def test_comparing_raw_factors_does_depend_on_the_gauge(make_update):
    u = make_update(20, 16, 4, dtype=torch.float64)
    v = LowRank(-u.A, -u.B, u.scale)
    assert (u - v).norm() <= 1e-12 * u.norm()
    assert float((u.A * v.A).sum() + (u.B * v.B).sum()) < 0


# Truncation


@pytest.mark.parametrize("k", [1, 2, 5, 8, 20])
def test_truncation_to_a_rank_is_the_eckart_young_optimum(k, make_update, dense):
    u = make_update(50, 40, 8, spectrum=GEOMETRIC, scale=0.25)
    v = u.truncate(rank=k)
    assert v.rank == min(k, 8)
    assert error(v, dense(u), dense) == pytest.approx(optimum(GEOMETRIC, k), abs=1e-6)


@given(seeds, sizes, st.floats(0, 0.999))
def test_a_tolerance_is_met_with_the_fewest_directions(make_update, dense, seed, size, tolerance):
    u = make_update(*size, seed=seed, scale=1.5)
    D = dense(u)
    v = u.truncate(tolerance=tolerance)
    assert error(v, D, dense) <= tolerance + 1e-6
    if v.rank > 1:
        S = torch.linalg.svdvals(D).tolist()
        assert optimum(S, v.rank - 1) > tolerance - 1e-6


@given(seeds, sizes, st.floats(0.001, 1))
def test_an_energy_is_kept_with_the_fewest_directions(make_update, dense, seed, size, energy):
    u = make_update(*size, seed=seed, scale=-0.5)
    v = u.truncate(energy=energy)
    assert v.norm() ** 2 >= (energy - 1e-6) * u.norm() ** 2
    if v.rank > 1:
        assert v.prefix(v.rank - 1).norm() ** 2 < (energy + 1e-6) * u.norm() ** 2


def test_the_edge_of_a_tolerance_counts_as_met():
    S = torch.tensor([4.0, 3.0])
    assert kept_directions(S, tolerance=0.6) == 1
    assert kept_directions(S, tolerance=0.5999) == 2
    assert kept_directions(S, energy=0.64) == 1
    assert kept_directions(S, energy=0.6401) == 2
    assert kept_directions(S, tolerance=0) == kept_directions(S, energy=1) == 2
    assert kept_directions(S, rank=5) == 2


def test_small_tails_are_summed_from_the_small_end():
    # Summed from the large end, 1 + 1e-20 would be 1 and the tail would vanish.
    S = torch.tensor([1.0, *[1e-10] * 100], dtype=torch.float64)
    assert kept_directions(S, tolerance=0.9e-9) == 21


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of rank, energy, tolerance; found none"),
        ({"rank": 1, "energy": 0.5}, "found rank and energy"),
        ({"rank": 0}, "at least 1, found 0"),
        ({"rank": 2.5}, "whole number"),
        ({"rank": True}, "whole number"),
        ({"rank": math.nan}, "whole number"),
        ({"rank": "2"}, "whole number"),
        ({"energy": 0}, "energy must lie in"),
        ({"energy": 1.01}, "energy must lie in"),
        ({"tolerance": 1}, "tolerance must lie in"),
        ({"tolerance": -0.1}, "tolerance must lie in"),
        ({"tolerance": math.nan}, "tolerance must lie in"),
    ],
)
def test_wrong_options_are_refused(options, message, make_update):
    with pytest.raises(MismatchError, match=message):
        make_update(4, 4, 2).truncate(**options)


@pytest.mark.parametrize("shape", SHAPES)
def test_balanced_is_the_same_update_in_the_even_gauge(shape, make_update, dense):
    u = make_update(*shape, seed=6, scale=-3.0)
    v = u.balanced()
    S = torch.diag(u.spectrum())
    near = 1e-5 * float(S.max())
    assert (v.scale, v.rank) == (1.0, min(shape))
    assert error(v, dense(u), dense) <= 1e-6
    assert torch.allclose(v.A @ v.A.T, S, atol=near)
    assert torch.allclose(v.B.T @ v.B, S, atol=near)


def test_every_prefix_of_a_balanced_update_is_the_best_one(make_update, dense):
    u = make_update(50, 40, 8, spectrum=GEOMETRIC, scale=0.25)
    for k in range(1, 9):
        best = optimum(GEOMETRIC, k)
        assert error(u.balanced().prefix(k), dense(u), dense) == pytest.approx(best, abs=1e-6)
        if k < 8:
            assert error(u.prefix(k), dense(u), dense) > best + 0.01


def test_a_prefix_keeps_the_scale_and_its_bounds(make_update):
    u = make_update(6, 5, 3, scale=4.0)
    assert u.prefix(2).scale == 4.0
    assert torch.equal(u.prefix(2).A, u.A[:2])
    for k in (0, 4, -1):
        with pytest.raises(MismatchError, match=r"1 … 3"):
            u.prefix(k)


# The vector space


@given(seeds, sizes, scales, scales)
def test_adding_and_taking_away_is_nothing(make_update, seed, size, p, q):
    a = make_update(*size, seed=seed, scale=p)
    b = make_update(size[0], size[1], 1 + seed % 4, seed=seed + 1, scale=q)
    scale = a.norm() + b.norm()
    assert ((a + b) - b - a).norm() <= 1e-6 * scale
    assert ((a - b) + (b - a)).norm() <= 1e-6 * scale
    assert (a + (-a)).norm() <= 1e-6 * a.norm()
    assert (2 * a - a - a).norm() <= 1e-6 * a.norm()


@given(seeds, sizes, scales, scales)
def test_measures_are_linear_and_bounded(make_update, dense, seed, size, p, q):
    a, b, c = (make_update(*size, seed=seed + i, scale=s) for i, s in enumerate((1.0, p, q)))
    near = 2e-6 * c.norm() * (abs(p) * a.norm() + abs(q) * b.norm())
    assert abs((p * a + q * b).inner(c) - (p * a.inner(c) + q * b.inner(c))) <= near
    assert abs(a.inner(b) - b.inner(a)) <= near
    assert a.inner(a) == pytest.approx(a.norm() ** 2, rel=1e-5)
    assert abs(a.inner(b)) <= a.norm() * b.norm() * (1 + 1e-6)  # Cauchy–Schwarz
    assert (a + b).norm() <= (a.norm() + b.norm()) * (1 + 1e-6)
    x = torch.randn(2, size[1], generator=torch.Generator().manual_seed(seed))
    near = 1e-5 * float(x.norm()) * (a.norm() + b.norm())
    assert torch.allclose((a - b)(x), a(x) - b(x), rtol=0, atol=near)
    expected = x.double() @ dense(b).T
    assert torch.allclose(b(x).double(), expected, rtol=0, atol=near)


def test_sums_concatenate_and_keep_a_common_scale(make_update):
    a, b = make_update(6, 5, 3, scale=2.0), make_update(6, 5, 1, seed=1, scale=2.0)
    assert ((a + b).rank, (a + b).scale) == (4, 2.0)
    assert torch.equal((a + b).B, torch.cat([a.B, b.B], 1))
    assert (a - b).scale == 1.0
    assert (3 * a).A is a.A
    assert (3 * a).scale == (a * 3).scale == 6.0
    assert (-a).scale == -2.0


@pytest.mark.parametrize("c", [np.float32(0.5), np.float64(0.5), np.array([0.5])[0]])
def test_numpy_scalars_multiply(c, make_update):
    u = make_update(6, 5, 3, scale=2.0)
    assert isinstance(c * u, LowRank)
    assert (c * u).scale == (u * c).scale == 1.0


def test_quotients_and_sums_of_many(make_update, dense):
    us = [make_update(6, 5, k, scale=2.0) for k in (1, 2, 3)]
    assert torch.allclose(dense(sum(us) / 3), sum(map(dense, us)) / 3, atol=1e-6)
    assert sum(us[:1]) is us[0]
    assert (us[0] / np.float32(4)).scale == 0.5


def test_equal_is_what_has_the_same_numbers(make_update):
    u = make_update(6, 5, 3, scale=2.0)
    same = LowRank(u.A.clone(), u.B.clone(), 2.0)
    assert u == same
    assert hash(u) == hash(same)
    others = [LowRank(u.A, u.B), LowRank(-u.A, u.B, 2.0), LowRank(u.A[:2], u.B[:, :2], 2.0)]
    for other in (*others, u.to(dtype=torch.float64), 1):
        assert u != other


def test_what_is_no_number_or_update_does_not_combine(make_update):
    u = make_update(6, 5, 3)
    for combine in (lambda: u + 1, lambda: 1 - u, lambda: u * u, lambda: "2" * u, lambda: u / u):
        with pytest.raises(TypeError):
            combine()
    with pytest.raises(MismatchError, match=r"\(6, 5\) and \(5, 6\)"):
        u + make_update(5, 6, 3)
    with pytest.raises(MismatchError, match="shapes differ"):
        u.inner(make_update(6, 6, 3))


@pytest.mark.parametrize("zero", ["A", "B", "scale"])
def test_a_zero_update_is_zero_everywhere(zero, make_update):
    u = make_update(6, 5, 3, scale=2.0)
    value = 0.0 if zero == "scale" else torch.zeros_like(getattr(u, zero))
    z = dataclasses.replace(u, **{zero: value})
    assert z.norm() == z.inner(u) == z.inner(z) == 0
    assert z.spectrum().tolist() == [0, 0, 0]
    for v in (z.truncate(tolerance=0.1), z.truncate(energy=0.9), z.truncate(rank=1)):
        assert (v.rank, v.norm()) == (1, 0)
    assert z.balanced().norm() == 0
    assert (u + z - u).norm() <= 1e-6 * u.norm()
    assert not z(torch.ones(5)).any()


# Applied to inputs


def test_a_call_takes_any_batch_and_keeps_its_dtype(make_update, dense):
    u = make_update(6, 5, 3, scale=-2.0)
    for shape in [(5,), (4, 5), (2, 3, 5), (0, 5)]:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        assert u(x).shape == (*shape[:-1], 6)
        assert torch.allclose(u(x).double(), x.double() @ dense(u).T, atol=1e-5)
    for dtype in DTYPES:
        y = u(torch.ones(5, dtype=dtype))
        assert y.dtype == dtype
        assert torch.allclose(y.double(), dense(u).sum(1), atol=0.1, rtol=0.01)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(4), "must end in 5"),
        (torch.tensor(1.0), "must end in 5"),
        (torch.ones(5, dtype=torch.long), "floating point, found torch.int64"),
    ],
)
def test_a_call_refuses_what_does_not_fit(x, message, make_update):
    with pytest.raises(MismatchError, match=message):
        make_update(6, 5, 3)(x)


# What it is made of

A23, B42 = torch.ones(2, 3), torch.ones(4, 2)


@pytest.mark.parametrize(
    ("A", "B", "scale", "message"),
    [
        (A23, torch.ones(4, 3), 1, r"ranks disagree: A \(2, 3\) has 2 rows, B \(4, 3\) has 3"),
        (torch.ones(3), B42, 1, r"A must be a non-empty matrix .* found shape \(3,\)"),
        (A23, torch.ones(4, 2, 1), 1, "B must be a non-empty matrix"),
        (torch.ones(0, 3), torch.ones(4, 0), 1, "A must be a non-empty matrix"),
        (A23.long(), B42, 1, "A must be float16.*found torch.int64"),
        (A23, B42.to(torch.complex64), 1, "B must be float16.*found torch.complex64"),
        (A23, B42.to(torch.float8_e4m3fn), 1, "B must be float16.*float8_e4m3fn; convert it"),
        (A23 * math.nan, B42, 1, "A holds NaN or infinite"),
        (A23, (B42 * math.inf).half(), 1, "B holds NaN or infinite"),
        (A23.tolist(), B42, 1, "A must be a torch tensor, not list"),
        (A23, B42, math.nan, "scale must be a finite number, found nan"),
        (A23, B42, "2", "scale must be a finite number, found '2'"),
        (A23, B42, None, "scale must be a finite number, found None"),
        (A23, B42.to("meta"), 1, "A is on cpu, B on meta"),
    ],
)
def test_wrong_factors_are_refused_by_name(A, B, scale, message):
    with pytest.raises(MismatchError, match=message):
        LowRank(A, B, scale)


def test_one_bad_entry_is_found(make_update):
    u = make_update(300, 200, 4)
    A = u.A.clone()
    A[3, 199] = -math.inf
    with pytest.raises(MismatchError, match="A holds NaN"):
        LowRank(A, u.B)
    with pytest.raises(MismatchError, match="up to 3.* which float16 can't hold"):
        LowRank(u.A, u.B * 1e6).to(dtype=torch.float16)


def test_it_is_frozen(make_update):
    u = make_update(4, 3, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        u.scale = 2.0
    assert repr(u) == "LowRank(4×3, rank 2, scale 1, float32)"


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda u: pickle.loads(pickle.dumps(u))])
def test_copies_are_equal_and_apart(clone, make_update):
    u = make_update(4, 3, 2, scale=0.1, dtype=torch.bfloat16)
    v = clone(u)
    assert torch.equal(u.A, v.A)
    assert torch.equal(u.B, v.B)
    assert v.scale == u.scale
    assert v.A.data_ptr() != u.A.data_ptr()


def test_moving_changes_dtype_and_device_and_nothing_else(make_update):
    u = make_update(4, 3, 2, scale=0.1)
    v = u.to(dtype=torch.bfloat16)
    assert (v.A.dtype, v.B.dtype, v.scale) == (torch.bfloat16, torch.bfloat16, 0.1)
    assert u.A.dtype == torch.float32
    assert u.to("meta").B.is_meta
    with pytest.raises(MismatchError, match="found torch.int64"):
        u.to(dtype=torch.long)


@pytest.mark.parametrize("size", [1e-30, 1e-19, 1e19, 1e30])
def test_products_in_any_gauge(make_update, size):
    u, v = make_update(6, 8, 3), make_update(6, 8, 2, seed=1)
    moved = [LowRank(x.A * size, x.B / size, x.scale) for x in (u, v)]
    assert moved[0].inner(moved[1]) == pytest.approx(u.inner(v), abs=1e-5 * u.norm() * v.norm())


def test_trainable_factors_can_be_measured(make_update):
    u = make_update(4, 3, 2)
    p = LowRank(torch.nn.Parameter(u.A.clone()), torch.nn.Parameter(u.B.clone()))
    assert p.norm() == u.norm()
    assert p.inner(u) == u.inner(u)
    assert p.truncate(tolerance=0.1).rank == u.truncate(tolerance=0.1).rank


OPERATIONS = {
    "norm": lambda u, v: u.norm(),
    "inner": lambda u, v: u.inner(v),
    "svd": lambda u, v: u.svd(),
    "spectrum": lambda u, v: u.spectrum(),
    "truncate rank": lambda u, v: u.truncate(rank=2),
    "truncate energy": lambda u, v: u.truncate(energy=0.9),
    "truncate tolerance": lambda u, v: u.truncate(tolerance=0.1),
    "balanced": lambda u, v: u.balanced(),
    "prefix": lambda u, v: u.prefix(2),
    "to": lambda u, v: u.to(dtype=torch.float64),
    "unscaled": lambda u, v: u.unscaled(),
    "call": lambda u, v: u(torch.ones(2, u.shape[1])),
    "add": lambda u, v: u + v,
    "distance": lambda u, v: (u - v).norm(),
    "multiply": lambda u, v: -(2 * u),
    "from_svd": lambda u, v: from_svd(*u.svd()),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_full_matrix_is_never_built_and_no_argument_changes(name, make_update, shape_watch):
    u, v = make_update(96, 80, 3, scale=2.0), make_update(96, 80, 4, seed=1)
    before = [t.clone() for t in (u.A, u.B, v.A, v.B)]
    with shape_watch() as watch:
        OPERATIONS[name](u, v)
    assert watch.largest < 96 * 80
    assert all(torch.equal(s, t) for s, t in zip(before, (u.A, u.B, v.A, v.B), strict=True))


def test_the_watch_sees_the_full_matrix_where_it_is_built(make_update, shape_watch):
    with shape_watch() as watch:
        make_update(96, 80, 3).dense()
    assert watch.largest == 96 * 80
    covered = {name.split()[0] for name in OPERATIONS}
    public = {name for name in vars(LowRank) if not name.startswith("_")}
    values = {"A", "B", "scale", "rank", "shape", "num_parameters"}
    assert public - values - {"dense"} <= covered, "a public operation is not watched"


# Numbers at the ends of what their dtype holds


@pytest.mark.parametrize("power", [-120, -60, 60, 100, 126])
def test_measures_hold_to_the_ends_of_float32(power, make_update):
    u = make_update(6, 5, 2)
    v = LowRank(u.A, u.B * 2.0**power, u.scale)
    assert math.isclose(v.norm(), u.norm() * 2.0**power, rel_tol=1e-6)
    assert math.isclose(v.inner(v), v.norm() ** 2, rel_tol=1e-6)
    assert (v.truncate(rank=2) - v).norm() <= 1e-5 * v.norm()


def test_an_update_beyond_float32_is_measured_in_float64():
    B = torch.tensor([[3.4e38, 0.0], [0.0, 1.0]])
    u = LowRank(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), B, 2.0)
    expected = 10 * 3.4e38
    assert math.isclose(u.norm(), expected, rel_tol=1e-6)
    assert u.spectrum().dtype == torch.float64
    assert math.isclose(float(u.spectrum()[0]), expected, rel_tol=1e-6)
    cut = u.truncate(rank=1)
    assert cut.B.dtype == torch.float32
    assert math.isclose(cut.norm(), expected, rel_tol=1e-6)
    assert (cut - u).norm() <= 1e-5 * u.norm()


def test_what_float64_cannot_multiply_is_told():
    far = torch.full((2, 2), 1e300, dtype=torch.float64)
    u = LowRank(far, far)
    for measure in (u.norm, u.spectrum, u.svd, u.balanced, lambda: u.inner(u)):
        with pytest.raises(MismatchError, match="too large"):
            measure()
    near = LowRank(far / 1e80, far / 1e80)  # of norm 1e440 squared, not itself
    assert math.isclose(LowRank(far / 1e160, far / 1e160).norm(), 4e280, rel_tol=1e-9)
    with pytest.raises(MismatchError, match="too large"):
        near.norm()


def test_a_scale_of_any_size_is_multiplied_in():
    u = LowRank(torch.full((1, 2), 1e30), torch.full((3, 1), 1e30), 1e-320 / 3)
    found = u.unscaled(torch.float64)
    assert found.scale == 1
    assert math.isclose(found.norm(), u.norm(), rel_tol=1e-6)
    assert math.isclose(u.norm(), 1e60 * u.scale * math.sqrt(6), rel_tol=1e-6)
