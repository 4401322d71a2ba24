"""Changing a library: add, remove, refold; each one transaction on the store.

A change writes one new shard and a new manifest; old shards stay as they are until they are mostly
dead or too many, then the small ones are copied together. What is stored of the other adapters is
copied as bytes, never decoded.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..adapter import Adapter
from ..collection.sources import Handle, named_handles
from ..errors import MismatchError, ToleranceError, UnknownNameError
from ..files import open_adapter
from ..lowrank import LowRank
from ..words import did_you_mean
from .addition import write_added
from .store.shard import Shard, ShardWriter

if TYPE_CHECKING:
    from .library import Library
    from .store.store import Transaction

_MOST_SHARDS = 7  # more are copied together, so that opening a library opens few files
_KEPT_SHARDS = 3  # the largest ones, which are left alone then


def one_handle(adapter: Any) -> tuple[str | None, Handle]:
    """The default name (None for an `Adapter` object) and the handle of a single source."""
    if isinstance(adapter, Adapter):
        return None, open_adapter(adapter)
    found = named_handles(adapter)
    if len(found) != 1:
        raise MismatchError(f"add takes one adapter at a time; {adapter!r} stands for {len(found)}")
    return next(iter(found.items()))


# add


def add_to(
    lib: Library,
    adapter: Any,
    name: str | None,
    *,
    replace: bool,
    tolerance: float | None,
    form: str | None,
) -> float:
    """See `Library.add`."""
    default, handle = one_handle(adapter)
    name = name if name is not None else default
    if not isinstance(name, str) or not name:
        raise MismatchError("an Adapter object needs a name: add(adapter, name='…')")
    if form not in (None, "svd", "exact"):
        raise MismatchError(f"add takes form 'svd' or 'exact', found {form!r}")
    if tolerance is not None and not 0 <= tolerance < 1:
        raise MismatchError(f"tolerance must lie in [0, 1), found {tolerance}")
    if lib.base_model and handle.base_model and lib.base_model != handle.base_model:
        raise MismatchError(
            f"{name!r} belongs to base {handle.base_model!r}, the library to {lib.base_model!r}"
        )
    for path, (out, inner, _) in handle.shapes.items():
        lib.check_shape(path, (out, inner))
    with lib.changing() as t:
        if name in lib and not replace:
            raise MismatchError(
                f"the library already has an adapter {name!r}; use replace=True or another name"
            )
        manifest = copy.copy(t.manifest)
        manifest["modules"] = copied_modules(manifest["modules"])
        manifest["adapters"] = dict(manifest["adapters"])
        writer, entry = write_added(lib, t, manifest, name, handle, tolerance, form)
        manifest["adapters"][name] = entry
        _commit(t, manifest, writer)
    return float(entry["error"])


# remove and refold


def remove_from(lib: Library, name: str) -> None:
    """See `Library.remove`."""
    with lib.changing() as t:
        lib._entry(name)
        manifest = copy.copy(t.manifest)
        manifest["adapters"] = {k: v for k, v in manifest["adapters"].items() if k != name}
        manifest["modules"] = copied_modules(manifest["modules"])
        _commit(t, manifest, None)


def refold_all(
    lib: Library, tolerance: float | None, sources: Any, options: Mapping[str, Any]
) -> None:
    """See `Library.refold`."""
    from .one_pass import folded
    from .options import FoldOptions

    given = dict(options)
    if tolerance is not None:
        given["tolerance"] = tolerance
    sizes = {"tolerance", "rank", "energy", "bits", "retention"}
    asked = sizes & set(given)
    if not asked:
        kept = lib.store.manifest["options"]
        given |= {k: v for k, v in kept.items() if k in sizes - {"retention"}}
    given.setdefault("form", lib.store.manifest["options"].get("form", "auto"))
    settings = FoldOptions.of(**given)
    if settings.retention is not None:
        raise MismatchError("refold takes no retention=: fold the sources with it instead")
    with lib.changing() as t:
        if sources is not None:
            handles = named_handles(sources)
            if set(handles) != set(lib.names):
                odd = sorted(set(handles) ^ set(lib.names))
                raise MismatchError(
                    "the sources must be the library's adapters, one each; they differ in "
                    f"{odd[:3]}"
                )
            handles = {name: handles[name] for name in lib.names}
            old: dict[str, float] = {}
        else:
            handles = {name: Stored(lib, name) for name in lib.names}
            old = {name: lib.error(name) for name in lib.names}
        bounds: dict[str, float] = {}
        if not asked:  # every adapter keeps the bound it has
            own = {name: lib.entry(name).get("tolerance") for name in lib.names}
            bounds = {name: value for name, value in own.items() if value is not None}
        manifest = folded(handles, settings, t, tolerances=bounds, old_errors=old)
        t.commit(manifest, keep=set())


class Stored:
    """An adapter of a library as a handle, so that a library can be folded again."""

    def __init__(self, lib: Library, name: str) -> None:
        self._lib, self._name = lib, name
        entry = lib._entry(name)
        a = lib[name]
        self.shapes = {p: (*u.shape, u.rank) for p, u in a.modules.items()}
        self.layouts, self.config, self.base_model = dict(a.layouts), dict(a.config), a.base_model
        self.nbytes = int(entry["file_bytes"])
        self.original_digest: str = entry["digest"]
        self.refusal: str | None = entry.get("refusal")
        self.extra_keys = list(entry.get("extras", {}))

    def read(self, path: str) -> LowRank:
        return self._lib.update(self._name, path)

    def read_extras(self) -> dict[str, Tensor]:
        return self._lib.extras(self._name)

    def load(self) -> Adapter:
        return self._lib[self._name]


# Shards


def copied_modules(modules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The manifest's modules, to be changed: only the lists of their bases' pieces ever are."""
    return [
        {**m, "bases": {name: list(pieces) for name, pieces in m["bases"].items()}}
        if "bases" in m
        else dict(m)
        for m in modules
    ]


