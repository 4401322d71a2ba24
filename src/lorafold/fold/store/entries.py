"""What a library says of a module and of an adapter: the records of its files.

docs/formats.md describes the fields. Every one is checked as it is read; records never change.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NamedTuple

from ...errors import FileError
from ...parts import Layout
from ..options import FORMS
from .fields import (
    Wrong,
    an_object,
    count,
    encoded,
    flag,
    mapped,
    matching,
    number,
    one_of,
    read,
    text,
    tuple_of,
)
from .shard_writer import SHARD_NAME

_BASIS = re.compile(r"(U|V|A|B)(0|[1-9][0-9]{0,4})")
_SHA256 = re.compile(r"[0-9a-f]{64}")

shard_name = matching(SHARD_NAME, "the name of a shard")
sha256 = matching(_SHA256, "a SHA-256 in hexadecimal")
sizes = tuple_of(count)


class Piece(NamedTuple):
    """A piece of a shared basis: a tensor of a shard, and how many vectors it holds."""

    shard: str
    tensor: str
    columns: int


def _piece(value: Any) -> Piece:
    if type(value) is not list or len(value) != 3:
        raise Wrong("[shard, tensor, columns]")
    return Piece(shard_name(value[0]), text(value[1]), count(value[2]))


def _shape(value: Any) -> tuple[int, int]:
    found = sizes(value)
    if len(found) != 2 or 0 in found or max(found) >= 1 << 31:
        raise Wrong("[out, in]")
    return found[0], found[1]


def _layout(value: Any) -> Layout:
    try:
        found = read(Layout, value, _LAYOUT, "it")
    except FileError as e:
        raise Wrong(f"a layout ({e})") from None
    if (found.kind == "expert") != (found.expert is not None):
        raise Wrong("a layout, with the expert's index and count for experts only")
    return found


def _expert(value: Any) -> tuple[int, int]:
    found = sizes(value)
    if len(found) != 2 or not found[0] < found[1]:
        raise Wrong("[index, count]")
    return found[0], found[1]


_LAYOUT: dict[str, Callable[[Any], Any]] = {
    "kind": one_of("linear", "embedding", "conv", "expert"),
    "kernel": sizes,
    "parameter": text,
    "stem": text,
    "expert": _expert,
    "transposed": flag,
}


def layout_to_json(layout: Layout) -> dict[str, Any]:
    """A layout's fields that are not the default's."""
    default = asdict(Layout())
    return {k: v for k, v in asdict(layout).items() if v != default[k]}


@dataclass(frozen=True, slots=True)
class ModuleEntry:
    """What the manifest says of a module.

    Args:
        path: in the base model's own names. shape: (out, in). form: how `fold` planned it.
        bases: basis ("U0", …) → its pieces. wide: for flat, whether loadings are float32.
        layout: None for a plain linear layer. certificate: of shared sides.
        clamped: how many directions there were, where a rank asked for more.
    """

    path: str
    shape: tuple[int, int]
    form: str
    bases: Mapping[str, tuple[Piece, ...]] = field(default_factory=dict)
    wide: bool = False
    layout: Layout | None = None
    certificate: Mapping[str, float] = field(default_factory=dict)
    clamped: int | None = None

    def extended(self, bases: Mapping[str, tuple[Piece, ...]]) -> ModuleEntry:
        """With more pieces at the ends of its bases."""
        if not bases:
            return self
        longer = {name: (*self.bases.get(name, ()), *pieces) for name, pieces in bases.items()}
        return replace(self, bases={**self.bases, **longer})

    def to_json(self) -> dict[str, Any]:
        """As the manifest has it."""
        found = _without_defaults(self)
        if self.layout is not None:
            found["layout"] = layout_to_json(self.layout)
        return found

    @classmethod
    def from_json(cls, value: Any) -> ModuleEntry:
        """The inverse of `to_json`.

        Raises:
            FileError: naming the field.
        """
        where = f"module {value.get('path')!r:.80}" if type(value) is dict else "a module"
        found = read(cls, value, _MODULE, where)
        pieces = [piece[:2] for pieces in found.bases.values() for piece in pieces]
        if len(set(pieces)) < len(pieces):
            raise FileError(f"{where} has a piece of a basis twice")
        return found


_MODULE: dict[str, Callable[[Any], Any]] = {
    "path": text,
    "shape": _shape,
    "form": one_of(*FORMS),
    "bases": mapped(tuple_of(_piece), matching(_BASIS, "the name of a basis")),
    "wide": flag,
    "layout": _layout,
    "certificate": mapped(number),
    "clamped": count,
}


@dataclass(frozen=True)
class Rows:
    """Whose records a shard holds.

    Args:
        first, last: the lowest and the highest id; other shards have none between. count: how many
            rows there are, by rising ids. gone: ids of those that have left since, rising.
    """

    first: int
    last: int
    count: int
    gone: tuple[int, ...] = ()

    @property
    def alive(self) -> int:
        """How many adapters are still there."""
        return self.count - len(self.gone)

    def without(self, ids: Iterable[int]) -> Rows:
        """After some have left."""
        return replace(self, gone=tuple(sorted({*self.gone, *ids})))

    @functools.cached_property
    def line(self) -> bytes:
        """As the manifest has it, behind the file's checksums."""
        gone = {"gone": self.gone} if self.gone else {}
        return encoded({"ids": [self.first, self.last], "rows": self.count, **gone})[1:-1]


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """What the manifest says of an adapter.

    Args:
        name: any text. order: its place among the names. id: which its records have in whatever
            shard they are; no other adapter of the library ever has the same.
        digest: of the original's tensors. file_bytes, parameters, rank: of the original; the rank
            is one number, or a list in the order of the modules, 0 where it has none.
        error: ‖ΔŴ − ΔW‖ / ‖ΔW‖. bits: packed bits a parameter; None for exact.
        tolerance: its own bound. exact: all of its records are exact. refusal: why ΔW algebra is
            refused. config: {"set", "drop"}: what turns the common config into its own.
        extras: file key → tensor of the shard. layouts: where they differ from the modules'.
        groups: side ("in", "out") → the number of its init group.
    """

    name: str
    order: int
    id: int
    digest: str
    file_bytes: int
    parameters: int
    rank: int | tuple[int, ...]
    error: float
    bits: float | None = None
    tolerance: float | None = None
    exact: bool = False
    refusal: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, str] = field(default_factory=dict)
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    groups: Mapping[str, int] = field(default_factory=dict)

    def bound(self, common: float | None) -> float | None:
        """What its error keeps below, where the library's bound is `common`."""
        if self.exact:
            return 0.0
        return common if self.tolerance is None else self.tolerance

    def rank_at(self, j: int) -> int:
        """The original's rank at module number j; 0 where it is not known to have it."""
        if isinstance(self.rank, int):
            return self.rank
        return self.rank[j] if j < len(self.rank) else 0

    @property
    def ranks(self) -> tuple[int, ...]:
        """The original's different ranks, in the order of the modules."""
        ranks = (self.rank,) if isinstance(self.rank, int) else self.rank
        return tuple(dict.fromkeys(r for r in ranks if r))

    def to_json(self) -> dict[str, Any]:
        """As a list of adapters has it."""
        found = _without_defaults(self)
        if self.layouts:
            found["layouts"] = {path: layout_to_json(x) for path, x in self.layouts.items()}
        return found

    @classmethod
    def from_json(cls, value: Any) -> AdapterEntry:
        """The inverse of `to_json`.

        Raises:
            FileError: naming the field.
        """
        named = f" {value.get('name')!r:.80}" if type(value) is dict else ""
        where = f"the library's adapter{named}"
        return read(cls, value, _ADAPTER, where)


