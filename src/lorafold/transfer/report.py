"""`transfer_report`: what became of an update that was moved, module by module.

All of it from the factors: with ΔW = U S Vᵀ before and X T Yᵀ after, the error is
‖ΔW' − ΔW‖ / ‖ΔW‖, and the singular values of U₅ᵀ X₅ and V₅ᵀ Y₅ are the cosines of the principal
angles between the leading five directions (Björck & Golub 1973). Updates of two shapes have no
difference: there the error is None, and so is a side that has two lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter
from ..collection.limits import threads
from ..errors import MismatchError, RefusedError
from ..lowrank import LowRank
from ..words import html_table

LEADING = 5  # directions that are compared
RANK_TOLERANCE = 1e-6  # relative singular value below which float32 factors hold rounding alone


@dataclass(frozen=True)
class ModuleReport:
    """One module of the result, against what it was made of.

    Args:
        path: in the target. sources: the paths in the source.
        shapes: (out, in) before and after.
        norms: ‖ΔW‖ before and after. ranks: the numerical ones.
        error: ‖ΔW' − ΔW‖ / ‖ΔW‖; None where the shapes differ, or ΔW is zero and ΔW' is not.
        norm_ratio: ‖ΔW'‖ / ‖ΔW‖; None where ΔW is zero.
        rank_ratio: of the numerical ranks; None where ΔW is zero.
        cosines_out, cosines_in: of the principal angles between the leading five directions,
            descending; None where that side has another length now, () where one update is zero.
        fit: R² of the alignment on held-out texts; None where there is none.
        distance: ‖W_t − W_s‖ / ‖W_s‖ of the two bases; None where they were not compared.
    """

    path: str
    sources: tuple[str, ...]
    shapes: tuple[tuple[int, int], tuple[int, int]]
    norms: tuple[float, float]
    ranks: tuple[int, int]
    error: float | None
    norm_ratio: float | None
    rank_ratio: float | None
    cosines_out: tuple[float, ...] | None
    cosines_in: tuple[float, ...] | None
    fit: float | None = None
    distance: float | None = None

    @property
    def cosine(self) -> float | None:
        """The mean of both sides' cosines; None without any."""
        return _mean([*(self.cosines_out or ()), *(self.cosines_in or ())])


@dataclass(frozen=True)
class TransferReport:
    """What became of an adapter. Made by `transfer` and `transfer_report`.

    Not for: whether it still does its task on another base, which only its task's score says.

    Args:
        modules: those of the result.
        error, norm_ratio, rank_ratio: as in `ModuleReport`, over all modules; a module that is not
            in the result counts as zero there.
        cosines_out, cosines_in: the mean over modules, place by place.
        dropped: {path in the source: why it was left out}.
        without: {path in the source: why it has no counterpart}.
        left_behind: keys of extra tensors that don't go with it.
        method: None where two updates were compared.
        said: what the method has to say, by name.
        rank_tolerance: a singular value counts above this share of the largest.
    """

    modules: tuple[ModuleReport, ...]
    error: float | None
    norm_ratio: float | None
    rank_ratio: float | None
    cosines_out: tuple[float, ...] | None
    cosines_in: tuple[float, ...] | None
    dropped: Mapping[str, str] = field(default_factory=dict)
    without: Mapping[str, str] = field(default_factory=dict)
    left_behind: tuple[str, ...] = ()
    method: str | None = None
    said: Mapping[str, Any] = field(default_factory=dict)
    rank_tolerance: float = RANK_TOLERANCE

    @property
    def cosine(self) -> float | None:
        """The mean over modules of their mean cosine; None without any."""
        return _mean([m.cosine for m in self.modules if m.cosine is not None])

    def to_dict(self) -> dict[str, Any]:
        """All of it in JSON's types."""
        found = asdict(self)
        for row, m in zip(found["modules"], self.modules, strict=True):
            row["cosine"] = m.cosine
        return {**found, "cosine": self.cosine}

    def __repr__(self) -> str:
        said = [f"{len(self.modules)} modules"]
        for name in ("error", "norm_ratio", "rank_ratio", "cosine"):
            value = getattr(self, name)
            if value is not None:
                said.append(f"{name.replace('_', ' ')} {value:.4g}")
        counts = {"dropped": len(self.dropped), "without counterpart": len(self.without)}
        said += [f"{n} {what}" for what, n in counts.items() if n]
        return f"TransferReport({', '.join(said)})"

    def _repr_html_(self) -> str:
        rows = [
            (m.path, *(f"{a}×{b}" for a, b in m.shapes), *map(_shown, _cells(m)))
            for m in self.modules
        ]
        head = ("module", "before", "after", "error", "norm ratio", "rank ratio", "cosine", "R²")
        return html_table(repr(self), rows, head)


