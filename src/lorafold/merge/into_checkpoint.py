"""Merging into a checkpoint on the disk, without loading the model.

Every weight is W + c · ΔW, as `Adapter.apply_to` gives it, to the bit; what the adapter holds
whole (a head, biases, rows of trained tokens) takes the base's place, or for c ≠ 1 goes the same
share of the way, W + c (W' − W). All of it is checked on the headers, before anything is written;
then each tensor is read, changed and written on its own.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter, Layout
from ..errors import FileError, MismatchError, RefusedError
from ..files import load
from ..files.atomic import new_directory
from ..files.base import Base, read_base
from ..files.replacing import check_apart
from ..files.safetensors import Entry
from ..lowrank import LowRank
from ..parts import extra_kind, extra_places
from ..placing import apply_extras, check_replicated, dense_for, orientations
from .checkpoint import (
    CONFIG_NAME,
    FLOATS,
    MODEL,
    narrowed,
    out_of_range,
    stored_dtype,
    write_checkpoint,
)

Progress = Callable[[int, int, str], None]

_CHUNK = 1 << 21  # numbers
_COUNTS = (torch.int64, torch.bool)  # what buffers beside weights hold, and quantised ones don't
_HEADS = ("lm_head.weight", "embed_out.weight")


@dataclass(frozen=True)
class Merged:
    """What `merge_into_weights` wrote.

    Args:
        path: the folder.
        files: names of the safetensors files.
        tensors: how many tensors are in them.
        nbytes: bytes of these.
        changed: keys of those that the adapter changed.
        unplaced: {module path or key of the adapter: why it has no place in the base}.
        shared: changed keys that an output layer has in common, which is in no file
            (`tie_word_embeddings`) and so changes too.
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
    shared: tuple[str, ...]
    left_out: tuple[str, ...]
    rounding: float


def merge_into_weights(
    base: str | os.PathLike[str],
    adapter: Adapter | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    c: float = 1.0,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Merged:
    """Write a base model's checkpoint with an adapter merged into its weights.

    Files, keys, metadata and dtypes stay those of the base, and what else is in its folder is
    copied. One tensor at a time is in memory, beside the adapter. The folder appears whole or not
    at all. Parts of the adapter that have no place in the base are listed in a warning.

    Args:
        base: the folder of the base: safetensors, one file or shards with an index.
        adapter: an `Adapter`, or what `lf.load` takes.
        out: the folder to write; not in the base's, nor around it.
        c: the dial: W + c · ΔW; with 0 every byte is the base's.
        dtype: of all floating point weights; each keeps its own when None.
        overwrite: replace the model at `out`; files that no model has stay in its folder.
        progress: called with (bytes done, bytes in all, file).

    Returns:
        What was written, what had no place, and what rounding cost.

    Raises:
        FileError: no safetensors there, a damaged or missing file, `out` is there already.
        MismatchError: nothing of the adapter matches, or a shape does not fit.
        RefusedError: the adapter is no plain update (DoRA, …), or a weight is quantised.

    Example:
        >>> import tempfile, lorafold as lf
        >>> from lorafold.demo.model import data_dir
        >>> out = tempfile.mkdtemp() + "/merged"
        >>> merged = lf.merge_into_weights(data_dir() / "base", data_dir() / "adapters/roman", out)
        >>> merged.files, merged.tensors, len(merged.changed)
        (('model.safetensors',), 39, 28)
    """
    merged = write_merged(base, adapter, out, c, dtype, overwrite, progress)
    if merged.unplaced:
        names = ", ".join(repr(n) for n in list(merged.unplaced)[:5])
        warnings.warn(
            f"{len(merged.unplaced)} parts of the adapter have no place in {base}: {names}",
            stacklevel=2,
        )
    for key in merged.shared:
        warnings.warn(f"{key!r} is the output layer too, which so changes as well", stacklevel=2)
    return merged


def write_merged(
    base: str | os.PathLike[str],
    adapter: Adapter | str | os.PathLike[str],
    out: str | os.PathLike[str],
    c: float,
    dtype: torch.dtype | None,
    overwrite: bool,
    progress: Progress | None,
) -> Merged:
    """See `merge_into_weights`; without the warnings."""
    if isinstance(c, bool) or not isinstance(c, Real) or not math.isfinite(c):
        raise MismatchError(f"c must be a finite number, found {c!r}")
    if dtype is not None and dtype not in FLOATS:
        known = ", ".join(map(str, FLOATS))
        raise MismatchError(f"weights can be written as {known}, not as {dtype}")
    if Path(base).is_file():
        raise FileError(f"{base} is a file: give the folder of the base model")
    check_apart(out, [base, None if isinstance(adapter, Adapter) else adapter])
    if not isinstance(adapter, Adapter):
        adapter = load(adapter)
    if adapter.refusal is not None:
        raise RefusedError(adapter.refusal)
    seen = read_base(os.fspath(base), _names(adapter))
    config = _config(Path(base))
    if dtype is not None and config.get("quantization_config"):
        raise RefusedError(f"{base} is quantised: its tensors keep their dtypes")
    changes, unplaced = _planned(seen, adapter)
    for change in changes.values():
        _check_fit(change, adapter, c, seen.entries[change.key])
    if c == 0:
        changes = {}  # nothing is added, and W + 0 would turn −0 into 0
    loss = _Loss()
    tell = {k: partial(_changed, v, adapter, float(c), dtype, loss) for k, v in changes.items()}
    with new_directory(out, MODEL, overwrite=overwrite) as staging:
        left_out = write_checkpoint(seen, staging, tell, dtype, _advance(seen, progress))
        nbytes = sum((staging / file.name).stat().st_size for file in seen.files)
    return Merged(
        path=Path(out),
        files=tuple(file.name for file in seen.files),
        tensors=len(seen.entries),
        nbytes=nbytes,
        changed=tuple(key for key in seen.entries if key in changes),
        unplaced=unplaced,
        shared=_shared(seen, changes, adapter, config),
        left_out=tuple(left_out),
        rounding=loss.relative,
    )


def _config(folder: Path) -> dict[str, Any]:
    """The model's configuration; {} where there is none."""
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _advance(base: Base, progress: Progress | None) -> Callable[[int, str], None]:
    total = sum(entry.stop - entry.start for entry in base.entries.values())
    done = 0

    def advance(count: int, stage: str) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total, stage)

    return advance


