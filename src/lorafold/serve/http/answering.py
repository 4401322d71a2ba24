"""One request's way through the engine: its tokens as they come, made into text.

All the answers of a request come through one queue. A chunk of text is shown when its letters are
whole and no stop can begin in it; the tokens that it came of go with it. Whatever happens, leaving
lets go of the rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace

from ..engine import Piece, Request
from ..words import Reader, Stops, Words
from .errors import ApiError

_ALL = -1  # the index of what ends all answers
_ENDED = "the server had no more than {:g} seconds for it"


@dataclass
class Chunk:
    """Text of one answer.

    Args:
        index: of the answer. text: what is shown. tokens: (piece, where its text begins) of those
            that it came of. reason: why it is the last; None where more follows.
        vector: of a prompt that was embedded.
    """

    index: int
    text: str = ""
    tokens: list[tuple[Piece, int]] = field(default_factory=list)
    reason: str | None = None
    vector: Sequence[float] | None = None

    def and_then(self, more: Chunk) -> Chunk:
        """This one and what follows it, as one."""
        return replace(more, text=self.text + more.text, tokens=[*self.tokens, *more.tokens])


class Answer:
    """The text of one answer, as its tokens come.

    Args:
        words: of the base. stops: texts that end it. ends: tokens that do, and are not shown.
    """

    def __init__(self, words: Words, stops: Sequence[str], ends: frozenset[int]) -> None:
        self._reader: Reader = words.reader()
        self._stops, self._ends = Stops(stops), ends
        self._read = self._shown = 0
        self._tokens: list[tuple[Piece, int]] = []
        self.count = 0
        self.reason: str | None = None

    def read(self, piece: Piece) -> tuple[str, list[tuple[Piece, int]]]:
        """(text, tokens) that can be shown now; `reason` says whether that is all."""
        text = ""
        if piece.token is not None:
            self.count += 1
            if not (piece.reason == "stop" and piece.token in self._ends):
                text = self._reader.read(piece.token)
                self._tokens.append((piece, self._read))
        if piece.reason is not None:
            text += self._reader.rest()
        self._read += len(text)
        shown, stopped = self._stops.read(text)
        if stopped:
            self.reason = "stop"
        elif piece.reason is not None:
            shown += self._stops.rest()
            self.reason = piece.reason
        self._shown += len(shown)
        if self.reason is not None and not stopped:
            tokens, self._tokens = self._tokens, []
        else:  # of what is held back, nothing, and of a stop neither
            tokens = [t for t in self._tokens if t[1] < self._shown]
            self._tokens = self._tokens[len(tokens) :]
        return shown, tokens


class Answers:
    """The answers of one request.

    Args:
        submit, cancel: of the engine. made: what makes a request of the callback for its pieces.
        answers: as many, in the same order. seconds: for all of it.

    Attributes:
        started: when. first: when the first token came; None before.
    """

    def __init__(
        self,
        submit: Callable[[Request, bool], None],
        cancel: Callable[[Request], None],
        answers: Sequence[Answer],
        seconds: float,
    ) -> None:
        self._submit, self._cancel = submit, cancel
        self.answers = answers
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        late = Piece(reason="error", error=ApiError(_ENDED.format(seconds), 504))
        self._timer = self._loop.call_later(seconds, self._queue.put_nowait, (_ALL, late))
        self._requests: list[Request] = []
        self.started = time.monotonic()
        self.first: float | None = None

    def told(self, index: int) -> Callable[[Piece], None]:
        """What an engine calls with the pieces of an answer, in its own thread."""

        def tell(piece: Piece) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

        return tell

    def ask(self, requests: Sequence[Request]) -> None:
        """Put requests into the queue.

        Raises:
            LorafoldError: one isn't taken; the others are let go of.
        """
        try:
            for request in requests:
                self._submit(request, bool(self._requests))
                self._requests.append(request)
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Let go of what has not ended."""
        self._timer.cancel()
        for request, answer in zip(self._requests, self.answers, strict=False):
            if answer.reason is None:
                answer.reason = "cancelled"
                self._cancel(request)

    @property
    def count(self) -> int:
        """Tokens of all of them."""
        return sum(answer.count for answer in self.answers)

    async def chunks(self) -> AsyncIterator[Chunk]:
        """What can be shown, as it comes; what came together is one chunk of each answer.

        Raises:
            ApiError: it took too long. Exception: what an answer ended with.
        """
        try:
            while any(answer.reason is None for answer in self.answers):
                found = [await self._queue.get()]
                while not self._queue.empty():
                    found.append(self._queue.get_nowait())
                together: dict[int, Chunk] = {}
                for index, piece in found:
                    chunk = self._chunk(index, piece)
                    if chunk is not None:
                        before = together.get(index)
                        together[index] = chunk if before is None else before.and_then(chunk)
                for chunk in together.values():
                    yield chunk
        finally:
            self.leave()

    def _chunk(self, index: int, piece: Piece) -> Chunk | None:
        if index == _ALL:
            assert piece.error is not None
            raise piece.error
        answer = self.answers[index]
        if answer.reason is not None:
            return None  # what came behind a stop
        if piece.error is not None:
            answer.reason = "error"
            raise piece.error
        if self.first is None:
            self.first = time.monotonic()
        text, tokens = answer.read(piece)
        if answer.reason is not None and piece.reason is None:
            self._cancel(self._requests[index])
        if not text and not tokens and answer.reason is None:
            return None
        return Chunk(index, text, tokens, answer.reason, piece.vector)