def _commit(t: Transaction, manifest: dict[str, Any], fresh: ShardWriter | None) -> None:
    """Drop dead shards, copy small or mostly dead ones together, and commit."""
    shards = dict(t.shards)
    if fresh is not None:
        shards[fresh.name] = Shard.of(fresh)
    used = _used(manifest)
    alive = {name: shard for name, shard in shards.items() if name in used}
    merged = _to_merge(manifest, alive)
    if merged:
        _merge(t, manifest, {name: alive[name] for name in merged})
        if fresh is not None and fresh.name in merged:
            fresh.abort()
    t.commit(manifest, keep=[name for name in alive if name in t.shards and name not in merged])


def _used(manifest: Mapping[str, Any]) -> set[str]:
    shards = {entry["shard"] for entry in manifest["adapters"].values()}
    return shards | {
        s
        for m in manifest["modules"]
        for segments in m.get("bases", {}).values()
        for s, _, _ in segments
    }


def _to_merge(manifest: Mapping[str, Any], alive: Mapping[str, Shard]) -> list[str]:
    rows: dict[str, int] = {}
    for entry in manifest["adapters"].values():
        rows[entry["shard"]] = rows.get(entry["shard"], 0) + 1
    chosen = [name for name, s in alive.items() if 2 * rows.get(name, 0) < s.shape("at")[1] - 1]
    if len(alive) > _MOST_SHARDS:
        by_size = sorted(alive, key=lambda name: -alive[name].nbytes)
        chosen = list(dict.fromkeys([*chosen, *by_size[_KEPT_SHARDS:]]))
    return chosen


def _merge(t: Transaction, manifest: dict[str, Any], old: Mapping[str, Shard]) -> None:
    """Copy what is alive in some shards into one new shard, byte for byte."""
    entries = {n: e for n, e in manifest["adapters"].items() if e["shard"] in old}
    modules = manifest["modules"]
    extras = sum(len(e.get("extras", {})) for e in entries.values())
    bases = sum(len(s) for m in modules for s in m.get("bases", {}).values())
    writer = t.new_shard(header_capacity=256 + 110 * (len(modules) + extras + bases))
    index = {name: shard.read("at").astype(np.int64) for name, shard in old.items()}
    at = np.zeros((len(modules), len(entries) + 1), np.int64)
    for j, module in enumerate(modules):
        sizes = []
        whole: dict[str, bytes] = {}
        with writer.stream(f"m{j}") as stream:
            for e in entries.values():
                if j >= len(index[e["shard"]]):
                    sizes.append(0)
                    continue
                lo, hi = (int(x) for x in index[e["shard"]][j, e["row"] : e["row"] + 2])
                if e["shard"] not in whole:
                    whole[e["shard"]] = old[e["shard"]].read_bytes(f"m{j}")
                stream.write(whole[e["shard"]][lo:hi])
                sizes.append(hi - lo)
        at[j, 1:] = np.cumsum(sizes)
        for name, segments in module.get("bases", {}).items():
            for k, (shard, tensor, columns) in enumerate(segments):
                if shard in old:
                    key = f"b{j}.{name}.{k}"
                    with writer.stream(key) as stream:
                        stream.write(old[shard].read_bytes(tensor))
                    segments[k] = [writer.name, key, columns]
    writer.add("at", at if at.max(initial=0) >= 1 << 32 else at.astype(np.uint32))
    for row, (name, e) in enumerate(entries.items()):
        kept = {}
        for k, (key, tensor) in enumerate(e.get("extras", {}).items()):
            kept[key] = f"x{row}.{k}"
            writer.add(kept[key], old[e["shard"]].read_tensor(tensor))
        manifest["adapters"][name] = {
            **e,
            "shard": writer.name,
            "row": row,
            **({"extras": kept} if kept else {}),
        }


# verify


def checked_error(lib: Library, name: str, handle: Handle) -> float:
    """The error of a stored adapter against its source, by QR, checked against its bound."""
    if name not in lib:
        raise UnknownNameError(
            f"no adapter {name!r} in the library; {did_you_mean(name, lib.names)}"
        )
    entry, stored, source = lib._entry(name), lib[name], handle.load()
    if entry.get("exact"):
        if stored.digest != source.digest:
            raise ToleranceError(
                f"{name!r} is stored exactly, but its tensors are not those of the source"
            )
        return 0.0
    if (
        stored.modules.keys() != source.modules.keys()
        or stored.extras.keys() != source.extras.keys()
    ):
        raise ToleranceError(f"{name!r} has other modules or extras than its source")
    for key, tensor in source.extras.items():
        if not torch.equal(stored.extras[key].to(tensor.device), tensor):
            raise ToleranceError(f"{name!r}: extra {key!r} differs from the source")
    norm = source.norm()
    error = source.distance(stored) / norm if norm > 0 else float(stored.norm() > 0)
    bound = entry.get("tolerance", lib.tolerance)
    if bound is None:
        bound = float(entry["error"]) * 1.001 + 1e-6
    if error > bound * (1 + 1e-6) + 1e-9:
        raise ToleranceError(
            f"{name!r} has error {error:.4g} against its source, above its bound {bound:.4g}"
        )
    return error
