"""What a shell is offered for the end of a line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import ZshComplete

import lorafold as lf
from lorafold.cli import VERBS, _completion, main

SOURCE = Path(lf.__file__).parents[1]
RUN = "import sys; sys.argv[0] = 'lorafold'; from lorafold.cli import main; main()"
# Metavars of what is no path and no name.
WORDS = {
    *(
        "",
        "ADDRESS",
        "B1,B2",
        "KEY",
        "KIND",
        "LO,HI",
        "MODULE:FUNCTION",
        "NAME=PATH",
        "NAME=VALUE",
        "NAME=W",
        "NAMES",
        "T",
        "TEXT",
        "URL",
        "SIZE",
    ),
    *("PATTERN=OUTXIN", "RANKS", "W,W,…", "WHAT=COLUMN"),
}


def every_parameter():
    """(command, parameter) of all commands."""
    for verb in VERBS:
        command = main.get_command(click.Context(main), verb)
        for one in (command, *getattr(command, "commands", {}).values()):
            yield from ((one, p) for p in one.params)


def offered(line):
    """(kind, text) of what is offered for the last word of a line; "" where it ends in a space."""
    words = line.split(" ")
    complete = ZshComplete(main, {}, "lorafold", _completion.VARIABLE)
    return [(c.type, c.value) for c in complete.get_completions(words[:-1], words[-1])]


def plain(*values):
    return [("plain", value) for value in values]


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("info lib:", ["lib:law", "lib:poems", "lib:sql"]),
        ("info lib:s", ["lib:sql"]),
        ("info adapters/sql lib:p", ["lib:poems"]),
        ("info lib", ["lib", "lib:"]),
        ("diff lib:sql lib:l", ["lib:law"]),
        ("merge adapters/sql lib:l", ["lib:law"]),
        ("fold --name x=lib:s", ["x=lib:sql"]),
        ("verify lib lib:s", ["lib:sql"]),
        ("repair lib --sources lib:s", []),
        ("resize lib:s", ["lib:sql"]),
        ("rm lib ", ["law", "poems", "sql"]),
        ("rm lib sql ", ["law", "poems"]),
        ("unfold lib p", ["poems"]),
        ("rm nowhere ", []),
        ("rm adapters ", []),
        ("ref", ["refold"]),
        ("route a", ["ask"]),
        ("fold --form s", ["svd", "shared"]),
        ("resize --dty", ["--dtype"]),
    ],
)
def test_names_and_words(line, values, here):
    there = offered(line)
    if line.startswith("repair"):
        values = ["lib:sql"]
    assert sorted(there) == sorted(plain(*values))


@pytest.mark.parametrize(
    ("line", "kind"),
    [("info ad", "file"), ("fold --name x=ad", "file"), ("info lib/", "file"), ("ls l", "dir")]
    + [("merge adapters -o o", "file"), ("check adapters/sql --base b", "dir")]
    + [("info nolib:s", "file"), ("align base base --texts t", "file")],
)
def test_paths_are_left_to_the_shell(line, kind, here):
    there = offered(line)
    last = line.split(" ")[-1]
    assert [k for k, _ in there] == [kind] or ("lib", "plain") in there
    assert last.endswith(there[0][1]) or there[0][1] == last


def test_what_a_parameter_takes_is_known_of_all():
    """A new metavar has its place here, or in the table of what is offered."""
    known = _completion.SOURCES | _completion.NAMES | _completion.FOLDERS | _completion.FILES
    for command, parameter in every_parameter():
        taken = _completion.taken_by(parameter)
        assert taken in known | WORDS, (command.name, taken)
        if taken in known:
            assert hasattr(type(parameter.type), "shell_complete"), (command.name, taken)


def test_a_damaged_library_is_no_error_while_one_types(here):
    (here / "lib" / "library.json").write_text("{}")
    assert offered("info lib:") == []
    assert offered("rm lib ") == []


def in_bash(here, *lines):
    """What a real bash offers for each line, its parts behind colons and equal signs alone."""
    tool = here / "bin" / "lorafold"
    tool.parent.mkdir()
    tool.write_text(f"#!{sys.executable}\n{RUN}\n")
    tool.chmod(0o755)
    script = 'eval "$(_LORAFOLD_COMPLETE=bash_source lorafold)"\ncompopt() { :; }\n'
    script += (
        'try() { COMP_LINE="$1" COMP_POINT=${#1}; COMPREPLY=(); _lorafold_completion lorafold;'
    )
    script += ' echo "${COMPREPLY[*]}"; }\n'
    script += "".join(f'try "{line}"\n' for line in lines)
    path = os.pathsep.join([str(tool.parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env=env, cwd=here, check=True
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_which_breaks_words_at_colons(here):
    lf.fold({"a b": lf.load("adapters/sql"), "c": lf.load("adapters/law")}, "odd").close()
    lines = {
        "lorafold refo": "refold",
        "lorafold info lib:": "law poems sql",
        "lorafold info lib:sq": "sql",
        "lorafold fold --name x=lib:sq": "sql",
        "lorafold rm lib sql ": "law poems",
        "lorafold info odd:a": r"a\ b",
        "lorafold info ad": "",
    }
    assert in_bash(here, *lines) == list(lines.values())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_documented_lines_print_a_script(shell):
    text = (SOURCE.parent / "docs" / "cli.md").read_text(encoding="utf-8")
    assert f"{_completion.VARIABLE}={shell}_source lorafold" in text
    env = {**os.environ, _completion.VARIABLE: f"{shell}_source", "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(
        [sys.executable, "-c", RUN], capture_output=True, text=True, env=env, check=True
    )
    assert "lorafold" in done.stdout
    assert _completion.VARIABLE in done.stdout
