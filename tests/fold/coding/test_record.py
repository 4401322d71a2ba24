"""One adapter at one module as bytes: whatever the parts, they decode to the update."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorafold.collection.batch import Block, decompose
from lorafold.errors import FileError
from lorafold.fold.coding import rows
from lorafold.fold.coding.bases import basis_of
from lorafold.fold.coding.record import (
    Target,
    code,
    decode,
    decode_together,
    exact_record,
    predicted_nbytes,
)
from lorafold.lowrank import LowRank

OUT, INN = 48, 36


def block_of(updates):
    r = max(u.rank for u in updates)
    B, A = torch.zeros(len(updates), *(updates[0].shape[0], r)), torch.zeros(len(updates), r, INN)
    for k, u in enumerate(updates):
        B[k, :, : u.rank], A[k, : u.rank] = u.scale * u.B, u.A
    return Block(np.arange(len(updates)), *decompose(B, A))


def random_basis(d, rank, side, bits=6):
    g = torch.Generator().manual_seed(d + rank)
    return basis_of(
        torch.linalg.qr(torch.randn(d, rank, generator=g))[0], np.full(rank, bits), side
    )


@pytest.fixture
def updates(make_update):
    return [make_update(OUT, INN, r, seed=r, scale=0.7) for r in (2, 5, 1)]


@pytest.fixture
def bases():
    return {"U": random_basis(OUT, 7, "U"), "V": random_basis(INN, 9, "V")}


def lookup(bases):
    def basis(side, number, count):
        assert number == {"U": 3, "V": 4}[side]
        assert count == bases[side].rank
        return bases[side].columns

    return basis


def sides_of(bases, which):
    U = bases["U"] if which in ("U", "both") else None
    V = bases["V"] if which in ("V", "both") else None
    return [(3 if U else None, 4 if V else None)] * 3, U, V


def dense_error(u, W):
    return float((u.scale * u.B.double() @ u.A.double() - W).square().sum())


@pytest.mark.parametrize("which", ["own", "U", "V", "both"])
@pytest.mark.parametrize("tolerance", [0.5, 0.1, 1e-3])
def test_the_error_is_within_the_target_and_as_stated(updates, bases, dense, which, tolerance):
    block = block_of(updates)
    norms = np.array([float(dense(u).square().sum()) for u in updates])
    target = Target("error", tolerance**2 * norms)
    coded = code(block.factors(), target, *sides_of(bases, which), block=block)
    for k, u in enumerate(updates):
        back = decode(coded.records[k], (OUT, INN), lookup(bases))
        assert (back.shape, back.scale) == ((OUT, INN), 1.0)
        assert back.A.dtype == back.B.dtype == torch.float32
        measured = dense_error(back, dense(u))
        assert abs(measured - coded.squared_error[k]) < 1e-3 * measured + 1e-10 * norms[k]
        # Prediction is statistical; the builder codes again what overshoots.
        assert measured < 1.3 * target.amount[k]


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("which", ["own", "U", "both"])
def test_floats_lose_only_what_the_sides_miss(updates, bases, dense, bits, which):
    ids, U, V = sides_of(bases, which)
    coded = code(block_of(updates).factors(), Target("bits", np.full(3, float(bits))), ids, U, V)
    for k, u in enumerate(updates):
        W = dense(u)
        best = W
        for basis, side in ((U, 0), (V, 1)):
            if basis is not None:
                Q = torch.linalg.qr(basis.columns.double())[0]
                best = Q @ (Q.T @ best) if side == 0 else best @ Q @ Q.T
        back = decode(coded.records[k], (OUT, INN), lookup(bases))
        assert dense_error(back, best) < (1e-3 if bits == 16 else 1e-5) ** 2 * float(
            W.square().sum()
        )


def test_more_bytes_never_mean_more_error(updates):
    block = block_of(updates)
    errors = [
        code(block.factors(), Target("bytes", np.full(3, b))).squared_error
        for b in (40.0, 120.0, 400.0)
    ]
    assert (np.diff(errors, axis=0) <= 0).all()


def test_zero_updates_take_no_bytes_and_come_back_as_zero(make_update):
    zero = LowRank(torch.ones(2, INN), torch.zeros(OUT, 2))
    coded = code(block_of([zero, make_update(OUT, INN, 2)]).factors(), Target("error", np.zeros(2)))
    assert coded.records[0] == b""
    assert coded.squared_error[0] == 0
    back = decode(coded.records[0], (OUT, INN), None)
    assert (back.rank, back.norm()) == (1, 0)
    assert decode(b"\0", (OUT, INN), None).norm() == 0


def test_a_hopeless_target_gives_floats(make_update):
    u = make_update(OUT, INN, 3)
    coded = code(block_of([u]).factors(), Target("error", np.zeros(1)))
    assert dense_error(decode(coded.records[0], (OUT, INN), None), u.dense().double()) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_exact_records_keep_every_bit(make_update, dtype):
    u = make_update(OUT, INN, 3, scale=1 / 3, dtype=dtype)
    record = exact_record(u)
    back = decode(record, (OUT, INN), None)
    assert back.A.dtype == dtype
    assert torch.equal(back.A, u.A)
    assert torch.equal(back.B, u.B)
    assert back.scale == u.scale
    size = (u.A.numel() + u.B.numel()) * u.A.element_size()
    assert size < len(record) < size + 210


def test_exact_records_of_views():
    buffer = torch.randn(2 * INN, generator=torch.Generator().manual_seed(0))
    overlapping = LowRank(buffer.view(2, INN), buffer[:OUT].view(OUT // 2, 2))
    turned = LowRank(torch.randn(INN, 3).T, torch.randn(3, OUT).T)
    for u in (overlapping, turned):
        back = decode(exact_record(u), u.shape, None)
        assert torch.equal(back.A, u.A)
        assert torch.equal(back.B, u.B)


def test_an_unknown_part_is_an_error():
    with pytest.raises(FileError, match="unknown kind 9"):
        decode(b"\x09", (OUT, INN), None)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=6), st.floats(1e-9, 1e7))
def test_predicted_bytes_fall_with_the_budget(energy, budget):
    e = np.array([energy, energy])
    tight, loose = predicted_nbytes(e, np.full(len(energy), 84.0), np.array([budget, 2 * budget]))
    assert loose <= tight + 1e-9


def test_predictions_are_the_bytes_written(updates):
    block = block_of(updates)
    energy = block.S.numpy() ** 2
    target = 0.01 * energy.sum(1)
    told = predicted_nbytes(energy, np.full(energy.shape[1], float(OUT + INN)), target)
    coded = code(block.factors(), Target("error", target), block=block)
    written = np.array([len(r) for r in coded.records])
    assert (np.abs(written - told) < 12).all()


def test_what_no_writer_writes_does_not_grow():
    """Few bytes for many numbers: pairs between thin sides, rows of no bits, many parts."""

    def thin(count):
        bits = bytes([0x11]) * ((count + 1) // 2)
        head = (
            struct.pack("<BB", 1, 3)
            + struct.pack("<HH", 0, 1) * 2
            + struct.pack("<HBf", count, 0, 1.0)
        )
        return head + bits + b"\0\x3c" * count + b"\xff" * (2 * count // 8 + 1)

    def basis(side, number, columns):
        return torch.ones(4096, columns)

    with pytest.raises(FileError, match=r"60000 pairs between sides of \[1, 1\]"):
        decode(thin(60_000), (4096, 4096), basis)
    empty = struct.pack("<BB", 1, 0) + struct.pack("<HBf", 4000, 0, 1.0) + b"\0" * (2000 + 8000)
    with pytest.raises(FileError, match="rows of 0 bits"):
        decode(empty, (4096, 4096), basis)
    one = decode(thin(1), (8, 8), lambda side, number, columns: torch.ones(8, columns))
    assert one.rank == 1
    with pytest.raises(FileError, match="more parts"):
        decode(thin(1) * 40, (8, 8), lambda side, number, columns: torch.ones(8, columns))


def test_records_decode_together_to_what_each_is_alone(make_update, bases, monkeypatch):
    """Of all kinds, numbers of bits, lengths (odd ones, too) and sides; in a few operations."""
    records, shapes = [], []
    for k, (tolerance, which) in enumerate(
        [(0.5, "own"), (0.1, "U"), (0.02, "V"), (1e-3, "both"), (1e-6, "own")]
    ):
        block = block_of([make_update(OUT, INN, r, seed=10 * k + r) for r in (2, 5, 1)])
        target = Target("error", tolerance**2 * (block.S.numpy() ** 2).sum(1))
        records += code(block.factors(), target, *sides_of(bases, which), block=block).records
        shapes += [(OUT, INN)] * 3
    for out, inn in ((7, 5), (33, 129)):
        u = make_update(out, inn, 3)
        U, S, V = decompose(u.B[None], u.A[None])
        odd = Block(np.zeros(1, int), U, S, V)
        records += code(odd.factors(), Target("bits", np.full(1, 16.0)), block=odd).records
        records += code(odd.factors(), Target("bytes", np.full(1, 40.0)), block=odd).records
        shapes += [(out, inn)] * 2
    records += [b"\0", exact_record(make_update(OUT, INN, 4, dtype=torch.bfloat16, scale=0.3))]
    shapes += [(OUT, INN)] * 2
    alone = [
        decode(record, shape, lookup(bases)) for record, shape in zip(records, shapes, strict=True)
    ]
    calls = []
    plain = rows.unrotate
    monkeypatch.setattr(rows, "unrotate", lambda *given: calls.append(1) or plain(*given))
    together = decode_together(list(zip(records, shapes, strict=True)), [lookup(bases)] * 21)
    for one, other in zip(alone, together, strict=True):
        assert (one.scale, one.A.dtype) == (other.scale, other.A.dtype)
        assert torch.equal(one.A, other.A)
        assert torch.equal(one.B, other.B)
        assert other.A.is_contiguous()
        assert other.A.untyped_storage().nbytes() == other.A.nbytes  # nothing of the others
    lengths = 3 + 4  # on either side: 48, 33 and 7; 36, 129, 5 and 9
    assert len(calls) == lengths
