"""Example texts as files: an example every so many lines, or JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import FileError, MismatchError


def examples_of(path: Path, lines: int) -> Iterator[str]:
    """The examples of a text file: so many lines each, none of them empty."""
    found = lines_of(_text(path))
    for k in range(0, len(found), lines):
        text = "\n".join(found[k : k + lines]).strip()
        if text:
            yield text


def named_texts(path: Path, needed: bool = True) -> Iterator[tuple[str | None, str]]:
    """Name and text of every line of a .jsonl file.

    Args:
        needed: every line must have a name, which may be null; else it may lack it.
    """
    what, missing = ('a "name" and a "text"', 0) if needed else ('a "text"', None)
    for number, line in enumerate(lines_of(_text(path)), 1):
        if not line.strip():
            continue
        record: Any = None
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise FileError(f"{path}: line {number}: not valid JSON ({e})") from e
        named = isinstance(record, dict) and isinstance(record.get("name", missing), str | None)
        if not named or not isinstance(record.get("text"), str):
            raise FileError(f"{path}: line {number}: must have {what}")
        yield record.get("name"), record["text"]


def lines_of(text: str) -> list[str]:
    """The lines of a text; a form feed and the like, which a text may hold, ends none."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def _text(path: Path) -> str:
    from ..files.config import read_text

    if not os.path.exists(path):
        raise FileError(f"no such file or directory: {str(path)!r}")
    return read_text(path)


def texts_of(text: str, lines: int) -> list[str]:
    """The texts of a file, whatever they are called in it.

    Raises:
        FileError: it can't be read. MismatchError: there are none in it.
    """
    path = Path(text)
    if path.suffix == ".jsonl":
        found = [one for _, one in named_texts(path, needed=False)]
    else:
        found = list(examples_of(path, lines))
    if not found:
        raise MismatchError(f"{text}: there are no texts in it")
    return found
