"""One adapter at one module as bytes: parts that add up to ΔŴ.

A part is a list of pairs in the coordinates of two sides, each the update's own or a shared basis
(ΔŴ = U P diag(c) Qᵀ Vᵀ), the file's tensors untouched, or loadings of flattened factors. The byte
layout is described in docs/formats.md.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...collection.batch import Block, Factors, decompose, even_gauge, sizes, squared_differences
from ...errors import FileError
from ...lowrank import LowRank
from .bases import Bases, Side, projected, residual, weighted_norms
from .bits import bits_for_bytes, bits_for_error
from .flat_part import decode_part, skipped_part
from .pairs import MEASURABLE, PAIRS, PAIRS_HEAD, SIDE_HEAD, Numbers, Part
from .rows import (
    LEFT_SEED,
    RIGHT_SEED,
    Written,
    read_together,
    rows_nbytes,
    written_at,
)

# Budgets below this share of ‖ΔW‖² are met by comparing the whole: what float32 Grams find of parts
# in the coordinates of their sides is good to 1e-7 of it.
_PLAIN = 4e-4
_ROUNDING = 1e-6  # of ‖ΔW‖: what a decomposition from float32 Grams and a rotation may change
_UNSEEN = 2e-7  # of the largest singular value, squared: what such a one may take for nothing
VANISHED = 1e-35  # singular values up to this have no coefficient: float32 lacks digits for them
_RESIDUAL = 0.7  # of the budget: what the shared sides may miss before a residual is looked at
NOTHING, EXACT, FLAT = 0, 2, 3
_MOST_PARTS = 8  # of one update; a writer makes two
_MOST_RANKS = 4  # times the smaller side: the ranks of all parts together
_EXACT_HEAD = struct.Struct("<BI")


@dataclass(frozen=True)
class Target:
    """What a coded block must meet, one number an adapter.

    Args:
        kind: "error": squared error at most `amount`; "bytes": payload at most `amount` bytes;
            "bits": every kept component at `amount` bits (16 or 32).
        amount: (n,) float64.
        summed: the rows are modules of one adapter: what counts is the sum of the amounts.
    """

    kind: str
    amount: np.ndarray
    summed: bool = False

    def bits(self, energy: np.ndarray, cost: np.ndarray) -> np.ndarray:
        """(n, k) bits for components of these energies (n, k) at these bytes a bit (k,)."""
        if self.kind == "bits":
            return np.where(energy > 0, self.amount[:, None], 0).astype(np.int64)
        rule = bits_for_error if self.kind == "error" else bits_for_bytes
        if self.summed:
            every = rule(energy.reshape(-1), np.tile(cost, len(energy)), True, self.amount.sum())
            return every.reshape(energy.shape)
        return rule(energy, cost, True, self.amount)

    def less(self, lost: np.ndarray) -> Target:
        """What is left of an error budget after a squared error that no bits can mend."""
        if self.kind != "error":
            return self
        return replace(self, amount=np.maximum(self.amount - lost, 0.05 * self.amount))

    def take(self, rows: np.ndarray, factor: np.ndarray | float = 1.0) -> Target:
        return replace(self, amount=self.amount[rows] * factor)


@dataclass(frozen=True)
class Coded:
    """A coded block.

    Args:
        records: n byte strings. squared_error: (n,) measured on what the records decode to.
        payload: (n,) bytes of packed codes alone.
    """

    records: list[bytes]
    squared_error: np.ndarray
    payload: np.ndarray

    @classmethod
    def nothing(cls, count: int) -> Coded:
        """Zero updates."""
        return cls([b""] * count, np.zeros(count), np.zeros(count))

    @classmethod
    def joined(cls, parts: Sequence[Coded]) -> Coded:
        """All of some blocks."""
        return cls(
            [record for part in parts for record in part.records],
            np.concatenate([part.squared_error for part in parts]),
            np.concatenate([part.payload for part in parts]),
        )

    def take(self, rows: np.ndarray) -> Coded:
        """Some of them."""
        records = [self.records[k] for k in rows.tolist()]
        return Coded(records, self.squared_error[rows], self.payload[rows])

    def replaced(self, rows: np.ndarray, by: Coded) -> Coded:
        """These with some rows replaced, in order, by those of another."""
        records = list(self.records)
        error, payload = self.squared_error.copy(), self.payload.copy()
        for k, record in zip(rows.tolist(), by.records, strict=True):
            records[k] = record
        error[rows], payload[rows] = by.squared_error, by.payload
        return Coded(records, error, payload)


def code(
    f: Factors,
    target: Target,
    numbers: Sequence[Numbers] | None = None,
    U: Side = None,
    V: Side = None,
    *,
    block: Block | None = None,
    core: tuple[Tensor, Tensor] | None = None,
) -> Coded:
    """Code updates that all use the same sides, or sides of one width each.

    Args:
        f: n updates as they came, which the error is measured against. target: what each must meet.
        numbers: of the shared bases U and V, a pair for each row.
        U, V: the bases; None where a side is the update's own.
        block: their decomposition where it is known, maybe without directions that are to be
            dropped. In a bad gauge it is itself off by more than a small tolerance.
        core: what `projected` gives of the updates in an even gauge, where that is known.
    """
    n = len(f.members)
    numbers = numbers or [(None, None)] * n
    if U is None and V is None:
        return _code_own(f, target, numbers, block)
    even = even_gauge(f, exact=False)[0] if block is None else block.factors()
    core = projected(even, U, V) if core is None else core
    if target.kind != "error":
        return _coded(f, target, numbers, [Part(*decompose(*core), U, V)])
    square = even.square() if block is None else block.square()
    lost = (square - weighted_norms(*core, U, V)).clamp_min(0).cpu().numpy()
    total = square.cpu().numpy()
    over = lost > _RESIDUAL * target.amount
    found = Coded.nothing(n)
    for rest, rows in ((False, np.flatnonzero(~over)), (True, np.flatnonzero(over))):
        if not len(rows):
            continue
        sides = [x.take(rows) if isinstance(x, Bases) else x for x in (U, V)]
        left, right = (_some(x, rows) for x in core)
        parts = [Part(*decompose(left, right), *sides)]
        if rest:
            missing = residual(even.take(rows), left, right, *sides)
            parts.append(Part(*decompose(*missing), None, None))
        missed = None if rest else (lost[rows], total[rows])
        pairs = [numbers[k] for k in rows.tolist()]
        coded = _coded(f.take(rows), target.take(rows), pairs, parts, missed)
        found = found.replaced(rows, coded)
    return found


def _some(x: Tensor, rows: np.ndarray) -> Tensor:
    return x if len(rows) == len(x) else x[torch.as_tensor(rows, device=x.device)]


def _code_own(f: Factors, target: Target, numbers: Sequence[Numbers], block: Block | None) -> Coded:
    """Code updates that share nothing; arguments as for `code`."""
    rest = np.arange(len(f.members))
    found = Coded.nothing(len(rest))
    if block is None and target.kind == "error" and not target.summed:
        quick, good = f.quickly_decomposed()
        total = quick.square().cpu().numpy()
        good &= (target.amount >= _PLAIN * total) & (total >= 1e4 * VANISHED**2)
        some, rest = np.flatnonzero(good), np.flatnonzero(~good)
        if len(some):
            own, few = quick.take(some), [numbers[k] for k in some.tolist()]
            unseen = _UNSEEN * (own.S == 0).sum(1) * own.S[:, 0] ** 2
            missed = unseen.cpu().numpy(), total[some]
            part = Part(own.U, own.S, own.V, None, None)
            found = found.replaced(
                some, _coded(f.take(some), target.take(some), few, [part], missed)
            )
    if len(rest):
        f = f.take(rest)
        own = f.decomposed() if block is None else block
        part = Part(own.U, own.S, own.V, None, None)
        few = [numbers[k] for k in rest.tolist()]
        found = found.replaced(rest, _coded(f, target.take(rest), few, [part]))
    return found


def _coded(
    f: Factors,
    target: Target,
    numbers: Sequence[Numbers],
    parts: list[Part],
    missed: tuple[np.ndarray, np.ndarray] | None = None,
) -> Coded:
    """Code parts that add up to the updates, and measure what that loses.

    Args:
        missed: (n,) squared norms that a single part misses, and of the updates.
    """
    n = len(numbers)
    S = torch.cat([p.S for p in parts], 1).cpu().numpy()
    energy = np.where(S > VANISHED, S**2, 0.0)
    cost = np.concatenate([np.full(p.S.shape[1], sum(p.widths) / 8) for p in parts])
    lost = np.zeros(n) if missed is None else missed[0]
    bits = target.less(lost).bits(energy, cost)
    payload = (bits * cost).sum(1)
    if missed is not None and _measured_in_core(f, target, parts[0], missed[1], bits):
        # What the part misses is orthogonal to what it holds.
        square, found = parts[0].measured(bits, numbers)
        error = np.sqrt(lost + square.cpu().numpy()) + _ROUNDING * np.sqrt(missed[1])
        return Coded(found.written(), error**2, payload)
    whole = []
    records = [b""] * n
    start = 0
    for p in parts:
        stop = start + p.S.shape[1]
        left, right, found = p.coded(bits[:, start:stop], numbers)
        whole.append(p.unfolded(left, right))
        records = [a + b for a, b in zip(records, found.written(), strict=True)]
        start = stop
    left, right = torch.cat([x for x, _ in whole], 2), torch.cat([y for _, y in whole], 1)
    error = squared_differences(f.B, f.A, left, right).cpu().numpy()
    return Coded(records, error, payload)


def _measured_in_core(
    f: Factors, target: Target, part: Part, total: np.ndarray, bits: np.ndarray
) -> bool:
    """Whether the error is that of the core and what the sides miss: no bound is a small difference
    of large numbers, and ‖A‖ ‖B‖ is not so far above ‖ΔW‖ that the decomposition itself has lost
    digits, nor ‖ΔW‖ so small that float32 has none for its singular values.
    """
    if (target.amount < _PLAIN * total).any() or (total < 1e4 * VANISHED**2).any():
        return False
    if bits.max(initial=0) > MEASURABLE:
        return False
    if part.U is None and part.V is None:  # as `_code_own` saw to
        return True
    size = sizes(f.A) * sizes(f.B)
    return not bool((size.cpu().numpy() > 1e3 * np.sqrt(total)).any())


def predicted_nbytes(energy: np.ndarray, widths: np.ndarray, budget: np.ndarray) -> np.ndarray:
    """(n,) bytes that pairs of these energies take within a squared-error budget each.

    Args:
        energy: (n, k). widths: (k,) numbers a pair. budget: (n,).
    """
    bits = Target("error", budget).bits(energy, widths / 8)
    nbytes: np.ndarray = rows_nbytes(bits, 0) + (bits * widths).sum(1) / 8
    return nbytes


def exact_record(u: LowRank) -> bytes:
    """The update's own tensors, bit for bit."""
    from safetensors.torch import save

    # Cloned, as factors may be views of one tensor, which safetensors refuses.
    factors = {"A": u.A, "B": u.B}
    body = save(
        {
            k: t.detach().cpu().clone(memory_format=torch.contiguous_format)
            for k, t in factors.items()
        }
    )
    scale = json.dumps(u.scale).encode()
    return _EXACT_HEAD.pack(EXACT, len(body)) + struct.pack("<B", len(scale)) + scale + body