# What goes where, by the headers


@dataclass
class _Change:
    """What the adapter does to one tensor of the base.

    Args:
        key: of the tensor in the files. name: in the adapter's words.
        extras: {key in the adapter: tensor}, in the order in which they apply.
        updates: with how the weight is stored.
    """

    key: str
    name: str
    extras: dict[str, Tensor] = field(default_factory=dict)
    updates: list[tuple[LowRank, Layout, bool]] = field(default_factory=list)


def _weight_name(path: str, layout: Layout) -> str:
    if layout.kind == "expert":
        return path.rpartition("[")[0] if path.endswith("]") else path
    return f"{path}.{layout.parameter}" if path else layout.parameter


def _names(adapter: Adapter) -> list[str]:
    """The modules, or experts' parameters, by which the base's prefix is found."""
    names = [
        _weight_name(path, adapter.layout(path)).removesuffix(".weight") for path in adapter.modules
    ]
    places = (extra_places(key, adapter.config) for key in adapter.extras)
    return names or [found[-1].rpartition(".")[0] for found in places if found]


def _planned(base: Base, adapter: Adapter) -> tuple[dict[str, _Change], dict[str, str]]:
    """{key: what happens to it}, and {part of the adapter: why it has no place}."""
    names = dict.fromkeys(base.unnamed(key) for key in base.entries)
    check_replicated(names, adapter.config, adapter.modules)
    changes: dict[str, _Change] = {}
    unplaced: dict[str, str] = {}
    for key, place in _extras_places(base, adapter).items():
        if isinstance(place, _Change):
            changes.setdefault(place.key, place).extras[key] = adapter.extras[key]
        else:
            unplaced[key] = place
    places = {path: _module_place(base, path, adapter.layout(path)) for path in adapter.modules}
    there = {path: p for path, p in places.items() if isinstance(p, _Change)}
    shapes = {path: base.entries[p.key].shape for path, p in there.items()}
    transposed = bool(adapter.config.get("fan_in_fan_out"))
    flips = orientations(adapter.modules, adapter.layouts, shapes, transposed)
    for path, change in there.items():
        update = (adapter.modules[path], adapter.layout(path), flips[path])
        changes.setdefault(change.key, change).updates.append(update)
    unplaced = {path: p for path, p in places.items() if isinstance(p, str)} | unplaced
    if not (there if adapter.modules else changes):
        parts = "modules" if adapter.modules else "tensors"
        first, why = next(iter(unplaced.items()), ("none of them", "of training alone"))
        raise MismatchError(
            f"nothing of the adapter's {len(adapter.modules or adapter.extras)} {parts} is in "
            f"{base.path}: e.g. {first!r} ({why}); found e.g. {next(iter(base.entries))!r}"
        )
    return changes, unplaced


def _module_place(base: Base, path: str, layout: Layout) -> _Change | str:
    """The weight that an update goes to, or why there is none."""
    name = _weight_name(path, layout)
    key = base.named(name)
    entry = base.entries.get(key)
    owner = name.rpartition(".")[0]
    if entry is None:
        inner = f"{base.named(owner)}."
        for other, stored in base.entries.items():
            beside = other.startswith(inner) and "." not in other[len(inner) :]
            if beside and stored.dtype not in (*FLOATS, *_COUNTS):
                raise _quantized(base, other, stored)
        if base.below(owner):
            return "the base stores this module in another form"
        return _why(base, name)
    if entry.dtype not in FLOATS:
        raise _quantized(base, key, entry)
    return _Change(key, name)


