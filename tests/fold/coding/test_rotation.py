"""The rotation against a dense Hadamard matrix, its laws, and the bytes it may never change."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorafold.fold.coding.codebook import DISTORTION, dequantise, quantise
from lorafold.fold.coding.rotation import quick_rotate, rotate, unrotate

LENGTHS = [1, 2, 3, 128, 384, 4096, 5000]
ROUNDING = {torch.float32: 2e-6, torch.float64: 4e-15}


def signs(size, seed, stage):
    """splitmix64 in Python's own integers."""
    full, gamma = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & full
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & full
        return z ^ (z >> 31)

    key = mix((seed + (stage + 1) * gamma) & full)
    return np.array([1 - 2 * (mix((key + (i + 1) * gamma) & full) >> 63) for i in range(size)])


def hadamard(size):
    """Entry (i, j) is -1 to the number of ones that i and j share."""
    i = np.arange(size)
    shared = i[:, None] & i[None, :]
    odd = np.zeros_like(shared)
    while shared.any():
        odd ^= shared & 1
        shared >>= 1
    return (1.0 - 2.0 * odd) / np.sqrt(size)


def dense(d, seed):
    """The `(d, d)` matrix that `rotate` applies."""
    size = 1 << (d.bit_length() - 1)
    H, R = hadamard(size), np.eye(d)
    R[:size] = H @ (signs(size, seed, 0)[:, None] * R[:size])
    if size < d:
        R[d - size :] = H @ (signs(size, seed, 1)[:, None] * R[d - size :])
    return R


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def kurtosis(x):
    return float((x**4).mean() / (x**2).mean() ** 2)


@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 12, 31, 64, 128, 384, 1000])
def test_it_is_the_dense_matrix_of_the_formula(d):
    R = dense(d, seed=11)
    np.testing.assert_allclose(R @ R.T, np.eye(d), atol=1e-13)
    identity = torch.eye(d, dtype=torch.float64)
    np.testing.assert_allclose(rotate(identity, 11).numpy(), R.T, atol=1e-14)
    np.testing.assert_allclose(unrotate(identity, 11).numpy(), R, atol=1e-14)


def test_many_factors_are_one_matrix():
    # 2^15 takes three Kronecker factors; a few columns of the matrix are enough to tell.
    d, columns = 1 << 15, [0, 1, 77, 4096, 32767]
    x = torch.zeros(len(columns), d, dtype=torch.float64)
    x[range(len(columns)), columns] = 1
    ones = np.array([[(i & j).bit_count() & 1 for i in range(d)] for j in columns])
    expected = (1 - 2 * ones) * signs(d, 3, 0)[columns, None] / np.sqrt(d)
    np.testing.assert_allclose(rotate(x, 3).numpy(), expected, atol=1e-15)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("d", [*LENGTHS, 1 << 17])
def test_there_and_back(d, dtype):
    x = random(3, d, dtype=dtype)
    y = rotate(x, 5)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    near = ROUNDING[dtype]
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1), rtol=near, atol=0)
    torch.testing.assert_close(unrotate(y, 5), x, rtol=0, atol=4 * near)
    torch.testing.assert_close(rotate(unrotate(x, 5), 5), x, rtol=0, atol=4 * near)
    if d > 3:  # so few signs can agree by chance
        assert not torch.allclose(unrotate(y, 6), x, atol=0.1)


@given(st.integers(1, 300), st.integers(0, 2**64 - 1), st.integers(0, 2**32))
def test_it_keeps_every_inner_product(d, seed, data):
    x = random(4, d, seed=data, dtype=torch.float64)
    y = rotate(x, seed)
    torch.testing.assert_close(y @ y.T, x @ x.T, rtol=0, atol=1e-12 * d)
    torch.testing.assert_close(unrotate(y, seed), x, rtol=0, atol=1e-13)


@pytest.mark.parametrize("turn", [rotate, unrotate])
@pytest.mark.parametrize("d", LENGTHS)
def test_a_row_is_the_same_bit_for_bit_alone_or_in_any_batch(d, turn):
    x = random(37, d, seed=2)
    together = turn(x, 9)
    assert torch.equal(torch.stack([turn(row, 9) for row in x]), together)
    assert torch.equal(turn(x.reshape(1, 37, 1, d), 9).reshape(37, d), together)
    assert torch.equal(turn(x.T.contiguous().T, 9), together)
    wide = random(37, d + 3, seed=3)
    wide[:, 2 : d + 2] = x
    assert torch.equal(turn(wide[:, 2 : d + 2], 9), together)


