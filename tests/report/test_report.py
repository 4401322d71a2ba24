"""The page that is written: complete, bounded, escaped, and refused where it must be."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import lorafold as lf
from lorafold.report.page import page
from lorafold.report.section import (
    Section,
    distinct,
    evenly,
    layout,
    numbers,
    shortened,
    shown,
    whole_ticks,
)

plotly = pytest.importorskip("plotly", reason="plotly is not installed")
pytest.importorskip("scipy", reason="scipy is not installed")

SECTIONS = ("similarity", "starts", "spectra", "energy", "norms", "anomalies", "bytes", "shared")


class Page(HTMLParser):
    """A page's elements: how many of each, its text by section, what it refers to."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.refers, self.rows = [], [], []
        self.scripts, self._script, self._row = [], None, None
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.refers += [attrs[a] for a in ("src", "href", "action") if a in attrs]
        assert not [a for a in attrs if a.startswith("on")]
        if tag == "script":
            self._script = ""
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self._script is not None:
            self._script += data
        elif self.rows and self.rows[-1]:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag):
        if tag == "script":
            self.scripts.append(self._script)
            self._script = None
        elif tag == "table":
            self.rows.append([])

    @property
    def pictures(self):
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def adapters(collection):
    return collection(24)


@pytest.fixture(scope="module")
def written(adapters, tmp_path_factory):
    return lf.report(adapters, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def found(written):
    return Page(written.path)


def test_all_sections_are_there(written, found):
    assert written.sections == SECTIONS
    assert set(found.pictures) >= {"similarity", "spectra", "energy", "norms", "bytes", "shared"}
    for key in (*SECTIONS, "table"):
        assert f'id="{key}"' in found.source


def test_plotly_takes_every_picture(found):
    from plotly.graph_objects import Figure

    for figure in found.pictures.values():
        checked = Figure(figure)  # which checks each field's name and value
        assert len(checked.data) == len(figure["data"]) > 0


def test_nothing_lies_outside_the_page(found):
    assert all(reference.startswith("#") for reference in found.refers)
    assert found.tags.count("script") == 3
    assert "link" not in found.tags
    assert "default-src 'none'" in found.source
    assert not re.search(r"url\((?!#)", found.source[: found.source.index("</style>")])


def test_its_size_is_said(written, found):
    assert written.path.stat().st_size == written.nbytes
    assert f"{written.plotly / 1e6:.1f} MB of it plotly" in found.source
    assert written.nbytes - written.plotly < 1_000_000


def test_names_are_data(found, nasty):
    for tag in ("img", "b"):
        assert tag not in found.tags
    first_cells = {row[0] for row in found.rows if row}
    for name in nasty:
        assert name.replace("\n", "\\n") in first_cells
    text = json.dumps(found.pictures)
    for tag in ("<script", "<b>", "<img"):
        assert tag not in text
    # Templates hold no name: plotly would fill in what looks like a field.
    for template in re.findall(r'"hovertemplate": "((?:[^"\\]|\\.)*)"', text):
        assert "alert" not in template
        assert "%{x} %{customdata}" not in template


def test_the_numbers_are_right(adapters, found, nasty):
    rows = {row[0]: row for row in found.rows if len(row) == 12}
    for name, adapter in adapters.items():
        row = rows[name.replace("\n", "\\n")]
        assert float(row[1].replace(",", "")) == pytest.approx(adapter.norm(), rel=1e-3)
        assert int(row[2]) == adapter.rank
        assert int(row[4]) == len(adapter)
    one, other, *_ = nasty
    assert rows[one][7:9] == [other, "1.000"]
    assert rows[one][9] == rows[other][9] == "cluster 1"
    together = {name for name, row in rows.items() if row[11].startswith("group")}
    assert together == {one, other, *list(adapters)[-4:]}


def test_like_stands_beside_like(found, adapters, nasty):
    names = found.pictures["similarity"]["data"][0]["x"]
    assert abs(names.index(shown(nasty[0])) - names.index(shown(nasty[1]))) == 1
    assert len(names) == len(adapters)
    z = np.array(found.pictures["similarity"]["data"][0]["z"])
    assert np.allclose(np.diag(z), 1, atol=1e-3)
    assert np.allclose(z, z.T)


def test_energy_is_that_of_a_dense_svd(make_adapter, tmp_path, dense, shapes):
    a = make_adapter(shapes(2), 4)
    found = Page(lf.report({"a": a}, tmp_path / "one.html").path)
    S = torch.stack([torch.linalg.svdvals(dense(u))[:4] for u in a.values()])
    kept = (S**2).sum(0).cumsum(0) / (S**2).sum()
    drawn = found.pictures["energy"]["data"][-1]["y"]
    assert torch.allclose(torch.tensor(drawn, dtype=torch.float64), kept, atol=1e-3)


def test_one_adapter_has_no_pairs(make_adapter, tmp_path, shapes):
    written = lf.report({"a": make_adapter(shapes(2))}, tmp_path / "one.html")
    assert set(written.sections) == set(SECTIONS) - {"similarity", "starts", "shared"}
    text = written.path.read_text(encoding="utf-8")
    assert "<title>1 adapter</title>" in text
    assert "No module of 1 adapter stands out" in text


def test_two_adapters_of_other_modules_and_dtypes(make_adapter, tmp_path):
    pair = {
        "half": make_adapter({"layers.0.q": (8, 6)}, 2, dtype=torch.float16),
        "double": make_adapter({"layers.0.q": (8, 6), "lm_head": (9, 6)}, 3, dtype=torch.float64),
    }
    written = lf.report(pair, tmp_path / "two.html")
    assert written.names == ("half", "double")


@pytest.mark.parametrize("size", [0.0, 1e-18, 1e18])
def test_sizes_of_every_kind(make_adapter, tmp_path, size, shapes):
    a, b = (make_adapter(shapes(3), 2, seed=s) for s in (1, 2))
    written = lf.report({"a": a, "b": b, "odd": size * b}, tmp_path / "page.html")
    assert Page(written.path).pictures["energy"]["data"]


def test_sizes_far_apart(make_adapter, tmp_path, shapes):
    a, b, c = (make_adapter(shapes(3), 2 + s, seed=s) for s in range(3))
    written = lf.report({"tiny": 1e-20 * a, "huge": 1e20 * b, "c": c}, tmp_path / "page.html")
    assert set(written.sections) == set(SECTIONS)


def test_all_zero(make_adapter, tmp_path, shapes):
    a = make_adapter(shapes(2), 2)
    written = lf.report({"a": 0 * a, "b": 0 * a}, tmp_path / "page.html")
    assert "Every update is zero" in written.path.read_text(encoding="utf-8")


def test_many_adapters_have_a_bounded_page(collection, tmp_path):
    written = lf.report(collection(300, layers=2), tmp_path / "many.html")
    found = Page(written.path)
    assert len(found.pictures["similarity"]["data"][0]["x"]) == 256
    assert any("256 of 300 adapters are drawn" in note for note in written.notes)
    assert any("64 of 300" in note for note in written.notes)
    assert len(found.pictures["energy"]["data"]) < 10, "quantiles, not a line each"
    assert written.nbytes - written.plotly < 2_000_000


def test_the_odd_one_of_many_is_found(collection, tmp_path):
    many = collection(200, layers=5)
    modules = dict(many["adapter-123"])
    odd = "model.layers.2.mlp.up_proj"
    many["adapter-123"] = lf.Adapter({**modules, odd: 30.0 * modules[odd]}, base_model="base")
    found = Page(lf.report(many, tmp_path / "many.html").path)
    rows = [row for row in found.rows if len(row) == 6 and row[0] == "adapter-123"]
    assert (rows[0][1], rows[0][2]) == (odd, "norm")


def test_refused_ones_are_left_out_and_said(make_adapter, tmp_path, shapes):
    a, b = (make_adapter(shapes(2), 2, seed=s) for s in (1, 2))
    dora = lf.Adapter(dict(a), config={"use_dora": True})
    with pytest.warns(UserWarning, match="'<i>dora' is left out"):
        written = lf.report({"a": a, "b": b, "<i>dora": dora}, tmp_path / "page.html")
    assert written.names == ("a", "b")
    assert list(written.refused) == ["<i>dora"]
    assert "&lt;i&gt;dora is left out" in written.path.read_text(encoding="utf-8")
    with pytest.raises(lf.errors.RefusedError, match="'d'"):
        lf.report({"d": dora}, tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()


# What can't be done


def test_a_page_that_exists_stays(make_adapter, tmp_path, shapes):
    place = tmp_path / "page.html"
    place.write_text("mine")
    sources = {"a": make_adapter(shapes(1))}
    with pytest.raises(lf.FileError, match=r"exists already; give overwrite=True"):
        lf.report(sources, place)
    assert place.read_text() == "mine"
    lf.report(sources, place, overwrite=True)
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(lf.FileError, match="it is no page of HTML"):
        lf.report(sources, notes, overwrite=True)
    assert notes.read_text() == "mine"
    assert place.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_places_that_are_none(make_adapter, tmp_path, shapes):
    sources = {"a": make_adapter(shapes(1))}
    with pytest.raises(lf.FileError, match="is a folder; name the file"):
        lf.report(sources, tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(lf.FileError, match="is no plain file"):
            lf.report(sources, tmp_path / "pipe", overwrite=True)
    with pytest.raises(lf.FileError, match="is no folder: make it first"):
        lf.report(sources, tmp_path / "no" / "page.html")


@pytest.mark.parametrize("threshold", [0, -1, 1.5, float("nan"), "high", None, True])
def test_a_threshold_out_of_range(make_adapter, tmp_path, threshold, shapes):
    with pytest.raises(lf.MismatchError, match=r"threshold must lie in \(0, 1\]"):
        lf.report({"a": make_adapter(shapes(1))}, tmp_path / "p.html", threshold=threshold)


def test_nothing_and_things_that_disagree(make_adapter, tmp_path):
    with pytest.raises(lf.MismatchError, match="empty"):
        lf.report([], tmp_path / "p.html")
    a, b = make_adapter({"q": (4, 3)}, 2), make_adapter({"q": (5, 3)}, 2)
    with pytest.raises(lf.MismatchError, match="different bases"):
        lf.report({"a": a, "b": b}, tmp_path / "p.html")
    assert list(tmp_path.iterdir()) == []


def test_a_page_in_a_source_is_refused(make_adapter, tmp_path, shapes):
    lf.save(make_adapter(shapes(1), base_model="base"), tmp_path / "sql")
    with pytest.raises(lf.FileError, match="lies in the source"):
        lf.report(tmp_path / "sql", tmp_path / "sql" / "report.html")


def test_without_plotly_it_says_what_to_install(make_adapter, tmp_path, monkeypatch, shapes):
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(lf.errors.MissingExtraError, match=r"pip install 'lorafold\[report\]'"):
        lf.report({"a": make_adapter(shapes(1))}, tmp_path / "p.html")


# Its parts


def test_text_is_shown_as_text():
    assert shown("<b>&</b>") == "&lt;b&gt;&amp;&lt;/b&gt;"
    assert shortened("a\nb\udc80") == "a\\nb\\udc80"
    assert shortened("abcdefghijk", 7) == "ab…hijk"
    assert len(shortened("x" * 99, 22)) == 22


def test_names_that_are_shown_alike_are_two(make_adapter, tmp_path, shapes):
    names = ["a\nb", "a\\nb", "a\\nb (2)"]
    assert distinct(map(shown, names)) == ["a\\nb", "a\\nb (2)", "a\\nb (2) (2)"]
    adapters = {n: make_adapter(shapes(1), 2, seed=k) for k, n in enumerate(names)}
    drawn = Page(lf.report(adapters, tmp_path / "p.html").path).pictures["similarity"]["data"][0]
    assert len(set(drawn["x"])) == len(set(drawn["y"])) == len(drawn["z"]) == 3


@pytest.mark.parametrize(("most", "axis"), [(2, {"dtick": 1}), (900, {"nticks": 8})])
def test_counts_are_marked_at_whole_numbers(most, axis):
    """Halves would be shown as the whole numbers beside them."""
    assert axis.items() <= layout("x", "y", **whole_ticks("xaxis", most))["xaxis"].items()


def test_numbers_are_json():
    assert numbers(np.array([1.23456, np.nan, -np.inf])) == [1.235, None, None]
    assert numbers(np.array([[1.0], [2.0]])) == [[1.0], [2.0]]


@pytest.mark.parametrize(("count", "most"), [(0, 3), (1, 1), (5, 5), (6, 5), (1000, 7), (9, 1)])
def test_evenly_spaced(count, most):
    chosen = evenly(count, most)
    assert len(chosen) <= most
    assert chosen == sorted(set(chosen))
    if count:
        assert chosen[0] == 0
        assert chosen[-1] == count - 1 or most == 1


def test_a_pages_texts_are_escaped():
    nasty = "<script>alert(1)</script>"
    section = Section("k", nasty, nasty, {"data": [], "layout": {}}, nasty, (nasty,), [(nasty,)])
    text = page(nasty, [(nasty, nasty)], [section], [nasty], [(nasty,), ((None, nasty),)], [nasty])
    assert "<script>alert" not in text