BasisOf = Callable[[str, int, int], Tensor]


def decode(
    record: bytes, shape: tuple[int, int], basis: BasisOf, device: torch.device | str | None = None
) -> LowRank:
    """The update that a record stands for.

    Args:
        record: the bytes. shape: (out, in).
        basis: (side "U", "V" or "flat", number, columns) → the decoded basis, (d, R).
        device: where the factors shall be.

    Returns:
        The file's own tensors for an exact record; else float32 factors with scale 1. A record
        without any component gives a zero update of rank 1.
    """
    return decode_together([(record, shape)], [basis], device)[0]


def decode_together(
    records: Sequence[tuple[bytes, tuple[int, int]]],
    bases: Sequence[BasisOf],
    device: torch.device | str | None = None,
) -> list[LowRank]:
    """Many records decoded at once, to the same as each alone, in a fraction of the time.

    Args:
        records: each with its (out, in). bases, device: of each, and of all, as for `decode`.
    """
    found = [list(_walked(*record)) for record in records]
    pairs = _pairs([p for parts in found for p in parts if isinstance(p, _Pairs)], device)
    return [
        _decoded(*record, basis, parts, pairs, device)
        for record, basis, parts in zip(records, bases, found, strict=True)
    ]


@dataclass(frozen=True)
class _Pairs:
    """Pairs in a record. numbers: of the bases U and V."""

    numbers: Numbers
    written: Written


