"""Where the parts of an adapter go in a running model: all is checked, nothing is changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...adapter import Adapter
from ...errors import MismatchError, RefusedError
from ...fold import Library
from ...layers.kinds import is_linear
from ...layers.sites import Place, check_dims, place_at
from ...layers.swap import plain_copy
from ...layers.targets import Target, matches
from ...parts import PREFIX, Layout, base_names, extra_kind, plain_name
from ...words import warn


def own_names(model: nn.Module) -> dict[str, str]:
    """{plain name: the model's own} of its modules, of what is wrapped the innermost's."""
    names: dict[str, str] = {}
    for name, _ in model.named_modules():
        plain = plain_name(name)
        if names.get(plain) != plain or name.startswith(f"{plain}."):  # `fc` is not `module.fc`
            names[plain] = name
    return names


def plain_names(model: nn.Module) -> dict[str, str]:
    """{a module's name in the model: the plain one}; its own where that is another module's."""
    return {name: plain for plain, name in own_names(model).items()}


def renamed(path: str, names: Mapping[str, str]) -> str:
    """A plain path in the model's own names, by the innermost module that is there."""
    if path in names or "." not in path:
        return names.get(path, path)
    above, _, last = path.rpartition(".")
    return f"{renamed(above, names)}.{last}"


def in_names_of(model: nn.Module, adapter: Adapter) -> Adapter:
    """The adapter by the model's own names, where compiling or sharding put something into them."""
    names = own_names(model)
    if all(plain == name for plain, name in names.items()):
        return adapter

    def of_key(key: str) -> str:
        name = key.removeprefix(PREFIX)
        return key[: len(key) - len(name)] + renamed(name, names)

    return dataclasses.replace(
        adapter,
        modules={renamed(path, names): u for path, u in adapter.modules.items()},
        layouts={renamed(path, names): layout for path, layout in adapter.layouts.items()},
        extras={of_key(key): t for key, t in adapter.extras.items()},
    )


def layers_of(
    name: str, adapter: Adapter, model: nn.Module, known: Mapping[str, Any]
) -> dict[str, Place]:
    """{path: layer} of an adapter's modules, experts left out.

    Args:
        known: by path, what is attached to layers already.

    Raises:
        MismatchError: none of the modules is in the model, or a shape differs.
        RefusedError: ΔW algebra would be wrong, or a layer takes no update.
    """
    if adapter.refusal is not None:
        raise RefusedError(f"adapter {name!r}: {adapter.refusal}")
    there = dict(model.named_modules())
    paths = [p for p in adapter if adapter.layout(p).kind != "expert"]
    missing = [p for p in paths if p not in there]
    if paths and len(missing) == len(paths):
        raise MismatchError(
            f"none of the {len(paths)} modules of adapter {name!r} is in the model: it has "
            f"{paths[0]!r}, the model e.g. {_like(there, paths[0])!r}"
        )
    if missing:
        warn(
            f"{len(missing)} modules of adapter {name!r} are not in the model: "
            f"{', '.join(map(repr, missing[:5]))}",
        )
    found = {p: place_at(model, p, known) for p in paths if p in there}
    for path, place in found.items():
        check_dims(path, place.dims, adapter[path])
    return found


def _like(there: Mapping[str, Any], path: str) -> str:
    """A linear layer of the model, the one named most like the path if there is any."""
    leaf = path.rpartition(".")[2]
    linear = [p for p, m in there.items() if is_linear(m)] or list(there)
    return next((p for p in linear if p.rpartition(".")[2] == leaf), linear[0])


def library_layers(
    library: Library, model: nn.Module, known: Mapping[str, Any]
) -> dict[str, Place]:
    """{path: layer} of a library's modules.

    Raises:
        MismatchError: none of them is in the model, or a shape differs.
        RefusedError: a layer that takes no update, or experts.
    """
    there, names = {path for path, _ in model.named_modules()}, own_names(model)
    modules = {renamed(m.path, names): m for m in library.contents.modules}
    found: dict[str, Place] = {}
    for path, m in modules.items():
        if m.layout is not None and m.layout.kind == "expert":
            raise RefusedError(
                f"module {path!r} of the library is an expert's: attach its adapters one by one, "
                "lf.attach(model, {name: library[name]})"
            )
        if path not in there:
            continue
        place = place_at(model, path, known)
        if place.dims != m.shape:
            raise MismatchError(
                f"module {path!r} takes updates of shape {place.dims}, the library's are "
                f"{m.shape}: it belongs to another base"
            )
        found[path] = place
    if not found:
        raise MismatchError(
            f"none of the library's {len(modules)} modules is in the model: it has "
            f"{next(iter(modules), None)!r}, the model e.g. {max(there, key=len)!r}"
        )
    missing = [m.path for path, m in modules.items() if path not in found]
    if missing:
        warn(
            f"{len(missing)} modules of the library are not in the model: "
            f"{', '.join(map(repr, missing[:5]))}",
        )
    return found


def experts_of(name: str, adapter: Adapter, model: nn.Module) -> dict[str, dict[str, Layout]]:
    """{path of an experts' module: {path of an update: its layout}}.

    Raises:
        MismatchError: a parameter is not in the model, or has another shape; naming it.
        RefusedError: the module has a forward of its own on the instance.
    """
    there = dict(model.named_modules())
    found: dict[str, dict[str, Layout]] = {}
    for path, u in adapter.items():
        layout = adapter.layout(path)
        if layout.kind != "expert":
            continue
        owner = layout.owner(path)
        module = there.get(owner)
        own = {} if module is None else dict(module.named_parameters(recurse=False))
        W = own.get(layout.parameter)
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
        found.setdefault(owner, {})[path] = layout
    return found


def copies_of(name: str, adapter: Adapter, model: nn.Module) -> dict[str, nn.Module]:
    """{path: copy} of the modules that an adapter's file holds whole.

    Raises:
        MismatchError: one is not in the model, or has other tensors.
        RefusedError: extra tensors that are nothing of the kind and would not be run.
    """
    there = dict(model.named_modules())
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
        elif kind == "base weight" and _is_the_models(model, key, value):
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
        copies |= {_joined(path, p): m for p, m in _units(twin)}
    return copies


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


def _is_the_models(model: nn.Module, key: str, value: Tensor) -> bool:
    for full in base_names(key):
        path, _, parameter = full.rpartition(".")
        try:
            own = model.get_submodule(path).get_parameter(parameter)
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


def whole_modules(model: nn.Module, targets: tuple[Target, ...]) -> dict[str, nn.Module]:
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
