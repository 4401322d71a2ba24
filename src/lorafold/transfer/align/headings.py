"""Heads paired, layer by layer, from the sums that an alignment has."""

from __future__ import annotations

from dataclasses import replace

import torch

from ...roles import Heads, Role
from ..alignment import Alignment, Heading, Join
from .heads import assigned, likeness, served


def with_heads(found: Alignment) -> Alignment:
    """The alignment with the heads of every attention paired."""
    joins = dict(found.joins)
    layers = dict.fromkeys(_attention(role) for role in joins if _attention(role) is not None)
    for layer in layers:
        assert layer is not None
        members = {r.kind.rpartition(".")[2]: r for r in joins if _attention(r) == layer}
        joins |= _paired(found, {word: (role, joins[role]) for word, role in members.items()})
    return replace(found, joins=joins)


def _attention(role: Role) -> tuple[str, str, int | None] | None:
    family = role.kind.partition(".")[0]
    return (role.side, family, role.layer) if family in ("attention", "cross") else None


def _paired(found: Alignment, of: dict[str, tuple[Role, Join]]) -> dict[Role, Join]:
    """The joins of one attention, their heads paired by what its queries and outputs have."""
    first = next(iter(of.values()))[1]
    s, t = first.source.heads, first.target.heads
    if s is None or t is None:
        return {}
    alike = torch.zeros(t.query, s.query, dtype=torch.float64)
    for word in ("query", "output"):
        if word in of:
            join = of[word][1]
            m = found.fitted[join.output if word == "query" else join.input]
            if (len(m.s), len(m.t)) == (s.query * s.dim, t.query * t.dim):
                alike += likeness(m, s.query, t.query)
    pairs = assigned(alike)
    groups = served(pairs, (s.query, s.key), (t.query, t.key))
    heading: Heading = tuple((k, (pairs[k],)) for k in sorted(pairs))
    of_keys: Heading = tuple((k, tuple(groups[k])) for k in sorted(groups))
    made = {}
    for word, (role, join) in of.items():
        if not _fits(found, join, word, s, t):
            continue
        if word == "output":
            made[role] = replace(join, input_heads=heading)
        else:
            made[role] = replace(join, output_heads=heading if word == "query" else of_keys)
    return made


def _fits(found: Alignment, join: Join, word: str, s: Heads, t: Heads) -> bool:
    """Whether that side is as wide as its heads together."""
    m = found.fitted[join.input if word == "output" else join.output]
    counts = (s.key, t.key) if word in ("key", "value") else (s.query, t.query)
    return (len(m.s), len(m.t)) == (counts[0] * s.dim, counts[1] * t.dim)
