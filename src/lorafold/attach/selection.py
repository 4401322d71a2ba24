"""What `use` asks for: per row a mix of adapters with their coefficients, and a rank.

A selection is checked here against the names there are, and means the same whatever is attached
how: `rows` entries, of which a uniform selection has one that stands for the whole batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral, Real
from typing import Any, TypeAlias

from torch import Tensor

from ..errors import MismatchError, UnknownNameError
from ..layers.targets import matches
from ..words import did_you_mean, one_line

Rank: TypeAlias = "int | Mapping[Any, int] | None"
_PLAIN = (str, dict, type(None))  # asked for first: asking an abstract class takes longer


class TokenMix(ABC):
    """Adapters of which every token gets its own mix at every layer, found in the layer's input.

    `use` takes one in the place of a mix. What it knows of a layer are tensors, and how weights
    come of them is a function without a state: a graph that was compiled for one runs all of its
    class. What it knows never changes.

    Not for: one mix a row, which is found before the model runs: that is a list of mixes.

    Attributes:
        names: of the adapters.
    """

    names: tuple[str, ...]

    @abstractmethod
    def numbers(
        self, modules: Sequence[tuple[str, str | None]], width: int, inner: int
    ) -> tuple[Tensor, ...]:
        """What `weights` needs at one layer.

        Args:
            modules: (an adapter's name, what it calls the layer, or None where it has no update
                there) of each that runs. width: places for adapters, at least as many.
            inner: numbers of an input.

        Returns:
            Tensors whose shapes depend on `width` and `inner` alone.

        Raises:
            MismatchError: it knows no such module, or one of another size.
        """

    @staticmethod
    @abstractmethod
    def weights(x: Tensor, *numbers: Tensor) -> Tensor:
        """The weights (T, width) of inputs x (T, inner); traced into graphs."""

    def __deepcopy__(self, memo: Any) -> TokenMix:
        return self  # it never changes


@dataclass(frozen=True)
class Row:
    """One row's adapters.

    Args:
        mix: (name, coefficient) of each. rank: the prefix to run, one for all modules or
            {target: k}; None for all of it.
    """

    mix: tuple[tuple[str, float], ...] = ()
    rank: Rank = None

    @property
    def on(self) -> bool:
        """Whether anything but the base runs."""
        return self.rank != 0 and any(c != 0 for _, c in self.mix)


Mix: TypeAlias = str | Mapping[str, float] | None
What: TypeAlias = Mix | Sequence[Mix] | TokenMix  # for all of a batch, or for each row


@dataclass(frozen=True)
class Selection:
    """The rows of a batch; a uniform selection has one row for all of it.

    Args:
        lengths: of packed rows, how many consecutive entries along the second axis each is.
        tokens: what weighs the row's adapters for each token; None where all get the same.
    """

    rows: tuple[Row, ...]
    uniform: bool = True
    lengths: tuple[int, ...] | None = None
    tokens: TokenMix | None = None

    @classmethod
    def of(
        cls, what: Any, c: Any, rank: Any, names: Collection[str], lengths: Any = None
    ) -> Selection:
        """The selection that `use(what, c=c, rank=rank, lengths=lengths)` asks for.

        Args:
            what: None, a name, {name: weight}, or a list with one of these for each row; or a
                `TokenMix`.
            c: a number, or one for each row. rank: a rank, or one for each row.
            names: those there are. lengths: of packed rows, one for each row.

        Raises:
            UnknownNameError: a name that is not there. MismatchError: anything else that is no
                selection, naming it.
        """
        if isinstance(what, Sequence) and not isinstance(what, str):
            if not what:
                raise MismatchError("use([]) selects no row; give one entry per row, or None")
            cs, ranks = _per_row(c, len(what), "c"), _per_row(rank, len(what), "rank")
            rows = (_row(w, cs[i], ranks[i], names) for i, w in enumerate(what))
            return cls(tuple(rows), uniform=False, lengths=_lengths(lengths, len(what)))
        for label, value in (("c", c), ("rank", rank), ("lengths", lengths)):
            listed = isinstance(value, Sequence) and not isinstance(value, str)
            if listed or (label == "lengths" and value is not None):
                raise MismatchError(
                    f"{label}= has one entry per row, so the adapters must be a list as well"
                )
        if not isinstance(what, _PLAIN) and isinstance(what, TokenMix):
            return cls((_row(dict.fromkeys(what.names, 1.0), c, rank, names),), tokens=what)
        return cls((_row(what, c, rank, names),))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The adapters that take part, in the order in which they are named."""
        return tuple(dict.fromkeys(name for row in self.rows for name, c in row.mix if c != 0))

    @property
    def mixed(self) -> list[str]:
        """The adapters of the first row, at whatever coefficient."""
        return [name for name, _ in self.rows[0].mix]

    @property
    def on(self) -> bool:
        """Whether anything but the base runs."""
        return any(row.on for row in self.rows)

    def without(self, names: Iterable[str]) -> Selection:
        """The selection with some adapters taken out."""
        gone = set(names)
        rows = tuple(Row(tuple(p for p in r.mix if p[0] not in gone), r.rank) for r in self.rows)
        return replace(self, rows=rows)

    def left_by(self, names: Iterable[str]) -> Selection | None:
        """The selection once some adapters have gone; None where it was of nothing else."""
        left = self.without(names)
        emptied = any(row.mix for row in self.rows) and not any(row.mix for row in left.rows)
        return None if emptied else left

    @property
    def width(self) -> int:
        """Adapters per row, padded to a power of two."""
        return _padded(max((len(row.mix) for row in self.rows), default=0))

    @property
    def height(self) -> int:
        """Rows, those of a packed batch padded to a power of two, and one more for the base."""
        return len(self.rows) if self.lengths is None else _padded(len(self.rows)) + 1


