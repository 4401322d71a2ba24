"""Texts to tokens and back, piece by piece: no letter is shown before all of it is there.

Where tokens are bytes, or runs of them, their bytes go through a decoder that waits for the rest of
a letter. Other tokenizers say what a token adds to those before it; text that ends in a letter that
isn't whole is held back, for as many tokens as a letter has bytes.
"""

from __future__ import annotations

import codecs
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import MismatchError

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_HELD = 4  # bytes of a letter, and tokens at most
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _printed() -> dict[str, int]:
    """{the letter that stands for it in vocabularies of byte pairs: a byte}."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [b for b in range(256) if b not in own]
    return {chr(b): b for b in own} | {chr(256 + i): b for i, b in enumerate(other)}


_PRINTED = _printed()


class Words:
    """How a base reads and writes.

    Args:
        tokenizer: of transformers; None where tokens are bytes.
        ends: tokens that end an answer. template: a chat template instead of the tokenizer's.
    """

    def __init__(
        self, tokenizer: Any, ends: Iterable[int] = (), template: str | None = None
    ) -> None:
        self._tokenizer, self.ends = tokenizer, frozenset(ends)
        self._template = template or getattr(tokenizer, "chat_template", None)
        self._lock = threading.Lock()  # tokenizers set themselves up for each call
        decoder = None if tokenizer is None else getattr(tokenizer, "backend_tokenizer", None)
        self._paired = type(getattr(decoder, "decoder", None)).__name__ == "ByteLevel"
        special = () if tokenizer is None else tokenizer.all_special_ids
        self._special = frozenset(special)
        self._added = {} if tokenizer is None else dict(tokenizer.added_tokens_decoder)

    @property
    def exact(self) -> bool:
        """Whether every token is bytes, whatever stands before it."""
        return self._tokenizer is None or self._paired

    def tokens(self, text: str, special: bool = True) -> list[int]:
        """A text's tokens.

        Args:
            special: with those that the base's texts begin and end with.
        """
        whole = text.encode("utf-8", "replace")  # half a surrogate is no letter
        if self._tokenizer is None:
            return list(whole)
        with self._lock:
            found: list[int] = self._tokenizer(whole.decode(), add_special_tokens=special)[
                "input_ids"
            ]
        return found

    def chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], frozenset[int]]:
        """The tokens of a chat up to where the assistant speaks, and those that end its turn.

        Raises:
            MismatchError: the template does not take these messages.
        """
        if self._template is None:
            text, ends = self._plain_chat(messages)
            return self.tokens(text, special=False), ends
        try:
            with self._lock:
                text = self._tokenizer.apply_chat_template(
                    [dict(m) for m in messages],
                    chat_template=self._template,
                    add_generation_prompt=True,
                    tokenize=False,
                )
        except Exception as e:
            said = str(e).strip().splitlines() or [type(e).__name__]
            raise MismatchError(f"the chat template does not take these messages: {said[0]}") from e
        return self.tokens(text, special=False), self.ends

    @property
    def lined(self) -> bool:
        """Whether a line's end is a turn's end: there is neither a template nor an end."""
        own = self._template or getattr(self._tokenizer, "eos_token", None)
        return own is None and not self.ends

    def _plain_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, frozenset[int]]:
        """As `lorafold train` writes chats for bases without a template.

        A turn ends with the base's own end, or with the line where it has none.
        """
        end = getattr(self._tokenizer, "eos_token", None)
        ends = self.ends | frozenset(self.tokens("\n", special=False)) if self.lined else self.ends
        turns = (f"<|{m['role']}|>\n{m['content']}{end or chr(10)}" for m in messages)
        return "".join(turns) + "<|assistant|>\n", ends

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for; of special ones, how they are written."""
        if self._tokenizer is None:
            return bytes([token]) if token < 256 else b""
        if token in self._added:
            return str(self._added[token]).encode()
        written = self._tokenizer.convert_ids_to_tokens(token)
        if written is None:
            return b""
        if self._paired:
            return bytes(_PRINTED.get(c, 0) for c in written)
        if (found := _BYTE.fullmatch(written)) is not None:
            return bytes([int(found[1], 16)])
        return str(written).replace("▁", " ").encode()

    def shown(self, token: int) -> str:
        """A token as it is named in answers; where it is no whole letters, its bytes."""
        own = self.bytes_of(token)
        try:
            return own.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in own)

    def reader(self) -> Reader:
        """What turns the tokens of one answer into text as they come."""
        return BytesReader(self) if self.exact else TextReader(self)

    def is_special(self, token: int) -> bool:
        """Whether a token is no text."""
        return token in self._special

    def written(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        with self._lock:
            found: str = self._tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        return found


class BytesReader:
    """Of tokens that are bytes."""

    def __init__(self, words: Words) -> None:
        self._words = words
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def read(self, token: int) -> str:
        """What can be shown once this token has come."""
        if self._words.is_special(token):
            return ""
        return self._decoder.decode(self._words.bytes_of(token))

    def rest(self) -> str:
        """What was held back, now that nothing follows."""
        return self._decoder.decode(b"", True)


class TextReader:
    """Of tokens that say what they add to those before."""

    def __init__(self, words: Words) -> None:
        self._words = words
        self._ids: list[int] = []
        self._shown = 0  # tokens whose text was shown

    def read(self, token: int) -> str:
        """What can be shown once this token has come."""
        self._ids.append(token)
        more = self._more()
        if more.endswith(_UNKNOWN) and len(self._ids) - self._shown <= _HELD:
            return ""
        # As few as what follows must be read with.
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return more

    def rest(self) -> str:
        """What was held back, now that nothing follows."""
        return self._more()

    def _more(self) -> str:
        before, now = (self._words.written(ids) for ids in (self._ids[: self._shown], self._ids))
        return now[len(before) :]


Reader = BytesReader | TextReader


class Stops:
    """Finds where an answer is to stop, though the words for that may come in pieces.

    Args:
        stops: texts, none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = stops, ""
        self._keep = max((len(s) for s in stops), default=1) - 1

    def read(self, text: str) -> tuple[str, bool]:
        """(what can be shown once this text has come, whether it stops there)."""
        self._held += text
        at = [i for s in self._stops if (i := self._held.find(s)) >= 0]
        if at:
            shown, self._held = self._held[: min(at)], ""
            return shown, True
        keep = self._beginning()
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def rest(self) -> str:
        """What was held back, now that nothing follows."""
        shown, self._held = self._held, ""
        return shown

    def _beginning(self) -> int:
        """Letters at the end that a stop may begin with."""
        for n in range(min(self._keep, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-n:]) for s in self._stops):
                return n
        return 0


def read_words(folder: Path, model: Any, transformers: Any, template: str | None = None) -> Words:
    """The tokenizer in a base's folder; bytes where there is none and 256 tokens.

    Raises:
        MismatchError: there is none that transformers can read.
    """
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if vocabulary == 256 and not any((folder / f).exists() for f in files):
        return Words(None, _ends(model, None), template)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # a damaged file can raise anything
        raise MismatchError(f"{folder}: there is no tokenizer that transformers can read") from e
    return Words(tokenizer, _ends(model, tokenizer), template)


def _ends(model: Any, tokenizer: Any) -> set[int]:
    found: set[int] = set()
    for owner in (getattr(model, "generation_config", None), model.config, tokenizer):
        own = getattr(owner, "eos_token_id", None)
        found.update(own if isinstance(own, list | tuple) else () if own is None else (own,))
    return found
