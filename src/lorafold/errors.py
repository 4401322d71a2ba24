"""One tree of errors: every mistake a user can make is a `LorafoldError` with a one-line message.

A message names the thing (file, key, module, name), says what was expected and found, and what to
do about it. The command line prints that line and exits with status 2.

They lie here, `lorafold.errors.MismatchError`. `lorafold.MismatchError` is the same class, for
short; of those, `dir(lorafold)` and `from lorafold import *` have the root alone.
"""

from __future__ import annotations

_LONGEST = 1_500  # letters of a message; of a longer one its middle is left out


class LorafoldError(Exception):
    """The root of all errors that lorafold raises on purpose.

    A message is one line that can be read, whatever the names and texts are that it repeats: line
    breaks and control characters are escaped in it.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(_line(arg) if isinstance(arg, str) else arg for arg in args))


def _line(text: str) -> str:
    if len(text) > _LONGEST:
        half = _LONGEST // 2
        text = f"{text[:half]} … {text[-half:]}"
    if text.isprintable():
        return text
    text = " ".join(map(str.strip, text.strip("\n").split("\n")))
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class FileError(LorafoldError, ValueError):
    """A file or directory can't be read, or won't be overwritten."""


class MismatchError(LorafoldError, ValueError):
    """Two things that must fit together do not: shapes, ranks, bases, options."""


class RefusedError(MismatchError):
    """A step that would be wrong for this adapter, refused with the reason and the remedy."""


class ToleranceError(LorafoldError, ValueError):
    """A stated error bound cannot be met, or was found broken."""


class UnknownNameError(LorafoldError, KeyError):
    """A name that is not there; the message lists the near ones."""

    def __str__(self) -> str:
        # KeyError prints the repr of its argument, which would put the sentence in quotes.
        return str(self.args[0]) if self.args else ""


class MissingExtraError(LorafoldError, ImportError):
    """A feature whose optional dependency is not installed; the message names the command."""