def _rank(value: Any) -> int | tuple[int, ...]:
    return sizes(value) if type(value) is list else count(value)


def _difference(value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise Wrong("an object")
    tuple_of(text)(value.get("drop", []))
    an_object(value.get("set", {}))
    return value


_ADAPTER: dict[str, Callable[[Any], Any]] = {
    "name": text,
    "order": count,
    "id": count,
    "digest": sha256,
    "file_bytes": count,
    "parameters": count,
    "rank": _rank,
    "error": number,
    "bits": number,
    "tolerance": number,
    "exact": flag,
    "refusal": text,
    "config": _difference,
    "extras": mapped(text),
    "layouts": mapped(_layout),
    "groups": mapped(count, one_of("in", "out")),
}


def _without_defaults(record: Any) -> dict[str, Any]:
    """A record's fields that differ from what is taken where they are missing."""
    found = {f.name: getattr(record, f.name) for f in fields(record)}
    return {k: v for k, v in found.items() if v is not None and v is not False and v != {}}


def config_difference(common: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What turns `common` into `config`."""
    changed = {
        k: v
        for k, v in config.items()
        if k not in common or common[k] != v or type(common[k]) is not type(v)
    }
    dropped = [k for k in common if k not in config]
    return {**({"set": changed} if changed else {}), **({"drop": dropped} if dropped else {})}
