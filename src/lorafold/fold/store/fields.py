"""Fields of JSON, checked one by one: what is not as it must be is named.

A check takes a value as the parser gives it, and returns it as the record has it, or raises `Wrong`
with what it must be. `read` makes a record of an object by a table of such checks.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from ...errors import FileError

T = TypeVar("T")
Check = Callable[[Any], T]
_BRACKETS = 10_000  # beside one for every sixteen letters
_MOST = 1 << 62  # of a count: what torch and numpy can still add up
_SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


class Wrong(ValueError):
    """What a value must be, and is not."""


def text(value: Any) -> str:
    """Any text."""
    if type(value) is not str:
        raise Wrong("a text")
    return value


def flag(value: Any) -> bool:
    """True or false."""
    if type(value) is not bool:
        raise Wrong("true or false")
    return value


def count(value: Any) -> int:
    """A whole number from 0 on."""
    if type(value) is not int or not 0 <= value < _MOST:
        raise Wrong("a whole number from 0 on")
    return value


def number(value: Any) -> float:
    """A finite number from 0 on."""
    if type(value) not in (int, float) or not 0 <= value < math.inf or value >= _MOST:
        raise Wrong("a number from 0 on")
    return float(value)


def one_of(*names: str) -> Check[str]:
    """One of these texts."""

    def check(value: Any) -> str:
        if type(value) is not str or value not in names:
            raise Wrong(f"one of {', '.join(names)}")
        return value

    return check


def matching(pattern: re.Pattern[str], what: str) -> Check[str]:
    """A text that the pattern matches whole."""

    def check(value: Any) -> str:
        if type(value) is not str or not pattern.fullmatch(value):
            raise Wrong(what)
        return value

    return check


def tuple_of(item: Check[T]) -> Check[tuple[T, ...]]:
    """A list, each of whose items passes."""

    def check(value: Any) -> tuple[T, ...]:
        if type(value) is not list:
            raise Wrong("a list")
        return tuple(map(item, value))

    return check


def mapped(item: Check[T], key: Check[str] = text) -> Check[dict[str, T]]:
    """An object, each of whose keys and values passes."""

    def check(value: Any) -> dict[str, T]:
        if type(value) is not dict:
            raise Wrong("an object")
        return {key(k): item(v) for k, v in value.items()}

    return check


def an_object(value: Any) -> dict[str, Any]:
    """An object with whatever is in it."""
    if type(value) is not dict:
        raise Wrong("an object")
    return value


def read(kind: Callable[..., T], value: Any, checks: Mapping[str, Check[Any]], where: str) -> T:
    """The record of an object; fields that no check is for are left out.

    Args:
        kind: a dataclass.

    Raises:
        FileError: naming the field.
    """
    if type(value) is not dict:
        raise FileError(f"{where} must be an object, found {value!r:.80}")
    found = {}
    for key, item in value.items():
        check = checks.get(key)
        if check is not None:
            try:
                found[key] = check(item)
            except Wrong as e:
                raise FileError(f"{where}: {key} must be {e}, found {item!r:.80}") from None
    for name in _required(kind):
        if name not in found:
            raise FileError(f"{where} has no field {name!r}")
    return kind(**found)


@functools.cache
def _required(kind: Any) -> tuple[str, ...]:
    """The fields of a dataclass that have no default."""
    return tuple(
        f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING
    )


# JSON


def parsed(raw: bytes, where: str) -> Any:
    """What JSON says, without numbers that are none and keys that are twice in an object.

    Raises:
        FileError: it is not JSON, or nests more than it says: each `{}` takes 30 times its bytes.
    """
    if raw.count(b"{") + raw.count(b"[") > _BRACKETS + len(raw) // 16:
        raise FileError(f"{where} is not valid JSON of its kind: brackets without end")
    try:
        return json.loads(raw.decode(), parse_constant=_no_number, object_pairs_hook=_no_twins)
    except (ValueError, RecursionError) as e:
        raise FileError(f"{where} is not valid JSON ({e})") from e


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r:.80} appears twice")
    return found


def encoded(value: Any) -> bytes:
    """JSON as a library's files have it: without spaces, UTF-8 where that can hold it.

    Raises:
        FileError: it has no form in JSON.
    """
    try:
        written = _encode(value)
    except (TypeError, ValueError, RecursionError) as e:
        raise FileError(f"the manifest can't be written as JSON: {e}") from e
    try:
        return written.encode()
    except UnicodeEncodeError:
        # Lone surrogates, as in file names that are not UTF-8, survive as escapes. Two that make up
        # a pair would come back as one character, so two names could become one.
        pair = _SURROGATE_PAIR.search(written)
        if pair:
            around = written[max(0, pair.start() - 20) : pair.end() + 20]
            raise FileError(f"the manifest can't hold a pair of surrogates: {around!r}") from None
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
