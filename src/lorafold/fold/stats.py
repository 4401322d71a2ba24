"""What a library says of itself: bytes, errors, forms, and what else it could have been."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .library import Library


def library_stats(lib: Library) -> dict[str, Any]:
    """Totals and one entry a module; plain JSON types.

    Returns:
        adapters, base_model, tolerance, options; bytes (the library), file_bytes (the adapters'
        files), ratio; parameters (of all factors); error {"mean", "max"}; bits (mean packed bits a
        number, scales apart); plain_svd_bytes (truncated float16 SVD per adapter at the same
        tolerance; 0 when folded by size); forms {form: modules}; init_groups; modules: path,
        shape, form, ranks of the shared sides, adapters, parameters of their factors, bytes of the
        records and of the bases, certificate; clamped: how many directions there were where a rank
        asked for more.
    """
    manifest = lib.store.manifest
    entries = manifest["adapters"]
    errors = np.array([e["error"] for e in entries.values()] or [0.0])
    forms: dict[str, int] = {}
    modules = []
    for j, module in enumerate(lib.modules):
        forms[module["form"]] = forms.get(module["form"], 0) + 1
        modules.append(_module(lib, j, module))
    return {
        "adapters": len(entries),
        "base_model": lib.base_model,
        "tolerance": lib.tolerance,
        "options": dict(manifest["options"]),
        "bytes": lib.nbytes,
        "file_bytes": lib.file_bytes,
        "ratio": lib.file_bytes / max(lib.nbytes, 1),
        "parameters": sum(int(e["parameters"]) for e in entries.values()),
        "error": {"mean": float(errors.mean()), "max": float(errors.max())},
        "bits": float(np.mean([e["bits"] for e in entries.values() if "bits" in e] or [0.0])),
        "plain_svd_bytes": int(manifest.get("plain_svd_bytes", 0)),
        "forms": forms,
        "init_groups": _groups(manifest),
        "modules": modules,
    }


def _groups(manifest: dict[str, Any]) -> dict[str, list[list[str]]]:
    """Init groups, without names that have left since."""
    there = manifest["adapters"]
    found = {}
    for side, groups in manifest.get("groups", {}).items():
        kept = [[n for n in group if n in there] for group in groups]
        if kept := [group for group in kept if len(group) > 1]:
            found[side] = kept
    return found


def _rank(rank: int | list[int], j: int) -> int:
    """An adapter's rank at module number j, from its entry."""
    if isinstance(rank, int):
        return rank
    return rank[j] if j < len(rank) else 0


def _module(lib: Library, j: int, module: dict[str, Any]) -> dict[str, Any]:
    entries = list(lib.store.manifest["adapters"].values())
    held = [lib.record_size(j, e) for e in entries]
    ranks = [_rank(e["rank"], j) for e, size in zip(entries, held, strict=True) if size]
    bases = module.get("bases", {})
    entry: dict[str, Any] = {
        "path": module["path"],
        "shape": list(module["shape"]),
        "form": module["form"],
        "adapters": len(ranks),
        "parameters": sum(ranks) * sum(module["shape"]),
        "record_bytes": sum(held),
        "basis_bytes": sum(
            lib.basis_size(s, t) for segments in bases.values() for s, t, _ in segments
        ),
        "ranks": {
            name: sum(columns for _, _, columns in segments) for name, segments in bases.items()
        },
    }
    if "clamped" in module:
        entry["clamped"] = module["clamped"]
    if "certificate" in module:
        entry["certificate"] = dict(module["certificate"])
    return entry
