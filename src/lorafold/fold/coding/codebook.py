"""Codebooks for normally distributed numbers, and rounding to them.

The 2^b levels of a Lloyd–Max codebook make the mean squared error of rounding a number from
N(0, 1) to the nearest level as small as it can be. Each level is then the mean of the numbers that
round to it, and each threshold lies midway between its two levels (Lloyd 1982, "Least squares
quantization in PCM"; Max 1960, "Quantizing for minimum distortion").

A row x is divided by its root mean square before it is rounded to levels q, and comes back as s·q
with s = ⟨x, q⟩ / ⟨q, q⟩, the scale of least squared error: D(b) ‖x‖² for normal x.

The levels are part of a file format: they are written out here, and a test works them out anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...collection.batch import held_by_float32
from ...errors import MismatchError

#: Bits b to D(b): the squared error of rounding a normally distributed vector, relative to its
#: squared norm. 0 leaves the vector out; 16 and 32 are float16 and float32 of numbers near 1.
DISTORTION: dict[int, float] = {
    0: 1.0,
    1: 0.363380227632,
    2: 0.117481847829,
    3: 0.0345477607885,
    4: 0.00950100800819,
    5: 0.00250466835567,
    6: 0.000644239665317,
    7: 0.000163478229980,
    8: 0.0000411850828670,
    16: 4.314e-8,
    32: 6.429e-16,
}

# The positive half of each codebook, b = 1 … 8, in the shortest digits that name the float32.
# fmt: off
_POSITIVE: tuple[tuple[float, ...], ...] = (
    (0.7978846,),
    (0.45278004, 1.5104176),
    (0.24509418, 0.7560053, 1.3439093, 2.1519456),
    (0.12839504, 0.3880483, 0.65675914, 0.94234043, 1.2562312, 1.6180464, 2.0690172, 2.7325895),
    (0.06588966, 0.19805183, 0.3313783, 0.4666995, 0.6049336, 0.7471357, 0.8945651, 1.0487833,
     1.2118044, 1.3863404, 1.576228, 1.7872332, 2.0287285, 2.3177395, 2.6911197, 3.2607324),
    (0.033409506, 0.10027829, 0.1672969, 0.23456699, 0.30219284, 0.37028265, 0.43894967,
     0.5083138, 0.578503, 0.6496556, 0.7219219, 0.7954677, 0.8704766, 0.94715494, 1.0257363,
     1.1064882, 1.1897202, 1.2757945, 1.365141, 1.4582764, 1.5558312, 1.6585889, 1.7675419,
     1.8839773, 2.0096111, 2.1468103, 2.2989812, 2.471305, 2.6722739, 2.9174068, 3.240437,
     3.7441013),
    (0.01682817, 0.050490864, 0.08417264, 0.11788628, 0.15164465, 0.18546072, 0.21934764,
     0.25331873, 0.28738755, 0.32156795, 0.35587403, 0.3903203, 0.42492166, 0.45969343,
     0.49465147, 0.5298122, 0.56519264, 0.6008105, 0.6366843, 0.6728333, 0.70927787, 0.74603915,
     0.78313965, 0.82060295, 0.8584542, 0.89671993, 0.9354285, 0.97461, 1.0142967, 1.0545232,
     1.0953267, 1.1367474, 1.1788286, 1.2216175, 1.2651651, 1.3095276, 1.3547662, 1.4009485,
     1.448149, 1.49645, 1.5459437, 1.5967331, 1.6489339, 1.702677, 1.7581115, 1.8154078,
     1.8747625, 1.9364046, 2.0006018, 2.0676715, 2.1379933, 2.2120275, 2.2903392, 2.3736343,
     2.4628115, 2.5590405, 2.6638865, 2.7795143, 2.9090471, 3.0572462, 3.231933, 3.4474304,
     3.7349367, 4.189694),
    (0.008446193, 0.025339384, 0.042234983, 0.059134603, 0.07603986, 0.092952356, 0.10987372,
     0.12680559, 0.14374956, 0.16070732, 0.17768049, 0.19467075, 0.21167976, 0.2287092,
     0.24576078, 0.26283622, 0.27993724, 0.2970656, 0.31422305, 0.3314114, 0.34863243, 0.365888,
     0.38317996, 0.40051022, 0.41788065, 0.4352932, 0.45274988, 0.47025266, 0.4878036, 0.5054048,
     0.5230583, 0.5407663, 0.55853105, 0.5763547, 0.5942396, 0.6121881, 0.6302026, 0.6482855,
     0.6664394, 0.68466675, 0.70297027, 0.72135264, 0.7398166, 0.75836504, 0.77700084, 0.795727,
     0.8145467, 0.833463, 0.8524793, 0.8715989, 0.8908253, 0.91016203, 0.92961293, 0.9491818,
     0.9688726, 0.98868936, 1.0086365, 1.0287182, 1.0489392, 1.0693042, 1.0898181, 1.110486,
     1.1313132, 1.1523054, 1.1734682, 1.1948076, 1.2163299, 1.2380418, 1.2599499, 1.2820615,
     1.304384, 1.3269253, 1.3496937, 1.3726976, 1.3959464, 1.4194493, 1.4432166, 1.4672587,
     1.491587, 1.5162132, 1.5411496, 1.5664098, 1.5920075, 1.6179578, 1.6442765, 1.6709803,
     1.6980875, 1.7256169, 1.7535894, 1.7820269, 1.8109531, 1.8403933, 1.8703752, 1.900928,
     1.9320842, 1.9638784, 1.9963485, 2.0295358, 2.0634851, 2.0982466, 2.1338742, 2.1704283,
     2.2079754, 2.24659, 2.2863545, 2.3273618, 2.3697171, 2.4135387, 2.4589622, 2.5061426,
     2.5552595, 2.6065214, 2.660174, 2.7165077, 2.7758706, 2.8386858, 2.905473, 2.9768822,
     3.053742, 3.1371326, 3.2285001, 3.3298485, 3.4440718, 3.575588, 3.7316663, 3.9256377,
     4.1865954, 4.6035357),
)
# fmt: on

# Rounding looks numbers up by cell: [-8, 8) in cells of 1/64, each with at most one threshold in it
# (of 8 bits, those in the middle are 1/59 apart). Some ten times as fast as a search.
_CELLS_PER_UNIT = 64
_CELLS = 1024

# Up to so many bits all positive thresholds are gone through, which is faster yet.
_COMPARED = 5

# On the CPU rows pass in blocks that stay in the cache.
_CPU_BLOCK = 1 << 17
_DEVICE_BLOCK = 1 << 24
_RUN = 1 << 13  # numbers that are worth calls of their own

Ints = npt.NDArray[np.int64]


def codebook(bits: int, device: torch.device | str | None = None) -> Tensor:
    """The levels of a codebook, ascending: level k is minus level 2**bits - 1 - k.

    Args:
        bits: 1 … 8.
        device: where the result lies; the CPU if not given.

    Returns:
        `(2**bits,)` float32.

    Raises:
        ValueError: `bits` is out of range.

    Examples:
        >>> codebook(1)
        tensor([-0.7979,  0.7979])
    """
    return _levels(bits, torch.device(device or "cpu"), torch.float32).clone()


def thresholds(bits: int, device: torch.device | str | None = None) -> Tensor:
    """What separates the levels: a number is of level k if it exceeds exactly k thresholds.

    Args:
        bits: 1 … 8.
        device: where the result lies; the CPU if not given.

    Returns:
        `(2**bits - 1,)` float32, ascending.

    Raises:
        ValueError: `bits` is out of range.

    Examples:
        >>> thresholds(2)
        tensor([-0.9816,  0.0000,  0.9816])
    """
    levels = codebook(bits, device)
    return (levels[:-1] + levels[1:]) / 2


def quantise(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The nearest levels of rows that were divided by their root mean squares, and their scales.

    Args:
        x: `(n, d)` of any floating-point type on any device; it is not changed.
        bits: 1 … 8.

    Returns:
        Codes `(n, d)` uint8 and scales `(n,)` float32: row i is close to `scales[i]` times row i of
        `dequantise(codes, bits)`. The scale of a zero row is 0.

    Raises:
        MismatchError: a row holds NaN or infinity.
        ValueError: x has not two axes or `bits` is out of range.

    Examples:
        >>> codes, scales = quantise(torch.tensor([[2.0, -2.0, 2.0]]), bits=1)
        >>> scales[:, None] * dequantise(codes, bits=1)
        tensor([[ 2., -2.,  2.]])
    """
    if x.ndim != 2:
        raise ValueError(f"rows to quantise have the shape (n, d), not {tuple(x.shape)}")
    _levels(bits, x.device, torch.float32)  # other numbers of bits are refused
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    levels = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    return codes, round_into(x, np.full(len(x), bits), codes, levels)


