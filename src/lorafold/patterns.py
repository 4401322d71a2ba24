r"""Regular expressions of a file, matched in bounded time: a config's patterns are anybody's.

`re` tries one way after another, and an expression such as `(a+)+$` has 2ⁿ of them. Where one could
take long, the same parse tree is walked with all ways at once: the positions that a match can have
reached are the bits of one number, a character moves them all by a shift, and a repetition goes on
until no position is new. That costs (parts of the expression) x (letters)² / 64 at most.

Given up: references to groups and possessive parts within such an expression, which are refused.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .errors import MismatchError

_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
_STEPS = 1_000_000  # words of 64 bits moved in one match, a second or less
_FEW = 200_000  # ways that `re` may try
_LONGEST = 20_000  # letters of an expression
_LETTERS = ("LITERAL", "NOT_LITERAL", "ANY", "IN")


def matches(pattern: str, text: str, form: str = "…") -> bool:
    """Whether an expression matches a text from its first letter on, as `re.match` says.

    Args:
        form: the expression that is matched, with … for `pattern`, which messages name.

    Raises:
        MismatchError: it is no regular expression, or one that takes too long.
    """
    tree, repeats, risky = _parsed(pattern, form)
    if not risky and (len(text) + 1) ** repeats <= _FEW:
        return re.match(form.replace("…", pattern), text) is not None
    try:
        return bool(_Walk(text, tree.state.flags).ends(tree, 1))
    except RecursionError:
        raise _refused(pattern, "it nests too deeply") from None
    except _Unknown as e:
        raise _refused(pattern, str(e)) from None


def _refused(pattern: str, why: str) -> MismatchError:
    return MismatchError(f"{pattern!r:.200} takes too long to match ({why}): write it more plainly")


@functools.lru_cache(1024)
def _parsed(pattern: str, form: str) -> tuple[Any, int, bool]:
    """The tree, how many repetitions it has, and whether one is within another."""
    if len(pattern) > _LONGEST:
        raise MismatchError(f"{pattern!r:.80}… is {len(pattern)} letters long, too many to match")
    try:
        tree = _parser.parse(form.replace("…", pattern))
        repeats, risky = _counted(tree, False)
    except (re.error, OverflowError) as e:
        raise MismatchError(f"{pattern!r:.200} is no regular expression: {e}") from e
    except RecursionError:
        raise _refused(pattern, "it nests too deeply") from None
    return tree, repeats, risky


def _counted(tree: Any, inside: bool) -> tuple[int, bool]:
    count, risky = 0, False
    for op, given in tree:
        name = str(op)
        again = "REPEAT" in name and given[1] > 1
        risky |= inside and (again or name == "BRANCH")
        count += again
        for part in _parts(name, given):
            more, odd = _counted(part, inside or again)
            count, risky = count + more, risky or odd
    return count, risky


def _parts(name: str, given: Any) -> list[Any]:
    if name == "BRANCH":
        return list(given[1])
    if "REPEAT" in name:
        return [given[2]]
    if name == "SUBPATTERN":
        return [given[3]]
    if name in ("ASSERT", "ASSERT_NOT"):
        return [given[1]]
    return [given] if name == "ATOMIC_GROUP" else []


class _Unknown(Exception):
    """A part of an expression that is not walked."""


class _Walk:
    """All ways through one text at once; a set of positions is a number, bit p for position p."""

    def __init__(self, text: str, flags: int) -> None:
        self._text, self._flags = text, flags
        self._words = 1 + len(text) // 64
        self._left = _STEPS
        self._masks: dict[str, int] = {}  # {letter: its positions}
        self._known: dict[tuple[str, Any], int] = {}
        for at, letter in enumerate(text):
            self._masks[letter] = self._masks.get(letter, 0) | 1 << at

    def ends(self, tree: Any, starts: int) -> int:
        """Where matches of a sequence end that begin at one of these."""
        for op, given in tree:
            if not starts:
                break
            self._spend()
            starts = self._step(str(op), op, given, starts)
        return starts

    def _spend(self) -> None:
        self._left -= self._words
        if self._left < 0:
            raise _Unknown("too many steps")

    def _step(self, name: str, op: Any, given: Any, starts: int) -> int:
        if name in _LETTERS:
            return (starts & self._letters(op, given)) << 1
        if name == "BRANCH":
            return functools.reduce(int.__or__, (self.ends(way, starts) for way in given[1]))
        if name == "SUBPATTERN":
            _, added, removed, part = given
            if added or removed:
                raise _Unknown("flags inside it")
            return self.ends(part, starts)
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            return self._repeated(given[0], given[1], given[2], starts)
        if name in ("ASSERT", "ASSERT_NOT") and given[0] == 1:
            ahead = (p for p in self._positions(starts) if bool(self.ends(given[1], 1 << p)))
            there = sum(1 << p for p in ahead)
            return there if name == "ASSERT" else starts & ~there
        if name == "AT":
            return starts & self._at(str(given))
        raise _Unknown(f"{name.lower()} in it")

    def _repeated(self, least: int, most: int, part: Any, starts: int) -> int:
        least, most = min(least, len(self._text) + 1), min(most, len(self._text) + 1)
        for _ in range(least):
            starts = self.ends(part, starts)
            if not starts:
                return 0
        found = new = starts
        if len(part) == 1 and str(part[0][0]) in _LETTERS:  # what most are: `.*`
            mask = self._letters(*part[0])
            for _ in range(most - least):
                new = (new & mask) << 1 & ~found
                if not new:
                    break
                found |= new
            return found
        for _ in range(most - least):
            new = self.ends(part, new) & ~found
            if not new:
                break
            found |= new
        return found

    def _positions(self, starts: int) -> Iterable[int]:
        while starts:
            self._spend()
            low = starts & -starts
            yield low.bit_length() - 1
            starts ^= low

    def _letters(self, op: Any, given: Any) -> int:
        """The positions whose letter a part of the expression takes."""
        if str(op) == "LITERAL" and not self._flags & re.IGNORECASE:
            return self._masks.get(chr(given), 0)
        key = str(op), id(given) if isinstance(given, list) else given  # the tree stays
        if key not in self._known:
            takes = _taker(op, _Given(repr(given), given), self._flags)
            found = (mask for letter, mask in self._masks.items() if takes(letter))
            self._known[key] = functools.reduce(int.__or__, found, 0)
        return self._known[key]

    def _at(self, name: str) -> int:
        n, text = len(self._text), self._text
        if self._flags & re.MULTILINE:
            raise _Unknown("lines in it")
        if name in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return 1
        if name == "AT_END_STRING":
            return 1 << n
        if name == "AT_END":
            return 1 << n | (1 << (n - 1) if text.endswith("\n") else 0)
        edges = sum(1 << m.start() for m in re.finditer(r"\b", text))
        return edges if name == "AT_BOUNDARY" else (1 << (n + 1)) - 1 & ~edges


@dataclass(frozen=True)
class _Given:
    """What a part of a tree holds, to be looked up by the values in it."""

    text: str
    value: Any = field(compare=False)


@functools.lru_cache(1024)
def _taker(op: Any, given: _Given, flags: int) -> Any:
    """Whether a letter is one that a part takes, as `re` says."""
    compiler: Any = importlib.import_module(
        "re._compiler" if sys.version_info >= (3, 11) else "sre_compile"
    )
    state = _parser.State()
    state.flags, state.str = flags, ""
    tree = _parser.SubPattern(state, [(op, given.value)])
    return compiler.compile(tree, flags).fullmatch
