"""What a way of transferring is given, what it gives back, and what a user gets.

A method is a function `Job -> Moved` in the table of `transfer.py`. It moves modules and says where
they come from; rank cuts, the report and the adapter around it are made of that for all alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..adapter import Adapter
from ..lowrank import LowRank
from ..parts import LINEAR, Layout
from .report import TransferReport

Progress = Callable[[int, int, str], object]


@dataclass(frozen=True)
class Place:
    """Where a module of the source goes: path, (out, in) and layout in the target."""

    path: str
    shape: tuple[int, int]
    layout: Layout = LINEAR


@dataclass(frozen=True, eq=False)
class Job:
    """One transfer, its arguments checked.

    Args:
        adapter: of the source base; ΔW algebra is right for it.
        source, target: the bases as they were given; None where there are none.
        places: {module path: its place}, for the methods that need no more than shapes.
        texts, alignment: as they were given.
        rank, energy: what the result will be cut to; None where it won't.
        options: the method's own, each of them there.
        progress: called with done, total, what.
    """

    adapter: Adapter
    source: Any = None
    target: Any = None
    places: Mapping[str, Place] = field(default_factory=dict)
    texts: Sequence[str] | None = None
    alignment: Any = None
    rank: int | None = None
    energy: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    progress: Progress | None = None


@dataclass(frozen=True, eq=False)
class Moved:
    """What a method made of an adapter.

    Args:
        modules: {path in the target: update}.
        sources: {path in the target: paths in the source that it was made of}; the same path where
            none is given.
        layouts: {path in the target: Layout}; plain linear where none is given.
        fits: {path in the target: share of the held-out activations' variance that the alignment
            explains}, R², where there is one.
        dropped: {path in the source: why it was left out}.
        without: {path in the source: why nothing in the target is its counterpart}.
        distances: {path in the target: ‖W_t − W_s‖ / ‖W_s‖}, where the method compared the bases.
        said: JSON values, for the report and the file's metadata.
    """

    modules: Mapping[str, LowRank]
    sources: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    fits: Mapping[str, float] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    without: Mapping[str, str] = field(default_factory=dict)
    distances: Mapping[str, float] = field(default_factory=dict)
    said: Mapping[str, Any] = field(default_factory=dict)


Method = Callable[[Job], Moved]


@dataclass(frozen=True, eq=False)
class Transfer:
    """A transferred adapter and what is to be said of it. Made by `transfer`.

    Args:
        adapter: an `Adapter`, or a `LowRank` where one was given.
        report: a `TransferReport`.
    """

    adapter: Any
    report: TransferReport

    def __repr__(self) -> str:
        return f"Transfer({self.adapter!r}, {self.report!r})"
