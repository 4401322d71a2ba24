"""How many bits each coded component gets.

An item is one component with the squared norm e that it carries and the bytes c that each bit of it
takes: a single vector, or a pair u vᵀ of unit vectors that share their number of bits b. With D(b)
the distortion of the codebooks, coding leaves the squared error e·f(b), where

    f(b) = D(b)  for a single vector,    f(b) = 1 - (1 - D(b))²  for a pair.

Going one level up removes e·(f(b) - f(b')) for c·(b' - b) bytes. This gain per byte falls from
level to level, so taking the steps in its order, whatever item they belong to, gives the least
error for the bytes spent (Shoham and Gersho 1988, "Efficient bit allocation for an arbitrary set of
quantizers"): one sort and one cumulative sum. What is left between the last step and the budget is
a knapsack: there the nearest steps are tried one at a time.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .codebook import DISTORTION

#: The numbers of bits there are; 16 and 32 are floats.
LEVELS: tuple[int, ...] = tuple(DISTORTION)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_BITS = np.array(LEVELS, dtype=np.int64)
_WIDTH = np.diff(_BITS).astype(np.float64)
_STEPS = len(LEVELS) - 1

# Row 0 for a single vector, row 1 for a pair. Near D = 1e-16, 1 - (1 - D)² would be all rounding.
_SINGLE = np.array([DISTORTION[bits] for bits in LEVELS])
_FRACTION = np.stack([_SINGLE, _SINGLE * (2 - _SINGLE)])

# What each step removes of the energy, and what one bit of it removes.
_DROP = _FRACTION[:, :-1] - _FRACTION[:, 1:]
_SLOPE = _DROP / _WIDTH

# Rows pass in blocks of about this many steps, which stay in the cache.
_BLOCK = 1 << 15

# How many steps before or after the last are tried.
_WINDOW = 64

# Sums of the same numbers in another order differ by less.
_ROUNDING = 1e-12


def bits_for_error(
    energy: npt.ArrayLike, cost: npt.ArrayLike, pair: npt.ArrayLike, budget: npt.ArrayLike
) -> Ints:
    """The fewest bytes whose predicted squared error is within a budget.

    Args:
        energy: `(n,)`, or `(N, n)` for N independent allocations; squared norms ≥ 0. Items of
            energy 0, such as padding, get 0 bits.
        cost: bytes per bit of each item, > 0 wherever there is energy; broadcast to `energy`.
        pair: whether each item is a pair; broadcast to `energy`.
        budget: the largest sum of e·f(b): one number, or `(N,)`.

    Returns:
        Bits of the shape of `energy`, each one of `LEVELS`; 32 for all items with energy where the
        budget cannot be met.

    Raises:
        ValueError: a number is negative or not finite, or shapes don't fit.

    Examples:
        >>> bits_for_error([4.0, 1.0], [512.0, 512.0], [True, True], budget=0.1)
        array([5, 3])
    """
    return _allocate(energy, cost, pair, budget, of_error=True)


def bits_for_bytes(
    energy: npt.ArrayLike, cost: npt.ArrayLike, pair: npt.ArrayLike, budget_bytes: npt.ArrayLike
) -> Ints:
    """The least predicted squared error that a number of bytes can buy.

    Args:
        energy: `(n,)`, or `(N, n)` for N independent allocations; squared norms ≥ 0. Items of
            energy 0, such as padding, get 0 bits.
        cost: bytes per bit of each item, > 0 wherever there is energy; broadcast to `energy`.
        pair: whether each item is a pair; broadcast to `energy`.
        budget_bytes: the largest sum of c·b, never exceeded: one number, or `(N,)`.

    Returns:
        Bits of the shape of `energy`, each one of `LEVELS`.

    Raises:
        ValueError: a number is negative or not finite, or shapes don't fit.

    Examples:
        >>> bits_for_bytes([4.0, 1.0], [512.0, 512.0], [True, True], budget_bytes=3072)
        array([4, 2])
    """
    return _allocate(energy, cost, pair, budget_bytes, of_error=False)


def predicted_error(
    energy: npt.ArrayLike, pair: npt.ArrayLike, bits: npt.ArrayLike
) -> np.float64 | Floats:
    """The squared error that coding is expected to leave, Σ e·f(b) over the last axis.

    Args:
        energy: `(..., n)` squared norms.
        pair: whether each item is a pair; broadcast to `energy`.
        bits: `(..., n)`, each one of `LEVELS`.

    Returns:
        One number for each allocation, `(...)`.

    Raises:
        ValueError: a number of bits is not one of `LEVELS`.

    Examples:
        >>> round(float(predicted_error([4.0, 1.0], False, [2, 0])), 3)
        1.47
    """
    wanted = np.asarray(bits, dtype=np.int64)
    level = np.searchsorted(_BITS, wanted).clip(max=_STEPS)
    if (_BITS[level] != wanted).any():
        raise ValueError(f"numbers of bits are {', '.join(map(str, LEVELS))}, not all of {wanted}")
    kind = np.asarray(pair, dtype=bool).astype(np.int64)
    left = np.asarray(energy, dtype=np.float64) * _FRACTION[kind, level]
    total: np.float64 | Floats = left.sum(-1)
    return total


def _allocate(
    energy: npt.ArrayLike,
    cost: npt.ArrayLike,
    pair: npt.ArrayLike,
    budget: npt.ArrayLike,
    *,
    of_error: bool,
) -> Ints:
    e = np.asarray(energy, dtype=np.float64)
    if e.ndim not in (1, 2):
        raise ValueError(f"energies have the shape (n,) or (N, n), not {e.shape}")
    c = np.broadcast_to(np.asarray(cost, dtype=np.float64), e.shape)
    kind = np.broadcast_to(np.asarray(pair, dtype=bool), e.shape).astype(np.int64)
    limit = np.broadcast_to(np.asarray(budget, dtype=np.float64), e.shape[:-1])
    for name, numbers in (("energy", e), ("cost", c), ("budget", limit)):
        # Written so that NaN fails too.
        if not ((numbers >= 0) & (numbers < np.inf)).all():
            raise ValueError(f"every {name} must be a finite number ≥ 0")
    e = e + 0.0  # The bits of -0.0 would sort above all other numbers.
    if (c[e > 0] == 0).any():
        raise ValueError("an item with energy must cost something")
    shape, n = e.shape, e.shape[-1]
    if not e.size:
        return np.zeros(shape, dtype=np.int64)
    e, c, kind, limit = e.reshape(-1, n), c.reshape(-1, n), kind.reshape(-1, n), limit.ravel()
    level = np.zeros(e.shape, dtype=np.int64)
    near = np.zeros((len(e), min(_WINDOW, n * _STEPS)), dtype=np.int64)
    spare = np.zeros(len(e))
    rows = max(1, _BLOCK // (n * _STEPS))
    for start in range(0, len(e), rows):
        here = slice(start, start + rows)
        part = (e[here], c[here], kind[here], limit[here])
        level[here], near[here], spare[here] = _greedy(*part, of_error)
    _settle(level, near, spare, e, c, kind, of_error)
    return np.take(_BITS, level).reshape(shape)


def _greedy(
    energy: Floats, cost: Floats, kind: Ints, limit: Floats, of_error: bool
) -> tuple[Ints, Ints, Floats]:
    """What the sorted steps give.

    Step n·s + i takes item i from level s to s + 1.

    Returns:
        The level of each item `(N, n)`, the steps nearest to the last one taken `(N, 64)`, -1 where
        there is none, and what the budget has to spare `(N,)`.
    """
    count, n = energy.shape
    slope = _of_steps(_SLOPE, kind, energy / np.where(cost > 0, cost, 1.0))
    keys, mask = _keys(slope)
    order = np.sort(keys, axis=1)
    index = order & mask
    row = np.arange(count)[:, None]
    sums = np.zeros((count, n * _STEPS + 1))
    if of_error:
        # Summed from the small end: differences of large sums would lose a small error.
        gain = _of_steps(_DROP, kind, energy).take(index + row * (n * _STEPS))
        sums[:, -1] = (energy * _FRACTION[kind, -1]).sum(1)
        gain[:, -1] += sums[:, -1]
        np.cumsum(gain[:, ::-1], axis=1, out=sums[:, -2::-1])
        limit = limit * (1 + _ROUNDING)
        taken = np.count_nonzero(sums[:, :-1] > limit[:, None], axis=1)
    else:
        price = (cost[:, None, :] * _WIDTH[:, None]).take(index + row * (n * _STEPS))
        np.cumsum(price, axis=1, out=sums[:, 1:])
        taken = np.count_nonzero(sums[:, 1:] <= limit[:, None], axis=1)
    useful = np.count_nonzero(slope, axis=1)[:, None]
    taken = np.minimum(taken[:, None], useful)
    done = (keys <= order[row, np.maximum(taken - 1, 0)]) & (taken > 0)
    level = np.add.reduce(done.view(np.int8).reshape(count, _STEPS, n), axis=1, dtype=np.int8)
    distance = np.arange(min(_WINDOW, n * _STEPS))
    place = taken - 1 - distance if of_error else taken + distance
    inside = (place >= 0) & (place < useful)
    near = np.where(inside, index[row, np.where(inside, place, 0)], -1)
    return level.astype(np.int64), near, limit - sums[row, taken][:, 0]


def _of_steps(table: Floats, kind: Ints, scale: Floats) -> Floats:
    """The entry of a table `(2, 10)` for each step, times the scale of its item: `(N, 10 n)`."""
    values = np.where(kind[:, None, :] == 1, table[1, :, None], table[0, :, None])
    values *= scale[:, None, :]
    return values.reshape(len(values), -1)


def _keys(slope: Floats) -> tuple[Ints, np.int64]:
    """Distinct integers that sort by falling slope, then by number, and a mask to get the number.

    The bits of floats ≥ 0 sort like the floats. The number takes the place of the lowest ones:
    sorting integers is several times as fast as finding a stable order of floats, and gives the
    same result on every machine.
    """
    mask = np.int64((1 << slope.shape[1].bit_length()) - 1)
    falling = np.float64(np.inf).view(np.int64) - slope.view(np.int64)
    return (falling & ~mask) | np.arange(slope.shape[1]), mask


def _settle(
    level: Ints, near: Ints, spare: Floats, energy: Floats, cost: Floats, kind: Ints, undo: bool
) -> None:
    """Undo what can be missed of the last steps, or take what still fits of the next; in place."""
    row = np.arange(len(level))
    at, item = np.divmod(near, level.shape[1])
    if undo:
        amount = _DROP[kind[row[:, None], item], at] * energy[row[:, None], item]
    else:
        amount = _WIDTH[at] * cost[row[:, None], item]
    amount[near < 0] = np.inf
    # What does not fit at first will not fit later.
    for column in np.flatnonzero((amount <= spare[:, None]).any(0)):
        # Of the steps of one item the one that has to go first is met first, and is the smallest.
        change = amount[:, column] <= spare
        level[row, item[:, column]] += np.where(change, -1 if undo else 1, 0)
        spare -= np.where(change, amount[:, column], 0.0)
