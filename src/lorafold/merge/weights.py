"""A number for each adapter, which may differ from module to module.

Weights and densities are given alike: one for all, one each, `{name: number}`, or
`{name: {pattern: number}}`, a pattern being what it is in PEFT's `rank_pattern`: a regular
expression that must match the end of the module's path, from a dot on; the first that matches
counts, and what none matches has the default.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ..errors import MismatchError, UnknownNameError
from ..words import did_you_mean, one_line

Patterns = Mapping[str, float]


@dataclass(frozen=True)
class PerAdapter:
    """What every adapter has at every module.

    Args:
        given: for each adapter a number, or {pattern: number}.
        default: what a module has that no pattern matches.
    """

    given: tuple[float | Patterns, ...]
    default: float

    def at(self, path: str) -> tuple[float, ...]:
        """The adapters' numbers at a module."""
        return tuple(self._one(value, path) for value in self.given)

    def _one(self, value: float | Patterns, path: str) -> float:
        if isinstance(value, Mapping):
            if path in value:  # the whole path says more than any pattern
                return value[path]
            return next((v for p, v in value.items() if _matches(p, path)), self.default)
        return value

    def check_paths(self, paths: Iterable[str], what: str) -> None:
        """Refuse patterns that match no module: a slip, most likely.

        Raises:
            MismatchError: naming the pattern.
        """
        known = dict.fromkeys(paths)
        for value in self.given:
            for pattern in value if isinstance(value, Mapping) else ():
                if pattern not in known and not any(_matches(pattern, p) for p in known):
                    raise MismatchError(
                        f"{what}: the pattern {pattern!r} matches none of the {len(known)} "
                        f"modules, e.g. {next(iter(known), None)!r}"
                    )


def per_adapter(
    given: Any, names: Sequence[str], default: float, what: str = "weights"
) -> PerAdapter:
    """The numbers as a user gives them, checked.

    Args:
        given: None, one for each name, {name: number} or {name: {pattern: number}}.
        names: the adapters, in order.
        default: where nothing is given.
        what: their name in messages.

    Raises:
        MismatchError: of another number than names, or none that is finite.
        UnknownNameError: for a name that is not there.
    """
    if given is None:
        return PerAdapter((default,) * len(names), default)
    if isinstance(given, Mapping):
        unknown = [str(name) for name in given if name not in names]
        if unknown:
            hint = did_you_mean(unknown[0], names)
            raise UnknownNameError(f"{what} name {unknown[0]!r}, which is no source; {hint}")
        missing = [name for name in names if name not in given]
        if missing:
            raise MismatchError(f"{what} lack {', '.join(map(repr, missing))}: give one for each")
        return PerAdapter(tuple(_checked(given[n], f"{what} of {n!r}") for n in names), default)
    if hasattr(given, "tolist"):
        given = given.tolist()  # an array or a tensor
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise MismatchError(
            f"{what} must be one number for each source, {{name: number}} or "
            f"{{name: {{pattern: number}}}}, found {given!r}"
        )
    if len(given) != len(names):
        raise MismatchError(f"there are {len(given)} {what} for {len(names)} sources")
    pairs = zip(names, given, strict=True)
    return PerAdapter(tuple(_number(v, f"{what} of {n!r}") for n, v in pairs), default)


def densities(given: Any, names: Sequence[str]) -> PerAdapter:
    """Shares of entries to keep, in (0, 1]: as `per_adapter` takes them, or one for all.

    Raises:
        MismatchError: one out of range, or what `per_adapter` says.
    """
    if isinstance(given, Real) and not isinstance(given, bool):
        if not is_number(given):
            raise MismatchError(f"density must lie in (0, 1], found {one_line(given)}")
        given = [given] * len(names)
    found = per_adapter(given, names, 1.0, "densities")
    values = [v for g in found.given for v in (g.values() if isinstance(g, Mapping) else (g,))]
    for value in values:
        if not 0 < value <= 1:
            raise MismatchError(f"density must lie in (0, 1], found {value:g}")
    return found


def _checked(value: Any, what: str) -> float | Patterns:
    if not isinstance(value, Mapping):
        return _number(value, what)
    for pattern in value:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as e:
            raise MismatchError(f"{what}: {pattern!r} is no regular expression: {e}") from e
    return {pattern: _number(v, f"{what} at {pattern!r}") for pattern, v in value.items()}


def _number(value: Any, what: str) -> float:
    if not is_number(value):
        raise MismatchError(f"{what} must be a finite number, found {value!r}")
    return float(value)


def is_number(value: Any) -> bool:
    """Whether it is one, and finite as a float (10**400 is none)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _matches(pattern: str, path: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", path) is not None
