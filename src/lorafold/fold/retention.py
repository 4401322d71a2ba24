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
from .change import add_to
from .contents import Contents
from .one_pass import folded
from .options import Kept, Options, Score
from .store.store import Store

RUNS = 8  # of the score, an adapter: the base, the full adapter, the bisection, the check
LOOSEST, TIGHTEST = 0.9, 0.005


def fold_by_retention(
    handles: Mapping[str, Handle],
    options: Options,
    path: str | os.PathLike[str] | None,
    overwrite: bool,
    timeout: float,
) -> Store:
    """See `fold(retention=…, score=…)`."""
    assert options.score is not None
    if path is not None:
        with Store.create(path, overwrite=overwrite, timeout=timeout):
            pass  # what is in the way is found before the scores are run
    score = _Counted(options.score)
    found = {}
    for k, (name, handle) in enumerate(handles.items()):
        if options.progress:
            options.progress(k, len(handles), "scoring")
        found[name] = _Search(name, handle, options, score)
    contents = _folded(handles, options, {name: s.tolerance for name, s in found.items()})
    for name, search in found.items():
        if search.searched and not search.keeps(contents.now().adapter(name)):
            form: Kept = "svd" if search.passed else "exact"
            tolerance = search.tolerance
            adapter = handles[name].load()
            add_to(contents, adapter, name, replace=True, tolerance=tolerance, form=form)
    store = contents.store
    return store if path is None else store.save(path, overwrite=overwrite, timeout=timeout)


def _folded(
    handles: Mapping[str, Handle], options: Options, bounds: Mapping[str, float] | None = None
) -> Contents:
    """What a fold in memory holds."""
    with Store.create(None) as t:
        return Contents(t.commit(folded(handles, options, t, tolerances=bounds)), options.device)


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
                f"the score of {name!r} is {value}; it must be a finite number, higher for better"
            )
        return value


class _Search:
    """The loosest tolerance found for one adapter.

    Attributes:
        tolerance: the bound to fold it by. searched: whether there was a lift to keep.
        passed: whether the score was run at that bound and kept the lift.
    """

    def __init__(self, name: str, handle: Handle, options: Options, score: _Counted) -> None:
        assert options.retention is not None
        assert options.tolerance is not None
        self._name, self._score, self._share = name, score, options.retention
        self.tolerance = options.tolerance
        self.searched = self.passed = False
        if handle.refusal is not None:
            return
        self._base = score(name, None)
        self._lift = score(name, handle.load()) - self._base
        if self._lift <= 0:
            return
        self.searched = True
        low, high = math.log(TIGHTEST), math.log(LOOSEST)
        self.tolerance = TIGHTEST
        middle = math.log(2 * DEFAULT_START)
        while score.left(name) > 1:
            alone = Options("svd", math.exp(middle), memory=options.memory, device=options.device)
            if self.keeps(_folded({name: handle}, alone).adapter(name)):
                low, self.tolerance, self.passed = middle, math.exp(middle), True
            else:
                high = middle
            middle = (low + high) / 2

    def keeps(self, adapter: Adapter) -> bool:
        """Whether the adapter keeps the share of the lift."""
        return self._score(self._name, adapter) - self._base >= self._share * self._lift


DEFAULT_START = 0.1  # the first guess is twice the usual tolerance
