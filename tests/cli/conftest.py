"""Adapters, a base and a library as files, and the command line run on them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import lorafold as lf
from lorafold.cli import _output as output
from lorafold.cli import main

LAYERS = 3
SHAPES = {"q_proj": (24, 16), "v_proj": (8, 16)}
PATHS = {
    f"model.layers.{n}.self_attn.{name}": shape
    for n in range(LAYERS)
    for name, shape in SHAPES.items()
}


TEXTS = {
    "sql": [f"SELECT {c} FROM {t} WHERE id = {i}" for i, (c, t) in enumerate(
        [("name", "users"), ("price", "orders"), ("age", "people"), ("title", "books")]
    )],
    "poems": [
        "Shall I compare thee to a summer's day?",
        "Thou art more lovely and more temperate:",
        "Rough winds do shake the darling buds of May,",
        "And summer's lease hath all too short a date;",
    ],
    "law": [
        "§ 1 (1) The Lessee shall pay the Lessor.",
        "§ 2 (1) The Lessor shall deliver the Goods.",
        "§ 3 (2) The Lessee shall return the Goods.",
        "§ 4 (1) The Lessor shall inform the Lessee.",
    ],
}  # fmt: skip


class Ran:
    """What a command line gave."""

    def __init__(self, result):
        self.code, self.out, self.err = result.exit_code, result.stdout, result.stderr
        self.exception = result.exception

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def no_lines(monkeypatch):
    """How far the work is, is not told, however slow the machine."""
    monkeypatch.setattr(output, "EVERY", 1e9)


@pytest.fixture(scope="session")
def cli():
    """cli("info", path, …, columns=100) -> Ran; a traceback is never what a user may see."""

    def run(*args, columns=100, **extra):
        env = {"COLUMNS": str(columns), **extra.pop("env", {})}
        result = CliRunner().invoke(main, [str(a) for a in args], env=env, **extra)
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return Ran(result)

    return run


@pytest.fixture(scope="session")
def shapes():
    """{kind: (its fields, those of them with --verbose only)} of what --json prints, as told."""
    text = (Path(lf.__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    found = {}
    for line in text.partition("\n## JSON\n")[2].splitlines():
        if line.startswith("| `"):
            kind, _, fields = line.strip("| ").split("|", 2)
            fields = re.sub(r"\([^)]*\)", "", fields)
            tables = set(re.findall(r"\*`(\w+)`\*", fields))
            found[kind.strip(" `")] = set(re.findall(r"`(\w+)`", fields)) - tables, tables
    return found


@pytest.fixture(scope="session")
def world(tmp_path_factory, make_adapter):
    """A folder with adapters/{sql,poems,law}, base/, lib/, texts/, pairs; not to be changed."""
    folder = tmp_path_factory.mktemp("world")
    for seed, (name, rank) in enumerate({"sql": 4, "poems": 4, "law": 2}.items()):
        adapter = make_adapter(PATHS, rank, seed=seed, base_model="base")
        lf.save(adapter, folder / "adapters" / name)
    generator = torch.Generator().manual_seed(0)
    state = {f"{p}.weight": torch.randn(shape, generator=generator) for p, shape in PATHS.items()}
    state["model.embed_tokens.weight"] = torch.randn(32, 16, generator=generator)
    state["model.norm.weight"] = torch.ones(16)
    (folder / "base").mkdir()
    save_file(state, folder / "base" / "model.safetensors")
    lf.fold([folder / "adapters"], folder / "lib", tolerance=0.1).close()
    (folder / "texts").mkdir()
    for name, lines in TEXTS.items():
        (folder / "texts" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    words = ("horse", "green", "table", "river", "stone", "cloud", "music", "paper")
    pairs = [{"prompt": f"{w} -> ", "chosen": f"({w})", "rejected": f"{w} {w}"} for w in words]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "other.txt").write_text("\n".join(TEXTS["poems"]) + "\n")
    return folder


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """A copy of `world` to work in, as the current directory."""
    folder = tmp_path / "here"
    shutil.copytree(world, folder)
    monkeypatch.chdir(folder)
    return folder
