"""What an opened library says of its adapters, without decoding any: no torch in it."""

from __future__ import annotations

import bisect
import copy
import os
import zlib
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import FileError
from ...words import warn
from .entries import AdapterEntry, ModuleEntry
from .manifest import Manifest
from .shard import Shard
from .shard_writer import ShardInfo, ShardWriter
from .state import State, remedy
from .store import Store
from .turns import TIMEOUT

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Self

_NUMBERS = {"U32": "I", "I64": "q"}  # codes of dtypes: as Python's arrays have them
_KEPT = 1024  # rows of an index that stay in memory
Spans = tuple[Sequence[int], Sequence[int]]


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
        self._indices: dict[ShardInfo, Index] = {}

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
        there = set(self.state.shards.infos.values())
        self._indices |= {i: at for i, at in list(other._indices.items()) if i in there}

    # Adapters

    def entry(self, name: str) -> AdapterEntry:
        """What the manifest says of an adapter.

        Raises:
            UnknownNameError: no such adapter.
        """
        return self.manifest.entry(name)

    def own_bytes(self, name: str) -> int:
        """Bytes of an adapter's records; what it shares with others and its extras are apart."""
        starts, stops = self._spans(self.entry(name))
        return sum(stops) - sum(starts)

    def problem(self, name: str) -> str | None:
        """Why nothing of an adapter can be read; None where its shard is open, with its index.

        Not for: what else is damaged within a shard, which is told when it is read.

        Raises:
            UnknownNameError: no such adapter.
        """
        entry = self.entry(name)
        shard = self.manifest.shard_of(entry.id)
        if shard is not None and shard in self.state.missing:
            return self.state.damage[shard].text
        try:
            self._spans(entry)
        except FileError as e:
            return str(e)
        return None

    def warn_of_damage(self) -> None:
        """Warn of files that could not be opened, and of how many adapters that is known."""
        if not self.state.damage:
            return
        holds = self.manifest.holds
        lost = sum(holds[name].alive for name in self.state.missing if name in holds)
        which = f"{lost} of its {len(self.manifest.adapters)} adapters can't be read"
        if not lost:
            which = "adapters that need it can't be read"
        advice = remedy(self.store.path, all(damage.lost for damage in self.state.damage.values()))
        warn(
            f"the library {self.store.path} is damaged: {self.state.problems()}; {which}; {advice}"
        )

    # Sizes

    def present(self, entry: AdapterEntry) -> list[int]:
        """The numbers of the modules that an adapter has."""
        spans = zip(*self._spans(entry), strict=True)
        return [j for j, (start, stop) in enumerate(spans) if stop > start]

    def span(self, j: int, entry: AdapterEntry) -> tuple[int, int]:
        """Where an adapter's record at module number j begins and ends in the shard's `m{j}`."""
        starts, stops = self._spans(entry)
        return (starts[j], stops[j]) if j < len(starts) else (0, 0)

    def record_sizes(self, entry: AdapterEntry) -> list[int]:
        """Bytes of an adapter at each module that its shard knows, by their numbers."""
        return [stop - start for start, stop in zip(*self._spans(entry), strict=True)]

    def record_size(self, j: int, entry: AdapterEntry) -> int:
        """Bytes of an adapter at module number j; 0 where it lacks the module."""
        start, stop = self.span(j, entry)
        return stop - start

    def basis_size(self, shard: str, tensor: str) -> int:
        """Bytes of one stored piece of a basis."""
        return int(self._shard(shard).shape(tensor)[0])

    def _shard(self, name: str) -> Shard:
        return self.state.shard(name, self.store.path)

    def shard_of(self, entry: AdapterEntry) -> Shard:
        """The shard with an adapter's records.

        Raises:
            FileError: it is lost, or the manifest names none.
        """
        name = self.manifest.shard_of(entry.id)
        if name is None:
            raise FileError(f"{entry.name!r} has id {entry.id}, which no shard of the library has")
        return self._shard(name)

    def _spans(self, entry: AdapterEntry) -> Spans:
        shard = self.shard_of(entry)
        return self._index(shard).spans(shard, entry.id)

    def _index(self, shard: Shard) -> Index:
        found = self._indices.get(shard.stated)
        if found is None:
            found = self._indices[shard.stated] = Index(shard, len(self.modules))
        return found

    def card(self, name: str) -> str | None:
        """An adapter's model card, the text of the README.md beside its file."""
        entry = self.entry(name)
        shard = self.shard_of(entry)
        found = card_of(shard, self._index(shard).row(shard, entry.id))
        return None if found is None else found.decode(errors="replace")

    def seeing(self, state: State) -> Self:
        """The same of another state of the store, as it was found to be by a closer look."""
        twin = copy.copy(self)
        twin.state = state
        return twin


