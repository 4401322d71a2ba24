"""Which head of the source a head of the target is paired with.

A head's channels mean nothing apart: a map that mixes heads fits better and breaks what they do. So
heads are paired one to one where they are most alike, the sum of their CKAs largest (the Hungarian
method), and mapped head by head. Query heads are paired by what they ask and what they read; a key
and value head goes with the query heads that it serves: with grouped queries its partners are the
key and value heads of those query heads' partners, one or several.

Source: Kuhn, The Hungarian Method for the Assignment Problem (1955).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...errors import MissingExtraError
from ...roles import Heads, Role
from ..alignment import Alignment, Heading, Join
from .covariances import Moments, cka


def channels(heads: int, width: int) -> list[Tensor]:
    """The channels of each head. width: of all of them together."""
    return list(torch.arange(width).view(heads, -1))


def likeness(m: Moments, source: int, target: int) -> Tensor:
    """(target heads, source heads): the CKA of their channels.

    Args:
        m: of a side that consists of heads. source, target: how many.
    """
    of_s, of_t = channels(source, len(m.s)), channels(target, len(m.t))
    rows = [[cka(m.part(s, t)) for s in of_s] for t in of_t]
    return torch.tensor(rows, dtype=torch.float64)


def assigned(alike: Tensor) -> dict[int, int]:
    """{head of the target: head of the source}, no head twice, with the largest sum.

    Raises:
        MissingExtraError: scipy is not there.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise MissingExtraError(
            "pairing heads takes scipy: pip install 'lorafold[transfer]'"
        ) from None
    rows, columns = linear_sum_assignment(alike.numpy(), maximize=True)
    return dict(zip(map(int, rows), map(int, columns), strict=True))


def served(
    heads: dict[int, int], source: tuple[int, int], target: tuple[int, int]
) -> dict[int, list[int]]:
    """{key and value head of the target: those of the source}, from the pairs of query heads.

    Args:
        heads: {query head of the target: of the source}.
        source, target: (query heads, key and value heads).
    """
    group_s, group_t = source[0] // source[1], target[0] // target[1]
    found: dict[int, set[int]] = {}
    for t, s in heads.items():
        found.setdefault(t // group_t, set()).add(s // group_s)
    return {t: sorted(of) for t, of in found.items()}


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
