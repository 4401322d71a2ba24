"""`merge`: what is written, what is told of it, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import lorafold as lf
from lorafold.merge.methods import METHODS
from lorafold.merge.provenance import facts_of

PATH = "model.layers.0.self_attn.q_proj"


def test_weights_by_name(here, cli):
    ran = cli(
        "merge",
        "adapters/sql",
        "adapters/law",
        "-o",
        "out",
        "--weight",
        "sql=0.7",
        "--weight",
        "law=-0.3",
    )
    assert (ran.code, ran.err) == (0, "")
    assert "2 adapters merged by linear" in ran.out
    assert "rank     6" in ran.out
    sql, law = lf.load("adapters/sql"), lf.load("adapters/law")
    assert lf.load("out").distance(0.7 * sql - 0.3 * law) < 1e-5
    with safe_open("out/adapter_model.safetensors", "pt") as f:
        facts = json.loads(f.metadata()["lorafold_merge"])
    assert [(s["name"], s["weight"]) for s in facts["sources"]] == [("sql", 0.7), ("law", -0.3)]
    assert os.path.isfile("out/README.md")


def test_weights_in_order_and_names(here, cli):
    line = ["merge", "adapters/sql", "--name", "again=adapters/sql", "-o", "out", "--json"]
    found = cli(*line, "--weights", ".75,-.25").json
    assert [(s["name"], s["weight"]) for s in found["sources"]] == [("sql", 0.75), ("again", -0.25)]
    assert lf.load("out").distance(0.5 * lf.load("adapters/sql")) < 1e-5


@pytest.mark.parametrize(
    "sources", [["adapters"], ["adapters/*"], ["lib:law", "lib:poems", "lib:sql"], ["lib"], ["l*"]]
)
def test_folders_globs_and_libraries(here, cli, sources):
    found = cli(
        "merge", *sources, "-o", "out", "--method", "ties", "--density", "0.4", "--json"
    ).json
    assert sorted(s["name"] for s in found["sources"]) == ["law", "poems", "sql"]
    assert found["options"] == {"density": 0.4}
    assert found["error"] < 1e-6
    assert found["ranks"] == [[8, 10], [8, 10]]  # a v_proj has 8 rows


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("lorahub", "regmean", "slerp")])
def test_every_method_and_its_cut(here, cli, method):
    exact = cli("merge", "adapters", "-o", "exact", "--method", method, "--json")
    small = cli("merge", "adapters", "-o", "small", "--method", method, "--rank", "2", "--json")
    assert (exact.code, small.code) == (0, 0)
    assert lf.load("small").rank == 2
    a, b = lf.load("exact"), lf.load("small")
    if method not in ("lego", "ctm"):  # their rank is part of the method
        told = small.json["cut" if method == "linear" else "error"]
        assert a.distance(b) / a.norm() == pytest.approx(told, abs=1e-4)
        assert facts_of(b.config)["error"] == pytest.approx(told, abs=1e-4)


def test_a_tolerance_bounds_the_error(here, cli):
    found = cli("merge", "adapters", "-o", "out", "--tolerance", "0.3", "--json").json
    assert 0 < found["error"] <= 0.3


def test_delta_tells_what_the_cut_costs(here, cli):
    ran = cli(
        "merge",
        "adapters",
        "-o",
        "out",
        "--method",
        "ties",
        "--space",
        "delta",
        "--drop-rate",
        "0.5",
        "--rank",
        "3",
    )
    assert ran.code == 0
    assert "of ‖ΔW‖ lost" in ran.out
    assert lf.load("out").rank == 3


def test_what_is_cut_twice_is_told_once(here, cli):
    """To Σr by the rule, then to a tolerance: the file tells what is lost of what the rule gave."""
    whole = ["merge", "adapters", "--method", "ties", "--space", "delta"]
    first = cli(*whole, "-o", "first", "--rank", "6", "--json").json["cut"]
    found = cli(*whole, "-o", "out", "--tolerance", "0.5", "--json").json
    told = facts_of(lf.load("out").config)["error"]
    wanted = (found["cut"] ** 2 + (1 - found["cut"] ** 2) * found["error"] ** 2) ** 0.5
    assert told == pytest.approx(wanted, abs=1e-5)
    assert 0 < found["cut"] < first < told < 1


@pytest.mark.filterwarnings("default")
def test_missing_modules_are_listed(here, cli):
    a = lf.load("adapters/sql")
    lf.save(lf.Adapter({PATH: a[PATH]}, base_model="base"), "few")
    ran = cli("merge", "few", "adapters/sql", "-o", "out")
    assert ran.code == 0, ran.err
    assert "warning: counted as zero where missing, 5 of 6 modules: " in ran.err


def test_heads(here, cli):
    for n, value in (("sql", 1.0), ("law", 2.0)):
        a = lf.load(f"adapters/{n}")
        extras = {"base_model.model.score.weight": torch.full((2,), value)}
        config = {**a.config, "modules_to_save": ["score"]}
        lf.save(lf.Adapter(a.modules, extras, config), f"with/{n}")
    ran = cli("merge", "with", "-o", "out")
    assert ran.code == 2
    assert "with --heads, e.g. 'law'" in ran.err
    assert cli("merge", "with", "-o", "out", "--heads", "sql").code == 0
    assert lf.load("out").extras["base_model.model.score.weight"].tolist() == [1.0, 1.0]


def test_a_recipe(here, cli):
    (here / "r.yaml").write_text(
        "merge_method: ties\nbase_model: base\ndtype: bfloat16\nmodels:\n"
        "- {model: adapters/sql, parameters: {weight: 1, density: 0.5}}\n"
        "- {model: base+adapters/law, parameters: {weight: 0.5, density: 0.5}}\n"
    )
    ran = cli("merge", "r.yaml", "-o", "out", "--rank", "5")
    assert ran.code == 0, ran.err
    assert "ties (mergekit recipe)" in ran.out
    out = lf.load("out")
    assert out.rank == 5
    assert out[PATH].A.dtype == torch.bfloat16
    for more in (
        ["--method", "ties"],
        ["--method", "linear"],
        ["--space", "core"],
        ["--density", "0.5"],
        ["--weight", "sql=1"],
        ["--pico"],
    ):
        ran = cli("merge", "r.yaml", "-o", "other", *more)
        assert ran.code == 2
        assert f"leave out {more[0]}" in ran.err


def test_names_alone_and_how_adapters_of_a_recipe_are_read(here, cli):
    line = ["merge", "--name", "a=adapters/sql", "--name", "b=adapters/law", "-o", "out", "--json"]
    assert [s["name"] for s in cli(*line).json["sources"]] == ["a", "b"]
    (here / "r.YML").write_text(
        "merge_method: task_arithmetic\nmodels: [{model: adapters/sql, parameters: {weight: 1}}]\n"
    )
    os.remove("adapters/sql/adapter_config.json")
    assert "--alpha" in cli("merge", "r.YML", "-o", "again").err
    assert cli("merge", "r.YML", "-o", "again", "--alpha", "8").code == 0


def test_names_are_data(here, cli):
    ran = cli("merge", "--name", "<script>x</script>=adapters/sql", "adapters/law", "-o", "out")
    assert ran.code == 0
    assert "<script>" not in Path("out/README.md").read_text()
    assert "<script>x</script>" in ran.out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "Missing option '-o'"),
        ("-o out", "give adapters, or NAME=SOURCE with --name"),
        ("adapters -o out --lambda nan", "error: --lambda must be a finite number, found nan"),
        ("adapters -o out --method dare --drop-rate 2", "error: --drop-rate must lie in [0, 1)"),
        ("adapters -o out --method ties --density nan", "--density must lie in (0, 1], found nan"),
        ("adapters -o out --method ties --gamma .1", "no --gamma: breadcrumbs, knots, ctm do"),
        ("adapters", "Missing option '-o'"),
        ("nowhere -o out", "no such file or directory: 'nowhere'"),
        ("adapters -o lib", "lib exists already, and it is not an adapter"),
        ("adapters -o adapters/sql", "give --overwrite to replace it"),
        ("adapters -o adapters/sql --overwrite", "is the source"),
        ("adapters -o out --method tise", "did you mean 'ties'"),
        ("adapters -o out --density 0.5", "linear takes no --density"),
        ("adapters -o out --method ties --density 2", "density must lie in (0, 1]"),
        ("adapters -o out --method ties --density .5 --drop-rate .5", "not both"),
        ("adapters -o out --rank 2 --tolerance 0.1", "not both"),
        ("adapters -o out --weights 1,2", "2 weights for 3 sources"),
        ("adapters -o out --weights 1,2,x", "'x' is no number"),
        ("adapters -o out --weights 1,2,nan", "finite number"),
        ("adapters -o out --weight sql=1", "weights lack 'law', 'poems'"),
        ("adapters -o out --weight swl=1", "did you mean 'sql'"),
        ("adapters -o out --weight sql", "is not NAME=W"),
        ("adapters -o out --weight sql=1 --weight sql=2", "given twice"),
        ("adapters -o out --weight sql=1 --weights 1,2,3", "not both"),
        ("adapters adapters/sql -o out", "both named 'sql'"),
        ("adapters --name x -o out", "is not NAME=SOURCE"),
        ("adapters -o out --method lorahub", "in Python"),
        ("adapters -o out --method tsv --space delta", "--space 'core' only"),
        ("adapters -o out --heads swl", "--heads 'swl' is no source; did you mean 'sql'"),
        ("adapters -o out --space factors", "needs equal ones; use --space 'core'"),
        ("adapters -o out --lambda 1e300", "its scale of 1e+300 makes numbers that float32"),
        ("large adapters/sql -o out --dtype float16", "which float16 can't hold; bfloat16 and"),
        ("lib:sqk -o out", "did you mean 'sql'"),
        ("nothing.yaml -o out", "nothing.yaml: No such file"),
        ("nothing.yaml adapters/sql -o out", "give it alone"),
    ],
)
def test_what_is_refused(here, cli, line, says):
    if "large" in line:
        a = lf.load("adapters/sql")
        lf.save(lf.Adapter({p: lf.LowRank(u.A, 1e9 * u.B) for p, u in a.items()}), "large")
    before = sorted(os.listdir(here))
    ran = cli("merge", *line.split())
    assert ran.code == 2
    assert says in ran.err
    assert ran.err.count("\n") == 1
    assert sorted(os.listdir(here)) == before


def test_the_page_names_every_method():
    page = Path(lf.__file__).parents[2] / "docs"
    for method in METHODS:
        assert f"| `{method}` |" in (page / "merge.md").read_text(encoding="utf-8")
        if method not in ("lorahub", "regmean"):
            assert f"`{method}`" in (page / "cli.md").read_text(encoding="utf-8")