def test_settings_of_matrix_products_do_not_reach_it():
    x = random(8, 4096)
    before = rotate(x, 1)
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(rotate(x, 1), before)
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("d", [*LENGTHS, 64, 96, 512, 1 << 13, 11008, 1 << 15, 1 << 17])
def test_matrix_products_are_the_same_rotation_up_to_rounding(d, dtype):
    x = random(19, d, dtype=dtype)
    kept = x.clone()
    y = quick_rotate(x, 5)
    torch.testing.assert_close(y, rotate(x, 5), rtol=0, atol=4 * ROUNDING[dtype])
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1), rtol=ROUNDING[dtype], atol=0)
    assert torch.equal(x, kept)
    assert quick_rotate(x[:0], 5).shape == (0, d)
    wide = random(19, 2 * d, seed=3, dtype=dtype)
    wide[:, ::2] = x
    torch.testing.assert_close(quick_rotate(wide[:, ::2], 5), y, rtol=0, atol=4 * ROUNDING[dtype])


def test_products_are_not_taken_in_a_lower_precision():
    x = random(8, 4096)
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(quick_rotate(x, 1), rotate(x, 1))
    finally:
        torch.set_float32_matmul_precision(precision)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(quick_rotate(x, 1), rotate(x, 1), rtol=0, atol=8e-6)


@pytest.mark.parametrize("d", [64, 96])
def test_the_argument_stays_as_it_was_and_no_graph_is_kept(d):
    x = random(5, d).requires_grad_()
    kept = x.detach().clone()
    for y in (rotate(x, 1), unrotate(x, 1)):
        assert not y.requires_grad
        y.zero_()
    assert torch.equal(x, kept)


def test_signs_first_made_in_inference_mode_serve_afterwards():
    x = random(2, 48)
    with torch.inference_mode():
        inside = rotate(x, 424242)
    assert torch.equal(rotate(x, 424242), inside)


@pytest.mark.parametrize("d", [1, 4, 6])
def test_no_rows(d):
    assert rotate(torch.zeros(0, d), 1).shape == (0, d)
    assert unrotate(torch.zeros(3, 0, d), 1).shape == (3, 0, d)


@pytest.mark.parametrize("d", [3, 4096, 5000])
def test_zeros_stay_zeros(d):
    assert not rotate(torch.zeros(2, d), 1).any()


# What it is for


@pytest.mark.parametrize("d", [4096, 5000])
def test_spikes_become_gaussian(d):
    x = torch.zeros(d)
    x[torch.randperm(d, generator=torch.Generator().manual_seed(1))[:40]] = random(40, seed=4)
    assert kurtosis(x) > 100
    assert kurtosis(rotate(x, 1)) == pytest.approx(3, abs=0.3)


def test_one_spike_spreads_evenly():
    x = torch.zeros(1024)
    x[17] = 3
    assert torch.equal(rotate(x, 1).abs(), torch.full((1024,), 3 / 32))


def test_a_spiky_vector_codes_as_well_as_a_gaussian_one_but_not_without_the_rotation():
    x = random(16, 4096, seed=5) ** 5

    def error(y):
        codes, scales = quantise(y, 3)
        left = y - scales[:, None] * dequantise(codes, 3)
        return float((left.norm(dim=1) / y.norm(dim=1)).square().mean())

    assert error(rotate(x, 1)) == pytest.approx(DISTORTION[3], rel=0.05)
    assert error(x) > 5 * DISTORTION[3]


# What may never change


@pytest.mark.parametrize(("stage", "pinned"), [(0, "f01918f06123effc"), (1, "d1e6013cafc684be")])
def test_the_signs_of_a_seed_are_pinned(stage, pinned):
    # Of 96 coordinates the first stage takes 0 … 63, the second 32 … 95. What one of them alone
    # becomes starts with its own sign, as long as the other stage has no part in it.
    assert np.packbits(signs(64, 2026, stage) < 0, bitorder="little").tobytes().hex() == pinned
    y = rotate(torch.eye(96, dtype=torch.float64), 2026)
    first = [(y[i, 0] < 0).item() for i in range(64)]
    second = [(y[32 + i, 32] < 0).item() for i in range(32, 64)]
    assert first == (signs(64, 2026, 0) < 0).tolist()
    assert second == (signs(64, 2026, 1)[32:] < 0).tolist()


def test_every_bit_of_a_rotated_vector_is_pinned():
    x = torch.arange(1, 5001, dtype=torch.float32) / 7
    pinned = {
        rotate: "2a0fd0a42a18c905972d1394a9dee468b32f09befc9ecadefaee0e2add59b2dc",
        unrotate: "7185029ecbba4e208b54c5b610d3abc2cbe188faf6f5e6ea6bd2f0b403570e8b",
    }
    for turn, digest in pinned.items():
        assert hashlib.sha256(turn(x, 2026).numpy().astype("<f4").tobytes()).hexdigest() == digest


# What it refuses


@pytest.mark.parametrize("turn", [rotate, unrotate])
def test_it_refuses(turn):
    for dtype in (torch.float16, torch.bfloat16, torch.int64, torch.complex64):
        with pytest.raises(TypeError, match="needs float32 or float64"):
            turn(torch.zeros(2, 4, dtype=dtype), 1)
    for shape in ((), (3, 0)):
        with pytest.raises(ValueError, match="along the last axis"):
            turn(torch.zeros(shape), 1)
    for seed in (-1, 1 << 64):
        with pytest.raises(ValueError, match="seed"):
            turn(torch.zeros(4), seed)
