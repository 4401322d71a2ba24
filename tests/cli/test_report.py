"""`report`: a page from paths, told in a line."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("plotly", reason="plotly is not installed")
pytest.importorskip("scipy", reason="scipy is not installed")


def test_a_page_of_a_folder(cli, here):
    ran = cli("report", "adapters", "-o", "page.html", "--title", "Ours & theirs")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("page.html: 8 sections about 3 adapters")
    text = (here / "page.html").read_text(encoding="utf-8")
    assert "<title>Ours &amp; theirs</title>" in text


def test_json_says_what_was_written(cli, here):
    ran = cli("report", "adapters/sql", "-o", "page.html", "--name", "<b>=adapters/law", "--json")
    found = json.loads(ran.out)
    assert found["names"] == ["sql", "<b>"]
    assert found["bytes"] == (here / "page.html").stat().st_size
    assert found["plotly_bytes"] > 4_000_000
    assert found["refused"] == {}


def test_a_page_of_a_library_and_of_one_in_it(cli, here):
    ran = cli("report", "lib", "--name", "again=lib:sql", "-o", "page.html", "--json")
    assert set(ran.json["names"]) == {"sql", "poems", "law", "again"}


def test_a_page_that_exists(cli, here):
    (here / "page.html").write_text("mine")
    ran = cli("report", "adapters", "-o", "page.html")
    assert ran.code == 2
    assert ran.err == "error: page.html exists already; give --overwrite to replace it\n"
    assert (here / "page.html").read_text() == "mine"
    assert cli("report", "adapters", "-o", "page.html", "--overwrite").code == 0


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("report -o page.html", "give adapters, or NAME=SOURCE with --name"),
        ("report adapters", "Missing option '-o'"),
        ("report adapters -o page.html --threshold 2", "threshold must lie in (0, 1]"),
        ("report adapters/none -o page.html", "adapters/none"),
        ("report adapters -o .", "is a folder"),
        ("report adapters -o page.html --memory much", "memory must be a size"),
        ("report adapters -o page.html --name x", "is not NAME=SOURCE"),
    ],
)
def test_bad_lines(cli, here, line, says):
    ran = cli(*line.split())
    assert ran.code == 2
    assert says in ran.err
    assert ran.err.count("\n") == 1
    assert not (here / "page.html").exists()
