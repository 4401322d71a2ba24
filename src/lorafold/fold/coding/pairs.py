"""Pairs of many updates coded at once, and what that loses.

A part of an update is Σ σ_k x_k y_kᵀ in the coordinates of two sides. What is read back is
Σ σ_k x̂_k ŷ_kᵀ, with the strength that coefficients were rounded to in x̂. With E = X − X̂ and
F = Y − Ŷ the difference is

    Σ_k σ_k (E_k y_kᵀ + x̂_k F_kᵀ),

of terms as small as it is, so that float32 Grams hold its norm to 1e-6. A rotation changes none of
these: on sides of the update's own they are taken where numbers are rounded, and nothing is rotated
back.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .bases import Side
from .rows import (
    LEFT_SEED,
    RIGHT_SEED,
    CodedRows,
    code_rows,
    joined,
    rounded_coefficients,
    turned_rows,
    without_values,
    write_rows,
)

PAIRS = 1
PAIRS_HEAD = struct.Struct("<BB")
SIDE_HEAD = struct.Struct("<HH")  # basis, how many of its columns
MEASURABLE = 8  # bits: what loses less than these do is measured with more care
_CACHED = 1 << 18  # numbers
_SEEDS = (LEFT_SEED, RIGHT_SEED)

Numbers = tuple[int | None, int | None]  # of the shared bases U and V; None for an own side


@dataclass(frozen=True)
class Part:
    """A part of n updates, decomposed in the coordinates of two sides.

    Args:
        left: (n, du, k) and right: (n, dv, k), orthonormal. S: (n, k) strengths.
        U, V: shared sides; None where the update's own.
    """

    left: Tensor
    S: Tensor
    right: Tensor
    U: Side
    V: Side

    @property
    def widths(self) -> tuple[int, int]:
        """Coordinates on either side."""
        return self.left.shape[1], self.right.shape[1]

    def unfolded(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Factors (n, out, k), (n, k, in) of a core's factors."""
        if self.U is not None:
            left = self.U.columns @ left
        return left, right if self.V is None else right @ self.V.columns.mT

    def coded(self, bits: np.ndarray, numbers: Sequence[Numbers]) -> tuple[Tensor, Tensor, Records]:
        """The core's factors as decoded, and the records.

        Args:
            bits: (n, k). numbers: of the shared bases U and V, a pair for each row.
        """
        sides = [
            code_rows(X.mT.flatten(0, 1), bits.reshape(-1), seed)
            for X, seed in zip((self.left, self.right), _SEEDS, strict=True)
        ]
        c = self._coefficients(sides, bits)
        left, right = (side.hat.view(*bits.shape, -1) for side in sides)
        left = (left * torch.as_tensor(c, device=left.device).to(left.dtype)[:, :, None]).mT
        return left, right, Records(sides, bits, c, self, numbers)

    def measured(self, bits: np.ndarray, numbers: Sequence[Numbers]) -> tuple[Tensor, Records]:
        """The squared norm that the core loses, (n,) float64, and the records.

        Args:
            bits: (n, k), at most `MEASURABLE`. numbers: as in `coded`.
        """
        left, right = (
            _measured_side(X, bits, seed, basis)
            for X, seed, basis in zip(
                (self.left, self.right), _SEEDS, (self.U, self.V), strict=True
            )
        )
        sides = [left[0], right[0]]
        c = self._coefficients(sides, bits)
        strength = self.S * (sides[0].scale * sides[1].scale).view(bits.shape)
        there = strength > 0
        rounded = torch.as_tensor(c, device=there.device) / torch.where(there, strength, 1.0)
        XX, EX, EE = _stretched(*left[1:], torch.where(there, rounded, 1.0))
        YY, FY, FF = right[1:]
        hats = XX - EX - EX.mT + EE
        products = EE * YY + hats * FF + 2 * (EX - EE) * FY.mT
        square = (products * self.S[:, :, None] * self.S[:, None, :]).sum((1, 2)).clamp_min(0)
        return square, Records(sides, bits, c, self, numbers)

    def _coefficients(self, sides: Sequence[CodedRows], bits: np.ndarray) -> np.ndarray:
        """(n, k) strengths of the coded rows' products, as they will be read."""
        scale = (sides[0].scale * sides[1].scale).view(bits.shape)
        return rounded_coefficients((self.S.to(scale) * scale).cpu().numpy(), bits)