def _walked(record: bytes, shape: tuple[int, int]) -> Iterator[_Pairs | tuple[int, int]]:
    """The parts of a record: pairs by their heads, others by kind and place."""
    start = rank = parts = 0
    while start < len(record):
        kind = record[start]
        if kind == NOTHING:
            start += 1
            continue
        if kind == PAIRS:
            part = _pairs_at(record, start, shape)
            yield part
            count, start = len(part.written.bits), part.written.end
        elif kind == FLAT:
            yield kind, start
            count, start = skipped_part(record, start)
        elif kind == EXACT:  # with nothing after it
            yield kind, start
            return
        else:
            raise FileError(f"a record of the library has a part of unknown kind {kind}")
        rank += count
        parts += 1
        if parts > _MOST_PARTS or rank > _MOST_RANKS * min(shape):
            raise FileError("a record of the library has more parts than an update can have")


def _decoded(
    record: bytes,
    shape: tuple[int, int],
    basis: BasisOf,
    parts: Sequence[_Pairs | tuple[int, int]],
    pairs: Iterator[StoredPart],
    device: torch.device | str | None,
) -> LowRank:
    """The sum of a record's parts, of which `pairs` gives those that are pairs."""
    lefts: list[Tensor] = []
    rights: list[Tensor] = []
    for part in parts:
        if isinstance(part, _Pairs):
            left, right = _unfolded(next(pairs), basis)
        elif part[0] == EXACT:
            return _decode_exact(record, part[1], device)
        else:
            left, right, _ = decode_part(record, part[1], shape, basis, device)
        lefts.append(left)
        rights.append(right)
    if not lefts:
        out, inner = shape
        A = torch.zeros(1, inner, dtype=torch.float32, device=device)
        return LowRank(A, torch.zeros(out, 1, dtype=torch.float32, device=device))
    return LowRank(torch.cat(rights), torch.cat(lefts, 1))


