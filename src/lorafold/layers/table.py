"""Tables of records, asked from the newest on: what a new one claims, the older ones don't get."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

R = TypeVar("R", bound=Any)


class Table(Generic[R]):
    """Records by their `name`, in the order in which they are asked whether a layer is `mine`."""

    def __init__(self, *records: R) -> None:
        self._records: dict[str, R] = {record.name: record for record in records}

    def register(self, record: R) -> R:
        """Add a record, before all others; one of the same name is replaced."""
        others = {name: old for name, old in self._records.items() if name != record.name}
        self._records = {record.name: record, **others}
        return record

    @contextmanager
    def including(self, record: R) -> Iterator[R]:
        """The same for as long as the context lasts."""
        before = self._records
        try:
            yield self.register(record)
        finally:
            self._records = before

    def find(self, layer: Any) -> R | None:
        """The first record that claims a layer."""
        return next((r for r in self._records.values() if r.mine(layer)), None)

    def named(self, name: str) -> R:
        """A record by its name."""
        return self._records[name]
