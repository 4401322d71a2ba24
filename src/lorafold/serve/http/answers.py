"""Answers as the protocol has them: whole ones, and pieces of a stream."""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..engine import Piece
from ..words import Words
from .answering import Chunk

Tokens = Sequence[tuple[Piece, int]]


@dataclass(frozen=True)
class Kind:
    """One of the two kinds of answers.

    Args:
        prefix: of its ids. whole, part: what an answer and a piece of one call themselves.
    """

    prefix: str
    whole: str
    part: str

    @property
    def chat(self) -> bool:
        """Whether it is a chat."""
        return self is CHAT


COMPLETION = Kind("cmpl", "text_completion", "text_completion")
CHAT = Kind("chatcmpl", "chat.completion", "chat.completion.chunk")


@dataclass(frozen=True)
class Head:
    """What every piece of one answer says.

    Args:
        kind: of the answer. id: its own. created: when, in seconds. model: what has answered.
    """

    kind: Kind
    id: str
    created: int
    model: str

    def whole(self, choices: list[dict[str, Any]], usage: Mapping[str, int]) -> dict[str, Any]:
        """A whole answer."""
        return {**self._said(self.kind.whole), "choices": choices, "usage": dict(usage)}

    def part(self, choices: list[dict[str, Any]], usage: Any = None) -> dict[str, Any]:
        """A piece of one."""
        found = {**self._said(self.kind.part), "choices": choices}
        return found if usage is None else {**found, "usage": usage}

    def _said(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{self.kind.prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
        }


def usage_of(prompt: int, answer: int) -> dict[str, int]:
    """How many tokens there were."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
    }


def whole_choice(
    kind: Kind, index: int, text: str, reason: str, tokens: Tokens | None, words: Words
) -> dict[str, Any]:
    """One choice of a whole answer.

    Args:
        tokens: where log-probabilities were asked for.
    """
    found: dict[str, Any] = {"index": index, "finish_reason": reason}
    if kind.chat:
        found["message"] = {"role": "assistant", "content": text, "refusal": None}
    else:
        found["text"] = text
    found["logprobs"] = None if tokens is None else _logprobs(kind, tokens, words)
    return found


def part_choice(
    kind: Kind, chunk: Chunk, first: bool, words: Words, logprobs: bool
) -> dict[str, Any]:
    """One choice of a piece.

    Args:
        first: whether nothing of this answer was sent before.
    """
    found: dict[str, Any] = {"index": chunk.index, "finish_reason": chunk.reason}
    if kind.chat:
        role = {"role": "assistant"} if first else {}
        found["delta"] = {**role, "content": chunk.text}
    else:
        found["text"] = chunk.text
    tokens = chunk.tokens if logprobs and chunk.tokens else None
    found["logprobs"] = None if tokens is None else _logprobs(kind, tokens, words)
    return found


def _logprobs(kind: Kind, tokens: Tokens, words: Words) -> dict[str, Any]:
    if kind.chat:
        content = [
            {
                **_named(words, piece.token, piece.logprob),
                "top_logprobs": [_named(words, t, p) for t, p in piece.top],
            }
            for piece, _ in tokens
        ]
        return {"content": content, "refusal": None}
    return {
        "tokens": [words.shown(_token(piece.token)) for piece, _ in tokens],
        "token_logprobs": [piece.logprob for piece, _ in tokens],
        "top_logprobs": [{words.shown(t): p for t, p in piece.top} for piece, _ in tokens],
        "text_offset": [at for _, at in tokens],
    }


def _named(words: Words, token: int | None, logprob: float | None) -> dict[str, Any]:
    own = words.bytes_of(_token(token))
    return {"token": words.shown(_token(token)), "logprob": logprob, "bytes": list(own)}


def _token(token: int | None) -> int:
    assert token is not None
    return token


def embedded(vector: Sequence[float], index: int, coded: bool) -> dict[str, Any]:
    """One vector of an answer."""
    found: Any = list(vector)
    if coded:
        found = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return {"object": "embedding", "index": index, "embedding": found}


def card(name: str, created: int, parent: str | None, length: int) -> dict[str, Any]:
    """One model of the list."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "lorafold",
        "parent": parent,
        "max_model_len": length,
    }
