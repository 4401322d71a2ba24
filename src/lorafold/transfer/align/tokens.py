"""Tokens that both vocabularies have, as readings of the first layer's inputs.

What the first layer reads depends on the token alone, and texts show few of them: each that both
know is run through by itself, and joins the sums of those inputs.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..alignment import Alignment
from .bases import Base
from .batches import Batch, Input
from .summing import Runner

_AT_ONCE = 4096


def shared_tokens(source: Base, target: Base) -> tuple[list[int], list[int]]:
    """The ids, in either base, of the tokens that both vocabularies have."""
    both = [token for token in source.vocabulary if token in target.vocabulary]
    return [source.vocabulary[t] for t in both], [target.vocabulary[t] for t in both]


def token_sums(found: Alignment, runner: Runner) -> Alignment:
    """The alignment with the shared tokens in the sums of the first layer's inputs."""
    first = {
        join.input
        for role, join in found.joins.items()
        if role.layer == 0 and role.kind in ("attention.query", "attention.key", "attention.value")
    }
    own = [one for one in runner.sums if one.name in first]
    of_s, of_t = shared_tokens(*runner.bases)
    if not own or not of_s:
        return found
    some = Runner(runner.bases, own, stop=True)  # no further than the first layer
    fitted = dict(found.fitted)
    for k in range(0, len(of_s), _AT_ONCE):
        given = [torch.tensor(ids[k : k + _AT_ONCE])[:, None] for ids in (of_s, of_t)]
        sides = [Input(ids, torch.ones_like(ids), torch.arange(len(ids))) for ids in given]
        for name, m in some.of(Batch(sides[0], sides[1], held=False)).items():
            fitted[name] = fitted[name] + m
    return replace(found, fitted=fitted)
