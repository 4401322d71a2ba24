"""The container file starts what there is: its commands, options and extras are lorafold's.

It is not built here: that needs a container engine and its base image.
"""

import json
import re
import shlex
from pathlib import Path

import click

from lorafold.cli import main

ROOT = Path(__file__).parents[2]
# Lines that go on are one line.
TEXT = re.sub(r"\\\n\s*", "", (ROOT / "Containerfile").read_text(encoding="utf-8"))


def stages():
    """{stage: its lines}; the last, which is built where none is named, is ''."""
    found = {}
    for line in TEXT.splitlines():
        if match := re.fullmatch(r"FROM (\S+)(?: AS (\w+))?", line):
            lines = found.setdefault(match[2] or "", list(found.get(match[1], ())))
        elif found and not line.startswith("#"):
            lines.append(line)
    return found


def last(lines, word):
    return next(line.partition(" ")[2] for line in reversed(lines) if line.startswith(f"{word} "))


def check(words):
    """A command line is one of lorafold's, with options that it has."""
    assert words[0] == "lorafold"
    command = main.get_command(click.Context(main), words[1])
    assert command is not None, words
    known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
    assert {w.partition("=")[0] for w in words[2:] if w.startswith("-")} <= known, words


def test_the_image_is_the_command_unless_another_stage_is_named():
    found = stages()
    assert set(found) == {"command", "serve", ""}
    for name in ("command", ""):
        assert json.loads(last(found[name], "ENTRYPOINT")) == ["lorafold"]


def test_the_serving_stage_starts_the_server_on_what_it_has_folded():
    lines = stages()["serve"]
    start = [*json.loads(last(lines, "ENTRYPOINT")), *json.loads(last(lines, "CMD"))]
    check(start)
    folded = next(part for line in lines for part in line.split("&&") if " fold " in part)
    words = shlex.split(re.sub(r'"\$\(.*?\)"', "DEMO", folded))
    check(words)
    assert start[2] == "demo"
    assert start[start.index("--library") + 1] == words[words.index("-o") + 1]
    assert last(lines, "USER") != "root"
    port = last(lines, "EXPOSE")
    assert f":{port}/health" in last(lines, "HEALTHCHECK")
    serve = main.get_command(click.Context(main), "serve")
    assert str(next(p.default for p in serve.params if p.name == "port")) == port


def test_its_extras_are_there():
    extras = re.search(r"^ARG EXTRAS=(.*)$", TEXT, re.MULTILINE)[1].split(",")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = project.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    assert set(extras) <= set(re.findall(r"^([\w-]+) = \[", table, re.MULTILINE))
    assert "serve" in extras
