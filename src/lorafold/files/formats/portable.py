"""Adapters by what their modules do: a file whose keys are roles, and the names they came from.

It is one safetensors file. Each update has its factors under `<role>.A` and `<role>.B`, as they
are; the header's metadata has, for every role, the path it had, its scale, and what else is needed
to give the adapter back bit for bit; and of fused modules, where the base was there to say it, how
they pack their parts, so that other architectures can take them apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ...adapter import Adapter
from ...errors import FileError, MismatchError
from ...parts import Layout
from ...roles.fused import Packing
from ...roles.onto import known_packings, one_each
from ...roles.role import Role
from ...roles.roles import Tables, roles
from ..config import json_object, plain
from .reading import Format, Found, Plan, Slot, Source, Stored

FORMAT, VERSION = "lorafold-portable", 1
_EXTRA = "extra:"
_BASE = "base_model_name_or_path"


def portable_form(
    adapter: Adapter,
    *,
    dtype: torch.dtype | None = None,
    base_model: str | None = None,
    base: Any = None,
    tables: Tables = (),
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header's metadata that `save` writes.

    Raises:
        MismatchError: modules without a role or with the same, or a config that is no JSON.
    """
    found = one_each(roles(adapter, tables))
    name = base_model or adapter.base_model
    packings = known_packings(found, name if base is None else base)
    tensors: dict[str, Tensor] = {}
    modules: dict[str, Any] = {}
    for path, role in found.items():
        u, layout = adapter[path], adapter.layout(path)
        tensors[f"{role}.A"], tensors[f"{role}.B"] = (
            t if dtype is None else t.to(dtype) for t in (u.A, u.B)
        )
        said: dict[str, Any] = {"path": path, "scale": u.scale}
        if layout != Layout():
            said["layout"] = asdict(layout)
        if path in packings:
            said["packing"] = asdict(packings[path])
        modules[str(role)] = said
    tensors |= {f"{_EXTRA}{key}": t for key, t in adapter.extras.items()}
    config = plain(adapter.config)
    if name and name != config.get(_BASE):
        config[_BASE] = name
    try:
        told = {"modules": json.dumps(modules), "config": json.dumps(config, allow_nan=False)}
    except (TypeError, ValueError) as e:
        raise MismatchError(f"the adapter's config can't be written as JSON: {e}") from e
    return tensors, {"format": FORMAT, "version": str(VERSION), **told}


def _claims(source: Source) -> bool:
    return source.metadata.get("format") == FORMAT


def _found(source: Source) -> Found:
    """What the file holds, by its header.

    Raises:
        FileError: a later version, or a header that contradicts itself; naming file and field.
    """
    tensors, metadata, where = source.tensors, source.metadata, source.where
    source.refuse_alpha("a portable file has its scales")
    version = metadata.get("version", "")
    if not version.isdecimal() or int(version) > VERSION:
        raise FileError(f"{where}: version {version!r} of the portable format; update lorafold")
    config, modules = (_object(metadata, field, where) for field in ("config", "modules"))
    slots: dict[str, Slot] = {}
    packings: dict[str, Packing] = {}
    for role, said in modules.items():
        try:
            path, slot, packing = _module(role, said, tensors)
        except (LookupError, TypeError, ValueError, OverflowError) as e:  # ours are ValueErrors too
            raise FileError(f"{where}: what the header says of {role!r} is damaged ({e})") from e
        if path in slots:
            raise FileError(f"{where}: two roles came from {path!r}")
        slots[path] = slot
        if packing is not None:
            packings[path] = packing
    factors = {key for slot in slots.values() for key in (slot.A, slot.B)}
    strange = [key for key in tensors if key not in factors and not key.startswith(_EXTRA)]
    if strange:
        raise FileError(f"{where}: the header's modules do not tell what {strange[0]!r} is")
    keyed = {key if key in factors else key.removeprefix(_EXTRA): t for key, t in tensors.items()}
    extras = tuple(key.removeprefix(_EXTRA) for key in tensors if key not in factors)
    return Found(Plan(slots, extras), config, keyed, packings=packings)


def _factors(tensors: Sequence[Tensor], slot: Slot) -> tuple[Tensor, Tensor]:
    A, B = tensors
    return A, B


def _module(
    role: str, said: Mapping[str, Any], tensors: Mapping[str, Stored]
) -> tuple[str, Slot, Packing | None]:
    """Path, place in the file, and packing of one module."""
    Role.parse(role)
    path, scale = said["path"], said["scale"]
    if not isinstance(path, str) or isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError("path must be a text, and scale a number")
    A, B = (tensors[f"{role}.{letter}"] for letter in "AB")
    if len(A.shape) != 2 or len(B.shape) != 2 or A.shape[0] != B.shape[1]:
        raise ValueError(f"A {A.shape} and B {B.shape} are no factors of one update")
    layout = _layout(said["layout"]) if "layout" in said else Layout()
    packing = None
    if "packing" in said:
        given = said["packing"]
        packing = Packing(tuple(given["words"]), tuple(given["shares"]), given["groups"])
    shape = (B.shape[0], A.shape[1])
    keys, dtype = (f"{role}.A", f"{role}.B"), torch.promote_types(A.dtype, B.dtype)
    slot = Slot(*keys, shape, A.shape[0], float(scale), layout, dtype, form=PORTABLE.name)
    return path, slot, packing


def _layout(said: Mapping[str, Any]) -> Layout:
    kind, kernel, expert = said["kind"], said["kernel"], said["expert"]
    if kind not in ("linear", "embedding", "conv", "expert"):
        raise ValueError(f"no layout is of the kind {kind!r}")
    return Layout(
        kind,
        tuple(map(int, kernel)),
        str(said["parameter"]),
        None if said["stem"] is None else str(said["stem"]),
        None if expert is None else (int(expert[0]), int(expert[1])),
        bool(said["transposed"]),
    )


def _object(metadata: Mapping[str, str], field: str, where: str) -> dict[str, Any]:
    return json_object(metadata.get(field, ""), f"{where}: the header's {field!r}")


PORTABLE = Format("portable", "lorafold's own, by roles", _claims, _found, _factors)
