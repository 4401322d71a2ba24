"""Taking adapters out, and keeping shards few: what is left is copied as bytes, never decoded.

A change writes one new shard and a new manifest. Old shards stay as they are until they are mostly
dead, or until many small ones lie beside each other, by the ids of whose records they hold; then
those are copied into one. Sizes are told apart by powers of `_STEP`, so a record is copied once for
each of them, and from `_FULL` on never again: the cost of an addition does not grow with the
library. No list of adapters changes by it, as lists name ids.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ...errors import FileError
from ...files.remote.exchange import again
from .catalog import Index, card_of, index_of, write_cards
from .entries import Piece, Rows
from .manifest import Manifest
from .shard import Shard
from .shard_writer import ShardStream, ShardWriter, unsealed
from .store import Store, Transaction

if TYPE_CHECKING:
    import numpy as np

_MOST = 7  # shards of one size side by side; more are copied together
_STEP = 8  # times as large as small ones are the next larger ones
_SMALL, _FULL = 64 << 10, 16 << 20  # bytes of the smallest and of those that are left alone
_RECORD = 1 << 10  # bytes that a record counts for, beside its own
_AT_ONCE = 1 << 20  # bytes of records that are read together


def remove(store: Store, name: str) -> None:
    """See `Library.remove`."""

    def change() -> None:
        with store.transaction() as t:
            t.manifest.entry(name)
            commit(t, t.manifest.changed((), {name}), None)

    again(change)


def commit(t: Transaction, manifest: Manifest, fresh: ShardWriter | None) -> None:
    """Drop dead shards, copy small or mostly dead ones together, and commit."""
    sizes = {name: info.nbytes for name, info in t.state.shards.infos.items()}
    new: dict[str, Shard] = {}
    if fresh is not None and fresh.info is not None:
        new[fresh.info.name] = Shard.of(fresh)
        sizes[fresh.info.name] = fresh.info.nbytes
    for names in _to_merge(manifest, {n: size for n, size in sizes.items() if n in manifest.used}):
        # That one of them is damaged is no reason against a change of another adapter: they stay.
        with contextlib.suppress(FileError):
            old = {name: new[name] if name in new else t.shards[name] for name in names}
            manifest = merge_shards(t, manifest, old)
    t.commit(manifest)


def _to_merge(manifest: Manifest, sizes: Mapping[str, int]) -> list[list[str]]:
    """Shards to copy together, those of each list into one.

    Args:
        sizes: bytes of those that can be.
    """
    modules = len(manifest.modules)
    by_id = sorted(manifest.holds, key=lambda name: manifest.holds[name].first)
    by_id = [name for name in by_id if name in manifest.used]
    levels = [_level(manifest.holds[name], sizes.get(name), modules) for name in by_id]
    chosen: list[list[str]] = []
    for level in sorted({level for level in levels if level < math.inf}, reverse=True):
        for run in _runs([x <= level for x in levels]):
            # As many of this size: smaller ones beside them are copied along, and otherwise wait.
            if sum(levels[k] == level for k in run) > _MOST:
                chosen.append([by_id[k] for k in run])
                for k in run:
                    levels[k] = math.inf
    taken = {name for names in chosen for name in names}
    for name in by_id:
        rows = manifest.holds[name]
        if name in sizes and name not in taken and 2 * rows.alive < rows.count:
            chosen.append([name])
    bases = [name for name in sizes if name not in manifest.holds]
    return [*chosen, bases] if len(bases) > _MOST else chosen


def _level(rows: Rows, nbytes: int | None, modules: int) -> float:
    """How large a shard is, in powers of `_STEP`; infinite where it is to be left alone."""
    if nbytes is None:
        return math.inf
    weight = (nbytes + _RECORD * modules * rows.count) * rows.alive / rows.count
    return math.inf if weight >= _FULL else max(0, int(math.log(max(weight, 1) / _SMALL, _STEP)))


def _runs(which: Sequence[bool]) -> Iterator[list[int]]:
    """The positions of what is true, those side by side together."""
    run: list[int] = []
    for k, held in enumerate((*which, False)):
        if held:
            run.append(k)
        elif run:
            yield run
            run = []


def merge_shards(t: Transaction, manifest: Manifest, old: Mapping[str, Shard]) -> Manifest:
    """Copy what is alive in some shards into one new shard, byte for byte.

    Args:
        old: none lies between two of them by the ids of whose records it holds.

    Raises:
        FileError: what is copied is damaged; so that no damage gets a checksum that says it isn't.
    """
    import numpy as np

    there = manifest.holds
    holds = {name: there[name] for name in old if name in there and there[name].alive}
    in_order = sorted(holds, key=lambda name: holds[name].first)
    modules = manifest.modules
    sources = [_Source.of(old[name], holds[name], len(modules)) for name in in_order]
    pieces = sum(p.shard in old for m in modules for held in m.bases.values() for p in held)
    extras = sum(len(source.extras) for source in sources)
    cards = [card for source in sources for card in source.cards]
    tensors = len(modules) + pieces + extras + len(set(cards)) + 3
    ids = [number for source in sources for number in source.ids]
    with t.new_shard(header_capacity=256 + 120 * tensors) as writer:
        sizes = np.zeros((len(modules), len(ids)), np.int64)
        moved: dict[tuple[str, str], str] = {}  # pieces of bases → their new tensors
        for j, module in enumerate(modules):
            with writer.stream(f"m{j}") as stream:
                copied = [source.copy_records(j, stream) for source in sources]
                sizes[j] = np.concatenate(copied) if copied else 0
            for name, held in module.bases.items():
                for k, piece in enumerate(held):
                    if piece.shard in old:
                        moved[piece.shard, piece.tensor] = f"b{j}.{name}.{k}"
                        with writer.stream(f"b{j}.{name}.{k}") as stream:
                            stream.write(old[piece.shard].read_bytes(piece.tensor))
        for name, tensor in index_of(ids, sizes).items():
            writer.add(name, tensor)
        for source in sources:
            for key in source.extras:
                source.shard.copy_tensor(key, writer, key)
        write_cards(writer, cards)
    shard = writer.close().name
    rows = {shard: Rows(ids[0], ids[-1], len(ids))} if ids else {}

    def renamed(piece: Piece) -> Piece:
        tensor = moved.get((piece.shard, piece.tensor))
        return piece if tensor is None else Piece(shard, tensor, piece.columns)

    renewed = [
        dataclasses.replace(m, bases={n: tuple(map(renamed, held)) for n, held in m.bases.items()})
        for m in modules
    ]
    return dataclasses.replace(manifest.holding(rows, old), modules=tuple(renewed))


@dataclasses.dataclass(frozen=True)
class _Source:
    """A shard that is copied from.

    Args:
        ids: of the rows that are alive. starts, stops: (modules, rows) where their records begin
            and end. extras: names of their extra tensors. cards: their model cards.
    """

    shard: Shard
    ids: list[int]
    starts: np.ndarray
    stops: np.ndarray
    extras: list[str]
    cards: list[bytes | None]

    @classmethod
    def of(cls, shard: Shard, holds: Rows, modules: int) -> _Source:
        import numpy as np

        index, gone = Index(shard, modules), set(holds.gone)
        ids = [number for number in index.ids if number not in gone]
        spans = [index.spans(shard, number) for number in ids]
        starts, stops = (
            np.array([pair[side] for pair in spans], np.int64).reshape(len(ids), index.modules).T
            for side in range(2)
        )
        there = {f"x{number}" for number in ids}
        extras = [key for key in shard.keys if key[0] == "x" and key.split(".")[0] in there]
        cards = [card_of(shard, index.row(shard, number)) for number in ids]
        return cls(shard, ids, starts, stops, extras, cards)

    def copy_records(self, j: int, stream: ShardStream) -> np.ndarray:
        """Copy the rows' records at module number j, each compared with its checksum.

        Returns:
            (rows,) the bytes of each.

        Raises:
            FileError: one is damaged.
        """
        import numpy as np

        if j >= len(self.starts):
            return np.zeros(len(self.ids), np.int64)
        starts, stops = self.starts[j], self.stops[j]
        first = 0
        while first < len(starts):
            begin = int(starts[first])
            # Rows that have left lie between, and are read along.
            last = max(first + 1, int(np.searchsorted(stops, begin + _AT_ONCE, "right")))
            # Not the whole tensor, which would be checked whole: what is damaged may have left.
            raw = self.shard.read_bytes(f"m{j}", begin, int(stops[last - 1]), check=False)
            spans = zip(
                (starts[first:last] - begin).tolist(),
                (stops[first:last] - begin).tolist(),
                strict=True,
            )
            records = [raw[start:stop] for start, stop in spans]
            for k, record in enumerate(records):
                if record and unsealed(record) is None:
                    of = f"a record of id {self.ids[first + k]}"
                    raise FileError(f"shard {self.shard.name} is damaged in {of}")
            stream.write(b"".join(records))
            first = last
        sizes: np.ndarray = stops - starts
        return sizes