def _extras_places(base: Base, adapter: Adapter) -> dict[str, _Change | str]:
    """{key: the tensor that an extra goes to, or why there is none}, in order of application."""
    found: dict[str, _Change | str] = {}
    kinds = {key: extra_kind(key, adapter.config) for key in adapter.extras}
    # As in `apply_extras`: first what replaces, then what adds to it or replaces rows of it.
    for key in sorted(kinds, key=lambda k: kinds[k] in ("lora bias", "trained tokens")):
        names = extra_places(key, adapter.config)
        if not names or "original_module" in key.split("."):
            continue  # of training alone, or the untrained twin of a saved module
        name = next((n for n in names if base.named(n) in base.entries), None)
        if name is None:
            found[key] = _why(base, names[-1])
            continue
        entry = base.entries[base.named(name)]
        if adapter.extras[key].is_floating_point() and entry.dtype not in FLOATS:
            raise _quantized(base, base.named(name), entry)
        found[key] = _Change(base.named(name), name)
    return found


def _why(base: Base, name: str) -> str:
    embedding = base.embedding()
    if name.endswith(_HEADS) and embedding is not None:
        return f"not in the files: it shares the weight of {embedding!r}"
    return "not in the base"


def _quantized(base: Base, key: str, entry: Entry) -> RefusedError:
    dtype = str(entry.dtype).removeprefix("torch.")
    return RefusedError(
        f"{base.path} is quantised: {key!r} is {dtype}, and merging would quantise the sum again. "
        "Merge into the float model, or keep the adapter attached"
    )


def _shared(
    base: Base, changes: Mapping[str, _Change], adapter: Adapter, config: Mapping[str, Any]
) -> tuple[str, ...]:
    """The changed embedding, if an output layer shares it that is in no file."""
    key = base.embedding()
    if key is None or key not in changes or any(other.endswith(_HEADS) for other in base.entries):
        return ()
    kinds = {extra_kind(extra, adapter.config) for extra in changes[key].extras}
    # Trained tokens are meant to change both.
    alone = kinds == {"trained tokens"} and not changes[key].updates
    return () if alone or not config.get("tie_word_embeddings", True) else (key,)


# One tensor


@dataclass
class _Loss:
    """Squared norms, of what rounding adds and of the updates."""

    error: float = 0.0
    norm: float = 0.0

    @property
    def relative(self) -> float:
        return math.sqrt(self.error / self.norm) if self.norm else 0.0


def _check_fit(change: _Change, adapter: Adapter, c: float, entry: Entry) -> None:
    """Do everything on tensors without numbers, which fails as it would with them."""
    W = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
    W = _with_extras(change, adapter, c, W)
    for u, layout, flip in change.updates:
        dense_for(W, u.to("meta"), layout, flip, change.key)


def _changed(
    change: _Change, adapter: Adapter, c: float, dtype: torch.dtype | None, loss: _Loss, W: Tensor
) -> Tensor:
    """The tensor with everything applied; W may be written to."""
    target = stored_dtype(W.dtype, dtype)
    # In the wider of the two, so that it is rounded once.
    W = _with_extras(change, adapter, c, W.to(torch.promote_types(W.dtype, target)))
    if not all(bool(W.isfinite().all()) for v in change.extras.values() if v.isfinite().all()):
        raise MismatchError(out_of_range(change.key, W.dtype))
    for u, layout, flip in change.updates:
        part, delta = dense_for(W, c * u, layout, flip, change.key)
        loss.norm += (c * u).norm() ** 2
        _add(part, delta, target, loss, change.key)
    return narrowed(W, target, change.key)


def _with_extras(change: _Change, adapter: Adapter, c: float, W: Tensor) -> Tensor:
    state = {change.name: W}
    for key, value in change.extras.items():
        apply_extras(state, {key: value}, adapter.config)
    new = state[change.name]
    if c == 1 or new is W or not W.is_floating_point():  # a counter, which has no share
        return new
    wide = torch.promote_types(W.dtype, torch.float32)
    return (W.to(wide) + c * (new.to(wide) - W.to(wide))).to(W.dtype)


def _add(part: Tensor, delta: Tensor, target: torch.dtype, loss: _Loss, key: str) -> None:
    """part += delta, a few rows at a time: no copy of the whole is made."""
    rows = max(1, _CHUNK // max(1, part[0].numel()))
    for at in range(0, len(part), rows):
        W, change = part[at : at + rows], delta[at : at + rows]
        total = W.to(change.dtype, copy=True).add_(change)
        W.copy_(total)
        if target != total.dtype:
            error = float(torch.linalg.vector_norm(total.sub_(W.to(target))))
            if math.isinf(error):
                raise MismatchError(out_of_range(key, target))
            loss.error += error**2
