"""The routes: bodies in, answers out, and errors in the shape of the protocol throughout."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...errors import LorafoldError
from ...fold import Library
from ...route import load as load_router
from ..base import Base
from ..catalog import Catalog
from ..playground.page import page
from . import answers as out
from .answering import Answers, Chunk
from .bodies import Chat, Completion, Embedding, Generation, Loading
from .errors import ApiError, api_error
from .guard import Guard
from .service import AUTO, Chosen, Service, Settings
from .web import web

_LOOK = 0.2  # seconds between two looks at whether a client is there, and the engine
_PAUSES = (1.0, 30.0)  # seconds before a failed engine begins again: the first, the longest
_LEFT = 499  # the status for a client that has gone, as proxies write it in their logs
_log = logging.getLogger("lorafold")

Handler = Callable[[Any], Awaitable[Any]]


def app(
    base: Base,
    library: Library | str | os.PathLike[str] | None = None,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    *,
    router: Any = None,
    settings: Settings | None = None,
) -> Any:
    """An application that serves a base with adapters, as OpenAI's protocol has it.

    Args:
        base: as `read_base` gives it. library: folded adapters, or their path.
        adapters: {name: path} of more.
        router: for the model "auto": one that was saved, by its path, or any function from texts
            to mixes with `.names`.
        settings: what is allowed; anybody and nothing more when None.

    Returns:
        An ASGI application (FastAPI's), whose engine begins and ends with it.

    Raises:
        MissingExtraError: fastapi or prometheus_client is not there.
        FileError: no library, adapter or router there. MismatchError: names that don't fit.

    Not for: running it, which `lorafold serve` does, or any ASGI server.

    Examples:
        >>> from lorafold.demo.model import base_dir
        >>> from lorafold.serve import app, read_base
        >>> app(read_base(base_dir(), "demo")).title
        'lorafold'
    """
    settings = settings or Settings()
    catalog = Catalog(library, adapters or {}, base.name)
    if isinstance(router, str | os.PathLike):
        router = load_router(router)
    service = Service(base, catalog, settings, router)
    made = web().FastAPI(title="lorafold", openapi_url=None, lifespan=_lifespan(service))
    made.state.service = service
    routes = Routes(service)
    for method, path, handler in routes.all_of_them():
        made.add_route(path, _endpoint(handler, service), methods=[method])
    made.add_exception_handler(web().HTTPException, _no_route)
    refused = service.metrics.refused
    made.add_middleware(Guard, keys=settings.keys, most=settings.body, refused=refused)
    return made


def _endpoint(handler: Handler, service: Service) -> Handler:
    """A handler whose errors are answers."""

    async def endpoint(request: Any) -> Any:
        try:
            return await handler(request)
        except Exception as e:  # noqa: BLE001  (the client is told its kind, the log the rest)
            if not isinstance(e, LorafoldError):
                _log.exception("a request has failed")
            error = api_error(e)
            service.metrics.refused(error.status)
            return web().JSONResponse(error.body, error.status, headers=error.headers)

    return endpoint


async def _no_route(request: Any, error: Any) -> Any:
    said = {
        404: f"there is no {request.url.path!r} here",
        405: f"{request.method} is not what {request.url.path!r} takes",
    }
    found = ApiError(said.get(error.status_code, str(error.detail)), error.status_code)
    request.app.state.service.metrics.refused(found.status)
    return web().JSONResponse(found.body, found.status, headers=error.headers)


def _lifespan(service: Service) -> Callable[[Any], Any]:
    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        service.engine.start()
        watching = asyncio.create_task(_watch(service))
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.to_thread(service.engine.stop, 10.0)

    return lifespan


async def _watch(service: Service) -> None:
    """Have a failed engine begin again, after a pause that doubles while that doesn't help."""
    pause, least = _PAUSES[0], _PAUSES[0]
    while True:
        await asyncio.sleep(_LOOK)
        if service.engine.error is None:
            pause = max(least, pause - _LOOK / 10)
            continue
        _log.error("the engine has failed, and begins again in %g s", pause)
        await asyncio.sleep(pause)
        pause = min(2 * pause, _PAUSES[1])
        await asyncio.to_thread(service.engine.start)


class Routes:
    """What is answered where.

    Args:
        service: that does it.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._created = int(time.time())

    def all_of_them(self) -> list[tuple[str, str, Handler]]:
        """(method, path, handler) of each."""
        found: list[tuple[str, str, Handler]] = [
            ("GET", "/", self.playground),
            ("GET", "/health", self.health),
            ("GET", "/metrics", self.metrics),
            ("GET", "/v1/models", self.models),
            ("GET", "/v1/models/{name:path}", self.model),
            ("POST", "/v1/completions", self.completions),
            ("POST", "/v1/chat/completions", self.chat),
            ("POST", "/v1/embeddings", self.embeddings),
        ]
        if self._service.settings.root is not None:
            found += [
                ("POST", "/v1/load_lora_adapter", self.load),
                ("POST", "/v1/unload_lora_adapter", self.unload),
            ]
        return found

    # What there is

    async def playground(self, _: Any) -> Any:
        """A page that asks what is below."""
        html, headers = page()
        return web().Response(html, headers=headers)

    async def health(self, _: Any) -> Any:
        """Whether requests are taken."""
        engine = self._service.engine
        if engine.error is not None:
            return web().JSONResponse({"status": "failed", "reason": str(engine.error)}, 503)
        if engine.draining:
            return web().JSONResponse({"status": "draining", "reason": "the server is ending"}, 503)
        return web().JSONResponse({"status": "ok"})

    async def metrics(self, _: Any) -> Any:
        """What is counted."""
        service = self._service
        load, pool = service.engine.load, service.pool
        running, waiting = service.named(load.adapters), service.named(load.queued)
        text, kind = service.metrics.text(
            load, running, waiting, list(pool.digests.values()), pool.nbytes
        )
        return web().Response(text, headers={"content-type": kind})

    async def models(self, _: Any) -> Any:
        """The base, all adapters, and who chooses among them."""
        service = self._service
        await asyncio.to_thread(service.catalog.look)
        length, base = service.engine.limits.length, service.base.name
        cards = [out.card(base, self._created, None, length)]
        names = [*service.catalog, *([AUTO] if self._routes(AUTO) else [])]
        cards += [out.card(name, self._created, base, length) for name in names]
        return web().JSONResponse({"object": "list", "data": cards})

    async def model(self, request: Any) -> Any:
        """One of them."""
        service, name = self._service, request.path_params["name"]
        await asyncio.to_thread(service.catalog.look)
        base = service.base.name
        if name != base and name not in service.catalog and not self._routes(name):
            raise service.catalog.unknown(name)
        parent = None if name == base else base
        length = service.engine.limits.length
        return web().JSONResponse(out.card(name, self._created, parent, length))

    def _routes(self, name: str) -> bool:
        """Whether the name is the router's."""
        service = self._service
        return name == AUTO and service.router is not None and AUTO not in service.catalog

    # Adapters that come and go

    async def load(self, request: Any) -> Any:
        """One more adapter."""
        body = Loading.of(await request.body(), ("lora_name", "lora_path"))
        await asyncio.to_thread(self._service.load, body.name, body.path or "")
        return web().PlainTextResponse(f"Success: LoRA adapter '{body.name}' added successfully.")

    async def unload(self, request: Any) -> Any:
        """One less."""
        body = Loading.of(await request.body(), ("lora_name",))
        self._service.catalog.drop(body.name)
        return web().PlainTextResponse(f"Success: LoRA adapter '{body.name}' removed successfully.")

    # Answers

    async def completions(self, request: Any) -> Any:
        """Texts to go on with."""
        body, service = Completion.of(await request.body()), self._service
        self._check_kind(encoder=False)
        chosen = await asyncio.to_thread(service.choose, body.how.asked, body.prompts)
        prompts = await asyncio.to_thread(self._tokens, body.prompts)
        echoed = [_text(service, p) if body.echo else "" for p in body.prompts]
        ends = service.words.ends
        answers = await service.ask(chosen, body.how, prompts, ends)
        what = out.COMPLETION, chosen, body.how, answers, prompts, echoed
        return await self._answer(request, *what)

    async def chat(self, request: Any) -> Any:
        """What an assistant says next."""
        body, service = Chat.of(await request.body()), self._service
        self._check_kind(encoder=False)
        chosen = await asyncio.to_thread(service.choose, body.how.asked, (body.said,))
        prompt, ends = await asyncio.to_thread(service.words.chat, body.messages)
        if service.words.lined:  # an empty line is no answer
            body.how.rules["min_new"] = max(1, body.how.rules["min_new"])
        answers = await service.ask(chosen, body.how, [prompt], ends)
        return await self._answer(request, out.CHAT, chosen, body.how, answers, [prompt], [""])

    async def embeddings(self, request: Any) -> Any:
        """Vectors of texts."""
        body, service = Embedding.of(await request.body()), self._service
        self._check_kind(encoder=True)
        chosen = await asyncio.to_thread(service.choose, body.asked, body.inputs)
        prompts = await asyncio.to_thread(self._tokens, body.inputs)
        answers = await service.ask(chosen, None, prompts, frozenset())
        chunks = await self._whole(request, answers)
        if chunks is None:
            return web().Response(status_code=_LEFT)
        vectors = {chunk.index: chunk.vector or () for chunk in chunks}
        size = len(vectors[0])
        if body.dimensions not in (None, size):
            raise ApiError(f"dimensions: the vectors have {size}", 400, "dimensions")
        count = sum(map(len, prompts))
        self._count(answers, count)
        data = [out.embedded(vectors[i], i, body.base64) for i in range(len(prompts))]
        usage = {"prompt_tokens": count, "total_tokens": count}
        return web().JSONResponse(
            {"object": "list", "data": data, "model": chosen.label, "usage": usage}
        )

    def _check_kind(self, encoder: bool) -> None:
        if self._service.base.encoder and not encoder:
            raise ApiError("the base is an encoder: it answers /v1/embeddings alone")
        if encoder and not self._service.base.encoder:
            raise ApiError("the base writes texts, and is no encoder: it gives no vectors")

    def _tokens(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        words = self._service.words
        return [words.tokens(p) if isinstance(p, str) else p for p in prompts]

    async def _answer(
        self,
        request: Any,
        kind: out.Kind,
        chosen: Chosen,
        how: Generation,
        answers: Answers,
        prompts: Sequence[Sequence[int]],
        echoed: Sequence[str],
    ) -> Any:
        """What is sent of answers, in pieces or whole."""
        head = out.Head(kind, uuid.uuid4().hex, int(time.time()), chosen.label)
        count = sum(map(len, prompts))
        before = [echoed[i // how.n] for i in range(len(answers.answers))]
        if how.stream:
            return _streamed(self._parts(head, how, answers, count, before), answers.leave)
        chunks = await self._whole(request, answers)
        if chunks is None:
            return web().Response(status_code=_LEFT)
        words, wanted = self._service.words, how.rules["top"] is not None
        choices = []
        for i, answer in enumerate(answers.answers):
            own = [chunk for chunk in chunks if chunk.index == i]
            text = before[i] + "".join(chunk.text for chunk in own)
            tokens = [token for chunk in own for token in chunk.tokens] if wanted else None
            choices.append(out.whole_choice(kind, i, text, answer.reason or "stop", tokens, words))
        self._count(answers, count)
        return web().JSONResponse(head.whole(choices, out.usage_of(count, answers.count)))

    async def _whole(self, request: Any, answers: Answers) -> list[Chunk] | None:
        """All there is; None where the client has gone meanwhile."""

        async def collected() -> list[Chunk]:
            return [chunk async for chunk in answers.chunks()]

        task = asyncio.create_task(collected())
        try:
            while not (await asyncio.wait({task}, timeout=_LOOK))[0]:
                if await request.is_disconnected():
                    self._count(answers, 0)
                    return None
            return task.result()
        finally:
            task.cancel()
            answers.leave()

    async def _parts(
        self,
        head: out.Head,
        how: Generation,
        answers: Answers,
        count: int,
        before: Sequence[str],
    ) -> AsyncIterator[str]:
        """The events of a stream."""
        words, wanted, begun = self._service.words, how.rules["top"] is not None, set[int]()
        try:
            async for chunk in answers.chunks():
                first = chunk.index not in begun
                if first:
                    begun.add(chunk.index)
                    chunk = replace(chunk, text=before[chunk.index] + chunk.text)  # noqa: PLW2901
                choice = out.part_choice(head.kind, chunk, first, words, wanted)
                part = head.part([choice])
                yield _event({**part, "usage": None} if how.usage else part)
            if how.usage:
                yield _event(head.part([], out.usage_of(count, answers.count)))
            yield "data: [DONE]\n\n"
        except Exception as e:  # noqa: BLE001  (the status is out: the stream says it)
            if not isinstance(e, LorafoldError):
                _log.exception("a stream has failed")
            yield _event(api_error(e).body)
            yield "data: [DONE]\n\n"
        finally:
            answers.leave()
            self._count(answers, count)

    def _count(self, answers: Answers, prompt: int) -> None:
        """Note what a request was."""
        metrics = self._service.metrics
        metrics.prompt.inc(prompt)
        metrics.tokens.inc(answers.count)
        for answer in answers.answers:
            metrics.ended(answer.reason or "cancelled")
        if answers.first is not None:
            metrics.first.observe(answers.first - answers.started)
        metrics.whole.observe(time.monotonic() - answers.started)


def _text(service: Service, prompt: str | list[int]) -> str:
    if isinstance(prompt, str):
        return prompt
    reader = service.words.reader()
    return "".join(map(reader.read, prompt)) + reader.rest()


def _event(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _streamed(parts: AsyncIterator[str], leave: Callable[[], None]) -> Any:
    """Events as they come; whatever ends it, ends the parts, also those that never began."""

    class Streamed(web().StreamingResponse):  # type: ignore[misc]
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            try:
                await super().__call__(scope, receive, send)
            finally:
                await parts.aclose()  # type: ignore[attr-defined]
                leave()

    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return Streamed(parts, media_type="text/event-stream", headers=headers)
