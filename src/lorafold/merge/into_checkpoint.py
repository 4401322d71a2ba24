"""Merging into a checkpoint on the disk, without loading the model.

Every weight is W + c · ΔW, as `Adapter.apply_to` gives it, to the bit; what the adapter holds
whole (a head, biases, rows of trained tokens) takes the base's place, or for c ≠ 1 goes the same
share of the way, W + c (W' − W). All of it is checked on the headers, before anything is written;
then each tensor is read, changed and written on its own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import FileError, MismatchError, RefusedError
from ..files import load
from ..files.atomic import new_directory
from ..files.base import BaseFiles, read_base
from ..files.remote.place import local
from ..files.replacing import check_apart
from ..placing import Placement, Step, changed, check_replicated, placed
from .checkpoint import (
    FLOATS,
    Edits,
    model_kind,
    narrowed,
    out_of_range,
    stored_dtype,
    write_checkpoint,
)

Progress = Callable[[int, int, str], None]

_CHUNK = 1 << 21  # numbers
_COUNTS = (torch.int64, torch.bool)  # what buffers beside weights hold, and quantised ones don't


@dataclass(frozen=True)
class Merged:
    """What `merge_into_weights` wrote.

    Args:
        path: the folder.
        files: names of the safetensors files.
        tensors: how many tensors are in them.
        nbytes: bytes of these.
        changed: keys of those that the adapter changed.
        unplaced: {module path or key of the adapter: why it has no place in the base}; empty
            unless `partial`.
        untied: the output layer, where it shared the embedding's weight and now has its own;
            `tie_word_embeddings` is false in what was written.
        left_out: files of the base that are weights in another form, and were not copied.
        rounding: what storing in the weights' dtype adds, ‖stored − (W + c ΔW)‖ / ‖c ΔW‖ against
            the float32 sum, over the weights that updates changed.
    """

    path: Path
    files: tuple[str, ...]
    tensors: int
    nbytes: int
    changed: tuple[str, ...]
    unplaced: Mapping[str, str]
    untied: str | None
    left_out: tuple[str, ...]
    rounding: float


def merge_into_weights(
    base: str | os.PathLike[str],
    adapter: Adapter | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    c: float = 1.0,
    dtype: torch.dtype | None = None,
    partial: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Merged:
    """Write a base model's checkpoint with an adapter merged into its weights.

    Files, keys, metadata and dtypes stay those of the base, and what else is in its folder is
    copied. Names and layouts on the disk are mapped to those of the modules, part by part. One
    tensor at a time is in memory, beside the adapter. The folder appears whole or not at all.

    Not for: a running model, where `live.merge` is; a state dict, where `adapter.apply_to` is.

    Args:
        base: the folder of the base: safetensors, one file or shards with an index.
        adapter: an `Adapter`, or what `lf.load` takes.
        out: the folder to write; not in the base's, nor around it.
        c: the dial: W + c · ΔW; with 0 every byte is the base's.
        dtype: of all floating point weights; each keeps its own when None.
        partial: merge what has a place, though parts of the adapter have none; they are listed
            in the result and in the written config.json. Without it they are an error.
        overwrite: replace the model at `out`; files that no model has stay in its folder.
        progress: called with (bytes done, bytes in all, file).

    Returns:
        What was written, what had no place, and what rounding cost.

    Raises:
        FileError: no safetensors there, a damaged or missing file, `out` is there already.
        MismatchError: parts of the adapter have no place, or a shape does not fit.
        RefusedError: the adapter is no plain update (DoRA, …), or a weight is quantised.

    Examples:
        >>> import tempfile, lorafold as lf
        >>> from lorafold.demo.model import data_dir
        >>> out = tempfile.mkdtemp() + "/merged"
        >>> merged = lf.merge_into_weights(data_dir() / "base", data_dir() / "adapters/roman", out)
        >>> merged.files, merged.tensors, len(merged.changed)
        (('model.safetensors',), 39, 28)
    """
    merge = Merge.of(base, adapter, out, c=c, dtype=dtype)
    unplaced = merge.plan.unplaced
    if unplaced and not partial:
        first, why = next(iter(unplaced.items()))
        raise MismatchError(
            f"{len(unplaced)} parts of the adapter have no place in {base}: e.g. {first!r} ({why});"
            " partial=True merges the rest"
        )
    return merge.write(overwrite=overwrite, progress=progress)


@dataclass(frozen=True)
class Merge:
    """A merge that has been checked: every part's place and fit, by the headers."""

    base: BaseFiles
    adapter: Adapter
    plan: Placement
    out: Path
    c: float
    dtype: torch.dtype | None

    @classmethod
    def of(
        cls,
        base: str | os.PathLike[str],
        adapter: Adapter | str | os.PathLike[str],
        out: str | os.PathLike[str],
        *,
        c: float,
        dtype: torch.dtype | None,
    ) -> Merge:
        """See `merge_into_weights`; parts without a place are no error here."""
        if isinstance(c, bool) or not isinstance(c, Real) or not math.isfinite(c):
            raise MismatchError(f"c must be a finite number, found {c!r}")
        if dtype is not None and dtype not in FLOATS:
            known = ", ".join(map(str, FLOATS))
            raise MismatchError(f"weights can be written as {known}, not as {dtype}")
        if os.path.isfile(base):
            raise FileError(f"{base} is a file: give the folder of the base model")
        check_apart(out, [base, None if isinstance(adapter, Adapter) else adapter])
        if not isinstance(adapter, Adapter):
            adapter = load(adapter)
        if adapter.refusal is not None:
            raise RefusedError(adapter.refusal)
        seen = read_base(base)
        if dtype is not None and seen.config.get("quantization_config"):
            raise RefusedError(f"{base} is quantised: its tensors keep their dtypes")
        plan = _planned(seen, adapter)
        refusal = seen.untying_refusal(plan.untied(adapter.value_at)) if c != 0 else None
        if refusal is not None:
            raise RefusedError(refusal)
        return cls(seen, adapter, plan, local(out), float(c), dtype)

    def write(self, *, overwrite: bool, progress: Progress | None) -> Merged:
        """Write it, whatever has no place."""
        base, value = self.base, self.adapter.value_at
        changes = {} if self.c == 0 else self.plan.changes(value)  # W + 0 would turn −0 into 0
        untied = None if self.c == 0 else self.plan.untied(value)
        loss = _Loss()
        edits = Edits(
            {key: self._change(key, steps, loss) for key, steps in changes.items()},
            self.dtype,
            {key: source for key in changes if (source := self._source(key)) != key},
            self._fields(untied),
        )
        read = [base.entries[self._source(key)] for key in [*base.entries, *edits.added]]
        total = sum(entry.stop - entry.start for entry in read)
        advance = _advance(total, progress)
        with new_directory(self.out, model_kind(base.files), overwrite=overwrite) as staging:
            left_out = write_checkpoint(base, staging, edits, advance)
            nbytes = sum((staging / file.name).stat().st_size for file in base.files)
        return Merged(
            path=self.out,
            files=tuple(file.name for file in base.files),
            tensors=len(base.entries) + len(edits.added),
            nbytes=nbytes,
            changed=tuple(key for key in [*base.entries, *edits.added] if key in changes),
            unplaced=self.plan.unplaced,
            untied=untied,
            left_out=tuple(left_out),
            rounding=loss.relative,
        )

    def _source(self, key: str) -> str:
        return self.plan.base.source(key)

    def _change(self, key: str, steps: list[Step], loss: _Loss) -> Callable[[Tensor], Tensor]:
        return partial(_changed, key, steps, self, loss)

    def _fields(self, untied: str | None) -> dict[str, Any]:
        """What the written configuration says."""
        fields: dict[str, Any] = {}
        if untied is not None:
            fields["tie_word_embeddings"] = False
        if self.plan.unplaced:
            fields["lorafold"] = {"partial_merge": True, "left_out": list(self.plan.unplaced)}
        return fields


