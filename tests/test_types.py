"""What a type checker is told: the words that options take are those that the code knows."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

import lorafold
from lorafold.attach.begin import specs
from lorafold.fold import options
from lorafold.merge import methods
from lorafold.prefixes import POWERS, Scaling
from lorafold.quantize import formats
from lorafold.train.steering import barrier
from lorafold.transfer.transfer import METHODS, Name

SRC = Path(lorafold.__file__).parent

WORDS = [
    (options.Form, options.FORMS),
    (specs.Selection, specs.SELECTIONS),
    (methods.Name, {*methods.METHODS, *methods.ALIASES}),
    (methods.Space, methods.SPACES),
    (Scaling, POWERS),
    (formats.Kind, formats.FORMATS),
    (barrier.Aggregate, barrier.AGGREGATES),
    (Name, METHODS),
]


@pytest.mark.parametrize(("literal", "known"), WORDS)
def test_words_are_those_of_the_tables(literal, known):
    assert sorted(get_args(literal)) == sorted(known)


def test_keywords_of_fold_are_its_options():
    told = {name: of.__forward_arg__ for name, of in options.Folding.__annotations__.items()}
    assert told == {f.name: f.type for f in fields(options.Options)}


SNIPPET = """
from lorafold.attach.begin.specs import LoRA, PiSSA
from lorafold.fold.fold import fold
from lorafold.merge.merge import merge

fold("adapters", form="svd", tolerance=0.1)
LoRA(rank=8, targets=["q_proj"])
PiSSA(select="min_std")
merge("adapters", "ties", space="delta", density=0.3)
fold("adapters", form="svdd")
fold("adapters", tolerence=0.1)
PiSSA(select="cho_rej_min_std")
LoRA(r=8)
merge("adapters", "tiess")
"""


def test_a_type_checker_finds_slips(tmp_path):
    pytest.importorskip("mypy")
    snippet = tmp_path / "snippet.py"
    snippet.write_text(SNIPPET)
    # The files that are asked, and no others, which takes seconds instead of minutes.
    names = ("attach/begin/specs", "attach/begin/records", "fold/fold", "fold/options")
    files = [SRC / f"{name}.py" for name in (*names, "merge/merge", "merge/methods")]
    options = ["--follow-imports=skip", "--config-file=", f"--cache-dir={tmp_path / 'cache'}"]
    command = [sys.executable, "-m", "mypy", *options, "--explicit-package-bases"]
    done = subprocess.run(
        [*command, str(snippet), *map(str, files)],
        capture_output=True,
        text=True,
        check=False,
        cwd=SRC.parent,
        env={"MYPYPATH": str(SRC.parent), "PATH": ""},
    )
    lines = SNIPPET.splitlines()
    found = re.findall(r"snippet\.py:(\d+): error", done.stdout)
    wrong = {lines[int(number) - 1] for number in found}
    assert wrong == set(lines[-5:]), done.stdout + done.stderr
