"""Pairs as tokens: batches of them, what a model gives for one, and the text that it writes."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import MismatchError
from ..many import IGNORED
from .pairs import Pair

SIDES = ("chosen", "rejected")
MOST_PROMPTS = 32  # that are continued
MOST_HELD = 128  # prompts that are held out: more would tell little more, and each look runs them
Batch = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Tokens:
    """One pair: token numbers of the prompt and of both answers."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


@dataclass(frozen=True)
class Encoded:
    """Pairs as a model reads them.

    Args:
        pairs: of tokens. cut: how many prompts lost their beginning to fit the context. dropped:
            how many pairs were left out, whose answers alone do not fit.
    """

    pairs: tuple[Tokens, ...]
    cut: int
    dropped: int


def encoded(pairs: Sequence[Pair], tokenizer: Any, context: int | None) -> Encoded:
    """Pairs as tokens; of a prompt too long for the context its end is kept.

    Args:
        tokenizer: called with a text and `add_special_tokens`, gives `input_ids`. context: how many
            tokens the model takes at once; None for any number.

    Raises:
        MismatchError: a text of no tokens, or no pair that fits.
    """
    found: list[Tokens] = []
    cut = dropped = 0
    for n, pair in enumerate(pairs, 1):
        prompt, *answers = (
            tuple(tokenizer(text, add_special_tokens=begins)["input_ids"])
            for text, begins in ((pair.prompt, True), (pair.chosen, False), (pair.rejected, False))
        )
        for what, ids in zip(("prompt", *SIDES), (prompt, *answers), strict=True):
            if not ids:
                raise MismatchError(f"pair {n}: {what} has no tokens: {getattr(pair, what)!r}")
        room = len(prompt) if context is None else context - max(map(len, answers))
        if room < 1:
            dropped += 1
            continue
        cut += room < len(prompt)
        found.append(Tokens(prompt[-room:], *answers))
    if not found:
        raise MismatchError(
            f"none of the {len(pairs)} pairs fits the context of {context} tokens: shorten the "
            "answers"
        )
    return Encoded(tuple(found), cut, dropped)


def split(pairs: Sequence[Tokens], share: float, seed: int) -> tuple[list[Tokens], list[Tokens]]:
    """Pairs to train on, and held-out ones; those of one prompt stay together.

    Raises:
        MismatchError: fewer than two prompts.
    """
    prompts = list(dict.fromkeys(p.prompt for p in pairs))
    if len(prompts) < 2:
        raise MismatchError("the pairs have one prompt only, so that none can be held out")
    random.Random(seed).shuffle(prompts)
    out = set(prompts[: min(max(1, round(share * len(prompts))), len(prompts) - 1, MOST_HELD)])
    return [p for p in pairs if p.prompt not in out], [p for p in pairs if p.prompt in out]


def batch_of(pairs: Sequence[Tokens], device: Any = None) -> Batch:
    """What `steering_loss` takes: both answers behind the prompts, filled up on the right."""
    starts = [len(p.prompt) for p in pairs]
    return {s: filled([p.prompt + getattr(p, s) for p in pairs], starts, device) for s in SIDES}


def filled(
    rows: Sequence[Sequence[int]], starts: Sequence[int], device: Any = None
) -> dict[str, Tensor]:
    """Rows of tokens, filled up on the right; each is predicted from its start on."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        labels[i, start : len(row)] = ids[i, start : len(row)]
    made = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {key: value.to(device) for key, value in made.items()}


def batches(pairs: Sequence[Tokens], size: int, seed: int, skip: int = 0) -> Iterator[list[Tokens]]:
    """Batches without end, in an order that the seed alone gives; the first `skip` passed over."""
    size, epoch = min(size, len(pairs)), 0
    while True:
        order = list(range(len(pairs)))
        random.Random(f"{seed} {epoch}").shuffle(order)
        for at in range(0, len(order) - size + 1, size):
            if skip:
                skip -= 1
                continue
            yield [pairs[i] for i in order[at : at + size]]
        epoch += 1


def prompts_for(model: nn.Module, pairs: Sequence[Tokens], tokens: int) -> dict[str, Tensor]:
    """The first different prompts, to be continued by so many tokens within the model's context.

    Raises:
        MismatchError: more tokens than the context has.
    """
    context = context_of(model)
    if context is not None and tokens >= context:
        raise MismatchError(f"tokens must be below {context}, the context; found {tokens}")
    return prompts_of(pairs, device_of(model), None if context is None else context - tokens)


def prompts_of(
    pairs: Sequence[Tokens], device: Any = None, room: int | None = None
) -> dict[str, Tensor]:
    """The first different prompts, or their ends, filled up on the left."""
    rows = list(dict.fromkeys(p.prompt[-(room or 0) :] for p in pairs))[:MOST_PROMPTS]
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :], mask[i, longest - len(row) :] = torch.tensor(row), 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


# What a model gives


def context_of(model: nn.Module) -> int | None:
    """How many tokens a model takes at once, as far as its configuration says."""
    found = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def device_of(model: nn.Module) -> torch.device:
    """Where a model's inputs go."""
    return next(model.parameters()).device