def _advance(total: int, progress: Progress | None) -> Callable[[int, str], None]:
    done = 0

    def advance(count: int, stage: str) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total, stage)

    return advance


def _planned(base: BaseFiles, adapter: Adapter) -> Placement:
    """Every part's place.

    Raises:
        MismatchError: none has one, or one does not fit.
        RefusedError: a weight is quantised.
    """
    parts = adapter.parts
    named = base.named(parts.names())
    check_replicated(list(named.names()), adapter.config, adapter.modules)
    plan = placed(parts, named)
    for path in adapter.modules if plan.unplaced else ():
        _check_float(base, named.beside(adapter.layout(path).weight_name(path)), _COUNTS)
    for spot in plan.spots:
        if spot.what == "update" or adapter.extras[spot.part].is_floating_point():
            _check_float(base, (named.source(p.key) for p in spot.pieces))
    for misfit in plan.wrong.values():
        raise MismatchError(misfit.says)
    if not plan.touches(adapter.modules):
        kinds = "modules" if adapter.modules else "tensors"
        first, why = next(iter(plan.unplaced.items()), ("none of them", "of training alone"))
        raise MismatchError(
            f"nothing of the adapter's {len(adapter.modules or adapter.extras)} {kinds} is in "
            f"{base.path}: e.g. {first!r} ({why}); found e.g. {next(iter(base.entries))!r}"
        )
    return plan


