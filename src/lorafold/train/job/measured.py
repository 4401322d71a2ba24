"""What an adapter gains on a held-out part: nats a token of the base alone, and with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..many import owners
from ..mixin import LENGTHS, ROWS


@dataclass(frozen=True)
class Gain:
    """Nats a token on a held-out part.

    Args:
        tokens: that are predicted there. base, adapter: the mean of each token's loss, without and
            with the adapter.
    """

    tokens: int
    base: float
    adapter: float

    @property
    def lift(self) -> float:
        """By how much the adapter lowers the loss."""
        return self.base - self.adapter


def gains(trainer: Any, names: Sequence[str]) -> dict[str, Gain]:
    """What each adapter gains on the trainer's held-out part, those that have rows there.

    Every token counts once, whatever batch it lies in.

    Args:
        trainer: TRL's with adapters, made with an `eval_dataset`. names: of its adapters.
    """
    sums = torch.zeros(2, len(names), dtype=torch.float64)
    counts = torch.zeros(len(names), dtype=torch.int64)
    trainer.model.eval()
    for batch in trainer.get_eval_dataloader():
        given = trainer._prepare_inputs(batch)
        rows, lengths = given.pop(ROWS, None), given.pop(LENGTHS, None)
        what: Any = names[0] if rows is None else [names[i] for i in rows.tolist()]
        owner = _owners(given["labels"], rows, lengths)
        for way, c in enumerate((0.0, 1.0)):
            running = trainer.live.use(what, c=c, lengths=lengths)
            with running, torch.no_grad(), trainer.compute_loss_context_manager():
                out = trainer.model(**given, fused_lm_head=True)
            losses = -out.log_probs.flatten().cpu().double()
            sums[way].index_add_(0, owner, losses)
        counts.index_add_(0, owner, (given["labels"][:, 1:] != -100).flatten().long().cpu())
    means = sums / counts.clamp_min(1)
    return {
        name: Gain(int(counts[i]), float(means[0, i]), float(means[1, i]))
        for i, name in enumerate(names)
        if counts[i]
    }


def _owners(labels: Tensor, rows: Any, lengths: Any) -> Tensor:
    """The number of each predicted token's adapter, flat."""
    if rows is None:
        return torch.zeros(labels[:, 1:].numel(), dtype=torch.int64)
    return owners(labels.cpu(), rows.cpu(), lengths)[:, 1:].flatten()
