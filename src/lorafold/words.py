"""How messages name things: what was meant, and tables in plain text."""

from __future__ import annotations

import html
import logging
import sys
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

LISTED = 20  # rows of a notebook's table


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns under one another: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def did_you_mean(name: str, known: object) -> str:
    """The tail of an unknown-name message: the near names, or how many there are.

    Args:
        name: what was asked for.
        known: an iterable of the names there are.
    """
    import difflib

    names = [str(n) for n in known]  # type: ignore[attr-defined]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(repr(n) for n in near) + "?"
    if not names:
        return "there are no names at all"
    shown = ", ".join(repr(n) for n in sorted(names)[:5])
    return f"there are {len(names)}: {shown}{', …' if len(names) > 5 else ''}"


def escaped(text: str) -> str:
    """The text with control characters, line breaks too, shown as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def html_table(
    title: str,
    rows: Iterable[Sequence[object]],
    head: Sequence[str] = (),
    total: int | None = None,
    most: int = LISTED,
) -> str:
    """A small table for a notebook; whatever is in it is text and no markup.

    Args:
        title: above it. rows: cells; the first are shown. head: headings.
        total: how many rows there are, where `rows` is not counted by its length.
        most: how many of them are shown.
    """

    def cells(tag: str, row: Sequence[object]) -> str:
        style = ' style="text-align:left"'
        made = (f"<{tag}{style}>{html.escape(escaped(_cell(c)))}</{tag}>" for c in row)
        return f"<tr>{''.join(made)}</tr>"

    rows = rows if total is not None else list(rows)
    more = (len(rows) if total is None else total) - most  # type: ignore[arg-type]
    first = f"<thead>{cells('th', head)}</thead>" if head else ""
    body = "".join(cells("td", row) for row in islice(rows, most))
    if more > 0:
        body += cells("td", [f"and {more:,} more", *[""] * (len(head) - 1)])
    caption = html.escape(escaped(title))
    return (
        f'<table><caption style="text-align:left"><b>{caption}</b></caption>'
        f"{first}<tbody>{body}</tbody></table>"
    )


def _cell(value: object) -> str:
    """A value as a table has it: few digits, thousands apart, a mapping as its pairs."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        pairs = [f"{key}: {_cell(v)}" for key, v in islice(value.items(), 4)]
        more = [f"and {len(value) - 4:,} more"] if len(value) > 4 else []
        return ", ".join([*pairs, *more])
    return f"{value:,}" if type(value) is int else str(value)


class Table:
    """What is a table: records for a data frame, and shown as one in a notebook."""

    __slots__ = ()

    @abstractmethod
    def rows(self) -> list[dict[str, Any]]:
        """One record each, with the same fields, as `pandas.DataFrame(x.rows())` takes them."""

    def _title(self) -> str:
        """Above the table."""
        return repr(self)

    def _repr_html_(self) -> str:
        rows = self.rows()
        return html_table(self._title(), [[*row.values()] for row in rows], [*(rows or [{}])[0]])


class Keyed:
    """A mapping whose keys IPython completes within brackets."""

    __slots__ = ()

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)  # type: ignore[call-overload, no-any-return]


def one_of(values: Iterable[object]) -> str:
    """'a', 'b' or 'c'."""
    *first, last = map(repr, values)
    return f"{', '.join(first)} or {last}" if first else last


def some_of(values: Iterable[object], most: int = 4) -> str:
    """'a', 'b' and 3 more."""
    every = list(map(repr, values))
    rest = len(every) - most
    return ", ".join(every) if rest <= 0 else f"{', '.join(every[:most])} and {rest:,} more"


def from_to(what: str, names: Sequence[str]) -> str:
    """adapter 'a', or adapters 'a' to 'd' where there are several."""
    return f"{what} {names[0]!r}" if len(names) == 1 else f"{what}s {names[0]!r} to {names[-1]!r}"


def one_line(value: object, most: int = 80) -> str:
    """What was found, in one line that is not too long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def note(text: str) -> None:
    """Tell it to the logger `lorafold`; commands print it with --verbose."""
    logging.getLogger("lorafold").info(text)


_hinted: set[str] = set()


def hint(text: str) -> None:
    """Tell it once in a process, on the logger `lorafold`: stderr, where nothing else is set up."""
    if text not in _hinted:
        _hinted.add(text)
        logging.getLogger("lorafold").warning(text)


def warn(text: str) -> None:
    """Warn at the line outside of lorafold that led here, however many calls lie between."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("lorafold"):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, UserWarning, stacklevel=level)
