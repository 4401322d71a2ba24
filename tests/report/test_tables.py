"""What objects show in a notebook: small tables, with names as text."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser

import pytest

import lorafold as lf
from lorafold.words import html_table


class Cells(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.cells = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert dict(attrs).keys() <= {"style"}
        if tag in ("td", "th", "b"):
            self.cells.append("")

    def handle_data(self, data):
        self.cells[-1] += data


def shown(thing):
    found = Cells(thing._repr_html_())
    assert found.tags <= {"table", "caption", "b", "thead", "tbody", "tr", "td", "th"}
    return found.cells


def test_an_adapter_shows_its_kinds_of_module(make_adapter, shapes):
    a = make_adapter(shapes(4), 3)
    cells = shown(dataclasses.replace(a, base_model="<b>base</b>"))
    assert cells[0] == f"{a!r} on <b>base</b>"
    start = cells.index("model.layers.#.self_attn.q_proj")
    assert cells[start : start + 4] == ["model.layers.#.self_attn.q_proj", "4", "(64, 128)", "3"]


def test_an_adapter_of_many_shapes_is_short(make_adapter):
    a = make_adapter({f"layers.{n}.q": (8 + n, 6) for n in range(30)}, 2)
    assert shown(a)[-2] == "(8, 6), (9, 6), (10, 6), (11, 6) and 26 more"


def test_an_adapter_of_extras_only_shows():
    import torch

    assert "0 modules" in shown(lf.Adapter({}, {"head": torch.ones(1)}))[0]


def test_a_library_shows_its_adapters(collection, nasty):
    lib = lf.fold(collection(24, layers=1), tolerance=0.1)
    cells = shown(lib)
    assert cells[0] == f"{lib!r}, tolerance 0.1"
    assert nasty[0] in cells
    assert "and 4 more" in cells


def test_similarity_shows_its_pairs(collection, nasty):
    s = lf.similarity(collection(24))
    cells = shown(s)
    at = cells.index(nasty[0])
    assert cells[at : at + 3] == [nasty[0], nasty[1], "1.000"]


def test_a_live_model_shows_what_runs(net, three):
    live = lf.attach(net, {**three, "<i>d": three["a"]})
    live.use({"a": 1.0, "<i>d": 0.5})
    cells = shown(live)
    assert cells[0] == repr(live)
    assert [cells[cells.index(n) + 2] for n in ("a", "b", "<i>d")] == ["runs", "at rest", "runs"]
    assert cells[cells.index("b") + 1] == "2"
    live.use(None)
    live.merge({"b": 1.0})
    assert shown(live)[shown(live).index("b") + 2] == "merged"
    live.detach()
    assert "detached" in shown(live)[0]


def test_a_live_model_of_many_is_short(net, three):
    live = lf.attach(net, {f"n{i}": three["b"] for i in range(25)})
    assert "and 5 more" in shown(live)


@pytest.mark.parametrize("text", ["<script>", "a&b", '"', "two\nlines", "\udc80"])
def test_cells_are_text(text):
    (title, head, cell) = Cells(html_table(text, [(text,)], (text,))).cells
    assert title == head == cell
    assert "\n" not in cell
    cell.encode()
