"""From what stands on a command line to adapters: sources as in Python, a Hub id, NAME=SOURCE."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import MismatchError
from ._writing import DTYPES, torch_dtype

if TYPE_CHECKING:
    from ..adapter import Adapter
    from ..collection.sources import Handle
    from ..files import AdapterFile

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = [
    click.option("--alpha", type=float, help="α, for an adapter that does not say its own."),
    click.option("--revision", help="Branch, tag or commit, for an id on the Hub."),
    click.option("--allow-pickle", is_flag=True, help="Read adapter_model.bin too."),
]
_BASE = click.option("--base", metavar="DIR", help="The base's folder, for GGUF files.")
_DTYPE = click.option("--dtype", type=click.Choice(DTYPES), help="What 8-bit factors are read in.")

format_option = click.option("--format", help="Whose form it is, where the keys are of two.")

base_option = click.option(
    "--base-model", help="Name of the base, where the sources spell it differently."
)


def adapter_options(function: F) -> F:
    """The options of a command that reads the numbers of adapters: what `opened` takes."""
    return source_options(_DTYPE(function))


def adapter_options_beside_base(function: F) -> F:
    """`adapter_options` of a command that is told the base in a way of its own: `base` for them."""
    return source_options_beside_base(_DTYPE(function))


def source_options(function: F) -> F:
    """Those of one that reads none, or writes adapters and has a --dtype for that.

    Not for: leaving that out; `opened` takes it as well.
    """
    return source_options_beside_base(_BASE(function))


def source_options_beside_base(function: F) -> F:
    """`source_options` of a command that is told the base in a way of its own: `base` for them."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def reading_of(options: dict[str, Any]) -> dict[str, Any]:
    """What `adapter_options` and `base_option` gave, taken out of the options of a command."""
    names = ("alpha", "revision", "allow_pickle", "base", "base_model", "dtype")
    return {name: options.pop(name) for name in names if name in options}


def library_of(text: str) -> str | None:
    """The library of LIB:NAME; None where the text is none."""
    from ..files.find import in_library

    found = in_library(text)
    return None if found is None else found[0]


def touched(sources: Iterable[str], handles: Mapping[str, Handle]) -> list[Any]:
    """What must not be written to: the sources, the libraries that they lie in, their files."""
    texts = list(sources)
    return [*texts, *map(library_of, texts), *(h.path for h in handles.values())]


def opened(text: str, **options: Any) -> AdapterFile:
    """The adapter at a path or Hub id, or LIB:NAME; as `open_adapter` gives it.

    Args:
        options: alpha, revision, allow_pickle, base, format, tolerance, as it takes them; dtype's
            name.
    """
    from ..files import open_adapter

    return open_adapter(text, **_reading(options))


def loaded(text: str, **options: Any) -> Adapter:
    """The adapter that `opened` finds, in memory."""
    return opened(text, **options).load()


def named(sources: Iterable[str], pairs: Iterable[str] = (), **options: Any) -> dict[str, Handle]:
    """Every adapter that sources and NAME=SOURCE stand for, opened, by name; as Python has it.

    Args:
        options: as `named_handles` takes them, but dtype's name.

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
        return named_handles([*texts, given], **_reading(options))
    except TwiceNamedError as e:
        raise MismatchError(f"{e.found}: give one a name of its own with --name") from None


def _reading(options: Mapping[str, Any]) -> dict[str, Any]:
    return {**options, "dtype": torch_dtype(options.get("dtype"))}
