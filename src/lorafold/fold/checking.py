"""A library compared with what it says, and with its sources: a task for every few adapters."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypedDict

import torch

from ..collection.elsewhere import travelling
from ..collection.sources import Handle, named_handles
from ..errors import FileError, ToleranceError
from ..scale.engine import Crew, Task
from ..thin import thin
from ..words import from_to
from .contents import Contents, InLibrary
from .options import Progress
from .store.entries import AdapterEntry

_FINE = 1e-3  # an error below which float32 itself counts where it is measured
_LEAST, _MOST = 1 << 20, 1 << 26  # bytes of files whose adapters are compared in one task, or
_TASKS = 64  # this part of all between these


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


@dataclass(frozen=True)
class Asked:
    """What is to be compared.

    Args:
        entry: what the library says of an adapter. bound: that it keeps.
        kept: reads it from there. source: it before; None where it is not given.
        whole: all of it is read, and compared with its digest, too.
        lost: why it can't be read, where that is known.
    """

    entry: AdapterEntry
    bound: float | None
    kept: InLibrary
    source: Handle | None
    whole: bool
    lost: str | None

    def __lorafold_key__(self) -> Any:
        return self.kept, self.source, self.whole, self.lost  # the library's version is in `kept`


class Verifying(TypedDict, total=False):
    """The keywords of `Library.verify`, for type checkers."""

    progress: Progress | None
    executor: Executor | str | None
    workers: int | None
    work: str | os.PathLike[str] | None


@thin
def checked(
    c: Contents,
    sources: Any,
    strict: bool,
    *,
    progress: Progress | None = None,
    executor: Executor | str | None = None,
    workers: int | None = None,
    work: str | os.PathLike[str] | None = None,
) -> Checks:
    """Every adapter as stored, or compared with its source; strict: what is wrong is raised.

    Where files are damaged all adapters are read, to see which of them that concerns. What is
    stored exactly is compared with its digest at least.
    """
    crew = Crew(executor, workers, work)
    given = {} if sources is None else named_handles(sources)
    state = c.state.verified(c.store.path)
    if strict and state.damage:
        raise FileError(state.problems())
    c = c.seeing(state)
    names = list(c.manifest.adapters if sources is None else given)
    entries = {name: c.entry(name) for name in names}  # an unknown name is told at once
    if state.damage:
        entries |= dict(c.manifest.adapters)
    found = Checks(damage.text for damage in state.damage.values())
    if sources is None and not state.damage:
        crew = Crew()  # there is next to nothing to do
    if crew != Crew():
        given = {name: travelling(handle) for name, handle in given.items()}
    asked = [_asked(c, entry, given.get(entry.name)) for entry in entries.values()]
    with crew.engine(asked) as engine:
        groups = list(_groups(asked)) if engine.spread else [[one] for one in asked]
        titles = (from_to("adapter", [one.entry.name for one in group]) for group in groups)
        tasks = [Task(t, (g, strict)) for t, g in zip(titles, groups, strict=True)]
        results = engine.map(compared, tasks)
        for group in groups:
            if progress is not None:
                progress(len(found), len(asked), group[0].entry.name)
            for one, check in zip(group, next(results), strict=False):  # it may have stopped
                if strict and check.problem is not None:
                    raise ToleranceError(check.problem)
                found[one.entry.name] = check
    return found


def _asked(c: Contents, entry: AdapterEntry, source: Handle | None) -> Asked:
    whole = bool(c.state.damage) or (entry.exact and entry.error == 0)
    lost = c.problem(entry.name) if whole else None
    bound = entry.bound(c.manifest.options.tolerance)
    return Asked(entry, bound, InLibrary(c, entry.name), source, whole, lost)


def _groups(asked: Sequence[Asked]) -> Iterator[list[Asked]]:
    sizes = [one.entry.file_bytes for one in asked]
    room = min(max(sum(sizes) // _TASKS, _LEAST), _MOST)
    group, total = [], 0
    for one, size in zip(asked, sizes, strict=True):
        group.append(one)
        total += size
        if total >= room:
            yield group
            group, total = [], 0
    if group:
        yield group


def compared(asked: Sequence[Asked], strict: bool) -> list[Check]:
    """Each compared, in order; strict: as far as nothing is wrong, and with the first that is."""
    found = []
    for one in asked:
        error, problem = None, one.lost
        if problem is None and one.whole:
            problem = _misread(one.entry, one.kept)
        if problem is None:
            try:
                error = one.entry.error if one.source is None else _measured(one, one.source)
            except ToleranceError as e:
                problem = str(e)
        found.append(Check(error, one.bound, problem))
        if strict and problem is not None:
            break
    return found


def is_as_stored(c: Contents, entry: AdapterEntry) -> str | None:
    """Read all of an adapter: why it can't be, or is not what its digest says; None if it is."""
    return c.problem(entry.name) or _misread(entry, InLibrary(c, entry.name))


def _misread(entry: AdapterEntry, kept: InLibrary) -> str | None:
    try:
        adapter = kept.load()
    except FileError as e:
        return str(e)
    if entry.exact and entry.error == 0 and adapter.digest != entry.digest:
        return f"{entry.name!r} is stored exactly, but its tensors are not those of its digest"
    return None


def _measured(asked: Asked, handle: Handle) -> float:
    """The error of a stored adapter against its source, by QR, checked against its bound."""
    entry, bound, name = asked.entry, asked.bound, asked.entry.name
    stored, source = asked.kept.load(), handle.load()
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
    if bound is None:
        bound = entry.error * 1.001 + 1e-6
    if error > bound * (1 + 1e-6) + 1e-9:
        raise ToleranceError(
            f"{name!r} has error {error:.4g} against its source, above its bound {bound:.4g}"
        )
    return error
