"""A library that lost files: what of it is whole, and making it whole again without the rest.

One transaction: what can be read of a damaged shard is copied into a new one, record by record
against its checksum; bases end before their first lost piece, which none of the adapters left
needs; what is lost is folded again from its source, on sides of its own, or leaves. A process that
is killed on the way leaves the damage as it was, so nothing but this is needed afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Collection as Names
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..collection.collection import Collection
from ..collection.limits import block_bytes
from ..collection.sources import Handle, named_handles
from ..errors import FileError, MismatchError
from ..files.atomic import replace_file
from ..files.find import is_library
from ..files.remote.exchange import replace_if
from ..files.remote.place import UrlPath, place_of
from .addition import own_layouts
from .checking import is_as_stored
from .contents import Contents
from .one_pass import adapter_entries, in_one_gauge
from .options import Options, Progress
from .passes.survey import Survey
from .passes.write import Builder, check_contract
from .store.compaction import merge_shards
from .store.entries import ModuleEntry, Piece
from .store.manifest import MANIFEST, Manifest, read_copy
from .store.part import Part
from .store.state import State
from .store.store import Store, Transaction
from .store.turns import TIMEOUT, turn


@dataclass(frozen=True)
class Repair:
    """What a repair found and did.

    Args:
        damage: what was wrong with files, a line each; empty where there was nothing to do.
        rebuilt: adapters folded again from their sources. dropped: name → why it could not be read.
        lost_lists: how many lists of adapters are gone, with names that nobody knows.
        kept: how many adapters are as they were.
    """

    damage: tuple[str, ...] = ()
    rebuilt: tuple[str, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    lost_lists: int = 0
    kept: int = 0


def repair(
    path: str | os.PathLike[str],
    sources: Any = None,
    *,
    memory: str | int = "1GiB",
    timeout: float = TIMEOUT,
    progress: Progress | None = None,
) -> Repair:
    """Make a library whole again: adapters that are lost are folded anew, or leave it.

    What is stored of all others does not change by a bit. Lost adapters whose source is given are
    folded within the bound they had, each on sides of its own (`Library.refold` finds what they
    share). Where a list of adapters is lost, with their names, sources that the library does not
    know are taken in.

    A damaged `library.json` is put back from the second copy that each change leaves.

    Not for: what a copy of the library still has: put those files back.

    Args:
        path: the library's folder.
        sources: as for `fold`; of those that are lost. Others are passed over.
        memory: limit for what is held of the sources at once.
        timeout: seconds to wait for others who change the library.
        progress: called with (done, total, stage).

    Returns:
        What was damaged, and what was done.

    Raises:
        FileError: no library there, a damaged manifest without a second copy, a file that can't be
            read but may be whole, or another process is changing it.
        MismatchError: a source that is not what was folded.
        ToleranceError: a bound that can't be met. The library is then as it was.

    Examples:
        >>> import tempfile, torch, lorafold as lf
        >>> u = lf.LowRank(torch.randn(2, 8), torch.randn(4, 2))
        >>> folder = tempfile.mkdtemp() + "/lib"
        >>> lib = lf.fold({"sql": lf.Adapter({"q_proj": u})}, folder)
        >>> lf.fold.repair(folder).damage
        ()
    """
    handles = {} if sources is None else named_handles(sources)
    store, restored = _opened(path, timeout)
    c = Contents(store)
    with c.changing() as (t, now):
        if progress is not None:
            progress(0, 2, "reading")
        state = t.verified()
        found = now.seeing(state)
        unsure = [damage.text for damage in state.damage.values() if not damage.lost]
        if unsure:
            raise FileError(
                f"{unsure[0]}: it may be whole; make it readable, or remove it, and repair again"
            )
        lost = _lost(found, bool(state.damage))
        if not state.damage and not lost:
            return Repair(restored, kept=len(found.manifest.adapters))
        fresh = _sources(found.manifest, lost, handles)
        healed = _without(state, t, {*lost})
        if progress is not None:
            progress(1, 2, "folding")
        manifest = _refolded(t, healed, found.manifest, fresh, memory)
        t.commit(manifest)
    before = found.manifest
    return Repair(
        (*restored, *(damage.text for damage in state.damage.values())),
        tuple(fresh),
        {name: why for name, why in lost.items() if name not in fresh},
        sum(part.lost for part in before.parts),
        len(before.adapters) - len(lost),
    )


def _opened(path: str | os.PathLike[str], timeout: float) -> tuple[Store, tuple[str, ...]]:
    """The library, and what was wrong with its manifest, which is there again."""
    try:
        return Store.open(path, timeout), ()
    except FileError as e:
        folder = place_of(path)
        if not is_library(path) and read_copy(folder) is None:
            raise
        damage = str(e)
    if isinstance(folder, UrlPath):
        return _restored_at(folder, timeout, damage)
    with turn(folder, timeout):
        raw = read_copy(folder)
        with contextlib.suppress(FileError):
            return Store.open(path, timeout), ()  # somebody has repaired it meanwhile
        replace_file(folder / MANIFEST, _copy(raw, damage))
    return Store.open(path, timeout), (f"{damage}; it is as its second copy had it",)


def _restored_at(url: UrlPath, timeout: float, damage: str) -> tuple[Store, tuple[str, ...]]:
    """The same at a URL: put back if it still is as damaged as it was."""
    manifest = url / MANIFEST
    before = manifest.read_bytes() if manifest.is_file() else None
    replace_if(manifest, _copy(read_copy(url), damage), before)
    return Store.open(url, timeout), (f"{damage}; it is as its second copy had it",)


def _copy(raw: bytes | None, damage: str) -> bytes:
    if raw is None:
        raise FileError(
            f"{damage}; all else is read by it, and it has no second copy: put {MANIFEST} back "
            "from a copy of the library, or fold the sources again with overwrite=True"
        )
    return raw


def _lost(c: Contents, damaged: bool) -> dict[str, str]:
    """Name → why, of adapters that don't come out; without damage, stored exactly and altered."""
    found = {}
    for name, entry in c.manifest.adapters.items():
        if damaged or entry.exact:
            problem = is_as_stored(c, entry)
            if problem is not None:
                found[name] = problem
    return found


