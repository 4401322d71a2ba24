"""`lorafold roles`: what the modules of a base or an adapter do."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import MismatchError
from . import _output as output
from ._bases import TABLE, tables_of
from ._command import command, settings
from ._source import opened, source_options

if TYPE_CHECKING:
    from rich.console import Console

    from ..roles import Packing, Role


@command("roles", example="lorafold roles adapters/sql")
@click.argument("path", metavar="PATH")
@click.option("--table", "tables", multiple=True, metavar="FILE", help=TABLE)
@source_options
def roles(path: str, tables: tuple[str, ...], **options: Any) -> None:
    """Show what the modules of a base or an adapter do.

    PATH is a base model's folder, or an adapter (a path, an id on the Hub, or LIB:NAME). Modules of
    one kind are shown in one row; with --verbose, and in --json, each has its own. A role is
    [side.][layer.]kind: decoder.3.attention.query.
    """
    from ..roles import known_packings, told

    base: str | None = path
    x: Any = path
    if not _is_base(Path(path)):
        file = opened(path, **options)
        x, base = list(file.shapes), file.base_model
    found, unknown = told(x, tables_of(tables, "--table"))
    if not found and not unknown:
        raise MismatchError(f"{path}: there are no modules in it that an update can go to")
    if unknown:
        row = json.dumps({unknown[0].rpartition(".")[2]: "attention.query"})
        raise MismatchError(
            f"{path}: no role is known for {output.count(len(unknown), 'modules')}: "
            f"{output.listed(unknown)}; give --table FILE, a JSON file such as {row}"
        )
    packed = known_packings(found, base)
    d = {
        "path": path,
        "roles": {module: _described(role, packed.get(module)) for module, role in found.items()},
    }
    output.report(d, lambda out: _show(out, found, packed))


def _is_base(path: Path) -> bool:
    from ..files.find import adapters_at, in_library, is_adapter, is_library

    if in_library(str(path)) is not None or not os.path.isdir(path) or is_library(str(path)):
        return False
    return adapters_at(path) == [path] and not is_adapter(path)


def _described(role: Role, packed: Packing | None) -> dict[str, Any]:
    """A role in JSON's types."""
    return {
        "role": str(role),
        "kind": role.kind,
        "layer": role.layer,
        "side": role.side,
        "expert": role.expert,
        "parts": [part.kind for part in role.parts],
        "packing": None if packed is None else {"shares": packed.shares, "groups": packed.groups},
    }


def _show(out: Console, found: Mapping[str, Role], packed: Mapping[str, Packing]) -> None:
    """A table by kind of path, or of every module with --verbose."""
    from ..naming import kind

    if settings().verbose:
        rows = [(module, str(role), _packed(packed.get(module))) for module, role in found.items()]
        output.table(out, ["module", "role", "packs"], rows)
        return
    kinds: dict[tuple[str, str], list[str]] = {}
    for module, role in found.items():
        bare = "" if role.expert is None else "[#]"
        name = f"{role.side}.{'' if role.layer is None else '#.'}{role.kind}{bare}".lstrip(".")
        kinds.setdefault((_without_expert(kind(module)), name), []).append(module)
    shown = [
        (module, name, len(members), _packed(packed.get(members[0])))
        for (module, name), members in kinds.items()
    ]
    output.table(out, ["module", "role", ">modules", "packs"], shown)


def _without_expert(path: str) -> str:
    return f"{path.rpartition('[')[0]}[#]" if path.endswith("]") else path


def _packed(how: Packing | None) -> str:
    """query, key, value as 4:1:1, 8 groups."""
    if how is None:
        return ""
    groups = "" if how.groups == 1 else f", {how.groups} groups"
    return f"{', '.join(how.words)} as {':'.join(map(str, how.shares))}{groups}"
