"""Pairs of answers: what is read of a file, each row checked."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import FileError, MismatchError
from ...words import one_line
from ..job.data import bytes_of, rows_in

COLUMNS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Pair:
    """A prompt and two answers to it.

    Raises:
        MismatchError: one of them is no text or empty, or both answers are the same.
    """

    prompt: str
    chosen: str
    rejected: str

    def __post_init__(self) -> None:
        for name in COLUMNS:
            value = getattr(self, name)
            if not isinstance(value, str):
                raise MismatchError(f"{name} must be a text, found {one_line(value)}")
            if not value:
                raise MismatchError(f"{name} is empty")
        if self.chosen == self.rejected:
            raise MismatchError(f"chosen and rejected are the same: {one_line(self.chosen)}")

    @staticmethod
    def of(row: Any) -> Pair:
        """The pair of a row with these columns.

        Raises:
            MismatchError: it has not all of them, or as for a pair.
        """
        if isinstance(row, Pair):
            return row
        if not isinstance(row, Mapping):
            raise MismatchError(f"a pair must be an object, found {one_line(row)}")
        missing = [name for name in COLUMNS if name not in row]
        if missing:
            raise MismatchError(
                f"it lacks {', '.join(map(repr, missing))}; a pair has "
                f"{', '.join(map(repr, COLUMNS))}"
            )
        return Pair(*(row[name] for name in COLUMNS))


def pairs_of(rows: Iterable[Any]) -> list[Pair]:
    """Pairs of rows with the columns prompt, chosen and rejected.

    Raises:
        MismatchError: a row that is no pair, by its number; or no rows.
    """
    found = []
    for number, row in enumerate(rows, 1):
        try:
            found.append(Pair.of(row))
        except MismatchError as e:
            raise MismatchError(f"pair {number}: {e}") from None
    if not found:
        raise MismatchError("there are no pairs")
    return found


def read_pairs(path: str | os.PathLike[str]) -> list[Pair]:
    """The pairs of a file with the columns prompt, chosen and rejected: JSON lines, CSV, Parquet.

    Raises:
        FileError: it can't be read, or a row of it is no pair, by file and line.
    """
    file, found = os.fspath(path), []
    for where, row in rows_in(file, bytes_of(file)):
        try:
            found.append(Pair.of(row))
        except MismatchError as e:
            raise FileError(f"{file}: {where}: {e}") from None
    if not found:
        raise FileError(f"{file}: there are no pairs in it")
    return found
