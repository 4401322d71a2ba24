"""What requests may say, read field by field; what is wrong is told with the field's name.

A field that is null is one that isn't there. What would change an answer and isn't known is refused
by name; what the protocol has and changes no answer is passed over (`_IDLE`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from ...words import one_line
from ..engine import MOST_TOP
from ..naming import STRONGEST
from .errors import ApiError

MOST_CHOICES = 16  # of one request, over all its prompts
_MOST_STOPS, _LONGEST_STOP = 16, 256
_MOST_INPUTS = 2048
_TOKEN = re.compile("[0-9]{1,9}")
# Of a message, beside its role and content, and without a say in what is answered here.
_BESIDE = ("name", "tool_call_id", "refusal", "annotations")
_ROLES = ("system", "developer", "user", "assistant", "tool")
# Of the protocol, and without a say in what is answered here.
_IDLE = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "verbosity"),
)
# Of the protocol, and what is done anyway where they say so.
_ONLY = {
    "best_of": (1,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "suffix": ("",),
    "logit_processors": ([],),
}


class Fields:
    """The fields of a body, each read once.

    Args:
        body: as it came.

    Raises:
        ApiError: it is no JSON object.
    """

    def __init__(self, body: bytes) -> None:
        try:
            found = json.loads(body, parse_constant=_no_number)
            if b"\\" in body or not body.isascii():
                found = _with_whole_letters(found)
        except (ValueError, RecursionError) as e:
            raise ApiError(f"the body is no JSON: {e}") from None
        if not isinstance(found, dict):
            raise ApiError(f"the body must be a JSON object, not {_kind(found)}")
        self._all: dict[str, Any] = found
        self._read: set[str] = set()

    def get(self, name: str) -> Any:
        """A field, or None."""
        self._read.add(name)
        return self._all.get(name)

    def number(self, name: str, default: float, least: float, most: float) -> float:
        """A number within limits."""
        value = self.get(name)
        if value is None:
            return default
        fine = isinstance(value, int | float) and not isinstance(value, bool)
        if not fine or not least <= value <= most:
            raise _wrong(name, f"a number from {least:g} to {most:g}", value)
        return float(value)

    def whole(self, name: str, least: int, most: int) -> int | None:
        """A whole number within limits; None where it isn't there."""
        value = self.get(name)
        if value is None:
            return None
        if type(value) is not int or not least <= value <= most:
            raise _wrong(name, f"a whole number from {least} to {most}", value)
        return value

    def flag(self, name: str) -> bool:
        """Whether it is true."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise _wrong(name, "true or false", value)
        return bool(value)

    def text(self, name: str) -> str | None:
        """A text; None where it isn't there."""
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            raise _wrong(name, "a text", value)
        return value

    def rest(self) -> None:
        """Refuse what has not been read.

        Raises:
            ApiError: naming it.
        """
        for name, value in self._all.items():
            if value is None or name in self._read or name in _IDLE:
                continue
            if name in _ONLY:
                if value not in _ONLY[name]:
                    raise ApiError(f"{name}={one_line(value)} is not done here", 400, name)
                continue
            raise ApiError(f"{one_line(name)} is no field that is known here", 400, name)


@dataclass(frozen=True)
class Asked:
    """What every request says of its adapters.

    Args:
        model: a name, the base's, "auto", or a name with options; None for the base.
        lora: (name, weight) of each; None where it isn't said.
        c, rank: as for `use`; None where they aren't said.
    """

    model: str | None
    lora: tuple[tuple[str, float], ...] | None
    c: float | None
    rank: int | None

    @classmethod
    def of(cls, fields: Fields) -> Asked:
        """What a body says."""
        model, given = fields.text("model"), fields.get("lora")
        c = None if fields.get("c") is None else fields.number("c", 1.0, -STRONGEST, STRONGEST)
        rank = fields.whole("rank", 1, 65_536)
        return cls(model, None if given is None else _mix(given), c, rank)


def _mix(given: Any) -> tuple[tuple[str, float], ...]:
    if not isinstance(given, list) or not given:
        raise _wrong("lora", 'a list of {"name", "scale"}', given)
    found: dict[str, float] = {}
    for one in given:
        if not isinstance(one, dict) or not isinstance(one.get("name"), str):
            raise _wrong("lora", 'a list of {"name", "scale"}', given)
        if odd := set(one) - {"name", "scale"}:
            raise ApiError(f"lora: {one_line(min(odd))} is none of name and scale", 400, "lora")
        scale = one.get("scale", 1.0)
        fine = isinstance(scale, int | float) and not isinstance(scale, bool)
        if not fine or not abs(scale) <= STRONGEST:
            raise _wrong("lora", f"scales from -{STRONGEST:g} to {STRONGEST:g}", scale)
        if one["name"] in found:
            raise ApiError(f"lora names {one_line(one['name'])} twice", 400, "lora")
        found[one["name"]] = float(scale)
    return tuple(found.items())


