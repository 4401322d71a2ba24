"""The verb itself: a model and what to attach in, the handle out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..adapter import Adapter
from ..collection.limits import memory_bytes
from ..errors import LorafoldError, MismatchError, RefusedError
from ..files.find import is_library
from ..fold import Library
from ..layers.misread import warn_of_misread
from ..layers.modes import outside_inference_mode
from ..layers.swap import Swapped
from ..prefixes import Scaling, check_scaling
from ..words import hint
from .additions import Attachable, add_all, add_library, named_sources, widest
from .live import Live
from .run.shelf import slots_within
from .run.slots import BY_ITSELF, Slots
from .selection import What
from .state import State


@outside_inference_mode
def attach(
    model: nn.Module,
    x: Attachable | Library | Mapping[str, Attachable],
    *,
    slots: int | None = None,
    max_rank: int | None = None,
    cache: str | int | None = None,
    trainable: bool = False,
    dtype: torch.dtype | None = None,
    rank_scaling: Scaling | None = None,
    use: What = None,
) -> Live:
    """Attach adapters to a model in place, without changing its weights; returns the handle.

    Adapters that are given run when `use=` or `live.use(...)` says so; fresh ones from the start.

    Args:
        model: any module that holds linear, Conv1D, embedding or convolution layers, or is one.
        x: an `Adapter`, its path, a specification (`lf.LoRA`, `lf.PiSSA`), {name: one of these},
            or a `Library` or its path. A single one is named "default".
        slots: adapters that are on the model's device at once; the least recently used leaves.
            When None, room is made for up to 64 as they come; a number reserves it.
        max_rank: rank that a slot has room for; by default the largest given.
        cache: instead of slots, for a `Library`: bytes that its adapters may take on the device,
            as "256MiB"; as many slots as fit.
        trainable: train the adapters; their factors become parameters. Of what `Live.save` wrote,
            the path gives the kind back, too (`PiSSA` with its Δs), its dropout and metadata.
        dtype: of the factors, in which their products are computed; by default the widest of the
            adapters' own and of the dtype that most of the model's weights have.
        rank_scaling: the factor of a rank prefix k of r: "constant" 1, "linear" r/k, "sqrt" √(r/k);
            by default each adapter's own, which its config tells: "constant" where it doesn't.
        use: what runs from now on, as for `live.use`: a name, a mix, or one of these for each row.

    Raises:
        MismatchError: no module matches, shapes differ, options out of range. RefusedError: a
            layer or adapter that can't be attached, naming it. The model is unchanged then.

    Not for: writing a checkpoint (`lorafold merge-into`), nor what a library becomes later.

    Examples:
        >>> import torch, lorafold as lf
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> a = lf.Adapter({"0": lf.LowRank(torch.randn(2, 8), torch.randn(4, 2))})
        >>> live = lf.attach(model, a)
        >>> x = torch.randn(3, 8)
        >>> with live.use("default", c=0.5): y = model(x)
        >>> torch.allclose(y, model(x) + 0.5 * a["0"](x), atol=1e-5)
        True
    """
    if type(model).__name__ == "OptimizedModule":
        wrapped: Any = model
        model = wrapped._orig_mod  # by whose names adapters go; torch.compile wrapped it
    _check(model, slots, max_rank, rank_scaling)
    warn_of_misread(model)
    known = dtype is None or isinstance(dtype, torch.dtype)
    if not known or (dtype is not None and not (dtype.is_floating_point and dtype.itemsize > 1)):
        raise MismatchError(f"dtype must be a float of 16 bits or more, found {dtype!r}")
    if isinstance(x, str | os.PathLike) and is_library(os.fsdecode(x)):
        x = Library.open(x)
    if isinstance(x, Library):
        if trainable or max_rank is not None:
            given = "trainable" if trainable else "max_rank"
            raise MismatchError(
                f"{given}= is not for a Library, whose adapters run as they are stored: attach "
                "{name: library[name]}"
            )
        kind = dtype or torch.float32
        state = State(model, _library_slots(x, slots, cache, kind), rank_scaling)
        add_library(state, x, kind)
        return _in_use(Live(state), use)
    if cache is not None:
        raise MismatchError("cache= limits what is read of a Library; adapters have slots=")
    named = named_sources(x, trainable)
    adapters = [a for a in named.values() if isinstance(a, Adapter)]
    rank = max_rank or max((a.rank for a in adapters), default=0)
    room = Slots(
        slots,
        rank,
        dtype or widest(model, adapters),
        fixed_rank=max_rank is not None,
        fixed_dtype=dtype is not None,
    )
    state = State(model, room, rank_scaling)
    add_all(state, named, trainable)
    return _in_use(Live(state), use)


def _in_use(live: Live, what: What) -> Live:
    """The handle, with something in use, or a hint where nothing is."""
    if what is not None:
        try:
            live.use(what)
        except LorafoldError:
            live.detach()
            raise
    elif not live.active and len(live.names):
        hint(
            "adapters that are given wait: nothing runs before live.use(name), "
            "or attach(…, use=name)"
        )
    return live


def _check(
    model: nn.Module, slots: int | None, max_rank: int | None, rank_scaling: Scaling | None
) -> None:
    """Refuse what can't be attached to, and options out of range."""
    if not isinstance(model, nn.Module):
        raise MismatchError(f"attach takes a torch module, not a {type(model).__name__}")
    if any(isinstance(module, Swapped) for module in model.modules()):
        raise RefusedError(
            "adapters are attached to this model already: add to that handle (live.add), or "
            "detach it first"
        )
    if rank_scaling is not None:
        check_scaling(rank_scaling)
    for label, value in (("slots", slots), ("max_rank", max_rank)):
        if value is not None and (type(value) is not int or value < 1):
            raise MismatchError(f"{label} must be a whole number of at least 1, found {value!r}")


def _library_slots(
    library: Library, slots: int | None, cache: str | int | None, dtype: torch.dtype
) -> Slots:
    if cache is not None and slots is not None:
        raise MismatchError("slots= and cache= say the same in two ways: give one of them")
    if cache is not None:
        slots = slots_within(library, memory_bytes(cache), dtype)
    return Slots(slots or min(len(library), BY_ITSELF), None, dtype)
