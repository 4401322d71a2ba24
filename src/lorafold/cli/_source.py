"""From what stands on a command line to adapters: sources as in Python, a Hub id, NAME=SOURCE."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import MismatchError

if TYPE_CHECKING:
    from ..adapter import Adapter
    from ..collection.sources import Handle
    from ..files import AdapterFile

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = [
    click.option("--alpha", type=float, help="α, for an adapter without adapter_config.json."),
    click.option("--revision", help="Branch, tag or commit, for an id on the Hub."),
    click.option("--allow-pickle", is_flag=True, help="Read adapter_model.bin too."),
]


def adapter_options(function: F) -> F:
    """The options of a command that reads adapters: what `opened` takes."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def library_of(text: str) -> str | None:
    """The library of LIB:NAME; None where the text is none."""
    from ..files.find import in_library

    found = in_library(text)
    return None if found is None else found[0]


def opened(text: str, **options: Any) -> AdapterFile:
    """The adapter at a path or Hub id, or LIB:NAME; as `open_adapter` gives it.

    Args:
        options: alpha, revision, allow_pickle, as it takes them.
    """
    from ..files import open_adapter

    return open_adapter(text, **options)


def loaded(text: str, **options: Any) -> Adapter:
    """The adapter that `opened` finds, in memory."""
    return opened(text, **options).load()


def named(sources: Iterable[str], pairs: Iterable[str] = (), **options: Any) -> dict[str, Handle]:
    """Every adapter that sources and NAME=SOURCE stand for, opened, by name; as Python has it.

    Args:
        options: alpha, revision, allow_pickle, as `named_handles` takes them.

    Raises:
        BadParameter: no `=` in a pair, or a name given twice.
        MismatchError: two with one name. FileError: a source that is not there.
    """
    from ..collection.sources import TwiceNamedError, named_handles

    given: dict[str, str] = {}
    for pair in pairs:
        name, equals, source = pair.partition("=")
        if not (name and equals and source):
            raise click.BadParameter(f"{pair!r} is not NAME=SOURCE", param_hint="--name")
        if name in given:
            raise click.BadParameter(f"{name!r} is given twice", param_hint="--name")
        given[name] = source
    texts = list(sources)
    if not texts and not given:
        raise click.UsageError(
            "give adapters, or NAME=SOURCE with --name", click.get_current_context()
        )
    try:
        return named_handles([*texts, given], **options)
    except TwiceNamedError as e:
        raise MismatchError(f"{e.found}: give one a name of its own with --name") from None