def _cells(m: ModuleReport) -> tuple[float | None, ...]:
    return m.error, m.norm_ratio, m.rank_ratio, m.cosine, m.fit


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def transfer_report(original: Any, result: Any) -> TransferReport:
    """What became of an update, or of every module of an adapter, that was moved.

    Args:
        original, result: two `LowRank`s or two `Adapter`s, matched by module path. Shapes and ranks
            may differ.

    Returns:
        A `TransferReport`: `error` ‖ΔW' − ΔW‖ / ‖ΔW‖ (None where any shape differs), `norm_ratio`,
        `rank_ratio` of the numerical ranks (singular values above 1e-6 of the largest), and the
        cosines of the principal angles between the leading five directions on either side. A zero
        update has no ratio (None); an error of 0 where it came back as zero.

    Raises:
        MismatchError: not two of one kind.
        RefusedError: ΔW algebra would be wrong for one.

    Not for: bases, which it doesn't look at; `lf.overlap` compares two adapters in full.

    Source: Björck & Golub, Numerical methods for computing angles between linear subspaces (1973).

    Example:
        >>> import torch, lorafold as lf
        >>> u = lf.LowRank(torch.randn(2, 32), torch.randn(16, 2))
        >>> found = lf.transfer_report(u, 0.5 * u)
        >>> round(found.error, 4), round(found.norm_ratio, 4), found.rank_ratio
        (0.5, 0.5, 1.0)
    """
    if isinstance(original, LowRank) and isinstance(result, LowRank):
        return report_of({"": original}, {"": result})
    if not (isinstance(original, Adapter) and isinstance(result, Adapter)):
        raise MismatchError(
            "transfer_report takes two LowRanks or two Adapters, found "
            f"{type(original).__name__} and {type(result).__name__}"
        )
    for one in (original, result):
        if one.refusal is not None:
            raise RefusedError(one.refusal)
    return report_of(original.modules, result.modules)


@torch.no_grad()
def report_of(
    original: Mapping[str, LowRank],
    result: Mapping[str, LowRank],
    *,
    sources: Mapping[str, Sequence[str]] | None = None,
    fits: Mapping[str, float] | None = None,
    distances: Mapping[str, float] | None = None,
    dropped: Mapping[str, str] | None = None,
    without: Mapping[str, str] | None = None,
    **said: Any,
) -> TransferReport:
    """The report on modules of which it is known what they were made of, as `Moved` has it.

    Args:
        said: `left_behind`, `method`, `said` of the report.
    """
    sources, fits, distances = sources or {}, fits or {}, distances or {}
    made_of = {p: tuple(sources.get(p, (p,) if p in original else ())) for p in result}
    with threads(1):  # thin algebra on several waits more than it works
        found = {p: _Pair(p, [original[s] for s in made_of[p]], result[p]) for p in result}
        unused = [p for p in original if p not in {s for of in made_of.values() for s in of}]
        lost = [original[p].norm() for p in unused]
        whole = math.hypot(*(u.norm() for u in original.values()))
    if dropped is None and without is None:
        without = dict.fromkeys(unused, "not in the result")
    rows = tuple(pair.row(made_of[p], fits.get(p), distances.get(p)) for p, pair in found.items())
    apart = [pair.distance for pair in found.values()]
    after = math.hypot(*(m.norms[1] for m in rows))
    ranks = [sum(m.ranks[k] for m in rows) for k in (0, 1)]
    known = [d for d in apart if d is not None]
    error = _ratio(math.hypot(*known, *lost), whole) if len(known) == len(apart) else None
    return TransferReport(
        rows,
        error,
        after / whole if whole > 0 else None,
        ranks[1] / ranks[0] if ranks[0] else None,
        _means(m.cosines_out for m in rows),
        _means(m.cosines_in for m in rows),
        dict(dropped or {}),
        dict(without or {}),
        **said,
    )


