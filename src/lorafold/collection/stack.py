"""One module over many adapters: the stack ΔW_1 … ΔW_N, factored, read in blocks.

All algebra runs batched on (n, out, r) and (n, r, in) factors. The singular value decomposition
of every update comes from two r×r float64 Grams instead of two QRs: with A Aᵀ = W Λ Wᵀ and
H = Λ^½ Wᵀ (Bᵀ B) W Λ^½ = Z S² Zᵀ,

    ΔW = U S Vᵀ,   U = B W Λ^½ Z S⁻¹,   V = Aᵀ W Λ^-½ Z.

That is a handful of batched products, several times faster than LAPACK's QR on thin matrices;
directions below 1e-7 of the largest singular value are dropped as float32 noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from .batch import Block, Factors, joined_factors

_KEPT_BLOCKS = 3  # a stack of no more blocks is kept between passes


class Stack:
    """The adapters that have one module, readable block by block any number of times.

    Args:
        path: the module's path.
        shape: (out, in).
        members: (N,) positions of the adapters that have it, ascending.
        ranks: (N,) their ranks here.
        read: position → (B (out, r), A (r, in), scale), copied tensors.
        block_bytes: float32 bytes of factors that one block may hold.
        device: where the blocks live.
        stays: what is read does, as the whole collection fits under the memory limit.
    """

    def __init__(
        self,
        path: str,
        shape: tuple[int, int],
        members: np.ndarray,
        ranks: np.ndarray,
        read: Callable[[int], tuple[Tensor, Tensor, float]],
        block_bytes: int,
        device: torch.device | str | None = None,
        stays: bool = False,
    ) -> None:
        self.path = path
        self.shape = shape
        self.members = members
        self.ranks = ranks
        self.device = device
        self._read = read
        self.block_bytes = block_bytes
        self._all_stays = stays
        self._read_already: list[Factors] | None = None
        self._decomposed: list[Block] | None = None

    def __len__(self) -> int:
        return len(self.members)

    @property
    def nbytes(self) -> int:
        """float32 bytes of all factors."""
        return 4 * sum(self.shape) * int(self.ranks.sum())

    def factors(self) -> Iterator[Factors]:
        """The blocks as read, in order; a stack of a few blocks stays in memory until `forget`."""
        if self._read_already is not None:
            yield from self._read_already
            return
        keep: list[Factors] | None = [] if self._stays else None
        for rows in self._split():
            f = self._load(rows)
            if keep is not None:
                keep.append(f)
            yield f
        self._read_already = keep

    def pairs(self) -> Iterator[tuple[Factors, Block | None]]:
        """The blocks as read, in order, each with its decomposition where that was kept."""
        known = self._decomposed
        for k, f in enumerate(self.factors()):
            yield f, None if known is None else known[k]

    def hold(self, factors: Factors, block: Block) -> None:
        """Take in what was read and decomposed elsewhere, all of the stack, until `forget`."""
        self._read_already, self._decomposed = [factors], [block]

    def in_memory(self) -> list[Factors] | None:
        """All the blocks as read, where they stay in memory; None where they don't."""
        if self._read_already is None and self._stays:
            for _ in self.factors():
                pass
        return self._read_already

    @property
    def _stays(self) -> bool:
        return self._all_stays or self.nbytes <= _KEPT_BLOCKS * self.block_bytes

    def forget(self) -> None:
        """Drop what is kept in memory, unless all of the collection may be."""
        self._decomposed = None
        if not self._all_stays:
            self._read_already = None

    def _split(self) -> Iterator[np.ndarray]:
        width = 4 * sum(self.shape)
        start, top = 0, 0
        for row, rank in enumerate(self.ranks.tolist()):
            top = max(top, rank)
            if row > start and (row + 1 - start) * top * width > self.block_bytes:
                yield np.arange(start, row)
                start, top = row, rank
        yield np.arange(start, len(self))

    def _load(self, rows: np.ndarray) -> Factors:
        members = self.members[rows]
        parts = [self._read(int(i)) for i in members]
        return joined_factors(members, parts, self.device)
