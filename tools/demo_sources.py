"""Where the demo's texts come from: the Python standard library, and which part of it is held out.

A document belongs to the held-out split when the CRC of its key (a module's path, a topic, a block
of code points, a task's input) is divisible by eight. The base and all adapters share that rule, so
no held-out document is seen in any training.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

Split = Literal["train", "heldout"]

LIBRARY = Path(sysconfig.get_path("stdlib"))
# Kept out of the base's corpus: tables, tests and the parts that are tasks of their own.
APART = {"site-packages", "test", "tests", "idlelib", "tkinter"}
APART |= {"encodings", "pydoc_data", "lib2to3"}


def is_in(key: str, split: Split) -> bool:
    """Whether the document of this key belongs to the split."""
    return (zlib.crc32(key.encode()) % 8 == 0) == (split == "heldout")


@cache
def files(folder: str, pattern: str) -> tuple[tuple[str, str], ...]:
    """`(path below the library, text)` of the UTF-8 files that match, in sorted order."""
    found = []
    for path in sorted((LIBRARY / folder).glob(pattern)):
        try:
            found.append((path.relative_to(LIBRARY).as_posix(), path.read_bytes().decode()))
        except UnicodeDecodeError:
            continue
    return tuple(found)


@cache
def modules(split: Split) -> tuple[tuple[str, str], ...]:
    """`(path, source)` of the library's ordinary modules."""
    generated = ("_sysconfigdata", "this.py", "antigravity.py")
    return tuple(
        (path, text)
        for path, text in files(".", "**/*.py")
        if is_in(path, split)
        and not APART & set(path.split("/"))
        and not path.startswith(generated)
    )


@dataclass(frozen=True)
class Function:
    """A function of the library as its source shows it."""

    module: str
    owner: str
    name: str
    line: int
    arguments: tuple[str, ...]
    doc: str
    node: ast.FunctionDef


@cache
def functions(split: Split) -> tuple[Function, ...]:
    """Every function and method of the ordinary modules."""
    found: list[Function] = []
    for path, text in modules(split):
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for parent in ast.walk(ast.parse(text)):
            owner = parent.name if isinstance(parent, ast.ClassDef) else ""
            for node in ast.iter_child_nodes(parent):
                if isinstance(node, ast.FunctionDef):
                    names = tuple(a.arg for a in node.args.args if a.arg not in ("self", "cls"))
                    doc = ast.get_docstring(node) or ""
                    found.append(Function(module, owner, node.name, node.lineno, names, doc, node))
    return tuple(found)


@cache
def prose(split: Split) -> tuple[tuple[str, str], ...]:
    """`(key, text)` of English documentation: topics, long docstrings."""
    found = [(key, text) for key, text in sorted(topics.items()) if is_in(key, split)]
    for path, text in modules(split):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                doc = ast.get_docstring(node)
                if doc and len(doc) > 120:
                    found.append((f"{path}:{getattr(node, 'name', '')}", doc + "\n"))
    return tuple(found)


@cache
def words(split: Split) -> tuple[str, ...]:
    """The lower-case words of the documentation, three to nine letters long."""
    text = " ".join(text for part in ("train", "heldout") for _, text in prose(part))
    return tuple(
        sorted(word for word in set(re.findall(r"\b[a-z]{3,9}\b", text)) if is_in(word, split))
    )


def some_word(rng: random.Random, split: Split) -> str:
    """A word of the split: of the documentation, or of up to three invented syllables."""
    while True:
        word = rng.choice(words(split)) if rng.random() < 0.6 else _invented(rng)
        if is_in(word, split):
            return word


def _invented(rng: random.Random) -> str:
    starts, vowels, ends = "bcdfghjklmnprstvwz", "aeiou", ["", "", *"nrslt"]
    syllables = [rng.choice(starts) + rng.choice(vowels) + rng.choice(ends) for _ in range(3)]
    return "".join(syllables[: rng.randint(1, 3)])


# ---------------------------------------------------------------- the base


def base_corpus() -> bytes:
    """What the base is trained on: documentation, Python source and lines of simple formats."""
    parts: list[str] = []
    for _ in range(4):
        parts += [text for _, text in prose("train")]
    parts += [text for _, text in modules("train")]
    parts += 2 * list(_formats())
    return joined(parts, "base")


def joined(documents: list[str], seed: str) -> bytes:
    """The documents in a random order, one after the other."""
    random.Random(seed).shuffle(documents)
    return "\n".join(documents).encode(errors="replace")


def _formats() -> Iterator[str]:
    """Blocks of `this -> that` lines by simple rules, none of them the rule of a task."""
    rng = random.Random("formats")
    rules: list[Callable[[str], str]] = [
        lambda word: word,
        lambda word: f"{word} {word}",
        lambda word: word[0],
        lambda word: word[-1],
        lambda word: word[:3],
        lambda word: word[1:],
        " ".join,
        lambda word: word.capitalize(),
        lambda word: f"({word})",
    ]
    number_rules: list[Callable[[int], str]] = [
        str,
        lambda n: str(n + 1),
        lambda n: f"{n:06d}",
        lambda n: str(n)[-1],
    ]
    for _ in range(2200):
        mark = rng.choice([" -> ", " -> ", ": ", " = "])
        if rng.random() < 0.7:
            rule = rng.choice(rules)
            inputs = [some_word(rng, "train") for _ in range(rng.randint(8, 30))]
            yield "".join(f"{word}{mark}{rule(word)}\n" for word in inputs)
        else:
            number_rule = rng.choice(number_rules)
            numbers = [rng.randrange(10 ** rng.randint(1, 5)) for _ in range(rng.randint(8, 30))]
            yield "".join(f"{number}{mark}{number_rule(number)}\n" for number in numbers)
