"""The page: one HTML file with all that it needs, plotly in it, that asks nothing of any network.

Its policy (`Content-Security-Policy`) forbids requests: a browser enforces what is promised.
Whatever comes from adapters is text: escaped in HTML, and JSON without `<` in the script elements.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import MissingExtraError
from .section import Section, shortened

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; form-action 'none'; base-uri 'none'"
)
_LISTED = 200  # rows of a picture's numbers, at most
_SKELETON = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="lorafold {version}">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<nav aria-label="Sections"><div>{links}<button id="theme" type="button" aria-label="Switch between \
light and dark">Dark</button></div></nav>
<main>
<header>
<h1>{title}</h1>
{facts}
<noscript><p>Pictures, sorting and searching need JavaScript; the numbers are here without.</p>\
</noscript>
</header>
{sections}
{table}
<footer><p>{footer}</p></footer>
</main>
<script type="application/json" id="pictures">{pictures}</script>
<script>{plotly}</script>
<script>{js}</script>
</body>
</html>
"""


def plotly_js() -> str:
    """plotly's own script, as its package has it.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise MissingExtraError(
            "the report is drawn by plotly, which is not there: pip install 'lorafold[report]'"
        ) from None
    script: str = get_plotlyjs()
    return script


def page(
    title: str,
    facts: Iterable[tuple[str, str]],
    sections: Sequence[Section],
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    notes: Sequence[str] = (),
) -> str:
    """The HTML of a report.

    Args:
        title: of the page. facts: what stands at its head, as name and value.
        sections: in order.
        columns: headings of the table of adapters; ">x" is a column of numbers.
        rows: its cells: text, or a number as (value or None, how it is shown).
        notes: said above the table.
    """
    plotly = plotly_js()
    drawn = {s.key: s.figure for s in sections if s.figure is not None}
    links = [(s.key, s.title) for s in sections] + [("table", "Adapters")]
    megabytes = len(plotly.encode()) / 1e6
    footer = (
        f"Made by lorafold {__version__}. Everything is in this file, {megabytes:.1f} MB of it "
        "plotly, which draws the pictures; no request leaves the page. All numbers are about ΔW, "
        "the update itself, and not about the factors A and B."
    )
    return _SKELETON.format(
        policy=_POLICY,
        version=__version__,
        title=_text(title),
        css=_beside("page.css"),
        links="".join(f'<a href="#{key}">{_text(name)}</a>' for key, name in links),
        facts=_facts(facts),
        sections="\n".join(map(_section, sections)),
        table=_adapters(columns, rows, notes),
        footer=_text(footer),
        pictures=_script_json(drawn),
        plotly=plotly,
        js=_beside("page.js"),
    )


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _text(value: object) -> str:
    return html.escape(shortened(str(value)))


def _script_json(value: Any) -> str:
    """JSON that no letter of ends its script element, nor is anything but ASCII."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("&", "\\u0026")


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    cells = (f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in facts)
    return f'<dl class="facts">{"".join(cells)}</dl>'


def _section(s: Section) -> str:
    parts = [f'<section id="{s.key}" aria-labelledby="title-{s.key}">']
    parts.append(f'<h2 id="title-{s.key}">{_text(s.title)}</h2><p>{_text(s.says)}</p>')
    if s.figure is not None:
        label = _text(f"{s.title}. {s.says}")
        height = int(s.figure["layout"].get("height", 450))
        parts.append(
            f'<figure><div id="picture-{s.key}" role="img" aria-label="{label}" '
            f'style="height:{height}px"></div></figure>'
        )
    if s.note:
        parts.append(f'<p class="note">{_text(s.note)}</p>')
    if s.rows:
        parts.append(f"<details><summary>The numbers</summary>{_numbers(s)}</details>")
    return "\n".join([*parts, "</section>"])


def _numbers(s: Section) -> str:
    """The picture's numbers; where they are very many, the first, and how many there are."""
    head = "".join(f'<th scope="col">{_text(c)}</th>' for c in s.columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>"
        for row in s.rows[:_LISTED]
    )
    table = _scrolled("", f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>", s.title)
    if len(s.rows) > _LISTED:
        table += f'<p class="note">The first {_LISTED} of {len(s.rows):,} rows.</p>'
    return table


def _scrolled(key: str, table: str, label: str) -> str:
    """A table in a box of its own, which the keyboard reaches."""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(label)}">'
        f"<table{key}>{table}</table></div>"
    )


def _adapters(columns: Sequence[str], rows: Sequence[Sequence[Any]], notes: Sequence[str]) -> str:
    head = "".join(
        f'<th scope="col"{_class(c)}><button type="button">{_text(c.strip(">"))}</button></th>'
        for c in columns
    )
    body = "\n".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    said = "".join(f'<p class="note">{_text(note)}</p>' for note in notes)
    return (
        '<section id="table" aria-labelledby="title-table"><h2 id="title-table">Adapters</h2>'
        f'{said}<div class="find"><label for="find">Search</label>'
        '<input id="find" type="search" autocomplete="off" spellcheck="false">'
        '<span id="count" role="status"></span></div>'
        + _scrolled(
            ' id="adapters"',
            f"<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody>",
            "Adapters",
        )
        + "</section>"
    )


def _class(column: str) -> str:
    return ' class="number"' if column.startswith(">") else ""


def _cell(cell: Any) -> str:
    if not isinstance(cell, tuple):
        return f"<td>{_text(cell)}</td>"
    value, text = cell
    if value is None or not math.isfinite(value):
        value, text = "", "–"
    return f'<td class="number" data-value="{value}">{_text(text)}</td>'
