"""What the manifest says: one entry an adapter, one a module, and the options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from ..adapter import Layout
from ..collection.collection import Collection
from ..collection.limits import block_bytes
from ..collection.sources import Handle
from ..errors import ToleranceError
from .options import FoldOptions, Options
from .store.manifest import config_difference, layout_entry
from .store.store import Transaction
from .write import Builder, Written, check_contract


def adapter_entries(
    collection: Collection,
    written: Written,
    tolerances: np.ndarray,
    options: Options,
    common: Mapping[str, Any],
    old_errors: Mapping[str, float] | None = None,
) -> dict[str, dict[str, Any]]:
    """name → entry, for a collection that has been written.

    Args:
        tolerances: (folded,) each one's stated bound. common: the config that entries differ from.
        old_errors: errors that the sources themselves had; they are added.
    """
    entries = {}
    for i, (name, handle) in enumerate(zip(collection.names, collection.handles, strict=True)):
        parameters = sum(r * (out + inner) for out, inner, r in handle.shapes.values())
        entry: dict[str, Any] = {
            "shard": written.shard,
            "row": i,
            "digest": getattr(handle, "original_digest", None)
            or collection.digest(i, handle.read_extras()),
            "file_bytes": handle.nbytes,
            "parameters": parameters,
            "rank": _ranks(handle.shapes, collection.paths),
        }
        if i < collection.folded:
            norm = float(written.squared_norm[i]) ** 0.5
            error = float(written.squared_error[i]) ** 0.5 / norm if norm > 0 else 0.0
            # ‖ΔŴ‖ ≤ (1 + old) ‖ΔW‖, and the new error counts in units of ‖ΔŴ‖.
            old = (old_errors or {}).get(name, 0.0)
            entry["error"] = old + (1 + old) * error
            entry["norm"] = norm
            entry["bits"] = round(8 * float(written.payload[i]) / max(parameters, 1), 4)
            if options.tolerance is not None and tolerances[i] != options.tolerance:
                entry["tolerance"] = float(tolerances[i])
        else:
            entry["error"] = (old_errors or {}).get(name, 0.0)
            entry["exact"] = True
            if handle.refusal:
                entry["refusal"] = handle.refusal
            elif options.tolerance != 0:
                entry["tolerance"] = 0.0  # its own bound, which folding anew shall keep
        if difference := config_difference(common, handle.config):
            entry["config"] = difference
        if written.extras.get(i):
            entry["extras"] = written.extras[i]
        layouts = {
            path: layout_entry(layout)
            for path, layout in handle.layouts.items()
            if layout != collection.layouts.get(path, Layout())
        }
        layouts |= {
            p: {} for p in handle.shapes if p in collection.layouts and p not in handle.layouts
        }
        if layouts:
            entry["layouts"] = layouts
        entries[name] = entry
    return entries


def _ranks(shapes: Mapping[str, tuple[int, int, int]], paths: list[str]) -> int | list[int]:
    """One rank for all modules, or the list of them in the manifest's order, 0 where absent."""
    ranks = [shapes[p][2] if p in shapes else 0 for p in paths]
    there = {r for r in ranks if r}
    return there.pop() if len(there) == 1 else ranks


def option_entry(options: Options) -> dict[str, Any]:
    """The options that are set."""
    return {k: v for k, v in asdict(options).items() if v is not None}


def group_entry(builder: Builder, names: list[str]) -> dict[str, list[list[str]]]:
    """Groups by side ("in": one start of A, "out": nearly the same B): lists of names."""
    found: dict[str, list[list[str]]] = {}
    for side, word in (("V", "in"), ("U", "out")):
        groups = builder.groups.get(side)
        if groups is not None and (groups >= 0).any():
            found[word] = [
                [names[i] for i in np.flatnonzero(groups == g)]
                for g in range(int(groups.max()) + 1)
            ]
    return found


def new_manifest(
    collection: Collection,
    builder: Builder,
    written: Written,
    order: list[str],
    tolerances: np.ndarray,
    old_errors: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The manifest of a library that consists of one freshly written collection.

    Args:
        order: the names as they shall be listed. tolerances: as for `adapter_entries`.
    """
    common = dict(collection.handles[0].config)
    entries = adapter_entries(collection, written, tolerances, builder.options, common, old_errors)
    return {
        "base_model": collection.base_model,
        "options": option_entry(builder.options),
        "groups": group_entry(builder, collection.names),
        "plain_svd_bytes": builder.plain_svd_nbytes(),
        "config": common,
        "modules": written.modules,
        "adapters": {name: entries[name] for name in order},
    }


def folded(
    handles: Mapping[str, Handle],
    settings: FoldOptions,
    transaction: Transaction,
    *,
    tolerances: Mapping[str, float] | None = None,
    old_errors: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Fold opened adapters into a transaction's new shard; the manifest to commit.

    Args:
        tolerances: name → its own bound, the common one where None.
        old_errors: errors that the sources already have; they count towards the bounds.

    Raises:
        ToleranceError: a source's own error leaves nothing of its bound.
    """
    options = settings.options
    own = tolerances or {}
    collection = Collection(
        handles,
        exact={name for name in handles if own.get(name, options.tolerance) == 0},
        block_bytes=block_bytes(settings.memory),
        device=settings.device,
    )
    names = collection.names[: collection.folded]
    common = options.tolerance or 0.0
    stated = np.array([own.get(name, common) for name in names])
    bounds = stated
    if old_errors and options.tolerance is not None:
        bounds = np.array(
            [_what_is_left(n, b, old_errors[n]) for n, b in zip(names, stated, strict=True)]
        )
        _refuse_unmet(collection.names[collection.folded :], own, common, old_errors)
    builder = Builder(collection, options, bounds, settings.progress)
    written = builder.write(transaction)
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
    return new_manifest(collection, builder, written, list(handles), stated, old_errors)


def _what_is_left(name: str, tolerance: float, error: float) -> float:
    """What a second fold may lose of a stored adapter so that the original's bound holds."""
    if error > 0 and error >= tolerance:
        raise ToleranceError(
            f"{name!r} is stored with error {error:.4g}; a bound of {tolerance:g} can't be met "
            "without its source: give sources=, or a larger tolerance"
        )
    # ‖ΔŴ‖ ≤ (1 + error) ‖ΔW‖, and the new error counts in units of ‖ΔŴ‖.
    return (tolerance - error) / (1 + error)


def _refuse_unmet(
    names: list[str], tolerances: Mapping[str, float], common: float, old: Mapping[str, float]
) -> None:
    """Raise for adapters that are to be stored as they are, but whose error is above the bound."""
    for name in names:
        if old[name] > tolerances.get(name, common):
            _what_is_left(name, tolerances.get(name, common), old[name])
