"""Codebooks against the conditions of Lloyd and Max, and rounding against a full search."""

import hashlib
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorafold.errors import MismatchError
from lorafold.fold.coding.codebook import (
    _CELLS,
    DISTORTION,
    _cells,
    _nearest,
    codebook,
    dequantise,
    quantise,
    round_into,
    thresholds,
)

BITS = range(1, 9)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative_error(x, codes, scales, bits):
    left = x.double() - scales.double()[:, None] * dequantise(codes, bits, torch.float64)
    return left.square().sum(1) / x.double().square().sum(1)


# The codebooks


def lloyd_max(bits):
    """The codebook from its definition, by Newton's method: positive levels and D(bits).

    With thresholds t₀ = 0, tᵢ = (yᵢ₋₁ + yᵢ) / 2 and a last one at infinity, the levels y solve
    `yᵢ = cᵢ = (φ(tᵢ) - φ(tᵢ₊₁)) / mᵢ`, where `mᵢ = Φ(tᵢ₊₁) - Φ(tᵢ)`. From
    `∂cᵢ/∂tᵢ = φ(tᵢ) (cᵢ - tᵢ) / mᵢ`, and likewise above, the Jacobian is tridiagonal. The start is
    where very many levels would lie: at the quantiles of N(0, 3) (Panter and Dite 1951).
    """
    count = 1 << (bits - 1)
    start = NormalDist(sigma=math.sqrt(3))
    y = np.array([start.inv_cdf(0.5 + (2 * i + 1) / (4 * count)) for i in range(count)])
    distortion = 1.0
    for _ in range(8):  # five are enough for 1e-13
        t = np.concatenate([[0.0], (y[1:] + y[:-1]) / 2])
        density = np.append(np.exp(-t * t / 2) / math.sqrt(2 * math.pi), 0.0)
        above = np.array([math.erfc(v / math.sqrt(2)) / 2 for v in t] + [0.0])
        mass = above[:-1] - above[1:]
        centroid = (density[:-1] - density[1:]) / mass
        distortion = float(1 - 2 * np.sum(mass * centroid**2))
        # Half of what a threshold moves goes to the level on either side; t₀ does not move.
        low = density[1:-1] * (centroid[1:] - t[1:]) / mass[1:] / 2
        high = density[1:-1] * (t[1:] - centroid[:-1]) / mass[:-1] / 2
        own = 1 - np.append(high, 0.0) - np.append(0.0, low)
        jacobian = np.diag(own) - np.diag(low, -1) - np.diag(high, 1)
        y = y - np.linalg.solve(jacobian, y - centroid)
    return y, distortion


