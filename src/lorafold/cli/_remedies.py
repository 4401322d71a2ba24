"""What messages say to do, in the words of the command that runs.

Messages are written for Python: `give tolerance=`, `load it with dtype=torch.float32`. Here what a
keyword does is told by the flag that does it. What the command has no flag for is left out: a part
of the message after `; `, `: ` or `, or `, or in parentheses. What is in backquotes is a line to
run elsewhere, and what is in quotes is somebody's name for something: both stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

# With no value, True, … for any, or a plain word or name in quotes.
_VALUE = (
    r"(?:True\b|…|\{[^}]*\}|\([^)]*\)|(?=[\s;,:)]|$)|(?P<value>'[^'\s]*')|torch\.(?P<dtype>\w+))"
)
_KEYWORD = re.compile(rf"(?<![\w./=~'\"-])(?<!--option )(?P<key>[a-z][a-z0-9_]*?)_?={_VALUE}")
_DTYPE = re.compile(r"\btorch\.(?=[a-z]+\d+\w*\b)")
# A call, or a name of a module of Python's.
_CODE = re.compile(
    r"\b[A-Za-z_]\w*(?:\.\w+)+\(|\b\w+\((?=\)|[^()]*(?:=|…|\.\.\.))"
    r"|(?<![\w/.])(?:lf|lorafold|adapter|live)\.(?!safetensors|json|bin)[A-Za-z]\w*"
)
_QUOTED = re.compile(r"(?<![\w'])'(?:[^'\\]|\\.)*'(?!\w)|(?<!\w)\"(?:[^\"\\]|\\.)*\"|`[^`]*`")
_INSIDE, _OUTSIDE = "([{", ")]}"


def as_flags(text: str, flags: Mapping[str, str]) -> str:
    """A message as the command line has it.

    Args:
        flags: {keyword: flag} of the command that runs; a value goes behind a flag's "=".
    """
    said = re.match(r"([a-z][a-z0-9_]*?)_?(?= must )", text)
    if said is not None and flags.get(said[1], "=")[-1] != "=":
        text = flags[said[1]] + text[said.end() :]  # a message that begins with one is about it
    for match in reversed(list(_KEYWORD.finditer(_covered(text)))):
        flag = flags.get(match["key"])
        if flag is not None:
            value = text[slice(*match.span("value"))] or match["dtype"]
            gap = "" if flag.endswith("=") else " "
            text = (
                text[: match.start()]
                + (f"{flag}{gap}{value}" if value else flag)
                + (text[match.end() :])
            )
    return _DTYPE.sub("", _without(text) if is_python(text) else text)


def is_python(text: str) -> bool:
    """Whether a message says anything as Python has it."""
    covered = _covered(text)
    return bool(_KEYWORD.search(covered) or _CODE.search(covered))


def _covered(text: str) -> str:
    """The text with what is quoted replaced, letter for letter."""
    return _QUOTED.sub(lambda m: m[0][0] + "x" * (len(m[0]) - 2) + m[0][-1], text)


def _without(text: str) -> str:
    """A message less the parts that say anything in Python; of its first part, less the code."""
    for start, stop in reversed(list(_parentheses(text))):
        if is_python(text[start:stop]):
            text = text[:start] + text[stop:]
    first, *others = _parts(text)
    told, lead = _KEYWORD.sub(lambda m: m["key"].replace("_", " "), first), ""
    for part in others:
        alternative = part.startswith(", or ")
        lead = lead if alternative else ""
        if is_python(part):
            lead = lead if alternative else part[:2]
        else:  # an alternative to what was left out takes its place
            told += lead + part.removeprefix(", or ") if lead else part
            lead = ""
    return told


def _parentheses(text: str) -> Iterator[tuple[int, int]]:
    """Where something stands in parentheses of its own, the space before included."""
    covered, depth, start = _covered(text), 0, -1
    for at, letter in enumerate(covered):
        if letter in _INSIDE:
            if depth == 0:
                start = at if letter == "(" and covered[at - 1 : at] == " " else -1
            depth += 1
        elif letter in _OUTSIDE:
            depth = max(0, depth - 1)
            if depth == 0 and start > 0:
                yield start - 1, at + 1
                start = -1


def _parts(text: str) -> list[str]:
    """The text, cut before every `; `, `: ` and `, or ` that is in no brackets."""
    covered, depth, cuts = _covered(text), 0, [0]
    for at, letter in enumerate(covered):
        depth += (letter in _INSIDE) - (letter in _OUTSIDE)
        if depth <= 0 and covered.startswith(("; ", ": ", ", or "), at):
            cuts.append(at)
    return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]