def _check_float(base: BaseFiles, keys: Iterable[str], others: Iterable[torch.dtype] = ()) -> None:
    for key in keys:
        dtype = base.entries[key].dtype
        if dtype not in (*FLOATS, *others):
            name = str(dtype).removeprefix("torch.")
            raise RefusedError(
                f"{base.path} is quantised: {key!r} is {name}, and merging would quantise the sum "
                "again. Merge into the float model, or keep the adapter attached"
            )


# One tensor


@dataclass
class _Loss:
    """Squared norms, of what rounding adds and of the updates."""

    error: float = 0.0
    norm: float = 0.0

    @property
    def relative(self) -> float:
        return math.sqrt(self.error / self.norm) if self.norm else 0.0


def _changed(key: str, steps: list[Step], merge: Merge, loss: _Loss, W: Tensor) -> Tensor:
    """The tensor with everything applied; W may be written to."""
    target = stored_dtype(W.dtype, merge.dtype)
    value, c = merge.adapter.value_at, merge.c
    # In the wider of the two, so that it is rounded once.
    W = W.to(torch.promote_types(W.dtype, target))
    whole = [(spot, piece) for spot, piece in steps if spot.what != "update"]
    W = changed(W, whole, value, c)
    given = [merge.adapter.extras[spot.part] for spot, _ in whole]
    if given and all(bool(v.isfinite().all()) for v in given) and not bool(W.isfinite().all()):
        raise MismatchError(out_of_range(key, W.dtype))

    def add(part: Tensor, delta: Tensor) -> None:
        _add(part, delta, target, loss, key)

    W = changed(W, [step for step in steps if step[0].what == "update"], value, c, add)
    return narrowed(W, target, key)


def _add(part: Tensor, delta: Tensor, target: torch.dtype, loss: _Loss, key: str) -> None:
    """part += delta, a few rows at a time: no copy of the whole is made."""
    rows = max(1, _CHUNK // max(1, part[0].numel()))
    for at in range(0, len(part), rows):
        W, change = part[at : at + rows], delta[at : at + rows]
        loss.norm += float(torch.linalg.vector_norm(change)) ** 2
        total = W.to(change.dtype, copy=True).add_(change)
        W.copy_(total)
        if target != total.dtype:
            error = float(torch.linalg.vector_norm(total.sub_(W.to(target))))
            if math.isinf(error):
                raise MismatchError(out_of_range(key, target))
            loss.error += error**2
