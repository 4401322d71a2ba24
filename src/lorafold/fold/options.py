"""The options of folding, checked in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

from ..collection.limits import block_bytes, torch_device
from ..errors import MismatchError

if TYPE_CHECKING:
    from ..adapter import Adapter


FORMS = ("auto", "svd", "input", "output", "shared", "flat", "exact")


@dataclass(frozen=True)
class Options:
    """How a library is folded; see `fold`."""

    form: str = "auto"
    tolerance: float | None = None
    rank: int | None = None
    energy: float | None = None
    bits: float | None = None
    retention: float | None = None  # recorded only: each adapter's own tolerance came from it

    @property
    def coded(self) -> bool:
        """Whether an average number of bits decides (not a tolerance, not floats)."""
        return self.bits is not None and self.bits <= 8


DEFAULT_TOLERANCE = 0.1
Score = Callable[[str, "Adapter | None"], float]


@dataclass(frozen=True)
class FoldOptions:
    """Checked options of a fold: the form and size, and how it runs."""

    options: Options
    memory: str | int = "1GiB"
    device: Any = None
    progress: Progress | None = None
    retention: float | None = None
    score: Score | None = None

    @classmethod
    def of(
        cls,
        *,
        tolerance: float | None = None,
        form: str = "auto",
        rank: int | None = None,
        energy: float | None = None,
        bits: float | None = None,
        retention: float | None = None,
        score: Score | None = None,
        memory: str | int = "1GiB",
        device: Any = None,
        progress: Progress | None = None,
    ) -> FoldOptions:
        """Check the options against one another.

        Raises:
            MismatchError: naming the option and what it may be.
        """
        if form not in FORMS:
            raise MismatchError(f"form must be one of {', '.join(FORMS)}; found {form!r}")
        sizes = {"tolerance": tolerance, "rank": rank, "energy": energy, "retention": retention}
        named = [name for name, value in sizes.items() if value is not None]
        if len(named) > 1 and set(named) != {"tolerance", "retention"}:
            raise MismatchError(f"{' and '.join(named)} exclude each other: give one")
        if bits is not None and (tolerance is not None or retention is not None):
            raise MismatchError(
                "bits= fixes the size, tolerance= and retention= the error: give one of them"
            )
        if (retention is None) != (score is None):
            raise MismatchError(
                "retention= needs score=, a function of (name, Adapter or None), and the other "
                "way round"
            )
        _check_ranges(tolerance, rank, energy, bits, retention)
        if form == "exact":
            if rank is not None or energy is not None or bits is not None:
                raise MismatchError(
                    "form 'exact' stores the files' tensors: it takes no rank, energy or bits"
                )
            tolerance = 0.0 if retention is None else tolerance
        elif (tolerance is None and not named and bits is None) or (
            retention is not None and tolerance is None
        ):
            tolerance = DEFAULT_TOLERANCE
        block_bytes(memory)
        options = Options(form, tolerance, rank, energy, bits, retention)
        return cls(options, memory, torch_device(device), progress, retention, score)


def _check_ranges(
    tolerance: float | None,
    rank: int | None,
    energy: float | None,
    bits: float | None,
    retention: float | None,
) -> None:
    if tolerance is not None and not 0 <= tolerance < 1:
        raise MismatchError(f"tolerance must lie in [0, 1), found {tolerance}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, Integral) or rank < 1):
        raise MismatchError(f"rank must be a whole number of at least 1, found {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise MismatchError(f"energy must lie in (0, 1], found {energy}")
    if bits is not None and not (0 < bits <= 8 or bits in (16, 32)):
        raise MismatchError(f"bits must be 16, 32 or an average in (0, 8], found {bits}")
    if retention is not None and not 0 < retention <= 1:
        raise MismatchError(f"retention must lie in (0, 1], found {retention}")


Progress = Callable[[int, int, str], None]