@dataclass(frozen=True)
class Generation:
    """What completions and chats say of how they are answered.

    Args:
        asked: of its adapters. rules: for `Sampling`, as keywords.
        n: answers of each prompt. max_new: tokens; None for what there is room for.
        stops: texts. ends: whether the base's own ends end it.
        stream: whether it comes in pieces. usage: whether the last of these counts.
    """

    asked: Asked
    rules: dict[str, Any]
    n: int
    max_new: int | None
    stops: tuple[str, ...]
    ends: bool
    stream: bool
    usage: bool

    @classmethod
    def of(cls, fields: Fields, top: int | None, max_new: int | None) -> Generation:
        """What a body says.

        Args:
            top: alternatives of each token. max_new: as the kind of request has it.
        """
        rules = {
            "temperature": fields.number("temperature", 1.0, 0.0, 100.0),
            "top_p": fields.number("top_p", 1.0, 0.0, 1.0),
            "top_k": max(0, fields.whole("top_k", -1, 1 << 30) or 0),
            "seed": fields.whole("seed", -(1 << 63), (1 << 64) - 1),
            "presence": fields.number("presence_penalty", 0.0, -2.0, 2.0),
            "frequency": fields.number("frequency_penalty", 0.0, -2.0, 2.0),
            "bias": _bias(fields.get("logit_bias")),
            "min_new": fields.whole("min_tokens", 0, 1 << 30) or 0,
            "top": top,
        }
        stream = fields.flag("stream")
        return cls(
            Asked.of(fields),
            rules,
            fields.whole("n", 1, MOST_CHOICES) or 1,
            max_new,
            _stops(fields.get("stop")),
            not fields.flag("ignore_eos"),
            stream,
            _usage(fields.get("stream_options"), stream),
        )


def _bias(given: Any) -> dict[int, float]:
    if given is None:
        return {}
    if not isinstance(given, dict) or len(given) > 1024:
        raise _wrong("logit_bias", "an object of at most 1024 tokens", given)
    found: dict[int, float] = {}
    for token, value in given.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if _TOKEN.fullmatch(token) is None or not number or not abs(value) <= 100:
            raise _wrong("logit_bias", "{token: a number from -100 to 100}", {token: value})
        found[int(token)] = float(value)
    return found


def _stops(given: Any) -> tuple[str, ...]:
    found = [given] if isinstance(given, str) else [] if given is None else given
    fine = isinstance(found, list) and all(isinstance(s, str) and s for s in found)
    if not fine or len(found) > _MOST_STOPS or any(len(s) > _LONGEST_STOP for s in found):
        text = f"at most {_MOST_STOPS} texts of 1 to {_LONGEST_STOP} letters"
        raise _wrong("stop", text, given)
    return tuple(found)


def _usage(given: Any, stream: bool) -> bool:
    if given is None:
        return False
    if not stream:
        raise ApiError("stream_options is for a stream alone", 400, "stream_options")
    known = {"include_usage", "include_obfuscation", "continuous_usage_stats"}
    fine = isinstance(given, dict) and not set(given) - known
    if not fine or not all(v is None or isinstance(v, bool) for v in given.values()):
        raise _wrong("stream_options", '{"include_usage": true or false}', given)
    return bool(given.get("include_usage"))


@dataclass(frozen=True)
class Completion:
    """A body of /v1/completions: prompts, texts or tokens, to go on with."""

    prompts: tuple[str | list[int], ...]
    echo: bool
    how: Generation

    @classmethod
    def of(cls, body: bytes) -> Completion:
        """What a body says.

        Raises:
            ApiError: a field that is none, or out of range.
        """
        fields = Fields(body)
        prompts = _prompts("prompt", fields.get("prompt"))
        if len(prompts) > MOST_CHOICES:
            raise ApiError(f"at most {MOST_CHOICES} prompts in one request", 400, "prompt")
        echo, top = fields.flag("echo"), fields.whole("logprobs", 0, MOST_TOP)
        max_new = fields.whole("max_tokens", 1, 1 << 30)
        how = Generation.of(fields, top, 16 if max_new is None else max_new)
        if echo and (top is not None):
            raise ApiError("echo with logprobs is not done here", 400, "echo")
        if how.n * len(prompts) > MOST_CHOICES:
            raise ApiError(f"n: at most {MOST_CHOICES} answers in one request", 400, "n")
        fields.rest()
        return cls(prompts, echo, how)


def _prompts(name: str, given: Any) -> tuple[str | list[int], ...]:
    if isinstance(given, str):
        return (given,)
    if isinstance(given, list) and given:
        if all(type(t) is int for t in given):
            return (given,)
        if all(isinstance(p, str) for p in given):
            return tuple(given)
        if all(isinstance(p, list) and all(type(t) is int for t in p) for p in given):
            return tuple(given)
    raise _wrong(name, "a text, a list of texts, tokens, or a list of lists of tokens", given)


