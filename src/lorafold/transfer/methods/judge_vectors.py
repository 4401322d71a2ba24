"""What an encoder says of a text: which of some others it is most like.

    log p(j | i) = log softmax_j(e_i · a_j / τ)

with e_i the mean of text i's last hidden states, of length 1, as sentence encoders pool them, and
a_j the same of the texts that are fitted on, by the bare base: texts stand for each other as tokens
do for a model with a head. Only likenesses are compared: coordinates of the two bases don't matter.

Given up: what an adapter does to single tokens, or to the first one alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..align.bases import Base
from ..align.batches import Input
from ..align.recording import run

_SHARP = 0.05  # τ, that of most sentence encoders' training
_MOST = 1024  # texts that others are compared with


def pooled(base: Base, given: Input) -> Tensor:
    """The texts' vectors (batch, d), float32, of length 1."""
    ids, mask = given.ids.to(base.device), given.mask.to(base.device)
    states = run(base.model, ids, mask, ())[0].float()
    weights = mask[..., None].float()
    means = (states * weights).sum(1) / weights.sum(1).clamp_min(1)
    return torch.nn.functional.normalize(means, dim=-1)


def anchors(base: Base, texts: Sequence[Input]) -> Tensor:
    """The vectors (n, d) that others are compared with."""
    found: list[Tensor] = []
    with torch.no_grad():
        for given in texts:
            if sum(map(len, found)) >= _MOST:
                break
            found.append(pooled(base, given))
    return torch.cat(found)[:_MOST]


def likeness(base: Base, given: Input, others: Tensor) -> Tensor:
    """Log-probabilities (batch, n) of what each text is most like.

    Args:
        others: `anchors` of this base.
    """
    return (pooled(base, given) @ others.T / _SHARP).log_softmax(-1)
