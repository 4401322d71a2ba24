"""What a server knows and does for requests of any kind: who is asked for, holding, submitting."""

from __future__ import annotations

import asyncio
import os
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ...adapter import Adapter
from ...attach.selection import TokenMix
from ...collection.limits import memory_bytes
from ...errors import FileError, LorafoldError, MismatchError, UnknownNameError
from ...words import one_line
from ..adapters import Pool
from ..base import Base
from ..catalog import Catalog
from ..engine import Piece, Request, Sampling
from ..naming import Named, parsed
from .answering import Answer, Answers
from .bodies import Asked, Generation
from .errors import ApiError, api_error
from .metrics import Metrics

T = TypeVar("T")
AUTO = "auto"


@dataclass(frozen=True)
class Settings:
    """What a server allows.

    Args:
        keys: that may ask; anybody where there are none.
        root: a folder below which adapters may be loaded by their paths; None for nowhere.
        cache: bytes that attached adapters may take, as "1GiB".
        seconds: for one request. body: bytes of one.

    Raises:
        MismatchError: a key that no request can bring.
    """

    keys: tuple[str, ...] = ()
    root: str | os.PathLike[str] | None = None
    cache: str | int = "1GiB"
    seconds: float = 600.0
    body: int = 1 << 22

    def __post_init__(self) -> None:
        if any(not key or key != key.strip() for key in self.keys):
            raise MismatchError("a key must not be empty, nor begin or end with a space")


@dataclass(frozen=True)
class Chosen:
    """Who answers.

    Args:
        mix: {name: weight}; the base where empty. c, rank: as for `use`.
        label: what the answer says of it.
    """

    mix: Mapping[str, float]
    c: float
    rank: int | None
    label: str


