"""What a model's name asks for, for clients that can send nothing else.

    name       an adapter
    mix        sql:0.7+polite:-0.3; a weight that isn't said is 1
    options    behind either, in any order: @c=0.5 multiplies it, @r=4 cuts each of its adapters

Names are data, and may hold `@`, `:` and `+` themselves. An adapter that is called so wins over
what its letters spell: the whole name first, then the longest name that leaves options behind it,
then the mix of the fewest adapters. Numbers are plain decimals, and all of it is bounded.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field

from ..errors import MismatchError, UnknownNameError
from ..words import one_line

STRONGEST = 1_000.0  # |c| and |weight| at most: beyond, products overflow
HIGHEST = 65_536  # ranks
LONGEST = 1_024  # letters that are read as more than a name
MOST = 16  # adapters of a mix

_OPTION = re.compile(r"(.+)@([A-Za-z]*)=([^@]*)", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,9}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})")
_WHOLE = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True)
class Named:
    """Adapters, how strong, and how much of them.

    Args:
        mix: (name, weight) of each. c: multiplies all of it.
        rank: cuts each to what is best at it, as `Adapter.resize(rank=)` does; None for all of it.
        said: which of "c" and "rank" the name itself says.
    """

    mix: tuple[tuple[str, float], ...]
    c: float = 1.0
    rank: int | None = None
    said: tuple[str, ...] = field(default=(), compare=False)

    @property
    def plain(self) -> bool:
        """Whether it is one adapter as it is."""
        return len(self.mix) == 1 and self.mix[0][1] == self.c == 1 and self.rank is None


def parsed(text: str, known: Container[str]) -> Named:
    """What a name asks for.

    Args:
        text: the name. known: the adapters' names; looked up a bounded number of times, whatever
            the text.

    Raises:
        UnknownNameError: no reading of it has known names alone.
        MismatchError: it has, and an option behind it is none, or out of range.
    """
    if text in known:
        return Named(((text, 1.0),))
    if len(text) > LONGEST:
        raise _unknown(text)
    readings = list(_readings(text))
    for name, options in readings:
        if name in known:
            return Named(((name, 1.0),), *_options(options))
    for name, options in readings:
        mix = _mix(name, known)
        if mix is not None:
            return Named(_weighted(mix), *_options(options))
    raise _unknown(text)


def _readings(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(what stands before options, they), from none to one of each."""
    options: dict[str, str] = {}
    yield text, {}
    while (found := _OPTION.fullmatch(text)) is not None and len(options) < 2:
        text, key, value = found.groups()
        if key in options:
            return
        options[key] = value
        yield text, dict(options)


def _mix(text: str, known: Container[str]) -> list[tuple[str, str]] | None:
    """(name, weight) of the fewest adapters that the text spells; None where it spells none."""
    pieces = text.split("+")
    if len(pieces) > MOST:
        return None
    best: list[list[tuple[str, str]] | None] = [[]]  # of the first i pieces
    for end in range(1, len(pieces) + 1):
        readings = (
            [*before, term]
            for start in range(end)
            if (before := best[start]) is not None
            and (term := _term("+".join(pieces[start:end]), known)) is not None
        )
        best.append(min(readings, key=len, default=None))
    return best[-1]


def _term(text: str, known: Container[str]) -> tuple[str, str] | None:
    if text in known:
        return text, "1"
    name, _, weight = text.rpartition(":")
    return (name, weight) if _NUMBER.fullmatch(weight) and name in known else None


def _weighted(mix: list[tuple[str, str]]) -> tuple[tuple[str, float], ...]:
    names = [name for name, _ in mix]
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise MismatchError(f"adapter {one_line(twice[0])} is named twice: give it one weight")
    return tuple((name, _strength(f"the weight of {one_line(name)}", w)) for name, w in mix)


def _options(found: Mapping[str, str]) -> tuple[float, int | None, tuple[str, ...]]:
    """c, the rank, and which of them was said."""
    for key in found:
        if key not in ("c", "r"):
            raise MismatchError(f"{one_line(f'@{key}=')} is no option of a name; @c= and @r= are")
    c = _strength("c", found["c"]) if "c" in found else 1.0
    said = tuple(name for key, name in (("c", "c"), ("r", "rank")) if key in found)
    return c, _rank(found["r"]) if "r" in found else None, said


def _strength(what: str, text: str) -> float:
    if _NUMBER.fullmatch(text) is None or abs(float(text)) > STRONGEST:
        raise MismatchError(
            f"{what} must be a decimal number of −{STRONGEST:,.0f} to {STRONGEST:,.0f}, not "
            f"{one_line(text)}"
        )
    return float(text)


def _rank(text: str) -> int:
    if _WHOLE.fullmatch(text) is None or not 1 <= int(text) <= HIGHEST:
        raise MismatchError(f"r must be a whole number of 1 to {HIGHEST}, not {one_line(text)}")
    return int(text)


def _unknown(text: str) -> UnknownNameError:
    return UnknownNameError(f"there is no adapter, and no mix of adapters, {one_line(text)}")
