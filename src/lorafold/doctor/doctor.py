"""Is an adapter in effect on a server, and how strongly? By what follows a few prompts.

The server tells log-probabilities y of its likeliest next tokens; here the base runs with the
adapter at any strength c, which gives l_c. The strength on the server is the c of the smallest
‖y − l_c‖. How large a difference means anything is told by the adapter's own effect, l_s − l_0, and
by how far the server's base is from the one here (another quantisation, another kernel).

From a server without log-probabilities comes greedy text alone, which is compared with the text at
a few strengths: a coarser answer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..errors import MismatchError
from .local import LocalRun
from .server import Answer, Server

Verdict = Literal["right", "no effect", "wrong strength", "another effect", "unclear"]
SAYS: dict[Verdict, str] = {
    "right": "the adapter is in effect, at the right strength",
    "no effect": "the adapter has no effect: the server computes its base",
    "wrong strength": "the adapter is in effect, at another strength",
    "another effect": "what the server computes is this adapter on this base at no strength",
    "unclear": "these prompts don't tell",
}

# Strengths that are tried, as shares of the right one: what a lost α, a doubled scale, √r make.
_GRID = (-1.0, 0.0, 0.0625, 0.125, 0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 8.0, 16.0)
_COARSE = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)  # of greedy text
_STEPS = 18  # of the search between two of the grid, each by 0.62
_LEAST = 1e-3  # nats: no smaller effect is told from rounding
_NONE = 0.1  # share of the effect that counts as none
_EXPLAINED = 0.3  # share of the effect that may stay unexplained
_TOKENS = 16  # of greedy text
_ALIKE = 0.8  # share of it that must agree


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Args:
        verdict: in a word or two; `SAYS` has the sentence.
        strength: found on the server; None where that can't be said.
        expected: strength.
        by: what was compared, "log-probabilities" or "greedy tokens".
        effect: root mean square of what the adapter changes, nats; share of text for greedy tokens.
        unexplained: the same of what is left at the strength found.
        base_difference: the same between the server's base and the one here; None where it can't
            be asked for.
        prompts: how many.
        notes: what else to know.
    """

    verdict: Verdict
    strength: float | None
    expected: float
    by: str
    effect: float
    unexplained: float
    base_difference: float | None
    prompts: int
    notes: list[str] = field(default_factory=list)


def examined(
    server: Server,
    local: LocalRun,
    *,
    strength: float = 1.0,
    tolerance: float = 0.1,
    progress: Callable[[int, int, str], None] = lambda done, of, what: None,
) -> Diagnosis:
    """Ask the server, run here, and compare.

    Args:
        server: asked twice for each prompt. local: the base with the adapter.
        strength: that the adapter should have there (llama.cpp is asked for it).
        tolerance: how far it may be off, as a share of it.
        progress: told how far it is.

    Raises:
        FileError, MismatchError: the server can't be reached, or answers something else.
    """
    with_it: list[Answer] = []
    without: list[Answer | None] = []
    for k, prompt in enumerate(local.prompts):
        progress(k, len(local.prompts), "asking")
        found = server.answer(prompt, strength, _TOKENS)
        assert found is not None
        with_it.append(found)
        without.append(server.answer(prompt, 0.0, _TOKENS))
    y = [_numbered(a, local) for a in with_it]
    if all(y):
        z = [_numbered(a, local) for a in without if a is not None]
        return _by_logprobs(local, y, z, strength, tolerance, server.notes)
    return _by_text(local, with_it, without, strength, server.notes)


def _numbered(answer: Answer, local: LocalRun) -> dict[int, float]:
    numbers = {local.number_of(token): x for token, x in answer.logprobs.items()}
    return {n: x for n, x in numbers.items() if n is not None}


# By log-probabilities


def _by_logprobs(
    local: LocalRun,
    y: Sequence[Mapping[int, float]],
    z: Sequence[Mapping[int, float]],
    strength: float,
    tolerance: float,
    notes: Sequence[str],
) -> Diagnosis:
    @functools.cache
    def off(c: float) -> float:
        return _distance(y, local.logprobs(c))

    plain = local.logprobs(0.0)
    changed = [a - b for a, b in zip(local.logprobs(strength), plain, strict=True)]
    effect = _distance([dict.fromkeys(row, 0.0) for row in y], changed)
    base = _distance(z, plain) if len(z) == len(y) and all(z) else None
    noise = max(base or 0.0, _LEAST / 3)
    found = _best(off, strength)
    left = off(found)
    verdict: Verdict
    if effect < 3 * noise:
        verdict = "unclear"
    elif abs(found) <= _NONE * abs(strength) and left <= _EXPLAINED * effect + 3 * noise:
        verdict = "no effect"
    elif base is not None and _apart(y, z) < _NONE * effect:
        verdict, found = "no effect", 0.0
    elif left > max(_EXPLAINED * effect, 3 * noise):
        verdict = "another effect"
    elif abs(found - strength) <= tolerance * abs(strength):
        verdict = "right"
    else:
        verdict = "wrong strength"
    told = None if verdict in ("unclear", "another effect") else found
    said = [*notes, *_why(verdict, effect, base)]
    kind = "log-probabilities"
    return Diagnosis(verdict, told, strength, kind, effect, left, base, len(y), said)


