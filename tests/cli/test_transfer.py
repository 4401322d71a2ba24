"""`transfer`: one adapter or many, by shapes or by a base; what is told, what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafold as lf
from lorafold.demo.model import data_dir

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


@pytest.fixture
def wide(here):
    """The base's names with twice the width in and three times out, at `wide`."""
    state = load_file("base/model.safetensors")
    for key, W in state.items():
        if W.ndim == 2:
            state[key] = torch.zeros(3 * W.shape[0], 2 * W.shape[1])
    Path("wide").mkdir()
    save_file(state, "wide/model.safetensors")
    return "wide"


def test_by_shapes(here, cli):
    ran = cli("transfer", "adapters/sql", "--shape", "q_proj=30x20", "--shape", ".*=6x5", "-o", "o")
    assert (ran.code, ran.err) == (0, "")
    assert "method svd" in " ".join(ran.out.split())
    moved = lf.load("o")
    assert {moved[Q].shape, moved[V].shape} == {(30, 20), (6, 5)}
    same = lf.transfer("adapters/sql", shape={"q_proj": (30, 20), ".*": (6, 5)}).adapter
    assert same.distance(moved) < 1e-6 * same.norm()


def test_by_a_base_alone(here, wide, cli):
    found = cli("transfer", "adapters/sql", "--to", wide, "-o", "o", "--json").json
    (row,) = found["adapters"]
    sql, moved = lf.load("adapters/sql"), lf.load("o")
    assert {p: u.shape for p, u in moved.items()} == {
        p: (3 * u.shape[0], 2 * u.shape[1]) for p, u in sql.items()
    }
    assert moved.base_model == row["base_model"] == wide
    assert row["report"]["method"] == "svd"
    assert row["report"]["error"] is None
    assert row["report"]["norm_ratio"] == pytest.approx(1)
    assert row["rounding"] < 1e-6
    assert found["failed"] == {}


def test_copy_tells_how_far_the_bases_are_apart(here, cli):
    ran = cli(
        *("transfer", "adapters/sql", "--from", "base", "--to", "base"),
        *("--method", "copy", "-o", "o", "--base-model", "org/new"),
    )
    assert ran.code == 0
    assert "base distance" in ran.out
    assert "nearly the same weights" in ran.out
    assert lf.load("o").base_model == "org/new"


@pytest.mark.parametrize("source", ["adapters", "lib"])
def test_many_at_once(here, wide, cli, source):
    names = [p.name for p in sorted(Path("adapters").iterdir())]
    ran = cli("transfer", source, "--to", wide, "-o", "moved", "--method", "truncate")
    assert (ran.code, ran.err) == (0, "")
    for name in names:
        moved = lf.load(f"moved/{name}")
        assert {u.shape for u in moved.values()} <= {(72, 32), (24, 32)}
        assert name in ran.out


def test_what_can_not_be_moved_is_told_and_the_rest_is(here, wide, cli):
    config = json.loads(Path("adapters/sql/adapter_config.json").read_text())
    Path("adapters/sql/adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    ran = cli("transfer", "adapters", "--to", wide, "-o", "moved")
    assert ran.code == 1
    assert "not moved: sql: the adapter can't be transferred: this is a DoRA adapter" in ran.out
    assert "1 of" in ran.err
    assert not Path("moved/sql").exists()
    assert Path("moved/poems").is_dir()
    alone = cli("transfer", "adapters/sql", "--to", wide, "-o", "o")
    assert alone.code == 2
    assert "DoRA" in alone.err


def test_names_are_data(here, cli):
    a = lf.load("adapters/sql")
    lf.fold({"../x": a, "[red]b": a}, "odd")
    ran = cli("transfer", "odd", "--shape", ".*=8x8", "-o", "moved")
    assert ran.code == 0
    assert "[red]b" in ran.out
    known = json.loads(Path("moved/names.json").read_text())
    assert set(known.values()) == {"../x", "[red]b"}
    for folder in known:
        assert lf.load(f"moved/{folder}")[Q].shape == (8, 8)


def test_options_reach_the_method(here, cli):
    line = ("transfer", "adapters/sql", "--shape", ".*=4x4", "--overwrite", "-o", "o")
    cli(*line)
    plain = lf.load("o")
    cli(*line, "--rescale")
    assert lf.load("o").norm() > 1.5 * plain.norm()
    cli(*line, "--rank", "1", "--dtype", "float16")
    assert lf.load("o").rank == 1
    found = cli(*line, "--energy", "0.5", "--json").json["adapters"][0]
    assert found["ranks"][-1] < 4


def test_every_module_with_verbose(here, cli):
    ran = cli("transfer", "adapters/sql", "--shape", "q_proj=30x20", "-o", "o", "--verbose")
    assert "24×16" in ran.out
    assert "30×20" in ran.out
    assert V in ran.out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("adapters/sql -o o", "give --to, the base that it is for, or --shape"),
        ("adapters/sql -o o --shape 3x3", "'3x3' is not PATTERN=OUTxIN"),
        ("adapters/sql -o o --shape a=3x3 --shape a=4x4", "'a' is given twice"),
        ("adapters/sql -o o --shape q_proj=0x3", "whole numbers above 0"),
        ("adapters/sql -o o --shape w=3x3", "'w' matches none of the modules"),
        ("adapters/sql -o o --shape q=3x3 --to base", "give --shape, or bases; not both"),
        ("adapters/sql -o o --to nowhere", "no such folder: 'nowhere'"),
        ("adapters/sql -o o --to base --method svdd", "did you mean 'svd'?"),
        ("adapters/sql -o o --to base --rank 0", "rank must be a whole number"),
        ("adapters/sql -o o --to base --rank 1 --energy 1", "give rank or energy, not both"),
        ("adapters/sql -o lib --to base", "it is not an adapter"),
        ("adapters/sql -o adapters/sql --to base", "is the source"),
        ("nowhere -o o --to base", "no such file or directory"),
        ("adapters/sql -o o --to base --texts nowhere.txt", "no such file or directory"),
        ("adapters/sql -o o --to base --unchecked", "has no option 'unchecked'"),
    ],
)
def test_what_is_refused(here, cli, line, says):
    ran = cli("transfer", *line.split())
    assert ran.code == 2
    assert says in ran.err
    assert ran.err.count("\n") == 1
    assert not Path("o").exists()


