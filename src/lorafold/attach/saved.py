"""Modules that are saved whole beside an adapter (`modules_to_save`: a classifier, a head).

Every module in it that has parameters keeps its own, W, and gets a copy with the adapter's, W', as
its child. With coefficient c it runs with W + c (W' − W): the copy for c = 1, itself for c = 0, to
the bit. (Containers get no child: they would run it.)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..adapter import Adapter
from ..errors import MismatchError, RefusedError
from ..extras import PREFIX, base_names, extra_kind
from .swap import CHILD, Swapped
from .targets import Target, matches

if TYPE_CHECKING:
    from .core import Core

Mix = tuple[tuple[str, float], ...]


class SavedPatch(nn.Module):
    """The copies of one module that adapters brought or train.

    Args:
        live: the handle. path: of the module.

    Attributes:
        keys: name → key of its copy.
    """

    def __init__(self, live: Core, path: str) -> None:
        super().__init__()
        self.live, self.path = live, path
        self.copies = nn.ModuleDict()
        self.keys: dict[str, str] = {}

    def put(self, name: str, module: nn.Module) -> None:
        """Add a copy."""
        key = next(k for i in range(len(self.copies) + 1) if (k := f"s{i}") not in self.copies)
        self.keys[name], self.copies[key] = key, module

    def drop(self, name: str) -> None:
        """Remove a copy, if there is one."""
        if name in self.keys:
            del self.copies[self.keys.pop(name)]

    def copy_of(self, name: str) -> nn.Module:
        """An adapter's copy."""
        return self.copies[self.keys[name]]

    def forward(self, layer: Any, y: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer's output as the selection wants it."""
        selection = self.live.running()
        if selection is None or not self.keys:
            return y
        mixes = [self._mix(row.mix) if row.on else () for row in selection.rows]
        if selection.uniform:
            return self._run(layer, mixes[0], args, kwargs) if mixes[0] else y
        if not isinstance(y, Tensor) or y.shape[0] % len(mixes):
            raise MismatchError(
                f"module {self.path!r} is saved with an adapter, and its output can't be told "
                f"apart by {len(mixes)} rows"
            )
        m = y.shape[0] // len(mixes)
        for mix in dict.fromkeys(mixes):
            if mix:
                chosen = torch.tensor([own == mix for own in mixes], device=y.device)
                chosen = chosen.repeat_interleave(m).view(-1, *[1] * (y.ndim - 1))
                y = torch.where(chosen, self._run(layer, mix, args, kwargs), y)
        return y

    def weights(self, layer: nn.Module, mix: Mix) -> dict[str, Tensor]:
        """{parameter: W + Σ c (W' − W)}."""
        own = {n: p for n, p in layer.named_parameters() if not n.startswith("lorafold.")}
        found = {}
        for name, W in own.items():
            total = W.detach().float()
            for adapter, c in mix:
                total = total + c * (self.copy_of(adapter).get_parameter(name).float() - W.float())
            found[name] = total.to(W.dtype)
        return found

    def _mix(self, mix: Mix) -> Mix:
        return tuple((name, c) for name, c in mix if name in self.keys and c != 0)

    def _run(self, layer: Any, mix: Mix, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        first = self.copy_of(mix[0][0])
        if len(mix) == 1 and mix[0][1] == 1:
            return first(*args, **kwargs)
        return functional_call(first, self.weights(layer, mix), args, dict(kwargs))


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


def plain_copy(layer: nn.Module) -> nn.Module:
    """A copy of a module as it is without anything attached."""
    return copy.deepcopy(_bare(layer))


def _bare(module: nn.Module) -> nn.Module:
    twin: Any = copy.copy(module)
    twin._modules = {
        name: None if child is None else _bare(child)
        for name, child in module._modules.items()
        if name != CHILD
    }
    if isinstance(module, Swapped):
        twin.__class__ = module._swapped
    return twin  # type: ignore[no-any-return]


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


def saved_extras(live: Core, name: str) -> dict[str, Tensor]:
    """The copies of a trained adapter as a file holds them."""
    return {
        f"{PREFIX}{path}.{key}": value.detach().clone()
        for path, patch in live.saved.items()
        if name in patch.keys
        for key, value in patch.copy_of(name).state_dict().items()
    }
