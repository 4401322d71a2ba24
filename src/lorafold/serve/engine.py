"""What a server asks of an engine: submit, cancel, call between steps, drain, and its error.

An engine owns a model in one thread. Requests come from any thread, and what becomes of each is
told through its own callback, in the engine's thread. Whatever could end the engine is refused
before it gets there (`Limits.check`), so that nobody's request is another's end.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..errors import LorafoldError, MismatchError
from .naming import STRONGEST

T = TypeVar("T")
MOST_TOP = 20  # alternatives of a token, as the protocol has it
_PENALTY = 2.0  # as the protocol has it
_HOTTEST = 100.0
_BIAS = 100.0


class BusyError(LorafoldError):
    """The queue is full; later there may be room."""


class DownError(LorafoldError):
    """The engine has failed, or takes no more: it is being drained."""


class TooLongError(MismatchError):
    """A request that needs more room than there ever is for one."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 takes the likeliest. top_k: choose among so many; 0 for all.
        top_p: among the likeliest that have this share together.
        seed: of the request's own draws, whoever runs beside it; None for another each time.
        presence, frequency: subtracted from the score of a token that was chosen before, once, and
            as often as it was.
        bias: added to the scores of tokens.
        stop: tokens that end the answer. min_new: tokens before any of these may come.
        top: log-probabilities of so many alternatives; None for no log-probabilities at all. They
            are the model's own: of its scores before all of the above.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    presence: float = 0.0
    frequency: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    stop: frozenset[int] = frozenset()
    min_new: int = 0
    top: int | None = None

    def check(self, vocabulary: int) -> None:
        """Raise a `MismatchError` for numbers out of range."""
        _within("temperature", self.temperature, 0, _HOTTEST)
        _within("top_p", self.top_p, 0, 1)
        _within("presence_penalty", self.presence, -_PENALTY, _PENALTY)
        _within("frequency_penalty", self.frequency, -_PENALTY, _PENALTY)
        _counted("top_k", self.top_k, vocabulary)
        _counted("min_tokens", self.min_new, None)
        if self.top is not None:
            _counted("the number of alternatives", self.top, min(MOST_TOP, vocabulary))
        for token, value in self.bias.items():
            check_token(token, vocabulary)
            _within(f"the bias of token {token}", value, -_BIAS, _BIAS)


@dataclass(frozen=True, eq=False)
class Request:
    """One text to go on with, or to embed.

    Args:
        prompt: its tokens. max_new: tokens to choose; 0 to embed the prompt.
        told: called with every `Piece`, in the engine's thread; must not raise or block.
        mix: {name of an attached adapter: weight}; the base where empty.
        c: multiplies the mix. rank: cuts each of its adapters; None for all of them.
        sampling: how tokens are chosen.
    """

    prompt: Sequence[int]
    max_new: int
    told: Callable[[Piece], None]
    mix: Mapping[str, float] = field(default_factory=dict)
    c: float = 1.0
    rank: int | None = None
    sampling: Sampling = Sampling()

    @property
    def needs(self) -> int:
        """Places for tokens that it takes at most."""
        return len(self.prompt) + self.max_new


@dataclass(frozen=True)
class Piece:
    """What is told of a request.

    Args:
        token: that was chosen; None where none was. logprob: its log-probability, where asked for.
        top: (token, log-probability) of the likeliest, best first.
        reason: why this is the last of the request: "stop", "length", "cancelled" or "error"; None
            where more follows.
        vector: of a prompt that was embedded. error: where that is the reason.
    """

    token: int | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    reason: str | None = None
    vector: Sequence[float] | None = None
    error: Exception | None = None