@pytest.fixture
def pair(here):
    """Two of the demo's bases, base-s and base-t, an adapter of the first, and texts."""
    pytest.importorskip("transformers")
    shutil.copytree(data_dir() / "base", here / "base-s")
    shutil.copytree(data_dir() / "bases" / "deep", here / "base-t")
    shutil.copytree(data_dir() / "adapters" / "brackets", here / "brackets")
    text = (data_dir() / "heldout" / "brackets.txt").read_text()
    lines = [line for line in text.splitlines() if line.strip()][:20]
    Path("texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    return "--from", "base-s", "--to", "base-t"


def test_an_alignment_is_made_once_and_serves_transfers(pair, cli):
    line = ("align", "base-s", "base-t", "--texts", "texts.jsonl", "-o", "pair.safetensors")
    told = cli(*line, "--json").json
    assert told["texts"] == 20
    assert told["maps"] > 7
    again = cli(*line)
    assert again.code == 2
    assert "--overwrite" in again.err
    by_file, by_texts = (
        cli("transfer", "brackets", *pair, *how, "--method", "procrustes", "-o", out)
        for out, how in {
            "a": ("--alignment", "pair.safetensors"),
            "b": ("--texts", "texts.jsonl"),
        }.items()
    )
    assert by_file.code == by_texts.code == 0
    assert "R² of the alignment" in by_file.out
    a, b = lf.load("a"), lf.load("b")
    assert a.base_model == b.base_model == "base-t"
    assert a.distance(b) < 1e-2 * a.norm()  # the file keeps float32


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_with_two_bases_auto_chooses(pair, cli):
    ran = cli("transfer", "brackets", *pair, "--texts", "texts.jsonl", "-o", "o", "--json")
    report = ran.json["adapters"][0]["report"]
    assert ran.code == (1 if report["said"]["advice"] == "don't" else 0)
    assert report["method"] == "auto"
    assert report["said"]["chosen"] in report["said"]["scores"]
    assert lf.load("o").base_model == "base-t"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_auto_that_says_dont_is_exit_status_1(pair, cli, monkeypatch):
    monkeypatch.setattr("lorafold.transfer.methods.auto.LEAST", 2.0)
    ran = cli("transfer", "brackets", *pair, "--texts", "texts.jsonl", "-o", "o")
    assert ran.code == 1
    assert "don't use brackets" in ran.err
    assert lf.load("o").base_model == "base-t"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            "--tokenizers a --tokenizers b --tokenizers c",
            "give one for both bases, or two, found 3",
        ),
        ("--tokenizers texts.jsonl", "tokenizers: texts.jsonl holds none that transformers can"),
        ("--tokenizers bytes --method svd", "method 'svd' has no option 'tokenizers'"),
        ("--roles texts.jsonl", "--roles texts.jsonl: can't be read as JSON"),
        ("--device nowhere", "device 'nowhere' can't be used"),
        ("--device meta", "device 'meta' can't be used: nothing is computed on it"),
        ("--alignment base-s", "base-s is a folder, and an alignment is a file"),
        ("--method procrustes --option centre", "'centre' is not NAME=VALUE"),
        ("--method procrustes --option rank=3", "'rank' has a flag of its own"),
        ("--method procrustes --option roles=x", "'roles' has a flag of its own"),
        ("--method procrustes --option centre=1 --option centre=1", "'centre' is given twice"),
        (
            "--method procrustes --option center=true",
            "has no option 'center'; did you mean 'centre'",
        ),
        ("--method procrustes --option threshold=much", "threshold must be"),
    ],
)
def test_what_is_refused_between_bases(pair, cli, line, says):
    ran = cli("transfer", "brackets", *pair, "--texts", "texts.jsonl", "-o", "o", *line.split())
    assert ran.code == 2
    assert says in ran.err
    assert ran.err.count("\n") == 1
    assert not Path("o").exists()