class Service:
    """One base, its adapters, and whoever asks for them.

    Args:
        base: it. catalog: what names mean. settings: what is allowed.
        router: from texts to mixes, for the model "auto"; None for none.

    Raises:
        MismatchError: the router chooses for every token, or among names that aren't there.

    Attributes:
        pool: the attached adapters. metrics: what is counted. running: {digest: a name of it}.
    """

    def __init__(
        self, base: Base, catalog: Catalog, settings: Settings, router: Any = None
    ) -> None:
        self.base, self.catalog, self.settings = base, catalog, settings
        self.engine, self.words = base.engine, base.words
        self.router: Any = None if router is None else _checked(router, catalog)
        self.pool = Pool(self._attach, self._detach, memory_bytes(settings.cache))
        self.metrics = Metrics(base.name, self.engine.limits.adapters)
        self._names: dict[str, str] = {}

    # Adapters

    def _attach(self, adapter: Adapter, digest: str) -> None:
        add, trial = self.base.attachments.add, self.engine.trial
        self.engine.call(lambda: add(adapter, digest, trial)).result()

    def _detach(self, digest: str) -> None:
        self._names.pop(digest, None)
        self.engine.call(lambda: self.base.attachments.remove(digest)).result()

    def named(self, digests: Sequence[str]) -> list[str]:
        """Names of adapters that are attached."""
        return [self._names.get(digest, digest) for digest in digests]

    def load(self, name: str, path: str) -> None:
        """One more adapter, from a folder below the root.

        Raises:
            ApiError: 404 where nothing is; 400 for what is elsewhere, or can't be run.
        """
        assert self.settings.root is not None
        root = Path(self.settings.root).resolve()
        try:
            there = Path(os.path.join(root, path)).resolve()
            exists = there.exists()
        except (OSError, RuntimeError, ValueError):  # too long, in a circle, or with a zero in it
            raise ApiError(f"lora_path: {one_line(path)} is no path", 400, "lora_path") from None
        if not there.is_relative_to(root):
            raise ApiError("lora_path leads out of the folder for adapters", 400, "lora_path")
        if not exists:
            raise ApiError(f"lora_path: there is no {one_line(path)}", 404, "lora_path")
        try:
            self.catalog.add(name, there)
            try:  # whether it fits the base is said now
                self.pool.release(self.catalog.hold({name: 1.0}, self.pool))
            except BaseException:
                self.catalog.drop(name)
                raise
        except LorafoldError as e:  # where the root lies is nobody's business
            theirs = isinstance(e, FileError)
            found = ApiError(str(e), 400, "lora_path") if theirs else api_error(e)
            said = str(found).replace(f"{root}{os.sep}", "").replace(str(root), ".")
            raise ApiError(said, found.status, found.param, found.code) from e

    # Who answers

    def choose(self, asked: Asked, texts: Sequence[str | list[int]]) -> Chosen:
        """Who is asked for.

        Args:
            texts: what a router would look at; one.

        Raises:
            ApiError, UnknownNameError, MismatchError: nobody, or two at once.
        """
        self.catalog.look()
        model = asked.model or self.base.name
        named = self._named(model) if asked.lora is None else self._listed(asked, model)
        if model != self.base.name and model not in self.catalog:
            for field in named.said:
                if getattr(asked, field) is not None:
                    raise ApiError(f"{field} is in the model's name, and beside it", 400, field)
        c = named.c if asked.c is None else asked.c
        rank = named.rank if asked.rank is None else asked.rank
        mix, label = dict(named.mix), model
        if AUTO in mix and AUTO not in self.catalog:
            mix = self._routed(texts)
            label = spelled(mix, self.base.name)
        elif asked.lora is not None:
            label = spelled(mix, self.base.name)
        return Chosen(mix, c, rank, label)

    def _listed(self, asked: Asked, model: str) -> Named:
        if model != self.base.name:
            raise ApiError(
                f"lora is given, so model must be {self.base.name!r}: adapters are in one of them",
                400,
                "lora",
            )
        assert asked.lora is not None
        for name, _ in asked.lora:
            if name not in self.catalog:
                raise self.catalog.unknown(name)
        return Named(asked.lora)

    def _named(self, model: str) -> Named:
        if model in self.catalog:
            return Named(((model, 1.0),))
        own = (self.base.name, *((AUTO,) if self.router is not None else ()))
        known: Any = self.catalog
        try:
            found = parsed(model, ChainMap(dict.fromkeys(own), known))
        except UnknownNameError:
            raise self.catalog.unknown(model) from None
        except MismatchError as e:
            raise ApiError(str(e), 400, "model") from None
        mine = [name for name, _ in found.mix if name in own and name not in self.catalog]
        if mine and (len(found.mix) > 1 or found.mix[0][1] != 1):
            raise self.catalog.unknown(model)
        return replace(found, mix=()) if mine == [self.base.name] else found

    def _routed(self, texts: Sequence[str | list[int]]) -> dict[str, float]:
        if len(texts) != 1:
            raise ApiError(f"{AUTO} chooses for one text, and there are {len(texts)}", 400, "model")
        text = texts[0]
        if not isinstance(text, str):
            reader = self.words.reader()
            text = "".join(reader.read(token) for token in text) + reader.rest()
        mix: dict[str, float] = self.router([text])[0] or {}
        for name in mix:
            if name not in self.catalog:
                raise self.catalog.unknown(name)
        return mix

    # Requests

    async def ask(
        self,
        chosen: Chosen,
        how: Generation | None,
        prompts: Sequence[Sequence[int]],
        ends: frozenset[int],
    ) -> Answers:
        """Put requests into the queue, `how.n` for each prompt; embeddings where there is no how.

        Raises:
            LorafoldError: what would end the engine, a queue that is full, an engine that is down.
        """
        stop = ends if how is None or how.ends else frozenset()
        copies = 1 if how is None else how.n
        stops = () if how is None else how.stops
        answers = Answers(
            self._submit,
            self.engine.cancel,
            [Answer(self.words, stops, stop) for _ in range(len(prompts) * copies)],
            self.settings.seconds,
        )
        mix = await asyncio.to_thread(self._held, chosen)
        try:
            requests = [
                Request(
                    prompt,
                    self._room(how, prompt),
                    self._told(answers.told(i * copies + k), mix),
                    mix,
                    chosen.c,
                    chosen.rank,
                    _sampling(how, stop, k),
                )
                for i, prompt in enumerate(prompts)
                for k in range(copies)
            ]
            check = self.engine.check
            await self.between(lambda: [check(request) for request in requests])
            answers.ask(requests)
        finally:
            self.pool.release(mix)
        return answers

    def between(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """Run a function between two steps of the engine."""
        future: Future[T] = self.engine.call(function)
        return asyncio.wrap_future(future)

    def _held(self, chosen: Chosen) -> dict[str, float]:
        mix = self.catalog.hold(chosen.mix, self.pool)
        for digest, name in zip(mix, chosen.mix, strict=False):
            self._names[digest] = name
        return mix

    def _room(self, how: Generation | None, prompt: Sequence[int]) -> int:
        if how is None:
            return 0
        left = self.engine.limits.length - len(prompt)
        return max(1, left) if how.max_new is None else how.max_new

    def _submit(self, request: Request, follows: bool) -> None:
        self.pool.hold_again(request.mix)
        try:
            self.engine.submit(request, follows)
        except BaseException:
            self.pool.release(request.mix)
            raise

    def _told(self, tell: Callable[[Piece], None], mix: Mapping[str, float]) -> Any:
        def told(piece: Piece) -> None:
            if piece.reason is not None:
                self.pool.release(mix)
            tell(piece)

        return told


def spelled(mix: Mapping[str, float], base: str) -> str:
    """A mix as the grammar of names has it."""
    if not mix:
        return base
    if len(mix) == 1 and next(iter(mix.values())) == 1:
        return next(iter(mix))
    return "+".join(f"{name}:{_decimal(weight)}" for name, weight in mix.items())


def _decimal(weight: float) -> str:
    """A weight as names spell it, without an exponent."""
    return f"{weight:.9f}".rstrip("0").rstrip(".")


def _sampling(how: Generation | None, stop: frozenset[int], k: int) -> Sampling:
    if how is None:
        return Sampling()
    rules = dict(how.rules)
    if rules["seed"] is not None:
        rules["seed"] += k  # so that several answers differ
    return Sampling(**rules, stop=stop)


def _checked(router: Any, catalog: Catalog) -> Any:
    if isinstance(router, TokenMix):
        raise MismatchError(
            f"a {type(router).__name__} weighs every token by itself, and a request needs one mix: "
            "a CentroidRouter or a LearnedRouter gives that"
        )
    lacking = [name for name in router.names if name not in catalog]
    if lacking:
        raise MismatchError(f"the router chooses {one_line(lacking[0])}, which is not served")
    if getattr(router, "encoder", True) is None:
        raise MismatchError("the router has no encoder for texts: save it with one that is named")
    return router
