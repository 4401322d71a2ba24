"""Who does the work, of the commands that compare and merge: the flags reach the verb."""

from __future__ import annotations

import pytest

import lorafold as lf

SHAPES = {f"layers.{n}.q_proj": (24, 16) for n in range(3)}


@pytest.fixture
def folder(tmp_path, make_adapter):
    for k, name in enumerate(("sql", "law", "art")):
        lf.save(make_adapter(SHAPES, 2 + k, seed=k), tmp_path / "adapters" / name)
    lf.fold(tmp_path / "adapters", tmp_path / "lib").close()
    return tmp_path


def told(ran):
    assert ran.code == 0, ran.err
    return ran.json


@pytest.mark.parametrize("flag", ["--work", "--workers"])
def test_what_is_told_is_the_same(folder, cli, monkeypatch, flag):
    monkeypatch.chdir(folder)
    lines = {
        "verify": ["verify", "lib", "adapters", "--json"],
        "similar": ["similar", "adapters", "--json"],
        "merge": ["merge", "adapters", "-o", "both", "--method", "ties", "--overwrite", "--json"],
    }
    for verb, line in lines.items():
        here = told(cli(*line))
        if verb == "merge":
            before = (folder / "both/adapter_model.safetensors").read_bytes()
        assert told(cli(*line, flag, "2" if flag == "--workers" else verb)) == here
        assert flag == "--workers" or list((folder / verb).glob("*.done"))
    assert (folder / "both/adapter_model.safetensors").read_bytes() == before


def test_a_recipe_is_merged_by_others_too(folder, cli, monkeypatch):
    monkeypatch.chdir(folder)
    recipe = """
merge_method: ties
base_model: adapters/base
models:
  - {model: adapters/sql, parameters: {weight: 1, density: 0.5}}
  - {model: adapters/law, parameters: {weight: 0.5, density: 0.5}}
"""
    (folder / "recipe.yaml").write_text(recipe)
    line = ["merge", "recipe.yaml", "-o", "both", "--rank", "3", "--overwrite"]
    found = []
    for more in ([], ["--work", "work"]):
        assert cli(*line, *more).code == 0
        found.append((folder / "both/adapter_model.safetensors").read_bytes())
    assert found[0] == found[1]
    assert list((folder / "work").glob("*.done"))


@pytest.mark.parametrize("line", [["verify", "lib"], ["similar"], ["merge", "-o", "both"]])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ray", "head:10001"], "'head:10001' is not ray://HOST:PORT, nor local"),
        (["--workers", "0"], "0 is not in the range x>=1"),
        (["--ray", "local", "--workers", "2"], "give --ray or --workers, not both"),
        (["--work", "lib"], "is no work directory, and not empty: give an empty one"),
    ],
)
def test_who_can_not_work_is_told(folder, cli, monkeypatch, line, flags, message):
    monkeypatch.chdir(folder)
    ran = cli(*line, "adapters", *flags)
    assert ran.code == 2
    assert message in ran.err
