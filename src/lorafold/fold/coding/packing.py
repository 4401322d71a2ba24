"""Codes of 1 to 8 bits laid end to end.

Code k takes bits k·b … k·b + b - 1 of the stream, least significant bit first; bit j of the stream
is bit j mod 8 of byte ⌊j / 8⌋. Unused bits of the last byte are 0. The layout is part of a file
format.

Eight codes fill b bytes. They move together as one 64-bit word, in three steps: the two halves of
every 16 bits are pushed together, then those of every 32 bits, then those of all 64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import FileError

Bytes = npt.NDArray[np.uint8]

# Words pass in blocks that stay in the cache.
_BLOCK = 1 << 14


def packed_nbytes(count: int, bits: int) -> int:
    """How many bytes `count` codes of `bits` bits take, without any padding but to a whole byte.

    Raises:
        ValueError: `bits` is not 1 … 8 or `count` is negative.

    Examples:
        >>> packed_nbytes(count=3, bits=3)
        2
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, not {bits}")
    if count < 0:
        raise ValueError(f"there cannot be {count} codes")
    return (count * bits + 7) // 8


def pack(codes: Bytes, bits: int) -> Bytes:
    """Codes as a stream of bits.

    Args:
        codes: `(count,)` uint8, each below 2**bits.
        bits: 1 … 8.

    Returns:
        `(packed_nbytes(count, bits),)` uint8.

    Raises:
        TypeError: the codes are not uint8.
        ValueError: a code is too large, `codes` is not flat or `bits` is out of range.

    Examples:
        >>> pack(np.array([1, 2, 3], dtype=np.uint8), bits=4).tobytes().hex()
        '2103'
    """
    if codes.dtype != np.uint8:
        raise TypeError(f"codes are uint8, not {codes.dtype}")
    if codes.ndim != 1:
        raise ValueError(f"codes to pack have the shape (count,), not {codes.shape}")
    size, groups = packed_nbytes(len(codes), bits), -(-len(codes) // 8)
    if size and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit in {bits} bits")
    out = np.empty((groups, bits), np.uint8)
    for start in range(0, groups, _BLOCK):
        part = codes[8 * start : 8 * (start + _BLOCK)]
        if len(part) % 8:
            part = np.pad(part, (0, -len(part) % 8))
        words = np.ascontiguousarray(part).view("<u8")
        for step in range(3):
            lower, gap = _lower(8 << step, step), np.uint64((8 - bits) << step)
            higher = words & ~lower
            higher >>= gap
            words = words & lower
            words |= higher
        _lowest(out[start : start + _BLOCK], bits)[:] = _lowest(words.astype("<u8"), bits)
    return out.reshape(-1)[:size]


def unpack(data: Bytes | bytes | bytearray | memoryview, bits: int, count: int) -> Bytes:
    """The codes that `pack` made a stream of.

    Args:
        data: at least `packed_nbytes(count, bits)` bytes; more are not looked at.
        bits: 1 … 8.
        count: how many codes to read.

    Returns:
        `(count,)` uint8, each below 2**bits.

    Raises:
        FileError: `data` is too short.
        ValueError: `bits` or `count` is out of range.

    Examples:
        >>> unpack(bytes.fromhex("2103"), bits=4, count=3)
        array([1, 2, 3], dtype=uint8)
    """
    size = packed_nbytes(count, bits)
    stream = np.frombuffer(data, np.uint8)
    if len(stream) < size:
        raise FileError(
            f"{count} codes of {bits} bits take {size} bytes but {len(stream)} are there: "
            "the file is cut short or damaged, copy it again"
        )
    groups = -(-count // 8)
    out = np.empty(8 * groups, np.uint8)
    for start in range(0, groups, _BLOCK):
        part = stream[bits * start : min(bits * (start + _BLOCK), size)]
        if len(part) % bits:
            part = np.pad(part, (0, -len(part) % bits))
        words = np.zeros(len(part) // bits, "<u8")
        _lowest(words, bits)[:] = part.view(f"V{bits}")
        for step in (2, 1, 0):
            lower, gap = _lower(bits << step, step), np.uint64((8 - bits) << step)
            higher = words & ~lower
            higher <<= gap
            words &= lower
            words |= higher
        out[8 * start : 8 * (start + _BLOCK)] = words.view(np.uint8)
    return out[:count]


def _lowest(words: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
    """The first bytes of each word, or of each row of bytes, as one item each."""
    return np.ndarray(len(words), f"V{count}", words, strides=words.strides[:1])


def _lower(used: int, step: int) -> np.uint64:
    """A mask of the `used` lowest bits in every 16, 32 or 64, as the step is 0, 1 or 2."""
    width = 16 << step
    return np.uint64(sum(((1 << used) - 1) << at for at in range(0, 64, width)))
