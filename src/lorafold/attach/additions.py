"""Adapters that join a running model: each is asked once what it needs, then all is done."""

from __future__ import annotations

import functools
import itertools
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from ..adapter import Adapter
from ..errors import MismatchError, RefusedError
from ..files import load
from ..fold import Library
from ..layers.sites import Place
from ..layers.swap import Attached, refuse_attached
from .begin.loadings import Loadings
from .begin.places import Standing, library_places, owned_extras
from .begin.resumed import Checkpoint
from .begin.specs import Spec
from .run.board import Site
from .run.experts import AttachedExperts, Experts
from .run.factors import Modulation
from .run.patch import Patch
from .run.shelf import Shelf
from .run.whole import AttachedWhole, Whole
from .running import no_background
from .selection import Selection
from .sources import Given, Plan, Stored, Trained
from .state import State

DEFAULT = "default"
Addition: TypeAlias = Adapter | Checkpoint | Spec | Loadings
Attachable: TypeAlias = Adapter | Spec | Loadings | str | os.PathLike[str]


def named_sources(x: Any, trainable: bool) -> dict[str, Addition]:
    """{name: adapter, checkpoint to train on or specification} of what `attach` is given."""
    if isinstance(x, Mapping) and not isinstance(x, Adapter):
        if not x:
            raise MismatchError("there is nothing to attach: the mapping is empty")
        for name in x:
            _check_name(name)
        return {name: _loaded(value, trainable) for name, value in x.items()}
    return {DEFAULT: _loaded(x, trainable)}


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not name:
        raise MismatchError(f"a name must be a non-empty text, found {name!r}")


def _loaded(x: Any, trainable: bool) -> Addition:
    if isinstance(x, Adapter | Spec | Loadings):
        return x
    if isinstance(x, str | os.PathLike):
        return (Checkpoint.at(x) if trainable else None) or load(x)
    raise MismatchError(
        "attach takes an Adapter, its path, lf.LoRA(...), lf.PiSSA(...), a mapping of these or a "
        f"Library, not a {type(x).__name__}"
    )


def widest(model: nn.Module, adapters: list[Adapter]) -> torch.dtype:
    """The dtype that holds every factor, and is no narrower than most of the model's weights."""
    numbers: Counter[torch.dtype] = Counter()
    for p in model.parameters():
        if p.is_floating_point() and p.itemsize > 1:
            numbers[p.dtype] += p.numel()
    dtypes = {t.dtype for a in adapters for u in a.modules.values() for t in (u.A, u.B)}
    found = numbers.most_common(1)[0][0] if numbers else torch.float32
    for dtype in dtypes:
        found = torch.promote_types(found, dtype)
    return found


def add_one(state: State, x: Any, name: str, *, replace: bool, trainable: bool) -> None:
    """See `Live.add`."""
    _check_name(name)
    if name in state.sources and not replace:
        raise MismatchError(
            f"an adapter {name!r} is attached already; use replace=True or another name"
        )
    if isinstance(x, Library | Mapping) and not isinstance(x, Adapter):
        raise MismatchError(f"add takes one adapter at a time, not a {type(x).__name__}")
    add_all(state, {name: _loaded(x, trainable)}, trainable)


def add_all(state: State, named: Mapping[str, Addition], trainable: bool) -> None:
    """Check everything, then attach it; what takes another's place runs where that did."""
    at = Standing(state.model, state.slots.patches, state.scaling)
    plans = {name: _plan(state, name, x, at, trainable) for name, x in named.items()}
    given = [name for name, plan in plans.items() if isinstance(plan.source, Given)]
    _check_sites(state, plans)
    for name, plan in plans.items():
        _check_replaced(state, name, plan)
        if name in given:
            state.slots.check_rank(name, plan.source.rank)
    if given:
        adapters = [plans[name].source.adapter() for name in given]
        state.slots.widen(max(a.rank for a in adapters), widest(state.model, adapters))
    if len(given) < len(plans):
        state.freeze()
    for name in plans:
        if name in state.sources:
            state.let_go(name)
    state.put({name: plan.source for name, plan in plans.items()})
    layers = [plan.places.layers.items() for plan in plans.values()]
    _take_layers(state, dict(itertools.chain(*layers)))
    for name, plan in plans.items():
        _take_modules(state, name, plan)
        if isinstance(plan.source, Trained):
            plan.source.join(name, state.slots.patches)
    if given:
        state.slots.own_banks([path for name in given for path in plans[name].places.layers])
        state.slots.make_room(sum(source.in_slots for source in state.sources.values()))
    for name in plans:
        if name in given:
            state.running.preload(name)
        state.running.keep_again(name)
    state.running.refresh()
    trained = [name for name in plans if name not in given]
    if trained and state.running.selection is None and not state.running.merged_mix:
        state.running.choose(Selection.of(trained[0], None, None, state.sources))


