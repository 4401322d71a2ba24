"""The options of folding: the keywords of `fold`, checked in one place."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, TypeVar, get_args

from ..collection.limits import memory_bytes, torch_device
from ..errors import MismatchError
from ..scale.engine import Crew

if TYPE_CHECKING:
    from ..adapter import Adapter

Form: TypeAlias = Literal["auto", "svd", "input", "output", "shared", "flat", "exact"]
Kept: TypeAlias = Literal["svd", "exact"]  # off the shared bases
FORMS: tuple[Form, ...] = get_args(Form)
DEFAULT_TOLERANCE = 0.1
RECORDED = ("form", "tolerance", "rank", "energy", "bits", "retention")  # in a library
F = TypeVar("F", bound=Callable[..., Any])
Score = Callable[[str, "Adapter | None"], float]
Progress = Callable[[int, int, str], None]


class Refolding(TypedDict, total=False):
    """The keywords of `Library.refold`, for type checkers; see `Options`."""

    form: Form
    rank: int | None
    energy: float | None
    bits: float | None
    retention: float | None
    score: Score | None
    memory: str | int
    device: Any
    progress: Progress | None
    executor: Executor | str | None
    workers: int | None
    work: str | os.PathLike[str] | None


class Folding(Refolding, total=False):
    """Those of `fold`."""

    tolerance: float | None


@dataclass(frozen=True)
class Options:
    """How a library is folded; see `fold`, whose keywords these are. Made by `Options.of`."""

    form: Form = "auto"
    tolerance: float | None = None
    rank: int | None = None
    energy: float | None = None
    bits: float | None = None
    retention: float | None = None
    score: Score | None = None
    memory: str | int = "1GiB"
    device: Any = None
    progress: Progress | None = None
    executor: Executor | str | None = None
    workers: int | None = None
    work: str | os.PathLike[str] | None = None

    @classmethod
    def of(cls, **given: Any) -> Options:
        """The options, checked against one another and completed.

        Raises:
            MismatchError: naming the option and what it may be.
            TypeError: a keyword that `fold` does not have.
        """
        unknown = sorted(given.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise TypeError(f"fold has no option {unknown[0]!r}")
        o = cls(**given)
        if o.form not in FORMS:
            raise MismatchError(f"form must be one of {', '.join(FORMS)}; found {o.form!r}")
        sizes = ("tolerance", "rank", "energy", "retention")
        named = [name for name in sizes if getattr(o, name) is not None]
        if len(named) > 1 and set(named) != {"tolerance", "retention"}:
            raise MismatchError(f"{' and '.join(named)} exclude each other: give one")
        if o.bits is not None and (o.tolerance is not None or o.retention is not None):
            raise MismatchError(
                "bits= fixes the size, tolerance= and retention= the error: give one of them"
            )
        if (o.retention is None) != (o.score is None):
            raise MismatchError(
                "retention= needs score=, a function of (name, Adapter or None), and the other "
                "way round"
            )
        o.check_ranges()
        memory_bytes(o.memory)
        _ = o.crew
        return replace(o._completed(), device=torch_device(o.device))

    def _completed(self) -> Options:
        """With the tolerance that holds where none is given."""
        sized = self.rank is not None or self.energy is not None or self.bits is not None
        if self.form == "exact":
            if sized or self.retention is not None:
                raise MismatchError(
                    "form 'exact' stores the files' tensors: it takes no rank, energy, bits or "
                    "retention"
                )
            return replace(self, tolerance=0.0)
        if self.tolerance is None and not sized:
            return replace(self, tolerance=DEFAULT_TOLERANCE)
        return self

    def check_ranges(self) -> None:
        """Raise a `MismatchError` for a number that is none, or out of its range."""
        tolerance = self.tolerance
        if tolerance is not None and not (_is_number(tolerance) and 0 <= tolerance < 1):
            raise MismatchError(f"tolerance must lie in [0, 1), found {tolerance!r}")
        for name in ("energy", "retention"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value <= 1):
                raise MismatchError(f"{name} must lie in (0, 1], found {value!r}")
        rank, bits = self.rank, self.bits
        if rank is not None and (
            isinstance(rank, bool) or not isinstance(rank, Integral) or rank < 1
        ):
            raise MismatchError(f"rank must be a whole number of at least 1, found {rank!r}")
        if bits is not None and not (_is_number(bits) and (0 < bits <= 8 or bits in (16, 32))):
            raise MismatchError(f"bits must be 16, 32 or an average in (0, 8], found {bits!r}")

    @property
    def coded(self) -> bool:
        """Whether an average number of bits decides (not a tolerance, not floats)."""
        return self.bits is not None and self.bits <= 8

    def bare(self) -> Options:
        """What decides about bytes: no callables, nobody's workers."""
        return replace(self, score=None, progress=None, executor=None, workers=None, work=None)

    @property
    def crew(self) -> Crew:
        """Who is to do the work."""
        return Crew(self.executor, self.workers, self.work)

    def recorded(self) -> dict[str, Any]:
        """What a library says of them: those that are set."""
        found = {name: getattr(self, name) for name in RECORDED}
        return {name: value for name, value in found.items() if value is not None}


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def with_options(function: F) -> F:
    """Have `**options` of a function shown as the keywords of `Options`."""
    given = inspect.signature(function, eval_str=False)
    own = [p for p in given.parameters.values() if p.kind is not p.VAR_KEYWORD]
    only = inspect.Parameter.KEYWORD_ONLY
    keywords = [
        inspect.Parameter(f.name, only, default=f.default, annotation=f.type)
        for f in fields(Options)
    ]
    head = [p for p in own if p.kind is not only]
    tail = [p for p in own if p.kind is only]
    function.__signature__ = given.replace(  # type: ignore[attr-defined]
        parameters=[*head, *keywords, *tail]
    )
    return function
