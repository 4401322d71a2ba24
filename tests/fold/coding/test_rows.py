"""The coder: bytes that decode to what was said, and an error as predicted."""

import numpy as np
import pytest
import torch

from lorafold.collection.batch import Block
from lorafold.errors import FileError
from lorafold.fold.coding.bits import LEVELS, bits_for_bytes, predicted_error
from lorafold.fold.coding.record import Target, code, decode
from lorafold.fold.coding.rows import (
    LEFT_SEED,
    RIGHT_SEED,
    code_rows,
    read_rows,
    rounded_coefficients,
    rows_nbytes,
    write_rows,
)

MIXES = [
    *([level] * 3 for level in LEVELS[1:]),
    [1, 8, 3, 3, 5, 1, 2],
    [4, 0, 7, 0, 0],
    [16, 2, 32, 0, 8, 16],
]


def coded_pairs(bits, dims, seed=0):
    g = torch.Generator().manual_seed(seed)
    bits = np.array(bits)
    X = [torch.nn.functional.normalize(torch.randn(len(bits), d, generator=g)) for d in dims]
    sides = [code_rows(x, bits, s) for x, s in zip(X, (LEFT_SEED, RIGHT_SEED), strict=False)]
    scale = np.prod([s.scale.numpy() for s in sides], axis=0)
    c = rounded_coefficients(np.geomspace(3, 0.1, len(bits)) * scale, bits)
    kept = np.flatnonzero(bits)
    return X, sides, kept, c, write_rows(sides, kept, c[kept])


@pytest.mark.parametrize("bits", MIXES, ids=str)
@pytest.mark.parametrize("dims", [(37,), (64, 48), (5, 129)], ids=str)
def test_what_is_read_is_what_was_said_to_the_bit(bits, dims):
    _, sides, kept, c, record = coded_pairs(bits, dims)
    rows, coefficients, end = read_rows(
        b"xyz" + record, 3, dims, (LEFT_SEED, RIGHT_SEED)[: len(dims)]
    )
    assert end == len(record) + 3
    for side, found in zip(sides, rows, strict=True):
        assert torch.equal(found, side.hat[kept])
    assert np.array_equal(coefficients.numpy(), c[kept].astype(np.float32))


def test_the_bytes_of_a_record_do_not_change():
    """Part of the file format: head, bit codes, coefficients, codes."""
    bits = np.array([3, 1])
    X = torch.tensor([[1.0, 2.0, -1.0, 0.5], [0.5, 0.5, -0.5, 0.5]])
    coded = code_rows(X, bits, seed=0)
    record = write_rows([coded], np.arange(2), np.array([2.0, -0.5]))
    assert record[:7].hex() == "0200" + "00" + "00000040"
    assert record[7:8].hex() == "13"  # bit codes 3 and 1, the lower half first
    assert record[8:12].hex() == "003c" + "00b4"  # 1 and −1/4 in half precision
    assert len(record) == 12 + 2 + 1  # 4·3 bits, then 4·1 bits, each a whole byte
    # By hand: the signs are −−+−, so that the first row turns into (−2.25, ¼, −¾, ¾), which is
    # (−1.8, 0.2, −0.6, 0.6) of its root mean square: levels 0, 4, 2, 5. The second one turns into
    # (−1, 0, 0, 0): level 0 throughout, as zero is not above the threshold.
    assert record[12:].hex() == "a00a" + "00"


def test_sizes_are_as_told_but_for_whole_bytes():
    for bits in MIXES:
        _, _, _, _, record = coded_pairs(bits, (64, 48))
        told = float(rows_nbytes(np.array([bits]), 64 + 48)[0])
        assert told <= len(record) < told + 1 + len(LEVELS)


def test_a_cut_record_is_an_error():
    _, _, _, _, record = coded_pairs([3, 2], (64, 48))
    for length in (0, 3, 6):
        with pytest.raises(FileError, match="ends too early"):
            read_rows(record[:length], 0, (64, 48), (0, 1))


def test_coefficients_of_any_size_survive():
    bits = np.full(4, 4)
    c = np.array([1e-30, 5e-31, 0.0, -1e-33])
    rounded = rounded_coefficients(c, bits)
    np.testing.assert_allclose(rounded, c, rtol=1e-3)
    assert np.array_equal(rounded_coefficients(rounded, bits), rounded)
    assert (rounded_coefficients(np.zeros(4), bits) == 0).all()
    # A float row keeps all of its record's coefficients in float32.
    wide = rounded_coefficients(np.array([1.0, 1 / 3]), np.array([16, 4]))
    assert abs(wide[1] - 1 / 3) < 1e-7
    separate = rounded_coefficients(np.array([[1.0, 1e-6], [1e-6, 1e-6]]), np.full((2, 2), 3))
    np.testing.assert_allclose(separate, [[1.0, 1e-6], [1e-6, 1e-6]], rtol=0.05)


