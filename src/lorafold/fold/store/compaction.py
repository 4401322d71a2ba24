"""Taking adapters out, and keeping shards few: what is left is copied as bytes, never decoded.

A change writes one new shard and a new manifest; old shards stay as they are until they are mostly
dead or too many, then the small ones are copied together.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...errors import FileError
from .entries import AdapterEntry, Piece
from .manifest import Manifest
from .shard import Shard
from .shard_writer import ShardWriter, unsealed
from .store import Store, Transaction

if TYPE_CHECKING:
    import numpy as np

_MOST_SHARDS = 6  # more are copied together, so that opening a library opens few files
_KEPT_SHARDS = 3  # the largest ones, which are left alone then


def remove(store: Store, name: str) -> None:
    """See `Library.remove`."""
    with store.transaction() as t:
        t.manifest.entry(name)
        commit(t, t.manifest.changed((), {name}), None)


def commit(t: Transaction, manifest: Manifest, fresh: ShardWriter | None) -> None:
    """Drop dead shards, copy small or mostly dead ones together, and commit."""
    shards = dict(t.shards)
    if fresh is not None and fresh.info is not None:
        shards[fresh.info.name] = Shard.of(fresh)
    alive = {name: shard for name, shard in shards.items() if name in manifest.used}
    if any(part.lost for part in manifest.parts):
        alive = {}  # nobody knows what is dead
    merged = {name: alive[name] for name in _to_merge(manifest, alive)}
    if merged:
        # That one of them is damaged is no reason against a change of another adapter: they stay.
        with contextlib.suppress(FileError):
            manifest = merge_shards(t, manifest, merged)
    t.commit(manifest)


def _to_merge(manifest: Manifest, alive: Mapping[str, Shard]) -> list[str]:
    rows: dict[str, int] = {}
    for shard in manifest.adapters.shard_of().values():
        rows[shard] = rows.get(shard, 0) + 1
    chosen = [name for name, s in alive.items() if 2 * rows.get(name, 0) < s.shape("at")[1] - 1]
    if len(alive) > _MOST_SHARDS:
        by_size = sorted(alive, key=lambda name: (-alive[name].nbytes, name))
        chosen = list(dict.fromkeys([*chosen, *by_size[_KEPT_SHARDS:]]))
    return chosen


def merge_shards(t: Transaction, manifest: Manifest, old: Mapping[str, Shard]) -> Manifest:
    """Copy what is alive in some shards into one new shard, byte for byte.

    Raises:
        FileError: what is copied is damaged; so that no damage gets a checksum that says it isn't.
    """
    import numpy as np

    there = manifest.adapters
    entries = [there[n] for n, shard in there.shard_of().items() if shard in old]
    modules = manifest.modules
    extras = sum(len(e.extras) for e in entries)
    cards = {(e.shard, e.card): f"card{k}" for k, e in enumerate(entries) if e.card is not None}
    pieces = sum(len(p) for m in modules for p in m.bases.values())
    tensors = len(modules) + extras + len(cards) + pieces
    with t.new_shard(header_capacity=256 + 120 * tensors) as writer:
        index = {name: old[name].read("at").astype(np.int64) for name in {e.shard for e in entries}}
        at = np.zeros((len(modules), len(entries) + 1), np.int64)
        moved: dict[tuple[str, str], str] = {}  # pieces of bases → their new tensors
        for j, module in enumerate(modules):
            with writer.stream(f"m{j}") as stream:
                records = _records(j, entries, old, index)
                at[j, 1:] = np.cumsum([stream.write(record) for record in records])
            for name, held in module.bases.items():
                for k, piece in enumerate(held):
                    if piece.shard in old:
                        moved[piece.shard, piece.tensor] = f"b{j}.{name}.{k}"
                        with writer.stream(f"b{j}.{name}.{k}") as stream:
                            stream.write(old[piece.shard].read_bytes(piece.tensor))
        writer.add("at", at if at.max(initial=0) >= 1 << 32 else at.astype(np.uint32))
        kept: list[tuple[AdapterEntry, dict[str, Any]]] = []
        for row, e in enumerate(entries):
            names = {key: f"x{row}.{k}" for k, key in enumerate(e.extras)}
            for key, tensor in e.extras.items():
                old[e.shard].copy_tensor(tensor, writer, names[key])
            card = None if e.card is None else cards[e.shard, e.card]
            kept.append((e, {"row": row, "extras": names, "card": card}))
        for (at_shard, tensor), card in cards.items():
            with writer.stream(card) as stream:
                stream.write(old[at_shard].read_bytes(tensor))
    shard = writer.close().name
    manifest = manifest.changed(dataclasses.replace(e, shard=shard, **new) for e, new in kept)

    def renamed(piece: Piece) -> Piece:
        tensor = moved.get((piece.shard, piece.tensor))
        return piece if tensor is None else Piece(shard, tensor, piece.columns)

    renewed = [
        dataclasses.replace(m, bases={n: tuple(map(renamed, held)) for n, held in m.bases.items()})
        for m in modules
    ]
    return dataclasses.replace(manifest, modules=tuple(renewed))


def _records(
    j: int,
    entries: list[AdapterEntry],
    shards: Mapping[str, Shard],
    index: Mapping[str, np.ndarray],
) -> list[bytes]:
    """The records of module number j as stored, each compared with its checksum."""
    found = []
    for e in entries:
        record = b""
        if j < len(index[e.shard]):
            start, stop = index[e.shard][j, e.row : e.row + 2].tolist()
            # Not the whole tensor: what is damaged may be of one that has left.
            record = shards[e.shard].read_bytes(f"m{j}", start, stop)
        if record and unsealed(record) is None:
            raise FileError(f"shard {shards[e.shard].name} is damaged in a record of {e.name!r}")
        found.append(record)
    return found
