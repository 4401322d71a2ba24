"""The rows engine: running requests are rows of one dense cache, each with adapters of its own.

A step takes waiting requests (a handful together, filled up behind their ends; a long prompt alone,
piece by piece, so that the others go on) and then chooses one token for every row. Rows stay dense:
when one ends, the last takes its place. What runs is `live.use([…], c=, rank=)`, asked for when the
set of rows changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import MismatchError
from ..adapters import Attachments
from ..engine import Limits, Piece, Request
from .cache import RowCache, masks, padded
from .families import check_family, windows_of
from .loop import Looping
from .sampling import Choice, Draws, UnscoredError, sampled

_TOGETHER = 8  # requests that begin together
_TOKENS = 512  # of prompts in a step, padding included


@dataclass(eq=False)
class Row:
    """A request that runs.

    Args:
        request: it.

    Attributes:
        length: tokens in the cache. last: the token that was chosen last.
    """

    request: Request
    length: int = 0
    last: int = 0
    draws: Draws = field(init=False)

    def __post_init__(self) -> None:
        self.draws = Draws(self.request.sampling)


class RowsEngine(Looping):
    """Requests as rows of a dense cache.

    Not for: architectures other than those in `FAMILIES`.

    Args:
        model: a causal language model of transformers. attachments: on it.
        limits: what there is to be room for.

    Raises:
        RefusedError: another architecture.
    """

    name = "rows"

    def __init__(self, model: Any, attachments: Attachments, limits: Limits) -> None:
        check_family(model.config)
        super().__init__(limits)
        self.model, self.attachments = model, attachments
        self._windows = windows_of(model.config)
        eager = model.config._attn_implementation == "eager"
        self._additive: torch.dtype | None = model.dtype if eager else None
        self._device = model.get_input_embeddings().weight.device
        self._rows: list[Row] = []
        self._starting: list[Row] = []
        self._filling: Row | None = None
        self._shown: list[Row] | None = None
        self._cache = RowCache(limits.rows, limits.length)

    # What the loop asks for

    def begin(self) -> None:
        self._rows, self._starting, self._filling, self._shown = [], [], None, None
        self._cache = RowCache(self.limits.rows, self.limits.length)
        self.attachments.live.use(None)
        self._prompts([[0]], 0, 0, [0])  # what memory it takes, it takes now

    def step(self) -> None:
        self._fill()
        if self._rows:
            self._decode()

    def running(self) -> list[Request]:
        rows = [*self._rows, *self._starting, *filter(None, [self._filling])]
        return [row.request for row in rows]

    def leave(self, request: Request) -> None:
        self._starting = [row for row in self._starting if row.request is not request]
        if self._filling is not None and self._filling.request is request:
            self._filling = None
            self._cache.clear(len(self._rows))  # nobody has looked whether it is finite
        for i, row in enumerate(self._rows):
            if row.request is request:
                self._remove(i)
                return

    @property
    def used(self) -> float:
        taken = sum(row.length for row in list(self._rows))
        return taken / (self.limits.rows * self.limits.length)

    def submit(self, request: Request, follows: bool = False) -> None:
        if request.max_new < 1:
            raise MismatchError("max_tokens must be at least 1 here")
        super().submit(request, follows)

    def check(self, request: Request) -> None:
        super().check(request)
        self.attachments.check(request)

    def trial(self) -> None:
        """Run two rows of two tokens with what is in use, and keep nothing of it."""
        self._shown = None
        positions = torch.arange(3, device=self._device).expand(2, 3)
        seen = masks(positions, 3, self._windows, self._additive)
        cache = RowCache(2, 3)
        cache.prefill(0, 0)
        ids = torch.zeros(2, 3, dtype=torch.int64, device=self._device)
        self._scores(ids, positions, seen, cache)

    # Prompts

    def _fill(self) -> None:
        if self._filling is None:
            self._starting = self._next()
            lengths = [len(row.request.prompt) for row in self._starting]
            if lengths == [max([*lengths, _TOKENS + 1])]:  # one, and a long one
                self._filling, self._starting = self._starting[0], []
            elif lengths:
                self._begin(self._starting)
        if self._filling is not None:
            self._fill_more(self._filling)

    def _next(self) -> list[Row]:
        """The requests that begin now."""
        group: list[Row] = []
        names = {name for row in self._rows for name in row.request.mix}
        longest = 0
        while len(self._rows) + len(group) < self.limits.rows and len(group) < _TOGETHER:
            request = self.next_waiting()
            if request is None:
                break
            names |= set(request.mix)
            longest = max(longest, len(request.prompt))
            crowded = group and longest * (len(group) + 1) > _TOKENS
            if crowded or len(names) > self.limits.adapters:
                break
            if self.take(request):
                group.append(Row(request))
                self._starting = group  # so that they are told if this goes wrong
        return group

    def _begin(self, group: list[Row]) -> None:
        prompts = [row.request.prompt for row in group]
        self._use(group)
        last = [len(ids) - 1 for ids in prompts]
        scores = self._prompts(prompts, len(self._rows), 0, last)
        self._take(group, scores)

    def _fill_more(self, row: Row) -> None:
        """The next piece of a long prompt."""
        self._use([row])
        ids = row.request.prompt[row.length : row.length + _TOKENS]
        scores = self._prompts([ids], len(self._rows), row.length, [len(ids) - 1])
        row.length += len(ids)
        if row.length == len(row.request.prompt):
            self._filling = None
            self._take([row], scores)

    def _take(self, group: list[Row], scores: Tensor) -> None:
        """The prompts of these are in the cache, behind the running rows."""
        for row in group:
            row.length = len(row.request.prompt)
        self._starting = []
        self._rows += group
        self._deliver(group, sampled(scores, [row.draws for row in group]))

    def _prompts(
        self, prompts: Sequence[Sequence[int]], first: int, start: int, last: Sequence[int]
    ) -> Tensor:
        """The scores (n, vocabulary) behind the `last` token of each prompt, from `start` on."""
        ids = padded(prompts, self._device)
        end = start + ids.shape[1]
        positions = torch.arange(start, end, device=self._device).expand_as(ids)
        self._cache.prefill(first, start)
        seen = masks(positions, end, self._windows, self._additive)
        kept = sorted(set(last))
        keep = torch.tensor(kept, device=self._device)
        scores = self._scores(ids, positions, seen, self._cache, logits_to_keep=keep)
        own = torch.tensor([kept.index(i) for i in last], device=self._device)
        return scores[torch.arange(len(own), device=self._device), own]

    # Tokens

    def _decode(self) -> None:
        rows = list(self._rows)
        self._use(rows)
        ids = torch.tensor([[row.last] for row in rows], device=self._device)
        positions = torch.tensor([row.length for row in rows], device=self._device)
        end = max(row.length for row in rows) + 1
        self._cache.decode(positions, end)
        seen = masks(positions[:, None], end, self._windows, self._additive)
        scores = self._scores(ids, positions[:, None], seen, self._cache)[:, -1]
        for row in rows:
            row.length += 1
        self._deliver(rows, sampled(scores, [row.draws for row in rows]))

    def _scores(
        self, ids: Tensor, positions: Tensor, seen: Any, cache: RowCache, **how: Any
    ) -> Tensor:
        found: Tensor = self.model(
            ids,
            attention_mask=seen,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **how,
        ).logits
        return found

    def _use(self, rows: list[Row]) -> None:
        """Have each of these rows' adapters run."""
        if self._shown == rows:
            return
        requests = [row.request for row in rows]
        live = self.attachments.live
        self._shown = None
        if any(r.mix for r in requests):
            mixes = [dict(r.mix) or None for r in requests]
            live.use(mixes, c=[r.c for r in requests], rank=[r.rank for r in requests])
        else:
            live.use(None)
        self._shown = rows

    # Answers

    def _deliver(self, rows: list[Row], choices: Sequence[Choice | None]) -> None:
        """Tell each row's request of its token, and let go of those that end."""
        for row, choice in zip(rows, choices, strict=True):
            if choice is None:  # before any moves: nothing of it may stay where others come
                self._cache.clear(self._rows.index(row))
        for row, choice in zip(rows, choices, strict=True):
            request = row.request
            if choice is None:
                self._remove(self._rows.index(row))
                request.told(Piece(reason="error", error=UnscoredError()))
                continue
            self.tokens += 1
            row.last = choice.token
            reason = row.draws.reason(choice.token, request.max_new)
            if reason is not None:
                self._remove(self._rows.index(row))
            request.told(Piece(choice.token, choice.logprob, choice.top, reason))

    def _remove(self, i: int) -> None:
        """A row ends: the last takes its place, and a prompt that is being read the last's."""
        last = self._rows.pop()
        n = len(self._rows)
        if i < n:
            self._cache.move(n, i, last.length)
            self._rows[i] = last
        if self._filling is not None:
            self._cache.move(n + 1, n, self._filling.length)
