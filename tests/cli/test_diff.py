"""`diff` and `resize`: numbers against dense algebra."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import lorafold as lf


def frobenius(dense, a, b=None):
    total = 0.0
    for path in {*a.modules, *(b.modules if b else ())}:
        left = dense(a.modules[path]) if path in a.modules else 0
        right = dense(b.modules[path]) if b and path in b.modules else 0
        total += float(((left - right) ** 2).sum())
    return total**0.5


@pytest.fixture
def pair(tmp_path, make_adapter, monkeypatch):
    """a and b on disk; b has another module and lacks one."""
    a = make_adapter({"x.0.q": (6, 5), "x.1.q": (6, 5), "x.0.k": (4, 5)}, 2, seed=1)
    b = make_adapter({"x.0.q": (6, 5), "x.1.q": (6, 5), "x.0.v": (4, 5)}, 3, seed=2)
    b = dataclasses.replace(b, extras={"odd": torch.ones(1)}, base_model="other")
    monkeypatch.chdir(tmp_path)
    lf.save(a, "a")
    lf.save(b, "b")
    return a, b


def test_numbers_are_those_of_dense_algebra(pair, cli, dense):
    a, b = pair
    found = cli("diff", "a", "b", "--json", "-v").json
    assert found["norm_a"] == pytest.approx(frobenius(dense, a), rel=1e-5)
    assert found["norm_b"] == pytest.approx(frobenius(dense, b), rel=1e-5)
    assert found["distance"] == pytest.approx(frobenius(dense, a, b), rel=1e-5)
    assert found["relative_distance"] == pytest.approx(found["distance"] / found["norm_a"])
    inner = sum(float((dense(a[p]) * dense(b[p])).sum()) for p in ("x.0.q", "x.1.q"))
    cosine = inner / found["norm_a"] / found["norm_b"]
    assert found["cosine"] == pytest.approx(cosine, abs=1e-6)
    distances = [m["distance"] for m in found["modules"]]
    assert distances == sorted(distances, reverse=True)
    for m in found["modules"]:
        gap = dense(a[m["module"]]) - dense(b[m["module"]])
        assert m["distance"] == pytest.approx(float(gap.norm()), rel=1e-5)


def test_it_is_the_overlap(pair, cli):
    a, b = (dataclasses.replace(x, base_model=None) for x in pair)
    found, overlap = cli("diff", "a", "b", "--json", "-v").json, lf.overlap(a, b)
    for field in ("shared_out", "shared_in", "interference", "interference_a", "cosine"):
        assert found[field] == pytest.approx(getattr(overlap, field))
    rows = {m["module"]: m for m in found["modules"]}
    for m in overlap.modules:
        assert rows[m.path]["angles_in"] == pytest.approx(m.angles_in.tolist())
        assert rows[m.path]["shared_out"] == pytest.approx(m.shared_out)
    text = cli("diff", "a", "b", columns=200).out
    for words in ("shared out", "shared in", "angle", "interference", "if merged", "°"):
        assert words in text, words


def test_what_only_one_has(pair, cli):
    found = cli("diff", "a", "b", "--json", "-v").json
    assert (found["only_in_a"], found["only_in_b"]) == (["x.0.k"], ["x.0.v"])
    assert found["extras"] == {"only_in_a": [], "only_in_b": ["odd"], "differ": []}
    assert found["config"]["r"] == [2, 3]
    assert found["config"]["base_model_name_or_path"] == [None, "other"]
    text = cli("diff", "a", "b").out
    for word in ("only in A", "x.0.k", "only in B", "x.0.v", "extras only in B", "odd", '"other"'):
        assert word in text


def test_the_same_update_in_another_gauge(tmp_path, make_adapter, cli):
    a = make_adapter({"q": (6, 5)}, 2, seed=1)
    lf.save(a, tmp_path / "a")
    lf.save(a.nested(), tmp_path / "b")
    found = cli("diff", tmp_path / "a", tmp_path / "b", "--json").json
    assert found["relative_distance"] < 1e-6
    assert found["cosine"] == pytest.approx(1)
    same = cli("diff", tmp_path / "a", tmp_path / "a")
    assert "Every module that both have is the same, but for rounding." in same.out


def test_against_a_library(world, cli):
    lib = world / "lib"
    found = cli("diff", world / "adapters" / "sql", f"{lib}:sql", "--json").json
    with lf.Library.open(lib) as opened:
        assert found["relative_distance"] == pytest.approx(opened.error("sql"), rel=1e-3)
    assert found["config"] == {}
    assert cli("diff", f"{lib}:sql", f"{lib}:law").code == 0


def test_a_path_with_a_colon_wins(here, cli):
    (here / "adapters" / "law").rename(here / "lib:sql")
    found = cli("diff", "lib:sql", "lib:law", "--json").json
    with lf.Library.open("lib") as lib:
        assert found["relative_distance"] == pytest.approx(lib.error("law"), rel=1e-3)


def test_a_name_with_a_colon(here, cli):
    with lf.Library.open("lib") as lib:
        lib.add("adapters/sql", "a:b/c")
    assert cli("diff", "lib:a:b/c", "lib:sql").code == 0


def test_refused_and_misshapen(tmp_path, make_adapter, cli):
    lf.save(make_adapter({"q": (6, 5)}, 2), tmp_path / "a")
    lf.save(make_adapter({"q": (5, 6)}, 2), tmp_path / "b")
    ran = cli("diff", tmp_path / "a", tmp_path / "b")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "module 'q' is (6, 5) in one adapter and (5, 6) in the other" in ran.err
    dora = {"layers.0.q.lora_magnitude_vector": torch.ones(6)}
    lf.save(
        make_adapter({"q": (6, 5)}, 2, extras=dora, config={"r": 2, "lora_alpha": 4}),
        tmp_path / "c",
    )
    ran = cli("diff", tmp_path / "a", tmp_path / "c")
    assert ran.code == 2
    assert f"{tmp_path / 'c'}: this is a DoRA adapter" in ran.err


def test_zero_updates_have_no_relative_distance(tmp_path, make_adapter, cli):
    a = make_adapter({"q": (6, 5)}, 2)
    lf.save(0.0 * a, tmp_path / "zero")
    lf.save(a, tmp_path / "a")
    found = cli("diff", tmp_path / "zero", tmp_path / "a", "--json").json
    assert (found["relative_distance"], found["cosine"]) == (None, 0.0)
    assert cli("diff", tmp_path / "zero", tmp_path / "a").code == 0
    same = cli("diff", tmp_path / "zero", tmp_path / "zero", "--json").json
    assert same["relative_distance"] == 0


def test_many_modules_are_cut_unless_verbose(tmp_path, make_adapter, cli):
    shapes = {f"layers.{n}.q": (3, 3) for n in range(25)}
    lf.save(make_adapter(shapes, 1, seed=1), tmp_path / "a")
    lf.save(make_adapter(shapes, 1, seed=2), tmp_path / "b")
    assert "and 5 more: --verbose" in cli("diff", tmp_path / "a", tmp_path / "b").out
    assert cli("diff", tmp_path / "a", tmp_path / "b", "--verbose").out.count("layers.") == 25


# resize


@pytest.mark.parametrize(
    ("option", "value"), [("rank", 2), ("energy", 0.8), ("tolerance", 0.3), ("budget", 300)]
)
def test_resize_is_the_best_of_its_size_and_measures_it(option, value, here, cli, dense):
    a = lf.load("adapters/sql")
    ran = cli("resize", "adapters/sql", "out", f"--{option}", value, "--json")
    (found,), written = ran.json["adapters"], lf.load("out")
    error = frobenius(dense, a, written) / frobenius(dense, a)
    assert found["error"] == pytest.approx(error, rel=1e-4)
    expected = a.resize(**{option: value})
    assert written.distance(expected) < 1e-5 * a.norm()
    assert found["parameters"] == [a.num_parameters, written.num_parameters]
    assert found["ranks"][1][1] == written.rank
    assert found["bytes"][1] == sum(p.stat().st_size for p in (here / "out").iterdir())


def test_resize_pads_casts_and_overwrites(here, cli):
    args = ["resize", "adapters/sql", "out", "--energy", "0.6"]
    assert cli(*args).code == 0
    assert lf.load("out").config["rank_pattern"]
    assert cli(*args).code == 2
    ran = cli(*args, "--pad", "--dtype", "float16", "--overwrite")
    assert ran.code == 0
    assert "float32 → float16" in ran.out
    padded = lf.load("out")
    assert not padded.config["rank_pattern"]
    assert {u.A.dtype for u in padded.modules.values()} == {torch.float16}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_resize_keeps_half_precision_where_rounding_is_small(dtype, tmp_path, make_adapter, cli):
    """What rounding adds to an error of half the norm is nothing, and to one of 1e-3 it is not."""
    a = make_adapter({"q": (64, 48)}, 4, dtype=torch.float64)
    U, _, Vh = a["q"].svd()
    for name, last in {"far": 1.0, "near": 1e-3}.items():
        S = torch.tensor([1.0, 1.0, 1.0, last], dtype=torch.float64)
        u = lf.LowRank(S.sqrt()[:, None] * Vh, U * S.sqrt())
        lf.save(lf.Adapter({"q": u.to(dtype=dtype)}), tmp_path / name)
    (row,) = cli("resize", tmp_path / "far", tmp_path / "a", "--rank", 3, "--json").json["adapters"]
    assert row["dtypes"][1] == [str(dtype).removeprefix("torch.")]
    exact = lf.load(tmp_path / "far").resize(rank=3)
    rounded = exact.distance(lf.load(tmp_path / "a"))
    assert 0 < rounded <= 0.1 * exact.distance(lf.load(tmp_path / "far"))
    ran = cli("resize", tmp_path / "near", tmp_path / "b", "--rank", 3)
    assert {u.A.dtype for u in lf.load(tmp_path / "b").values()} == {torch.float32}
    assert f"--dtype {str(dtype).removeprefix('torch.')} halves them" in " ".join(ran.out.split())
    ran = cli("resize", tmp_path / "far", tmp_path / "c", "--rank", 3, "--dtype", "float32")
    assert "halves" not in ran.out


def test_resize_of_what_is_small_enough_changes_nothing(here, cli):
    for k, size in enumerate((["--rank", 4], ["--rank", 9], ["--tolerance", 0])):
        ran = cli("resize", "adapters/sql", f"out{k}", *size)
        assert "rank        4, unchanged" in ran.out
        assert "the ranks are unchanged" in ran.out
        assert lf.load(f"out{k}").digest == lf.load("adapters/sql").digest
    assert cli("resize", "adapters/sql", "pad", "--rank", 4, "--pad").code == 0
    assert lf.load("pad").distance(lf.load("adapters/sql")) < 1e-5
    assert "unchanged" not in cli("resize", "adapters/sql", "out", "--rank", 3).out


@pytest.mark.parametrize("sources", [["adapters/sql", "lib:law"], ["adapters"], ["lib"], ["a*/*"]])
def test_resize_takes_many(sources, here, cli):
    ran = cli("resize", *sources, "out", "--rank", "1", "--json")
    found = {row["name"]: row for row in ran.json["adapters"]}
    assert found.keys() == {"sql", "law"} | ({"poems"} if len(sources) == 1 else set())
    for name, row in found.items():
        assert row["path"] == f"out/{name}"
        assert lf.load(row["path"]).rank == 1
    before = sorted(here.rglob("*"))
    ran = cli("resize", *sources, "out", "--rank", "2")
    assert (ran.code, "out/law is there" in ran.err or "--overwrite" in ran.err) == (2, True)
    assert sorted(here.rglob("*")) == before
    ran = cli("resize", *sources, "out", "--rank", "2", "--overwrite")
    assert [lf.load(f"out/{name}").rank for name in found] == [2] * len(found)
    assert f"{len(found)} adapters written to out" in ran.out


def test_resize_tells_which_of_many_it_could_not(here, cli):
    config = json.loads((here / "adapters/law/adapter_config.json").read_text())
    text = json.dumps({**config, "use_dora": True})
    (here / "adapters/law/adapter_config.json").write_text(text)
    ran = cli("resize", "adapters", "out", "--rank", "1")
    assert (ran.code, ran.err) == (1, "error: 1 of 3 adapters not written\n")
    assert "not written: law: " in ran.out
    assert sorted(p.name for p in (here / "out").iterdir()) == ["poems", "sql"]
