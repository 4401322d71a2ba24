"""Changing a library: add and refold, each one transaction on the store; and comparing it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..collection.sources import Handle, OnBase, named_handles
from ..errors import FileError, MismatchError, ToleranceError
from ..files.remote.exchange import again
from ..thin import thin
from .addition import one_handle, write_added
from .contents import Contents, Stored
from .one_pass import folded
from .options import RECORDED, Kept, Options, Progress
from .store.compaction import commit
from .store.entries import AdapterEntry

_FINE = 1e-3  # an error below which float32 itself counts where it is measured


# add


def add_to(
    c: Contents,
    adapter: Any,
    name: str | None,
    *,
    replace: bool,
    tolerance: float | None,
    form: Kept | None,
    base_model: str | None = None,
) -> float:
    """See `Library.add`."""
    default, handle = one_handle(adapter)
    if base_model is not None:
        handle = OnBase(handle, base_model)
    name = name if name is not None else default
    if not isinstance(name, str) or not name:
        raise MismatchError("an Adapter object needs a name: give name=")
    if form not in (None, "svd", "exact"):
        raise MismatchError(f"add takes form 'svd' or 'exact', found {form!r}")
    if tolerance is not None and not 0 <= tolerance < 1:
        raise MismatchError(f"tolerance must lie in [0, 1), found {tolerance}")
    base = c.manifest.base_model
    if base and handle.base_model and base != handle.base_model:
        raise MismatchError(
            f"{name!r} belongs to base {handle.base_model!r}, the library to {base!r}; if these "
            f"are one, give base_model={base!r}"
        )
    for path, (out, inner, _) in handle.shapes.items():
        c.manifest.check_shape(path, (out, inner))

    def change() -> float:
        with c.changing() as (t, now):
            if name in t.manifest.adapters and not replace:
                raise MismatchError(
                    f"the library already has an adapter {name!r}; use replace=True or another name"
                )
            writer, manifest = write_added(now, t, name, handle, tolerance, form)
            commit(t, manifest, writer)
            return manifest.entry(name).error

    return again(change)


# refold


def refold_all(
    c: Contents, tolerance: float | None, sources: Any, options: Mapping[str, Any]
) -> None:
    """See `Library.refold`."""
    given = dict(options)
    if tolerance is not None:
        given["tolerance"] = tolerance
    recorded = c.manifest.options.recorded()
    sizes = set(RECORDED) - {"form"}
    asked = sizes & set(given)
    if not asked:
        given |= {k: v for k, v in recorded.items() if k in sizes - {"retention"}}
    given.setdefault("form", recorded["form"])
    settings = Options.of(**given)
    if settings.retention is not None:
        raise MismatchError("refold takes no retention=: fold the sources with it instead")
    with c.changing() as (t, now):
        if t.state.damage:
            raise FileError(f"a damaged library is not refolded: {t.state.problems()}")
        there = t.manifest.adapters
        handles: dict[str, Handle] = {}
        old: dict[str, float] = {}
        if sources is not None:
            found = named_handles(sources)
            if set(found) != set(there):
                odd = sorted(set(found) ^ set(there))
                raise MismatchError(
                    "the sources must be the library's adapters, one each; they differ in "
                    f"{odd[:3]}"
                )
            handles = {name: found[name] for name in there}
        else:
            handles = {name: Stored(now, name, original=True) for name in there}
            old = {name: entry.error for name, entry in there.items()}
        bounds: dict[str, float] = {}
        if not asked:  # every adapter keeps the bound it has
            own = {name: entry.tolerance for name, entry in there.items()}
            bounds = {name: value for name, value in own.items() if value is not None}
        t.commit(folded(handles, settings, t, tolerances=bounds, old_errors=old))


# verify


@dataclass(frozen=True)
class Check:
    """An adapter compared with its source, or as it is stored.

    Args:
        error: measured, or as stored; None where it can't be compared. bound: that it keeps.
        problem: what is wrong; None where nothing is.
    """

    error: float | None
    bound: float | None
    problem: str | None = None


class Checks(dict[str, Check]):
    """Name → `Check`.

    Attributes:
        damage: what is wrong with files, a line each.
    """

    def __init__(self, damage: Iterable[str]) -> None:
        super().__init__()
        self.damage = list(damage)


@thin
def checked(
    c: Contents, sources: Mapping[str, Handle] | None, strict: bool, progress: Progress | None
) -> Checks:
    """Every adapter as stored, or compared with its source; strict: what is wrong is raised.

    Where files are damaged all adapters are read, to see which of them that concerns. What is
    stored exactly is compared with its digest at least.
    """
    state = c.state.verified(c.store.path)
    if strict and state.damage:
        raise FileError(state.problems())
    c = c.seeing(state)
    names = list(c.manifest.adapters if sources is None else sources)
    entries = {name: c.entry(name) for name in names}  # an unknown name is told at once
    if state.damage:
        entries |= dict(c.manifest.adapters)
    found = Checks(damage.text for damage in state.damage.values())
    for k, (name, entry) in enumerate(entries.items()):
        if progress is not None:
            progress(k, len(entries), name)
        bound, error = entry.bound(c.manifest.options.tolerance), None
        whole = state.damage or (entry.exact and entry.error == 0)
        problem = is_as_stored(c, entry) if whole else None
        if problem is None:
            try:
                source = None if sources is None else sources.get(name)
                error = entry.error if source is None else _measured(c, entry, source)
            except ToleranceError as e:
                problem = str(e)
        if strict and problem is not None:
            raise ToleranceError(problem)
        found[name] = Check(error, bound, problem)
    return found


def is_as_stored(c: Contents, entry: AdapterEntry) -> str | None:
    """Read all of an adapter: why it can't be, or is not what its digest says; None if it is."""
    problem = c.problem(entry.name)
    if problem is not None:
        return problem
    try:
        adapter = c.adapter(entry.name)
    except FileError as e:
        return str(e)
    if entry.exact and entry.error == 0 and adapter.digest != entry.digest:
        return f"{entry.name!r} is stored exactly, but its tensors are not those of its digest"
    return None


def _measured(c: Contents, entry: AdapterEntry, handle: Handle) -> float:
    """The error of a stored adapter against its source, by QR, checked against its bound."""
    name = entry.name
    stored, source = c.adapter(name), handle.load()
    if entry.exact:
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
    if source.distance(stored) < _FINE * norm:
        source, stored = (a.to(dtype=torch.float64) for a in (source, stored))
        norm = source.norm()
    error = source.distance(stored) / norm if norm > 0 else float(stored.norm() > 0)
    bound = entry.bound(c.manifest.options.tolerance)
    if bound is None:
        bound = entry.error * 1.001 + 1e-6
    if error > bound * (1 + 1e-6) + 1e-9:
        raise ToleranceError(
            f"{name!r} has error {error:.4g} against its source, above its bound {bound:.4g}"
        )
    return error
