"""What a module does in its model, whatever it is called there."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ..errors import MismatchError
from ..words import one_line

# Stacks of layers that a model may have; "" for what belongs to none or to all.
SIDES = ("encoder", "decoder", "vision", "text", "audio", "")

# The last word of a kind that holds several: the words of its parts, in the order of their rows.
FUSED = {"qkv": ("query", "key", "value"), "kv": ("key", "value"), "gate_up": ("gate", "up")}

_KIND = r"[a-z][a-z0-9_]*(?:\.[a-z][a-z0-9_]*)*"
_NAME = re.compile(
    rf"(?:(?P<side>{'|'.join(filter(None, SIDES))})\.)?(?:(?P<layer>\d+)\.)?"
    rf"(?P<kind>{_KIND})(?:\[(?P<expert>\d+)\])?"
)


@dataclass(frozen=True, slots=True)
class Role:
    """What a module does: its kind, and which of its kind it is.

    Not for: shapes, which the same role has its own of in every model; see `heads`.

    Args:
        kind: dotted words: "attention.query" (key, value, output, qkv), "cross.query" …,
            "mlp.up" (gate, down, gate_up), "experts.up" … and "experts.router", "shared.up" …
            (an expert that every token visits), "embedding" ("embedding.position" …), "head"; or
            what a table of the user's says.
        layer: its number in the stack, from 0; None outside of the layers.
        side: the stack: "encoder", "decoder", "vision", "text", "audio"; "" for what belongs to
            none or to all of them, as a head does.
        expert: which expert; None where it is none, or all of them.

    Raises:
        MismatchError: a kind or a side that can't be one.

    Examples:
        >>> str(Role("attention.query", 3))
        'decoder.3.attention.query'
        >>> Role.parse("decoder.3.attention.qkv").parts[1]
        Role(kind='attention.key', layer=3, side='decoder', expert=None)
    """

    kind: str
    layer: int | None = None
    side: str = "decoder"
    expert: int | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(_KIND, self.kind) or self.kind.partition(".")[0] in SIDES:
            raise MismatchError(
                f"a kind is words of small letters joined by dots, as 'attention.query', and does "
                f"not begin with a side; found {one_line(self.kind)}"
            )
        if self.side not in SIDES:
            known = ", ".join(map(repr, SIDES))
            raise MismatchError(f"a side is one of {known}; found {one_line(self.side)}")

    @classmethod
    def parse(cls, name: str) -> Role:
        """The role of this name: `str(role)` read back.

        Raises:
            MismatchError: it is the name of none.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise MismatchError(
                f"no role is called {one_line(name)}; a name is [side.][layer.]kind[[expert]], as "
                "'decoder.3.attention.query'"
            )
        layer, expert = (None if match[g] is None else int(match[g]) for g in ("layer", "expert"))
        return cls(match["kind"], layer, match["side"] or "", expert)

    def __str__(self) -> str:
        words = (self.side, "" if self.layer is None else str(self.layer), self.kind)
        expert = "" if self.expert is None else f"[{self.expert}]"
        return ".".join(filter(None, words)) + expert

    @property
    def parts(self) -> tuple[Role, ...]:
        """The roles that it holds in one, in the order of their rows; () where it is one itself."""
        family, _, last = self.kind.rpartition(".")
        return tuple(replace(self, kind=f"{family}.{word}") for word in FUSED.get(last, ()))
