"""What a shell offers where a word of a line is not whole yet: paths, LIB:NAME, names in a library.

A parameter's metavar says what it takes, as the help does. Click's own machinery
(https://click.palletsprojects.com/shell-completion) does the rest, but for bash, which takes the
colon of LIB:NAME for the end of a word.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click
from click.types import StringParamType

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

VARIABLE = "_LORAFOLD_COMPLETE"  # what a shell sets to ask
# Metavars, without brackets and dots, by what is offered for them.
SOURCES = {"A", "ADAPTER", "B", "IN", "NAME=SOURCE", "PATH", "SOURCE"}
NAMES = {"NAME"}  # in the library that the line names
FOLDERS = {"LIB", "DIR", "BASE", "BASE_DIR", "BASE_S", "BASE_T", "MERGED", "ROUTER", "TUNED"}
FILES = {"ALIGNMENT", "FILE", "HTML", "OUT", "TEXTS"}


def offers(parameter: click.Parameter) -> None:
    """Have a parameter offer what its metavar says."""
    if type(parameter.type) is StringParamType:
        parameter.type = _OFFERED.get(taken_by(parameter), parameter.type)


def taken_by(parameter: click.Parameter) -> str:
    """The metavar of a parameter, without brackets and dots; "" where it has none."""
    named = parameter.human_readable_name if isinstance(parameter, click.Argument) else ""
    return (parameter.metavar or named).upper().strip("[].")


class _Path(StringParamType):
    """A text that is a path, of any kind or of a folder."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return _items([incomplete], self._kind)


class _Source(StringParamType):
    """A text that is an adapter: a path, or LIB:NAME; behind NAME= where it has a name."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from ..files.find import in_library, is_library

        start = incomplete.find("=") + 1 if "=" in taken_by(param) else 0
        before, text = incomplete[:start], incomplete[start:]
        found = in_library(text)
        if found is not None:
            library, name = found
            there = (f"{library}:{n}" for n in names_in(library) if n.startswith(name))
            return _items(before + one for one in there)
        if is_library(text) and not text.endswith(os.sep):
            return _items([before + text, f"{before}{text}:"])
        return _items([incomplete], "file")


class _Name(StringParamType):
    """The name of an adapter in the library that the line has before it."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        library, taken = ctx.params.get("lib"), ctx.params.get(str(param.name)) or ()
        there = names_in(str(library)) if library else []
        return _items(n for n in there if n.startswith(incomplete) and n not in taken)


def names_in(library: str) -> list[str]:
    """The names in a library; none where it can't be opened, as one who types wants no errors."""
    from ..errors import LorafoldError
    from ..fold.store.catalog import Catalog

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(Catalog.open(library).manifest.adapters)
    except (LorafoldError, OSError):
        return []


def _items(values: Iterable[str], kind: str = "plain") -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    return [CompletionItem(value, type=kind) for value in values]


_OFFERED: dict[str, StringParamType] = {
    **dict.fromkeys(SOURCES, _Source()),
    **dict.fromkeys(NAMES, _Name()),
    **dict.fromkeys(FOLDERS, _Path("dir")),
    **dict.fromkeys(FILES, _Path("file")),
}


def know_bash() -> None:
    """Have bash asked for the line as it stands, which it breaks at colons and equal signs."""
    from click.shell_completion import BashComplete, add_completion_class, split_arg_string

    class Bash(BashComplete):
        source_template = BashComplete.source_template.replace(
            'COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD=$COMP_CWORD',
            'COMP_LINE="${COMP_LINE:0:$COMP_POINT}"',
        ).replace("read type", "read -r type")

        def get_completion_args(self) -> tuple[list[str], str]:
            line = os.environ["COMP_LINE"]
            words = split_arg_string(line)[1:]
            self.incomplete = words.pop() if words and not line[-1:].isspace() else ""
            return words, self.incomplete

        def format_completion(self, item: CompletionItem[Any]) -> str:
            done = max(map(self.incomplete.rfind, ":=")) + 1  # what bash keeps before a word
            value = re.sub(r"([^\w@%+=:,./-])", r"\\\1", item.value[done:])
            return f"{item.type},{value}"

    add_completion_class(Bash)
