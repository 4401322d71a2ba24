"""Adapters that join a running model: checked as a whole, then done."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Adapter
from ..errors import LorafoldError, MismatchError, RefusedError
from ..fold import Library
from ..layers.modes import outside_inference_mode
from ..layers.sites import Place, check_dims, place_at
from ..layers.swap import plain_copy, swap_in
from ..layers.targets import Target, found_layers, matches
from ..parts import base_names, extra_kind
from .begin.lora import fresh_factors
from .begin.modulation import fresh_modulation
from .run.experts import AttachedExperts, Experts, owner_of
from .run.factors import Fresh
from .run.patch import Patch
from .run.whole import AttachedWhole, Whole
from .running import frozen_updates, no_background, rebuild
from .sources import Source, _add_trained, _trained_factors, taken
from .specs import LoRA, PiSSA, Spec

if TYPE_CHECKING:
    from .live import Live
    from .state import Core


def expert_modules(live: Core, name: str, adapter: Adapter) -> dict[str, nn.Module]:
    """{path: experts' module} that an adapter's experts belong to.

    Raises:
        MismatchError: a parameter is not in the model, or has another shape; naming it.
        RefusedError: the module has a forward of its own on the instance.
    """
    there = dict(live.model.named_modules())
    found: dict[str, nn.Module] = {}
    for path, u in adapter.items():
        layout = adapter.layout(path)
        if layout.kind != "expert":
            continue
        owner = owner_of(path, layout)
        module = there.get(owner)
        W = None if module is None else module._parameters.get(layout.parameter)
        if module is None or W is None:
            raise MismatchError(
                f"adapter {name!r} updates {path!r}, and the model has no such parameter"
            )
        if "forward" in vars(module):
            raise RefusedError(f"module {owner!r} has a forward of its own on the instance")
        assert layout.expert is not None
        if sorted(W.shape[-2:]) != sorted(u.shape) or (
            W.ndim == 3 and W.shape[0] != layout.expert[1]
        ):
            raise MismatchError(
                f"{path!r} takes updates of {tuple(W.shape)}, the adapter has {layout.expert[1]} "
                f"experts of {u.shape}"
            )
        found[owner] = module
    return found


def saved_copies(live: Core, name: str, adapter: Adapter) -> dict[str, nn.Module]:
    """{path: copy} of the modules that an adapter's file holds whole.

    Raises:
        MismatchError: one is not in the model, or has other tensors.
        RefusedError: extra tensors that are nothing of the kind and would not be run.
    """
    there = dict(live.model.named_modules())
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, value in adapter.extras.items():
        kind = extra_kind(key, adapter.config)
        if kind == "training state" or "original_module" in key.split("."):
            continue
        path = None
        if kind == "saved module":
            path, parameter = _module_of(key, adapter, there)
            if path is not None:
                tensors.setdefault(path, {})[parameter] = value
        elif kind == "base weight" and _is_the_models(live, key, value):
            continue
        if path is None:
            raise RefusedError(
                f"adapter {name!r} carries {key!r} ({kind}), which attaching does not run: apply "
                "it to the weights (adapter.apply_to), or drop it with dataclasses.replace("
                "adapter, extras={...})"
            )
    copies: dict[str, nn.Module] = {}
    for path, found in tensors.items():
        twin = _loaded(name, path, there[path], found)
        copies |= {_joined(path, p): m for p, m in units(twin)}
    return copies


def units(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the outermost modules that have tensors of their own."""
    if module._parameters or module._buffers:
        yield path, module
        return
    for name, child in module.named_children():
        yield from units(child, _joined(path, name))


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _module_of(key: str, adapter: Adapter, there: Mapping[str, Any]) -> tuple[str | None, str]:
    """The module that a stored tensor belongs to, and the tensor's name in it."""
    targets = [str(t) for t in adapter.config.get("modules_to_save") or []]
    for full in base_names(key):
        parts = full.split(".")
        for at in range(1, len(parts)):
            path = ".".join(parts[:at])
            if path in there and any(path.endswith(t) for t in targets):
                return path, ".".join(parts[at:])
    return None, ""


def _is_the_models(live: Core, key: str, value: Tensor) -> bool:
    for full in base_names(key):
        path, _, parameter = full.rpartition(".")
        try:
            own = live.model.get_submodule(path).get_parameter(parameter)
        except AttributeError:
            continue
        return own.shape == value.shape and torch.equal(own.detach().cpu(), value.cpu().to(own))
    return False


def _loaded(name: str, path: str, layer: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    twin = plain_copy(layer)
    own = dict(twin.named_parameters()) | dict(twin.named_buffers())
    odd = sorted(set(own) ^ set(tensors)) or [k for k in own if own[k].shape != tensors[k].shape]
    if odd:
        raise MismatchError(
            f"adapter {name!r} brings module {path!r} with other tensors than the model's: "
            f"{odd[0]!r}"
        )
    twin.load_state_dict(dict(tensors))
    return twin.requires_grad_(False)


def modules_to_save(model: nn.Module, targets: tuple[Target, ...]) -> dict[str, nn.Module]:
    """{path: module} that a specification trains whole.

    Raises:
        MismatchError: a target that matches nothing.
    """
    found: dict[str, nn.Module] = {}
    for target in targets:
        hits = {p: m for p, m in model.named_modules() if p and matches(target, p)}
        if not hits:
            raise MismatchError(f"modules_to_save={target!r} matches no module")
        found |= hits
    outermost = {p: m for p, m in found.items() if not any(p.startswith(f"{q}.") for q in found)}
    return {_joined(p, q): unit for p, m in outermost.items() for q, unit in units(m)}


def library_places(live: Core, library: Library) -> dict[str, Place]:
    """{path: place} of a library's modules.

    Raises:
        MismatchError: none of them is in the model, or a shape differs.
        RefusedError: a layer that takes no update, or experts.
    """
    there = {path for path, _ in live.model.named_modules()}
    modules = {m["path"]: m for m in library.modules}
    found: dict[str, Place] = {}
    for path, m in modules.items():
        if m.get("layout", {}).get("kind") == "expert":
            raise RefusedError(
                f"module {path!r} of the library is an expert's: attach its adapters one by one, "
                "lf.attach(model, {name: library[name]})"
            )
        if path not in there:
            continue
        place = place_at(live.model, path, live.patches)
        if place.dims != tuple(m["shape"]):
            raise MismatchError(
                f"module {path!r} takes updates of shape {place.dims}, the library's are "
                f"{tuple(m['shape'])}: it belongs to another base"
            )
        found[path] = place
    if not found:
        raise MismatchError(
            f"none of the library's {len(modules)} modules is in the model: it has "
            f"{next(iter(modules), None)!r}, the model e.g. {max(there, key=len)!r}"
        )
    return found


def places_of(live: Live, name: str, adapter: Adapter) -> dict[str, Place]:
    """{path: place} of an adapter's modules, experts left out.

    Raises:
        MismatchError: none of the modules is in the model, or a shape differs.
        RefusedError: ΔW algebra would be wrong, a layer takes no update, or the adapter carries
            tensors that would not be run.
    """
    if adapter.refusal is not None:
        raise RefusedError(f"adapter {name!r}: {adapter.refusal}")
    model, there = live.model, dict(live.model.named_modules())
    paths = [p for p in adapter if adapter.layout(p).kind != "expert"]
    missing = [p for p in paths if p not in there]
    if paths and len(missing) == len(paths):
        raise MismatchError(
            f"none of the {len(paths)} modules of adapter {name!r} is in the model: it has "
            f"{paths[0]!r}, the model e.g. {_like(there, paths[0])!r}"
        )
    if missing:
        warnings.warn(
            f"{len(missing)} modules of adapter {name!r} are not in the model: "
            f"{', '.join(map(repr, missing[:5]))}",
            stacklevel=4,
        )
    found = {p: place_at(model, p, live.patches) for p in paths if p in there}
    for path, place in found.items():
        check_dims(path, place.dims, adapter[path])
    return found


def _like(there: Mapping[str, Any], path: str) -> str:
    """A linear layer of the model, the one named most like the path if there is any."""
    leaf = path.rpartition(".")[2]
    linear = [p for p, m in there.items() if isinstance(m, nn.Linear)] or list(there)
    return next((p for p in linear if p.rpartition(".")[2] == leaf), linear[0])


DEFAULT = "default"


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
        slots.widen(source.rank, _widest(live.model, [source]))
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
            _add_experts(live, name, frozen[name], modules)
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


def _patch(live: Live, places: Mapping[str, Place]) -> None:
    for path, place in places.items():
        if path in live.patches:
            continue
        patch = Patch(live.board, path, place, len(live.patches))
        swap_in(place.layer, patch, path)
        live.slots.join(patch)
    live.slots.make_room(live.slots.capacity)
    for key, (ranks, scales) in live._trained.items():  # those that were there lack the new layers
        more = (0, len(live.patches) - len(ranks))
        live._trained[key] = (F.pad(ranks, more), F.pad(scales, more))


def _inside(path: str, modules: Mapping[str, Any]) -> bool:
    return any(path == p or path.startswith(f"{p}.") for p in modules)


def _add_experts(live: Live, name: str, a: Adapter, modules: Mapping[str, nn.Module]) -> None:
    for path, module in modules.items():
        if path not in live.experts:
            live.experts[path] = Experts(live.board, path, module)
            swap_in(module, live.experts[path], path, AttachedExperts)
        layouts = {p: a.layout(p) for p in a if a.layout(p).kind == "expert"}
        mine = {p: layout for p, layout in layouts.items() if owner_of(p, layout) == path}
        live.experts[path].put(name, mine)


def _add_copies(live: Live, name: str, modules: Mapping[str, nn.Module]) -> None:
    for path, module in modules.items():
        if path not in live.saved:
            layer = live.layer(path)
            live.saved[path] = Whole(live.board, path, layer)
            swap_in(layer, live.saved[path], path, AttachedWhole)
        live.saved[path].put(name, module)


def _add_frozen(live: Live, name: str, a: Adapter) -> None:
    live._sources[name] = Source(a.rank, adapter=a)
    count = sum(s.key is None for s in live._sources.values())
    live.slots.own_banks(a)
    live.slots.make_room(count)
    if len(live.slots.places) < live.slots.capacity:
        live._write(live.slots.take(name, ()), name)
