"""Changing a library: add and refold, each one transaction on the store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..collection.sources import Handle, OnBase, named_handles
from ..errors import FileError, MismatchError
from ..files.remote.exchange import again
from .addition import one_handle, write_added
from .contents import Contents, Stored
from .one_pass import check_work, folded
from .options import RECORDED, Kept, Options
from .store.compaction import commit

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
    if c.store.path is not None:
        check_work(c.store.path, settings.crew.work)
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
