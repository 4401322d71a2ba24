"""All pairs of a collection: inner products over all modules, exactly or from sketches.

What is kept between modules is (N, N) and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..collection.batch import Factors, joined_factors
from ..collection.collection import Collection
from ..collection.limits import memory_bytes
from ..collection.sources import Handle
from ..collection.stack import Stack
from ..collection.units import WIDTH, Units
from ..errors import RefusedError
from ..scale.engine import Engine, Task
from ..words import from_to
from .clusters import components
from .strips import Strip, blocks, exact, read, sketched, strips

Progress = Callable[[int, int, str], object]

_SAME = 2e-6  # 1 − |c| that float32 products of factors leave of copies
_UNLIKE = 0.5  # cosines below tell the error of those near 0
_ROUNDING = 1e-3  # 1 − c² below which two sketches disagree in float32's rounding
_SHARE = 8  # of the memory limit: float32 factors of one block, of which copies are made
_COPIES = 4  # of these, about, and the block itself


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
        self._memory = memory_bytes(memory)
        self._room = self._memory // _SHARE
        self._progress: Progress = progress or (lambda done, total, path: None)

    def __len__(self) -> int:
        return len(self.collection.names)

    @property
    def work(self) -> float:
        """Floating point operations of all exact products."""
        shapes = self.collection.shapes
        return float(sum(self.total_rank(path) ** 2 * sum(shape) for path, shape in shapes.items()))

    @property
    def at_once(self) -> int:
        """How many tasks run at the same time in this process, each on a thread: as memory has it
        for what is read, and its copies.
        """
        if self.collection.small:
            return 1
        largest = max((stack.nbytes for stack in self._stacks.values()), default=0)
        most = self._memory // (_COPIES * min(largest, self._room) + 1)
        return max(1, min(torch.get_num_threads(), most))

    @cached_property
    def _stacks(self) -> dict[str, Stack]:
        """Module → all adapters that have it."""
        found = {path: self.collection.stack(path, hashed=False) for path in self.collection.paths}
        return {path: stack for path, stack in found.items() if stack is not None}

    def modules(self) -> Iterator[str]:
        """Every module's path, and progress told on the way."""
        paths = self.collection.paths
        for k, path in enumerate(paths):
            self._progress(k, len(paths), path)
            yield path

    def total_rank(self, path: str) -> int:
        """The ranks of all adapters at a module, summed."""
        return int(self._stacks[path].ranks.sum())

    def units(self, path: str) -> Iterator[Units]:
        """A module of all adapters that have it."""
        stack = self._stacks[path]
        for block in blocks(stack, stack.members, self._room):
            yield from read(stack, block)

    def factors(self, path: str) -> Factors:
        """A module of all adapters that have it, as in their files, padded to one rank."""
        stack = self._stacks[path]
        updates = stack.several(stack.members.tolist())
        return joined_factors(stack.members, [(u.B, u.A, u.scale) for u in updates])

    def sketched(self, seed: int, engine: Engine | None = None) -> Cosines:
        """Every pair from sketches; the error is estimated from what two of them disagree in."""
        count = len(self)
        grams = np.zeros((2, count, count))
        squares, fourths, units = (np.zeros(count) for _ in range(3))
        for strip, found in self._mapped(engine, sketched, (seed,), np.arange(count)):
            fresh = (units[strip.order] == 0) & (found.units > 0)
            units[strip.order[fresh]] = found.units[fresh]
            unit = units[strip.order]  # in which the norms of all modules are told
            ratio = np.divide(found.units, unit, out=np.zeros(len(unit)), where=unit > 0)
            for total, part in zip(grams, found.grams.double().numpy(), strict=True):
                _add(total, strip, part * ratio[: strip.rows, None] * ratio)
            own = strip.order[: strip.rows]
            squares[own] += found.squares[: strip.rows]
            fourths[own] += (found.fourths * ratio**4)[: strip.rows]
        if not np.isfinite(grams).all():
            return self.exact(engine=engine)  # modules differ by more than float32 holds
        return _from_sketches(grams, np.sqrt(squares), fourths, units)

    def exact(self, wanted: np.ndarray | None = None, engine: Engine | None = None) -> Cosines:
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
        engine = engine or Engine(self.at_once)
        shared = None if wanted is None else engine.share(wanted)
        for strip, found in self._mapped(engine, exact, (shared,), order):
            _add(total, strip, found)
        norms = np.sqrt(total.diagonal().clip(0))
        return Cosines(_with_diagonal(_normalised(total), norms), norms, 0.0, np.zeros(count))

    def module(self, path: str) -> np.ndarray:
        """(N, N) cosines at one module, 0 where one of the two lacks it."""
        total = np.zeros((len(self), len(self)))
        for strip in strips([self._stacks[path]], np.arange(len(self)), self._room):
            _add(total, strip, exact(strip, None))
        return _with_diagonal(_normalised(total), total.diagonal())

    def _mapped(
        self,
        engine: Engine | None,
        function: Callable[..., Any],
        options: tuple[Any, ...],
        order: np.ndarray,
    ) -> Iterator[tuple[Strip, Any]]:
        """What a function finds of every strip, in order, and progress told on the way."""
        cut = list(strips([*self._stacks.values()], order, self._room))
        tasks = [Task(from_to("module", [s.path for s in c.stacks]), (c, *options)) for c in cut]
        results = (engine or Engine(self.at_once)).map(function, tasks)
        total, done = sum(len(strip.stacks) for strip in cut), 0
        for strip in cut:
            self._progress(done, total, strip.stacks[0].path)
            done += len(strip.stacks)
            yield strip, next(results)


def _add(total: np.ndarray, strip: Strip, part: np.ndarray) -> None:
    """Add what was found of a strip to the matrix of all, on either side of the diagonal."""
    rows, beyond = strip.order[: strip.rows], strip.order[strip.rows :]
    total[np.ix_(rows, strip.order)] += part
    total[np.ix_(beyond, rows)] += part[:, strip.rows :].T


def _from_sketches(
    grams: np.ndarray, norms: np.ndarray, fourths: np.ndarray, units: np.ndarray
) -> Cosines:
    """Cosines from two matrices (N, N) of inner products of independent sketches; others (N,)."""
    count = len(norms)
    first, second = (_normalised(gram) for gram in grams)
    matrix = _with_diagonal((first + second) / 2, norms)
    # Half of what they disagree in is how far their mean is off.
    off = (first - second) / 2 / (1 - matrix**2 + _ROUNDING)
    others = np.logical_and.outer(norms > 0, norms > 0) & ~np.eye(count, dtype=bool)
    unlike = others & (abs(matrix) < _UNLIKE)
    told = off[unlike if unlike.any() else others]
    error = float(np.sqrt(np.mean(told**2))) if len(told) else 0.0
    size = np.divide(norms, units, out=np.zeros(count), where=units > 0) ** 2
    focus = np.divide(np.sqrt(fourths), size, out=np.zeros(count), where=size > 0)
    return Cosines(matrix, norms, error, focus)


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
