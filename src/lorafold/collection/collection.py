"""Opened adapters, checked against one another, and seen module by module."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Container, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from torch import Tensor

from ..adapter import Layout, combined_digest, module_digest, tensor_digest
from ..errors import MismatchError
from ..files.remote.place import concurrently
from ..lowrank import LowRank
from ..words import from_to, some_of
from .elsewhere import Elsewhere, one_module
from .sources import Handle
from .stack import Stack

_FEW = 16_000_000  # numbers in a collection that one thread is enough for, whatever is done
_HASHED_TOGETHER = 1 << 20  # numbers: handing fewer to another thread costs more than hashing them
_AT_ONCE = 8  # so many of these that wait for their digests
_TOGETHER = 1 << 26  # float32 bytes of all modules of the adapters of a block, or
_BLOCKS = 32  # this part of all: there is work for several, and few enough that batches pay
_KEPT = 64  # a collection of no more blocks, a quarter of the memory limit, is read once and kept


class Collection:
    """Opened adapters, checked against one another.

    Args:
        handles: name → handle. exact: names to be stored as they are, beside the refused ones.
        block_bytes: see `Stack`. device: where the algebra runs.
        before: path → (out, in) of modules that come first, in their order, had or not.

    Attributes:
        names: those to be folded first, then those to be stored exactly.
        folded: how many of the names are folded.
        paths: every module's path, sorted after those of `before`. shapes: (out, in) of each.
        layouts: of those that are not plain linear layers.
        stays: whether what is read does, as all of it fits under the memory limit.
        blocks: (first, end) positions of the folded adapters that are worked on together: as many
            as memory allows at the largest module, whoever works on them.

    Raises:
        MismatchError: two adapters that disagree on a module's shape or on the base.
    """

    def __init__(
        self,
        handles: Mapping[str, Handle],
        *,
        exact: Container[str],
        block_bytes: int,
        device: Any = None,
        before: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        before = before or {}
        refused = {name for name, h in handles.items() if name in exact or h.refusal is not None}
        self.names = [n for n in handles if n not in refused] + [n for n in handles if n in refused]
        self.folded = len(handles) - len(refused)
        self.handles = [handles[name] for name in self.names]
        self.base_model = _common_base(self.names, self.handles)
        first = self._first_with_each()
        self.paths = [*before, *(p for p in sorted(first) if p not in before)]
        self.shapes = {**before, **{p: self.handles[i].shapes[p][:2] for p, i in first.items()}}
        self.layouts = {
            p: self.handles[first[p]].layouts[p]
            for p in sorted(first)
            if p in self.handles[first[p]].layouts
        }
        self.block_bytes, self._device = block_bytes, device
        self.num_parameters = sum(
            r * (out + inner) for h in self.handles for out, inner, r in h.shapes.values()
        )
        self.stays = 4 * self.num_parameters <= _KEPT * block_bytes
        self.blocks = self._split()
        self._digests: list[dict[str, bytes]] = [{} for _ in self.names]
        # SHA-256 lets go of the interpreter's lock, so it costs nothing beside the algebra.
        self._pool = ThreadPoolExecutor(2, "digest")
        self._lock = threading.Lock()
        self._read: list[tuple[int, str, LowRank]] = []
        self._numbers = 0  # in these
        self._hashing: deque[Future[None]] = deque()

    def _first_with_each(self) -> dict[str, int]:
        """Path → position of the first that has it; all others have it in the same shape."""
        first: dict[str, int] = {}
        odd: dict[tuple[str, int], None] = {}
        for i, h in enumerate(self.handles):
            for path, shape in h.shapes.items():
                other = self.handles[first.setdefault(path, i)].shapes[path]
                if shape[:2] != other[:2]:
                    odd[path, i] = None
        if odd:
            path, i = next(iter(odd))
            one, two = (
                f"{self.handles[k].shapes[path][:2]} in {self.names[k]!r}" for k in (first[path], i)
            )
            raise MismatchError(
                f"module {path!r} is {one} and {two}: they belong to different bases"
                f"{self._odd_ones(odd)}"
            )
        return first

    def _odd_ones(self, odd: Iterable[tuple[str, int]]) -> str:
        """Which modules of which adapters are not of the first one's shape, if several."""
        paths = dict.fromkeys(path for path, _ in odd)
        names = dict.fromkeys(self.names[i] for _, i in odd)
        if len(paths) == len(names) == 1:
            return ""
        return f"; of other shapes than the first are {some_of(paths)} in {some_of(names)}"

    def check_layouts(self) -> None:
        """Refuse one module that is of two kinds.

        Raises:
            MismatchError: naming both adapters.
        """
        first: dict[str, tuple[str, Any]] = {}
        for name, handle in zip(self.names, self.handles, strict=True):
            for path in handle.shapes:
                layout = handle.layouts.get(path)
                kind = ("linear", ()) if layout is None else (layout.kind, layout.kernel)
                owner, other = first.setdefault(path, (name, kind))
                if kind != other:
                    raise MismatchError(
                        f"module {path!r} is of kind {other[0]} in {owner!r} and {kind[0]} in "
                        f"{name!r}"
                    )

    @property
    def missing(self) -> dict[str, tuple[str, ...]]:
        """Module → the names that lack it, where some do."""
        pairs = list(zip(self.names, self.handles, strict=True))
        found = {p: tuple(n for n, h in pairs if p not in h.shapes) for p in self.paths}
        return {path: who for path, who in found.items() if who}

    @property
    def small(self) -> bool:
        """Whether one thread is enough for whatever is done."""
        return self.num_parameters < _FEW

    def stack(self, path: str, hashed: bool = True) -> Stack | None:
        """The folded adapters that have the module; None if there is none.

        Args:
            hashed: what is read is hashed on the way, for `digest`.
        """
        members = np.array(
            [i for i in range(self.folded) if path in self.handles[i].shapes], np.int64
        )
        if not len(members):
            return None
        ranks = np.array([self.handles[i].shapes[path][2] for i in members.tolist()])
        cuts = np.searchsorted(members, [end for _, end in self.blocks[:-1]])
        blocks = [rows for rows in np.split(np.arange(len(members)), cuts) if len(rows)]
        return Stack(
            path,
            self.shapes[path],
            members,
            ranks,
            _Reader(self, path, hashed),
            self.block_bytes,
            self._device,
            self.stays,
            blocks,
        )

    def _split(self) -> list[tuple[int, int]]:
        widest, everything = [], []
        for h in self.handles[: self.folded]:
            sizes = [4 * r * (out + inner) for out, inner, r in h.shapes.values()]
            widest.append(max(sizes, default=0))
            everything.append(sum(sizes))
        together = max(_TOGETHER, sum(everything) // _BLOCKS)
        found, start, top, total = [], 0, 0, 0
        for i, (wide, size) in enumerate(zip(widest, everything, strict=True)):
            top, total = max(top, wide), total + size
            if i > start and ((i + 1 - start) * top > self.block_bytes or total > together):
                found.append((start, i))
                start, top, total = i, wide, size
        return [*found, (start, self.folded)]

    def called(self, first: int, end: int) -> str:
        """What to call the adapters at these positions."""
        return from_to("adapter", self.names[first:end])

    def update(self, i: int, path: str) -> LowRank:
        """Adapter i's update at a module."""
        try:
            return self.handles[i].read(path)
        except MismatchError as e:
            raise MismatchError(f"adapter {self.names[i]!r}: {e}") from e

    def read(self, i: int, path: str) -> LowRank:
        """Adapter i's update at a module; its digest is taken on the way."""
        return self._seen(i, path, self.update(i, path))

    def several(self, members: Sequence[int], path: str, hashed: bool = True) -> list[LowRank]:
        """The updates of several adapters, in their order; see `stack`."""
        found = concurrently(
            lambda i: self.update(i, path), members, lambda i: self.handles[i].path
        )
        if not hashed:
            return list(found)
        return [self._seen(i, path, u) for i, u in zip(members, found, strict=True)]

    def _seen(self, i: int, path: str, u: LowRank) -> LowRank:
        with self._lock:  # tasks that run at the same time read, too
            if path not in self._digests[i]:
                self._digests[i][path] = b""  # to come
                self._read.append((i, path, u))
                self._numbers += u.num_parameters
                if self._numbers >= min(_HASHED_TOGETHER, self.block_bytes):
                    self._hashing.append(self._pool.submit(self._hash, self._read))
                    self._read, self._numbers = [], 0
                    self._collect(_AT_ONCE)
        return u

    def know(self, digests: Mapping[tuple[int, str], bytes]) -> None:
        """Take in the digests of modules that were read elsewhere: (position, path) → digest."""
        for (i, path), digest in digests.items():
            self._digests[i].setdefault(path, digest)

    def _hash(self, updates: list[tuple[int, str, LowRank]]) -> None:
        for i, path, u in updates:
            layout = self.handles[i].layouts.get(path, Layout())
            self._digests[i][path] = module_digest(path, u, layout)

    def _collect(self, left: int = 0) -> None:
        """Wait until no more than `left` of what is hashed together is under way."""
        while len(self._hashing) > left:
            self._hashing.popleft().result()

    def digest(self, i: int, extras: Mapping[str, Tensor]) -> str:
        """Adapter i's digest, from what `read` has seen of it (the rest is read now)."""
        for path in self.handles[i].shapes:
            if path not in self._digests[i]:
                self.read(i, path)
        self._hash(self._read)
        self._read, self._numbers = [], 0
        self._collect()
        return combined_digest(
            [*self._digests[i].values(), *(tensor_digest(k, t) for k, t in extras.items())]
        )


class _Reader:
    """What a stack reads by; `only` gives what does so elsewhere."""

    def __init__(self, collection: Collection, path: str, hashed: bool) -> None:
        self._collection, self._path, self._hashed = collection, path, hashed

    def __call__(self, i: int) -> LowRank:
        (found,) = self.several([i])
        return found

    def several(self, members: Sequence[int]) -> list[LowRank]:
        """The same of several."""
        return self._collection.several(members, self._path, self._hashed)

    def only(self, members: np.ndarray) -> Elsewhere:
        """The same for some positions, made to be pickled."""
        c, path, there = self._collection, self._path, members.tolist()
        layouts = {i: c.handles[i].layouts[path] for i in there if path in c.handles[i].layouts}
        readers = {i: one_module(c.handles[i], path) for i in there}
        return Elsewhere(path, readers, {i: c.names[i] for i in there}, layouts)


def _common_base(names: list[str], handles: list[Handle]) -> str | None:
    bases: dict[str, list[str]] = {}
    for name, h in zip(names, handles, strict=True):
        if h.base_model:
            bases.setdefault(h.base_model, []).append(name)
    if len(bases) > 1:
        found = "; ".join(f"{some_of(who)} to {base!r}" for base, who in list(bases.items())[:4])
        rest = f"; {len(bases) - 4:,} more" if len(bases) > 4 else ""
        raise MismatchError(
            f"the adapters belong to different bases: {found}{rest}; if these are one, load them "
            "with one base_model="
        )
    return next(iter(bases), None)