def _why(verdict: Verdict, effect: float, base: float | None) -> list[str]:
    if verdict == "unclear" and base is not None and base > _LEAST:
        return ["the server's base is too far from this one, for what the adapter changes"]
    if verdict == "unclear":
        return ["the adapter changes next to nothing after these prompts: give others (prompts=)"]
    if base is not None and base > effect / 2:
        return ["the server's base is another, or quantised"]
    return []


def _distance(told: Sequence[Mapping[int, float]], here: Sequence[Tensor]) -> float:
    """Root mean square of what a server tells less what is here, over all of its tokens."""
    parts = []
    for row, l in zip(told, here, strict=True):
        there = torch.tensor(list(row.values()), dtype=torch.float64)
        parts.append(there - l[list(row)])
    return float(torch.cat(parts).square().mean().sqrt())


def _apart(y: Sequence[Mapping[int, float]], z: Sequence[Mapping[int, float]]) -> float:
    """The same between two answers of a server, over the tokens of both."""
    squares = [(a[k] - b[k]) ** 2 for a, b in zip(y, z, strict=True) for k in a.keys() & b.keys()]
    return math.sqrt(sum(squares) / len(squares)) if squares else math.inf


def _best(off: Callable[[float], float], strength: float) -> float:
    """The strength of the smallest distance: the best of a grid, then between its neighbours."""
    grid = [share * strength for share in _GRID]
    k = min(range(len(grid)), key=lambda i: off(grid[i]))
    low, high = grid[max(k - 1, 0)], grid[min(k + 1, len(grid) - 1)]
    golden = (math.sqrt(5) - 1) / 2
    a, b = high - golden * (high - low), low + golden * (high - low)
    for _ in range(_STEPS):
        if off(a) < off(b):
            high, b = b, a
            a = high - golden * (high - low)
        else:
            low, a = a, b
            b = low + golden * (high - low)
    return min(grid[k], (low + high) / 2, key=off)


# By greedy text


def _by_text(
    local: LocalRun,
    with_it: Sequence[Answer],
    without: Sequence[Answer | None],
    strength: float,
    notes: Sequence[str],
) -> Diagnosis:
    if any(a.tokens is None for a in with_it) and not local.has_tokenizer:
        raise MismatchError(
            "the server tells neither log-probabilities nor tokens, and the base's folder has no "
            "tokenizer to read its text with: put its files there"
        )
    here = {c * strength: local.greedy(c * strength, _TOKENS) for c in _COARSE}
    score = {c: _agreement(local, with_it, found) for c, found in here.items()}
    asked = [a for a in without if a is not None]
    base = None
    if len(asked) == len(with_it):
        base = 1 - _agreement(local, asked, here[0.0])
    alike = _same(here[0.0], here[strength])
    best = max(score, key=lambda c: (score[c], c == strength))
    verdict: Verdict
    if alike > _ALIKE:
        verdict = "unclear"
    elif score[best] < _ALIKE:
        verdict = "another effect"
    elif best == strength:
        verdict = "right"
    else:
        verdict = "no effect" if best == 0 else "wrong strength"
    told = None if verdict in ("unclear", "another effect") else best
    said = [*notes, "the server tells no log-probabilities: of strengths only a few are told apart"]
    if verdict == "unclear":
        said.append("greedy text is the same with the adapter and without: give others (prompts=)")
    left = 1 - score[best]
    return Diagnosis(
        verdict, told, strength, "greedy tokens", 1 - alike, left, base, len(with_it), said
    )


def _agreement(local: LocalRun, answers: Sequence[Answer], here: Sequence[Sequence[int]]) -> float:
    """The share of the text here that the server begins with, on average over prompts."""
    shares = []
    for answer, ids in zip(answers, here, strict=True):
        if answer.tokens is not None:
            shares.append(_prefix(answer.tokens, ids))
        else:
            shares.append(_prefix(answer.text.strip(), local.text_of(ids).strip()))
    return sum(shares) / len(shares)


def _same(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]]) -> float:
    return sum(_prefix(x, y) for x, y in zip(a, b, strict=True)) / len(a)


def _prefix(a: Sequence[object], b: Sequence[object]) -> float:
    """The share of the longer that both begin with."""
    n = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return n / max(len(a), len(b)) if a or b else 1.0