def exponential(out, inn, rank, decay, seed):
    g = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(out, rank, generator=g))[0]
    V = torch.linalg.qr(torch.randn(inn, rank, generator=g))[0]
    return U, decay ** torch.arange(rank, dtype=torch.float64), V


def absmax_error(B, A, bits):
    """Plain rounding of A's rows and B's columns with a scale each, and its bytes."""
    hats = []
    for X in (B.T, A):
        if bits == 1:
            scale = X.abs().mean(1, keepdim=True).half().double()
            hats.append(torch.where(X >= 0, 1.0, -1.0) * scale)
        else:
            top = 2 ** (bits - 1) - 1
            scale = (X.abs().amax(1, keepdim=True) / top).half().double()
            hats.append((X / scale).round().clamp(-top - 1, top) * scale)
    W = B @ A
    error = (hats[0].T @ hats[1] - W).norm() / W.norm()
    return float(error), bits * (B.numel() + A.numel()) / 8 + 2 * 2 * B.shape[1]


@pytest.mark.parametrize("average", [4, 3, 2, 1])
@pytest.mark.parametrize("decay", [0.95, 0.8, 0.5])
@pytest.mark.parametrize("shape", [(512, 768, 16), (1024, 512, 8), (96, 96, 8), (192, 64, 4)])
def test_the_error_is_as_predicted_and_below_absmax_at_the_same_bytes(average, decay, shape):
    out, inn, rank = shape
    n = 6
    parts = [exponential(*shape, decay, seed) for seed in range(n)]
    U, S, V = (torch.stack(t) for t in zip(*parts, strict=True))
    block = Block(np.arange(n), U, S, V)
    payload = average * rank * (out + inn) / 8
    coded = code(block.factors(), Target("bytes", np.full(n, payload)), block=block)
    assert (coded.payload <= payload).all()

    W = U.double() * S[:, None] @ V.double().mT
    hats = [decode(record, (out, inn), None) for record in coded.records]
    dense = torch.stack([u.scale * u.B.double() @ u.A.double() for u in hats])
    measured = (dense - W).square().sum((1, 2)).numpy()
    np.testing.assert_allclose(measured, coded.squared_error, rtol=1e-4)

    energy = (S**2).numpy()
    bits = bits_for_bytes(energy, np.full(rank, (out + inn) / 8), True, np.full(n, payload))
    predicted = predicted_error(energy, True, bits)
    bound = 0.05 if min(out, inn) >= 512 else 0.10
    assert abs(np.sqrt(measured.sum() / predicted.sum()) - 1) < bound

    # Scales included: the peer's bytes are given away to nobody.
    B, A = U[0].double() * S[0].sqrt(), S[0].sqrt()[:, None] * V[0].double().T
    plain, nbytes = absmax_error(B, A, average)
    fitting = nbytes - (len(coded.records[0]) - coded.payload[0])
    one = block.take(np.array([0]))
    same = code(one.factors(), Target("bytes", np.array([fitting])), block=one)
    assert len(same.records[0]) <= nbytes + 4  # each level's codes end at a whole byte
    ours = np.sqrt(same.squared_error[0] / energy[0].sum())
    assert ours < plain


def test_the_measure_is_of_the_updates_as_they_came(make_update):
    """A block that is off from the raw factors must not hide what it lost."""
    from lorafold.collection.batch import Factors, decompose

    u = make_update(64, 48, 4)
    block = Block(np.zeros(1, int), *decompose(u.B[None], u.A[None]))
    raw = Factors(np.zeros(1, int), 1.01 * u.B[None], u.A[None])
    near = code(raw, Target("bits", np.full(1, 32.0)), block=block)
    norm = float((raw.B[0].double() @ raw.A[0].double()).square().sum())
    assert abs(np.sqrt(near.squared_error[0] / norm) - 0.01 / 1.01) < 1e-5


@pytest.mark.parametrize("power", [-120, -30, 30, 120])
def test_rows_of_any_size_have_the_same_codes(power):
    X = torch.randn(4, 33, generator=torch.Generator().manual_seed(0))
    bits = np.array([3, 8, 16, 32])
    plain, sized = code_rows(X, bits, 0), code_rows(X * 2.0**power, bits, 0)
    assert np.array_equal(plain.codes, sized.codes)
    assert np.array_equal(plain.floats, sized.floats)
    assert torch.equal(plain.scale * 2.0**power, sized.scale)
    near = sized.hat.double() * sized.scale[:, None]
    assert torch.equal(near[3].float(), X[3] * 2.0**power)
    wanted = X[2].double() * 2.0**power
    assert (near[2] - wanted).norm() < 3e-4 * wanted.norm()
