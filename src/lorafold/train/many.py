"""Many adapters in one batch, each trained as if it were alone.

What they share is a forward: row i of the batch runs the adapter that it names. With the mean of
each adapter over its own tokens, added up over the adapters,

    L = Σ_a  Σ_{tokens t of a} loss_t / |tokens of a|,

an adapter's gradient is that of its own rows alone, however many rows the others have, where the
count is taken over all that one step of the optimiser sees. Clipping by the norm of each adapter's
own gradient keeps that so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..attach import Live
from ..errors import MismatchError, UnknownNameError
from ..words import did_you_mean

IGNORED = -100  # a label that is no target


def loss_by_adapter(
    logits: Tensor, labels: Tensor, adapter: Tensor, counts: Tensor, lengths: Any = None
) -> Tensor:
    """The sum over adapters of each one's mean next-token loss.

    Args:
        logits: (B, T, vocabulary). labels: (B, T), -100 where nothing is to be predicted.
        adapter: (rows,) the number of each row's adapter: of B rows, or of the sequences of a
            packed batch.
        counts: (adapters,) tokens of each that are predicted in the whole step of the optimiser,
            as `tokens_by_adapter` counts them.
        lengths: of a packed batch (B = 1), how many tokens each row has.

    Returns:
        A scalar, nats. An adapter without tokens adds nothing.
    """
    sums = sums_by_adapter(logits, labels, adapter, len(counts), lengths)
    return (sums / counts.to(sums).clamp_min(1)).sum()


def sums_by_adapter(
    logits: Tensor, labels: Tensor, adapter: Tensor, number: int, lengths: Any = None
) -> Tensor:
    """The sum of each of `number` adapters' next-token losses, (number,), nats."""
    flat = logits[:, :-1].flatten(0, 1)
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    losses = F.cross_entropy(flat, labels[:, 1:].flatten(), reduction="none", ignore_index=IGNORED)
    owner = owners(labels, adapter, lengths)[:, 1:].flatten()
    return losses.new_zeros(number).index_add(0, owner, losses)


def tokens_by_adapter(labels: Tensor, adapter: Tensor, number: int, lengths: Any = None) -> Tensor:
    """How many tokens of each of `number` adapters are predicted, (number,) int64."""
    owner = owners(labels, adapter, lengths)[:, 1:]
    there = (labels[:, 1:] != IGNORED).flatten().long()
    return there.new_zeros(number).index_add(0, owner.flatten(), there)


def owners(labels: Tensor, adapter: Tensor, lengths: Any = None) -> Tensor:
    """The number of each token's adapter, of the shape of `labels` (B, T)."""
    adapter = adapter.to(labels.device)
    if lengths is None:
        return adapter[:, None].expand_as(labels)
    # What lies behind the last row is padding, whose labels are ignored: whose it is plays no part.
    found = adapter.repeat_interleave(torch.as_tensor(lengths, device=labels.device))
    return F.pad(found, (0, labels.shape[1] - len(found)))[None]


def clip_by_adapter(live: Live, most: float, names: Iterable[str] | None = None) -> float:
    """Clip the gradient of each trained adapter to a norm of its own.

    Args:
        live: the handle. most: the largest norm. names: which; all trained ones when None.

    Returns:
        The norm of all their gradients before.
    """
    names = live.trained if names is None else names
    norms = [torch.nn.utils.clip_grad_norm_(list(live.parameters(n)), most) for n in names]
    return math.hypot(*(float(norm) for norm in norms))


def numbers_of(column: Sequence[Any], names: Sequence[str]) -> Tensor:
    """The numbers of adapters by their names.

    Raises:
        UnknownNameError: a name that no trained adapter has. MismatchError: something else.
    """
    for name in column:
        if not isinstance(name, str):
            raise MismatchError(f"the column adapter must hold names, found {name!r}")
        if name not in names:
            raise UnknownNameError(
                f"the column adapter names {name!r}, which is not trained here; "
                f"{did_you_mean(name, names)}"
            )
    return torch.tensor([names.index(name) for name in column])


def finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all numbers of all tensors are finite; the device is waited for once."""
    there = [t.detach() for t in tensors if t.numel()]  # no norm is of nothing
    return not there or bool(torch.nn.utils.get_total_norm(there, math.inf).isfinite())


def the_trained(live: Live) -> str:
    """The name of the only adapter that is trained.

    Raises:
        MismatchError: there is none, or more than one.
    """
    names = live.trained
    if len(names) != 1:
        found = ", ".join(map(repr, names)) or "none: attach lf.LoRA(…), or with trainable=True"
        raise MismatchError(
            f"say which of the trained adapters is meant by name=; there are {found}"
        )
    return names[0]
