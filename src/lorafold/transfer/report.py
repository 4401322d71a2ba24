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
from ..errors import MismatchError, RefusedError
from ..lowrank import LowRank
from ..thin import threads
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

    Examples:
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
        seen = {p: _seen(u) for p, u in original.items()}
        pairs = [_Pair([seen[s] for s in made_of[p]], _seen(u)) for p, u in result.items()]
        rows = tuple(
            pair.row(p, made_of[p], fits.get(p), distances.get(p))
            for p, pair in zip(result, pairs, strict=True)
        )
    used = {s for of in made_of.values() for s in of}
    if dropped is None and without is None:
        without = {p: "not in the result" for p in original if p not in used}
    whole = math.hypot(*(u.norm for u in seen.values()))
    after = math.hypot(*(m.norms[1] for m in rows))
    ranks = [sum(m.ranks[k] for m in rows) for k in (0, 1)]
    apart = [d for pair in pairs if (d := pair.distance) is not None]
    apart += [u.norm for p, u in seen.items() if p not in used]
    error = None if any(pair.distance is None for pair in pairs) else math.hypot(*apart)
    return TransferReport(
        rows,
        None if error is None else _ratio(error, whole),
        after / whole if whole > 0 else None,
        ranks[1] / ranks[0] if ranks[0] else None,
        _means(m.cosines_out for m in rows),
        _means(m.cosines_in for m in rows),
        dict(dropped or {}),
        dict(without or {}),
        **said,
    )


@dataclass(frozen=True, eq=False)
class _Seen:
    """An update, itself in float64, its norm, and U (out, k), S (k,), V (in, k) that are alive."""

    given: LowRank
    exact: LowRank
    norm: float
    U: Tensor
    S: Tensor
    V: Tensor


def _seen(u: LowRank) -> _Seen:
    exact = u.to("cpu", torch.float64)  # where small and half types lose nothing
    U, S, Vh = exact.svd()
    alive = RANK_TOLERANCE * S[:1] < S
    return _Seen(u, exact, float(S.norm()), U[:, alive], S[alive], Vh[alive].T)


class _Pair:
    """A module of the result and the updates that it was made of."""

    def __init__(self, before: Sequence[_Seen], after: _Seen) -> None:
        self._before, self._after = before, after
        self._one = before[0] if len(before) == 1 else None
        self.distance: float | None = None  # where there is a difference
        if not before:
            self.distance = after.norm
        elif self._one is not None and self._one.exact.shape == after.exact.shape:
            same = _identical(self._one.given, after.given)
            self.distance = 0.0 if same else (after.exact - self._one.exact).norm()

    def row(
        self, path: str, sources: tuple[str, ...], fit: float | None, distance: float | None
    ) -> ModuleReport:
        """What is reported of it."""
        shapes = [u.exact.shape for u in self._before] or [(0, 0)]
        before = math.hypot(*(u.norm for u in self._before))
        rank, after = sum(len(u.S) for u in self._before), self._after
        out = into = None
        if self._one is not None:
            out = _cosines(self._one.U, after.U)
            into = _cosines(self._one.V, after.V)
        return ModuleReport(
            path,
            sources,
            ((sum(out for out, _ in shapes), max(inner for _, inner in shapes)), after.exact.shape),
            (before, after.norm),
            (rank, len(after.S)),
            None if self.distance is None else _ratio(self.distance, before),
            after.norm / before if before > 0 else None,
            len(after.S) / rank if rank else None,
            out,
            into,
            fit,
            distance,
        )


def _identical(u: LowRank, v: LowRank) -> bool:
    alike = u.scale == v.scale and u.A.device == v.A.device and u.A.dtype == v.A.dtype
    return alike and torch.equal(u.A, v.A) and torch.equal(u.B, v.B)


def _ratio(part: float, whole: float) -> float | None:
    """An error relative to an update: 0 for nothing of nothing, None for something of nothing."""
    if whole > 0:
        return part / whole
    return 0.0 if part == 0 else None


def _cosines(X: Tensor, Y: Tensor) -> tuple[float, ...] | None:
    """Of the principal angles between leading columns, descending; None if of two lengths."""
    if len(X) != len(Y):
        return None
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
