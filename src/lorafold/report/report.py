"""`report`: a collection as one page of pictures.

Sources are opened by their headers and measured module by module (`measured`); likeness and what is
shared come from `compare`, bytes from folding a sample (`costs`). What is drawn is bounded,
whatever the collection's size, and the page says what was sampled.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from ..collection.sources import Handle, named_handles
from ..compare import Anatomy, Similarity, anatomy, shared_spectrum, similarity
from ..errors import FileError, MismatchError
from ..files.atomic import replace_file
from ..files.replacing import check_apart, check_named
from .costs import costs
from .measured import Measured, measured
from .of_many import bytes_against_error, shared, similarity_map, starts
from .of_modules import anomalies, energy, norms, spectra
from .order import nearest, sample
from .page import page, plotly_js
from .section import Section, counted, evenly, span

Advance = Callable[[int, int, str], None]

_NONE = "–"
_ROWS = 2000  # of the table of adapters, at most
_LOOKED_AT = 64  # adapters whose anatomy is taken, at most
_ODD = 3.5  # robust deviations from which on a module stands out


@dataclass(frozen=True)
class Report:
    """A report that was written.

    Args:
        path: of the page. nbytes: its size; plotly: bytes of plotly in it.
        names: of the adapters in it. refused: {name: why it was left out}.
        sections: their keys.
        notes: what was sampled or left out, as the page says it.
    """

    path: Path
    nbytes: int
    plotly: int
    names: tuple[str, ...]
    refused: Mapping[str, str]
    sections: tuple[str, ...]
    notes: tuple[str, ...]


def report(
    sources: Any,
    path: str | os.PathLike[str],
    *,
    title: str = "",
    threshold: float = 0.9,
    memory: str | int = "1GiB",
    overwrite: bool = False,
    progress: Advance | None = None,
) -> Report:
    """Write one page, with all it needs in it, about what a collection of adapters holds.

    Args:
        sources: paths, globs, folders, `Adapter`s, a `Library`, or {name: any of these}.
        path: the .html file to write.
        title: of the page; by default it counts the adapters.
        threshold: cosine from which two adapters count as alike, in (0, 1].
        memory: limit for what is held of the adapters at once.
        overwrite: replace the file at `path`.
        progress: called with (done, total, stage).

    Returns:
        A `Report`: what was written and what it holds. Adapters for which ΔW algebra is refused are
        left out, with a warning.

    Raises:
        MismatchError: no sources, adapters that disagree on a shape or on the base, a threshold out
            of range.
        FileError: a source that can't be read, or a file at `path` and `overwrite` is False.
        RefusedError: ΔW algebra would be wrong for every source.
        MissingExtraError: plotly or scipy is not installed.

    Not for: pictures in a paper or notebook (`lf.plot`), numbers to compute with (`lf.similarity`,
    `lf.anatomy`).

    Examples:
        >>> import tempfile, torch
        >>> import lorafold as lf
        >>> a = lf.Adapter({"layers.0.q_proj": lf.LowRank(torch.randn(2, 8), torch.randn(4, 2))})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = lf.report({"sql": a, "law": 2 * a}, f"{folder}/report.html")
        >>> written.names, written.nbytes > written.plotly
        (('sql', 'law'), True)
    """
    check_writable(path, overwrite)
    number = isinstance(threshold, Real) and not isinstance(threshold, bool)
    if not (number and 0 < threshold <= 1):
        raise MismatchError(f"threshold must lie in (0, 1], found {threshold!r}")
    plotly = len(plotly_js().encode())
    handles = named_handles(sources)
    check_apart(path, (getattr(handle, "path", None) for handle in handles.values()))
    survey = _surveyed(handles, threshold, memory, progress or (lambda done, total, stage: None))
    title = title or counted(len(survey.measured.names), "adapter")
    text = page(title, survey.facts(), survey.sections, COLUMNS, survey.rows(), survey.notes())
    data = text.encode("utf-8")
    replace_file(path, data)
    notes = [s.note for s in survey.sections if s.note] + survey.notes()
    return Report(
        Path(path),
        len(data),
        plotly,
        tuple(survey.measured.names),
        survey.measured.refused,
        tuple(s.key for s in survey.sections),
        tuple(notes),
    )


def check_writable(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Check that a page may be written there.

    Raises:
        FileError: it may not.
    """
    check_named(path)
    place = Path(path)
    if os.path.isdir(place):
        raise FileError(f"{place} is a folder; name the file to write, such as {place}/report.html")
    if os.path.lexists(place) and not os.path.isfile(place):
        raise FileError(f"{place} is no plain file, and can't be replaced: write elsewhere")
    if os.path.lexists(place) and not overwrite:
        raise FileError(f"{place} exists already; give overwrite=True to replace it")
    if os.path.isfile(place) and not _is_page(place):
        raise FileError(f"{place} won't be overwritten: it is no page of HTML; name another file")
    if not os.path.isdir(place.absolute().parent):
        raise FileError(f"{place.absolute().parent} is no folder: make it first")


def _is_page(place: Path) -> bool:
    """Whether a file is HTML by its name or by what is in it, or is empty."""
    if place.suffix.lower() in (".html", ".htm"):
        return True
    with open(place, "rb") as f:
        start = f.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return not start or start.startswith((b"<!doctype html", b"<html"))


