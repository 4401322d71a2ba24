"""Specifications as plain JSON types, and back: what a run writes down of how it began."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

import torch

from ...errors import MismatchError
from .spelled import check_options

R = TypeVar("R", bound="Recorded")


class Recorded:
    """A frozen dataclass of options, each a keyword and a field of its record."""

    def __new__(cls: type[R], *args: Any, **options: Any) -> R:
        # Before the dataclass, which would say no more than that the keyword is unexpected.
        check_options(cls.__name__, options, (f.name for f in fields(cls)))  # type: ignore[arg-type]
        return super().__new__(cls)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types: dtypes by name, patterns as {"re", "flags"}, a library by its path.

        Raises:
            MismatchError: it holds tensors (calibration=), or a library in memory.
        """
        found = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {"kind": type(self).__name__, **{k: _plain(k, v) for k, v in found.items()}}

    @classmethod
    def from_dict(cls: type[R], record: Mapping[str, Any]) -> R:
        """What `to_dict` wrote.

        Raises:
            MismatchError: it is of another kind, or a field is wrong.
        """
        kind = record.get("kind", cls.__name__)
        if kind != cls.__name__:
            raise MismatchError(f"the record is of a {kind}, not of a {cls.__name__}")
        found = {k: cls._read(k, v) for k, v in record.items() if k != "kind"}
        return cls(**found)

    @classmethod
    def _read(cls, name: str, value: Any) -> Any:
        if name == "dtype":
            return getattr(torch, str(value), value)
        if name.endswith("_pattern"):
            return {_target(key): number for key, number in value}
        if isinstance(value, list):
            return tuple(map(_target, value))
        return value


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, re.Pattern):
        return {"re": value.pattern, "flags": value.flags}
    if isinstance(value, Mapping) and name.endswith("_pattern"):
        return [[_plain(name, key), number] for key, number in value.items()]
    if isinstance(value, tuple | list):
        return [_plain(name, item) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    path = getattr(value, "path", None)  # of a library
    if path is None:
        raise MismatchError(
            f"{name}= can't be written as JSON, being a {type(value).__name__} in memory: leave it "
            f"out (dataclasses.replace(spec, {name}=None)), or save the library to a folder"
        )
    return path


def _target(value: Any) -> Any:
    return re.compile(value["re"], value["flags"]) if isinstance(value, Mapping) else value
