"""From what stands on a command line to adapters: a path, a Hub id, LIB:NAME, NAME=PATH."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import FileError

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
    from ..files import AdapterFile, open_adapter
    from ..files.find import in_library, is_library
    from ..fold import Library

    found = in_library(text)
    if found is not None:
        with Library.open(found[0]) as lib:
            entry = lib.entry(found[1])
            return AdapterFile.of(lib[found[1]], Path(text), int(entry["file_bytes"]))
    if is_library(text):
        raise FileError(f"{text} is a library; name one of its adapters, as {text}:NAME")
    if not Path(text).exists() and Path(text).parent.exists() and not options.get("revision"):
        # A slip in a path, most likely, and the Hub would be asked in vain.
        hint = "" if text.count("/") != 1 else " (for an id on the Hub, give --revision main)"
        raise FileError(f"no such file or directory: {text!r}{hint}")
    return open_adapter(text, **options)


def loaded(text: str, **options: Any) -> Adapter:
    """The adapter that `opened` finds, in memory."""
    return opened(text, **options).load()


def opened_by_name(
    sources: Iterable[str], pairs: Iterable[str] = (), *, whole: bool = False, **options: Any
) -> dict[str, Handle]:
    """Every adapter that paths, globs, folders, LIB:NAME and NAME=SOURCE stand for.

    Args:
        pairs: each NAME=SOURCE. whole: a library stands for all that is in it; else it is refused.
        options: as for `opened`.

    Raises:
        BadParameter: no `=` in a pair.
        MismatchError: two with one name.
        FileError: a source without an adapter.
    """
    from ..collection.sources import named_handles
    from ..errors import MismatchError
    from ..files.find import adapters_at, in_library, is_library, matches, name_of
    from ..fold import Library

    found: list[tuple[str, str | Handle]] = []
    for source in sources:
        inside = in_library(source)
        if inside is not None:
            found.append((inside[1], source))
        elif whole and is_library(source):
            found += named_handles(Library.open(source)).items()
        elif is_library(source) or (not Path(source).exists() and "*" not in source):
            found.append((name_of(Path(source)), source))  # a Hub id, or what `opened` refuses
        else:
            places = (place for path in matches(source) for place in adapters_at(path))
            found += [(name_of(place), str(place)) for place in places]
    for pair in pairs:
        name, equals, source = pair.partition("=")
        if not (name and equals and source):
            raise click.BadParameter(f"{pair!r} is not NAME=SOURCE", param_hint="--name")
        found.append((name, source))
    handles: dict[str, Handle] = {}
    for name, given in found:
        if name in handles:
            raise MismatchError(f"two sources are both named {name!r}: name one, --name NAME=PATH")
        handles[name] = opened(given, **options) if isinstance(given, str) else given
    return handles


def named_sources(paths: Iterable[str], pairs: Iterable[str], alpha: float | None = None) -> Any:
    """Sources for `fold` and `verify` from paths and NAME=PATH.

    Args:
        alpha: α of the adapters of vLoRA folders.

    Raises:
        BadParameter: no `=` in a pair, or a name given twice.
        FileError: a path without an adapter.
    """
    named: dict[str, Any] = {}
    paths, subspaces = _without_subspaces(paths, alpha)
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not (name and equals and path):
            raise click.BadParameter(f"{pair!r} is not NAME=PATH", param_hint="--name")
        if name in named:
            raise click.BadParameter(f"{name!r} is given twice", param_hint="--name")
        named[name] = path
    if not named and not subspaces:
        return paths
    unnamed = subspaces | (paths_by_name(paths) if paths else {})
    twice = sorted(unnamed.keys() & named.keys())
    if twice:
        raise click.BadParameter(f"{twice[0]!r} is also a source's own name", param_hint="--name")
    return unnamed | named


def _without_subspaces(
    paths: Iterable[str], alpha: float | None
) -> tuple[list[str], dict[str, Any]]:
    """The other paths, and the adapters of vLoRA folders among them by name."""
    from ..files import load_many
    from ..files.find import is_subspace

    others: list[str] = []
    found: dict[str, Any] = {}
    for path in paths:
        if is_subspace(path):
            found |= load_many(path, alpha=alpha)
        else:
            others.append(path)
    return others, found


def paths_by_name(sources: Iterable[str]) -> dict[str, str]:
    """{default name: path} of every adapter that paths, folders of adapters and globs stand for.

    Raises:
        FileError: one that stands for none.
        MismatchError: two with one name.
    """
    from ..collection.sources import named_handles

    handles: Mapping[str, Any] = named_handles(list(sources))  # all of them `AdapterFile`s
    return {name: str(handle.path) for name, handle in handles.items()}