class Index:
    """Where the records of a shard's rows begin and end; of a row, what is asked for is read.

    Args:
        shard: that it is of. modules: how many the library has.

    Attributes:
        modules: how many the shard knows. ids: of the rows, rising.

    Raises:
        FileError: it is of another size, or damaged.
    """

    def __init__(self, shard: Shard, modules: int) -> None:
        shape, code = shard.shape("at"), shard.code("at")
        fits = len(shape) == 2 and 1 <= shape[1] <= modules + 1 and code in _NUMBERS
        if not fits or shard.shape("ids") != (shape[0] - 1,) or shard.code("ids") != "I64":
            raise FileError(
                f"shard {shard.name}: its index is {shape} of {code}, for {modules} modules"
            )
        self.modules = shape[1] - 1
        self._code = _NUMBERS[code]
        self.ids = array("q")
        self.ids.frombytes(shard.read_bytes("ids"))
        self._kept: dict[int, Spans] = {}

    def row(self, shard: Shard, number: int) -> int:
        """The row of an id."""
        row = bisect.bisect_left(self.ids, number)
        if row == len(self.ids) or self.ids[row] != number:
            raise FileError(
                f"shard {shard.name} has no id {number}: it and the manifest do not belong together"
            )
        return row

    def spans(self, shard: Shard, number: int) -> Spans:
        """Where the records of an id begin and end at all modules."""
        found = self._kept.get(number)
        if found is None:
            found = self._read(shard, self.row(shard, number))
            if len(self._kept) >= _KEPT:
                self._kept.clear()
            self._kept[number] = found
        return found

    def _read(self, shard: Shard, row: int) -> Spans:
        both, m = array(self._code), self.modules
        step = both.itemsize * (m + 1)
        raw = shard.read_bytes("at", row * step, (row + 2) * step)
        both.frombytes(raw)
        ends = memoryview(raw)[: step - both.itemsize], memoryview(raw)[step : -both.itemsize]
        if zlib.crc32(ends[1], zlib.crc32(ends[0])) != both[m]:
            raise FileError(f"shard {shard.name} is damaged in row {row} of its index")
        return both[:m], both[m + 1 : -1]


def index_of(ids: Sequence[int], sizes: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors of an index, by their names.

    Args:
        ids: of the rows, rising. sizes: (modules, rows) bytes of the records.
    """
    import numpy as np

    modules, rows = sizes.shape
    at = np.zeros((rows + 1, modules + 1), np.int64)
    np.cumsum(sizes.T, axis=0, out=at[1:, :modules])
    if at.max(initial=0) < 1 << 32:
        at = at.astype(np.uint32)
    lines = [line.tobytes() for line in at[:, :modules]]
    for row in range(rows):
        at[row, modules] = zlib.crc32(lines[row + 1], zlib.crc32(lines[row]))
    return {"ids": np.array(ids, np.int64), "at": at}


def write_cards(writer: ShardWriter, cards: Sequence[bytes | None]) -> None:
    """Write the model cards of a shard's rows, each text once, and which row has which."""
    import numpy as np

    numbers = {text: k for k, text in enumerate(dict.fromkeys(filter(None, cards)))}
    if not numbers:
        return
    writer.add("cards", np.array([numbers[c] + 1 if c else 0 for c in cards], np.uint32))
    for text, k in numbers.items():
        with writer.stream(f"card{k}") as stream:
            stream.write(text)


def card_of(shard: Shard, row: int) -> bytes | None:
    """The model card of a row of a shard; None where it has none."""
    if "cards" not in shard.keys:
        return None
    number = int.from_bytes(shard.read_bytes("cards")[4 * row : 4 * row + 4], "little")
    return shard.read_bytes(f"card{number - 1}") if number else None
