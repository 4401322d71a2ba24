"""The verb itself: a model and what to attach in, the handle out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..adapter import Adapter
from ..errors import LorafoldError, MismatchError, RefusedError
from ..fold import Library
from ..fold.collection import memory_bytes
from .begin import fresh_factors
from .controls import SCALINGS
from .experts import AttachedExperts, ExpertsPatch, expert_modules, owner_of
from .fresh import Factors, Fresh
from .inference import outside_inference_mode
from .keeping import frozen_updates, no_background, rebuild
from .library import Sides, library_places, library_sources, slots_within
from .live import Live
from .modulation import fresh_modulation, taken
from .patch import Patch
from .places import Place, place_at, places_of
from .saved import SavedPatch, modules_to_save, plain_copy, saved_copies
from .slots import BY_ITSELF, OWN, Slots
from .source import Source
from .spec import LoRA, PiSSA, Spec
from .swap import Swapped, device_of, swap_in
from .targets import found_layers

DEFAULT = "default"


@outside_inference_mode
def attach(
    model: nn.Module,
    x: Any,
    *,
    slots: int | None = None,
    max_rank: int | None = None,
    cache: str | int | None = None,
    trainable: bool = False,
    dtype: torch.dtype | None = None,
    rank_scaling: str = "constant",
) -> Live:
    """Attach adapters to a model in place, without changing its weights.

    Adapters that are given run when `live.use(...)` says so; fresh ones, which are there to be
    trained, run from the start.

    Args:
        model: any module that holds linear, Conv1D, embedding or convolution layers, or is one.
        x: an `Adapter`, its path, a specification (`lf.LoRA`, `lf.PiSSA`), {name: one of these},
            or a `Library`. A single one is named "default".
        slots: adapters that are on the model's device at once; the least recently used leaves.
            When None, room is made for up to 64 as they come; a number reserves it.
        max_rank: rank that a slot has room for; by default the largest given.
        cache: instead of slots, for a `Library`: bytes that its adapters may take on the device,
            as "256MiB"; as many slots as fit.
        trainable: train the adapters; their factors become parameters.
        dtype: of the factors, in which their products are computed; by default the widest of the
            adapters' own and of the dtype that most of the model's weights have.
        rank_scaling: the factor of a rank prefix k of r: "constant" 1, "linear" r/k, "sqrt" √(r/k).

    Returns:
        The handle, `Live`.

    Raises:
        MismatchError: no module matches, shapes differ, options out of range. RefusedError: a
            layer or adapter that can't be attached, naming it. The model is unchanged then.

    Example:
        >>> import torch, lorafold as lf
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> a = lf.Adapter({"0": lf.LowRank(torch.randn(2, 8), torch.randn(4, 2))})
        >>> live = lf.attach(model, a)
        >>> x = torch.randn(3, 8)
        >>> with live.use("default", c=0.5):
        ...     y = model(x)
        >>> torch.allclose(y, model(x) + 0.5 * a["0"](x), atol=1e-5)
        True
    """
    if type(model).__name__ == "OptimizedModule":
        wrapped: Any = model
        model = wrapped._orig_mod  # by whose names adapters go; torch.compile wrapped it
    _check(model, slots, max_rank, rank_scaling)
    if dtype is not None and not (dtype.is_floating_point and dtype.itemsize > 1):
        raise MismatchError(f"dtype must be a float of 16 bits or more, found {dtype}")
    if isinstance(x, Library):
        if trainable or max_rank is not None:
            given = "trainable" if trainable else "max_rank"
            raise MismatchError(
                f"{given}= is not for a Library, whose adapters run as they are stored: attach "
                "{name: library[name]}"
            )
        if cache is not None and slots is not None:
            raise MismatchError("slots= and cache= say the same in two ways: give one of them")
        if cache is not None:
            slots = slots_within(x, memory_bytes(cache), dtype or torch.float32)
        return _attach_library(model, x, slots, dtype, SCALINGS[rank_scaling])
    if cache is not None:
        raise MismatchError("cache= limits what is read of a Library; adapters have slots=")
    named = _named(x)
    adapters = [a for a in named.values() if isinstance(a, Adapter)]
    rank = max_rank or max((a.rank for a in adapters), default=0)
    room = Slots(slots, rank, dtype or _widest(model, adapters))
    room.fixed_rank, room.fixed_dtype = max_rank is not None, dtype is not None
    live = Live(model, room, SCALINGS[rank_scaling])
    _add_all(live, named, trainable)
    return live


def _check(model: nn.Module, slots: int | None, max_rank: int | None, rank_scaling: str) -> None:
    """Refuse what can't be attached to, and options out of range."""
    if not isinstance(model, nn.Module):
        raise MismatchError(f"attach takes a torch module, not a {type(model).__name__}")
    if any(isinstance(module, Swapped) for module in model.modules()):
        raise RefusedError(
            "adapters are attached to this model already: add to that handle (live.add), or "
            "detach it first"
        )
    if not isinstance(rank_scaling, str) or rank_scaling not in SCALINGS:
        raise MismatchError(
            f"rank_scaling must be one of {', '.join(SCALINGS)}; found {rank_scaling!r}"
        )
    for label, value in (("slots", slots), ("max_rank", max_rank)):
        if value is not None and (type(value) is not int or value < 1):
            raise MismatchError(f"{label} must be a whole number of at least 1, found {value!r}")


