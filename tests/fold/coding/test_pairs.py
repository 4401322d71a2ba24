"""What pairs lose is told from where they are rounded, and is what their records are off by."""

import numpy as np
import pytest
import torch

from lorafold.collection.batch import Block, Factors, decompose
from lorafold.fold.coding import record
from lorafold.fold.coding.bases import basis_of
from lorafold.fold.coding.pairs import Part
from lorafold.fold.coding.record import Target, code, decode

OUT, INN, RANK = 200, 136, 6


def factors(n=3, falling=0.2, seed=0):
    g = torch.Generator().manual_seed(seed)
    B, A = torch.randn(n, OUT, RANK, generator=g), torch.randn(n, RANK, INN, generator=g)
    return Factors(np.arange(n), B * torch.logspace(0, np.log10(falling), RANK), A)


def dense(f):
    return f.B.double() @ f.A.double()


def basis(d, rank, side):
    g = torch.Generator().manual_seed(d)
    Q = torch.linalg.qr(torch.randn(d, rank, generator=g))[0]
    return basis_of(Q, np.full(rank, 4), side)


@pytest.mark.parametrize("which", ["own", "U", "V", "both"])
@pytest.mark.parametrize(
    "bits", [[4] * 6, [8, 7, 5, 3, 2, 1], [3, 3, 0, 0, 4, 0], [0] * 6], ids=str
)
def test_the_measure_is_that_of_what_is_decoded(which, bits):
    U = basis(OUT, 12, "U") if which in ("U", "both") else None
    V = basis(INN, 9, "V") if which in ("V", "both") else None
    f = factors()
    left = f.B if U is None else U.coordinates(f.B)
    right = f.A if V is None else V.coordinates(f.A.mT).mT
    part = Part(*decompose(left, right), U, V)
    numbers = [(0 if U else None, 0 if V else None)] * 3
    levels = np.tile(np.array(bits), (3, 1))
    square, records = part.measured(levels, numbers)
    core = Factors(f.members, *part.unfolded(left, right))
    for k, data in enumerate(records.written()):
        back = decode(data, (OUT, INN), lambda side, *_: {"U": U, "V": V}[side].columns)
        lost = dense(core)[k] - back.B.double() @ back.A.double()
        assert float(square[k]) == pytest.approx(float(lost.square().sum()), rel=2e-5)
    # The same records as those that are measured the long way.
    assert part.coded(levels, numbers)[2].written() == records.written()


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 0.03])
def test_quick_ways_are_taken_where_they_hold_and_tell_no_less(monkeypatch, tolerance):
    f = factors(4)
    f.B[1, :, 1], f.A[1, 1] = -f.B[1, :, 0] + 1e-2 * f.B[1, :, 1], f.A[1, 0]  # a bad gauge
    f.B[3] = 0
    square = dense(f).square().sum((1, 2)).numpy()
    measured = []
    real = Part.measured

    def spy(self, bits, numbers):
        measured.append(len(bits))
        return real(self, bits, numbers)

    monkeypatch.setattr(Part, "measured", spy)
    coded = code(f, Target("error", tolerance**2 * square))
    assert measured == [2]
    for k, data in enumerate(coded.records):
        back = decode(data, (OUT, INN), None)
        lost = float((dense(f)[k] - back.B.double() @ back.A.double()).square().sum())
        assert lost <= coded.squared_error[k] * (1 + 1e-6) <= lost * (1 + 3e-4) + 1e-30
    # Known decompositions are not trusted, and small bounds take the long way.
    code(f, Target("error", tolerance**2 * square), block=f.decomposed())
    code(f, Target("error", 1e-4 * square))
    assert measured == [2]


def test_what_quick_grams_take_for_nothing_counts(monkeypatch):
    f = factors(1, falling=1e-5)
    amount = np.array([0.01 * float(dense(f).square().sum())])
    monkeypatch.setattr(record, "_ROUNDING", 0.0)
    coded = code(f, Target("error", amount))
    back = decode(coded.records[0], (OUT, INN), None)
    lost = float((dense(f)[0] - back.B.double() @ back.A.double()).square().sum())
    assert coded.squared_error[0] >= lost * (1 - 1e-5)
    assert isinstance(f.quickly_decomposed()[0], Block)
