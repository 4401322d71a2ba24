"""Fill the table of file formats in docs/files.md from the code and the tests, or check that it is.

    python tools/formats_table.py --write
    python tools/formats_table.py --check        # exit status 1 where the page differs

What is read and written is what the code lists. Who checks it is what the tests say themselves: a
test that compares a format with somebody else's code is marked, once for each way,

    @pytest.mark.form("gguf", "written", by="llama.cpp")

A format, or a way of it, that no test is marked for fails this script.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "files.md"
START, END = "<!-- formats -->", "<!-- /formats -->"
WAYS = ("read", "written")
FOLDER_OF_MANY = "vlora"  # which `load_many` reads


@dataclass(frozen=True)
class Mark:
    """What a test says that it checks: a format, a way, against whom; and where it is."""

    form: str
    way: str
    by: str
    file: str


def marks(tests: Path) -> list[Mark]:
    """Those of all tests, by their source."""
    found = []
    for path in sorted(tests.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.form":
                form, way = (ast.literal_eval(arg) for arg in node.args)
                by = {k.arg: ast.literal_eval(k.value) for k in node.keywords}["by"]
                found.append(Mark(form, way, by, path.relative_to(tests).as_posix()))
    return found


def ways() -> dict[str, tuple[str, ...]]:
    """{format: ways}, as the code has them."""
    from lorafold.files.formats.readers import READ
    from lorafold.files.formats.registry import WRITTEN

    written = {"peft", "portable", *WRITTEN}
    names = dict.fromkeys(["peft", *WRITTEN, *READ])
    lists = dict(zip(WAYS, (READ, written), strict=True))
    found = {name: tuple(way for way in WAYS if name in lists[way]) for name in names}
    return {**found, FOLDER_OF_MANY: ("read",)}


def said(name: str) -> str:
    """What messages call a format."""
    from lorafold.files.formats.readers import reader

    return "vLoRA" if name == FOLDER_OF_MANY else reader(name).said


def table(found: list[Mark]) -> str:
    """The table, in Markdown.

    Raises:
        ValueError: a mark of nothing that is there, or nothing that marks a format.
    """
    there = ways()
    for mark in found:
        if mark.way not in there.get(mark.form, ()):
            raise ValueError(f"{mark.file}: {mark.form!r} is not {mark.way}")
    rows = [
        "| form | `format=` | read, checked by | written, checked by | tests |",
        "|---" * 5 + "|",
    ]
    for form, own in there.items():
        cells = [_checkers(form, way, found) if way in own else "not" for way in WAYS]
        files = dict.fromkeys(mark.file for mark in found if mark.form == form)
        name = f"`{form}`" if form != FOLDER_OF_MANY else "`load_many`"
        links = ", ".join(f"[{Path(file).stem}](../tests/{file})" for file in files)
        rows.append(f"| {' | '.join([said(form), name, *cells, links])} |")
    return "\n".join(rows)


def _checkers(form: str, way: str, found: list[Mark]) -> str:
    """By whom a way of a format is checked.

    Raises:
        ValueError: by nobody.
    """
    by = dict.fromkeys(mark.by for mark in found if (mark.form, mark.way) == (form, way))
    if not by:
        raise ValueError(f"no test is marked as checking that {form!r} is {way}")
    return ", ".join(by)


def filled(text: str, found: list[Mark]) -> str:
    """The page with the table between its markers."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{PAGE} has no {START} … {END}")
    return f"{before}{START}\n{table(found)}\n{END}{after}"


def main() -> Iterator[str]:
    """Write or check; yields what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true")
    what.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    new = filled(text, marks(ROOT / "tests"))
    if options.write:
        PAGE.write_text(new, encoding="utf-8")
    elif new != text:
        yield f"{PAGE} is not what the tests say: run tools/formats_table.py --write"


if __name__ == "__main__":
    problems = list(main())
    print("\n".join(problems), file=sys.stderr, end="\n" if problems else "")
    sys.exit(bool(problems))
