"""What an opened library holds, read piece by piece.

`Library` is the handle that users hold, and changes; this is what lies behind it, for whatever
works on single records and bases: the parts of one adapter at one module, a shared basis, an index.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter, Layout, with_card
from ..errors import FileError, UnknownNameError
from ..files import open_adapter
from ..files.remote.place import everywhere
from ..lowrank import LowRank
from ..thin import thin
from ..words import did_you_mean
from .coding.bases import Basis, read_basis
from .coding.flat_part import read_side
from .coding.record import StoredPart, decode_together, rank_of, stored_parts
from .store.catalog import Catalog
from .store.entries import AdapterEntry, ModuleEntry, Piece
from .store.shard_writer import unsealed
from .store.store import Store, Transaction

_TOGETHER = 1 << 18  # bytes of records that are decoded together, about

# What comes of sizes and numbers that do not belong together, in numpy, torch and struct.
_UNFIT = (
    *(ValueError, RuntimeError, IndexError, KeyError, TypeError, OverflowError, MemoryError),
    *(struct.error, UnicodeDecodeError),
)


class Contents(Catalog):
    """The records and bases of one state of a store, decoded when asked for and then kept.

    What is changed later does not reach it: what it gives belongs together.

    Args:
        store: the files. device: where what is read shall be.

    Not for: changing a library, which is `Library`'s.
    """

    def __init__(self, store: Store, device: torch.device | str | None = None) -> None:
        super().__init__(store)
        self.device = device
        self._pieces: dict[tuple[str, str], Tensor] = {}
        self._known_sides: dict[tuple[tuple[str, str], ...], Basis] = {}

    @functools.cached_property
    def version(self) -> str:
        """Digest of the manifest that it shows."""
        return hashlib.sha256(self.state.raw).hexdigest()

    @contextlib.contextmanager
    def changing(self) -> Iterator[tuple[Transaction, Contents]]:
        """A transaction on the store, and what the store holds under its lock."""
        with self.store.transaction() as t:
            yield t, self.now()

    def now(self) -> Contents:
        """What the store holds now."""
        if self.store.state is self.state:
            return self
        twin = Contents(self.store, self.device)
        twin.adopt(self)
        # Shards never change, so what was decoded of one stays right while the library names it.
        there = twin.state.shards
        twin._known_sides = {
            k: b for k, b in list(self._known_sides.items()) if all(s in there for s, _ in k)
        }
        twin._pieces = {k: piece for k, piece in list(self._pieces.items()) if k[0] in there}
        return twin

    # Adapters

    @thin
    def adapter(self, name: str) -> Adapter:
        """An adapter, its factors float32 with scale 1 unless it is stored exactly.

        Raises:
            UnknownNameError: no such adapter. FileError: what is read of it is damaged.
        """
        entry = self.entry(name)
        there = self.present(entry)
        updates = [u for batch in _batches(self, there, entry) for u in self._updates(batch, entry)]
        modules = {self.modules[j].path: u for j, u in zip(there, updates, strict=True)}
        layouts = self.layouts(entry)
        base = self.manifest.base_model
        config = with_card(self.config(name), self.card(name))
        return Adapter(modules, self.extras(name), config, base, layouts)

    @thin
    def update(self, name: str, path: str) -> LowRank:
        """One module of one adapter, read alone.

        Raises:
            UnknownNameError: no such adapter, or it does not have the module.
        """
        entry = self.entry(name)
        j = self.manifest.numbers.get(path)
        if j is None or not self.record_size(j, entry):
            hint = did_you_mean(path, [self.modules[k].path for k in self.present(entry)])
            raise UnknownNameError(f"{name!r} has no module {path!r}; {hint}")
        return self._updates([j], entry)[0]

    @thin
    def parts(self, name: str, path: str) -> list[StoredPart]:
        """One module of one adapter in the coordinates of the shared sides, nothing multiplied out.

        Returns:
            Parts that add up to the update; none where the adapter lacks the module.

        Raises:
            UnknownNameError: no such adapter.
        """
        entry, j = self.entry(name), self.manifest.numbers.get(path)
        if j is None or not self.record_size(j, entry):
            return []
        basis = functools.partial(self.basis, j)
        with _reading(entry, self.modules[j]):
            return stored_parts(self.record(j, entry), self.modules[j].shape, basis, self.device)

    def config(self, name: str) -> dict[str, Any]:
        """An adapter's configuration, as its file had it."""
        difference: Mapping[str, Any] = self.entry(name).config
        dropped = difference.get("drop", ())
        kept = {k: copy.deepcopy(v) for k, v in self.manifest.config.items() if k not in dropped}
        return {**kept, **copy.deepcopy(difference.get("set", {}))}

    def extras(self, name: str) -> dict[str, Tensor]:
        """What the adapter's file held beside its factors, bit for bit."""
        entry = self.entry(name)
        shard = self.shard_of(entry)
        return {key: shard.read_tensor(t).to(self.device) for key, t in entry.extras.items()}

    # Records

    def shapes(self, entry: AdapterEntry) -> dict[str, tuple[int, int, int]]:
        """(out, in, rank) of what an adapter's records decode to; of their heads alone.

        Raises:
            FileError: a record is damaged.
        """
        found = {}
        for j in self.present(entry):
            with _reading(entry, self.modules[j]):
                shape = self.modules[j].shape
                found[self.modules[j].path] = (*shape, rank_of(self.record(j, entry), shape))
        return found

    def layouts(self, entry: AdapterEntry) -> dict[str, Layout]:
        """Layouts of an adapter's modules that are not plain linear layers."""
        modules = (self.modules[j] for j in self.present(entry))
        common = {m.path: m.layout for m in modules if m.layout is not None}
        return {**common, **entry.layouts}

    def record(self, j: int, entry: AdapterEntry) -> bytes:
        """An adapter's bytes at module number j, compared with their checksum.

        Raises:
            FileError: they are damaged.
        """
        shard = self.shard_of(entry)
        record = unsealed(shard.read_bytes(f"m{j}", *self.span(j, entry)))
        if record is None:
            raise FileError(
                f"shard {shard.name} is damaged: the record of {entry.name!r} at "
                f"{self.modules[j].path!r} is not the one whose CRC-32 it states"
            )
        return record

    def _updates(self, numbers: list[int], entry: AdapterEntry) -> list[LowRank]:
        """An adapter's updates at some modules, decoded together; one that can't be is named."""
        at = self.modules
        try:
            with _reading(entry, self.modules[numbers[0]]):
                spans = ((f"m{j}", *self.span(j, entry)) for j in numbers)
                self.shard_of(entry).ahead(spans)
                records = [(self.record(j, entry), at[j].shape) for j in numbers]
                bases = [functools.partial(self.basis, j) for j in numbers]
                return decode_together(records, bases, self.device)
        except FileError:
            if len(numbers) == 1:
                raise
        return [u for j in numbers for u in self._updates([j], entry)]

    # Bases

    @thin
    def basis(self, j: int, side: str, number: int, count: int | None = None) -> Tensor:
        """A shared basis of module number j: (d, R) for "U" and "V", (1 + k, D) for "A" and "B".

        Args:
            count: its first columns only (for "A", "B": the factor's rank).

        Raises:
            FileError: a piece is damaged, or there is no such basis.
        """
        out, inner = self.modules[j].shape
        d = {"U": out, "V": inner, "A": inner * (count or 0), "B": out * (count or 0)}[side]
        pieces: list[Tensor] = []
        for piece in self.modules[j].bases.get(f"{side}{number}", ()):
            if side in "UV" and count is not None and sum(p.shape[1] for p in pieces) >= count:
                break  # of what follows, which may be damaged, nothing is asked for
            pieces.append(self._piece(piece, d, side))
        if not pieces:
            raise FileError(f"module {self.modules[j].path!r} has no basis {side}{number}")
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 0 if side in "AB" else 1)
        if side in "AB":
            return whole
        # In one layout, however many pieces there are: products then round alike after an `add`.
        return whole[:, :count].contiguous()

    def _piece(self, piece: Piece, d: int, side: str) -> Tensor:
        key = piece.shard, piece.tensor
        if key not in self._pieces:
            record = self._shard(piece.shard).read_bytes(piece.tensor)
            read = read_side(record, d, side, self.device).rows if side in "AB" else None
            self._pieces[key] = (
                read_basis(record, d, side, self.device).columns if read is None else read
            )
        found = self._pieces[key]
        if piece.columns != found.shape[0 if side in "AB" else 1]:
            raise FileError(f"{piece.tensor} of {piece.shard} has not {piece.columns} vectors")
        return found

    @thin
    def sides(self, j: int) -> dict[str, list[Basis]]:
        """The shared bases of module number j by side, "U" and "V", in order of their numbers."""
        found: dict[str, list[Basis]] = {"U": [], "V": []}
        for name, pieces in self.modules[j].bases.items():
            if name[0] in found:
                key = tuple((piece.shard, piece.tensor) for piece in pieces)
                if not key:  # emptied by a repair; it keeps its number, which records name
                    rows = self.modules[j].shape["UV".index(name[0])]
                    none = torch.empty(rows, 0, dtype=torch.float32, device=self.device)
                    found[name[0]].append(Basis(none, b"", 0))
                    continue
                if key not in self._known_sides:
                    self._known_sides[key] = Basis(self.basis(j, name[0], int(name[1:])), b"", 0)
                found[name[0]].append(self._known_sides[key])
        return found

    def as_it_is(self) -> Contents:
        """The same for reading; closing this one does not reach it, a closed one is refused."""
        return Contents(self.store.as_it_is(), self.device)


