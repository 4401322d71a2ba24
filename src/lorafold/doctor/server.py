"""A running server as the doctor asks it: what follows a prompt, with the adapter and without.

Two kinds are known by what they answer. llama.cpp's lists its adapters (`GET /lora-adapters`), and
each request says how strong each of them is, so that the base is asked for with zeros. Any other
has a model for an adapter (`GET /v1/models`, `POST /v1/completions`), and the base beside it.

Requests are counted, and answers bounded, in bytes and in time. A key goes into the header of each
request and nowhere else; redirections are not followed, as they would carry it elsewhere.
"""

from __future__ import annotations

import json
import math
import os
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, Protocol
from urllib.parse import urlsplit

from ..errors import FileError, MismatchError, UnknownNameError
from ..words import did_you_mean, one_line

_LONGEST = 16 << 20  # bytes of an answer
_LONGEST_TOLD = 300  # letters of what a server says
_TOP = 100  # tokens whose log-probabilities llama.cpp is asked for; others allow five
_OTHERS_TOP = 5
_FAILURES = (OSError, HTTPException, ValueError)  # of a request
_TOKEN_ID = "token_id:"  # before a token's number, where vLLM is asked for those
_LOGPROBS = {"logprobs": _OTHERS_TOP}
_NUMBERS = {"return_tokens_as_token_ids": True, "return_token_ids": True}
# Ways to ask, less after each refusal: whether by text, and what is asked for besides.
_WAYS: tuple[tuple[bool, dict[str, Any]], ...] = (
    (False, _LOGPROBS | _NUMBERS),
    (False, _LOGPROBS),
    (True, _LOGPROBS),
    (False, {}),
    (True, {}),
)


@dataclass(frozen=True)
class Answer:
    """What follows a prompt.

    Args:
        logprobs: {token: log-probability} of the first token, the likeliest ones; tokens by number
            or as a text. {} where the server tells none.
        tokens: what it goes on with, greedily; None where it tells the text alone.
        text: the same as a text.
    """

    logprobs: Mapping[int | str, float]
    tokens: tuple[int, ...] | None
    text: str


class Prompt(Protocol):
    """A prompt, as numbers of tokens and, where there is a tokenizer, as a text."""

    @property
    def ids(self) -> Sequence[int]: ...

    @property
    def text(self) -> str | None: ...


class Server(Protocol):
    """What the doctor asks."""

    @property
    def kind(self) -> str:
        """Which kind it is, for a report."""
        ...

    @property
    def notes(self) -> list[str]:
        """What else is worth saying of it."""
        ...

    def answer(self, prompt: Prompt, strength: float, tokens: int) -> Answer | None:
        """What follows the prompt, with the adapter at a strength, or (0) without it.

        None: the server has no base to be asked for.

        Raises:
            FileError: it can't be reached. MismatchError: it refuses, or answers something else.
        """
        ...