def _attach_library(
    model: nn.Module,
    library: Library,
    slots: int | None,
    dtype: torch.dtype | None,
    scaling: Callable[[float], float],
) -> Live:
    kind = dtype or torch.float32
    live = Live(model, Slots(slots or min(len(library), BY_ITSELF), 0, kind), scaling)
    places = library_places(live, library)
    live._sources.update(library_sources(library))
    _patch(live, places)
    live.sides = Sides(library, kind)
    return live


@outside_inference_mode
def add_to(live: Live, x: Any, name: str, *, replace: bool, trainable: bool) -> None:
    """See `Live.add`."""
    if not isinstance(name, str) or not name:
        raise MismatchError(f"a name must be a non-empty text, found {name!r}")
    if name in live.names and not replace:
        raise MismatchError(
            f"an adapter {name!r} is attached already; use replace=True or another name"
        )
    if isinstance(x, Library | Mapping) and not isinstance(x, Adapter):
        raise MismatchError(f"add takes one adapter at a time, not a {type(x).__name__}")
    source, slots = _source(x), live.slots
    before = slots.rank, slots.dtype
    if isinstance(source, Adapter) and not trainable:
        if not slots.tables and not slots.fixed_rank:
            slots.rank = max(slots.rank, source.rank)
        if not slots.fixed_dtype:
            slots.dtype = torch.promote_types(slots.dtype, _widest(live.model, [source]))
    try:
        _add_all(live, {name: source}, trainable)
    except LorafoldError:
        slots.rank, slots.dtype = before
        raise


def _named(x: Any) -> dict[str, Any]:
    if isinstance(x, Mapping) and not isinstance(x, Adapter):
        if not x:
            raise MismatchError("there is nothing to attach: the mapping is empty")
        for name in x:
            if not isinstance(name, str) or not name:
                raise MismatchError(f"a name must be a non-empty text, found {name!r}")
        return {name: _source(value) for name, value in x.items()}
    return {DEFAULT: _source(x)}


def _source(x: Any) -> Adapter | Spec:
    if isinstance(x, Adapter | Spec):
        return x
    if isinstance(x, str | os.PathLike):
        from ..files import load

        return load(x)
    raise MismatchError(
        "attach takes an Adapter, its path, lf.LoRA(...), lf.PiSSA(...), a mapping of these or a "
        f"Library, not a {type(x).__name__}"
    )


