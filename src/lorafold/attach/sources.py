"""Where an attached adapter comes from: given, stored in a library, or trained here.

Each kind answers the same questions, so that nobody asks which kind it is: what it needs of the
model (a `Plan`, made and checked before anything is attached), its update at a layer, what goes
into a slot, and the adapter that it is now.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import ORIGIN, Adapter, idle
from ..errors import MismatchError, RefusedError
from ..fold.store.entries import AdapterEntry
from ..layers.sites import place_at
from ..layers.swap import device_of, plain_copy
from ..layers.targets import found_layers
from ..lowrank import LowRank
from ..parts import PREFIX, plain_name
from ..prefixes import Prefixes, regauged
from ..words import warn
from .begin.loadings import Loadings, fresh_loadings
from .begin.lora import fresh_factors
from .begin.modulation import fresh_modulation
from .begin.places import Places, Standing, places_of, plain_names, whole_modules
from .begin.resumed import Checkpoint
from .begin.specs import LoRA, PiSSA, Spec
from .run.factors import Factors, Pair
from .run.patch import Patch
from .run.shelf import Shelf
from .run.slots import Slots


class Source(ABC):
    """One attached adapter; see the three final classes.

    Attributes:
        rank: the largest of its modules. in_slots: whether it takes a slot to run.
    """

    rank: int
    in_slots = True

    @abstractmethod
    def update(self, path: str) -> LowRank | None:
        """Its update at one layer; None where it has none there."""

    @abstractmethod
    def shape(self, path: str) -> tuple[int, float] | None:
        """(rank, scale) of it at one layer; None where it has none there."""

    @abstractmethod
    def part(self, path: str) -> str | None:
        """What it calls a layer itself; None where it has no update there."""

    @property
    @abstractmethod
    def prefixes(self) -> Prefixes:
        """What rank prefixes of it mean."""

    @abstractmethod
    def adapter(self) -> Adapter:
        """The adapter that it is now."""

    @abstractmethod
    def load(self, slots: Slots, slot: int) -> None:
        """Write its factors into a slot."""

    @abstractmethod
    def parameters(self) -> Iterator[nn.Parameter]:
        """What of it is trained."""


@dataclass(frozen=True)
class Plan:
    """What an adapter needs of a model; nothing is attached yet.

    Args:
        source: it. places: where it goes.
    """

    source: Source
    places: Places


class Given(Source):
    """An adapter as it was handed over."""

    def __init__(
        self, adapter: Adapter, parts: Mapping[str, str], scaling: str | None = None
    ) -> None:
        self._given, self._parts, self.rank = adapter, parts, adapter.rank
        self._prefixes = Prefixes.of(adapter.config, scaling)
        self._updates = {path: adapter[part] for path, part in parts.items()}

    @classmethod
    def plan(cls, name: str, a: Adapter, at: Standing) -> Plan:
        """What an adapter needs, or the error that says why it does not fit."""
        places = places_of(name, a, at)
        if (why := idle(a)) is not None:
            warn(f"adapter {name!r} does nothing: {why}")
        parts = {path: part for path, part in places.names.items() if part in a}
        return Plan(cls(a, parts, at.scaling), places)

    def update(self, path: str) -> LowRank | None:
        return self._updates.get(path)

    def shape(self, path: str) -> tuple[int, float] | None:
        u = self.update(path)
        return None if u is None else (u.rank, u.scale)

    def part(self, path: str) -> str | None:
        return self._parts.get(path)

    @property
    def prefixes(self) -> Prefixes:
        return self._prefixes

    def adapter(self) -> Adapter:
        return self._given

    def load(self, slots: Slots, slot: int) -> None:
        for path, u in self._updates.items():
            if path in slots.patches:
                slots.write(slot, path, u)

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(())


class Trained(Source):
    """Factors and whole modules that are trained here.

    Args:
        fresh: by path, the factors. places: of their layers and of modules that train whole.
            config: what a file says of it. metadata: the user's, kept with it.

    Attributes:
        names: {path: plain name}, for who reads it.
    """

    in_slots = False

    def __init__(
        self,
        fresh: Mapping[str, Factors],
        places: Places,
        config: Mapping[str, Any],
        metadata: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.metadata = dict(metadata)
        self.fresh, self.copies, self.config = dict(fresh), dict(places.copies), dict(config)
        self.rank = max((f.rank for f in fresh.values()), default=0)
        self._prefixes = Prefixes.of(config)
        self.names, self._layers = places.names, places.layers
        self.key = ""

    @classmethod
    def plan(
        cls,
        name: str,
        x: Adapter | Checkpoint,
        at: Standing,
        dtype: torch.dtype,
        asked: torch.dtype | None = None,
    ) -> Plan:
        """What an adapter needs that is to be trained on, from its checkpoint where it has one.

        Args:
            dtype: of its factors. asked: of a checkpoint's, which keep their own when None.
        """
        a, training = (x.adapter, x.training) if isinstance(x, Checkpoint) else (x, None)
        places = places_of(name, a, at)
        if places.experts:
            raise RefusedError(f"adapter {name!r}: experts can't be trained here; use PEFT")
        prefixes = Prefixes.of(a.config, at.scaling)
        fresh: dict[str, Factors] = {}
        for path, place in places.layers.items():
            part = places.names[path]
            if training is not None:
                fresh[path] = training.factors(part, place, prefixes).to(dtype=asked)
                continue
            u = a[part].to(device_of(place.layer), dtype)
            fresh[path] = Pair(place.kind, u.A.clone(), u.B.clone(), u.scale, prefixes=prefixes)
        for module in places.copies.values():
            module.requires_grad_(True)
        own = plain_names(at.model)
        plain = {p: own[p] if p == q else plain_name(q) for p, q in places.names.items()}
        config = {k: v for k, v in a.config.items() if k != ORIGIN}  # training makes it another
        config = {**regauged(config), **prefixes.said()}
        metadata = {} if training is None else training.metadata
        return Plan(cls(fresh, replace(places, names=plain), config, metadata), places)

    @classmethod
    def plan_fresh(
        cls,
        spec: Spec,
        at: Standing,
        in_use: Callable[[str], list[int]],
    ) -> Plan:
        """What a specification needs.

        Args:
            in_use: the singular directions of a layer's weight that kept rounds have.
        """
        layers = found_layers(at.model, spec.targets, spec.exclude, spec.layers)
        if isinstance(spec, LoRA):
            spec.check_patterns(layers)
        whole = whole_modules(at.model, spec.modules_to_save)
        there = {p: place_at(at.model, p, at.known) for p in layers if not _inside(p, whole)}
        if not there:
            raise MismatchError("modules_to_save= leaves none of the layers that targets= means")
        generator = torch.Generator()
        # Drawn, so that two adapters never begin alike: one A looks like a shared skill.
        seed = int(torch.randint(2**62, ())) if spec.seed is None else spec.seed
        generator.manual_seed(seed)
        fresh: dict[str, Factors] = {}
        nested = spec.nested if isinstance(spec, LoRA) else None
        prefixes = Prefixes(nested or (), at.scaling or "constant")
        for path, place in there.items():
            args = path, place.layer, place.kind, generator
            if isinstance(spec, PiSSA):
                fresh[path] = fresh_modulation(spec, *args, in_use(path))
            else:
                assert isinstance(spec, LoRA)
                fresh[path] = fresh_factors(spec, *args, prefixes)
        copies = {p: plain_copy(m).requires_grad_(True) for p, m in whole.items()}
        names = plain_names(at.model)
        places = Places(there, copies, {}, {p: names.get(p, p) for p in (*there, *copies)})
        return Plan(cls(fresh, places, {**_config(spec), **prefixes.said()}), places)

    @classmethod
    def plan_loadings(cls, spec: Loadings, at: Standing) -> Plan:
        """What a fresh adapter inside a library needs."""
        fresh, places = fresh_loadings(spec, at)
        return Plan(cls(fresh, places, {}), places)

    def join(self, name: str, patches: Mapping[str, Patch]) -> None:
        """Put the factors where they run."""
        taken = {key for patch in patches.values() for key in patch.fresh}
        self.key = next(k for i in range(len(taken) + 1) if (k := f"t{i}") not in taken)
        for path, factors in self.fresh.items():
            patches[path].put(name, self.key, factors)

    def table(self, patches: Mapping[str, Patch]) -> tuple[Tensor, Tensor]:
        """Ranks (L,) and scales (L,) at all layers; 0 where it has nothing."""
        found = [self.shape(path) or (0, 0.0) for path in patches]
        return (
            torch.tensor([rank for rank, _ in found], dtype=torch.int64),
            torch.tensor([scale for _, scale in found], dtype=torch.float64),
        )

    def update(self, path: str) -> LowRank | None:
        return self.fresh[path].update() if path in self.fresh else None

    def shape(self, path: str) -> tuple[int, float] | None:
        found = self.fresh.get(path)
        return None if found is None else (found.rank, found.scale)

    def part(self, path: str) -> str | None:
        return self.names[path] if path in self.fresh else None

    @property
    def prefixes(self) -> Prefixes:
        return self._prefixes

    def adapter(self) -> Adapter:
        config, names = dict(self.config), self.names
        if self.copies:
            config["modules_to_save"] = [names[path] for path in self.copies]
        kinds = [place.kind for place in self._layers.values()]
        if any(kind.linear and kind.transposed for kind in kinds):
            config["fan_in_fan_out"] = True
        extras = {
            f"{PREFIX}{names[path]}{plain_name(f'.{key}')}": value.detach().clone()
            for path, module in self.copies.items()
            for key, value in module.state_dict().items()
        }
        layers = self._layers.items()
        layouts = {names[path]: place.kind.layout(place.layer) for path, place in layers}
        modules = {names[path]: factors.update() for path, factors in self.fresh.items()}
        if any(modules[names[path]].rank > f.rank for path, f in self.fresh.items()):
            config = regauged(config)  # a start lies beside, at twice the rank
        return Adapter(modules, extras, config, layouts=layouts)

    def load(self, slots: Slots, slot: int) -> None:
        raise TypeError("what is trained takes no slot")  # pragma: no cover

    def parameters(self) -> Iterator[nn.Parameter]:
        for module in (*self.fresh.values(), *self.copies.values()):
            yield from module.parameters()


def _inside(path: str, modules: Iterable[str]) -> bool:
    return any(path == p or path.startswith(f"{p}.") for p in modules)


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


class Stored(Source):
    """An adapter in a library; its parts are read when they are asked for."""

    def __init__(self, entry: AdapterEntry, shelf: Shelf, scaling: str | None = None) -> None:
        self._entry, self._shelf, self._scaling = entry, shelf, scaling
        # What coding added (a residual part) may come on top of the file's own rank.
        self.rank = 2 * max(entry.ranks, default=0)

    def __deepcopy__(self, memo: Any) -> Stored:
        return self  # it never changes

    def update(self, path: str) -> LowRank | None:
        return self._shelf.update(self._entry, path)

    def shape(self, path: str) -> tuple[int, float] | None:
        u = self.update(path)
        return None if u is None else (u.rank, u.scale)

    def part(self, path: str) -> str | None:
        return self._shelf.part(self._entry, path)

    @cached_property
    def prefixes(self) -> Prefixes:
        return self._shelf.prefixes(self._entry, self._scaling)

    def adapter(self) -> Adapter:
        return self._shelf.adapter(self._entry)

    def load(self, slots: Slots, slot: int) -> None:
        """Write its parts into a slot.

        Raises:
            RefusedError: it is stored exactly because ΔW algebra would be wrong for it, or carries
                tensors that would not be run.
        """
        self._shelf.refuse(self._entry)
        self._shelf.load(self._entry, slots, slot)

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(())
