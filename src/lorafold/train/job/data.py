"""Files of examples as rows of TRL's columns: a text, messages, or a prompt and its completion.

JSON lines or one JSON array, CSV, Parquet, and plain text. Every row is checked before the first
step, and what is wrong with one is said with its file and line. An eighth that is held out is drawn
from the rows that differ, so that no row lies on both sides, and of each adapter's own.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import FileError, MismatchError, MissingExtraError
from ...files.disk.held import read_regular
from ...words import one_line, some_of
from ..packing import COLUMN

Row = dict[str, Any]
KINDS = {"text": ("text",), "messages": ("messages",), "prompt": ("prompt", "completion")}
_LONGEST = 2 << 30  # bytes of a file, which is read as a whole
_ROWS = 1024  # of a Parquet table at once
_BESIDE = (COLUMN, "tools", "chat_template_kwargs")
_SPEAKERS = {"human": "user", "gpt": "assistant"}  # of from/value, that ShareGPT has


@dataclass(frozen=True)
class File:
    """A file of data: its name, bytes, SHA-256, and how many rows it has."""

    name: str
    bytes: int
    sha256: str
    rows: int


@dataclass(frozen=True)
class Data:
    """Rows of one kind.

    Args:
        rows: of TRL's columns. kind: "text", "messages" or "prompt".
        names: of the adapters, in the order in which they come; empty without that column.
        files: where they came from. unused: columns that nothing is made of.
    """

    rows: list[Row]
    kind: str
    names: tuple[str, ...]
    files: tuple[File, ...]
    unused: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the files' own, in order."""
        return hashlib.sha256("".join(f.sha256 for f in self.files).encode()).hexdigest()


def read_data(paths: Sequence[str], columns: Mapping[str, str], lines: int) -> Data:
    """The rows of files.

    Args:
        columns: {what a column is: what it is called there}. lines: of plain text in a row.

    Raises:
        FileError: a file that can't be read, naming the line.
        MismatchError: a row of no known kind, or of another than the first; naming file and line.
    """
    rows: list[Row] = []
    files = []
    unused: dict[str, None] = {}
    first: tuple[str, bool] | None = None
    for path in paths:
        data = bytes_of(path)
        before = len(rows)
        for where, raw in rows_in(path, data, lines):
            try:
                row, kind, left = _checked(_renamed(raw, columns))
                _alike(first, (kind, COLUMN in row))
            except MismatchError as e:
                raise MismatchError(f"{path}: {where}: {e}") from e
            first = first or (kind, COLUMN in row)
            rows.append(row)
            unused |= dict.fromkeys(left)
        if len(rows) == before:
            raise FileError(f"{path}: there is nothing in it")
        digest = hashlib.sha256(data).hexdigest()
        files.append(File(Path(path).name, len(data), digest, len(rows) - before))
    if first is None:
        raise MismatchError("there is no data: give a file")
    names = dict.fromkeys(row[COLUMN] for row in rows if COLUMN in row)
    return Data(rows, first[0], tuple(names), tuple(files), tuple(unused))