@dataclass(frozen=True)
class Chat:
    """A body of /v1/chat/completions."""

    messages: tuple[dict[str, str], ...]
    how: Generation

    @classmethod
    def of(cls, body: bytes) -> Chat:
        """What a body says.

        Raises:
            ApiError: a field that is none, or out of range.
        """
        fields = Fields(body)
        messages = fields.get("messages")
        if not isinstance(messages, list) or not messages:
            raise _wrong("messages", 'a list of {"role", "content"}', messages)
        top = fields.whole("top_logprobs", 0, MOST_TOP)
        if not fields.flag("logprobs"):
            if top:
                raise ApiError("top_logprobs is for logprobs=true", 400, "top_logprobs")
        else:
            top = top or 0
        asked = fields.flag("logprobs")
        tokens = [fields.whole(n, 1, 1 << 30) for n in ("max_completion_tokens", "max_tokens")]
        max_new = next((t for t in tokens if t is not None), None)
        how = Generation.of(fields, top if asked else None, max_new)
        fields.rest()
        return cls(tuple(_message(i, m) for i, m in enumerate(messages)), how)

    @property
    def said(self) -> str:
        """What the user said last."""
        users = [m["content"] for m in self.messages if m["role"] == "user"]
        return users[-1] if users else self.messages[-1]["content"]


def _message(i: int, given: Any) -> dict[str, str]:
    name = f"messages[{i}]"
    if not isinstance(given, dict) or given.get("role") not in _ROLES:
        raise _wrong(name, f"an object with a role: {', '.join(_ROLES)}", given)
    for key, value in given.items():
        if value and key not in ("role", "content", *_BESIDE):
            raise ApiError(f"{name}: {one_line(key)} is not done here", 400, "messages")
    content = given.get("content")
    if isinstance(content, list):
        parts = [p for p in content if isinstance(p, dict) and p.get("type") == "text"]
        texts = [p.get("text") for p in parts]
        if len(parts) < len(content) or not all(isinstance(t, str) for t in texts):
            raise ApiError(
                f"{name}: content of other kinds than text is not read here", 400, "messages"
            )
        content = "".join(str(t) for t in texts)
    if not isinstance(content, str):
        raise _wrong(f"{name}.content", "a text", content)
    return {"role": given["role"], "content": content}


@dataclass(frozen=True)
class Embedding:
    """A body of /v1/embeddings."""

    asked: Asked
    inputs: tuple[str | list[int], ...]
    base64: bool
    dimensions: int | None

    @classmethod
    def of(cls, body: bytes) -> Embedding:
        """What a body says.

        Raises:
            ApiError: a field that is none, or out of range.
        """
        fields = Fields(body)
        inputs = _prompts("input", fields.get("input"))
        if len(inputs) > _MOST_INPUTS:
            raise ApiError(f"at most {_MOST_INPUTS} inputs in one request", 400, "input")
        kind = fields.text("encoding_format") or "float"
        if kind not in ("float", "base64"):
            raise _wrong("encoding_format", "float or base64", kind)
        dimensions = fields.whole("dimensions", 1, 1 << 20)
        found = cls(Asked.of(fields), inputs, kind == "base64", dimensions)
        fields.rest()
        return found


@dataclass(frozen=True)
class Loading:
    """A body of the routes that load and unload adapters."""

    name: str
    path: str | None

    @classmethod
    def of(cls, body: bytes, needed: Collection[str]) -> Loading:
        """What a body says.

        Args:
            needed: the fields that must be there.
        """
        fields = Fields(body)
        found = {name: fields.text(name) for name in ("lora_name", "lora_path")}
        fields.get("lora_int_id")
        fields.get("base_model_name")
        fields.rest()
        for name in needed:
            if not found[name]:
                said = " and ".join(f"'{n}'" for n in needed)
                raise ApiError(f"{said} must be given, as texts", 400, name)
        return cls(str(found["lora_name"]), found["lora_path"])


def _wrong(name: str, expected: str, found: Any) -> ApiError:
    field = name.partition("[")[0]
    return ApiError(f"{name} must be {expected}, not {one_line(found)}", 400, field)


def _kind(value: Any) -> str:
    kinds: Sequence[tuple[type, str]] = ((list, "a list"), (str, "a text"), (bool, "a boolean"))
    return next((text for kind, text in kinds if isinstance(value, kind)), "a number or null")


def _with_whole_letters(found: Any) -> Any:
    """The same with '?' for half a surrogate, which no answer could name."""
    text = json.dumps(found, ensure_ascii=False)
    written = text.encode("utf-8", "replace")
    return found if written.decode() == text else json.loads(written)


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")
