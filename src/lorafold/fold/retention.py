"""Folding by what matters: the loosest tolerance per adapter that keeps a share of its lift.

Retention is (score − base) / (adapter − base) on the adapter's own task. It is searched by
bisection on the logarithm of the tolerance with the form `svd`, whose error is all of the adapter's
own, then checked once on what was written; an adapter that fails there is kept in the very form
that passed, or exactly where none did.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

from ..adapter import Adapter
from ..collection.sources import Handle
from ..errors import MismatchError
from .fold import fold
from .library import Library
from .one_pass import folded
from .options import FoldOptions, Score
from .store.store import Store

RUNS = 8  # of the score, an adapter: the base, the full adapter, the bisection, the check
LOOSEST, TIGHTEST = 0.9, 0.005


def fold_by_retention(
    handles: Mapping[str, Handle],
    settings: FoldOptions,
    path: str | os.PathLike[str] | None,
    overwrite: bool,
) -> Library:
    """See `fold(retention=…, score=…)`."""
    assert settings.retention is not None
    assert settings.score is not None
    if path is not None:
        with Store.create(path, overwrite=overwrite):
            pass  # what is in the way is found before the scores are run
    score = _Counted(settings.score)
    found = {}
    for k, (name, handle) in enumerate(handles.items()):
        if settings.progress:
            settings.progress(k, len(handles), "scoring")
        found[name] = _Search(name, handle, settings, score)
    bounds = {name: s.tolerance for name, s in found.items()}
    with Store.create(None) as t:
        store = t.commit(folded(handles, settings, t, tolerances=bounds))
    lib = Library(store, settings.device)
    for name, search in found.items():
        if search.searched and not search.keeps(lib[name]):
            form = "svd" if search.passed else "exact"
            lib.add(handles[name].load(), name, replace=True, tolerance=search.tolerance, form=form)
    return lib if path is None else lib.save(path, overwrite=overwrite)


class _Counted:
    """A score that refuses to be run more often than promised."""

    def __init__(self, score: Score) -> None:
        self._score = score
        self._runs: dict[str, int] = {}

    def left(self, name: str) -> int:
        return RUNS - self._runs.get(name, 0)

    def __call__(self, name: str, adapter: Adapter | None) -> float:
        self._runs[name] = self._runs.get(name, 0) + 1
        value = float(self._score(name, adapter))
        if not math.isfinite(value):
            raise MismatchError(
                f"score({name!r}, …) gave {value}; it must be a finite number, higher for better"
            )
        return value


class _Search:
    """The loosest tolerance found for one adapter.

    Attributes:
        tolerance: the bound to fold it by. searched: whether there was a lift to keep.
        passed: whether the score was run at that bound and kept the lift.
    """

    def __init__(self, name: str, handle: Handle, settings: FoldOptions, score: _Counted) -> None:
        assert settings.retention is not None
        assert settings.options.tolerance is not None
        self._name, self._score, self._share = name, score, settings.retention
        self.tolerance = settings.options.tolerance
        self.searched = self.passed = False
        if handle.refusal is not None:
            return
        adapter = handle.load()
        self._base = score(name, None)
        self._lift = score(name, adapter) - self._base
        if self._lift <= 0:
            return
        self.searched = True
        low, high = math.log(TIGHTEST), math.log(LOOSEST)
        self.tolerance = TIGHTEST
        middle = math.log(2 * DEFAULT_START)
        while score.left(name) > 1:
            candidate = fold(
                {name: adapter}, tolerance=math.exp(middle), form="svd", device=settings.device
            )
            if self.keeps(candidate[name]):
                low, self.tolerance, self.passed = middle, math.exp(middle), True
            else:
                high = middle
            middle = (low + high) / 2

    def keeps(self, adapter: Adapter) -> bool:
        """Whether the adapter keeps the share of the lift."""
        return self._score(self._name, adapter) - self._base >= self._share * self._lift


DEFAULT_START = 0.1  # the first guess is twice the usual tolerance
