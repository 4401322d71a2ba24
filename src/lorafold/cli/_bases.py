"""Two bases on a command line, and what it takes to run texts through them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from ..errors import FileError, MismatchError

F = TypeVar("F", bound=Callable[..., Any])

TABLE = "JSON file {end of a module's path: kind} for modules that aren't known; repeatable."
_OPTIONS = [
    click.option(
        "--tokenizers",
        multiple=True,
        metavar="T",
        help='A folder, or "bytes", instead of the bases\' own; twice: source, target.',
    ),
    click.option("--roles", "tables", multiple=True, metavar="FILE", help=TABLE),
    click.option("--device", help="Where the bases run."),
]


def pair_options(function: F) -> F:
    """The options of a command that runs two bases: tokenizers, tables, device."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def tokenizers_of(given: Sequence[str]) -> tuple[str | None, str | None]:
    """(of the source, of the target), as Python takes them.

    Raises:
        BadParameter: more than two.
    """
    if len(given) > 2:
        raise click.BadParameter(
            f"give one for both bases, or two, found {len(given)}", param_hint="--tokenizers"
        )
    if not given:
        return None, None
    return given[0], given[-1]


def tables_of(names: Iterable[str], flag: str = "--roles") -> list[dict[str, str]]:
    """Tables of roles from files.

    Args:
        flag: that they were given by.

    Raises:
        FileError: not there, or no JSON. MismatchError: no object in it.
    """
    from ..files.config import json_value, read_text

    tables = []
    for name in names:
        try:
            found = json_value(read_text(Path(name)), name)
        except FileError as e:
            raise FileError(f"{flag} {name}: can't be read as JSON ({e})") from e
        if not isinstance(found, dict):
            raise MismatchError(f"{flag} {name}: must hold an object {{end of a path: kind}}")
        tables.append(found)
    return tables
