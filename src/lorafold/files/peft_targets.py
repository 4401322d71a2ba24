"""Which modules a PEFT config finds, and a config's targets that find exactly given ones.

PEFT's rules: a list entry names a module or the end of a module's name, from a dot on; a string
is a regular expression for the whole name; `exclude_modules` and `modules_to_save` take modules
away; `layers_to_transform` keeps those whose layer number is in it. A list entry, even a full
path, also hits modules that end in it, so exact targets are written as one regular expression.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import MismatchError
from ..parts import saved_modules
from ..patterns import matches


def finds_module(config: Mapping[str, Any], path: str) -> bool:
    """Whether PEFT puts an adapter on the module at `path`.

    `"all-linear"` depends on the base and counts as found.
    """
    targets = config.get("target_modules")
    if targets is None or _excluded(config, path):
        return False
    if isinstance(targets, str):
        return targets.lower() == "all-linear" or _fullmatch(targets, path)
    if path in targets:
        return True
    return any(path.endswith(f".{t}") for t in targets) and _layer_wanted(config, path)


def exact_pattern(paths: Iterable[str]) -> str:
    r"""A regular expression that matches exactly these module paths.

    Examples:
        >>> exact_pattern(["h.0.q", "h.1.q"])
        'h\\.(0|1)\\.q'
    """
    # Paths that differ only in their first number share one alternative, so that the expression
    # grows with the kinds of module and not with the number of layers.
    numbered: dict[tuple[str, str], list[str]] = {}
    alternatives = []
    for path in paths:
        parts = path.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if at is None:
            alternatives.append(re.escape(path))
            continue
        before = "".join(f"{part}." for part in parts[:at])
        after = "".join(f".{part}" for part in parts[at + 1 :])
        numbered.setdefault((before, after), []).append(parts[at])
    for (before, after), numbers in numbered.items():
        middle = numbers[0] if len(numbers) == 1 else f"({'|'.join(numbers)})"
        alternatives.append(re.escape(before) + middle + re.escape(after))
    return "|".join(alternatives)


def parameters_of(config: Mapping[str, Any], module: str) -> list[str]:
    """The parameters of the module at `module` that `target_parameters` names."""
    found = []
    for target in config.get("target_parameters") or []:
        owner, _, parameter = target.rpartition(".")
        if not owner or module == owner or module.endswith(f".{owner}"):
            found.append(parameter)
    return list(dict.fromkeys(found))


def _excluded(config: Mapping[str, Any], path: str) -> bool:
    excluded = config.get("exclude_modules")
    if isinstance(excluded, str):
        if _fullmatch(excluded, path):
            return True
    elif excluded and any(path == e or path.endswith(f".{e}") for e in excluded):
        return True
    return any(_match(m, path, r"(^|.*\.)…($|\..*)") for m in saved_modules(config))


def _layer_wanted(config: Mapping[str, Any], path: str) -> bool:
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    patterns = config.get("layers_pattern") or []
    if isinstance(patterns, str):
        patterns = [patterns]
    layer = next((n for p in patterns for n in [_number(p, path)] if n is not None), None)
    if not patterns:
        match = re.match(r".*?\.[^.]*\.(\d+)\.", path)
        layer = None if match is None else int(match[1])
    if layer is None:
        return False
    return layer in wanted if isinstance(wanted, Sequence) else layer == wanted


def _number(pattern: str, path: str) -> int | None:
    """The first number between dots that comes after what the pattern means."""
    numbers = re.finditer(r"(?<=\.)\d+(?=\.)", path)
    before = r"(.*\.)?(…)\.\Z"
    return next((int(m[0]) for m in numbers if _match(pattern, path[: m.start()], before)), None)


def _fullmatch(pattern: str, path: str) -> bool:
    return _match(pattern, path, r"(?:…)\Z")


def _match(pattern: str, path: str, form: str) -> bool:
    try:
        return matches(pattern, path, form)
    except MismatchError as e:
        raise MismatchError(f"in the config {e}") from e
