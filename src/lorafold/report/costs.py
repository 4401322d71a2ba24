"""Bytes against error: a sample of the collection folded in memory, in each form.

`auto` is left out: it takes the best of the others, module by module, at twice their time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ..adapter import Adapter, Layout
from ..collection.sources import Handle
from ..errors import MismatchError, ToleranceError
from ..fold import fold
from ..fold.options import Form
from .section import evenly

FORMS: tuple[Form, ...] = ("svd", "input", "output", "shared", "flat")
TOLERANCES = (0.3, 0.2, 0.1, 0.05)
_ADAPTERS, _MODULES = 12, 8  # of the sample, at most
_NUMBERS = 3_000_000  # in its factors, at most

Advance = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Cost:
    """What one form takes at one tolerance: bytes of the library, and the largest error in it."""

    form: str
    tolerance: float
    nbytes: int
    error: float


@dataclass(frozen=True)
class Costs:
    """Bytes against error on a sample.

    Args:
        costs: by form and tolerance. failed: {form: why it can't hold this sample}.
        float16: bytes of the sample's factors in float16.
        names, modules: what the sample is of.
    """

    costs: Sequence[Cost]
    failed: Mapping[str, str]
    float16: int
    names: Sequence[str]
    modules: Sequence[str]


def costs(handles: Mapping[str, Handle], progress: Advance | None = None) -> Costs:
    """Fold a sample of opened adapters in each form at each tolerance.

    Args:
        handles: name → handle, none of them refused for ΔW algebra.
        progress: called with (done, total, form).
    """
    sampled, paths = _sample(handles)
    adapters = {
        name: Adapter({p: h.read(p) for p in paths if p in h.shapes}, layouts=_layouts(h, paths))
        for name, h in sampled.items()
        if any(p in h.shapes for p in paths)
    }
    found: list[Cost] = []
    failed: dict[str, str] = {}
    for k, form in enumerate(FORMS):
        for n, tolerance in enumerate(TOLERANCES):
            if progress is not None:
                progress(k * len(TOLERANCES) + n, len(FORMS) * len(TOLERANCES), f"folding: {form}")
            try:
                lib = fold(adapters, form=form, tolerance=tolerance)
            except (MismatchError, ToleranceError, LinAlgError) as e:
                failed[form] = str(e).partition("\n")[0]
                break
            errors = [lib.error(name) for name in lib.names]
            found.append(Cost(form, tolerance, lib.nbytes, max(errors)))
    numbers = sum(a.num_parameters for a in adapters.values())
    return Costs(found, failed, 2 * numbers, list(adapters), paths)


def _sample(handles: Mapping[str, Handle]) -> tuple[dict[str, Handle], list[str]]:
    """Evenly spaced adapters and modules, fewer of both where they are large."""
    names = list(handles)
    chosen = {names[i]: handles[names[i]] for i in evenly(len(names), _ADAPTERS)}
    shapes = {p: shape for h in chosen.values() for p, shape in h.shapes.items()}
    paths = sorted(shapes)
    most = _MODULES
    while True:
        kept = [paths[j] for j in evenly(len(paths), most)]
        total = sum(
            r * (out + inner)
            for h in chosen.values()
            for p, (out, inner, r) in h.shapes.items()
            if p in kept
        )
        if total <= _NUMBERS or most == 1:
            return chosen, kept
        most = max(1, most // 2)


def _layouts(handle: Handle, paths: Sequence[str]) -> dict[str, Layout]:
    return {p: layout for p, layout in handle.layouts.items() if p in paths}
