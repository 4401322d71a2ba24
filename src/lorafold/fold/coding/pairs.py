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
    rounded_coefficients,
    turned_rows,
    write_rows,
)

PAIRS = 1
PAIRS_HEAD = struct.Struct("<BB")
SIDE_HEAD = struct.Struct("<HH")  # basis, how many of its columns
MEASURABLE = 8  # bits: what loses less than these do is measured with more care
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
        rows, sides = [], []
        for X, seed, basis in zip((self.left, self.right), _SEEDS, (self.U, self.V), strict=True):
            flat, shape = X.mT.flatten(0, 1), (*bits.shape, X.shape[1])
            if basis is None:
                flat, coded = turned_rows(flat, bits.reshape(-1), seed)
            else:
                coded = code_rows(flat, bits.reshape(-1), seed)
            rows.append((flat.view(shape), coded.hat.view(shape), basis))
            sides.append(coded)
        c = self._coefficients(sides, bits)
        scale = sides[1].scale.view(bits.shape)
        strength = self.S * scale
        factor = torch.as_tensor(c, device=scale.device) / torch.where(strength > 0, strength, 1.0)
        XX, EX, EE = _products(*rows[0], factor)
        YY, FY, FF = _products(*rows[1], scale)
        hats = XX - EX - EX.mT + EE
        products = EE * YY + hats * FF + 2 * (EX - EE) * FY.mT
        square = (products * self.S[:, :, None] * self.S[:, None, :]).sum((1, 2)).clamp_min(0)
        return square, Records(sides, bits, c, self, numbers)

    def _coefficients(self, sides: Sequence[CodedRows], bits: np.ndarray) -> np.ndarray:
        """(n, k) strengths of the coded rows' products, as they will be read."""
        scale = (sides[0].scale * sides[1].scale).view(bits.shape)
        return rounded_coefficients((self.S.to(scale) * scale).cpu().numpy(), bits)


def _products(X: Tensor, hat: Tensor, basis: Side, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inner products (n, k, k) float64 of rows X with X, E = X − factor · hat with X, E with E.

    Args:
        X, hat: (n, k, d). basis: whose coordinates they are. factor: (n, k).
    """
    E = torch.addcmul(X, hat, factor.to(X.dtype)[:, :, None], value=-1)
    both = torch.cat([X, E], 1)
    if basis is None:
        G = (both @ both.mT).double()
    else:
        both = both.double()
        G = both @ basis.gram() @ both.mT
    k = X.shape[1]
    return G[:, :k, :k], G[:, k:, :k], G[:, k:, k:]


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