def _widest(model: nn.Module, adapters: list[Adapter]) -> torch.dtype:
    """The dtype that holds every factor, and is no narrower than most of the model's weights."""
    numbers: Counter[torch.dtype] = Counter()
    for p in model.parameters():
        if p.is_floating_point() and p.itemsize > 1:
            numbers[p.dtype] += p.numel()
    dtypes = {t.dtype for a in adapters for u in a.modules.values() for t in (u.A, u.B)}
    widest = numbers.most_common(1)[0][0] if numbers else torch.float32
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def _add_all(live: Live, named: Mapping[str, Adapter | Spec], trainable: bool) -> None:
    """Check everything, then attach it."""
    experts: dict[str, dict[str, nn.Module]] = {}
    copies: dict[str, dict[str, nn.Module]] = {}
    frozen = {n: a for n, a in named.items() if isinstance(a, Adapter) and not trainable}
    trained: dict[str, tuple[dict[str, Fresh], Source]] = {}
    places: dict[str, Place] = {}
    for name, a in named.items():
        if isinstance(a, Spec):
            found, fresh, source = _begin(live, a)
            whole = modules_to_save(live.model, a.modules_to_save)
            found = {p: v for p, v in found.items() if not _inside(p, whole)}
            fresh = {p: f for p, f in fresh.items() if p in found}
            copies[name] = {p: plain_copy(m).requires_grad_(True) for p, m in whole.items()}
        else:
            found = places_of(live, name, a)
            experts[name] = expert_modules(live, name, a)
            copies[name] = saved_copies(live, name, a)
            if trainable and experts[name]:
                raise RefusedError(f"adapter {name!r}: experts can't be trained here; use PEFT")
            for module in copies[name].values() if trainable else ():
                module.requires_grad_(True)
            if name in frozen:
                if a.rank > live.slots.rank:
                    raise MismatchError(
                        f"adapter {name!r} has rank {a.rank}, and the slots have room for "
                        f"{live.slots.rank}: attach with max_rank={a.rank}"
                    )
                places |= found
                continue
            fresh, source = _trained_factors(a, found, live.slots.dtype)
        places |= found
        trained[name] = (fresh, source)
    _check_replaced(live, named, experts, copies)
    selection, kept, background = live._selection, dict(live.kept), dict(live.background)
    for name in named:
        if name in live.names:
            live.remove(name)
    _patch(live, places)
    for name, a in frozen.items():
        _add_frozen(live, name, a)
    for name, (fresh, source) in trained.items():
        _add_trained(live, name, fresh, source)
    for name, modules in experts.items():
        if name in frozen:
            _add_experts(live, frozen[name], modules)
    for name, modules in copies.items():
        _add_copies(live, name, modules)
    live._selection = selection  # what was replaced goes on where it ran
    if kept != live.kept:
        replaced = {name: frozen_updates(live, name) for name in named if name in kept}
        live.kept, live.background = kept, background | replaced
        rebuild(live)
    live._refresh()
    if trained and live._selection is None and not live.merged:
        live.use(next(iter(trained)))


def _check_replaced(
    live: Live,
    named: Mapping[str, Any],
    experts: Mapping[str, Mapping[str, nn.Module]],
    copies: Mapping[str, Mapping[str, nn.Module]],
) -> None:
    """Refuse what can't go on where the adapter that it replaces is in use."""
    selection = live._selection
    rows = set() if selection is None or selection.uniform else set(selection.names)
    for name in named:
        more = [*experts.get(name, ()), *copies.get(name, ())]
        if name in live.kept and more:
            raise no_background(name, more[0])
        if name in rows and experts.get(name):
            raise RefusedError(
                f"{name!r} is in use by rows, and experts ({next(iter(experts[name]))!r}) take one "
                "mix per batch: choose others before replacing it"
            )


def _begin(live: Live, spec: Spec) -> tuple[dict[str, Place], dict[str, Fresh], Source]:
    """Everything that a specification means on a model; nothing is attached yet."""
    layers = found_layers(live.model, spec.targets, spec.exclude, spec.layers)
    places = {path: place_at(live.model, path, live.patches) for path in layers}
    if isinstance(spec, LoRA):
        spec.check_patterns(places)
    generator = torch.Generator()
    # Drawn, so that two adapters never begin alike: one A looks like a shared skill.
    seed = int(torch.randint(2**62, ())) if spec.seed is None else spec.seed
    generator.manual_seed(seed)
    fresh: dict[str, Fresh] = {}
    for path, place in places.items():
        if isinstance(spec, PiSSA):
            used = taken(live, path)
            fresh[path] = fresh_modulation(spec, path, place.layer, place.kind, generator, used)
        else:
            assert isinstance(spec, LoRA)
            fresh[path] = fresh_factors(spec, path, place.layer, place.kind, generator)
    rank = max(f.rank for f in fresh.values())
    return places, fresh, Source(rank, spec=spec, config=_config(spec))