def logits_of(model: nn.Module, given: Mapping[str, Any]) -> Tensor:
    """(B, T, vocabulary) of a batch, labels left out."""
    found: Any = model(**{k: v for k, v in given.items() if k != "labels"})
    if not isinstance(found, Tensor):
        found = found["logits"] if isinstance(found, Mapping) else found.logits
    logits: Tensor = found
    return logits


def both_logits(model: nn.Module, batch: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """{side: (B, T, vocabulary)}; of plain rows both sides in one forward."""
    sides = [batch[s] for s in SIDES]
    plain = all(set(g) == {"input_ids", "attention_mask", "labels"} for g in sides)
    if not plain:
        return {s: logits_of(model, batch[s]) for s in SIDES}
    lengths = [g["input_ids"].shape[1] for g in sides]
    given = {
        key: torch.cat(
            [F.pad(g[key], (0, max(lengths) - n)) for g, n in zip(sides, lengths, strict=True)]
        )
        for key in ("input_ids", "attention_mask")
    }
    found, rows = logits_of(model, given), len(sides[0]["input_ids"])
    chosen, rejected = found[:rows, : lengths[0]], found[rows:, : lengths[1]]
    return {"chosen": chosen, "rejected": rejected}


def mean_logp(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean log probability of each row's labels, (B,), nats a token."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    logp = F.log_softmax(logits[:, :-1].to(wide), -1)
    targets = labels[:, 1:]
    there = targets != IGNORED
    own = logp.gather(-1, targets.clamp_min(0)[..., None]).squeeze(-1) * there
    return own.sum(1) / there.sum(1).clamp_min(1)


def predicted(values: Tensor, labels: Tensor) -> Tensor:
    """Of (B, T) one number for each next token, those where something is predicted, (tokens,)."""
    found: Tensor = values[:, :-1][labels[:, 1:] != IGNORED]
    return found


@dataclass(frozen=True)
class Text:
    """Continuations.

    Args:
        given: what the model is called with to read them again: prompts and continuations.
        start: where the continuations begin. written: (B, tokens) whether a token is the model's
            own, and not what follows an end.
    """

    given: dict[str, Tensor]
    start: int
    written: Tensor

    @property
    def tokens(self) -> Tensor:
        """(B, tokens)."""
        return self.given["input_ids"][:, self.start :]

    def predicted(self, values: Tensor) -> Tensor:
        """Of (B, T) one number for each next token, those of the continuations, (tokens,)."""
        found: Tensor = values[:, self.start - 1 : -1][self.written]
        return found


def continued(model: nn.Module, prompts: Mapping[str, Any], tokens: int) -> Text:
    """Greedy continuations of prompts that are filled up on the left."""
    generating: Any = model
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": 1}
    config = getattr(generating, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if getattr(config, "pad_token_id", None) is None:
        options["pad_token_id"] = ends[0] if ends else 0
    ids = prompts["input_ids"]
    mask = prompts.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    whole = generating.generate(**{**prompts, "attention_mask": mask}, **options)
    new = whole[:, ids.shape[1] :]
    ended = torch.isin(new, torch.tensor(ends, dtype=new.dtype, device=new.device)).long()
    written = ended.cumsum(1) - ended == 0  # up to the first end, and with it
    mask = torch.cat([mask, mask.new_ones(new.shape)], 1)
    given = {"input_ids": whole, "attention_mask": mask}
    if not mask.all() and "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)  # as they were written
    return Text(given, ids.shape[1], written)