@contextlib.contextmanager
def _reading(entry: AdapterEntry, module: ModuleEntry) -> Iterator[None]:
    """What is no damage by the checksums, and still can't be decoded, is named."""
    try:
        yield
    except FileError:
        raise
    except _UNFIT as e:
        raise FileError(
            f"the library's record of {entry.name!r} at {module.path!r} can't be "
            f"decoded: its manifest and shards do not belong together ({e})"
        ) from e


def _batches(c: Contents, numbers: list[int], entry: AdapterEntry) -> Iterator[list[int]]:
    """An adapter's modules in runs of about `_TOGETHER` bytes of records."""
    batch, size = [], 0
    for j in numbers:
        batch.append(j)
        size += c.record_size(j, entry)
        if size >= _TOGETHER:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class InLibrary:
    """An adapter of a library, all of it read when it is asked for.

    Pickled, it is what reads the same elsewhere; of a library in memory, the adapter itself.

    Args:
        contents: the library's. name: the adapter's.
    """

    def __init__(self, contents: Contents, name: str) -> None:
        self._contents, self._name = contents, name

    def load(self) -> Adapter:
        return self._contents.adapter(self._name)

    @property
    def identity(self) -> str:
        """Which adapter it is: its name, and what its library said when it was opened."""
        return f"{self._name} {self._contents.version}"

    def __lorafold_key__(self) -> str:
        return self.identity

    def elsewhere(self) -> StoredElsewhere | None:
        """What reads it in another process; None for a library in memory."""
        c = self._contents
        if c.store.path is None:
            return None
        return StoredElsewhere(everywhere(c.store.path), c.version, self._name, c.device)

    def __reduce__(self) -> tuple[Any, ...]:
        found = self.elsewhere()
        return (open_adapter, (self.load(),)) if found is None else found.__reduce__()


