import numpy as np
import pytest

from lorafold.fold.planning.averaging import Columns, averaged_bits

N, R, D = 10, 4, 64
S = np.linspace(2.0, 1.0, R) * np.ones((N, 1))
EVERYONE = np.ones(N, bool)


def basis(count, least=1e-3):
    return Columns(D, EVERYONE, N * np.geomspace(1.0, least, count))


def stored(bits, rate, other):
    """Bits and numbers of bases of these bits and of cores with `other` numbers on a free side."""
    ranks = [int((b > 0).sum()) for b in bits]
    k = min([R, *ranks])
    numbers = N * k * (sum(ranks) + other)
    return sum(D * b.sum() for b in bits) + rate * numbers, numbers + D * sum(ranks)


@pytest.mark.parametrize("average", [2, 2.5, 3, 4, 6])
@pytest.mark.parametrize("other", [0, D])
def test_the_average_is_spent(average, other):
    bases = [basis(12)] if other else [basis(12), basis(9)]
    bits, rate = averaged_bits(average, bases, S, np.full(N, other))
    spent, numbers = stored(bits, rate, other)
    assert spent == pytest.approx(average * numbers, rel=1e-9)
    assert all((np.diff(b) <= 0).all() and b[0] > 0 for b in bits)


def test_weak_columns_are_dropped_unless_all_are_wanted():
    faint = basis(12, least=1e-9)
    (few,), _ = averaged_bits(2, [faint], S, np.full(N, D))
    (every,), rate = averaged_bits(2, [faint], S, np.full(N, D), keep_all=True)
    assert few[-1] == 0
    assert few[0] > 1
    assert (every >= 1).all()
    spent, numbers = stored([every], rate, D)
    assert spent == pytest.approx(2 * numbers, rel=1e-9)


def test_columns_that_many_use_get_more_bits_than_cores():
    bits, rate = averaged_bits(3, [basis(8, least=0.5)], S, np.full(N, D))
    assert bits[0].min() > rate


def test_a_side_keeps_a_column_where_there_is_nothing_to_spend():
    bits, rate = averaged_bits(0.01, [basis(3), basis(3)], S, np.zeros(N))
    assert [b.tolist() for b in bits] == [[1, 0, 0], [1, 0, 0]]
    assert rate == 0
