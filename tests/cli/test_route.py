"""`route`: texts in files, a router, and what it says of texts."""

from __future__ import annotations

import json


def test_fit_and_ask(here, cli):
    ran = cli("route", "fit", "texts", "-o", "router")
    assert (ran.code, ran.err) == (0, "")
    assert "adapters" in ran.out
    assert "threshold" in ran.out
    ran = cli("route", "ask", "router", "SELECT name FROM users WHERE id = 3", "12345 67890")
    assert ran.code == 0
    assert ran.out.splitlines()[2].split()[7:9] == ["3", "sql"]
    assert "none" in ran.out
    found = cli("route", "ask", "router", "SELECT x FROM y", "--json").json["texts"]
    assert found[0]["mix"] == {"sql": 1.0}
    assert found[0]["nearest"][0]["name"] == "sql"


def test_learned(here, cli):
    ran = cli(
        "route", "fit", "texts", "-o", "router", "--kind", "learned", "--top-k", "2",
        "--temperature", "0.5", "--hidden", "8", "--always", "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert ran.json["calibration"] is None
    assert ran.json["accuracy"] > 0
    found = cli("route", "ask", "router", "SELECT a FROM b", "--json").json["texts"]
    assert len(found[0]["mix"]) == 2
    assert max(found[0]["mix"], key=found[0]["mix"].get) == "sql"


def test_sources_of_every_kind(here, cli):
    records = [{"name": "<b>", "text": "[red]"}, {"name": "<b>", "text": "[red] [/red]"}]
    records += [{"name": None, "text": "1 2 3"}]
    (here / "more.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    (here / "odd.txt").write_text("0 0 0\n9 9 9\n")
    line = ("route", "fit", "texts/sql.txt", "more.jsonl", "-o", "router")
    ran = cli(*line, "--none", "odd.txt", "--lines", "2", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["names"] == ["sql", "<b>"]
    texts = (here / "texts" / "sql.txt").read_text().splitlines()
    assert ran.json["examples"] == -(-len(texts) // 2) + 2 + 1 + 1
    ran = cli("route", "ask", "router", "[red]")
    assert "<b>" in ran.out
    ran = cli("route", "ask", "router", "-", input="[red]\n\nSELECT 1 FROM a\n")
    assert len(ran.out.splitlines()) == 4


def test_texts_hold_what_looks_like_the_end_of_a_line(here, cli):
    odd = "x\u2028y\x0cz\x85"
    record = {"name": "odd", "text": odd}
    text = json.dumps(record, ensure_ascii=False)
    (here / "odd.jsonl").write_text(f"{text}\r\n{text}\n", encoding="utf-8")
    (here / "same.txt").write_text(f"{odd}\n{odd}\n", encoding="utf-8")
    (here / "none.jsonl").write_text(json.dumps({"name": None, "text": "1 2"}) + "\n")
    (here / "more.txt").write_text("3 4\n5 6\n")
    line = ("route", "fit", "odd.jsonl", "same.txt", "none.jsonl", "-o", "r", "--json", "--always")
    assert cli(*line, "--none", "more.txt").json["examples"] == 2 + 2 + 1 + 2
    assert cli(*line, "--none", "none.jsonl", "--overwrite").json["examples"] == 2 + 2 + 1 + 1
    asked = cli("route", "ask", "r", "-", "--json", input=f"{odd}\n{odd}\n").json["texts"]
    assert [row["text"] for row in asked] == [odd, odd]


def test_an_empty_text_is_like_nothing(here, cli):
    assert cli("route", "fit", "texts", "-o", "router").code == 0
    (row,) = cli("route", "ask", "router", "", "--json").json["texts"]
    assert row["mix"] is None
    assert row["score"] is None
    assert cli("route", "ask", "router", "").code == 0


def test_what_is_refused(here, cli):
    (here / "empty").mkdir()
    (here / "bad.jsonl").write_text('{"name": "a", "text": "x"}\n{"name": "a"}\n')
    (here / "torn.jsonl").write_text('{"name": "a", "text": "x"}\n{"name"\n')
    (here / "empty.txt").write_text("\n\n")
    for line, says in [
        ("fit texts", "Missing option '-o'"),
        ("fit nowhere -o r", "no such file or directory: 'nowhere'"),
        ("fit empty -o r", "no .txt or .jsonl file"),
        ("fit empty.txt -o r", "no examples of 'empty'"),
        ("fit bad.jsonl -o r", 'line 2: must have a "name" and a "text"'),
        ("fit torn.jsonl -o r", "line 2: not valid JSON"),
        ("fit texts -o adapters", "not a router"),
        ("fit texts -o r --error 2", "error must be a share"),
        ("fit texts -o r --hidden 8", "--hidden is for --kind learned"),
        ("fit texts -o r --kind learned --top-k 0", "--top-k must be"),
        ("ask nowhere x", "nowhere is not a router"),
        ("ask adapters/sql x", "is not a router"),
        ("ask", "Missing argument 'ROUTER'"),
        ("aks router x", "there is no command 'aks'; did you mean"),
    ]:
        ran = cli("route", *line.split())
        assert ran.code == 2, line
        assert says in ran.err, ran.err
        assert ran.err.startswith("error: ")
        assert ran.err.count("\n") == 1
    assert not (here / "r").exists()
    assert cli("route", "fit", "texts", "-o", "r").code == 0
    ran = cli("route", "fit", "texts", "-o", "r")
    assert "give --overwrite to replace it" in ran.err
    assert cli("route", "fit", "texts", "-o", "r", "--overwrite").code == 0


def test_a_router_of_tokens_is_not_asked(here, cli):
    import lorafold as lf

    lf.ArrowRouter(["adapters/sql", "adapters/law"]).save("arrow")
    ran = cli("route", "ask", "arrow", "x")
    assert ran.code == 2
    assert "weighs tokens inside a model" in ran.err


def test_one_example_a_name_takes_no_threshold(here, cli):
    for name in ("one", "two"):
        (here / f"{name}.txt").write_text(f"{name}\n")
    for kind in ("centroid", "learned"):
        line = ("route", "fit", "one.txt", "two.txt", "-o", kind, "--kind", kind)
        ran = cli(*line)
        assert ran.code == 2
        assert "two examples of a name" in ran.err
        assert cli(*line, "--always").code == 0