def round_into(x: Tensor, bits: Ints, codes: Tensor, levels: Tensor) -> Tensor:
    """As `quantise`, each row at its own number of bits: the scales; codes, and float32 levels as
    of `dequantise`, are written to tensors that are there.

    Args:
        bits: (n,) of 0 … 8; at 0 a row's codes, levels and scale are 0.
    """
    width = max(1, x.shape[1])
    scales = torch.empty(len(x), dtype=torch.float32, device=x.device)
    room, run = (_CPU_BLOCK, _RUN) if x.device.type == "cpu" else (_DEVICE_BLOCK, _DEVICE_BLOCK)
    rows = max(1, room // width)
    for start in range(0, len(x), rows):
        here = slice(start, start + rows)
        part, near = x[here].detach(), levels[here]
        rms = _root_mean_squares(part, start)
        size = rms.to(torch.promote_types(part.dtype, torch.float32))
        # Rows of zeros stay as they are, and so do those whose size is below the smallest float.
        size = torch.where(size > 0, size, 1.0)
        unit = (part / size[:, None]).float()
        for level, some in _alike(bits[here], run // width):
            _nearest_levels(unit, level, some, codes[here], near)
        fit = unit.mul_(near).sum(1) / torch.linalg.vecdot(near, near)
        there = (rms > 0) & torch.from_numpy(bits[here] > 0).to(x.device)
        scales[here] = torch.where(there, fit * size, 0.0)
    return scales


def _alike(bits: Ints, run: int) -> Iterator[tuple[int, Any]]:
    """Rows of one number of bits, with it: runs of them, unless these are shorter than `run`."""
    edges = (np.flatnonzero(np.diff(bits)) + 1).tolist()
    if len(edges) * run <= len(bits):
        for start, stop in zip([0, *edges], [*edges, len(bits)], strict=True):
            yield int(bits[start]), slice(start, stop)
        return
    for level in np.unique(bits).tolist():
        yield level, np.flatnonzero(bits == level)


def _nearest_levels(unit: Tensor, bits: int, rows: Any, codes: Tensor, levels: Tensor) -> None:
    """Write codes and levels of some rows of units."""
    if bits == 0:
        codes[rows], levels[rows] = 0, 0.0
        return
    code = codes[rows] = _codes(unit[rows], bits)
    if isinstance(rows, slice):
        _decode(code, bits, levels[rows])
    else:
        levels[rows] = _look_up(_levels(bits, code.device, torch.float32), code)


def _root_mean_squares(x: Tensor, first: int) -> Tensor:
    """Of rows, (n,) float64; the first of them is number `first` to whom is told of a bad one."""
    if x.dtype == torch.float32:
        squares = torch.linalg.vecdot(x, x).double()
        if bool(held_by_float32(squares).all()):
            near: Tensor = (squares / x.shape[1]).sqrt()
            return near
    # In float64 the squares of float32 numbers neither vanish nor overflow.
    norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
    finite = torch.isfinite(norms)
    if not bool(finite.all()):
        raise MismatchError(
            f"row {first + int(torch.nonzero(~finite)[0])} holds NaN or infinity, which no "
            "codebook has a level for: mend the tensor it came from"
        )
    rms: Tensor = norms / max(1, x.shape[1]) ** 0.5
    return rms


def dequantise(codes: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The levels that codes stand for, not scaled.

    Args:
        codes: uint8 of any shape, below 2**bits.
        bits: 1 … 8.
        dtype: of the result.

    Returns:
        A tensor of the shape and on the device of `codes`.

    Raises:
        IndexError: a code is too large (on the CPU).
        ValueError: `bits` is out of range.

    Examples:
        >>> dequantise(torch.tensor([0, 3], dtype=torch.uint8), bits=2)
        tensor([-1.5104,  1.5104])
    """
    table = _levels(bits, codes.device, dtype)
    if dtype != torch.float32 or codes.device.type != "cpu":
        return _look_up(table, codes)
    if codes.numel() and int(codes.max()) >> bits:
        raise IndexError(f"code {int(codes.max())} does not fit in {bits} bits")
    levels = torch.empty(codes.shape, dtype=torch.float32, device="cpu")
    _decode(codes.to(torch.uint8), bits, levels)
    return levels


def _decode(codes: Tensor, bits: int, levels: Tensor) -> None:
    """Write the levels of uint8 codes of some bits into a contiguous tensor; on the CPU, where each
    look-up takes its time, two at a time.
    """
    if codes.device.type != "cpu":
        levels.copy_(_look_up(_levels(bits, codes.device, torch.float32), codes))
        return
    flat, found = codes.contiguous().view(-1).numpy(), levels.view(-1).numpy()
    if len(flat) % 2:
        np.take(_levels(bits, codes.device, torch.float32).numpy(), flat, out=found, mode="clip")
    else:
        flat, found = flat.view(np.uint16), found.view(np.float64)
        np.take(_pairs(bits), flat, out=found, mode="clip")


@lru_cache(maxsize=8)
def _pairs(bits: int) -> npt.NDArray[np.float64]:
    """Every two levels as one number of twice the size, by their codes read as one number."""
    levels = np.zeros(256, np.float32)
    levels[: 1 << bits] = _levels(bits, torch.device("cpu"), torch.float32).numpy()
    codes = np.arange(256 << bits).astype(np.uint16).view(np.uint8)
    return levels[codes].view(np.float64)


@lru_cache(maxsize=64)
def _levels(bits: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`codebook`, shared by all calls, never written to."""
    if not 1 <= bits <= 8:
        raise ValueError(f"a codebook has 1 to 8 bits, not {bits}")
    positive = _POSITIVE[bits - 1]
    both = [-level for level in reversed(positive)] + list(positive)
    return torch.tensor(both, dtype=torch.float32, device="cpu").to(device, dtype)


@lru_cache(maxsize=64)
def _cells(bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each cell, how many thresholds lie in lower cells, and the one inside, or infinity."""
    border = thresholds(bits)
    place = _cell(border).long()
    inside = torch.full((_CELLS,), torch.inf, dtype=torch.float32, device="cpu")
    inside = inside.index_copy(0, place, border)
    below = torch.searchsorted(place, torch.arange(_CELLS, device="cpu")).to(torch.uint8)
    return below.to(device), inside.to(device)


def _cell(x: Tensor) -> Tensor:
    # Rounding cannot swap two numbers, so one in a later cell than a threshold lies above it.
    return (x * _CELLS_PER_UNIT).add_(_CELLS // 2).clamp_(0, _CELLS - 1).to(torch.int32)


def _codes(x: Tensor, bits: int) -> Tensor:
    """How many thresholds each number exceeds; one that is equal may count or not."""
    if bits > _COMPARED or x.device.type != "cpu":
        return _nearest(x, *_cells(bits, x.device))
    # By its size a number is so many levels above the middle, or below it.
    half, numbers = 1 << (bits - 1), x.numpy()
    size, beyond = np.abs(numbers), np.empty(x.shape, bool)
    codes = np.zeros(x.shape, np.uint8)
    for border in _borders(bits)[half:]:
        codes += np.greater(size, border, out=beyond).view(np.uint8)
    codes ^= np.greater(numbers, 0, out=beyond).view(np.uint8) + np.uint8(half - 1)
    return torch.from_numpy(codes)


@lru_cache(maxsize=8)
def _borders(bits: int) -> list[np.float32]:
    return list(thresholds(bits).numpy())


def _nearest(x: Tensor, below: Tensor, inside: Tensor) -> Tensor:
    cell = _cell(x)
    code, border = _look_up(below, cell), _look_up(inside, cell)
    if x.device.type == "cpu":  # some five times as fast in numpy
        code += torch.from_numpy(np.greater(x.numpy(), border.numpy()))
    else:
        code += x > border
    return code


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """`table[index]`, several times as fast for a small table."""
    return table.index_select(0, index.reshape(-1).int()).view(index.shape)
