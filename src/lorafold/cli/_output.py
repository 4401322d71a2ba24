"""What commands print: one JSON value, or tables that people read.

Numbers for people are rounded and have units (bytes in powers of 1024, errors in percent); JSON
holds them unrounded. Where stdout is no terminal nothing is cut to its width.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from ..words import escaped
from ._command import one_line, print_json, settings

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from rich.table import Table
    from rich.text import Text

DELAY = 1.0  # seconds of work before a progress bar appears
EVERY = 10.0  # seconds between lines where there is no terminal for a bar
_UNBOUNDED = 100_000  # columns, where no terminal sets a limit
NOTHING = "–"
MOST = 20  # rows of a table that may be long, without --verbose

Advance = Callable[[int, int, str], None]


# Reports


def report(
    data: Mapping[str, Any],
    show: Callable[[Console], None],
    *,
    kind: str | None = None,
    tables: Sequence[str] = (),
) -> None:
    """Print `data` as JSON where that is asked for, else let `show` print it for people.

    Args:
        data: what there is to say, as docs/cli.md lists it. show: prints it.
        kind: what `data` is; by default it is called by the command: "ls", "route-fit".
        tables: lists and objects in it, of every module, that JSON has with --verbose only.
    """
    chosen = settings()
    if chosen.json:
        value = {"kind": kind or _called(), **data}
        print_json(_plain(value, () if chosen.verbose else tables), chosen)
    elif not chosen.quiet:
        show(console())


def _called() -> str:
    """The command that is running, without `lorafold`."""
    ctx: click.Context | None = click.get_current_context()
    names: list[str] = []
    while ctx is not None and ctx.parent is not None:
        names.insert(0, str(ctx.info_name))
        ctx = ctx.parent
    return "-".join(names)


@contextlib.contextmanager
def notes() -> Iterator[None]:
    """With --verbose, what lorafold tells its logger goes to stderr."""
    if not settings().verbose:
        yield
        return
    logger, handler = logging.getLogger("lorafold"), logging.Handler(logging.INFO)
    before = logger.level, logging.root.manager.disable
    handler.emit = _noted  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logging.disable(logging.NOTSET)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logging.disable(before[1])


def _noted(record: logging.LogRecord) -> None:
    click.echo(f"note: {one_line(record.getMessage())}", err=True)


def console() -> Console:
    """Where tables go: stdout, unstyled text taken as it is."""
    from rich.console import Console

    bounded = sys.stdout.isatty() or "COLUMNS" in os.environ
    width = None if bounded else _UNBOUNDED
    return Console(width=width, highlight=False, markup=False, emoji=False)


def facts(out: Console, pairs: Iterable[tuple[str, object]]) -> None:
    """Print names and values in two columns, leaving out values that are None or empty."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        if value is not None and value != "":
            grid.add_row(Text(name, "bold"), Text(shown(value)))
    _print(out, grid)


def table(
    out: Console,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    most: int | None = None,
) -> None:
    """Print rows under headings.

    Args:
        columns: headings; ">x" aligns to the right and is never cut, "x…" is cut to keep rows on
            one line, others wrap.
        rows: cells; None prints a dash.
        most: rows shown without --verbose; all where None.
    """
    every = list(rows)
    kept = every if most is None or settings().verbose else every[:most]
    cells = [[NOTHING if cell is None else shown(cell) for cell in row] for row in kept]
    lines = fitting(columns, cells, out.width)
    if lines is None:
        _print(out, _wrapped(columns, cells))
    else:
        click.echo("\n".join(lines))
    if len(every) > len(kept):
        say(out, f"and {len(every) - len(kept):,} more: --verbose")


def fitting(columns: Sequence[str], cells: Sequence[Sequence[str]], width: int) -> list[str] | None:
    """The lines of a table that is no wider; None where there is something to wrap or to cut.

    As `rich` has them, which takes a millisecond for each.
    """
    from rich.cells import cell_len

    heads = [column.strip(">…") for column in columns]
    widths = [max(1, *map(cell_len, column)) for column in zip(heads, *cells, strict=True)]
    whole = sum(widths) + 2 * (len(widths) - 1)
    if whole > width:
        return None

    def line(row: Sequence[str]) -> str:
        gaps = (" " * (w - cell_len(cell)) for w, cell in zip(widths, row, strict=True))
        padded = (
            f"{gap}{cell}" if column.startswith(">") else f"{cell}{gap}"
            for column, gap, cell in zip(columns, gaps, row, strict=True)
        )
        return "  ".join(padded).rstrip()

    return [click.style(line(heads), bold=True), "─" * whole, *map(line, cells)]


