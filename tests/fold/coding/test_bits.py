"""Allocation against trying every combination of levels, and the laws it rests on."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorafold.fold.coding.bits import LEVELS, bits_for_bytes, bits_for_error, predicted_error
from lorafold.fold.coding.codebook import DISTORTION, dequantise, quantise

energies = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=3)
fractions = st.floats(1e-12, 2)


def left_over(energy, pair, bits):
    """The formula, item by item."""
    total = 0.0
    for e, p, b in zip(energy, pair, bits, strict=True):
        d = DISTORTION[int(b)]
        total += e * (2 * d - d * d if p else d)
    return total


def every_choice(energy, cost, pair):
    """Bytes and squared error of each combination of levels."""
    choices = list(itertools.product(LEVELS, repeat=len(energy)))
    size = np.array([np.dot(choice, cost) for choice in choices])
    return size, np.array([left_over(energy, pair, choice) for choice in choices])


def random_items(n, seed=0):
    g = np.random.default_rng(seed)
    return (
        np.exp(4 * g.standard_normal(n)),
        g.choice([64.0, 96.0, 136.5], n),
        g.random(n) < 0.5,
    )


def test_gains_per_byte_fall_at_every_level():
    # What the greedy order rests on; without it steps would have to be joined.
    for pair in (False, True):
        f = [float(predicted_error([1.0], pair, [b])) for b in LEVELS]
        slopes = -np.diff(f) / np.diff(LEVELS)
        assert (slopes > 0).all()
        assert (np.diff(slopes) < 0).all()


@pytest.mark.parametrize("pair", [False, True])
@given(energies, fractions)
def test_at_one_cost_no_choice_is_smaller(pair, energy, fraction):
    n = len(energy)
    cost, kind, budget = np.full(n, 64.0), np.full(n, pair), fraction * sum(energy)
    bits = bits_for_error(energy, cost, kind, budget)
    size, error = every_choice(energy, cost, kind)
    assert left_over(energy, kind, bits) <= budget * (1 + 1e-9)
    best = size[error <= budget * (1 + 1e-12)].min()
    # Up to 8 bits all steps are of one size. A step to a float is up to 16 bits.
    assert bits @ cost <= best + (0 if bits.max() <= 8 else 15 * 64)


@given(energies, st.lists(st.sampled_from([1.0, 2.5, 7.0]), min_size=3, max_size=3), fractions)
def test_at_several_costs_no_choice_is_smaller_by_a_step(energy, cost, fraction):
    n = len(energy)
    cost, kind, budget = np.array(cost[:n]), np.arange(n) % 2 == 0, fraction * sum(energy)
    bits = bits_for_error(energy, cost, kind, budget)
    size, error = every_choice(energy, cost, kind)
    fits = error <= budget * (1 + 1e-12)
    if fits.any():
        assert left_over(energy, kind, bits) <= budget * (1 + 1e-9)
        step = cost.max() * (1 if bits.max() <= 8 else 16)
        assert bits @ cost < size[fits].min() + step
    else:
        assert (bits == 32).all()


@given(energies, st.lists(st.sampled_from([1.0, 2.5, 7.0]), min_size=3, max_size=3), st.data())
def test_no_choice_of_a_step_less_is_better(energy, cost, data):
    n = len(energy)
    cost, kind = np.array(cost[:n]), np.arange(n) % 2 == 0
    budget = data.draw(st.floats(0, 33 * float(cost.sum())))
    bits = bits_for_bytes(energy, cost, kind, budget)
    assert bits @ cost <= budget
    size, error = every_choice(energy, cost, kind)
    step = cost.max() * (1 if bits.max() < 8 else 16)
    mine = left_over(energy, kind, bits)
    assert mine <= error[(size <= budget - step) | (size == 0)].min() * (1 + 1e-9)


@given(energies, st.integers(0, 20))
def test_at_one_cost_no_choice_is_better(energy, steps):
    n = len(energy)
    cost, kind = np.full(n, 3.0), np.ones(n, dtype=bool)
    bits = bits_for_bytes(energy, cost, kind, 3.0 * min(steps, 7))
    size, error = every_choice(energy, cost, kind)
    best = error[size <= 3.0 * min(steps, 7)].min()
    assert left_over(energy, kind, bits) == pytest.approx(best, rel=1e-9)


def test_what_a_costly_step_leaves_is_spent_on_cheap_ones():
    # The first item gains most per byte, but not one bit of it fits.
    bits = bits_for_bytes([1e6, 1.0, 0.5], [100.0, 1.0, 1.0], False, 5)
    assert bits.tolist() == [0, 3, 2]


def test_what_a_late_step_makes_needless_is_taken_back():
    energy, cost = [1.0, 1e-3], [100.0, 0.01]
    # The second item gains more per byte and comes first. If then the first gets its bit, it alone
    # is enough, unless the budget is just short of that.
    assert bits_for_error(energy, cost, False, 0.3645).tolist() == [1, 0]
    assert bits_for_error(energy, cost, False, 0.3634).tolist() == [1, 4]


# Edges


def test_no_items():
    for allocate in (bits_for_error, bits_for_bytes):
        assert allocate([], [], [], 1.0).shape == (0,)
        assert allocate(np.zeros((3, 0)), 1.0, True, np.ones(3)).shape == (3, 0)
        assert allocate(np.zeros((0, 4)), np.ones(4), True, np.ones(0)).shape == (0, 4)


def test_a_zero_budget():
    energy = np.array([3.0, 0.0, 1e-9])
    assert bits_for_error(energy, 2.0, True, 0.0).tolist() == [32, 0, 32]
    assert bits_for_bytes(energy, 2.0, True, 0.0).tolist() == [0, 0, 0]


def test_a_budget_that_nothing_meets():
    assert bits_for_error([1.0, 1e-12], 1.0, False, 1e-17).tolist() == [32, 32]


def test_a_budget_that_needs_nothing():
    energy, cost, pair = random_items(50)
    assert not bits_for_error(energy, cost, pair, energy.sum()).any()
    assert bits_for_error(energy, cost, pair, 0.9999 * energy.sum()).any()


def test_all_bytes_that_can_be_spent():
    energy, cost, pair = random_items(50)
    energy[7] = 0
    bits = bits_for_bytes(energy, cost, pair, 1e12)
    assert (bits == np.where(np.arange(50) == 7, 0, 32)).all()


def test_items_without_energy_get_nothing():
    assert not bits_for_error(np.zeros(4), np.zeros(4), True, 0.0).any()
    assert not bits_for_bytes(np.zeros(4), 1.0, True, 1e9).any()
    assert bits_for_bytes([-0.0, 1.0, 0.0], 1.0, True, 1e9).tolist() == [0, 32, 0]


def test_ties_go_to_the_first_items():
    energy = np.full((2, 7), 2.0)
    assert bits_for_bytes(energy, 1.0, True, [3.0, 10.0]).tolist() == [
        [1, 1, 1, 0, 0, 0, 0],
        [2, 2, 2, 1, 1, 1, 1],
    ]
    budget = left_over(energy[0], [True] * 7, [4, 4, 3, 3, 3, 3, 3])
    assert bits_for_error(energy[0], 1.0, True, budget).tolist() == [4, 4, 3, 3, 3, 3, 3]


def test_a_known_allocation_is_pinned():
    energy = 0.5 ** np.arange(12.0)
    pair = np.arange(12) % 3 > 0
    bits = bits_for_error(energy, 512.0, pair, 0.01 * energy.sum())
    assert bits.tolist() == [6, 5, 5, 4, 4, 3, 2, 2, 0, 0, 0, 0]
    assert bits_for_bytes(energy, 512.0, pair, 512.0 * 24).tolist() == [
        5,
        5,
        4,
        3,
        3,
        3,
        1,
        0,
        0,
        0,
        0,
        0,
    ]


# Laws


@pytest.mark.parametrize("allocate", [bits_for_error, bits_for_bytes])
def test_rows_are_independent_and_padding_is_free(allocate):
    # So many that they do not fit in one block.
    items = [random_items(n, seed=n) for n in [*range(1, 40), 700, 900, 1500, 2000, 5000]]
    width = max(len(energy) for energy, _, _ in items)
    energy, cost, pair = (
        np.stack([np.pad(part, (0, width - len(part))) for part in parts])
        for parts in zip(*items, strict=True)
    )
    scale = energy.sum(1) if allocate is bits_for_error else cost.sum(1)
    budget = scale * np.geomspace(1e-6, 0.5, len(items)) * (1 if allocate is bits_for_error else 9)
    together = allocate(energy, cost, pair, budget)
    assert together.shape == energy.shape
    for row, limit, (e, c, p) in zip(together, budget, items, strict=True):
        assert row[: len(e)].tolist() == allocate(e, c, p, limit).tolist()
        assert not row[len(e) :].any()


@given(st.integers(1, 60), st.integers(0, 1000), st.floats(-9, 0.5), st.floats(0, 40))
def test_promises_hold(n, seed, exponent, average):
    energy, cost, pair = random_items(n, seed)
    budget = 10**exponent * energy.sum()
    bits = bits_for_error(energy, cost, pair, budget)
    assert np.isin(bits, LEVELS).all()
    assert predicted_error(energy, pair, bits) <= budget * (1 + 1e-9)
    bits = bits_for_bytes(energy, cost, pair, average * cost.sum())
    assert np.isin(bits, LEVELS).all()
    assert bits @ cost <= average * cost.sum()


@given(st.integers(1, 60), st.integers(0, 1000), st.floats(-6, 0))
def test_a_larger_budget_costs_no_more(n, seed, exponent):
    energy, _, pair = random_items(n, seed)
    budget = 10**exponent * energy.sum()
    tight, loose = (bits_for_error(energy, 64.0, pair, b) for b in (budget, 1.1 * budget))
    assert loose.sum() <= tight.sum()
    # Powers of two change no rounding.
    assert np.array_equal(bits_for_error(4 * energy, 64.0, pair, 4 * budget), tight)


def test_it_beats_the_same_bits_for_all():
    energy, cost, pair = 0.7 ** np.arange(40.0), np.full(40, 512.0), np.ones(40, dtype=bool)
    for average in (1, 2, 4):
        even = np.full(40, average)
        bits = bits_for_bytes(energy, cost, pair, average * cost.sum())
        assert bits.sum() == even.sum()
        gained = predicted_error(energy, pair, even) / predicted_error(energy, pair, bits)
        assert gained > 2


def test_the_prediction_is_what_coding_leaves():
    g = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, 8, 1500, generator=g, dtype=torch.float64)
    u, v = u / u.norm(dim=1, keepdim=True), v / v.norm(dim=1, keepdim=True)
    energy = 0.5 ** np.arange(8.0)
    bits = bits_for_error(energy, 1024.0, True, 0.05 * energy.sum())
    assert len(set(bits.tolist())) > 2
    left = 0.0
    for i, b in enumerate(bits.tolist()):
        if b == 0:
            left += energy[i]
            continue
        pieces = []
        for side in (u, v):
            codes, scales = quantise(side[i : i + 1], b)
            pieces.append(scales.double() * dequantise(codes, b, torch.float64)[0])
        exact, coded = torch.outer(u[i], v[i]), torch.outer(*pieces)
        left += energy[i] * float((exact - coded).square().sum())
    assert left == pytest.approx(float(predicted_error(energy, True, bits)), rel=0.02)


def test_predictions_of_batches():
    energy = np.array([[1.0, 2.0], [3.0, 4.0]])
    bits = np.array([[0, 1], [8, 32]])
    pair = np.array([True, False])
    expected = [left_over(e, pair, b) for e, b in zip(energy, bits, strict=True)]
    assert predicted_error(energy, pair, bits) == pytest.approx(expected, rel=1e-12)
    assert predicted_error([], [], []) == 0


# What it refuses


@pytest.mark.parametrize("allocate", [bits_for_error, bits_for_bytes])
def test_it_refuses(allocate):
    for bad in (np.nan, np.inf, -1.0):
        with pytest.raises(ValueError, match="every energy"):
            allocate([1.0, bad], 1.0, True, 1.0)
        with pytest.raises(ValueError, match="every cost"):
            allocate([1.0, 1.0], [1.0, bad], True, 1.0)
        with pytest.raises(ValueError, match="every budget"):
            allocate([1.0, 1.0], 1.0, True, bad)
    with pytest.raises(ValueError, match="must cost something"):
        allocate([1.0, 0.0], [0.0, 0.0], True, 1.0)
    with pytest.raises(ValueError, match="shape"):
        allocate(np.ones((2, 2, 2)), 1.0, True, 1.0)
    with pytest.raises(ValueError, match="broadcast"):
        allocate(np.ones((3, 2)), 1.0, True, [1.0, 2.0])


def test_predictions_refuse_other_numbers_of_bits():
    for bits in (9, -1, 33):
        with pytest.raises(ValueError, match="0, 1, 2, 3, 4, 5, 6, 7, 8, 16, 32"):
            predicted_error([1.0], True, [bits])