class Stored(InLibrary):
    """An adapter of a library as a `Handle`: its records are read when asked for.

    Args:
        contents: the library's. name: the adapter's.
        original: digest and bytes are those of the file that it was folded from, as they must be
            where the library is folded again.
    """

    def __init__(self, contents: Contents, name: str, *, original: bool = False) -> None:
        super().__init__(contents, name)
        entry = contents.entry(name)
        self.path = contents.store.path
        self.shapes, self.layouts = contents.shapes(entry), contents.layouts(entry)
        self.config, self.base_model = contents.config(name), contents.manifest.base_model
        self.nbytes = entry.file_bytes if original else contents.own_bytes(name)
        self.original_digest = entry.digest if original else None
        self.extra_keys, self.refusal = list(entry.extras), entry.refusal

    def read(self, path: str) -> LowRank:
        return self._contents.update(self._name, path)

    def only(self, path: str) -> StoredElsewhere | None:
        """What reads one module in another process; None for a library in memory."""
        return self.elsewhere()

    def read_extras(self) -> dict[str, Tensor]:
        return self._contents.extras(self._name)

    @property
    def card(self) -> str | None:
        return self._contents.card(self._name)


class StoredElsewhere:
    """An adapter of a library, to be read in another process; made by `InLibrary.elsewhere`.

    Args:
        folder: the library's. version: what it said. name: the adapter's. device: where to read it.
    """

    def __init__(self, folder: str, version: str, name: str, device: Any) -> None:
        self._folder, self._version, self._name, self._device = folder, version, name, device

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredElsewhere, (self._folder, self._version, self._name, self._device)

    @property
    def identity(self) -> str:
        return f"{self._name} {self._version}"

    def read(self, path: str) -> LowRank:
        return _opened(self._folder, self._version, self._device).update(self._name, path)

    def load(self) -> Adapter:
        return _opened(self._folder, self._version, self._device).adapter(self._name)


@functools.lru_cache(4)
def _opened(folder: str, version: str, device: Any) -> Contents:
    found = Contents(Store.open(folder), device)
    if found.version != version:
        raise FileError(f"the library {folder} was changed meanwhile: start again")
    return found
