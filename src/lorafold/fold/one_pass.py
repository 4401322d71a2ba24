"""What the manifest says: one entry an adapter, one a module, and the options."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..adapter import Layout
from ..collection.collection import Collection
from ..collection.elsewhere import Said, travelling, unreadable
from ..collection.limits import block_bytes
from ..collection.sources import Broken, Handle
from ..errors import FileError, MismatchError, ToleranceError
from ..files.remote.place import is_url
from ..prefixes import Prefixes
from ..scale.engine import Task
from .options import Options
from .passes.survey import Survey
from .passes.write import Builder, Written, check_contract
from .store.entries import AdapterEntry, config_difference
from .store.manifest import Manifest
from .store.store import Transaction


def adapter_entries(
    collection: Collection,
    written: Written,
    tolerances: np.ndarray,
    options: Options,
    common: Mapping[str, Any],
    *,
    first: int = 0,
    order: Mapping[str, int] | None = None,
    groups: Mapping[str, np.ndarray] | None = None,
    old_errors: Mapping[str, float] | None = None,
) -> tuple[AdapterEntry, ...]:
    """What the manifest says of the adapters of a collection that has been written, in its order.

    Args:
        tolerances: (folded,) each one's stated bound. common: the config that entries differ from.
        first: the first one's id. order: name → its place among all names; its id if None.
        groups: side → (folded,) init groups.
        old_errors: errors that the sources themselves had; they are added.
    """
    found = []
    for i, (name, handle) in enumerate(zip(collection.names, collection.handles, strict=True)):
        parameters = sum(r * (out + inner) for out, inner, r in handle.shapes.values())
        # ‖ΔŴ‖ ≤ (1 + old) ‖ΔW‖, and the new error counts in units of ‖ΔŴ‖.
        error = old = (old_errors or {}).get(name, 0.0)
        bits = tolerance = None
        if i < collection.folded:
            squared = float(written.squared_norm[i])
            ratio = float(written.squared_error[i]) / squared if squared > 0 else 0.0
            error = old + (1 + old) * ratio**0.5
            bits = round(8 * float(written.payload[i]) / max(parameters, 1), 4)
            if options.tolerance is not None and tolerances[i] != options.tolerance:
                tolerance = float(tolerances[i])
        elif handle.refusal is None and options.tolerance != 0:
            tolerance = 0.0  # its own bound, which folding anew shall keep
        entry = AdapterEntry(
            name=name,
            order=first + i if order is None else order[name],
            id=first + i,
            digest=getattr(handle, "original_digest", None)
            or collection.digest(i, handle.read_extras()),
            file_bytes=handle.nbytes,
            parameters=parameters,
            rank=_ranks(handle.shapes, collection.paths),
            error=error,
            bits=bits,
            tolerance=tolerance,
            exact=i >= collection.folded,
            refusal=handle.refusal or None,
            config=config_difference(common, handle.config),
            extras=written.extras[i],
            layouts=_own_layouts(collection, handle),
            groups=_groups(groups or {}, i) if i < collection.folded else {},
        )
        found.append(entry)
    return tuple(found)


def _own_layouts(collection: Collection, handle: Handle) -> dict[str, Layout]:
    """Layouts of an adapter that are not those of its collection's modules."""
    own = {path: handle.layouts.get(path, Layout()) for path in handle.shapes}
    return {p: x for p, x in own.items() if x != collection.layouts.get(p, Layout())}


def _groups(groups: Mapping[str, np.ndarray], i: int) -> dict[str, int]:
    """Side → the adapter's init group: "in" for one start of A, "out" for nearly the same B."""
    words = {"V": "in", "U": "out"}
    return {w: int(groups[s][i]) for s, w in words.items() if s in groups and groups[s][i] >= 0}


def _ranks(shapes: Mapping[str, tuple[int, int, int]], paths: list[str]) -> int | tuple[int, ...]:
    """One rank for all modules, or the list of them in the manifest's order, 0 where absent."""
    ranks = tuple(shapes[p][2] if p in shapes else 0 for p in paths)
    there = {r for r in ranks if r}
    return there.pop() if len(there) == 1 else ranks