def add_library(state: State, library: Library, dtype: torch.dtype) -> None:
    """Attach all adapters of a library; they are read when they are asked for."""
    at = Standing(state.model, state.slots.patches)
    places = library_places(library, at)
    shelf = Shelf(library, dtype, places.names, owned_extras(library, at))
    entries = library.contents.manifest.adapters
    state.put({name: Stored(entry, shelf, state.scaling) for name, entry in entries.items()})
    _take_layers(state, places.layers)


def _plan(state: State, name: str, x: Addition, at: Standing, trainable: bool) -> Plan:
    if isinstance(x, Loadings):
        return Trained.plan_loadings(x, at)
    if isinstance(x, Spec):
        in_use = functools.partial(directions_in_use, state)
        return Trained.plan_fresh(x, at, in_use)
    if trainable or isinstance(x, Checkpoint):
        return Trained.plan(name, x, at, state.slots.dtype, state.slots.asked_dtype)
    return Given.plan(name, x, at)


def directions_in_use(state: State, path: str) -> list[int]:
    """The singular directions of a layer's weight that kept rounds have."""
    found: list[int] = []
    for name in state.running.kept:
        source = state.sources[name]
        fresh = source.fresh.get(path) if isinstance(source, Trained) else None
        if isinstance(fresh, Modulation):
            found += fresh.index.tolist()
    return found


def _check_sites(state: State, plans: Mapping[str, Plan]) -> None:
    """Refuse what can't be attached to one module in two ways."""
    ways: dict[str, type[Site]] = {path: type(site) for path, site in state.sites.items()}
    for name, plan in plans.items():
        at = plan.places
        for way, paths in ((Patch, at.layers), (Experts, at.experts), (Whole, at.copies)):
            for path in paths:
                if ways.setdefault(path, way) is not way:
                    raise RefusedError(
                        f"adapter {name!r} can't be attached: one module can't be updated and "
                        f"replaced by a copy (modules_to_save) at once, and {path!r} would be"
                    )
                if path not in state.sites:
                    refuse_attached(state.module(path), path)


def _check_replaced(state: State, name: str, plan: Plan) -> None:
    """Refuse what can't go on where the adapter that it replaces is in use."""
    if name in state.running.merged_mix:
        raise MismatchError(f"{name!r} is merged into the weights: unmerge() first")
    more = [*plan.places.experts, *plan.places.copies]
    if name in state.running.kept and more:
        raise no_background(name, more[0])
    selection = state.running.selection
    if selection is not None and selection.tokens is not None and name in selection.mixed:
        raise RefusedError(
            f"{name!r} is in use, weighed token by token: choose others before replacing it"
        )
    if (
        selection is None
        or selection.uniform
        or name not in (*selection.names, *state.running.kept)
    ):
        return
    at = plan.places
    experts = [*at.experts, *(p for p in at.layers if state.board.rows.routed(p))]
    if experts:
        raise RefusedError(
            f"{name!r} is in use by rows, and experts ({experts[0]!r}) take one mix per batch: "
            "choose others before replacing it"
        )


def _take_layers(state: State, places: Mapping[str, Place]) -> None:
    for path, place in places.items():
        if path not in state.slots.patches:
            patch = Patch(state.board, path, place, len(state.slots.patches))
            state.attach(patch, Attached)
            state.slots.join(patch)
    state.slots.make_room(state.slots.capacity)


def _take_modules(state: State, name: str, plan: Plan) -> None:
    for path, layouts in plan.places.experts.items():
        experts = state.sites.get(path) or Experts(state.board, path, state.module(path))
        assert isinstance(experts, Experts)
        if path not in state.sites:
            state.attach(experts, AttachedExperts)
        experts.put(name, layouts)
    for path, module in plan.places.copies.items():
        whole = state.sites.get(path) or Whole(state.board, path, state.module(path))
        assert isinstance(whole, Whole)
        if path not in state.sites:
            state.attach(whole, AttachedWhole)
        whole.put(name, module)