@dataclass(frozen=True)
class Limits:
    """What an engine has room for.

    Args:
        length: tokens of one request, prompt and answer. vocabulary: tokens there are.
        rows: requests that run at once. adapters: different ones that run at once.
        waiting: requests in the queue.
    """

    length: int
    vocabulary: int
    rows: int
    adapters: int
    waiting: int

    def check(self, request: Request) -> None:
        """Raise where a request could end the engine, or would never fit.

        Raises:
            TooLongError: more tokens than there is room for. MismatchError: anything else.
        """
        if not request.prompt:
            raise MismatchError("the prompt is empty: give at least one token")
        for token in request.prompt:
            check_token(token, self.vocabulary)
        _counted("max_tokens", request.max_new, None)
        if request.needs > self.length:
            raise TooLongError(
                f"{len(request.prompt)} tokens of the prompt and {request.max_new} of the answer "
                f"are {request.needs}, and there is room for {self.length} together"
            )
        _within("c", request.c, -STRONGEST, STRONGEST)
        for name, weight in request.mix.items():
            _within(f"the weight of {name!r}", weight, -STRONGEST, STRONGEST)
        if request.rank is not None and (type(request.rank) is not int or request.rank < 1):
            raise MismatchError(f"rank must be a whole number of at least 1, not {request.rank!r}")
        if len(request.mix) > self.adapters:
            raise MismatchError(
                f"{len(request.mix)} adapters in one request, and {self.adapters} run at once"
            )
        request.sampling.check(self.vocabulary)


@dataclass(frozen=True)
class Load:
    """What an engine is doing.

    Args:
        running, waiting: requests. used: share of the room for tokens that is taken.
        adapters: names that run. queued: names that requests wait with.
    """

    running: int
    waiting: int
    used: float
    adapters: tuple[str, ...] = ()
    queued: tuple[str, ...] = ()


class Engine(ABC):
    """The seam: what runs requests on one model.

    Attributes:
        limits: what it has room for. name: what it is called.
        model: that it runs. tokens: chosen since it was made.
    """

    limits: Limits
    name: str
    model: Any
    tokens: int = 0

    @abstractmethod
    def submit(self, request: Request, follows: bool = False) -> None:
        """Take a request into the queue.

        Args:
            follows: whether it belongs to one that was taken, and waits with it also where the
                queue is full: what is asked for together is taken together.

        Raises:
            BusyError: the queue is full. DownError: it failed, or takes no more.
            MismatchError: the request could never run; what it says is its sender's.
        """

    @abstractmethod
    def cancel(self, request: Request) -> None:
        """Let go of a request, wherever it is: its last piece says so. One that ended is ended."""

    @abstractmethod
    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function between two steps, in the engine's thread; adapters come and go so.

        Raises:
            DownError: it failed.
        """

    @abstractmethod
    def check(self, request: Request) -> None:
        """Raise a `LorafoldError` where `submit` would; to be called by `call`."""

    @abstractmethod
    def trial(self) -> None:
        """Run the model once for two rows with what is in use; to be called by `call`.

        Raises:
            LorafoldError: rows can't be told apart where an adapter goes.
        """

    @abstractmethod
    def start(self) -> None:
        """Begin, or begin again after a failure, with nothing in the queue."""

    @abstractmethod
    def drain(self) -> None:
        """Take no more requests; those that are there go on."""

    @abstractmethod
    def stop(self, timeout: float | None = None) -> None:
        """End: what is still there is told an error. Waits for the thread, up to `timeout` s."""

    @property
    @abstractmethod
    def error(self) -> Exception | None:
        """Why it failed; None while it runs."""

    @property
    @abstractmethod
    def draining(self) -> bool:
        """Whether `drain` was called."""

    @property
    @abstractmethod
    def load(self) -> Load:
        """What it is doing now."""


def check_token(token: Any, vocabulary: int) -> None:
    """Raise a `MismatchError` for what is no token."""
    if type(token) is not int or not 0 <= token < vocabulary:
        raise MismatchError(f"token {token!r} is not one of the {vocabulary} of the vocabulary")


def _within(label: str, value: Any, least: float, most: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not least <= value <= most:
        raise MismatchError(f"{label} must be a number from {least:g} to {most:g}, not {value!r}")


def _counted(label: str, value: Any, most: int | None) -> None:
    if type(value) is not int or value < 0 or (most is not None and value > most):
        limit = "of at least 0" if most is None else f"from 0 to {most}"
        raise MismatchError(f"{label} must be a whole number {limit}, not {value!r}")
