"""`similarity`: who is like whom, by what adapters do to the weights.

The cosine of two adapters is ⟨a, b⟩ / (‖a‖ ‖b‖) with ⟨a, b⟩ = Σ_modules tr(ΔW_aᵀ ΔW_b): gauges,
ranks and scales play no part, and a start that two adapters have in common is no likeness. (In
the space of factors two unrelated adapters from one A have a cosine near 1.)

Where all pairs are too many, sketches tell which could matter, and those are computed exactly:
those above the threshold less four times what a sketch may be off there. That is the error of most
pairs, or more (`pairs.off_at`) where an adapter, or what two differ in, has few directions: narrow
things are sketched worse than broad ones, and most pairs of a collection tell nothing of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np

from ..adapter import tensor_digest
from ..collection.elsewhere import Said
from ..collection.sources import named_handles
from ..errors import MismatchError, MissingExtraError, UnknownNameError
from ..scale.engine import Crew, Engine
from ..words import LISTED, did_you_mean, html_table
from .clusters import linked
from .pairs import Cosines, Pairs, Progress, off_at

DUPLICATES = 0.999
_MARGIN = 4  # deviations of a sketch below the threshold from which on pairs are exact
_CHEAP = 2e11  # operations that are done exactly rather than sketched: seconds
_MAD = 1.4826  # of a normal distribution: its deviation over its median absolute deviation
_EVEN = 0.05  # relative spread of distances that is none: rounding must not look like outliers


class Pair(NamedTuple):
    """Two adapters and the cosine of their updates."""

    a: str
    b: str
    cosine: float


class Outlier(NamedTuple):
    """An adapter, its distance ‖ΔW − mean‖ to the mean, and how many deviations that is off."""

    name: str
    distance: float
    z: float


@dataclass(frozen=True, eq=False)
class Similarity:
    """Cosines of all pairs of a collection, and what follows from them. Made by `similarity`.

    Not for: where two adapters differ (`overlap`), nor which to use for an input.

    Args:
        names: N names. matrix: (N, N) float64 cosines of ΔW; 1 with oneself, and 0 with everything
            for a zero update.
        error: rms error of sketched cosines near 0, estimated from the data; 0 where nothing is
            sketched.
        threshold: every pair above threshold − 4·error is exact, and those farther below whose
            sketches could be off by that.
        known: (N, N), which entries are exact.
        norms: (N,) ‖ΔW‖. nbytes: (N,) bytes of their files.
        missing: module → the names that lack it, which counts as zero there.
    """

    names: tuple[str, ...]
    matrix: np.ndarray
    error: float
    threshold: float
    known: np.ndarray
    norms: np.ndarray
    nbytes: np.ndarray
    missing: Mapping[str, tuple[str, ...]]
    pairs: Pairs = field(repr=False)
    focus: np.ndarray = field(repr=False)  # of `pairs.off_at`

    def __repr__(self) -> str:
        known = f"exact above {self.threshold:g}" if self.error else "exact"
        return f"Similarity({len(self.names)} adapters, {known}, error {self.error:.2g})"

    def _repr_html_(self) -> str:
        others = np.where(np.eye(len(self.names), dtype=bool), -np.inf, self.matrix)
        order = np.argsort(-others.max(1), kind="stable")[: LISTED if len(others) > 1 else 0]
        pairs = [self._pair(i, int(others[i].argmax()), self.matrix) for i in order]
        rows = [(pair.a, pair.b, f"{pair.cosine:.3f}") for pair in pairs]
        return html_table(repr(self), rows, ("adapter", "nearest", "cosine"), len(self.names))

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that any of them has."""
        return tuple(self.pairs.collection.paths)

    def module(self, path: str) -> np.ndarray:
        """(N, N) cosines at one module, exact, read from the sources; 0 where one lacks it.

        Raises:
            UnknownNameError: none has it.
        """
        if path not in self.pairs.collection.shapes:
            hint = did_you_mean(str(path), self.modules)
            raise UnknownNameError(f"no adapter has a module {path!r}; {hint}")
        return self.pairs.module(path)

    def at(self, threshold: float) -> Similarity:
        """The same with every pair above a lower threshold exact, read from the sources again.

        Raises:
            MismatchError: a threshold that is no cosine.
        """
        _check_threshold(threshold)
        return _refined(self, threshold, None)

    def clusters(self, threshold: float = 0.9) -> list[list[str]]:
        """Groups in which every pair reaches the threshold (complete linkage), largest first.

        Returns:
            Each name once; those that are like none are alone.
        """
        found = linked(self.at(threshold).matrix, threshold)
        return [[self.names[i] for i in group] for group in found]

    def duplicates(self, threshold: float = DUPLICATES) -> list[Pair]:
        """The pairs with a cosine of at least that, the nearest first; strengths may differ."""
        matrix = np.triu(self.at(threshold).matrix, 1)
        rows, columns = np.nonzero(np.triu(matrix >= threshold, 1))
        order = np.argsort(-matrix[rows, columns], kind="stable")
        return [self._pair(i, j, matrix) for i, j in zip(rows[order], columns[order], strict=True)]

    def redundant(self, threshold: float = DUPLICATES) -> dict[str, str]:
        """What could go: {name: the one that stays and does the same}.

        Two do the same where ‖a − b‖² ≤ 2 (1 − threshold) ‖a‖² for the larger a, so that strengths
        agree too, and where heads, biases and tokens (`extras`) are equal. The smallest file stays.
        """
        s = self.at(threshold)
        larger = np.maximum.outer(self.norms, self.norms)
        smaller = np.minimum.outer(self.norms, self.norms)
        ratio = np.divide(smaller, larger, out=np.zeros_like(larger), where=larger > 0)
        same = (1 - ratio**2) / 2 + ratio * s.matrix  # 1 − ‖a − b‖² / 2‖a‖²
        same = np.where(larger > 0, same, 1.0)  # zero updates are alike
        found: dict[str, str] = {}
        for group in linked(same, threshold):
            by_extras: dict[frozenset[bytes], list[int]] = {}
            for i in group if len(group) > 1 else ():
                by_extras.setdefault(self._extras(i), []).append(i)
            for alike in by_extras.values():
                stays = min(alike, key=lambda i: self.nbytes[i])
                found |= {self.names[i]: self.names[stays] for i in alike if i != stays}
        return found

    def _extras(self, i: int) -> frozenset[bytes]:
        extras = self.pairs.collection.handles[i].read_extras()
        return frozenset(tensor_digest(key, t) for key, t in extras.items())

    def outliers(self, threshold: float = 2.0) -> list[Outlier]:
        """Those far from the mean update, farthest first.

        Args:
            threshold: deviations above the median distance, by the median absolute deviation.

        Raises:
            MismatchError: a threshold that is no number.
        """
        if isinstance(threshold, bool) or not isinstance(threshold, Real) or np.isnan(threshold):
            raise MismatchError(f"threshold must be a number of deviations, found {threshold!r}")
        if len(self.names) < 3:
            return []  # two are equally far from their mean
        gram = self.matrix * np.outer(self.norms, self.norms)
        square = gram.diagonal() - 2 * gram.mean(1) + gram.mean()
        distance = np.sqrt(square.clip(0))
        median = np.median(distance)
        spread = max(
            _MAD * float(np.median(np.abs(distance - median))),
            _EVEN * float(median),
            _EVEN * float(np.median(self.norms)),
        )
        z = (distance - median) / spread if spread > 0 else np.where(distance > median, np.inf, 0.0)
        order = [i for i in np.argsort(-z, kind="stable") if z[i] > threshold]
        return [Outlier(self.names[i], float(distance[i]), float(z[i])) for i in order]

    def nearest(self, name: str, k: int = 5) -> list[Pair]:
        """The k others that are most like one, the nearest first.

        Raises:
            UnknownNameError: no such name. MismatchError: k below 1.
        """
        if name not in self.names:
            raise UnknownNameError(f"no adapter {name!r}; {did_you_mean(str(name), self.names)}")
        if isinstance(k, bool) or not isinstance(k, Integral) or k < 1:
            raise MismatchError(f"k must be a whole number of at least 1, found {k!r}")
        i = self.names.index(name)
        order = [j for j in np.argsort(-self.matrix[i], kind="stable") if j != i]
        return [self._pair(i, j, self.matrix) for j in order[:k]]

    def _pair(self, i: int, j: int, matrix: np.ndarray) -> Pair:
        return Pair(self.names[i], self.names[j], float(matrix[i, j]))

    def to_pandas(self) -> Any:
        """The matrix as a `DataFrame`, with names on both sides.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as e:
            raise MissingExtraError(
                "to_pandas needs pandas: pip install 'lorafold[compare]'"
            ) from e
        return pandas.DataFrame(self.matrix, index=list(self.names), columns=list(self.names))


def similarity(
    sources: Any,
    *,
    threshold: float = 0.9,
    exact: bool = False,
    seed: int = 0,
    memory: str | int = "1GiB",
    progress: Progress | None = None,
    executor: Executor | str | None = None,
    workers: int | None = None,
    work: str | os.PathLike[str] | None = None,
) -> Similarity:
    """Cosines of all pairs of adapters in ΔW, of any ranks and targets over one base.

    Args:
        sources: paths, globs, `Adapter`s, a `Library`, or {name: either}; read module by module.
        threshold: pairs above it are computed exactly, the others where that is cheap or `exact`.
        exact: compute all of them.
        seed: of the sketches.
        memory: limit for what is read of the collection at once.
        progress: called with (done, total, module).
        executor, workers, work: who computes, as in `fold`; the numbers are the same, whoever does.

    Returns:
        A `Similarity`.

    Raises:
        MismatchError: no sources, adapters over different bases, options out of range.
        RefusedError: ΔW algebra would be wrong for a source; naming it and the remedy.
        FileError: a source that can't be read, or an executor that fails.

    Not for: two adapters in detail (`overlap`).

    Examples:
        >>> import torch, lorafold as lf
        >>> u = lf.LowRank(torch.randn(2, 32), torch.randn(16, 2))
        >>> v = lf.LowRank(torch.randn(2, 32), torch.randn(16, 2))
        >>> a, b = lf.Adapter({"q_proj": u}), lf.Adapter({"q_proj": v})
        >>> s = lf.similarity({"sql": a, "copy": a.nested(), "law": b})
        >>> s.clusters()
        [['sql', 'copy'], ['law']]
    """
    _check_threshold(threshold)
    crew = Crew(executor, workers, work)
    handles = named_handles(sources)
    pairs = Pairs(handles, memory, progress)
    run = Said(handles), seed, exact, str(memory)
    with crew.engine(run, at_once=pairs.at_once) as engine:
        if exact or pairs.work <= _CHEAP:
            found, known = pairs.exact(engine=engine), np.ones((len(pairs), len(pairs)), bool)
        else:
            found = pairs.sketched(seed, engine)
            known = np.eye(len(pairs), dtype=bool) | (found.error == 0)
        return _refined(_similarity(pairs, found, known, threshold), threshold, engine)


def _similarity(pairs: Pairs, found: Cosines, known: np.ndarray, threshold: float) -> Similarity:
    c = pairs.collection
    return Similarity(
        tuple(c.names),
        found.matrix,
        found.error,
        np.inf if found.error else threshold,
        known,
        found.norms,
        np.array([h.nbytes for h in c.handles]),
        c.missing,
        pairs,
        found.focus,
    )


def _refined(s: Similarity, threshold: float, engine: Engine | None) -> Similarity:
    """See `Similarity.at`."""
    if threshold >= s.threshold or not s.error:
        return s
    off = off_at(threshold, s.error, s.focus)
    wanted = (s.matrix > threshold - _MARGIN * off) & ~s.known
    matrix = np.where(wanted, s.pairs.exact(wanted, engine).matrix, s.matrix)
    return replace(s, matrix=matrix, threshold=threshold, known=s.known | wanted)


def _check_threshold(threshold: Any) -> None:
    number = isinstance(threshold, Real) and not isinstance(threshold, bool)
    if not (number and -1 <= threshold <= 1):
        raise MismatchError(f"threshold must be a cosine, -1 … 1, found {threshold!r}")
