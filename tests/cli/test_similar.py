"""`similar` and `anatomy`: what they print, as JSON and for people."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import lorafold as lf


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_adapter):
    """sql with a copy in another gauge and a near one, law, and one 1000 times as large."""
    place = tmp_path_factory.mktemp("similar") / "adapters"
    shapes = {f"layers.{n}.q_proj": (24, 16) for n in range(5)}
    sql, law, art = (make_adapter(shapes, 4, seed=s) for s in (1, 2, 3))
    near = sql + (0.2 * sql.norm() / law.norm()) * law
    big = dataclasses.replace(art, modules={p: 1000 * u for p, u in list(art.items())[:4]})
    for name, a in {"sql": sql, "copy": sql.nested(), "near": near, "law": law, "big": big}.items():
        lf.save(a, place / name)
    return place


def test_what_is_alike(folder, cli):
    found = cli("similar", folder, "--json").json
    assert [a["name"] for a in found["adapters"]] == ["big", "copy", "law", "near", "sql"]
    (pair,) = found["duplicates"]
    assert (pair["a"], pair["b"]) == ("copy", "sql")
    assert pair["cosine"] == pytest.approx(1, abs=1e-5)
    assert {(p["a"], p["b"]) for p in found["near_duplicates"]} == {
        ("copy", "near"),
        ("near", "sql"),
    }
    (cluster,) = found["clusters"]
    assert sorted(cluster["names"]) == ["copy", "near", "sql"]
    sizes = {a["name"]: a["bytes"] for a in found["adapters"]}
    (gone,) = found["redundant"]
    assert {gone["name"], gone["same_as"]} == {"copy", "sql"}
    assert found["freed_bytes"] == gone["bytes"] == max(sizes["copy"], sizes["sql"])
    assert [o["name"] for o in found["outliers"]] == ["big"]
    assert found["missing"] == {"layers.4.q_proj": ["big"]}
    assert found["error"] == 0
    whole = sum(p.stat().st_size for p in (folder / "copy").iterdir() if p.suffix != ".md")
    assert sizes["copy"] == whole


def test_it_is_told_to_people(folder, cli):
    text = cli("similar", folder, "--verbose", columns=200).out
    for words in (
        "could go        1, which frees",
        "clusters        1 of 3",
        *(
            "copy     sql   1.0000",
            "same as",
            "far from the others:",
            "big: ",
            "layers.4.q_proj: big",
        ),
    ):
        assert words in text, words
    alone = cli("similar", folder / "sql", folder / "law").out
    for words in ("duplicates  none", "clusters    none", "could go    0, which frees 0 B"):
        assert words in alone, words


def test_a_lower_threshold_finds_more(folder, cli):
    assert cli("similar", folder, "--threshold", "0.99", "--json").json["near_duplicates"] == []
    low = cli("similar", folder, "--threshold", "0.1", "--exact", "--seed", "3", "--json").json
    assert {(p["a"], p["b"]) for p in low["near_duplicates"]} >= {("law", "near")}
    assert [g["name"] for g in low["redundant"]] == [
        g["name"] for g in cli("similar", folder, "--json").json["redundant"]
    ]


def test_sources_of_all_kinds(world, folder, cli, tmp_path):
    lib = world / "lib"
    names = [a["name"] for a in cli("similar", lib, "--json").json["adapters"]]
    with lf.Library.open(lib) as opened:
        assert names == opened.names
        own = [opened.entry(n)["bytes"] for n in names]
    assert [a["bytes"] for a in cli("similar", lib, "--json").json["adapters"]] == own
    found = cli(
        "similar", f"{lib}:sql", "--name", f"mine={world / 'adapters' / 'sql'}", "--json"
    ).json
    (pair,) = found["duplicates"] + found["near_duplicates"]
    assert {pair["a"], pair["b"]} == {"sql", "mine"}
    assert pair["cosine"] > 0.99


def test_markup_in_names_is_text(make_adapter, cli, tmp_path):
    a = make_adapter({"q": (8, 8)}, 2)
    lf.save(a, tmp_path / "[red]x")
    lf.save(a, tmp_path / "plain")
    assert "[red]x" in cli("similar", tmp_path).out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nothing", "no such file or directory"),
        ("{a} --threshold 2", "threshold must be a cosine"),
        ("{a} --threshold high", "high"),
        ("{a} --name odd", "'odd' is not NAME=SOURCE"),
        ("{a} --name sql={a}", "two sources are both named 'sql'"),
        ("", "give adapters, or NAME=SOURCE with --name"),
    ],
)
def test_bad_input_of_similar(folder, cli, line, words, monkeypatch):
    monkeypatch.chdir(folder.parent)
    ran = cli("similar", *line.format(a="adapters/sql").split())
    assert ran.code == 2
    assert words in ran.err
    assert ran.err.count("\n") == 1


def test_refused_by_name(make_adapter, cli, tmp_path):
    dora = make_adapter(
        {"q": (8, 8)}, 2, config={"init_lora_weights": "pissa", "r": 2, "lora_alpha": 4}
    )
    lf.save(dora, tmp_path / "odd")
    for line in (["similar"], ["anatomy"], ["diff", tmp_path / "odd"]):
        ran = cli(*line, tmp_path / "odd")
        assert ran.code == 2
        assert "odd" in ran.err
        assert "PiSSA" in ran.err
        assert "save_pretrained" in ran.err


# anatomy


@pytest.fixture(scope="module")
def odd(tmp_path_factory, make_adapter):
    place = tmp_path_factory.mktemp("anatomy") / "odd"
    shapes = {f"layers.{n}.{p}": (24, 16) for n in range(8) for p in ("q_proj", "v_proj")}
    a = make_adapter(shapes, 4, seed=1)
    path = "layers.6.v_proj"
    lf.save(dataclasses.replace(a, modules={**a.modules, path: 50 * a[path]}), place)
    return place


def test_anatomy_of_an_adapter(odd, cli):
    found = cli("anatomy", odd, "--json", "-v").json
    a = lf.load(odd)
    assert found["norm"] == pytest.approx(a.norm(), rel=1e-5)
    assert [m["module"] for m in found["modules"]] == list(a)
    assert set(found["families"]) == {"q_proj", "v_proj"}
    assert found["families"]["q_proj"]["modules"] == 8
    first = found["anomalies"][0]
    assert (first["module"], first["measure"]) == ("layers.6.v_proj", "norm")
    assert first["value"] == pytest.approx(50 * first["expected"], rel=0.5)
    m = found["modules"][0]
    assert m["singular_values"] == pytest.approx(a[m["module"]].spectrum().tolist(), rel=1e-4)
    assert set(m["largest_row"]) == {"index", "norm"}
    assert m["depth"] == 0
    text = cli("anatomy", odd).out
    for words in ("stand out", "q_proj", "layers.6.v_proj", "far from their families"):
        assert words in text, words
    assert "layers.0.q_proj" not in text
    assert "layers.0.q_proj" in cli("anatomy", odd, "--verbose", columns=200).out


def test_anatomy_of_one_in_a_library_and_bad_input(world, cli, odd):
    assert cli("anatomy", f"{world / 'lib'}:sql").code == 0
    assert "name one of its adapters" in cli("anatomy", world / "lib").err
    assert "threshold must be" in cli("anatomy", odd, "--threshold", "-1").err


def test_an_adapter_of_extras_alone(cli, tmp_path):
    config = {"r": 2, "lora_alpha": 4, "modules_to_save": ["head"]}
    a = lf.Adapter({}, {"base_model.model.head.weight": torch.ones(2)}, config)
    lf.save(a, tmp_path / "a")
    assert cli("anatomy", tmp_path / "a").code == 0
    assert cli("similar", tmp_path / "a").code == 0
