"""One adapter at one module as bytes: parts that add up to ΔŴ.

A part is a list of pairs in the coordinates of two sides, each the update's own or a shared basis
(ΔŴ = U P diag(c) Qᵀ Vᵀ), the file's tensors untouched, or loadings of flattened factors. The byte
layout is described in docs/formats.md.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...collection.batch import Block, Factors, decompose, squared_differences
from ...errors import FileError
from ...lowrank import LowRank
from .bases import Bases, Side, projected, residual, weighted_norms
from .bits import bits_for_bytes, bits_for_error
from .flat_part import decode_part
from .rows import (
    LEFT_SEED,
    RIGHT_SEED,
    CodedRows,
    code_rows,
    read_rows,
    rounded_coefficients,
    rows_nbytes,
    write_rows,
)

# Budgets below this share of the norm are met by comparing the whole: sums of squares in the core
# are good to 1e-7 of the norm.
_PLAIN = 1e-3
_RESIDUAL = 0.7  # of the budget: what the shared sides may miss before a residual is looked at
NOTHING, PAIRS, EXACT, FLAT = 0, 1, 2, 3
_PAIRS = struct.Struct("<BB")
_SIDE = struct.Struct("<HH")  # basis, how many of its columns
_EXACT_HEAD = struct.Struct("<BI")

Sides = tuple[int | None, int | None]


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
class _Part:
    left: Tensor  # (n, du, k) orthonormal
    S: Tensor  # (n, k)
    right: Tensor  # (n, dv, k)
    U: Side
    V: Side

    @property
    def widths(self) -> tuple[int, int]:
        return self.left.shape[1], self.right.shape[1]

    def unfolded(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Factors (n, out, k), (n, k, in) of a core's factors."""
        if self.U is not None:
            left = self.U.columns @ left
        return left, right if self.V is None else right @ self.V.columns.mT

    def apart(self, core: tuple[Tensor, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Factors of this part less those of a coded core, to be concatenated."""
        own = self.left * self.S.to(self.left.dtype)[:, None, :]
        return [own, -core[0]], [self.right.mT, core[1]]


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

    def row(self, k: int) -> Coded:
        """One of them alone."""
        row = slice(k, k + 1)
        return Coded(self.records[row], self.squared_error[row], self.payload[row])

    def replaced(self, rows: np.ndarray, by: Coded) -> Coded:
        """These with some rows replaced, in order, by those of another."""
        records = list(self.records)
        error, payload = self.squared_error.copy(), self.payload.copy()
        for k, record in zip(rows.tolist(), by.records, strict=True):
            records[k] = record
        error[rows], payload[rows] = by.squared_error, by.payload
        return Coded(records, error, payload)


def code(
    block: Block | Factors,
    target: Target,
    ids: Sides | list[Sides] = (None, None),
    U: Side = None,
    V: Side = None,
    against: Factors | None = None,
    core: tuple[Tensor, Tensor] | None = None,
) -> Coded:
    """Code a block whose rows all use the same sides, or sides of one width each.

    Args:
        block: n updates; in the gauge they have where sides are shared, which must not be a bad
            one. target: what each must meet.
        ids: the numbers of the shared bases U and V (None where the side is the update's own):
            one pair, or one for each row.
        against: the updates as they came, which the error is measured against; the block when
            None. In a bad gauge the decomposition itself is off by more than a small tolerance.
        core: what `projected` gives, where that is known.
    """
    n = len(block.members)
    numbers = ids if isinstance(ids, list) else [ids] * n
    rows = _Rows(block, target, numbers, U, V, against, core, np.zeros(n), np.zeros(n))
    if (U is None and V is None) or target.kind != "error":
        return _code(rows, rest=False)
    core = projected(block.factors(), U, V) if core is None else core
    total = block.square()
    lost = (total - weighted_norms(*core, U, V)).clamp_min(0).cpu().numpy()
    rows = replace(rows, core=core, lost=lost, total=total.cpu().numpy())
    over = lost > _RESIDUAL * target.amount
    if not over.any() or over.all():
        return _code(rows, rest=bool(over.any()))
    found = Coded.nothing(n)
    for index, rest in ((np.flatnonzero(~over), False), (np.flatnonzero(over), True)):
        found = found.replaced(index, _code(rows.take(index), rest))
    return found


@dataclass(frozen=True)
class _Rows:
    """What `code` is given; lost: (n,) squared norm that shared sides miss of `total`."""

    block: Block | Factors
    target: Target
    ids: list[Sides]
    U: Side
    V: Side
    against: Factors | None
    core: tuple[Tensor, Tensor] | None
    lost: np.ndarray
    total: np.ndarray

    def take(self, rows: np.ndarray) -> _Rows:
        core = self.core
        if core is not None:
            index = torch.as_tensor(rows, device=core[0].device)
            core = core[0][index], core[1][index]
        return _Rows(
            self.block.take(rows),
            self.target.take(rows),
            [self.ids[k] for k in rows.tolist()],
            self.U.take(rows) if isinstance(self.U, Bases) else self.U,
            self.V.take(rows) if isinstance(self.V, Bases) else self.V,
            None if self.against is None else self.against.take(rows),
            core,
            self.lost[rows],
            self.total[rows],
        )


def _code(rows: _Rows, rest: bool) -> Coded:
    """Code rows that all get a residual of their own beside what is on shared sides, or none do."""
    block, target, U, V, against = rows.block, rows.target, rows.U, rows.V, rows.against
    parts = _parts(block, U, V, rows.core, rest)
    # Where the bases are orthogonal to what they miss, and that is no small difference.
    known = U is not None and V is not None and target.kind == "error" and not rest
    known = known and bool((target.amount >= _PLAIN * rows.total).all())
    lost = np.zeros_like(rows.lost) if rest else rows.lost
    energy = torch.cat([p.S for p in parts], 1).cpu().numpy() ** 2
    cost = np.concatenate([np.full(p.S.shape[1], sum(p.widths) / 8) for p in parts])
    bits = target.less(lost).bits(energy, cost)
    cores = []
    records = [b""] * len(block.members)
    start = 0
    for p in parts:
        stop = start + p.S.shape[1]
        left, right, coded = _code_part(p, bits[:, start:stop], rows.ids)
        cores.append((left, right))
        records = [a + b for a, b in zip(records, coded, strict=True)]
        start = stop
    if known and (against is None or against is block or not _bad_gauge(rows)):
        # What the sides miss is orthogonal to what they hold, so the rest is measured in the core.
        left, right = (
            torch.cat(x, d) for x, d in zip(parts[0].apart(cores[0]), (2, 1), strict=True)
        )
        error = lost + weighted_norms(left, right, U, V).cpu().numpy()
    else:
        own = against or block.factors()
        whole = [p.unfolded(*core) for p, core in zip(parts, cores, strict=True)]
        left, right = torch.cat([x for x, _ in whole], 2), torch.cat([y for _, y in whole], 1)
        error = squared_differences(own.B, own.A, left, right).cpu().numpy()
    return Coded(records, error, (bits * cost).sum(1))


def _bad_gauge(rows: _Rows) -> bool:
    """Whether ‖A‖ ‖B‖ is so far above ‖ΔW‖ that the decomposition itself has lost digits."""
    assert rows.against is not None
    size = rows.against.A.norm(dim=(1, 2)) * rows.against.B.norm(dim=(1, 2))
    return bool((size.cpu().numpy() > 1e3 * np.sqrt(rows.total)).any())


def _parts(
    block: Block | Factors, U: Side, V: Side, core: tuple[Tensor, Tensor] | None, rest: bool
) -> list[_Part]:
    """The parts to be coded: the update on its sides, and what is missing there if `rest`."""
    if U is None and V is None:
        own = block if isinstance(block, Block) else block.decomposed()
        return [_Part(own.U, own.S, own.V, None, None)]
    f = block.factors()
    left, right = projected(f, U, V) if core is None else core
    parts = [_Part(*decompose(left, right), U, V)]
    if rest:
        parts.append(_Part(*decompose(*residual(f, left, right, U, V)), None, None))
    return parts


def _code_part(
    p: _Part, bits: np.ndarray, ids: Sequence[Sides]
) -> tuple[Tensor, Tensor, list[bytes]]:
    """Code one part of every adapter; its core's factors as decoded, and a record each."""
    n, k = bits.shape
    flat = bits.reshape(-1)
    coded = [
        code_rows(X.mT.reshape(n * k, X.shape[1]), flat, seed)
        for X, seed in ((p.left, LEFT_SEED), (p.right, RIGHT_SEED))
    ]
    scale = (coded[0].scale * coded[1].scale).reshape(n, k)
    c = rounded_coefficients((p.S.to(scale) * scale).cpu().numpy(), bits)
    hats = [side.hat.reshape(n, k, side.hat.shape[1]) for side in coded]
    left = (hats[0] * torch.as_tensor(c, device=scale.device).to(hats[0].dtype)[:, :, None]).mT
    return left, hats[1], [_pairs_record(coded, bits, c, i, p, ids[i]) for i in range(n)]


def _pairs_record(
    coded: list[CodedRows], bits: np.ndarray, c: np.ndarray, i: int, p: _Part, ids: Sides
) -> bytes:
    kept = np.flatnonzero(bits[i] > 0)
    if not len(kept):
        return b""
    head = _PAIRS.pack(PAIRS, (p.U is not None) | (p.V is not None) << 1)
    for basis, number in zip((p.U, p.V), ids, strict=True):
        if basis is not None:
            head += _SIDE.pack(number, basis.rank)
    return head + write_rows(coded, kept + i * bits.shape[1], c[i, kept])


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
    out, inner = shape
    lefts: list[Tensor] = []
    rights: list[Tensor] = []
    start = 0
    while start < len(record):
        kind = record[start]
        if kind == NOTHING:
            start += 1
            continue
        if kind == EXACT:
            return _decode_exact(record, start, device)
        if kind == PAIRS:
            left, right, start = _decode_pairs(record, start, shape, basis, device)
        elif kind == FLAT:
            left, right, start = decode_part(record, start, shape, basis, device)
        else:
            raise FileError(f"a record of the library has a part of unknown kind {kind}")
        lefts.append(left)
        rights.append(right)
    if not lefts:
        return LowRank(torch.zeros(1, inner, device=device), torch.zeros(out, 1, device=device))
    return LowRank(torch.cat(rights), torch.cat(lefts, 1))


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
    parts: list[StoredPart] = []
    start = 0
    while start < len(record):
        if record[start] == NOTHING:
            start += 1
        elif record[start] == PAIRS:
            part, start = _read_pairs(record, start, shape, device)
            parts.append(part)
        else:  # alone in its record, or with its residual: as one part of its own sides
            u = decode(record[start:], shape, basis, device)
            return [*parts, StoredPart(u.B, u.A, scale=u.scale)]
    return parts


def _decode_pairs(
    record: bytes,
    start: int,
    shape: tuple[int, int],
    basis: BasisOf,
    device: torch.device | str | None,
) -> tuple[Tensor, Tensor, int]:
    part, start = _read_pairs(record, start, shape, device)
    left, right = part.left, part.right
    if part.U is not None:
        left = basis("U", part.U, left.shape[0]) @ left
    if part.V is not None:
        right = right @ basis("V", part.V, right.shape[1]).T
    return left, right, start


def _read_pairs(
    record: bytes, start: int, shape: tuple[int, int], device: torch.device | str | None
) -> tuple[StoredPart, int]:
    _, flags = _PAIRS.unpack_from(record, start)
    start += _PAIRS.size
    dims, numbers = list(shape), [None, None]  # type: list[int], list[int | None]
    for side in range(2):
        if flags >> side & 1:
            numbers[side], dims[side] = _SIDE.unpack_from(record, start)
            start += _SIDE.size
    (P, Q), c, start = read_rows(record, start, dims, (LEFT_SEED, RIGHT_SEED), device)
    # √|c| on either side keeps A and B of one size, as after training.
    root = c.abs().sqrt()
    left, right = (P * (root * c.sign())[:, None]).T, Q * root[:, None]
    return StoredPart(left, right, numbers[0], numbers[1]), start


def _decode_exact(record: bytes, start: int, device: torch.device | str | None) -> LowRank:
    from safetensors.torch import load

    _, size = _EXACT_HEAD.unpack_from(record, start)
    start += _EXACT_HEAD.size
    length = record[start]
    scale = float(json.loads(record[start + 1 : start + 1 + length]))
    start += 1 + length
    t = load(record[start : start + size])
    return LowRank(t["A"].to(device), t["B"].to(device), scale)