def _sources(
    manifest: Manifest, lost: Names[str], handles: Mapping[str, Handle]
) -> dict[str, Handle]:
    """Those of the sources that stand for what is lost.

    Raises:
        MismatchError: one that is not what the library had of its name.
    """
    found = {name: handles[name] for name in lost if name in handles}
    for name, handle in found.items():
        if handle.load().digest != manifest.entry(name).digest:
            raise MismatchError(
                f"the source of {name!r} is not what was folded: its digest is another; give the "
                "original, or repair without it and add it then"
            )
    if any(part.lost for part in manifest.parts):
        found |= {n: handle for n, handle in handles.items() if n not in manifest.adapters}
    return found


def _without(state: State, t: Transaction, lost: Names[str]) -> Manifest:
    """The manifest without what is lost; what is whole in damaged shards is in a new one."""
    kept = [Part.of(p.prefix, ()) if p.lost else p for p in state.manifest.parts]
    manifest = dataclasses.replace(state.manifest, parts=tuple(kept)).changed((), lost)
    if any(part.lost for part in state.manifest.parts):
        manifest = _of_known_names(state, manifest)
    modules = tuple(_shortened(state, module) for module in manifest.modules)
    manifest = dataclasses.replace(manifest, modules=modules)
    damaged = {
        name: shard
        for name, shard in state.shards.items()
        if name in state.damage and name in manifest.used
    }
    for name, shard in damaged.items():
        manifest = merge_shards(t, manifest, {name: shard})
    return manifest


def _of_known_names(state: State, manifest: Manifest) -> Manifest:
    """The manifest with rows of those alone that its lists name."""
    there = set(manifest.adapters.ids())
    holds = {}
    for name, rows in manifest.holds.items():
        if name in state.shards:
            with contextlib.suppress(FileError):
                ids = state.shards[name].read("ids").tolist()
                holds[name] = rows.without(number for number in ids if number not in there)
    kept = {name: rows for name, rows in holds.items() if rows.alive}
    return manifest.holding(kept, manifest.holds)


def _shortened(state: State, module: ModuleEntry) -> ModuleEntry:
    """A module whose bases end before their first lost piece."""
    bases = {}
    for name, pieces in module.bases.items():
        whole = list(_until_lost(state, pieces))
        # An empty U or V stays, for the sake of its number, which records name.
        if name[0] in "UV" or len(whole) == len(pieces):
            bases[name] = tuple(whole)
    if {"A0", "B0"} - bases.keys():
        bases = {name: pieces for name, pieces in bases.items() if name[0] in "UV"}
    if not any(bases.values()):
        bases = {}
    return dataclasses.replace(module, bases=bases)


def _until_lost(state: State, pieces: Iterable[Piece]) -> Iterable[Piece]:
    for piece in pieces:
        shard = state.shards.get(piece.shard)
        if shard is None:
            return
        if piece.shard in state.damage:
            try:
                shard.read_bytes(piece.tensor)
            except FileError:
                return
        yield piece


def _refolded(
    t: Transaction,
    manifest: Manifest,
    before: Manifest,
    handles: Mapping[str, Handle],
    memory: str | int,
) -> Manifest:
    """With sources folded into a shard of their own, sharing nothing.

    Args:
        before: with the entries that they had, whose bounds and places they keep.
    """
    if not handles:
        return manifest
    old = {name: before.adapters[name] for name in handles if name in before.adapters}
    bound = before.options.tolerance
    own = {n: entry.bound(bound) for n, entry in old.items()}
    bounds = {name: own.get(name, bound) for name in handles}
    options = before.options
    if bound is not None:
        options = Options("svd", bound)
    options = dataclasses.replace(options, form="svd", memory=memory)
    collection = Collection(
        handles,
        exact={
            name
            for name, handle in handles.items()
            if bounds[name] == 0 or before.options.form == "exact" or in_one_gauge(handle)
        },
        block_bytes=block_bytes(memory),
        before={m.path: m.shape for m in manifest.modules},
    )
    names = collection.names[: collection.folded]
    limits = np.array([bounds[name] or 0.0 for name in names])
    first = manifest.next_id
    written = Builder(Survey(collection, options, limits), first).write(t)
    order = {n: old[n].order if n in old else first + k for k, n in enumerate(handles)}
    entries = adapter_entries(
        collection, written, limits, before.options, before.config, first=first, order=order
    )
    if bound is not None and collection.folded:
        check_contract(names, np.array([e.error for e in entries[: collection.folded]]), limits)
    modules = (*manifest.modules, *written.modules[len(manifest.modules) :])
    entries = tuple(
        dataclasses.replace(e, layouts=own_layouts(modules, handles[e.name])) for e in entries
    )
    manifest = manifest.changed(entries).holding(written.holds)
    return dataclasses.replace(manifest, modules=modules)
