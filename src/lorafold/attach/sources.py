"""Where an attached adapter comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import MismatchError, RefusedError
from ..fold import Library
from ..fold.coding.record import StoredPart
from ..layers.sites import Place
from ..layers.swap import device_of
from ..lowrank import LowRank
from ..parts import PREFIX, extra_kind
from .run.factors import Factors, Fresh, Modulation
from .run.patch import Patch
from .run.slots import GROUPS
from .specs import Spec

if TYPE_CHECKING:
    from .live import Live
    from .state import Core


@dataclass
class Source:
    """Where an attached adapter comes from: one of the three.

    Args:
        adapter: held as it was given. library: that holds it. key: of the trained factors.
        spec: that trained factors were made from. rank: its largest. config: it is saved with.
    """

    rank: int
    adapter: Adapter | None = None
    library: Library | None = None
    key: str | None = None
    spec: Spec | None = None
    config: Mapping[str, Any] | None = None


def saved_extras(live: Core, name: str) -> dict[str, Tensor]:
    """The copies of a trained adapter as a file holds them."""
    return {
        f"{PREFIX}{path}.{key}": value.detach().clone()
        for path, patch in live.saved.items()
        if name in patch.keys
        for key, value in patch.copy_of(name).state_dict().items()
    }


def library_sources(library: Library) -> dict[str, Source]:
    """A source for each of a library's adapters."""
    found = {}
    for name, entry in library.store.manifest["adapters"].items():
        ranks = entry["rank"]
        # What coding added (a residual part) may come on top of the file's own rank.
        rank = max(ranks) if isinstance(ranks, list) else ranks
        found[name] = Source(2 * rank, library=library)
    return found


def slots_within(library: Library, nbytes: int, dtype: torch.dtype) -> int:
    """How many adapters fit in so many bytes, judged by the first one.

    Raises:
        MismatchError: not even one.
    """
    name = library.names[0]
    each = 0
    for m in library.modules:
        for part in library.parts(name, m["path"]):
            each += (part.left.numel() + part.right.numel()) * dtype.itemsize
    if nbytes < each:
        raise MismatchError(f"cache= of {nbytes} bytes holds no adapter: one takes {each}")
    return max(1, min(len(library), nbytes // max(each, 1)))


class Sides:
    """The shared sides of a library's modules, each on its layer's device; read once.

    Args:
        library: the library. dtype: of the sides.
    """

    def __init__(self, library: Library, dtype: torch.dtype) -> None:
        self._library, self._dtype = library, dtype
        self._numbers = {m["path"]: j for j, m in enumerate(library.modules)}
        self._known: dict[str, dict[str, tuple[Tensor | None, list[int]]]] = {}

    def at(self, patch: Patch) -> dict[str, tuple[Tensor | None, list[int]]]:
        """For "U" and "V": all bases side by side, (d, ΣR), and where each begins."""
        if patch.path not in self._known:
            self._known[patch.path] = {
                side: self._joined([b.columns for b in bases], patch)
                for side, bases in self._library.sides(self._numbers[patch.path]).items()
            }
        return self._known[patch.path]

    def _joined(self, columns: list[Tensor], patch: Patch) -> tuple[Tensor | None, list[int]]:
        starts = [0]
        for c in columns:
            starts.append(starts[-1] + c.shape[1])
        if not columns:
            return None, starts
        return torch.cat(columns, 1).to(patch.device, self._dtype), starts


def write_library_adapter(live: Core, slot: int, name: str, library: Library) -> None:
    """Read an adapter's parts from its library into a slot.

    Raises:
        RefusedError: it is stored exactly because ΔW algebra would be wrong for it, or carries
            tensors that would not be run.
    """
    refuse_adapter(library, name)
    assert live.sides is not None
    for path, patch in live.patches.items():
        first = 0
        for group, parts in _by_group(library.parts(name, path)).items():
            sides = live.sides.at(patch)
            U = sides["U"][0] if group in ("both", "out") else None
            V = sides["V"][0] if group in ("both", "in") else None
            u = _joined_core(parts, patch, sides)
            live.slots.write(slot, path, u, U, V, first)
            first += u.rank


def refuse_adapter(library: Library, name: str) -> None:
    """Raise a `RefusedError` for an adapter that can't be run from its library."""
    entry: Mapping[str, Any] = library.entry(name)
    if entry.get("refusal"):
        raise RefusedError(f"adapter {name!r}: {entry['refusal']}")
    refuse_extras(name, entry.get("extras", {}), library.config(name))


def _by_group(parts: list[StoredPart]) -> dict[str, list[StoredPart]]:
    found: dict[str, list[StoredPart]] = {}
    for part in parts:
        found.setdefault(GROUPS[part.U is not None, part.V is not None], []).append(part)
    return found


def _joined_core(
    parts: list[StoredPart], patch: Patch, sides: Mapping[str, tuple[Tensor | None, list[int]]]
) -> LowRank:
    """Parts of one group as one update in the joined coordinates."""
    lefts, rights = [], []
    for part in parts:
        lefts.append(part.scale * _placed(part.left, part.U, sides["U"]))
        rights.append(_placed(part.right.T, part.V, sides["V"]).T)
    return LowRank(torch.cat(rights), torch.cat(lefts, 1))


def _placed(X: Tensor, number: int | None, side: tuple[Tensor | None, list[int]]) -> Tensor:
    """Coordinates (R, k) in one basis as coordinates (ΣR, k) in all of them."""
    if number is None:
        return X
    starts = side[1]
    whole = X.new_zeros(starts[-1], X.shape[1])
    whole[starts[number] : starts[number] + len(X)] = X
    return whole


def refuse_extras(name: str, extras: Iterable[str], config: Mapping[str, Any]) -> None:
    """Raise a `RefusedError` for extra tensors that would not be run."""
    for key in extras:
        kind = extra_kind(key, config)
        if kind != "training state":
            raise RefusedError(
                f"adapter {name!r} carries {key!r} ({kind}), which does not run from a library: "
                "attach library[name] itself, or apply it to the weights (adapter.apply_to)"
            )


def taken(live: Live, path: str) -> list[int]:
    """The singular directions of a layer's weight that kept rounds have taken."""
    found: list[int] = []
    for name in live.kept:
        fresh = live.fresh_at(name, path)
        if isinstance(fresh, Modulation):
            found += fresh.index.tolist()
    return found


def _trained_factors(
    a: Adapter, places: Mapping[str, Place], dtype: torch.dtype
) -> tuple[dict[str, Fresh], Source]:
    fresh: dict[str, Fresh] = {}
    for path, place in places.items():
        u = a[path].to(device_of(place.layer), dtype)
        fresh[path] = Factors(place.kind, u.A.clone(), u.B.clone(), u.scale)
    return fresh, Source(a.rank, config=dict(a.config))


def _add_trained(live: Live, name: str, fresh: Mapping[str, Fresh], source: Source) -> None:
    hidden = () if live._merged is None else live._merged[1].values()  # behind what is merged
    live.board.frozen.freeze([*live.model.parameters(), *(p for p in hidden if p is not None)])
    taken = {s.key for s in live._sources.values()}
    source.key = next(k for i in range(len(taken) + 1) if (k := f"t{i}") not in taken)
    live._sources[name] = source
    ranks = torch.zeros(len(live.patches), dtype=torch.int64)
    scales = torch.zeros(len(live.patches), dtype=torch.float64)
    for path, module in fresh.items():
        patch = live.patches[path]
        patch.put(name, source.key, module)
        ranks[patch.index], scales[patch.index] = module.rank, module.scale
    live._trained[source.key] = (ranks, scales)