def test_a_methods_own_options(pair, cli):
    line = ("transfer", "brackets", *pair, "--texts", "texts.jsonl", "--method", "procrustes")
    plain, scaled = (
        cli(*line, "-o", out, *own, "--json").json["adapters"][0]["report"]
        for out, own in {"a": (), "b": ("--option", "scale=false")}.items()
    )
    assert plain["norm_ratio"] != pytest.approx(scaled["norm_ratio"])


def test_tokenizers_instead_of_the_bases_own(pair, cli):
    for side in ("base-s", "base-t"):
        for path in Path(side).glob("tokenizer*"):
            path.unlink()
    line = ("align", "base-s", "base-t", "--texts", "texts.jsonl", "--overwrite", "-o", "p")
    ran = cli(*line)
    assert ran.code == 2
    assert "no tokenizer of its own: give one in --tokenizers" in ran.err
    one = cli(*line, "--tokenizers", "bytes", "--json").json
    two = cli(*line, *2 * ("--tokenizers", str(data_dir() / "base")), "--json").json
    assert one["tokens"] == two["tokens"] > 100


def test_a_table_for_modules_that_are_not_known(pair, cli):
    from transformers import LlamaForCausalLM

    from lorafold.transfer.align.bases import parts_of

    Path("table.json").write_text('{"q_proj": "cross.query"}')
    line = ("align", "base-s", "base-t", "--texts", "texts.jsonl", "-o", "p")
    assert cli(*line, "--roles", "table.json", "--modules", "cross", "--json").json["maps"] == 6
    model = LlamaForCausalLM.from_pretrained("base-t")
    assert len(parts_of(model, "target")) == 6 * 7 + 1


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", ["procrustes", "vocabulary", "distill"])
def test_the_bases_of_many_adapters_are_read_once(pair, cli, monkeypatch, method):
    from lorafold.transfer.align import bases

    read = []
    monkeypatch.setattr(bases, "_read", _counting(bases._read, read))
    shutil.copytree("brackets", "many/a")
    shutil.copytree("brackets", "many/b")
    ran = cli("transfer", "many", *pair, "--texts", "texts.jsonl", "--method", method, "-o", "o")
    assert (ran.code, len(read)) == (0, 2)
    a, b = lf.load("o/a"), lf.load("o/b")
    assert a.base_model == "base-t"
    assert all(torch.equal(u.B, b[p].B) and torch.equal(u.A, b[p].A) for p, u in a.items())


def _counting(function, calls):
    def counted(*args):
        calls.append(args)
        return function(*args)

    return counted


def test_libraries_stay_silent(pair):
    """In a process of its own: bars are switched off when transformers is first imported."""
    line = [
        "-c",
        "import lorafold.cli._output as o; o.EVERY = 1e9; from lorafold.cli import main; main()",
        "align",
        "base-s",
        "base-t",
        "--texts",
        "texts.jsonl",
        "-o",
        "p",
    ]
    ran = subprocess.run([sys.executable, *line], capture_output=True, text=True, check=True)
    assert "pairs of tokens" in ran.stdout
    assert ran.stderr == ""


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("base-s", "base-s is there already; give --overwrite"),
        ("base-s --overwrite", "base-s is a folder, and an alignment is a file"),
        ("texts.jsonl --overwrite", "texts.jsonl: the header claims"),
        ("base-s/model.safetensors --overwrite", "is no alignment"),
    ],
)
def test_where_an_alignment_can_not_go_is_told_before_it_is_made(
    pair, cli, monkeypatch, place, says
):
    from lorafold.transfer.align import bases

    monkeypatch.setattr(bases, "_read", None)  # not reached
    ran = cli("align", "base-s", "base-t", "--texts", "texts.jsonl", "-o", *place.split())
    assert ran.code == 2
    assert says in ran.err


def test_folders_of_an_alignment_are_made(pair, cli):
    line = ("align", "base-s", "base-t", "--texts", "texts.jsonl", "--modules", "attention.query")
    assert cli(*line, "-o", "new/folder/pair").code == 0
    assert Path("new/folder/pair").is_file()
