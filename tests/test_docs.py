"""What the documentation says is so: code runs, commands exist, links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import lorafold
from lorafold.cli import VERBS, main
from lorafold.demo.model import data_dir

ROOT = Path(lorafold.__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
KINDS = {"python", "sh", "text", "json"}
page_of = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


def blocks(page, kind=None):
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [text for name, text in found if kind in (None, name)]


def command_lines(page):
    for block in blocks(page, "sh"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


def anchors(page):
    """As they are made from headings: lower case, no punctuation, hyphens."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


# PEFT warns of what it looks up, and asks transformers for what that is to lose.
@pytest.mark.filterwarnings(r"ignore:.*:UserWarning:peft(\..*)?")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_runs_page_by_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = "\n".join(blocks(page, "python"))
    names = {"__name__": page.stem}
    exec(compile(script, page.name, "exec"), names)
    assert len(names) > 2, "the page's blocks defined nothing"


def test_pages_that_teach_the_api_have_python():
    for name in ("README.md", "docs/adapters.md", "docs/files.md", "docs/fold.md"):
        assert blocks(ROOT / name, "python"), name


@page_of
def test_every_block_says_what_it_is(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("```") == 2 * len(FENCE.findall(text))
    assert {kind for kind, _ in FENCE.findall(text)} <= KINDS


@page_of
def test_commands_and_options_exist(page):
    for words in command_lines(page):
        if words[0] != "lorafold":
            assert words[0] in {"make", "pip", "python"}, words
            continue
        assert words[1] in VERBS, words
        command = main.get_command(click.Context(main), words[1])
        if isinstance(command, click.Group):
            command = command.commands[words[2]]
        known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
        used = {word.partition("=")[0] for word in words[2:] if word.startswith("-")}
        assert used <= known, words


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for words in command_lines(page):
            assert words[0] != "make" or words[1] in targets, words


def test_the_readmes_commands_run(tmp_path, monkeypatch):
    for name in ("roman", "morse", "brackets"):
        shutil.copytree(data_dir() / "adapters" / name, tmp_path / "adapters" / name)
    monkeypatch.chdir(tmp_path)
    ran = 0
    for words in command_lines(ROOT / "README.md"):
        if words[0] == "lorafold":
            result = CliRunner().invoke(main, words[1:])
            assert result.exit_code == 0, f"{words}: {result.output}"
            ran += 1
    assert ran >= 5
    assert (tmp_path / "unfolded" / "roman" / "adapter_config.json").is_file()


@page_of
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        there = page.parent / file if file else page
        assert there.exists(), target
        assert there.resolve().is_relative_to(ROOT)
        assert not anchor or anchor in anchors(there), target


@page_of
def test_no_page_has_an_absolute_path(page):
    text = page.read_text(encoding="utf-8")
    # A path from the root, in code, a link or prose; `a/b`, 1/30 and https:// are none.
    found = re.findall(r"(?<![\w.:/)}\]<*-])(?:~?/[A-Za-z_][\w.-]*/|[A-Z]:\\)", text)
    assert not found


def test_an_absolute_path_would_be_found(tmp_path):
    bad = tmp_path / "bad.md"
    for text in ("see `/home/someone/lib`", "(/usr/share/x)", r"C:\Users"):
        bad.write_text(text)
        with pytest.raises(AssertionError):
            test_no_page_has_an_absolute_path(bad)


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    front = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in sorted((ROOT / "docs").glob("[a-z]*.md")):
        assert f"]({page.name})" in index
        assert f"](docs/{page.name})" in front


def test_the_site_builds_and_has_every_public_name(tmp_path):
    pytest.importorskip("mkdocstrings", reason="the extra docs is not installed")
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    pages = {p.stem: p.read_text(encoding="utf-8") for p in (tmp_path / "reference").iterdir()}
    names = {f"lorafold.{name}" for name in lorafold.__all__ if callable(getattr(lorafold, name))}
    names -= {f"lorafold.{name}" for name in (*lorafold.train.__all__, "LorafoldError")}
    for name in (*names, *(f"lorafold.train.{name}" for name in lorafold.train.__all__)):
        page = pages["train" if name.startswith("lorafold.train.") else "lorafold"]
        assert re.search(rf"<h2[^>]*>\s*(<code[^>]*>)?{re.escape(name)}\b", page), name
    for page in [*(tmp_path).glob("*.html"), *(tmp_path / "reference").iterdir()]:
        loaded = re.findall(
            r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', page.read_text()
        )
        assert not [url for url in loaded if "canonical" not in url], page.name


# The table of formats


def test_the_table_of_formats_is_what_code_and_tests_say():
    spec = importlib.util.spec_from_file_location("formats", ROOT / "tools" / "formats_table.py")
    formats = importlib.util.module_from_spec(spec)
    sys.modules["formats"] = formats  # where its dataclass looks for itself
    spec.loader.exec_module(formats)
    found = formats.marks(ROOT / "tests")
    text = formats.PAGE.read_text(encoding="utf-8")
    assert formats.filled(text, found) == text, "run tools/formats_table.py --write"
    without = [mark for mark in found if mark.form != "mlx"]
    with pytest.raises(ValueError, match="no test is marked as checking that 'mlx' is read"):
        formats.table(without)
    odd = [*found, formats.Mark("flat", "written", "nobody", "test_x.py")]
    with pytest.raises(ValueError, match=r"test_x\.py: 'flat' is not written"):
        formats.table(odd)


# The README's numbers


@pytest.fixture(scope="module")
def numbers():
    path = ROOT / "tools" / "readme_numbers.py"
    spec = importlib.util.spec_from_file_location("readme_numbers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_have_the_numbers_of_the_results(numbers):
    for page in numbers.PAGES:
        text = page.read_text(encoding="utf-8")
        assert numbers.filled(text, page=page) == text, "run tools/readme_numbers.py --write"


def test_every_result_has_its_row_and_its_script(numbers):
    results = {path.stem for path in numbers.RESULTS.glob("*/*.json")}
    assert results <= set(numbers.ROWS)
    for name in numbers.ROWS:
        assert (ROOT / "benchmarks" / f"{name}.py").is_file()


def test_a_changed_result_changes_the_readme(numbers, tmp_path):
    text = numbers.README.read_text(encoding="utf-8")
    shutil.copytree(numbers.RESULTS, tmp_path / "results")
    first, *others = (tmp_path / "results").glob("*/lowrank_svd.json")
    for path in others:
        path.unlink()
    path = tmp_path / "results" / "another machine" / "lowrank_svd.json"
    path.parent.mkdir()
    record = json.loads(first.read_text(encoding="utf-8"))
    shown = numbers.table(tmp_path / "results")
    dense = record["result"]["seconds_dense_1024"]
    for factor, same in ((2, True), (0.5, False)):  # of two machines the less flattering is shown
        record["result"]["seconds_dense_1024"] = factor * dense
        path.write_text(json.dumps(record), encoding="utf-8")
        assert (numbers.table(tmp_path / "results") == shown) == same
    assert numbers.filled(text, tmp_path / "results") != text
    first.unlink()
    del record["result"]["seconds_dense_1024"]
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(SystemExit, match="seconds_dense_1024"):
        numbers.table(tmp_path / "results")
    path.unlink()
    assert "lowrank_svd" not in numbers.table(tmp_path / "results")