class _Pair:
    """A module of the result and the updates that it was made of, in float64."""

    def __init__(self, path: str, before: Sequence[LowRank], after: LowRank) -> None:
        self._path, self._after = path, _exact(after)
        self._before = [_exact(u) for u in before]
        self._one = self._before[0] if len(before) == 1 else None
        self.distance: float | None = None  # where there is a difference
        if not before:
            self.distance = self._after.norm()
        elif self._one is not None and self._one.shape == after.shape:
            same = before[0].scale == after.scale and all(
                map(torch.equal, (before[0].A, before[0].B), (after.A, after.B))
            )
            self.distance = 0.0 if same else (self._after - self._one).norm()

    def row(
        self, sources: tuple[str, ...], fit: float | None, distance: float | None
    ) -> ModuleReport:
        """What is reported of it."""
        sides = [_alive(u) for u in self._before]
        U, S, V = _alive(self._after)
        out = into = None
        outs, ins = zip(*(u.shape for u in self._before), strict=True) if sides else ((0,), (0,))
        if self._one is not None:
            X, _, Y = sides[0]
            out = _cosines(X, U) if len(X) == len(U) else None
            into = _cosines(Y, V) if len(Y) == len(V) else None
        before = math.hypot(*(u.norm() for u in self._before))
        after = self._after.norm()
        rank = sum(len(s) for _, s, _ in sides)
        return ModuleReport(
            self._path,
            sources,
            ((sum(outs), max(ins)), self._after.shape),
            (before, after),
            (rank, len(S)),
            None if self.distance is None else _ratio(self.distance, before),
            after / before if before > 0 else None,
            len(S) / rank if rank else None,
            out,
            into,
            fit,
            distance,
        )


def _exact(u: LowRank) -> LowRank:
    """The update in float64, on the CPU, where small and half types lose nothing."""
    return u.to("cpu", torch.float64)


def _ratio(part: float, whole: float) -> float | None:
    """An error relative to an update: 0 for nothing of nothing, None for something of nothing."""
    if whole > 0:
        return part / whole
    return 0.0 if part == 0 else None


def _alive(u: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), S (k,), V (in, k), without directions that are rounding alone."""
    U, S, Vh = u.svd()
    alive = RANK_TOLERANCE * S[:1] < S
    return U[:, alive], S[alive], Vh[alive].T


def _cosines(X: Tensor, Y: Tensor) -> tuple[float, ...]:
    """Of the principal angles between the leading columns, descending."""
    if 0 in X.shape or 0 in Y.shape:
        return ()
    found: list[float] = torch.linalg.svdvals(X[:, :LEADING].T @ Y[:, :LEADING]).tolist()
    return tuple(min(1.0, c) for c in found)


def _means(rows: Iterable[tuple[float, ...] | None]) -> tuple[float, ...] | None:
    """The mean of rows of cosines, place by place; None where there are none."""
    known = [row for row in rows if row is not None]
    if not known:
        return None
    places = ([row[k] for row in known if k < len(row)] for k in range(max(map(len, known))))
    return tuple(math.fsum(place) / len(place) for place in places)


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