def folded(
    handles: Mapping[str, Handle],
    options: Options,
    transaction: Transaction,
    *,
    tolerances: Mapping[str, float] | None = None,
    old_errors: Mapping[str, float] | None = None,
) -> Manifest:
    """Fold opened adapters into a transaction's new shard; the manifest to commit.

    Args:
        tolerances: name → its own bound, the common one where None.
        old_errors: errors that the sources already have; they count towards the bounds.

    Raises:
        ToleranceError: a source's own error leaves nothing of its bound.
    """
    own = tolerances or {}
    collection = _collected(handles, options, own)
    names = collection.names[: collection.folded]
    bound = options.tolerance or 0.0
    stated = np.array([own.get(name, bound) for name in names])
    bounds = stated
    if old_errors and options.tolerance is not None:
        bounds = np.array(
            [_what_is_left(n, b, old_errors[n]) for n, b in zip(names, stated, strict=True)]
        )
        _refuse_unmet(collection.names[collection.folded :], own, bound, old_errors)
    with options.crew.engine((Said(handles), options.bare(), bounds)) as engine:
        survey = Survey(collection, options, bounds, options.progress, engine)
        written = Builder(survey).write(transaction)
    if options.tolerance is not None:
        error = np.sqrt(
            np.divide(
                written.squared_error,
                written.squared_norm,
                out=np.zeros_like(bounds),
                where=written.squared_norm > 0,
            )
        )
        check_contract(names, error, bounds)
    common = dict(collection.handles[0].config)
    entries = adapter_entries(
        collection,
        written,
        stated,
        options,
        common,
        order={name: k for k, name in enumerate(handles)},
        groups=survey.groups,
        old_errors=old_errors,
    )
    empty = Manifest(
        collection.base_model,
        options,
        common,
        tuple(written.modules),
        plain_svd_bytes=survey.plain_svd_nbytes(),
    )
    return empty.changed(entries).holding(written.holds)


def _collected(
    handles: Mapping[str, Handle], options: Options, bounds: Mapping[str, float]
) -> Collection:
    return Collection(
        handles,
        exact={
            name
            for name, handle in handles.items()
            if bounds.get(name, options.tolerance) == 0 or in_one_gauge(handle)
        },
        block_bytes=block_bytes(options.memory),
        device=options.device,
    )


def readable(handles: Mapping[str, Handle], options: Options, broken: Broken) -> dict[str, Handle]:
    """The adapters of which all can be read; of each other one `broken` is told.

    Raises:
        MismatchError: none can.
    """
    tasks = [Task(f"adapter {name!r}", (travelling(handle),)) for name, handle in handles.items()]
    found: dict[str, Handle] = {}
    with replace(options.crew, work=None).engine() as engine:
        for (name, handle), why in zip(handles.items(), engine.map(unreadable, tasks), strict=True):
            if why is None:
                found[name] = handle
            else:
                broken(name, why)
    if not found:
        raise MismatchError("there are no adapters: none can be read")
    return found


def check_work(path: str | os.PathLike[str], work: str | os.PathLike[str] | None) -> None:
    """Refuse a work directory that is, or lies in, the library that is to be written."""
    if work is None or is_url(path):
        return
    library, folder = os.path.realpath(path), os.path.realpath(work)
    if os.path.commonpath([library, folder]) == library:
        raise FileError(
            f"the work directory {os.fspath(work)} is, or lies in, the library that is to be "
            f"written, {os.fspath(path)}: give another folder"
        )


def _what_is_left(name: str, tolerance: float, error: float) -> float:
    """What a second fold may lose of a stored adapter so that the original's bound holds."""
    if error > 0 and error >= tolerance:
        raise ToleranceError(
            f"{name!r} is stored with error {error:.4g}; a bound of {tolerance:g} can't be met "
            "without its source: give sources=, or give a larger tolerance="
        )
    # ‖ΔŴ‖ ≤ (1 + error) ‖ΔW‖, and the new error counts in units of ‖ΔŴ‖.
    return (tolerance - error) / (1 + error)


def in_one_gauge(handle: Handle) -> bool:
    """Whether an adapter's rank prefixes were trained, and its factors are to stay as they are."""
    return not Prefixes.of(handle.config).plain


def _refuse_unmet(
    names: list[str], tolerances: Mapping[str, float], common: float, old: Mapping[str, float]
) -> None:
    """Raise for adapters that are to be stored as they are, but whose error is above the bound."""
    for name in names:
        if old[name] > tolerances.get(name, common):
            _what_is_left(name, tolerances.get(name, common), old[name])