def _padded(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def _per_row(value: Any, count: int, label: str) -> list[Any]:
    if hasattr(value, "tolist"):
        value = value.tolist()  # a tensor or an array
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * count
    if len(value) != count:
        raise MismatchError(f"{label} has {len(value)} entries for {count} rows")
    return list(value)


def _lengths(value: Any, count: int) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, Sequence) and getattr(value, "ndim", 0) != 1:
        raise MismatchError(
            f"lengths must be a list with one entry per row, found {one_line(value)}"
        )
    found = [_whole(length, "a length") for length in _per_row(value, count, "lengths")]
    if max(found) >= EVERYTHING:
        raise MismatchError(f"a length of {max(found)} is more than any batch has")
    return tuple(found)


def _row(what: Any, c: Any, rank: Any, known: Collection[str]) -> Row:
    c = 1.0 if c is None else _number(c, "c")
    if isinstance(what, Mapping):
        names: Iterable[Any] = what
    elif what is None or isinstance(what, str):
        names = () if what is None else (what,)
    elif isinstance(what, TokenMix):
        raise MismatchError(
            f"{type(what).__name__} weighs every token by itself: give it alone, not in a list"
        )
    elif callable(what):
        raise MismatchError(
            f"use takes what {type(what).__name__} gives for a batch: call it on that first"
        )
    else:
        raise MismatchError(
            f"a row's adapter must be a name, None or {{name: weight}}, found {one_line(what)}"
        )
    for name in names:
        if name not in known:
            raise UnknownNameError(
                f"no adapter {one_line(name)} is attached; {did_you_mean(str(name), known)}"
            )
    if isinstance(what, Mapping):
        mix = tuple((n, c * _number(w, f"the weight of {n!r}")) for n, w in what.items())
    else:
        mix = tuple((name, c) for name in names)
    return Row(mix, _rank(rank))


def _number(value: Any, label: str) -> float:
    if type(value) is float and math.isfinite(value):
        return value  # most are, and asking an abstract class takes longer than all the rest
    if getattr(value, "ndim", None) == 0:
        value = value.item()  # of a tensor or an array
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise MismatchError(f"{label} must be a finite number, found {one_line(value)}")
    return float(value)


def _rank(value: Any) -> Rank:
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {target: _whole(k) for target, k in value.items()}
    return _whole(value)


def _whole(value: Any, label: str = "rank") -> int:
    if getattr(value, "ndim", None) == 0:
        value = value.item()  # of a tensor or an array
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
        raise MismatchError(
            f"{label} must be a whole number of at least 0, found {one_line(value)}"
        )
    return int(value)


EVERYTHING = 1 << 30  # a rank that no module has


def ranks_at(rank: Rank, paths: list[str]) -> list[int]:
    """The prefix that each module runs."""
    if rank is None:
        return [EVERYTHING] * len(paths)
    if isinstance(rank, int):
        return [rank] * len(paths)
    return [next((k for t, k in rank.items() if matches(t, p)), EVERYTHING) for p in paths]


def prefix(rank: Rank, path: str, have: int) -> int:
    """The prefix that one module of rank `have` runs."""
    return min(ranks_at(rank, [path])[0], have)
