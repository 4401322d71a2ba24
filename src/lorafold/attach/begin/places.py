"""Where the parts of an adapter go in a running model: all is checked, nothing is changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ...adapter import Adapter
from ...errors import MismatchError, RefusedError
from ...fold import Library
from ...layers.kinds import KINDS, is_linear
from ...layers.sites import Place, check_dims, place_at
from ...layers.storage import storage_of
from ...layers.swap import base_modules, plain_copy
from ...layers.targets import Target, matches, pattern_hint, shown
from ...naming import Base, Shape
from ...parts import LINEAR, Layout, Parts, extra_kind, plain_name, saved_modules, wraps
from ...placing import Placement, Spot, check_replicated, placed
from ...words import warn

_RUN = ("saved module", "training state")  # extra tensors that may stand beside updates
_NEVER_RUN = ("dora magnitude", "lora bias", "trained tokens", "grouped convolution")


@dataclass(frozen=True)
class Places:
    """What of a model an adapter updates or brings, by the model's own paths.

    Args:
        layers: {path: layer} that it updates. copies: {path: module} that it has whole.
        experts: {path of an experts' module: {path of an update: its layout}}.
        names: {a path of any of these: the adapter's own}.
    """

    layers: Mapping[str, Place]
    copies: Mapping[str, nn.Module]
    experts: Mapping[str, Mapping[str, Layout]]
    names: Mapping[str, str]


@dataclass(frozen=True)
class Standing:
    """A running model as the adapters find it that come together.

    Args:
        model: it. known: by path, what is attached to layers already.
        scaling: of all rank prefixes; each adapter's own when None.
    """

    model: nn.Module
    known: Mapping[str, Any]
    scaling: str | None = None

    @cached_property
    def tensors(self) -> dict[str, tuple[Shape, Any]]:
        """Its tensors as those of a base, {name: (shape, a dtype that says nothing)}.

        A quantised weight, which is stored in another shape, has the one that its layer's kind
        says. What fits an update is the module's word (`check_dims`), hence no dtypes; and what
        takes none has a weight here all the same, to be refused by name.
        """
        shapes: dict[str, Shape] = {}
        for path, module in base_modules(self.model):
            for name, t in (
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            ):
                shapes[_joined(path, name)] = tuple(t.shape)
            weight, kind = _joined(path, "weight"), KINDS.find(module)
            if kind is not None and storage_of(module).quantized:
                fitting = kind.layout(module).shapes(*kind.dims(module))
                shapes[weight] = fitting[-1 if kind.transposed else 0]
            elif not wraps(name for name, _ in module.named_children()):
                shapes.setdefault(weight, ())
        return {key: (shape, torch.uint8) for key, shape in shapes.items()}


def plain_names(model: nn.Module) -> dict[str, str]:
    """{a module's name in the model: the plain one}; its own where that is another module's."""
    there = [path for path, _ in model.named_modules()]
    taken = set(there)
    plain = {path: plain_name(path) for path in there}
    return {p: p if q in taken and not p.startswith(f"{q}.") else q for p, q in plain.items()}


def places_of(name: str, adapter: Adapter, at: Standing) -> Places:
    """Where an adapter goes.

    Raises:
        MismatchError: nothing of it is in the model, or a part does not fit.
        RefusedError: ΔW algebra would be wrong, a module takes no update, or a tensor would not
            be run.
    """
    if adapter.refusal is not None:
        raise RefusedError(f"adapter {name!r}: {adapter.refusal}")
    model, known = at.model, at.known
    for key in adapter.extras:
        kind = extra_kind(key, adapter.config)
        if kind in _NEVER_RUN:
            raise _not_run(name, key, kind)
    plan = _placed(f"adapter {name!r}", adapter.parts, at)
    _check_run(name, adapter, model, plan)
    layers, experts, names = {}, {}, {}  # type: Any, Any, dict[str, str]
    for path, spot in _updates(plan).items():
        names[path] = spot.part
        if _is_of_experts(spot):
            owner = _owner(spot)
            _check_experts(model, owner, spot, adapter[spot.part].shape)
            experts.setdefault(owner, {})[path] = spot.layout
        else:
            layers[path] = place_at(model, path, known)
            check_dims(path, layers[path].dims, adapter[spot.part].shape)
    copies = _copies(name, adapter, model, plan)
    owners = {_owner(s): s.held.name.rpartition(".")[0] for s in plan.spots if s.what == "whole"}
    names |= {path: owners.get(path, path) for path in copies}
    _list_unplaced(f"adapter {name!r}", plan)
    return Places(layers, copies, experts, names)


def library_places(library: Library, at: Standing) -> Places:
    """Where a library's modules go.

    Raises:
        MismatchError: none of them is in the model, or a shape differs.
        RefusedError: a layer that takes no update, or experts.
    """
    modules = {m.path: m for m in library.contents.modules}
    layouts = {path: m.layout or LINEAR for path, m in modules.items()}
    for path, layout in layouts.items():
        if layout.kind == "expert":
            raise _experts_of_library(path)
    parts = Parts({path: m.shape for path, m in modules.items()}, {}, {}, layouts)
    plan = _placed("the library", parts, at)
    spots = _updates(plan)
    one = next((spot.part for spot in spots.values() if _is_of_experts(spot)), None)
    if one is not None:
        raise _experts_of_library(one)
    layers = {path: place_at(at.model, path, at.known) for path in spots}
    for path, place in layers.items():
        check_dims(path, place.dims, modules[spots[path].part].shape)
    _list_unplaced("the library", plan)
    return Places(layers, {}, {}, {path: spot.part for path, spot in spots.items()})


def _experts_of_library(path: str) -> RefusedError:
    return RefusedError(
        f"module {path!r} of the library is an expert's: attach its adapters one by one, "
        "lf.attach(model, {name: library[name]})"
    )


def owned_extras(library: Library, at: Standing) -> dict[str, frozenset[str]]:
    """{adapter of a library: its extra tensors that are the model's own}, where there are some."""
    found = {}
    for name, entry in library.contents.manifest.adapters.items():
        config = library.contents.config(name) if entry.extras else {}
        kinds = {key: extra_kind(key, config) for key in entry.extras}
        if not {"base weight", "bias", "unknown"}.isdisjoint(kinds.values()):
            extras = library.contents.extras(name)
            parts = Parts({}, {key: tuple(t.shape) for key, t in extras.items()}, config, {})
            spots = placed(parts, Base(at.tensors, parts.names())).spots
            found[name] = frozenset(
                spot.part
                for spot in spots
                if spot.what == "whole" and _is_own(at.model, spot, extras[spot.part])
            )
    return found


def _placed(whose: str, parts: Parts, at: Standing) -> Placement:
    """Every part's place.

    Raises:
        MismatchError: none has one, or one does not fit.
        RefusedError: the model keeps one in another form.
    """
    base = Base(at.tensors, parts.names())
    check_replicated(base.names(), parts.config, parts.modules)
    plan = placed(parts, base)
    for misfit in plan.wrong.values():
        raise MismatchError(f"{whose} belongs to another base: {misfit.says}")
    for spot in plan.spots:
        if not spot.held.whole and not _is_of_experts(spot):
            raise RefusedError(
                f"{whose} has {spot.part!r}, which the model keeps in another form "
                f"({spot.pieces[0].key!r}): apply it to the weights instead (adapter.apply_to)"
            )
    if plan.unplaced and not plan.touches(parts.modules):
        of, what = (parts.modules, "modules") if parts.modules else (parts.extras, "tensors")
        first = next(iter(plan.unplaced))
        raise MismatchError(
            f"none of the {len(of)} {what} of {whose} is in the model: it has {first!r}, the "
            f"model e.g. {_like(at.model, first)!r}"
        )
    return plan


def _list_unplaced(whose: str, plan: Placement) -> None:
    if plan.unplaced:
        names = ", ".join(map(repr, list(plan.unplaced)[:5]))
        warn(f"{len(plan.unplaced)} parts of {whose} are not in the model: {names}")


def _like(model: nn.Module, path: str) -> str:
    """A linear layer of the model, the one named most like the path if there is any."""
    leaf, there = path.rpartition(".")[2], dict(model.named_modules())
    linear: list[str] = [p for p, m in there.items() if is_linear(m)] or list(there)
    return next((p for p in linear if p.rpartition(".")[2] == leaf), linear[0])


def _is_of_experts(spot: Spot) -> bool:
    """Whether it updates a parameter of all experts: one entry of it, or a part of that."""
    if spot.layout.kind == "expert":
        return spot.held.whole
    return spot.what == "update" and spot.held.expert_module is not None


def _owner(spot: Spot) -> str:
    """The path of the model's module that is changed."""
    return spot.pieces[0].key.rpartition(".")[0]


def _updates(plan: Placement) -> dict[str, Spot]:
    """{the model's path of an update: its spot}.

    Raises:
        MismatchError: two are one module's.
    """
    found: dict[str, Spot] = {}
    for spot in plan.spots:
        if spot.what != "update":
            continue
        path = spot.held.expert_module or _owner(spot)
        if spot.layout.kind == "expert":
            number = spot.part.removeprefix(spot.layout.weight_name(spot.part))
            path = f"{spot.pieces[0].key}{number}"
        other = found.setdefault(path, spot)
        if other is not spot:
            raise MismatchError(
                f"{other.part!r} and {spot.part!r} are one module of the model, {path!r}: keep one"
            )
    return found


def _check_experts(model: nn.Module, owner: str, spot: Spot, shape: tuple[int, int]) -> None:
    module = model.get_submodule(owner)
    if "forward" in vars(module):
        raise RefusedError(f"module {owner!r} has a forward of its own on the instance")
    W = dict(module.named_parameters(recurse=False)).get(spot.pieces[0].key.rpartition(".")[2])
    if W is None or storage_of(module).quantized:
        raise RefusedError(
            f"{spot.part!r} is no parameter of floating numbers in the model, and takes no update"
        )
    if spot.layout.kind != "expert":
        if spot.held.shape not in spot.layout.shapes(*shape):
            raise MismatchError(
                f"{spot.part!r} takes updates of {spot.held.shape}, not {shape}: it belongs to "
                "another base"
            )
        return
    if tuple(W.shape) not in spot.layout.shapes(*shape):
        count = spot.layout.expert[1] if spot.layout.expert else 1
        raise MismatchError(
            f"{spot.part!r} takes updates of {tuple(W.shape)}, the adapter has {count} experts of "
            f"{shape}: it belongs to another base"
        )


def _not_run(name: str, key: str, kind: str) -> RefusedError:
    return RefusedError(
        f"adapter {name!r} carries {key!r} ({kind}), which attaching does not run: apply it to "
        "the weights (adapter.apply_to)"
    )


def _check_run(name: str, adapter: Adapter, model: nn.Module, plan: Placement) -> None:
    """Refuse extra tensors that are neither run nor the model's own, as a state dict has them.

    Raises:
        RefusedError: naming one.
    """
    spots = {spot.part: spot for spot in plan.spots if spot.what == "whole"}
    for key, value in adapter.extras.items():
        kind = extra_kind(key, adapter.config)
        if kind in _RUN or "original_module" in key.split("."):
            continue
        if kind == "base weight" and key not in spots:
            continue  # told with what else has no place
        if key not in spots or not _is_own(model, spots[key], value):
            raise _not_run(name, key, kind)


def _is_own(model: nn.Module, spot: Spot, value: Tensor) -> bool:
    """Whether a tensor has the values that the model has in its place."""
    own = getattr(model.get_submodule(_owner(spot)), spot.pieces[0].key.rpartition(".")[2]).detach()
    return own.shape == value.shape and torch.equal(own.cpu(), value.cpu().to(own.dtype))


def _copies(name: str, adapter: Adapter, model: nn.Module, plan: Placement) -> dict[str, nn.Module]:
    """{path: copy} of the modules that an adapter's file holds whole.

    Raises:
        MismatchError: one has other tensors than the model's.
    """
    targets = saved_modules(adapter.config)
    tensors: dict[str, dict[str, Tensor]] = {}
    for spot in plan.spots:
        if spot.what != "whole" or extra_kind(spot.part, adapter.config) != "saved module":
            continue
        key, value = spot.pieces[0].key, adapter.extras[spot.part]
        words = key.split(".")
        above = [".".join(words[:at]) for at in range(1, len(words))]
        path = next((p for p in above if any(p.endswith(t) for t in targets)), _owner(spot))
        tensors.setdefault(path, {})[key.removeprefix(f"{path}.")] = value
    copies: dict[str, nn.Module] = {}
    for path, found in tensors.items():
        twin = _loaded(name, path, model.get_submodule(path), found)
        copies |= {_joined(path, p): m for p, m in _units(twin)}
    return copies


def _loaded(name: str, path: str, layer: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    twin = plain_copy(layer)
    own = twin.state_dict()
    odd = sorted(set(own) ^ set(tensors)) or [k for k in own if own[k].shape != tensors[k].shape]
    if odd:
        raise MismatchError(
            f"adapter {name!r} brings module {path!r} with other tensors than the model's: "
            f"{odd[0]!r}"
        )
    twin.load_state_dict(dict(tensors))
    return twin.requires_grad_(False)


def whole_modules(model: nn.Module, targets: tuple[Target, ...]) -> dict[str, nn.Module]:
    """{path: module} that a specification trains whole.

    Raises:
        MismatchError: a target that matches nothing.
    """
    found: dict[str, nn.Module] = {}
    for target in targets:
        hits = {p: m for p, m in model.named_modules() if p and matches(target, p)}
        if not hits:
            raise MismatchError(
                f"modules_to_save={shown(target)} matches no module{pattern_hint(target)}"
            )
        found |= hits
    outermost = {p: m for p, m in found.items() if not any(p.startswith(f"{q}.") for q in found)}
    return {_joined(p, q): unit for p, m in outermost.items() for q, unit in _units(m)}


def _units(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the outermost modules that have tensors of their own."""
    if any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _units(child, _joined(path, name))


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
