"""`extract`: what is written, what is told, what is refused."""

from __future__ import annotations

import pytest

import lorafold as lf


def test_a_merge_taken_apart_again(here, cli):
    assert cli("merge-into", "base", "adapters/sql", "-o", "tuned").code == 0
    ran = cli("extract", "base", "tuned", "-o", "out", "--rank", "4", "--base-model", "org/base")
    assert (ran.code, ran.err) == (0, "")
    assert "modules     6" in ran.out
    sql, out = lf.load("adapters/sql"), lf.load("out")
    assert out.base_model == "org/base"
    assert max((sql[p] - out[p]).norm() for p in sql) < 1e-4 * sql.norm()
    found = cli("extract", "base", "tuned", "-o", "loose", "--tolerance", "0.3", "--json").json
    assert 0 < found["error"] <= 0.3
    assert found["floor"] < 1e-5


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("base base -o out --rank 2", "no tensor differs"),
        ("base base -o out", "give exactly one of rank and tolerance"),
        ("base nowhere -o out --rank 2", "no such folder: 'nowhere'"),
        ("base base -o lib --rank 2", "it is not an adapter"),
        ("base base -o adapters/sql --rank 2", "give --overwrite to replace it"),
    ],
)
def test_what_is_refused(here, cli, line, says):
    ran = cli("extract", *line.split())
    assert ran.code == 2
    assert says in ran.err
    assert ran.err.count("\n") == 1