@pytest.mark.parametrize("bits", BITS)
def test_the_stored_levels_are_those_of_the_definition(bits):
    positive, distortion = lloyd_max(bits)
    expected = np.concatenate([-positive[::-1], positive]).astype(np.float32)
    assert codebook(bits).numpy().tolist() == expected.tolist()
    assert pytest.approx(distortion, rel=1e-10) == DISTORTION[bits]


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_the_means_of_their_cells(bits):
    # By Simpson's rule, which knows nothing of the closed form.
    levels = codebook(bits).double().numpy()
    borders = np.concatenate([[-12], thresholds(bits).double().numpy(), [12]])
    left = 0.0
    for level, low, high in zip(levels, borders[:-1], borders[1:], strict=True):
        x = np.linspace(low, high, 2001)
        weight = np.full(2001, 2.0)
        weight[1::2] = 4.0
        weight[[0, -1]] = 1.0
        mass = weight * np.exp(-x * x / 2) * (high - low) / 6000 / math.sqrt(2 * math.pi)
        assert level == pytest.approx((mass * x).sum() / mass.sum(), abs=1e-6)
        left += (mass * (x - level) ** 2).sum()
    assert left == pytest.approx(DISTORTION[bits], rel=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_levels_ascend_and_mirror(bits):
    levels, borders = codebook(bits), thresholds(bits)
    assert levels.shape == (2**bits,)
    assert borders.shape == (2**bits - 1,)
    assert levels.dtype == borders.dtype == torch.float32
    assert (levels.diff() > 0).all()
    assert torch.equal(levels, -levels.flip(0))
    assert (levels[:-1] < borders).all()
    assert (borders < levels[1:]).all()


def test_the_table_of_distortions():
    rounded = [1, 0.3634, 0.1175, 0.0345, 0.0095, 0.0025, 0.000644, 0.000163, 0.000041]
    assert list(DISTORTION) == [*range(9), 16, 32]
    for bits, expected in enumerate(rounded):
        assert DISTORTION[bits] == pytest.approx(expected, rel=0.006)


@pytest.mark.parametrize("bits", BITS)
def test_measured_distortion(bits):
    x = normal(64, 8192, seed=bits)
    codes, scales = quantise(x, bits)
    measured = float(relative_error(x, codes, scales, bits).mean())
    assert measured == pytest.approx(DISTORTION[bits], rel=0.02)
    # The check can fail: the same levels, a fifth too far out.
    off = float(relative_error(x, codes, 1.2 * scales, bits).mean())
    assert off != pytest.approx(DISTORTION[bits], rel=0.02)


@pytest.mark.parametrize(("bits", "dtype"), [(16, torch.float16), (32, torch.float32)])
def test_measured_distortion_of_floats(bits, dtype):
    x = normal(1_000_000, seed=bits, dtype=torch.float64)
    measured = float((x - x.to(dtype).double()).square().sum() / x.square().sum())
    assert measured == pytest.approx(DISTORTION[bits], rel=0.02)


def test_every_bit_of_the_levels_is_pinned():
    data = b"".join(codebook(bits).numpy().astype("<f4").tobytes() for bits in BITS)
    digest = "93539c9b89d35ab09f48381273dad51e34d0d2220b99a3c8af527e67d858c5e9"
    assert hashlib.sha256(data).hexdigest() == digest
    assert codebook(2).numpy().astype("<f4").tobytes().hex() == "5d55c1bfc9d2e7bec9d2e73e5d55c13f"


def test_what_is_returned_may_be_written_to():
    codebook(3).zero_()
    thresholds(3).zero_()
    assert codebook(3).all()
    assert int((thresholds(3) == 0).sum()) == 1


# Rounding


@pytest.mark.parametrize("bits", BITS)
def test_the_nearest_level_is_found(bits):
    x = torch.cat([normal(20, 500, seed=bits), 5 * normal(20, 500) ** 3, normal(20, 500).sign()])
    unit = (x / x.double().square().mean(1, keepdim=True).sqrt().float()).double()
    codes, _ = quantise(x, bits)
    distance = (unit[:, :, None] - codebook(bits).double()).abs()
    found = distance.gather(2, codes.long()[:, :, None])[:, :, 0]
    assert (found <= distance.amin(2) + 1e-6).all()
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 2**bits


@pytest.mark.parametrize("bits", BITS)
def test_look_up_tells_the_floats_next_to_a_threshold_apart(bits):
    borders = thresholds(bits)
    below, inside = _cells(bits, torch.device("cpu"))
    assert int(inside.isfinite().sum()) == len(borders)
    assert len(below) == _CELLS
    order = torch.arange(len(borders), dtype=torch.uint8)
    beyond = torch.nextafter(borders, torch.tensor(torch.inf))
    assert torch.equal(_nearest(borders, below, inside), order)
    assert torch.equal(_nearest(beyond, below, inside), order + 1)
    far = torch.tensor([-1e30, -8.0, 8.0, 1e30])
    assert _nearest(far, below, inside).tolist() == [0, 0, 2**bits - 1, 2**bits - 1]


@pytest.mark.parametrize("bits", BITS)
def test_the_scale_is_that_of_least_squares(bits):
    x = normal(5, 300, seed=bits) * torch.tensor([[1.0], [1e-3], [7.0], [1e4], [0.1]])
    codes, scales = quantise(x, bits)
    for row, code, scale in zip(x.double(), codes, scales, strict=True):
        q = dequantise(code, bits, torch.float64)
        best = np.linalg.lstsq(q.numpy()[:, None], row.numpy(), rcond=None)[0]
        assert float(scale) == pytest.approx(float(best[0]), rel=1e-5)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_zero_rows(bits):
    x = normal(4, 50)
    x[1] = 0
    codes, scales = quantise(x, bits)
    assert scales[1] == 0
    assert not math.copysign(1, float(scales[1])) < 0
    assert (scales[[0, 2, 3]] > 0).all()
    assert dequantise(codes, bits).isfinite().all()
    codes, scales = quantise(torch.zeros(3, 7), bits)
    assert not scales.any()


@pytest.mark.parametrize("size", [1e-30, 1e-18, 2.0**-60, 1e18, 1e37])
def test_sizes_whose_squares_no_float32_holds(size):
    x = normal(3, 1000, seed=1)
    codes, scales = quantise(x * size, 4)
    same, units = quantise(x, 4)
    assert (codes != same).float().mean() < 1e-3
    torch.testing.assert_close(scales.double() / size, units.double(), rtol=1e-5, atol=0)


def test_the_smallest_floats_do_not_become_nan():
    x = torch.zeros(2, 4096)
    x[0, 3] = 1e-45
    codes, scales = quantise(x, 2)
    assert scales.isfinite().all()
    assert int(codes.max()) < 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_of_floats(dtype):
    x = normal(6, 400, seed=2).to(dtype)
    codes, scales = quantise(x, 5)
    same, units = quantise(x.float(), 5)
    assert scales.dtype == torch.float32
    assert (codes != same).float().mean() < 0.01
    torch.testing.assert_close(scales, units, rtol=1e-3, atol=0)


def test_a_row_is_coded_alike_in_any_batch_and_layout():
    x = normal(300, 200, seed=3)
    codes, scales = quantise(x, 3)
    assert torch.equal(torch.cat([quantise(row[None], 3)[0] for row in x]), codes)
    again, others = quantise(x.T.contiguous().T, 3)
    assert torch.equal(again, codes)
    torch.testing.assert_close(others, scales)
    assert torch.equal(x, normal(300, 200, seed=3))


@given(
    st.integers(1, 8),
    st.integers(1, 40),
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40),
)
def test_coding_never_adds_error(bits, repeats, numbers):
    x = torch.tensor([numbers * repeats])
    codes, scales = quantise(x, bits)
    left = x - scales[:, None] * dequantise(codes, bits)
    assert float(left.norm()) <= float(x.norm()) * (1 + 1e-5)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_code(shape):
    codes, scales = quantise(torch.zeros(shape), 3)
    assert codes.shape == shape
    assert scales.tolist() == [0.0] * shape[0]
    assert dequantise(codes, 3).shape == shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_decoding(dtype):
    codes = torch.arange(8, dtype=torch.uint8).view(2, 2, 2)
    levels = dequantise(codes, 3, dtype)
    assert levels.dtype == dtype
    assert torch.equal(levels.flatten(), codebook(3).to(dtype))