class Http:
    """JSON over HTTP, bounded.

    Args:
        url: of the server, with or without /v1.
        key: sent as `Authorization: Bearer`. timeout: seconds, of a request.
        most: requests.

    Raises:
        MismatchError: it is no http:// or https://, or has a password in it.
    """

    def __init__(self, url: str, *, key: str | None, timeout: float, most: int) -> None:
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            fine = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            parts, fine = urlsplit(""), None
        if not fine:
            raise MismatchError(f"{one_line(url)} is no address of a server: http://HOST:PORT")
        if "@" in parts.netloc:
            raise MismatchError(
                f"{parts.hostname}: a password in a URL ends up in logs: give api_key="
            )
        path = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{path}"
        self.count, self._most, self._timeout = 0, most, timeout
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        self._key = key
        if key:
            if not key.isprintable() or not key.isascii():
                raise MismatchError("api_key must be printable ASCII")
            self._headers["Authorization"] = f"Bearer {key}"
        handlers: list[Any] = [_NoRedirection()]
        if parts.hostname in ("localhost", "127.0.0.1", "::1"):
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def get(self, path: str) -> tuple[int, Any]:
        """Status, and what the answer holds (None of one that is no JSON)."""
        return self._asked(path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        """The same for a request with a body."""
        return self._asked(path, json.dumps(body).encode())

    def _asked(self, path: str, body: bytes | None) -> tuple[int, Any]:
        if self.count >= self._most:
            raise MismatchError(
                f"{self.url} would be asked more than {self._most} times: give requests= or fewer "
                "prompts"
            )
        self.count += 1
        # In a thread, as a server that sends a byte at a time is never too late for a socket.
        said: queue.SimpleQueue[tuple[int, bytes] | Exception] = queue.SimpleQueue()
        work = threading.Thread(target=self._fetched, args=(path, body, said), daemon=True)
        work.start()
        try:
            found = said.get(timeout=self._timeout)
        except queue.Empty:
            found = TimeoutError("no answer in time")
        if isinstance(found, Exception):
            reason = getattr(found, "reason", None) or found
            why = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
            raise FileError(f"{self.url} can't be reached: {self.hidden(why)}")
        status, raw = found
        if len(raw) > _LONGEST:
            raise MismatchError(f"{self.url} answers with more than {_LONGEST >> 20} MiB")
        try:
            return status, json.loads(raw)
        except (ValueError, RecursionError):
            return status, None

    def _fetched(
        self, path: str, body: bytes | None, said: queue.SimpleQueue[tuple[int, bytes] | Exception]
    ) -> None:
        """Put status and bytes of an answer there, or why there is none."""
        try:
            request = urllib.request.Request(self.url + path, data=body, headers=self._headers)
            try:
                with self._opener.open(request, timeout=self._timeout) as answer:
                    said.put((answer.status, answer.read(_LONGEST + 1)))
            except urllib.error.HTTPError as e:
                with e:
                    said.put((e.code, e.read(_LONGEST + 1)))
        except _FAILURES as e:
            said.put(e)

    def hidden(self, text: str) -> str:
        """A text of the server's, short, without the key."""
        text = " ".join((text.replace(self._key, "…") if self._key else text).split())
        return text if len(text) <= _LONGEST_TOLD else f"{text[:_LONGEST_TOLD]}…"

    def refusal(self, status: int, answer: Any) -> MismatchError:
        """The error of an answer that is none."""
        error = answer.get("error") if isinstance(answer, dict) else None
        said = error.get("message") if isinstance(error, dict) else error
        detail = answer.get("detail") if isinstance(answer, dict) else None
        why = said if isinstance(said, str) else detail if isinstance(detail, str) else None
        if status in (401, 403):
            return MismatchError(f"{self.url} wants a key, or another one: give api_key=")
        told = f": {self.hidden(why)}" if why else ""
        return MismatchError(f"{self.url} answers with status {status}{told}")


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Follow none: the answer with its status 3xx is what is told."""


def find_server(http: Http, name: str, base_name: str | None) -> Server:
    """The server at a URL, by what it answers.

    Args:
        name: of the adapter there. base_name: of the base there, where that is not told.

    Raises:
        FileError: it can't be reached. UnknownNameError: it has no such adapter.
        MismatchError: it is no server that is known, or wants a key.
    """
    status, found = http.get("/lora-adapters")
    if status == 200 and isinstance(found, list):
        return _LlamaCpp(http, found, name)
    if status in (401, 403):
        raise http.refusal(status, found)
    status, found = http.get("/v1/models")
    listed = found.get("data") if isinstance(found, dict) else None
    if status != 200 or not isinstance(listed, list):
        if status in (401, 403):
            raise http.refusal(status, found)
        raise MismatchError(
            f"{http.url} is no server that is known: /v1/models answers with status {status}"
        )
    models = {m["id"]: m for m in listed if isinstance(m, dict) and isinstance(m.get("id"), str)}
    for asked in (name, base_name):
        if asked is not None and asked not in models:
            raise UnknownNameError(
                f"{http.url} has no model {asked!r}; {did_you_mean(asked, models)}"
            )
    if base_name is None:
        parent = models[name].get("parent")
        roots = [m for m, said in models.items() if m != name and not said.get("parent")]
        base_name = parent if parent in models else next(iter(roots), None)
    return _OpenAI(http, name, base_name)


class _LlamaCpp:
    """llama.cpp's server."""

    kind = "llama.cpp"

    def __init__(self, http: Http, listed: list[Any], name: str) -> None:
        self._http = http
        found = [a for a in listed if isinstance(a, dict) and type(a.get("id")) is int]
        self._ids = [a["id"] for a in found]
        spelled = {a["id"]: _spellings(a) for a in found}
        mine = [number for number, names in spelled.items() if name in names]
        if not mine:
            known = [names[-1] for names in spelled.values()]
            raise UnknownNameError(
                f"{http.url} has no adapter {name!r}; {did_you_mean(name, known)}"
            )
        if len(mine) > 1:
            raise MismatchError(
                f"{http.url} has {len(mine)} adapters {name!r}: give the number of one, "
                f"such as {mine[0]}"
            )
        self._mine = mine[0]
        self.notes = _defaults(found, self._mine)

    def answer(self, prompt: Prompt, strength: float, tokens: int) -> Answer | None:
        """See `Server`; what is not named in `lora` would be at 0, but that is said, too."""
        body = {
            "prompt": list(prompt.ids),
            "n_predict": tokens,
            "n_probs": _TOP,
            "temperature": 0.0,
            "cache_prompt": False,
            "return_tokens": True,
            "lora": [{"id": i, "scale": strength if i == self._mine else 0.0} for i in self._ids],
        }
        status, found = self._http.post("/completion", body)
        if status != 200 or not isinstance(found, dict):
            raise self._http.refusal(status, found)
        first = _first(found.get("completion_probabilities"))
        top = first.get("top_logprobs") if isinstance(first, dict) else None
        ids = found.get("tokens")
        return Answer(_by_id(top), _whole_numbers(ids), str(found.get("content", "")))


def _spellings(adapter: Mapping[str, Any]) -> list[str]:
    path = str(adapter.get("path", ""))
    file = os.path.basename(path.replace("\\", "/"))
    return [str(adapter["id"]), path, file, os.path.splitext(file)[0]]


def _defaults(adapters: Sequence[Mapping[str, Any]], mine: int) -> list[str]:
    """What a request without `lora` gets."""
    scales = {a["id"]: a.get("scale") for a in adapters}
    said = ", ".join(f"{i}: {s:g}" for i, s in scales.items() if isinstance(s, int | float))
    notes = [f"a request without 'lora' runs with the adapters at {said}"] if said else []
    others = [i for i, s in scales.items() if i != mine and s != 0]
    if scales.get(mine) != 1 or others:
        notes.append("so name every adapter's scale in each request, or set them (/lora-adapters)")
    return notes


class _OpenAI:
    """Any server of OpenAI's protocol that has a model for an adapter."""

    kind = "OpenAI's protocol"

    def __init__(self, http: Http, name: str, base_name: str | None) -> None:
        self._http, self._name, self._base = http, name, base_name
        self._ways = list(_WAYS)
        self.notes = [] if base_name else ["the server lists no base beside it, to be asked for"]

    def answer(self, prompt: Prompt, strength: float, tokens: int) -> Answer | None:
        """See `Server`; a strength that is not 0 is the server's own."""
        model = self._name if strength else self._base
        if model is None:
            return None
        while True:
            by_text, more = self._ways[0]
            given = prompt.text if by_text else list(prompt.ids)
            body = {"model": model, "prompt": given, "max_tokens": tokens, "temperature": 0.0}
            status, found = self._http.post("/v1/completions", {**body, **more})
            if status == 200 and isinstance(found, dict):
                return self._told(found)
            if status not in (400, 422) or not self._asks_less(prompt):
                raise self._http.refusal(status, found)

    def _asks_less(self, prompt: Prompt) -> bool:
        """Ask in the next way from now on; False where there is none."""
        del self._ways[0]
        if prompt.text is None:
            self._ways = [way for way in self._ways if not way[0]]
        return bool(self._ways)

    def _told(self, found: Mapping[str, Any]) -> Answer:
        choice = _first(found.get("choices"))
        if not isinstance(choice, dict):
            raise MismatchError(f"{self._http.url} answers without choices")
        said = choice.get("logprobs")
        logprobs: dict[int | str, float] = {}
        if isinstance(said, dict) and "content" in said:
            first = _first(said["content"])
            logprobs = _by_id(first.get("top_logprobs")) if isinstance(first, dict) else {}
        elif isinstance(said, dict):
            top = _first(said.get("top_logprobs"))
            if isinstance(top, dict):
                logprobs = {_token(key): float(x) for key, x in top.items() if _is_finite(x)}
        return Answer(
            logprobs, _whole_numbers(choice.get("token_ids")), str(choice.get("text", ""))
        )


def _first(x: Any) -> Any:
    return x[0] if isinstance(x, list) and x else None


def _token(key: str) -> int | str:
    number = key.removeprefix(_TOKEN_ID)
    return int(number) if number != key and number.isdecimal() and len(number) < 12 else key


def _by_id(top: Any) -> dict[int | str, float]:
    rows = top if isinstance(top, list) else []
    return {
        row["id"]: float(row["logprob"])
        for row in rows
        if isinstance(row, dict) and type(row.get("id")) is int and _is_finite(row.get("logprob"))
    }


def _is_finite(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _whole_numbers(x: Any) -> tuple[int, ...] | None:
    whole = isinstance(x, list) and all(type(n) is int for n in x)
    return tuple(x) if whole and x else None
