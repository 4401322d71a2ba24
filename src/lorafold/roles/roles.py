"""Module paths to roles: the longest end of a path that is in a table tells its kind.

Everything else follows from the path: the layer and the expert are its numbers, the side is what
its words say. A path that no table knows is listed and never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import MismatchError
from ..naming import kind as kind_of
from .names import config_of, plain_path, weights_in
from .role import Role
from .tables import combined, ends, numbers_in, side_of

Tables = Mapping[str, str] | Sequence[Mapping[str, str]]


def roles(x: Any, tables: Tables = ()) -> dict[str, Role]:
    """What each module of a model does: {module path: `Role`}.

    Not for: which modules an update may go to, which `attach` decides; nor an adapter's folder
    (`lf.roles(lf.load(path))`).

    Args:
        x: a model, its configuration (transformers', or the content of a config.json; either takes
            transformers to tell the modules), a folder with its safetensors files or config.json,
            a state dict, an `Adapter`, or module paths.
        tables: {end of a path: kind}, or a list of such, for what the built-in table does not
            know; they go before it. Numbers in an end are written "#", a side goes before the kind
            ("vision.embedding.patch").

    Returns:
        {path: Role} of all modules with a weight that an update can go to, in the order of `x`.

    Raises:
        MismatchError: paths that no table knows, all of them named; a table that is none.
        FileError: a folder without a base in it.
        MissingExtraError: a configuration, and transformers is not installed.

    Examples:
        >>> import lorafold as lf
        >>> found = lf.roles(["model.layers.3.self_attn.q_proj", "model.layers.3.mlp.down_proj"])
        >>> [str(role) for role in found.values()]
        ['decoder.3.attention.query', 'decoder.3.mlp.down']
        >>> lf.roles(["net.7.wq"], {"wq": "attention.query"})["net.7.wq"].layer
        7
    """
    found, unknown = told(x, tables)
    if unknown:
        shown = ", ".join(map(repr, unknown[:5])) + (", …" if len(unknown) > 5 else "")
        last = unknown[0].rpartition(".")[2]
        of = len(unknown) + len(found)
        raise MismatchError(
            f"no role is known for {len(unknown)} of {of} module paths: {shown}; give "
            f"tables={{end of the path: kind}}, such as {{{last!r}: 'attention.query'}}"
        )
    return found


def told(x: Any, tables: Tables = ()) -> tuple[dict[str, Role], list[str]]:
    """The roles of the modules that a table knows, and the paths of the others.

    Args:
        x, tables: as in `roles`.
    """
    return recognised(weights_in(x), tables, default_side(x))


def recognised(
    names: Iterable[str], tables: Tables = (), otherwise: str = "decoder"
) -> tuple[dict[str, Role], list[str]]:
    """The roles of the paths that a table knows, and the paths that none does.

    Args:
        names: module paths, or names of their weights.
        tables: as in `roles`.
        otherwise: the side of what no word of its path gives one.
    """
    known = combined(tables)
    found: dict[str, Role] = {}
    unknown = []
    for name in names:
        role = _role(plain_path(name), known, otherwise)
        if role is None:
            unknown.append(name)
        else:
            found[name] = role
    return found, unknown


def default_side(x: Any) -> str:
    """The side of what no word of its path gives one: by the model's configuration."""
    config = config_of(x)
    if "patch_size" in config and "vision_config" not in config:
        return "vision"
    return "decoder"


_EXPERT = re.compile(r"\[(\d+)\]$")


def _role(path: str, tables: list[dict[str, tuple[str, str]]], otherwise: str) -> Role | None:
    match = _EXPERT.search(path)
    bare = path[: match.start()] if match else path
    pattern = kind_of(bare)
    meant = next((t[end] for t in tables for end in ends(pattern) if end in t), None)
    if meant is None:
        return None
    said, kind = meant
    words = bare.split(".")
    layer, expert = numbers_in(words)
    side = side_of(words, kind, said, otherwise)
    return Role(kind, layer, side, int(match[1]) if match else expert)
