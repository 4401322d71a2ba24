"""From what stands on a command line to adapters: sources as in Python, a Hub id, NAME=SOURCE."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import FileError, MismatchError

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
    """The adapter at a path or Hub id, or LIB:NAME.

    Args:
        options: alpha, revision, allow_pickle, as `open_adapter` takes them.

    Raises:
        FileError: a library without a name after it, or what `open_adapter` says.
        UnknownNameError: the library has no such name.
    """
    from ..files import AdapterFile, load_many, open_adapter
    from ..files.find import in_library, in_subspace, is_library
    from ..fold import Library

    inside = in_subspace(text)
    if inside is not None:
        return AdapterFile.of(
            load_many(inside[0], alpha=options.get("alpha"))[inside[1]], Path(text)
        )
    found = in_library(text)
    if found is not None:
        with Library.open(found[0]) as lib:
            entry = lib.entry(found[1])
            return AdapterFile.of(lib[found[1]], Path(text), int(entry["file_bytes"]))
    if is_library(text):
        raise FileError(f"{text} is a library; name one of its adapters, as {text}:NAME")
    _check_no_slip(text, options)
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
    for text in [*texts, *given.values()]:
        _check_no_slip(text, options)
    try:
        return named_handles([*texts, given], **options)
    except TwiceNamedError as e:
        raise MismatchError(f"{e.found}: give one a name of its own with --name") from None


def _check_no_slip(text: str, options: Mapping[str, Any]) -> None:
    """Refuse what is a slip in a path, most likely: the Hub would be asked for it in vain.

    Args:
        options: with `revision`, where the command has it: that says that it is an id on the Hub.

    Raises:
        FileError: nothing there, where its folder is.
    """
    from glob import has_magic

    if options.get("revision") or has_magic(text) or os.path.exists(text):
        return
    from ..files.find import in_subspace

    if library_of(text) is None and in_subspace(text) is None and os.path.exists(Path(text).parent):
        asks = "revision" in options and text.count("/") == 1
        hint = " (for an id on the Hub, give --revision main)" if asks else ""
        raise FileError(f"no such file or directory: {text!r}{hint}")
