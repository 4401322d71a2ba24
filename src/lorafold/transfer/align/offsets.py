"""Which token of one tokenizer is which of another: those that end at the same character.

Where a token ends, a causal model has read the text up to there, whatever pieces it came in; so two
tokens that end at the same character stand for the same reading. Tokens that end where the other
side has none (the inside of a longer piece) have no partner, nor have special tokens, which cover
no text. Of several that end at one character (bytes of one sign), the last is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import MismatchError
from ...words import one_line

Tokenize = Callable[[str], tuple[list[int], list[int]]]  # a text: ids, and where each token ends


def as_bytes(text: str) -> tuple[list[int], list[int]]:
    """A text's UTF-8 bytes, for models whose tokens are bytes, and where each one's sign ends."""
    ids: list[int] = []
    ends: list[int] = []
    for k, sign in enumerate(text, 1):
        coded = sign.encode("utf-8", "surrogatepass")
        ids += coded
        ends += [k] * len(coded)
    return ids, ends


def tokenize_of(tokenizer: Any, side: str) -> Tokenize:
    """What turns texts into ids with their ends.

    Args:
        tokenizer: "bytes", a fast tokenizer of transformers, or a function from a text to (ids,
            ends). side: "source" or "target", for messages.

    Raises:
        MismatchError: anything else, or a tokenizer that can't tell where its tokens lie.
    """
    if tokenizer == "bytes":
        return as_bytes
    if getattr(tokenizer, "is_fast", None) is False:
        raise MismatchError(
            f"the {side}'s tokenizer is a slow one, which can't say where its tokens lie: give the "
            "fast one of the same model in tokenizers=(source, target)"
        )
    if hasattr(tokenizer, "is_fast"):

        def tokenize(text: str) -> tuple[list[int], list[int]]:
            found = tokenizer(text, return_offsets_mapping=True, verbose=False)
            # A special token ends at 0; one of blanks alone may seem empty, at its end.
            ends = [end for _, end in found["offset_mapping"]]
            return list(found["input_ids"]), ends

        return tokenize
    if callable(tokenizer):
        return lambda text: _checked(tokenizer(text), side)
    raise MismatchError(
        f"the {side}'s tokenizer must be a fast one of transformers, 'bytes', or a function from a "
        f"text to (ids, ends), found {one_line(tokenizer)}"
    )


def _checked(found: Any, side: str) -> tuple[list[int], list[int]]:
    pair = isinstance(found, Sequence) and len(found) == 2
    if not pair or len(found[0]) != len(found[1]):
        raise MismatchError(
            f"the {side}'s tokenizer must give (ids, ends) of one length, found {one_line(found)}"
        )
    return list(map(int, found[0])), list(map(int, found[1]))


def paired(source: Sequence[int], target: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Positions (n,), (n,) of the tokens that end at the same character.

    Args:
        source, target: where each token ends; 0 for one that covers no text.
    """
    at_s = {end: k for k, end in enumerate(source) if end > 0}
    at_t = {end: k for k, end in enumerate(target) if end > 0}
    both = [end for end in at_s if end in at_t]
    return torch.tensor([at_s[e] for e in both]), torch.tensor([at_t[e] for e in both])


def two(tokenizers: Any) -> tuple[Any, Any]:
    """(of the source, of the target) from one for both, or two.

    Raises:
        MismatchError: another number of them.
    """
    if not isinstance(tokenizers, tuple | list):
        return tokenizers, tokenizers
    if len(tokenizers) != 2:
        raise MismatchError(f"tokenizers must be one, or (source, target); found {len(tokenizers)}")
    return tokenizers[0], tokenizers[1]
