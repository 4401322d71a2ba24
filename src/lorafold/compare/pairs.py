"""All pairs of a collection: inner products over all modules, exactly or from sketches.

A module is read at once where it fits, else in blocks, each block against those after it. What is
kept between modules is (N, N) and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ..collection.batch import Factors, joined_factors
from ..collection.collection import Collection
from ..collection.limits import memory_bytes
from ..collection.sources import Handle
from ..collection.units import WIDTH, Sketch, Units, add_inner_products, units_of
from ..errors import RefusedError
from .clusters import components

Progress = Callable[[int, int, str], object]

_SAME = 2e-6  # 1 − |c| that float32 products of factors leave of copies
_UNLIKE = 0.5  # cosines below tell the error of those near 0
_ROUNDING = 1e-3  # 1 − c² below which two sketches disagree in float32's rounding
_SHARE = 8  # of the memory limit: float32 factors of one block, of which copies are made


@dataclass(frozen=True, eq=False)
class Cosines:
    """Cosines of all pairs.

    Args:
        matrix: (N, N) float64, 0 where a norm is. norms: (N,).
        error: rms of a sketched cosine near 0.
        focus: (N,) ‖ΔW ΔWᵀ‖ / ‖ΔW‖² over what is sketched: 1 for one direction of one module, near
            0 where many hold the energy.
    """

    matrix: np.ndarray
    norms: np.ndarray
    error: float
    focus: np.ndarray


def off_at(cosine: float, error: float, focus: np.ndarray) -> np.ndarray:
    """(N, N) how far off, as an rms, the sketched cosine of a pair may be that really has `cosine`.

    With ΔW_a = c ΔW_b + √(1 − c²) Z, all of norm 1, it is off by 1 − c² of what the sketches of
    ‖ΔW_b‖ and ‖Z‖ are, which is at most focus / √w (of two, w wide). Z may be one direction where
    the two have many: they nearly cancel. But √focus is a norm (Schatten's, of σ⁴), so that
    √(1 − c²) times Z's is at most (1 + c) times the larger of theirs.

    Args:
        error, focus: as in `Cosines`; the error holds for most pairs, and so is the least.
    """
    c = max(cosine, 0.0)
    larger = np.maximum.outer(focus, focus)
    found = np.minimum(1 - c**2, (1 + c) ** 2 * larger) / WIDTH**0.5
    most: np.ndarray = np.maximum(error, found)
    return most


class Pairs:
    """Opened adapters over one base, compared.

    Args:
        handles: name → handle. memory: limit for what is read of them at once.
        progress: called with (done, total, module).

    Raises:
        RefusedError: ΔW algebra would be wrong for one; naming it, the reason and the remedy.
        MismatchError: adapters that disagree on a module's shape or kind, or on the base.
    """

    def __init__(
        self,
        handles: Mapping[str, Handle],
        memory: str | int = "1GiB",
        progress: Progress | None = None,
    ) -> None:
        for name, handle in handles.items():
            if handle.refusal is not None:
                raise RefusedError(f"{name!r} can't be compared: {handle.refusal}")
        self.collection = Collection(handles, exact=(), block_bytes=1 << 20)
        self.collection.check_layouts()
        self._block = memory_bytes(memory) // _SHARE
        self._progress: Progress = progress or (lambda done, total, path: None)

    def __len__(self) -> int:
        return len(self.collection.names)

    @property
    def work(self) -> float:
        """Floating point operations of all exact products."""
        shapes = self.collection.shapes
        return float(sum(self.total_rank(path) ** 2 * sum(shape) for path, shape in shapes.items()))

    def _having(self, path: str, order: np.ndarray | None = None) -> list[int]:
        """Positions of the adapters that have a module, in some order."""
        handles = self.collection.handles
        everyone = range(len(self)) if order is None else order.tolist()
        return [i for i in everyone if path in handles[i].shapes]

    def _blocks(self, path: str, members: list[int]) -> list[list[int]]:
        """Members in runs whose factors fit into a block."""
        width = 4 * sum(self.collection.shapes[path])
        blocks: list[list[int]] = []
        room = 0
        for i in members:
            size = width * self.collection.handles[i].shapes[path][2]
            if size > room:
                blocks.append([])
                room = self._block
            blocks[-1].append(i)
            room -= size
        return blocks

    def _read(self, path: str, members: list[int]) -> list[Units]:
        return units_of(members, (self.collection.update(i, path) for i in members), path)

    def modules(self) -> Iterator[str]:
        """Every module's path, and progress told on the way."""
        paths = self.collection.paths
        for k, path in enumerate(paths):
            self._progress(k, len(paths), path)
            yield path

    def total_rank(self, path: str) -> int:
        """The ranks of all adapters at a module, summed."""
        return sum(self.collection.handles[i].shapes[path][2] for i in self._having(path))

    def units(self, path: str) -> Iterator[Units]:
        """A module of all adapters that have it."""
        for block in self._blocks(path, self._having(path)):
            yield from self._read(path, block)

    def factors(self, path: str) -> Factors:
        """A module of all adapters that have it, as in their files, padded to one rank."""
        members = self._having(path)
        updates = [self.collection.update(i, path) for i in members]
        return joined_factors(np.array(members), [(u.B, u.A, u.scale) for u in updates])

    def sketched(self, seed: int) -> Cosines:
        """Every pair from sketches; the error is estimated from what two of them disagree in."""
        count = len(self)
        grams = torch.zeros(2, count, count)
        squares = np.zeros(count)
        fourth = np.zeros(count)
        unit = np.zeros(count)  # the first norm of each, in which its others are told
        for path in self.modules():
            sketch = Sketch(self.collection.shapes[path], path, seed)
            sketches = torch.zeros(2, count, sketch.size)
            for x in self.units(path):
                squares[x.members] += x.norms**2
                unit[x.members] = np.where(unit[x.members] > 0, unit[x.members], x.norms)
                scales = np.divide(x.scales, unit[x.members], out=0 * x.norms, where=x.norms > 0)
                ratio = np.divide(
                    x.squares, unit[x.members] ** 2, out=0 * x.norms, where=scales != 0
                )
                fourth[x.members] += sketch.drawn / 2 * ratio**2
                for whole, found in zip(sketches, sketch.of(x), strict=True):
                    whole[x.members] = found.to(whole) * torch.from_numpy(scales).to(whole)[:, None]
            for gram, whole in zip(grams, sketches, strict=True):
                gram.addmm_(whole, whole.T)
        if not bool(torch.isfinite(grams).all()):
            return self.exact()  # an adapter's modules differ by more than float32 holds
        first, second = (_normalised(gram.double().numpy()) for gram in grams)
        norms = np.sqrt(squares)
        matrix = _with_diagonal((first + second) / 2, norms)
        # Half of what they disagree in is how far their mean is off.
        off = (first - second) / 2 / (1 - matrix**2 + _ROUNDING)
        others = np.logical_and.outer(norms > 0, norms > 0) & ~np.eye(count, dtype=bool)
        unlike = others & (abs(matrix) < _UNLIKE)
        told = off[unlike if unlike.any() else others]
        error = float(np.sqrt(np.mean(told**2))) if len(told) else 0.0
        size = np.divide(norms, unit, out=np.zeros(count), where=unit > 0) ** 2
        focus = np.divide(np.sqrt(fourth), size, out=np.zeros(count), where=size > 0)
        return Cosines(matrix, norms, error, focus)

    def exact(self, wanted: np.ndarray | None = None) -> Cosines:
        """Every pair exactly, or those that are wanted (and some beside: not all of the rest).

        Args:
            wanted: (N, N) bool, symmetric.
        """
        count = len(self)
        total = np.zeros((count, count))
        order = np.arange(count)
        if wanted is not None:
            wanted = wanted | np.diag(wanted.any(0))  # for their norms
            # Those that are near one another lie together, so that few tiles hold all that matters.
            groups = components(wanted)
            order = np.concatenate([order[:0], *(g for g in groups if len(g) > 1)])
        for path in self.modules():
            self._add(total, path, order, wanted)
        norms = np.sqrt(total.diagonal().clip(0))
        return Cosines(_with_diagonal(_normalised(total), norms), norms, 0.0, np.zeros(count))

    def module(self, path: str) -> np.ndarray:
        """(N, N) cosines at one module, 0 where one of the two lacks it."""
        total = np.zeros((len(self), len(self)))
        self._add(total, path, np.arange(len(self)), None)
        return _with_diagonal(_normalised(total), total.diagonal())

    def _add(
        self, total: np.ndarray, path: str, order: np.ndarray, wanted: np.ndarray | None
    ) -> None:
        """Add inner products at one module."""
        blocks = self._blocks(path, self._having(path, order))
        for k, block in enumerate(blocks):
            xs = self._read(path, block)
            add_inner_products(total, xs, xs, wanted)
            for other in blocks[k + 1 :]:
                if wanted is None or wanted[np.ix_(block, other)].any():
                    add_inner_products(total, xs, self._read(path, other), wanted)


def _normalised(gram: np.ndarray) -> np.ndarray:
    root = np.sqrt(gram.diagonal().clip(0))
    inverse = np.divide(1.0, root, out=np.zeros_like(root), where=root > 0)
    result: np.ndarray = gram * inverse[:, None] * inverse
    return result


def _with_diagonal(cosines: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """Rounding taken off: symmetric, ±1 where nearly, 1 with oneself, but 0 for a zero update."""
    cosines = (cosines + cosines.T) / 2
    cosines = np.where(abs(cosines) > 1 - _SAME, np.sign(cosines), cosines)
    np.fill_diagonal(cosines, (norms > 0).astype(float))
    return cosines
