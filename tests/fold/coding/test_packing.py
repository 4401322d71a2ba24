"""Packing against one large integer, and the bytes it may never change."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafold.errors import FileError
from lorafold.fold.coding.packing import pack, packed_nbytes, unpack

BITS = range(1, 9)


def codes_of(count, bits, seed=0):
    return np.random.default_rng(seed).integers(0, 2**bits, count).astype(np.uint8)


def reference(codes, bits):
    """The stream as one integer, written least significant byte first."""
    stream = sum(int(code) << (bits * k) for k, code in enumerate(codes))
    return stream.to_bytes(-(-len(codes) * bits // 8), "little")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 15, 16, 17, 1001])
def test_the_stream_is_the_integer_of_the_formula(bits, count):
    codes = codes_of(count, bits)
    packed = pack(codes, bits)
    assert packed.dtype == np.uint8
    assert packed.tobytes() == reference(codes, bits)
    assert len(packed) == packed_nbytes(count, bits)
    assert np.array_equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize("bits", BITS)
def test_streams_longer_than_a_block(bits):
    codes = codes_of(8 * (1 << 14) * 2 + 13, bits)
    packed = pack(codes, bits)
    ones = (codes[:, None] >> np.arange(bits, dtype=np.uint8)) & 1
    assert np.array_equal(packed, np.packbits(ones.ravel(), bitorder="little"))
    assert np.array_equal(unpack(packed, bits, len(codes)), codes)


@given(st.integers(1, 8).flatmap(lambda b: st.tuples(st.just(b), st.binary(max_size=200))))
def test_there_and_back(case):
    bits, data = case
    codes = np.frombuffer(data, np.uint8) >> (8 - bits)
    assert np.array_equal(unpack(pack(codes, bits), bits, len(codes)), codes)


@given(st.integers(1, 8), st.binary(min_size=1, max_size=64))
def test_whole_streams_come_back_from_their_codes(bits, data):
    count = len(data) * 8 // bits
    used = packed_nbytes(count, bits)
    stream = int.from_bytes(data[:used], "little") & ((1 << (count * bits)) - 1)
    assert pack(unpack(data, bits, count), bits).tobytes() == stream.to_bytes(used, "little")


@pytest.mark.parametrize("bits", BITS)
def test_unused_bits_are_zero(bits):
    packed = pack(np.full(3, 2**bits - 1, np.uint8), bits)
    assert int.from_bytes(packed.tobytes(), "little") == 2 ** (3 * bits) - 1


def test_what_bytes_may_come_in():
    codes = codes_of(21, 5)
    packed = pack(codes, 5)
    kept = packed.copy()
    packed.setflags(write=False)
    data = packed.tobytes()
    for form in (packed, data, bytearray(data), memoryview(data), data + b"more"):
        back = unpack(form, 5, 21)
        assert np.array_equal(back, codes)
        back[:] = 0
    assert np.array_equal(packed, kept)
    assert np.array_equal(pack(np.repeat(codes, 2)[::2], 5), packed)


@pytest.mark.parametrize(
    ("bits", "pinned"),
    [
        (1, "5505"),
        (2, "393939"),
        (3, "d5190fd501"),
        (4, "a54fe9832d07"),
        (5, "453d9afd404d5e"),
        (6, "85fad0993f22ad7403"),
        (7, "05d5939ef18d112de91d"),
        (8, "052a4f7499bee3082d5277"),
    ],
)
def test_the_bytes_are_pinned(bits, pinned):
    codes = ((np.arange(11) * 37 + 5) % 2**bits).astype(np.uint8)
    assert pack(codes, bits).tobytes().hex() == pinned
    assert np.array_equal(unpack(bytes.fromhex(pinned), bits, 11), codes)


# What it refuses


@pytest.mark.parametrize("bits", BITS)
def test_a_stream_that_is_too_short_is_named(bits):
    packed = pack(codes_of(9, bits), bits)
    with pytest.raises(FileError, match=f"9 codes of {bits} bits take {len(packed)} bytes but "):
        unpack(packed[:-1], bits, 9)
    with pytest.raises(FileError, match="but 0 are there"):
        unpack(b"", bits, 1)


def test_it_refuses():
    codes = np.array([0, 4, 1], np.uint8)
    with pytest.raises(ValueError, match="code 4 does not fit in 2 bits"):
        pack(codes, 2)
    with pytest.raises(TypeError, match="int64"):
        pack(codes.astype(np.int64), 8)
    with pytest.raises(ValueError, match="shape"):
        pack(codes[None], 8)
    for bits in (0, 9, -1):
        with pytest.raises(ValueError, match="1 to 8 bits"):
            pack(codes, bits)
        with pytest.raises(ValueError, match="1 to 8 bits"):
            unpack(b"abc", bits, 1)
    with pytest.raises(ValueError, match="-1 codes"):
        unpack(b"abc", 4, -1)
