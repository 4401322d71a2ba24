"""What an opened library says of its adapters, without decoding any: no torch in it."""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass

from ...errors import FileError
from ...words import warn
from .entries import AdapterEntry, ModuleEntry
from .manifest import Manifest
from .shard import Shard
from .state import remedy
from .store import Store
from .turns import TIMEOUT

_NUMBERS = {"U32": "I", "I64": "q", "U64": "Q"}  # codes of dtypes: as Python's arrays have them


class Catalog:
    """One state of a store: its adapters and modules, and how many bytes each takes.

    What is changed later does not reach it: what it gives belongs together.

    Args:
        store: the files.

    Not for: the numbers of an adapter, which `Contents` gives.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.state = store.state
        self._indices: dict[str, Index] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str], timeout: float = TIMEOUT) -> Catalog:
        """That of a folder; see `Library.open`, which warns of damage, too."""
        found = cls(Store.open(path, timeout))
        found.warn_of_damage()
        return found

    @property
    def manifest(self) -> Manifest:
        return self.state.manifest

    @property
    def modules(self) -> tuple[ModuleEntry, ...]:
        """The modules; a module's position is its number."""
        return self.state.manifest.modules

    def adopt(self, other: Catalog) -> None:
        """Take over the indices that another one has read, of shards that are here."""
        there = self.state.shards
        self._indices |= {n: at for n, at in list(other._indices.items()) if n in there}

    # Adapters

    def entry(self, name: str) -> AdapterEntry:
        """What the manifest says of an adapter.

        Raises:
            UnknownNameError: no such adapter.
        """
        return self.manifest.entry(name)

    def own_bytes(self, name: str) -> int:
        """Bytes of an adapter's records; what it shares with others and its extras are apart."""
        entry = self.entry(name)
        starts, stops = self._index(entry).spans(entry.row)
        return sum(stops) - sum(starts)

    def problem(self, name: str) -> str | None:
        """Why nothing of an adapter can be read; None where its shard is open, with its index.

        Not for: what else is damaged within a shard, which is told when it is read.

        Raises:
            UnknownNameError: no such adapter.
        """
        entry = self.entry(name)
        if entry.shard in self.state.missing:
            return self.state.damage[entry.shard].text
        try:
            self._index(entry)
        except FileError as e:
            return str(e)
        return None

    def warn_of_damage(self) -> None:
        """Warn of files that could not be opened, and of how many adapters that is known."""
        if not self.state.damage:
            return
        there = self.manifest.adapters
        lost = [name for name, shard in there.shard_of().items() if shard in self.state.missing]
        which = f"{len(lost)} of its {len(there)} adapters can't be read"
        if not lost:
            which = "adapters that need it can't be read"
        advice = remedy(self.store.path, all(damage.lost for damage in self.state.damage.values()))
        warn(
            f"the library {self.store.path} is damaged: {self.state.problems()}; {which}; {advice}"
        )

    # Sizes

    def present(self, entry: AdapterEntry) -> list[int]:
        """The numbers of the modules that an adapter has."""
        spans = zip(*self._index(entry).spans(entry.row), strict=True)
        return [j for j, (start, stop) in enumerate(spans) if stop > start]

    def span(self, j: int, entry: AdapterEntry) -> tuple[int, int]:
        """Where an adapter's record at module number j begins and ends in the shard's `m{j}`."""
        index = self._index(entry)
        return index.span(j, entry.row) if j < index.modules else (0, 0)

    def record_size(self, j: int, entry: AdapterEntry) -> int:
        """Bytes of an adapter at module number j; 0 where it lacks the module."""
        start, stop = self.span(j, entry)
        return stop - start

    def basis_size(self, shard: str, tensor: str) -> int:
        """Bytes of one stored piece of a basis."""
        return int(self._shard(shard).shape(tensor)[0])

    def _shard(self, name: str) -> Shard:
        return self.state.shard(name, self.store.path)

    def _index(self, entry: AdapterEntry) -> Index:
        found = self._indices.get(entry.shard)
        if found is None:
            shard = self._shard(entry.shard)
            found = self._indices[entry.shard] = Index.of(shard, len(self.modules))
        if entry.row >= found.rows:
            raise FileError(
                f"{entry.name!r} is row {entry.row} of a shard that has {found.rows} rows"
            )
        return found


@dataclass(frozen=True)
class Index:
    """Where the records of a shard begin and end: (modules, rows + 1) numbers, row after row."""

    modules: int
    rows: int
    numbers: array[int]

    @classmethod
    def of(cls, shard: Shard, modules: int) -> Index:
        """That of a shard in a library of so many modules.

        Raises:
            FileError: it is of another size, or damaged.
        """
        shape, code = shard.shape("at"), shard.code("at")
        if len(shape) != 2 or shape[0] > modules or shape[1] < 1 or code not in _NUMBERS:
            raise FileError(
                f"shard {shard.name}: its index is {shape} of {code}, for {modules} modules"
            )
        numbers = array(_NUMBERS[code])
        numbers.frombytes(shard.read_bytes("at"))
        return cls(shape[0], shape[1] - 1, numbers)

    def span(self, j: int, row: int) -> tuple[int, int]:
        """Where the record of a row at module number j begins and ends."""
        at = j * (self.rows + 1) + row
        return self.numbers[at], self.numbers[at + 1]

    def spans(self, row: int) -> tuple[array[int], array[int]]:
        """The same at all modules: where they begin, and where they end."""
        step = self.rows + 1
        return self.numbers[row::step], self.numbers[row + 1 :: step]
