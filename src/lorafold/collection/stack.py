"""One module over many adapters: the stack ΔW_1 … ΔW_N, factored, read in blocks.

All algebra runs batched on (n, out, r) and (n, r, in) factors. The singular value decomposition
of every update comes from two r×r float64 Grams instead of two QRs: with A Aᵀ = W Λ Wᵀ and
H = Λ^½ Wᵀ (Bᵀ B) W Λ^½ = Z S² Zᵀ,

    ΔW = U S Vᵀ,   U = B W Λ^½ Z S⁻¹,   V = Aᵀ W Λ^-½ Z.

That is a handful of batched products, several times faster than LAPACK's QR on thin matrices;
directions below 1e-7 of the largest singular value are dropped as float32 noise.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..lowrank import LowRank
from .batch import Block, Factors, joined_factors, side_by_side

_KEPT_BLOCKS = 3  # a stack of no more blocks is kept between passes
_TOGETHER = 1 << 22  # bytes of modules that are worked on together


class Stack:
    """The adapters that have one module, readable block by block any number of times.

    Pickled, it is what reads the same elsewhere, without anything that was read, if `read` is.

    Args:
        path: the module's path.
        shape: (out, in).
        members: (N,) positions of the adapters that have it, ascending.
        ranks: (N,) their ranks here.
        read: position → update, in tensors of its own; `read.several`, where there is such, gives
            those of several positions.
        block_bytes: float32 bytes of factors that one block may hold.
        device: where the blocks live.
        stays: what is read does for good, as the whole collection fits under the memory limit.
        blocks: rows of each block, in order; by `block_bytes` alone when None.

    Attributes:
        stays: whether what is read stays in memory until `forget`, as that of a few blocks does.
    """

    def __init__(
        self,
        path: str,
        shape: tuple[int, int],
        members: np.ndarray,
        ranks: np.ndarray,
        read: Callable[[int], LowRank],
        block_bytes: int,
        device: torch.device | str | None = None,
        stays: bool = False,
        blocks: Sequence[np.ndarray] | None = None,
    ) -> None:
        self.path = path
        self.shape = shape
        self.members = members
        self.ranks = ranks
        self.device = device
        self.read = read
        self.block_bytes = block_bytes
        self.blocks = list(self._split()) if blocks is None else list(blocks)
        self._all_stays = stays
        self.stays = stays or self.nbytes <= _KEPT_BLOCKS * block_bytes
        # By the position of a block's first adapter: parts keep what they read for one another.
        self._known: dict[int, Factors] = {}
        self._decomposed: dict[int, Block] = {}

    def __len__(self) -> int:
        return len(self.members)

    def __getstate__(self) -> dict[str, Any]:
        read = self.read
        narrowed = read.only(self.members) if hasattr(read, "only") else read
        return {**self.__dict__, "read": narrowed, "_known": {}, "_decomposed": {}}

    def __lorafold_key__(self) -> Any:
        read: Any = self.read
        if hasattr(read, "only"):
            read = read.only(self.members)
        blocks = [len(rows) for rows in self.blocks]
        plain = self.path, *self.shape, self.block_bytes, self._all_stays, str(self.device)
        return plain, self.members, self.ranks, blocks, read.identity

    @property
    def nbytes(self) -> int:
        """float32 bytes of all factors."""
        return 4 * sum(self.shape) * int(self.ranks.sum())

    def block_from(self, first: int, end: int) -> int | None:
        """The number of the block whose adapters are at these positions; None if there is none."""
        number = bisect.bisect_left(self.blocks, first, key=self._position)
        there = number < len(self.blocks) and self._position(self.blocks[number]) < end
        return number if there else None

    def _position(self, rows: np.ndarray) -> int:
        return int(self.members[rows[0]])

    def part(self, number: int) -> Stack:
        """One block as a stack of its own, which shares what is kept."""
        rows = self.blocks[number]
        part = Stack(
            self.path,
            self.shape,
            self.members[rows],
            self.ranks[rows],
            self.read,
            self.block_bytes,
            self.device,
            self._all_stays,
            [np.arange(len(rows))],
        )
        part.stays = self.stays
        part._known, part._decomposed = self._known, self._decomposed
        return part

    @property
    def largest(self) -> int:
        """float32 bytes of its largest block."""
        most = max((len(rows) * int(self.ranks[rows].max()) for rows in self.blocks), default=0)
        return 4 * sum(self.shape) * most

    def of(self, positions: np.ndarray) -> Stack | None:
        """Those of some adapters, as a stack of its own; None where none of them has the module."""
        rows = np.flatnonzero(np.isin(self.members, positions))
        if len(rows) == len(self):
            return self
        if not len(rows):
            return None
        return Stack(
            self.path,
            self.shape,
            self.members[rows],
            self.ranks[rows],
            self.read,
            self.block_bytes,
            self.device,
        )

    def factors(self) -> Iterator[Factors]:
        """The blocks as read, in order; a stack of a few blocks stays in memory until `forget`."""
        for rows in self.blocks:
            found = self._known.get(self._position(rows))
            if found is None:
                members = self.members[rows]
                found = joined_factors(members, self.read_all(members), self.device)
                self.keep(found)
            yield found

    def keep(self, block: Factors) -> None:
        """Take in a block as read, for as long as the stack stays in memory."""
        if self.stays:
            self._known[int(block.members[0])] = block

    def read_all(self, members: np.ndarray | None = None) -> list[tuple[Tensor, Tensor, float]]:
        """B, A and scale of the updates of some positions, or of all."""
        members = self.members if members is None else members
        return [(u.B, u.A, u.scale) for u in self.several(members.tolist())]

    def several(self, members: Sequence[int]) -> list[LowRank]:
        """The updates of some positions, as they came."""
        several = getattr(self.read, "several", None)
        if several is None:
            return [self.read(i) for i in members]
        found: list[LowRank] = several(members)
        return found

    def update(self, row: int) -> LowRank:
        """One update as it came."""
        return self.read(int(self.members[row]))

    def hold(self, factors: Factors, block: Block) -> None:
        """Take in what was read and decomposed elsewhere, all of the stack, until `forget`."""
        first = int(self.members[0])
        self._known[first], self._decomposed[first] = factors, block

    def forget(self) -> None:
        """Drop what is kept in memory, unless all of the collection may be."""
        self._decomposed.clear()
        if not self._all_stays:
            self._known.clear()

    @property
    def known(self) -> bool:
        """Whether a stack of one block was read, and stays."""
        return self._position(self.blocks[0]) in self._known

    @property
    def block(self) -> Factors:
        """What is read of a stack of one block."""
        (found,) = self.factors()
        return found

    @property
    def decomposed(self) -> Block | None:
        """The decomposition of a stack of one block, where that was kept."""
        return self._decomposed.get(self._position(self.blocks[0]))

    def _split(self) -> Iterator[np.ndarray]:
        width = 4 * sum(self.shape)
        start, top = 0, 0
        for row, rank in enumerate(self.ranks.tolist()):
            top = max(top, rank)
            if row > start and (row + 1 - start) * top * width > self.block_bytes:
                yield np.arange(start, row)
                start, top = row, rank
        yield np.arange(start, len(self))


def joint(parts: Sequence[Stack]) -> tuple[Factors, list[Factors]]:
    """The blocks of stacks that are `alike`, as one, and each: views of it, if none was known.

    Args:
        parts: stacks of one block.
    """
    if len(parts) == 1 or any(part.known for part in parts):
        several = [part.block for part in parts]
        return side_by_side(several), several
    read = [update for part in parts for update in part.read_all()]
    members = np.concatenate([part.members for part in parts])
    found = joined_factors(members, read, parts[0].device)
    several = found.split([len(part) for part in parts])
    for part, block in zip(parts, several, strict=True):
        part.keep(block)
    return found, several


def batches(stacks: Iterable[Stack]) -> list[list[Stack]]:
    """Modules of one shape and rank that are worked on together, as many as a block may hold: what
    is small costs more to begin than to do. In the order of their first ones.
    """
    found: list[list[Stack]] = []
    open_ones: dict[tuple[tuple[int, int], int], list[Stack]] = {}
    for stack in stacks:
        key = stack.shape, int(stack.ranks.max())
        batch = open_ones.get(key)
        most = min(stack.block_bytes, _TOGETHER)
        if batch is None or sum(s.largest for s in [*batch, stack]) > most:
            batch = open_ones[key] = []
            found.append(batch)
        batch.append(stack)
    return found


def parts_of(
    stacks: Iterable[Stack], blocks: Iterable[tuple[int, int]]
) -> Iterator[tuple[int, int, dict[str, Stack]]]:
    """The adapters that are worked on together: first and end, and path → what they have."""
    every = list(stacks)
    for first, end in blocks:
        numbers = [(stack, stack.block_from(first, end)) for stack in every]
        yield first, end, {s.path: s.part(k) for s, k in numbers if k is not None}


def alike(parts: Iterable[Stack]) -> list[list[Stack]]:
    """Stacks of one block, together where their factors are of one shape and rank."""
    found: dict[tuple[tuple[int, int], int], list[Stack]] = {}
    for part in parts:
        found.setdefault((part.shape, int(part.ranks.max())), []).append(part)
    return list(found.values())
