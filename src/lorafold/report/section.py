"""A section of the page: what is said, the picture, and its numbers for those who don't see it.

Pictures are plotly's own JSON (`data`, `layout`), drawn by plotly on the page. Names of adapters
and modules are data: plotly takes `<b>` in a text for markup, so they go through `shown`.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..words import escaped

_DIGITS = 4  # of the numbers in pictures
BAND = "rgba(86,140,220,0.22)"  # between quantiles, over light and dark


@dataclass(frozen=True)
class Section:
    """One picture, or none where there is nothing to draw.

    Args:
        key: its id on the page. title: its heading.
        says: what is seen, in words. note: what was sampled or left out.
        figure: {"data", "layout"} for plotly; None: only the text.
        columns, rows: the picture's numbers as a table.
    """

    key: str
    title: str
    says: str
    figure: dict[str, Any] | None = None
    note: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = field(default=())


def shown(text: str, most: int | None = None) -> str:
    """Text for a picture: no letter of it is markup, and it is cut in the middle if too long."""
    return html.escape(shortened(text, most), quote=False)


def distinct(texts: Iterable[str]) -> list[str]:
    """The texts, with a number after those that are there already: two names may be shown alike."""
    found: dict[str, None] = {}
    for text in texts:
        n, one = 1, text
        while one in found:
            n, one = n + 1, f"{text} ({n + 1})"
        found[one] = None
    return list(found)


def shortened(text: str, most: int | None = None) -> str:
    """Text on one line, with its middle left out where it is longer than `most`."""
    text = escaped(text)
    if most is not None and len(text) > most:
        text = f"{text[: most // 2 - 1]}…{text[-(most - most // 2) :]}"
    return text


def numbers(values: Iterable[float] | np.ndarray) -> list[Any]:
    """Numbers for JSON, rounded; what is not finite is null. Nested as the array is."""
    return [numbers(v) if isinstance(v, np.ndarray | list) else _rounded(float(v)) for v in values]


def _rounded(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None


def counted(n: int, noun: str) -> str:
    """1 adapter, 2 adapters."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def span(values: np.ndarray) -> str:
    """4, or 4–16."""
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low}–{high}"


def evenly(count: int, most: int) -> list[int]:
    """At most `most` evenly spaced numbers out of 0 … count − 1, the first and last with them."""
    if count <= most:
        return list(range(count))
    return sorted({round(k * (count - 1) / max(most - 1, 1)) for k in range(most)})


def whole_ticks(axis: str, most: int) -> dict[str, Any]:
    """For `layout`: ticks at whole numbers of 0 … most alone, and a few of them."""
    return {f"{axis}_dtick": 1} if most <= 8 else {f"{axis}_nticks": 8, f"{axis}_tickformat": ",d"}


def layout(x: str, y: str, **more: Any) -> dict[str, Any]:
    """A picture's layout with titles of its axes; `more` as plotly has it ("xaxis_type" too)."""
    made: dict[str, Any] = {
        "xaxis": {"title": {"text": x}, "automargin": True},
        "yaxis": {"title": {"text": y}, "automargin": True},
        "margin": {"l": 60, "r": 20, "t": 20, "b": 50},
        "hovermode": "closest",
    }
    for key, value in more.items():
        head, _, tail = key.partition("_")
        if tail:
            made.setdefault(head, {})[tail] = value
        else:
            made[key] = value
    return made
