"""The packed engine: running requests end to end in one row, their keys and values in pages.

What is decoded and pieces of prompts go through the model together, as many tokens as there are,
with nothing filled up: `live.use([…], c=, rank=, lengths=)`, asked for when the requests of a step
or their lengths change. A request begins when pages for all its tokens are free, and keeps them: so
none has to be thrown out.

Where a mask is all that keeps requests apart, one whose numbers are not finite spoils others in its
step. Then all begin again with what was said so far, those that were spoiled one by one, each by
itself until it has a token more: whose numbers are not finite then is at fault itself.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import MismatchError
from ..adapters import Attachments
from ..engine import Limits, Piece, Request
from .families import check_packed
from .loop import Looping
from .paged import Paged
from .sampling import Choice, Draws, UnscoredError, sampled

_TOKENS = 512  # of a step
_SMALL, _LARGE = 16, 256  # tokens of a page; kernels that read pages themselves take the larger


@dataclass(eq=False)
class Run:
    """A request that runs.

    Args:
        request: it.

    Attributes:
        tokens: that were chosen. key: of its pages; None where it has none now.
        alone: whether it runs by itself until it has a token more.
    """

    request: Request
    tokens: list[int] = field(default_factory=list)
    key: str | None = None
    alone: bool = False
    draws: Draws = field(init=False)

    def __post_init__(self) -> None:
        self.draws = Draws(self.request.sampling)


class PackedEngine(Looping):
    """Requests end to end in one row, over a cache of pages.

    Not for: architectures other than those in `PACKED`; a processor with many requests, where each
    is compared with the keys of all: rows are faster there.

    Args:
        model: a causal language model of transformers. attachments: on it.
        limits: what there is to be room for.
        room: tokens of all that runs together; as many as the rows of `limits` take, when None.
        tokens: of a step, at least one for each of the rows.

    Raises:
        RefusedError: another architecture, or a transformers whose continuous batching isn't known.
    """

    name = "packed"

    def __init__(
        self,
        model: Any,
        attachments: Attachments,
        limits: Limits,
        room: int | None = None,
        tokens: int = _TOKENS,
    ) -> None:
        check_packed(model.config)
        super().__init__(limits)
        self.model, self.attachments = model, attachments
        self._device = model.get_input_embeddings().weight.device
        self._size = _LARGE if "flash" in model.config._attn_implementation else _SMALL
        wanted = limits.rows * limits.length if room is None else room
        self._pages = self._pages_of(max(wanted, limits.length))
        tokens = max(tokens, limits.rows)
        pages = self._pages + 1  # one that nobody is given
        self._paged = Paged(model, pages, self._size, tokens, limits.rows, self._choose)
        self._inside: dict[str, Run] = {}
        self._outside: deque[Run] = deque()  # those that begin, or begin again
        self._keys = itertools.count()
        self._chosen: list[tuple[Run, Choice | None]] = []
        self._shown: Any = None

    # What the loop asks for

    def begin(self) -> None:
        self._inside, self._outside, self._shown = {}, deque(), None
        self.attachments.live.use(None)
        self._paged.clear()
        self.trial()  # what memory it takes, it takes now

    def step(self) -> None:
        self._admit()
        self._enter()
        batch = [(self._inside[key], count) for key, count in self._paged.prepare()]
        if batch:
            self._use(batch)
            self._chosen = []
            self._paged.step()
            self._deliver([run for run, _ in batch])
        elif self._inside or self._outside:
            raise RuntimeError("requests run, and continuous batching has no step for them")

    def running(self) -> list[Request]:
        return [run.request for run in [*list(self._inside.values()), *list(self._outside)]]

    def leave(self, request: Request) -> None:
        for run in [*self._inside.values(), *self._outside]:
            if run.request is request:
                self._release(run)

    @property
    def used(self) -> float:
        return self._reserved / self._pages

    def submit(self, request: Request, follows: bool = False) -> None:
        if request.max_new < 1:
            raise MismatchError("max_tokens must be at least 1 here")
        super().submit(request, follows)

    def check(self, request: Request) -> None:
        super().check(request)
        self.attachments.check(request)

    def trial(self) -> None:
        """Run two prompts of three tokens and two, end to end, with what is in use."""
        live, active = self.attachments.live, self.attachments.live.active
        mixes = active if isinstance(active, list) else [active, {}]
        ids = torch.zeros(1, 5, dtype=torch.int64, device=self._device)
        positions = torch.tensor([[0, 1, 2, 0, 1]], device=self._device)
        last = torch.tensor([2, 4], device=self._device)
        self._shown = None
        with live.use(mixes, lengths=[3, 2]):
            self.model(ids, position_ids=positions, use_cache=False, logits_to_keep=last)

    # Who runs

    def _pages_of(self, tokens: int) -> int:
        return -(-tokens // self._size)

    @property
    def _reserved(self) -> int:
        return sum(self._pages_of(request.needs) for request in self.running())

    def _admit(self) -> None:
        """Take those out of the queue for whom there is room."""
        running = self.running()
        names = {name for request in running for name in request.mix}
        free, count = self._pages - self._reserved, len(running)
        while (request := self.next_waiting()) is not None and count < self.limits.rows:
            names |= set(request.mix)
            free -= self._pages_of(request.needs)
            if free < 0 or len(names) > self.limits.adapters:
                return
            if self.take(request):
                self._outside.append(Run(request))
                count += 1

    def _enter(self) -> None:
        """Give pages to those that have none; to one only, where it is to be by itself."""
        if any(run.alone for run in self._inside.values()):
            return
        while self._outside:
            run = self._outside[0]
            if run.alone and self._inside:
                return
            run.key = str(next(self._keys))
            self._paged.add(
                run.key, [*run.request.prompt, *run.tokens], run.request.max_new - len(run.tokens)
            )
            self._inside[run.key] = self._outside.popleft()
            if run.alone:
                return

    def _release(self, run: Run) -> None:
        """A request has no more pages, and no place among those that wait for some."""
        if run.key is not None:
            self._paged.drop(run.key)
            del self._inside[run.key]
            run.key = None
        elif run in self._outside:
            self._outside.remove(run)

    # A step

    def _use(self, batch: list[tuple[Run, int]]) -> None:
        """Have each sequence's adapters run."""
        if self._shown == batch:
            return
        requests, lengths = [run.request for run, _ in batch], [count for _, count in batch]
        live = self.attachments.live
        self._shown = None
        if any(r.mix for r in requests):
            mixes = [dict(r.mix) or None for r in requests]
            c, rank = [r.c for r in requests], [r.rank for r in requests]
            live.use(mixes, c=c, rank=rank, lengths=lengths)
        else:
            live.use(None)
        self._shown = batch

    def _choose(self, keys: list[str], scores: Tensor) -> list[int]:
        runs = [self._inside[key] for key in keys]
        choices = sampled(scores, [run.draws for run in runs])
        self._chosen = list(zip(runs, choices, strict=True))
        return [0 if choice is None else choice.token for choice in choices]

    def _deliver(self, batch: list[Run]) -> None:
        """Tell each request of its token, and let go of those that end."""
        sound = [run for run, choice in self._chosen if choice is not None]
        for run, choice in self._chosen:
            if choice is None:
                continue
            self.tokens += 1
            run.tokens.append(choice.token)
            reason = run.draws.reason(choice.token, run.request.max_new)
            if reason is not None:
                self._release(run)
            elif run.alone:  # it is sound, and makes place for the next
                self._release(run)
                run.alone = False
                self._outside.append(run)
            run.request.told(Piece(choice.token, choice.logprob, choice.top, reason))
        if len(sound) < len(self._chosen):
            self._begin_again(batch, sound)

    def _begin_again(self, batch: list[Run], sound: list[Run]) -> None:
        """Leave nothing of a step of which not all numbers were finite.

        Args:
            sound: those of the batch that have a token of it.
        """
        suspects: list[Run] = []
        if self._paged.masked and len(batch) > 1:
            # Prompts that were cut too: nobody has seen their numbers.
            suspects = [run for run in batch if run not in sound]
        else:
            for run in [run for run, choice in self._chosen if choice is None]:
                self._release(run)
                run.request.told(Piece(reason="error", error=UnscoredError()))
        others = [run for run in self._inside.values() if run not in suspects]
        for run in [*suspects, *others]:
            run.key, run.alone = None, run in suspects
        self._outside = deque([*suspects, *self._outside, *others])
        self._inside = {}
        self._paged.clear()
