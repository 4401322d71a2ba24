"""`lorafold demo`: the command around the work, on three adapters (`make demo` runs all)."""

import functools
import shlex
import shutil

import pytest

from lorafold.demo import run
from lorafold.demo.model import data_dir


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Three adapters only, one tolerance beside retention, and an empty working directory."""
    for name in ("brackets", "number_words", "camel_case"):
        shutil.copytree(data_dir() / "adapters" / name, tmp_path / "sources" / name)
    options = {
        "adapters": tmp_path / "sources",
        "tolerances": (0.1, 0.3),
        "retention": None,
        "pieces": 1,
    }
    monkeypatch.setattr(run, "run_demo", functools.partial(run.run_demo, **options))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_table_and_commands_to_try(quick, cli):
    ran = cli("demo", columns=80)
    assert ran.code == 0, ran.err
    assert ran.err == ""
    lines = ran.out.splitlines()
    table = [line for line in lines if "iB " in line]
    assert [line[:22].strip() for line in table] == [
        "PEFT files, float32",
        "PEFT files, float16",
        "tolerance 0.1, default",
        "svd, same error",
        "svd, same bytes",
        "tolerance 0.3",
    ]
    assert all(len(line) <= 80 for line in lines if not line.startswith("  lorafold"))
    assert "Written to lorafold-demo." in ran.out
    assert "camel_case lowers the loss by" in " ".join(ran.out.split())
    nexts = [line.strip() for line in lines if line.startswith("  lorafold ")]
    assert len(nexts) == 4
    assert nexts[-1].startswith("lorafold transfer ")
    pytest.importorskip("transformers")
    for line in nexts:
        again = cli(*shlex.split(line)[1:])
        assert again.code == 0, f"{line}: {again.err}"


def test_json_is_the_report(quick, cli, shapes):
    ran = cli("demo", "-o", "a folder", "--json")
    assert ran.code == 0, ran.err
    assert ran.json.keys() == {"kind", *shapes["demo"][0]}
    assert ran.json["folder"] == "a folder"
    assert ran.json["adapters"] == 3
    assert [row["form"] for row in ran.json["rows"]][:2] == ["fold", "svd, same error"]
    assert (quick / "a folder" / "unfolded" / "brackets" / "adapter_config.json").is_file()
    assert all("'a folder" in line for line in ran.json["next"])
    taken = cli("demo", "-o", "a folder")
    assert taken.code == 2
    assert taken.err.count("\n") == 1
    assert "give --overwrite to replace it" in taken.err
    assert cli("demo", "-o", "a folder", "--overwrite").code == 0


def test_help(cli):
    ran = cli("demo", "--help")
    assert ran.code == 0
    assert ran.out.rstrip().splitlines()[-1].strip() == "lorafold demo"