def _wrapped(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        right, cut = column.startswith(">"), column.endswith("…")
        grid.add_column(
            column.strip(">…"),
            justify="right" if right else "left",
            no_wrap=right,
            overflow="ellipsis" if cut else "fold",
        )
    for row in cells:
        grid.add_row(*map(Text, row))
    return grid


def _print(out: Console, what: Table | Text) -> None:
    with out.capture() as captured:
        out.print(what)
    # Rich fills every line up to the table's width.
    lines = [line.rstrip() for line in captured.get().splitlines()]
    click.echo("\n".join(lines))


def say(out: Console, text: str = "") -> None:
    """Print a paragraph."""
    from rich.text import Text

    _print(out, Text("\n".join(one_line(line) for line in text.split("\n"))))


def line_to_run(out: Console, text: str) -> None:
    """Print a command line, never wrapped: it is there to be copied."""
    from rich.text import Text

    out.print(Text(one_line(text)), soft_wrap=True)


def _plain(value: Any, without: Sequence[str] = ()) -> Any:
    """The value with what JSON lacks (NaN, infinity) as null, and without some tables."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        left = {k for k in without if isinstance(value.get(k), Mapping | list | tuple)}
        return {str(k): _plain(v, without) for k, v in value.items() if k not in left}
    if isinstance(value, list | tuple):
        return [_plain(v, without) for v in value]
    return value


# Numbers and names for people


def shown(value: object) -> str:
    """A name or other value as text; control characters are shown escaped."""
    return escaped(value) if isinstance(value, str) else str(value)


def count(number: int, noun: str = "") -> str:
    """1,234, or "1,234 modules"; the noun is given for one."""
    if not noun:
        return f"{number:,}"
    plural = f"{noun[:-1]}ies" if noun.endswith("ry") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def digits(number: float | None, wanted: int = 3) -> str:
    """1.20, 12.0, 120, 1,200: with that many digits, so that a column reads evenly."""
    if number is None:
        return NOTHING
    if abs(number) >= 10 ** (wanted - 1):
        return f"{number:,.0f}"
    return f"{number:#.{wanted}g}".removesuffix(".")  # 99.96 is 100 of three digits


def size(number: float) -> str:
    """12.3 KiB."""
    if abs(number) < 1000:
        return f"{number:,.0f} B"
    units = ["KiB", "MiB", "GiB", "TiB"]
    number /= 1024
    while abs(number) >= 1000 and len(units) > 1:
        number /= 1024
        units.pop(0)
    return f"{digits(number)} {units[0]}"


def percent(share: float | None) -> str:
    """9.98 %."""
    if share is None or not math.isfinite(share):
        return NOTHING
    if share and abs(share) < 1e-5:
        return f"{100 * share:.1e} %"
    return f"{digits(100 * share) if share else 0} %"


def duration(seconds: float) -> str:
    """1.2 ms."""
    for unit, length in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= length:
            return f"{digits(seconds / length)} {unit}"
    return f"{digits(seconds / 1e-6)} µs"


def span(numbers: Iterable[int]) -> str:
    """4, or 4–16."""
    found = sorted(set(numbers))
    if not found:
        return NOTHING
    return str(found[0]) if len(found) == 1 else f"{found[0]}–{found[-1]}"


def listed(names: Iterable[str], most: int = 8) -> str:
    """a, b, c and 5 more."""
    every = list(names)
    rest = len(every) - most
    return ", ".join(every) if rest <= 0 else f"{', '.join(every[:most])} and {rest:,} more"


# Progress


@contextlib.contextmanager
def progress(what: str) -> Iterator[Advance]:
    """A callback (done, total, stage) that says how far the work is, if it takes a while.

    It draws a bar on a terminal; elsewhere, as in a log, it prints a line now and then.
    """
    if settings().quiet:
        yield lambda done, total, stage: None
        return
    if not sys.stderr.isatty():
        yield Lines(what).advance
        return
    bar = Bar(what)
    timer = threading.Timer(DELAY, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield bar.advance
    finally:
        timer.cancel()
        bar.stop()


def span_of_time(seconds: float) -> str:
    """A rounded span of time: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class Lines:
    """Plain lines on stderr that say how far the work is, some seconds apart."""

    def __init__(self, what: str) -> None:
        self._what, self._begin = what, time.monotonic()
        self._next = self._begin + EVERY
        self._lock = threading.Lock()

    def advance(self, done: int, total: int, stage: str) -> None:
        """Say how far the work is, and how long it may still take."""
        with self._lock:
            now = time.monotonic()
            if now < self._next:
                return
            self._next = now + EVERY
        far = f"{done / total:.0%}" if total else f"{done:,}"
        if total and done:
            far += f", about {span_of_time((now - self._begin) * (total - done) / done)} left"
        click.echo(one_line(f"{self._what}: {far}" + (f", {stage}" if stage else "")), err=True)


class Bar:
    """A progress bar on stderr that is drawn from `start` on and gone after `stop`."""

    def __init__(self, what: str) -> None:
        self._what, self._state = what, (0, 0, "")
        self._lock = threading.Lock()
        self._drawn: tuple[Progress, TaskID] | None = None
        self._ended = False

    def start(self) -> None:
        """Draw it, unless the work has ended meanwhile."""
        from rich.console import Console
        from rich.progress import Progress

        with self._lock:
            if self._ended:
                return
            drawn = Progress(console=Console(stderr=True), transient=True)
            self._drawn = drawn, drawn.add_task(self._what, total=None)
            drawn.start()
            self._update()

    def advance(self, done: int, total: int, stage: str) -> None:
        """Say how far the work is."""
        with self._lock:
            self._state = done, total, stage
            self._update()

    def stop(self) -> None:
        """Take it away."""
        with self._lock:
            self._ended = True
            if self._drawn is not None:
                self._drawn[0].stop()

    def _update(self) -> None:
        from rich.markup import escape

        if self._drawn is not None:
            done, total, stage = self._state
            drawn, task = self._drawn
            text = one_line(f"{self._what}: {stage}" if stage else self._what)
            drawn.update(task, completed=done, total=total or None, description=escape(text))
