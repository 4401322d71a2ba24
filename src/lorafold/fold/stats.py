"""What a library says of itself: bytes, errors, forms, and what else it could have been."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

from ..words import html_table
from .store.catalog import Catalog
from .store.entries import AdapterEntry, ModuleEntry


def library_stats(c: Catalog) -> dict[str, Any]:
    """Totals and one entry a module; plain JSON types.

    Returns:
        adapters, base_model, tolerance, options; bytes (the library), file_bytes (the adapters'
        files), ratio; parameters (of all factors); error {"mean", "max"}; bits (mean packed bits a
        number, scales apart); plain_svd_bytes (truncated float16 SVD per adapter at the same
        tolerance; 0 when folded by size); shards; damage (of files, in words); forms
        {form: modules}; init_groups; modules: path, shape, form, ranks of the shared sides,
        adapters, parameters of their factors, bytes of the records and of the bases, certificate;
        clamped: how many directions there were where a rank asked for more.
    """
    entries = list(c.manifest.adapters.values())
    errors = [e.error for e in entries] or [0.0]
    file_bytes = sum(e.file_bytes for e in entries)
    readable = [e for e in entries if c.problem(e.name) is None]
    nbytes = c.store.nbytes
    forms: dict[str, int] = {}
    for module in c.modules:
        forms[module.form] = forms.get(module.form, 0) + 1
    return {
        "adapters": len(entries),
        "base_model": c.manifest.base_model,
        "tolerance": c.manifest.options.tolerance,
        "options": c.manifest.options.recorded(),
        "bytes": nbytes,
        "file_bytes": file_bytes,
        "ratio": file_bytes / max(nbytes, 1),
        "parameters": sum(e.parameters for e in entries),
        "error": {"mean": fmean(errors), "max": max(errors)},
        "bits": fmean([e.bits for e in entries if e.bits is not None] or [0.0]),
        "plain_svd_bytes": c.manifest.plain_svd_bytes,
        "shards": len(c.state.shards),
        "damage": [damage.text for damage in c.state.damage.values()],
        "forms": forms,
        "init_groups": _groups(entries),
        "modules": _modules(c, readable),
    }


def library_html(title: str, c: Catalog) -> str:
    """A table of the adapters for a notebook: the first of them, and how many there are."""
    total, tolerance = len(c.manifest.adapters), c.manifest.options.tolerance
    bound = "" if tolerance is None else f", tolerance {tolerance:g}"
    rows = (
        (name, f"{error:.2%}", *more) for name, error, *more in map(dict.values, adapter_rows(c))
    )
    head = ("adapter", "error", "bound", "rank", "bytes", "bytes of its file")
    return html_table(f"{title}{bound}", rows, head, total)


def adapter_rows(c: Catalog) -> Iterator[dict[str, Any]]:
    """A record of each adapter, in the order in which they came; see `Library.rows`."""
    tolerance = c.manifest.options.tolerance
    for e in c.manifest.adapters.values():
        lost = c.problem(e.name) is not None
        yield {
            "name": e.name,
            "error": e.error,
            "bound": e.bound(tolerance),
            "rank": max(e.ranks, default=0),
            "bytes": 0 if lost else c.own_bytes(e.name),
            "file_bytes": e.file_bytes,
        }


def entry_record(c: Catalog, name: str) -> dict[str, Any]:
    """See `Library.entry`."""
    entry = c.entry(name)
    bound, problem = entry.bound(c.manifest.options.tolerance), c.problem(name)
    found = {**entry.to_json(), "shard": c.manifest.shard_of(entry.id)}
    found |= {"bound": bound, "ranks": list(entry.ranks)}
    lost = None if problem is None else {"bytes": 0, "problem": problem}
    return {**found, **(lost or {"bytes": c.own_bytes(name)})}


def _groups(entries: list[AdapterEntry]) -> dict[str, list[list[str]]]:
    """Init groups of those that are there, by side."""
    found: dict[str, dict[int, list[str]]] = {}
    for entry in entries:
        for side, number in entry.groups.items():
            found.setdefault(side, {}).setdefault(number, []).append(entry.name)
    kept = {
        side: [groups[g] for g in sorted(groups) if len(groups[g]) > 1]
        for side, groups in sorted(found.items())
    }
    return {side: groups for side, groups in kept.items() if groups}


def _modules(c: Catalog, entries: list[AdapterEntry]) -> list[dict[str, Any]]:
    held, number, ranks = ([0] * len(c.modules) for _ in range(3))
    for entry in entries:
        for j, size in enumerate(c.record_sizes(entry)):
            if size:
                held[j] += size
                number[j] += 1
                ranks[j] += entry.rank_at(j)
    return [
        _module(c, module, *sums)
        for module, *sums in zip(c.modules, held, number, ranks, strict=True)
    ]


def _module(c: Catalog, module: ModuleEntry, held: int, number: int, ranks: int) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "path": module.path,
        "shape": list(module.shape),
        "form": module.form,
        "adapters": number,
        "parameters": ranks * sum(module.shape),
        "record_bytes": held,
        "basis_bytes": sum(
            c.basis_size(p.shard, p.tensor)
            for pieces in module.bases.values()
            for p in pieces
            if p.shard not in c.state.missing
        ),
        "ranks": {name: sum(p.columns for p in pieces) for name, pieces in module.bases.items()},
    }
    if module.clamped is not None:
        entry["clamped"] = module.clamped
    if module.certificate:
        entry["certificate"] = dict(module.certificate)
    return entry