def held_out(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(rows to train on, rows held out): a share of those that differ, of each adapter's own."""
    alike: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, row in enumerate(rows):
        alike[row.get(COLUMN, "")][json.dumps(row, sort_keys=True)].append(i)
    out: set[int] = set()
    for name, groups in alike.items():
        several = list(groups.values())
        count = min(max(round(share * len(several)), 1), len(several) - 1) if share else 0
        random.Random(f"{seed}:{name}").shuffle(several)
        out.update(i for group in several[:count] for i in group)
    return [r for i, r in enumerate(rows) if i not in out], [rows[i] for i in sorted(out)]


def shared(train: Sequence[Row], held: Sequence[Row]) -> int:
    """How many held-out rows are in the other part, too."""
    known = {json.dumps(row, sort_keys=True) for row in train}
    return sum(json.dumps(row, sort_keys=True) in known for row in held)


# Files


def bytes_of(path: str) -> bytes:
    """A file's bytes; a `FileError` names it."""

    def check(size: int) -> None:
        if size > _LONGEST:
            raise FileError(f"{path}: {size:,} bytes are more than can be read at once; divide it")

    try:
        return read_regular(path, check)
    except OSError as e:
        raise FileError(f"{path}: {e.strerror or e}") from e


def rows_in(path: str, data: bytes, lines: int = 1) -> Iterator[tuple[str, Any]]:
    """(where, row) of everything in a file of these bytes.

    Raises:
        FileError: no rows of a kind that is known, by file and line.
    """
    kind = Path(path).suffix.lower()
    if kind == ".parquet":
        yield from _parquet(path, data)
        return
    if kind not in (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".txt"):
        raise FileError(f"{path}: files are .jsonl, .json, .csv, .tsv, .parquet or .txt")
    try:
        text = data.decode("utf-8-sig")  # with a mark or without
    except UnicodeDecodeError as e:
        line = data[: e.start].count(b"\n") + 1
        raise FileError(f"{path}: line {line}: not UTF-8 text ({e.reason})") from e
    if kind == ".txt":
        yield from _plain(text, lines)
    elif kind in (".csv", ".tsv"):
        yield from _table(path, text, "," if kind == ".csv" else "\t")
    elif text.lstrip().startswith("["):
        yield from _array(path, text)
    else:
        yield from _json_lines(path, text)


def _json_lines(path: str, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", _json(path, line, number)


def _json(path: str, text: str, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        at = line + getattr(e, "lineno", 1) - 1
        reason = getattr(e, "msg", str(e))
        raise FileError(f"{path}: line {at}: not valid JSON ({reason})") from e


def _array(path: str, text: str) -> Iterator[tuple[str, Any]]:
    yield from ((f"row {k}", row) for k, row in enumerate(_json(path, text), 1))


def _table(path: str, text: str, delimiter: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    heads: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            where, line = f"line {line}", reader.line_num + 1  # a quoted cell may have many
            if not cells:
                continue
            if heads is None:
                heads = _heads(path, cells)
            elif len(cells) != len(heads):
                raise FileError(
                    f"{path}: {where}: {len(cells)} cells under {len(heads)} headings; a cell with "
                    f"{delimiter!r} or a line break in it must be quoted"
                )
            else:
                yield where, {k: v for k, v in zip(heads, cells, strict=True) if v != ""}
    except csv.Error as e:
        raise FileError(f"{path}: line {reader.line_num}: {e}") from e


def _heads(path: str, cells: list[str]) -> list[str]:
    heads = [cell.strip() for cell in cells]
    if len(set(heads)) < len(heads):
        raise FileError(f"{path}: line 1: two columns have the same heading")
    return heads


def _parquet(path: str, data: bytes) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingExtraError(
            "Parquet files take pyarrow, not there: pip install 'lorafold[train]'"
        ) from None
    number = 0
    try:
        # Some writers add checksums, which are not compared unless one asks for it.
        opened = parquet.ParquetFile(pyarrow.BufferReader(data), page_checksum_verification=True)
        for batch in opened.iter_batches(_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except Exception as e:  # a damaged table can raise anything
        raise FileError(f"{path}: can't be read as Parquet ({e})") from e


def _plain(text: str, lines: int) -> Iterator[tuple[str, Any]]:
    found = [line.removesuffix("\r") for line in text.split("\n")]
    for k in range(0, len(found), lines):
        one = "\n".join(found[k : k + lines]).strip("\n")
        if one.strip():
            yield f"line {k + 1}", {"text": one}


# Rows


def _renamed(raw: Any, columns: Mapping[str, str]) -> Row:
    if not isinstance(raw, Mapping):
        raise MismatchError(f"must be an object with columns, found {one_line(raw)}")
    row = {k: v for k, v in raw.items() if v is not None}
    for name, called in columns.items():
        if name != called and name in row and called in row:
            raise MismatchError(f"has both {name!r} and {called!r}, which columns= means by it")
    back = {called: name for name, called in columns.items()}
    return {back.get(k, k): v for k, v in row.items()}


def _checked(raw: Row) -> tuple[Row, str, list[str]]:
    """A row with the columns of its kind alone, the kind, and the columns that are left."""
    kinds = [kind for kind, names in KINDS.items() if any(name in raw for name in names)]
    if len(kinds) != 1:
        there = some_of(raw) or "nothing"
        what = "must have a text, or messages, or a prompt and a completion"
        if kinds:
            what = f"{some_of(kinds)} can't be told apart: leave one out"
        raise MismatchError(f"{what}; found {there}" + ("" if kinds else _REMEDY))
    (kind,) = kinds
    missing = [name for name in KINDS[kind] if name not in raw]
    if missing:
        raise MismatchError(f"has no {missing[0]}, or an empty one")
    row = {name: raw[name] for name in (*KINDS[kind], *_BESIDE) if name in raw}
    if kind == "text":
        _check_text("text", row["text"])
    elif kind == "messages":
        row["messages"] = _messages("messages", row["messages"])
        if not any(m["role"] == "assistant" for m in row["messages"]):
            raise MismatchError("none of its messages is the assistant's: nothing to learn from it")
    else:
        _pair(row)
    name = row.get(COLUMN, "default")
    if not isinstance(name, str) or not name.strip():
        raise MismatchError(f"{COLUMN} must be a name, found {one_line(name)}")
    return row, kind, [k for k in raw if k not in row]


_REMEDY = "; columns= says which of them it is"


def _pair(row: Row) -> None:
    """Check a prompt and its completion, both texts or both messages."""
    texts = [isinstance(row[name], str) for name in KINDS["prompt"]]
    if all(texts):
        _check_text("completion", row["completion"])  # a prompt may be empty
    elif any(texts):
        raise MismatchError("prompt and completion must both be texts, or both messages")
    else:
        for name in KINDS["prompt"]:
            row[name] = _messages(name, row[name])


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise MismatchError(f"{name} must be a text, found {one_line(value)}")
    if not value.strip():
        raise MismatchError(f"its {name} is empty")


def _messages(name: str, value: Any) -> list[Row]:
    """A conversation, also as JSON in a cell, also as from and value."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as e:
            raise MismatchError(f"{name} must be a list of messages, found a text") from e
    if not isinstance(value, list) or not value:
        raise MismatchError(f"{name} must be a list of messages, found {one_line(value)}")
    return [_message(name, k, one) for k, one in enumerate(value, 1)]


def _message(name: str, k: int, one: Any) -> Row:
    if isinstance(one, Mapping) and {"from", "value"} <= one.keys():
        rest = {key: v for key, v in one.items() if key not in ("from", "value")}
        speaker = one["from"]
        one = {"role": _SPEAKERS.get(str(speaker), speaker), "content": one["value"], **rest}
    if not isinstance(one, Mapping) or not isinstance(one.get("role"), str):
        raise MismatchError(f"{name}, {k}: a message must have a role and a content")
    if not isinstance(one.get("content"), str) and not one.get("tool_calls"):
        raise MismatchError(
            f"{name}, {k}: content must be a text, found {one_line(one.get('content'))}"
        )
    return {key: v for key, v in one.items() if v is not None}


def _alike(first: tuple[str, bool] | None, now: tuple[str, bool]) -> None:
    """Raise where a row is of another kind than the first."""
    if first is None:
        return
    if first[0] != now[0]:
        raise MismatchError(f"has a {now[0]}, and the rows before have a {first[0]}: keep one kind")
    if first[1] != now[1]:
        which = ("has no", "have one") if first[1] else ("has a", "have none")
        raise MismatchError(f"{which[0]} column {COLUMN}, and the rows before {which[1]}")


def counted(rows: Iterable[Row]) -> dict[str, int]:
    """{adapter: how many rows}; "" where they have none."""
    found: dict[str, int] = defaultdict(int)
    for row in rows:
        found[row.get(COLUMN, "")] += 1
    return dict(found)