# What it refuses


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_no_nan_enters(bad):
    x = normal(40, 1000)
    x[33, 999] = bad
    with pytest.raises(MismatchError, match="row 33 holds NaN or infinity"):
        quantise(x, 4)


def test_it_refuses():
    for bits in (0, 9, 16):
        for call in (codebook, thresholds, lambda b: quantise(torch.ones(1, 2), b)):
            with pytest.raises(ValueError, match=f"1 to 8 bits, not {bits}"):
                call(bits)
    with pytest.raises(ValueError, match=r"shape \(n, d\)"):
        quantise(torch.ones(3), 2)
    with pytest.raises(IndexError):
        dequantise(torch.tensor([4], dtype=torch.uint8), 2)


@pytest.mark.parametrize("d", [1, 31, 64, 9000])
def test_rows_of_several_numbers_of_bits_are_each_as_alone(d):
    bits = np.array([5, 5, 4, 0, 8, 5, 1, 1, 7, 0, 4, 4])
    x = normal(len(bits), d, seed=d)
    x[3] = torch.nan_to_num(x[3]) * 1e3
    x[7] = 0.0
    codes = torch.full(x.shape, 255, dtype=torch.uint8)
    levels = torch.full(x.shape, torch.nan)
    scales = round_into(x, bits, codes, levels)
    for k, level in enumerate(bits.tolist()):
        if level:
            own, scale = quantise(x[k : k + 1], level)
            assert torch.equal(codes[k : k + 1], own)
            assert torch.equal(levels[k : k + 1], dequantise(own, level))
            torch.testing.assert_close(scales[k], scale[0], rtol=1e-6, atol=0)
        else:
            assert not torch.cat([codes[k], levels[k], scales[k : k + 1]]).any()


@pytest.mark.parametrize("bits", BITS)
def test_codes_of_any_layout_are_looked_up(bits):
    codes = torch.randint(1 << bits, (6, 35), dtype=torch.uint8)
    table = codebook(bits)
    for view in (codes[:, 3], codes.T, codes[:1, :1].expand(4, 4), codes[1:, 1:], codes[0, :0]):
        assert torch.equal(dequantise(view, bits), table[view.long()])
        assert torch.equal(dequantise(view.long(), bits), table[view.long()])