def _measured_side(
    X: Tensor, bits: np.ndarray, seed: int, basis: Side
) -> tuple[CodedRows, Tensor, Tensor, Tensor]:
    """The columns of X (n, d, k) coded, and inner products (n, k, k) float64 of X with X, E with X
    and E with E, where E = X − X̂ before coefficients are rounded.

    A few updates at a time, so that what is rotated and rounded is still in the cache.
    """
    n, d, k = X.shape
    rows, G = X.mT, []
    coded: list[CodedRows] = []
    some = max(1, _CACHED // (d * k)) if basis is None and X.device.type == "cpu" else n
    room = X.new_empty(2, some * k, d) if basis is None else None
    for start in range(0, n, some):
        here = slice(start, start + some)
        part, levels = rows[here].flatten(0, 1), bits[here].reshape(-1)
        if room is None:
            one = code_rows(part, levels, seed)
        else:
            part, one = turned_rows(part, levels, seed, room[:, : len(part)])
        G.append(_products(part, one, k, basis))
        coded.append(without_values(one))
    XX, EX, EE = (torch.cat(each).double() for each in zip(*G, strict=True))
    return joined(coded), XX, EX, EE


def _products(X: Tensor, coded: CodedRows, k: int, basis: Side) -> tuple[Tensor, Tensor, Tensor]:
    """(n, k, k) inner products of k rows X each and of what their coding misses, E: X with X, E
    with X, E with E. E is written where the values in `coded` are.
    """
    factor = coded.scale.to(X.dtype)[:, None]
    E = torch.addcmul(X, coded.hat, factor, value=-1, out=coded.hat)
    X, E = X.view(-1, k, X.shape[1]), E.view(-1, k, X.shape[1])
    if basis is None:
        left, right = X, E
    else:
        X, E = X.double(), E.double()
        left, right = X @ basis.gram(), E @ basis.gram()
    return X @ left.mT, E @ left.mT, E @ right.mT


def _stretched(XX: Tensor, EX: Tensor, EE: Tensor, f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same products where X̂ is f (n, k) times what it was."""
    f = f[:, :, None]
    rest = 1 - f
    EX_f = rest * XX + f * EX
    EE_f = rest * rest.mT * XX + f * f.mT * EE + rest * f.mT * EX.mT + f * rest.mT * EX
    return XX, EX_f, EE_f


@dataclass(frozen=True)
class Records:
    """The coded rows of a part, to be written.

    Args:
        sides: left and right. bits, c: (n, k). part: whose they are. numbers: of the bases.
    """

    sides: Sequence[CodedRows]
    bits: np.ndarray
    c: np.ndarray
    part: Part
    numbers: Sequence[Numbers]

    def written(self) -> list[bytes]:
        """Of each update."""
        return [self._record(i) for i in range(len(self.bits))]

    def _record(self, i: int) -> bytes:
        kept = np.flatnonzero(self.bits[i] > 0)
        if not len(kept):
            return b""
        U, V = self.part.U, self.part.V
        head = PAIRS_HEAD.pack(PAIRS, (U is not None) | (V is not None) << 1)
        for basis, number in zip((U, V), self.numbers[i], strict=True):
            if basis is not None:
                head += SIDE_HEAD.pack(number, basis.rank)
        rows = kept + i * self.bits.shape[1]
        return head + write_rows(self.sides, rows, self.c[i, kept])