def _config(spec: Spec) -> dict[str, Any]:
    """What PEFT's config says of a fresh adapter; without r where modules differ."""
    if not isinstance(spec, LoRA) or spec.rank_pattern or spec.alpha_pattern:
        return {}
    if spec.init.startswith("pissa"):
        return {}  # saved with the start beside it, at twice the rank
    return {
        "peft_type": "LORA",
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "use_rslora": spec.rslora,
    }


def _trained_factors(
    a: Adapter, places: Mapping[str, Place], dtype: torch.dtype
) -> tuple[dict[str, Fresh], Source]:
    fresh: dict[str, Fresh] = {}
    for path, place in places.items():
        u = a[path].to(device_of(place.layer), dtype)
        fresh[path] = Factors(place.kind, u.A.clone(), u.B.clone(), u.scale)
    return fresh, Source(a.rank, config=dict(a.config))


def _patch(live: Live, places: Mapping[str, Place]) -> None:
    for path, place in places.items():
        if path in live.patches:
            continue
        patch = Patch(live, len(live.patches), path, place.kind, place.dims)
        patch.train(place.layer.training)
        swap_in(place.layer, patch, path)
        live.patches[path] = patch
    if live.slots.make_room(live.patches, live.slots.capacity):
        live.forget_controls()
    for key, (ranks, scales) in live._trained.items():  # those that were there lack the new layers
        more = (0, len(live.patches) - len(ranks))
        live._trained[key] = (F.pad(ranks, more), F.pad(scales, more))


def _inside(path: str, modules: Mapping[str, Any]) -> bool:
    return any(path == p or path.startswith(f"{p}.") for p in modules)


def _add_experts(live: Live, a: Adapter, modules: Mapping[str, nn.Module]) -> None:
    for path, module in modules.items():
        if path not in live.experts:
            live.experts[path] = ExpertsPatch(live, path)
            swap_in(module, live.experts[path], path, AttachedExperts)
        for p in a:
            if a.layout(p).kind == "expert" and owner_of(p, a.layout(p)) == path:
                live.experts[path].layouts[p] = a.layout(p)


def _add_copies(live: Live, name: str, modules: Mapping[str, nn.Module]) -> None:
    for path, module in modules.items():
        if path not in live.saved:
            live.saved[path] = SavedPatch(live, path)
            swap_in(live.layer(path), live.saved[path], path)
        live.saved[path].put(name, module)


def _add_frozen(live: Live, name: str, a: Adapter) -> None:
    live._sources[name] = Source(a.rank, adapter=a)
    count = sum(s.key is None for s in live._sources.values())
    live.slots.group(OWN, live.slots.rank, len(live.patches))
    for path in a:
        if path in live.patches:
            live.slots.own_bank(live.patches[path], device_of(live.layer(path)))
    if live.slots.make_room(live.patches, count):
        live._controls.clear()
    if len(live.slots.places) < live.slots.capacity:
        live._write(live.slots.take(name, ()), name)


def _add_trained(live: Live, name: str, fresh: Mapping[str, Fresh], source: Source) -> None:
    if live._frozen is None:
        hidden = () if live._merged is None else live._merged[1].values()  # behind what is merged
        there = [*live.model.parameters(), *(p for p in hidden if p is not None)]
        live._frozen = [(p, p.requires_grad) for p in there]
        for p, _ in live._frozen:
            p.requires_grad_(False)
    taken = {s.key for s in live._sources.values()}
    source.key = next(k for i in range(len(taken) + 1) if (k := f"t{i}") not in taken)
    live._sources[name] = source
    ranks = torch.zeros(len(live.patches), dtype=torch.int64)
    scales = torch.zeros(len(live.patches), dtype=torch.float64)
    for path, module in fresh.items():
        patch = live.patches[path]
        module.train(patch.training)
        patch.fresh[source.key] = module
        ranks[patch.index], scales[patch.index] = module.rank, module.scale
    live._trained[source.key] = (ranks, scales)
