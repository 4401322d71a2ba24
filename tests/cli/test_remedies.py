"""What messages say to do can be done where they are shown: flags here, keywords in Python."""

from __future__ import annotations

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import click
import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafold as lf
from lorafold.cli import main
from lorafold.cli._command import flags_of
from lorafold.cli._remedies import as_flags

SOURCE = Path(lf.__file__).parent
# What begins with `x must be` or says what a verb takes is of Python's own objects, which no
# command line can give; the pages of `report` are no messages.
OF_OBJECTS = re.compile(
    r"attach takes|calibration must be|use\(\[|Options\.__init__|what lf\.|merge takes|<!DOCTYPE"
)
PYTHON = re.compile(
    r"\w+=(?:\s|$|True|torch|[,;:)])|\b(?:torch|dataclasses|lf)\.\w|\b\w+\((?:\)|[^()]*[=…])"
)
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
DANGLING = re.compile(r"(?:[,;:(]| or| and| give)\s*$|^\s*[,;:)]|  |\( | \)")


@cache
def messages():
    """(where, text) of every text in the code that may be told, with a word for what it names."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        nodes = [ast.parse(path.read_text(encoding="utf-8"))]
        while nodes:
            n = nodes.pop()
            if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant):
                continue  # a docstring
            if isinstance(n, ast.Constant) and isinstance(n.value, str):
                text = n.value
            elif isinstance(n, ast.JoinedStr):
                text = "".join(named(v) for v in n.values)
            else:
                nodes += ast.iter_child_nodes(n)
                continue
            if " " in text and not OF_OBJECTS.search(text):
                found.append((f"{path.relative_to(SOURCE)}:{n.lineno}", text))
    return found


def named(value):
    if isinstance(value, ast.Constant):
        return value.value
    return "'it'" if value.conversion == ord("r") else "it"


def commands(group=main, path=()):
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


COMMANDS = dict(commands())


def own_flags(command):
    options = (p for p in command.params if isinstance(p, click.Option))
    return {name for p in options for name in p.opts if name.startswith("--")}


def lines(text):
    """The command lines in backquotes, and the text without whatever is in backquotes."""
    quoted = re.findall(r"`([^`]*)`", text)
    return [q for q in quoted if q.startswith("lorafold ")], re.sub(r"`[^`]*`", "it", text)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_tells_its_own_flags_and_no_python(name):
    command = COMMANDS[name]
    flags, known = flags_of(command), own_flags(command)
    wrong, told = [], 0
    for where, text in messages():
        if where.startswith("cli/") and not PYTHON.search(text):
            continue  # a command's own, which knows what it has
        shown = as_flags(text, flags)
        if shown == text and not PYTHON.search(lines(text)[1]):
            continue
        told += 1
        outside = re.sub(r"--option [a-z_]+=", "it", lines(shown)[1])
        if PYTHON.search(outside) or not set(FLAG.findall(outside)) <= known:
            wrong.append((where, shown))
        if DANGLING.search(outside) and not DANGLING.search(text):
            wrong.append((where, shown))
        assert re.search(r"\w", shown) or not re.match(r"\w", text), (where, text)
    assert not wrong
    assert told > 100


def test_python_tells_no_flags():
    """But for whole command lines, in backquotes, that are there."""
    for where, text in messages():
        if where.startswith(("cli/", "demo/")):  # of the command line alone
            continue
        found, rest = lines(text)
        assert not FLAG.search(rest), (where, text)
        for line in found:
            verb, *words = shlex.split(line)[1:]
            assert set(FLAG.findall(" ".join(words))) <= own_flags(COMMANDS[verb]), (where, line)


def test_the_walk_finds_what_is_wrong():
    texts = {text for _, text in messages()}
    assert any("load it with dtype=torch.float32" in text for text in texts)
    assert PYTHON.search("load it with dtype=torch.float32")
    assert PYTHON.search("use dataclasses.replace(adapter, base_model=…)")
    assert PYTHON.search("load(…, alpha=) reads it")
    assert DANGLING.search("give it, or")


def test_what_a_command_has_no_flag_for_is_left_out():
    flags = {"dtype": "--dtype", "alpha": "--alpha", "rate": "--option rate="}

    def told(text):
        return as_flags(text, flags)

    assert told("x is narrow: load it with dtype=torch.float32") == (
        "x is narrow: load it with --dtype float32"
    )
    assert told("no α; give alpha= (the α; the rank is its own)") == (
        "no α; give --alpha (the α; the rank is its own)"
    )
    assert told("a; use lf.load(path, x=…), or give alpha=") == "a; give --alpha"
    assert told("a; give alpha=, or give beta=") == "a; give --alpha"
    assert told("a: give beta=; see b") == "a; see b"
    assert told("a (adapter.apply_to) is b; c (d)") == "a is b; c (d)"
    assert told("give a lower rate= than 1") == "give a lower --option rate= than 1"
    assert told(told("give a lower rate= than 1")) == told("give a lower rate= than 1")
    assert told("beta= is 1; it must not") == "beta is 1; it must not"
    assert told("found torch.int8; 'alpha=' is a name, /a/alpha= too") == (
        "found int8; 'alpha=' is a name, /a/alpha= too"
    )
    assert told("run `lf.load(x, beta=1)` there") == "run `lf.load(x, beta=1)` there"


# The remedies themselves


@pytest.fixture
def narrow(here):
    """adapters/narrow, whose factors are of 8 bits, and what they are in float32."""
    place = here / "narrow"
    lf.save(lf.load(here / "adapters/sql"), place)
    file = place / "adapter_model.safetensors"
    tensors = {k: t.to(torch.float8_e5m2) for k, t in load_file(file).items()}
    save_file(tensors, file)
    return lf.load(place, dtype=torch.float32)


@pytest.mark.parametrize(
    "line",
    [
        "info narrow",
        "info narrow adapters/sql",
        "diff narrow adapters/sql",
        "similar narrow adapters/sql",
        "anatomy narrow",
        "resize narrow out --rank 1",
        "merge narrow adapters/sql -o out",
        "merge-into base narrow -o out",
        "transfer narrow --shape q_proj=48x32 -o out",
        "fold narrow adapters/sql -o other",
        "add lib narrow",
        "verify lib --name sql=narrow",
    ],
)
def test_narrow_factors_are_read_with_the_flag_that_the_message_says(line, here, narrow, cli):
    ran = cli(*line.split())
    assert "narrow" in ran.err + ran.out
    assert "--dtype float32" in ran.err
    again = cli(*line.split(), "--dtype", "float32")
    if line.startswith("verify"):
        assert again.code == 1  # it is another adapter than the library's
        assert "sql" in again.err
        assert "--dtype" not in again.err
    else:
        assert again.code == 0, again.err


def test_a_verb_computes_with_the_exact_values(here, narrow, cli):
    found = cli("info", "narrow", "--dtype", "bfloat16", "--json").json
    assert found["norm"] == pytest.approx(narrow.norm(), rel=1e-6)
    assert found["dtypes"] == {"float8_e5m2": len(narrow)}
    assert cli("resize", "narrow", "out", "--rank", "9", "--dtype", "float16").code == 0
    assert lf.load(here / "out").distance(narrow) < 1e-3 * narrow.norm()


@pytest.mark.parametrize("line", ["similar a b", "merge a b -o out", "fold a b -o other"])
def test_one_base_under_two_names(line, here, cli):
    adapter = lf.load(here / "adapters/sql")
    for name in "ab":
        lf.save(adapter, here / name, base_model=f"org/{name}")
    ran = cli(*line.split())
    assert ran.code == 2
    assert "load them with one --base-model" in ran.err
    ran = cli(*line.split(), "--base-model", "org/base")
    assert ran.code == 0, ran.err


def test_a_folder_of_vlora_says_how_to_name_one(here, cli):
    (here / "sub").mkdir()
    (here / "sub" / "subspace_meta.json").write_text("{}")
    ran = cli("diff", "sub", "adapters/sql")
    assert ran.code == 2
    assert "name one of its adapters, as sub:NAME" in ran.err
