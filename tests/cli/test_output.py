"""Numbers and names as people read them, and when a bar is drawn."""

from __future__ import annotations

import io
import math

import pytest

from lorafold.cli import _output as output


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1024, "1.00 KiB"),
        (158987, "155 KiB"),
        (1024**2 * 1.11, "1.11 MiB"),
        (3 * 1024**4, "3.00 TiB"),
        (5000 * 1024**4, "5,000 TiB"),
    ],
)
def test_size(number, text):
    assert output.size(number) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0 %"),
        (0.0998, "9.98 %"),
        (0.9996, "100 %"),
        (0.1, "10.0 %"),
        (1, "100 %"),
        (12.5, "1,250 %"),
        (3e-8, "3.0e-06 %"),
        (None, "–"),
        (math.inf, "–"),
    ],
)
def test_percent(share, text):
    assert output.percent(share) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.3, "12.3 s"), (0.0123, "12.3 ms"), (2e-6, "2.00 µs")]
)
def test_duration(seconds, text):
    assert output.duration(seconds) == text


def test_words():
    assert output.span([4, 16, 8]) == "4–16"
    assert output.span([4]) == "4"
    assert output.span([]) == "–"
    assert output.count(1, "adapter") == "1 adapter"
    assert output.count(1200, "adapter") == "1,200 adapters"
    assert output.listed("abcd", 2) == "a, b and 2 more"
    assert output.digits(None) == "–"


def test_json_has_no_nan():
    assert output._plain({"a": [math.nan, 1.0], "b": (math.inf, "x")}) == {
        "a": [None, 1.0],
        "b": [None, "x"],
    }


class Terminal(io.StringIO):
    def isatty(self):
        return True


def bar_on(stream, monkeypatch):
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    return output.Bar("folding")


def test_a_bar_is_drawn_once_it_starts(monkeypatch):
    stream = Terminal()
    bar = bar_on(stream, monkeypatch)
    bar.advance(1, 4, "[red]measuring")
    assert stream.getvalue() == ""
    bar.start()
    bar.advance(2, 4, "[red]measuring")
    bar.stop()
    assert "folding: [red]measuring" in stream.getvalue()


def test_a_bar_that_starts_after_the_end_is_not_drawn(monkeypatch):
    stream = Terminal()
    bar = bar_on(stream, monkeypatch)
    bar.stop()
    bar.start()
    assert stream.getvalue() == ""


def test_quick_work_draws_nothing_and_slow_work_does(monkeypatch):
    started = []

    class Timer:
        daemon = False

        def __init__(self, delay, function):
            self.function = function
            assert delay == output.DELAY >= 1

        def start(self):
            started.append(self.function)

        def cancel(self):
            started.append("cancelled")

    monkeypatch.setattr(output.threading, "Timer", Timer)
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    with output.progress("folding") as advance:
        advance(1, 2, "")
    assert started[1:] == ["cancelled"]
    assert stream.getvalue() == ""
    with output.progress("folding") as advance:
        started[2]()  # the delay is over
        advance(1, 2, "writing")
    assert "folding" in stream.getvalue()


def test_without_a_terminal_there_is_no_timer(monkeypatch):
    monkeypatch.setattr(output.threading, "Timer", None)
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    with output.progress("folding") as advance:
        advance(1, 2, "")
    assert stream.getvalue() == ""


def test_a_table_that_fits_is_the_one_that_rich_would_draw(monkeypatch, capsys):
    """With letters of any width, empty cells and none, and no rows at all."""
    columns = ["name", ">rank…", "what…", ">"]
    rows = [["sql", 4, None, ""], ["żółw 🐢 漢字", 12345, "a\tb", "x"], ["", None, "long " * 9, 1]]
    monkeypatch.setenv("COLUMNS", "90")
    out = output.console()
    for some in (rows, rows[:1], []):
        output.table(out, columns, some)
        fast = capsys.readouterr().out
        with monkeypatch.context() as m:
            m.setattr(output, "fitting", lambda *_: None)
            output.table(out, columns, some)
        assert fast == capsys.readouterr().out
    assert output.fitting(columns, [["x" * 91, "", "", ""]], 90) is None