def rank_of(record: bytes, shape: tuple[int, int]) -> int:
    """The rank of the update that `decode` would give."""
    rank = 0
    for part in _walked(record, shape):
        if isinstance(part, _Pairs):
            rank += len(part.written.bits)
        elif part[0] == EXACT:
            return _decode_exact(record, part[1], None).rank
        else:
            rank += skipped_part(record, part[1])[0]
    return max(rank, 1)


@dataclass(frozen=True)
class StoredPart:
    """A part of an update as it is stored: left @ right in the coordinates of two sides.

    Args:
        left: (out, k), or (R_U, k) in the first R_U columns of the shared basis number U.
        right: (k, in), or (k, R_V) in those of basis number V. U, V: None for an own side.
        scale: of the product.
    """

    left: Tensor
    right: Tensor
    U: int | None = None
    V: int | None = None
    scale: float = 1.0


def stored_parts(
    record: bytes, shape: tuple[int, int], basis: BasisOf, device: torch.device | str | None = None
) -> list[StoredPart]:
    """The parts of a record, strongest shared part first, without multiplying bases out.

    Args:
        record, shape, basis, device: as for `decode`.
    """
    found = list(_walked(record, shape))
    pairs = [p for p in found if isinstance(p, _Pairs)]
    parts = list(_pairs(pairs, device))
    if len(pairs) < len(found):  # others: alone in their record, or with a residual
        u = decode(record, shape, basis, device)
        return [StoredPart(u.B, u.A, scale=u.scale)]
    return parts


def _pairs_at(record: bytes, start: int, shape: tuple[int, int]) -> _Pairs:
    _, flags = PAIRS_HEAD.unpack_from(record, start)
    start += PAIRS_HEAD.size
    dims, numbers = list(shape), [None, None]  # type: list[int], list[int | None]
    for side in range(2):
        if flags >> side & 1:
            numbers[side], dims[side] = SIDE_HEAD.unpack_from(record, start)
            start += SIDE_HEAD.size
    written = written_at(record, start, dims)
    if len(written.bits) > min(dims):  # a core has no more directions than either of its sides
        raise FileError(
            f"a record of the library has {len(written.bits)} pairs between sides of {dims}"
        )
    return _Pairs((numbers[0], numbers[1]), written)


def _pairs(found: Sequence[_Pairs], device: torch.device | str | None) -> Iterator[StoredPart]:
    """Pairs as they are stored, all decoded at once."""
    if not found:
        return
    rows = read_together([p.written for p in found], (LEFT_SEED, RIGHT_SEED), device, _roots)
    for p, ((P, Q), _) in zip(found, rows, strict=True):
        yield StoredPart(P.T, Q, *p.numbers)


def _roots(c: Tensor) -> tuple[Tensor, Tensor]:
    """√|c| on either side keeps A and B of one size, as after training."""
    root = c.abs().sqrt()
    return root * c.sign(), root


def _unfolded(part: StoredPart, basis: BasisOf) -> tuple[Tensor, Tensor]:
    """Factors (out, k) and (k, in) of pairs."""
    left, right = part.left, part.right
    if part.U is not None:
        left = basis("U", part.U, left.shape[0]) @ left
    if part.V is not None:
        right = right @ basis("V", part.V, right.shape[1]).T
    return left, right


def _decode_exact(record: bytes, start: int, device: torch.device | str | None) -> LowRank:
    from safetensors.torch import load

    _, size = _EXACT_HEAD.unpack_from(record, start)
    start += _EXACT_HEAD.size
    length = record[start]
    scale = float(json.loads(record[start + 1 : start + 1 + length]))
    start += 1 + length
    t = load(record[start : start + size])
    return LowRank(t["A"].to(device), t["B"].to(device), scale)
