"""The work of comparing in tasks: rows of the matrix of all pairs, over a few modules.

What a task finds is a pure function of the updates at its modules. Results are added in the order
of the tasks, so that sums are the same to the last bit whoever computed which; how the work is cut
depends on the adapters and on `memory` alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..collection.stack import Stack
from ..collection.units import Sketch, Units, add_inner_products, units_of
from ..scale.engine import Held
from ..scale.work import Shared

_FEWEST, _MOST = 8, 32  # runs of modules, at least and at most; between them so many that the
# results are no larger than what is read
_ROWS = 1 << 29  # bytes of one result


@dataclass(frozen=True)
class Strip:
    """Some rows of the matrix, from the diagonal on, over some modules.

    Args:
        stacks: the modules, each of those that have it.
        order: (M,) positions of the columns. rows: how many of the first have a row.
        room: float32 bytes of factors that are read at once.
    """

    stacks: Sequence[Stack]
    order: np.ndarray
    rows: int
    room: int

    def places(self) -> np.ndarray:
        """Position → column; −1 where it has none."""
        places = np.full(1 + max(self.order, default=0), -1)
        places[self.order] = np.arange(len(self.order))
        return places


@dataclass(frozen=True, eq=False)
class Sketched:
    """Inner products of sketches, told in a unit of each adapter's own: its first norm here.

    Args:
        grams: (2, rows, M) float32. units: (M,), 0 for one that is zero at all of the modules.
        squares: (M,) Σ ‖ΔW‖². fourths: (M,) Σ of ‖ΔW ΔWᵀ‖², as far as it is sketched, in the
            units' fourth power.
    """

    grams: Tensor
    units: np.ndarray
    squares: np.ndarray
    fourths: np.ndarray


def exact(strip: Strip, wanted: Held | Shared | None) -> np.ndarray:
    """(rows, M) inner products, or those that are wanted, (N, N) by position, and some beside."""
    asked = None if wanted is None else wanted.get()
    total, places = np.zeros((strip.rows, len(strip.order))), strip.places()
    for stack in strip.stacks:
        inside = blocks(stack, strip.order[: strip.rows], strip.room)
        beyond = blocks(stack, strip.order[strip.rows :], strip.room)
        for k, block in enumerate(inside):
            xs = read(stack, block)
            add_inner_products(total, xs, xs, asked, places)
            for other in (*inside[k + 1 :], *beyond):
                if asked is None or asked[np.ix_(block, other)].any():
                    add_inner_products(total, xs, read(stack, other), asked, places)
    return total


def sketched(strip: Strip, seed: int) -> Sketched:
    """The same from sketches."""
    count, places = len(strip.order), strip.places()
    grams = torch.zeros(2, strip.rows, count, dtype=torch.float32)
    units, squares, fourths = (np.zeros(count) for _ in range(3))
    for stack in strip.stacks:
        sketch = Sketch(stack.shape, stack.path, seed)
        sketches = torch.zeros(2, count, sketch.size, dtype=torch.float32)
        for block in blocks(stack, strip.order, strip.room):
            for x in read(stack, block):
                at = places[x.members]
                squares[at] += x.norms**2
                units[at] = np.where(units[at] > 0, units[at], x.norms)
                scales = np.divide(x.scales, units[at], out=0 * x.norms, where=x.norms > 0)
                ratio = np.divide(x.squares, units[at] ** 2, out=0 * x.norms, where=scales != 0)
                fourths[at] += sketch.drawn / 2 * ratio**2
                for whole, found in zip(sketches, sketch.of(x), strict=True):
                    whole[at] = found.to(whole) * torch.from_numpy(scales).to(whole)[:, None]
        for gram, whole in zip(grams, sketches, strict=True):
            gram.addmm_(whole[: strip.rows], whole.T)
    return Sketched(grams, units, squares, fourths)


def read(stack: Stack, members: Sequence[int]) -> list[Units]:
    """Some adapters' updates at a module."""
    return units_of(members, stack.several(members), stack.path)


def blocks(stack: Stack, order: Iterable[int], room: int) -> list[list[int]]:
    """Those of some positions that have a module, in runs whose factors fit into the room."""
    ranks = dict(zip(stack.members.tolist(), stack.ranks.tolist(), strict=True))
    width = 4 * sum(stack.shape)
    found: list[list[int]] = []
    left = 0
    for i in map(int, order):
        if i not in ranks:
            continue
        size = width * ranks[i]
        if size > left:
            found.append([])
            left = room
        found[-1].append(i)
        left -= size
    return found


def strips(stacks: Sequence[Stack], order: np.ndarray, room: int) -> Iterator[Strip]:
    """All rows over all modules, cut into tasks, run of modules after run of modules."""
    M = len(order)
    rows = max(1, min(M, _ROWS // (8 * max(M, 1))))
    nbytes = np.array([stack.nbytes for stack in stacks])
    wanted = min(max(nbytes.sum() // (8 * max(M, 1) ** 2), _FEWEST), _MOST)
    ends = np.searchsorted(nbytes.cumsum(), nbytes.sum() * np.arange(1, wanted) / wanted)
    for run in np.split(np.arange(len(stacks)), np.unique(ends)):
        some = [stacks[k] for k in run]
        for first in range(0, M, rows) if some else ():
            later = order[first:]
            there = (stack.of(later) for stack in some)
            kept = [stack for stack in there if stack is not None]
            yield Strip(kept, later, min(rows, len(later)), room)