COLUMNS = (
    "name",
    ">norm",
    ">rank",
    ">rank, 90 %",
    ">modules",
    ">parameters",
    ">bytes",
    "nearest",
    ">cosine",
    "cluster",
    ">distance z",
    "start of A",
)


@dataclass(frozen=True, eq=False)
class _Survey:
    """All that the page is made of."""

    measured: Measured
    handles: Mapping[str, Handle]
    similarity: Similarity | None
    threshold: float
    sections: list[Section]

    def facts(self) -> list[tuple[str, str]]:
        """What stands at the head of the page."""
        m = self.measured
        base = {h.base_model for h in self.handles.values() if h.base_model}
        low, high = (f"{x:.3g}" for x in (m.norm().min(), m.norm().max()))
        return [
            ("adapters", f"{len(m.names):,}"),
            ("base", ", ".join(sorted(base)) or "not said"),
            ("modules", f"{len(m.paths):,}"),
            ("ranks", span(m.ranks)),
            ("‖ΔW‖", low if low == high else f"{low}–{high}"),
            ("parameters", f"{m.parameters.sum():,}"),
            ("files", _size(sum(h.nbytes for h in self.handles.values()))),
        ]

    def notes(self) -> list[str]:
        """What the table leaves out, and who is left out of everything."""
        notes = [f"{name} is left out: {why}" for name, why in self.measured.refused.items()]
        if notes[20:]:
            notes = [*notes[:20], f"{len(notes) - 20:,} more are left out, for such reasons."]
        if len(self.measured.names) > _ROWS:
            notes.append(f"{_ROWS:,} of {len(self.measured.names):,} adapters, evenly spaced.")
        return notes

    def rows(self) -> list[tuple[Any, ...]]:
        """A row of the table each."""
        m, likeness = self.measured, self._likeness()
        norms, ninety, modules = m.norm(), m.rank_for(0.9), (~np.isnan(m.norms)).sum(1)
        starts = m.groups.get("V", np.full(len(m.names), -1))
        rows = []
        for i in evenly(len(m.names), _ROWS):
            nbytes = self.handles[m.names[i]].nbytes
            rows.append(
                (
                    m.names[i],
                    (float(norms[i]), f"{norms[i]:.4g}"),
                    (int(m.ranks[i]), f"{m.ranks[i]}"),
                    (int(ninety[i]), f"{ninety[i]}"),
                    (int(modules[i]), f"{modules[i]:,}"),
                    (int(m.parameters[i]), f"{m.parameters[i]:,}"),
                    (nbytes, _size(nbytes)),
                    *likeness[i],
                    f"group {starts[i] + 1}" if starts[i] >= 0 else _NONE,
                )
            )
        return rows

    def _likeness(self) -> list[tuple[Any, ...]]:
        """Each one's nearest, their cosine, its cluster, and how far it is from the mean."""
        s = self.similarity
        if s is None:
            return [(_NONE, (None, ""), _NONE, (None, ""))] * len(self.measured.names)
        near, cosines = nearest(s.matrix)
        together = [c for c in s.clusters(self.threshold) if len(c) > 1]
        clusters = {name: f"cluster {k + 1}" for k, c in enumerate(together) for name in c}
        z = {o.name: o.z for o in s.outliers(-np.inf)}
        found = []
        for name, other, cosine in zip(s.names, near.tolist(), cosines.tolist(), strict=True):
            far = z.get(name)
            found.append(
                (
                    s.names[other],
                    (cosine, f"{cosine:.3f}"),
                    clusters.get(name, _NONE),
                    (far, "" if far is None else f"{round(far, 1) + 0.0:.1f}"),
                )
            )
        return found


def _surveyed(
    handles: Mapping[str, Handle], threshold: float, memory: str | int, progress: Advance
) -> _Survey:
    m = measured(handles, memory, progress)
    used = {name: handles[name] for name in m.names}
    alike: Similarity | None = None
    sections = []
    if len(used) > 1:
        alike = similarity(used, threshold=threshold, memory=memory, progress=progress)
        sections.append(similarity_map(alike, threshold))
        sections.append(starts(m))
    sections += [spectra(m), energy(m), norms(m)]
    sections.append(anomalies(_anatomies(used, m.unusual(), progress), len(used)))
    sections.append(bytes_against_error(costs(used, progress), len(used)))
    if len(used) > 1:
        sections.append(shared(shared_spectrum(used, memory=memory, progress=progress)))
    return _Survey(m, used, alike, threshold, sections)


def _anatomies(
    handles: Mapping[str, Handle], unusual: np.ndarray, progress: Advance
) -> dict[str, Anatomy]:
    names = list(handles)
    chosen = sample(unusual, _LOOKED_AT).tolist()
    found = {}
    for k, i in enumerate(chosen):
        progress(k, len(chosen), f"anatomy of {names[i]}")
        found[names[i]] = anatomy(handles[names[i]], threshold=_ODD)
    return found


def _size(nbytes: float) -> str:
    """12.3 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1000:
            return f"{nbytes:,.0f} B" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.3g} GiB"
