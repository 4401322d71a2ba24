"""Texts as batches for both bases, each with the places at which their tokens belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import MismatchError
from ...words import one_line
from .bases import Base
from .offsets import paired

HELD = 5  # every fifth text is kept for judging
AT_ONCE = 4096  # tokens of a batch, filled places counted


@dataclass(frozen=True, eq=False)
class Input:
    """One base's side of a batch.

    Args:
        ids, mask: (batch, length). rows: (n,) places in the flattened batch, pair by pair.
    """

    ids: Tensor
    mask: Tensor
    rows: Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Some texts for both bases. held: whether they are kept for judging."""

    source: Input
    target: Input
    held: bool

    @property
    def count(self) -> int:
        """How many pairs of tokens it has."""
        return len(self.source.rows)


@dataclass(frozen=True)
class _Text:
    ids: tuple[list[int], list[int]]
    rows: tuple[Tensor, Tensor]

    @property
    def length(self) -> int:
        return max(map(len, self.ids))


def batches_of(
    source: Base,
    target: Base,
    texts: Sequence[Any],
    context: int | None,
    hold: bool = True,
    at_once: int | None = None,
) -> list[Batch]:
    """Batches of texts: those that are fitted on, then those that are held out.

    Args:
        texts: strings, or (length,) ids that are the same for both.
        context: tokens at most; what each base takes when None.
        hold: whether every fifth text is held out (there being five).
        at_once: tokens of a batch at most, if it isn't one text; 4,096 when None.

    Raises:
        MismatchError: no tokenizer, something that is no text, no tokens that end together.
    """
    found = [_text(source, target, text, context) for text in texts]
    kept = [t for t in found if len(t.rows[0])]
    if not kept:
        raise MismatchError(
            f"no token of the source ends where one of the target does, in {len(texts)} texts: the "
            "tokenizers share nothing; give those that belong to these bases in tokenizers="
        )
    held = kept[HELD - 1 :: HELD] if hold else []
    of_held, most = set(map(id, held)), at_once or AT_ONCE
    fitted = [t for t in kept if id(t) not in of_held]
    return [*_batched(fitted, False, most), *_batched(held, True, most)]


def _text(source: Base, target: Base, text: Any, context: int | None) -> _Text:
    ids, ends = [], []
    for base in (source, target):
        if isinstance(text, str):
            if base.tokenize is None:
                raise MismatchError(
                    f"the {base.side} has no tokenizer of its own: give one in tokenizers="
                )
            one, end = base.tokenize(text)
        else:
            one = _ids(text)
            end = list(range(1, len(one) + 1))
        most = min(filter(None, (context, base.context)), default=None)
        ids.append(one[:most])
        ends.append(end[:most])
    return _Text((ids[0], ids[1]), paired(*ends))


def _ids(text: Any) -> list[int]:
    found = text.tolist() if isinstance(text, Tensor) and text.ndim == 1 else text
    if not isinstance(found, list) or not all(type(k) is int for k in found):
        raise MismatchError(f"a text is a string, or a list of token ids, found {one_line(text)}")
    return found


def _batched(texts: list[_Text], held: bool, at_once: int) -> list[Batch]:
    found: list[Batch] = []
    now: list[_Text] = []
    for text in texts:
        longest = max([text.length, *(t.length for t in now)])
        if now and longest * (len(now) + 1) > at_once:
            found.append(_batch(now, held))
            now = []
        now.append(text)
    return [*found, _batch(now, held)] if now else found


def _batch(texts: list[_Text], held: bool) -> Batch:
    sides = []
    for side in (0, 1):
        length = max(len(t.ids[side]) for t in texts)
        ids = torch.zeros(len(texts), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        rows = []
        for k, t in enumerate(texts):
            ids[k, : len(t.ids[side])] = torch.tensor(t.ids[side])
            mask[k, : len(t.ids[side])] = 1
            rows.append(t.rows[side] + k * length)
        sides.append(Input(ids, mask, torch.cat(rows)))
    return Batch(sides[0], sides[1], held)
