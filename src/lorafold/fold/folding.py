"""The verb itself: sources and options in, a library out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MismatchError, ToleranceError
from .build import Builder, Progress, check_contract
from .collection import (
    Collection,
    Handle,
    block_bytes,
    named_handles,
    torch_device,
)
from .entries import new_manifest
from .library import Library
from .plan import FORMS, Options
from .store import Store, Transaction

if TYPE_CHECKING:
    from ..adapter import Adapter

DEFAULT_TOLERANCE = 0.1
Score = Callable[[str, "Adapter | None"], float]


def fold(
    sources: Any,
    path: str | os.PathLike[str] | None = None,
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
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Library:
    """Fold adapters into one library.

    Args:
        sources: adapters as paths, globs, folders of adapters, `Adapter` objects, or {name: one of
            these}. A path's name is its last component; an unnamed `Adapter` becomes task_0, ….
        path: the folder to write; None keeps the library in memory.
        tolerance: bound on ‖ΔŴ − ΔW‖ / ‖ΔW‖ of every adapter, measured on what is written; 0
            stores every tensor bit for bit. 0.1 when none of tolerance, rank, energy, bits and
            retention is given.
        form: "auto", "svd", "input", "output", "shared", "flat" or "exact".
        rank: instead of a tolerance: directions kept per module (of each adapter for "svd", of a
            shared side, of a flattened side); more than there are keeps all of them.
        energy: instead of a tolerance: share of ‖ΔW‖² kept per module and side, in (0, 1].
        bits: with a rank, an energy or alone: 32, 16, or an average in (0, 8] of packed bits per
            number stored, shared bases included. Floats of 32 bits when only rank or energy is
            given.
        retention: share of each adapter's lift to keep, by `score`; finds each one's loosest
            tolerance by bisection.
        score: fn(name, adapter, or None for the base) → higher is better; run at most 8 times an
            adapter.
        memory: limit for what is held of the collection at once.
        device: where the algebra runs.
        overwrite: replace what is at `path`.
        progress: called with (done, total, stage).

    Returns:
        The `Library`, opened.

    Raises:
        MismatchError: options that exclude each other or are out of range; adapters that disagree.
        FileError: a source that can't be read, or something at `path` already.
        ToleranceError: a bound that can't be met.

    Example:
        >>> import torch, lorafold as lf
        >>> u = lf.LowRank(torch.randn(4, 64), torch.randn(32, 4))
        >>> lib = lf.fold([lf.Adapter({"q_proj": u})], tolerance=0.1)
        >>> lib.names
        ['task_0']
    """
    settings = FoldOptions.of(
        tolerance=tolerance, form=form, rank=rank, energy=energy, bits=bits, retention=retention,
        score=score, memory=memory, device=device, progress=progress,
    )  # fmt: skip
    handles = named_handles(sources)
    if settings.retention is not None:
        from .retention import fold_by_retention

        return fold_by_retention(handles, settings, path, overwrite)
    with Store.create(path, overwrite=overwrite) as t:
        store = t.commit(folded(handles, settings, t))
    return Library(store)


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


def folded(
    handles: Mapping[str, Handle],
    settings: FoldOptions,
    transaction: Transaction,
    *,
    tolerances: Mapping[str, float] | None = None,
    old_errors: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Fold opened adapters into a transaction's new shard; the manifest to commit.

    Args:
        tolerances: name → its own bound, the common one where None.
        old_errors: errors that the sources already have; they count towards the bounds.

    Raises:
        ToleranceError: a source's own error leaves nothing of its bound.
    """
    options = settings.options
    own = tolerances or {}
    collection = Collection(
        handles,
        exact={name for name in handles if own.get(name, options.tolerance) == 0},
        block_bytes=block_bytes(settings.memory),
        device=settings.device,
    )
    names = collection.names[: collection.folded]
    common = options.tolerance or 0.0
    stated = np.array([own.get(name, common) for name in names])
    bounds = stated
    if old_errors and options.tolerance is not None:
        bounds = np.array(
            [_what_is_left(n, b, old_errors[n]) for n, b in zip(names, stated, strict=True)]
        )
        _refuse_unmet(collection.names[collection.folded :], own, common, old_errors)
    builder = Builder(collection, options, bounds, settings.progress)
    written = builder.write(transaction)
    if options.tolerance is not None:
        error = np.sqrt(
            np.divide(
                written.squared_error,
                written.squared_norm,
                out=np.zeros_like(bounds),
                where=written.squared_norm > 0,
            )
        )
        check_contract(names, error, bounds)
    return new_manifest(collection, builder, written, list(handles), stated, old_errors)


def _what_is_left(name: str, tolerance: float, error: float) -> float:
    """What a second fold may lose of a stored adapter so that the original's bound holds."""
    if error > 0 and error >= tolerance:
        raise ToleranceError(
            f"{name!r} is stored with error {error:.4g}; a bound of {tolerance:g} can't be met "
            "without its source: give sources=, or a larger tolerance"
        )
    # ‖ΔŴ‖ ≤ (1 + error) ‖ΔW‖, and the new error counts in units of ‖ΔŴ‖.
    return (tolerance - error) / (1 + error)


def _refuse_unmet(
    names: list[str], tolerances: Mapping[str, float], common: float, old: Mapping[str, float]
) -> None:
    """Raise for adapters that are to be stored as they are, but whose error is above the bound."""
    for name in names:
        if old[name] > tolerances.get(name, common):
            _what_is_left(name, tolerances.get(name, common), old[name])
