"""From inputs to vectors: any callable from texts to vectors is an encoder.

A text names one instead: "ngrams", which is here and needs nothing, or a model of
sentence-transformers, by its name or folder. Only an encoder that was named can be saved with a
router.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..errors import MismatchError, MissingExtraError
from ..files.hub import unreachable
from ..words import one_line

Encoder: TypeAlias = Callable[[list[str]], Any]

NGRAMS = "ngrams"
_WIDTH = 2048  # numbers of a vector; a power of two
_SIZES = (1, 2, 3)  # bytes of a gram
_AT_ONCE = 1 << 22  # bytes of texts
_EACH = 4096  # bytes that a text counts for beside its own: its row of counts


def ngrams(texts: Sequence[str]) -> Tensor:
    """Vectors of which runs of one, two and three bytes occur in texts.

    It sees how a text is written and not what it means: fit for formats, languages and notations,
    and for trying things without a model.

    Args:
        texts: any number.

    Returns:
        (B, 2048) float32 of length 1; zero for an empty text.

    Not for: telling topics apart, which a sentence encoder does.

    Examples:
        >>> v = ngrams(["SELECT a FROM b", "SELECT c FROM d", "-.. --- ..."])
        >>> bool(v[0] @ v[1] > 0.5), bool(v[0] @ v[2] < 0.3)
        (True, True)
    """
    if isinstance(texts, str):
        raise MismatchError("texts are a list, found one text: give [text]")
    ends = itertools.accumulate(len(text) + _EACH for text in texts)
    blocks = itertools.groupby(zip(ends, texts, strict=True), lambda pair: pair[0] // _AT_ONCE)
    parts = [_counted([text for _, text in block]) for _, block in blocks]
    counts = torch.cat(parts) if parts else torch.zeros(0, _WIDTH, dtype=torch.float32)
    return torch.nn.functional.normalize(counts.sqrt(), dim=1)


def _counted(texts: Sequence[str]) -> Tensor:
    """How often each gram occurs, (B, width)."""
    coded = [t.encode("utf-8", "surrogatepass") for t in texts]
    rows = np.repeat(np.arange(len(coded)), [len(c) for c in coded])
    codes = np.frombuffer(b"".join(coded), dtype=np.uint8).astype(np.uint64)
    total = np.zeros(len(coded) * _WIDTH, dtype=np.int64)
    gram = np.zeros_like(codes)
    for size in _SIZES:
        if size > len(codes):
            break
        end = len(codes) - size + 1
        gram = gram[:end] * np.uint64(256) + codes[size - 1 :]
        own = rows[:end] == rows[size - 1 :]  # it begins and ends in one text
        mixed = (gram[own] + np.uint64(size << 32)) * np.uint64(0x9E3779B97F4A7C15)
        place = (mixed >> np.uint64(64 - _WIDTH.bit_length() + 1)).astype(np.int64)
        total += np.bincount(rows[:end][own] * _WIDTH + place, minlength=len(total))
    return torch.from_numpy(total.reshape(len(coded), _WIDTH)).float()


def encoder_of(encoder: Any) -> tuple[Encoder | None, str | None]:
    """The encoder that is given or named, and its name.

    Raises:
        MismatchError: neither a callable nor a name.
        MissingExtraError: it takes sentence-transformers, which is not there.
    """
    if encoder is None:
        return None, None
    if isinstance(encoder, str):
        return (ngrams if encoder == NGRAMS else _sentences(encoder)), encoder
    if not callable(encoder):
        raise MismatchError(
            "encoder must be a function from texts to vectors, or the name of one, found "
            f"{one_line(encoder)}"
        )
    return encoder, None


@functools.lru_cache(maxsize=2)
def _sentences(name: str) -> Encoder:
    """A model of sentence-transformers, loaded when it is used first."""
    loaded: list[Any] = []

    def encode(texts: list[str]) -> Any:
        if not loaded:
            loaded.append(_model(name))
        return loaded[0].encode(texts, convert_to_tensor=True, show_progress_bar=False)

    return encode


def _model(name: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise MissingExtraError(
            f"the encoder {name!r} takes sentence-transformers: pip install 'lorafold[route]', or "
            f"give {NGRAMS!r} for encoder="
        ) from None
    try:
        try:
            return SentenceTransformer(name, local_files_only=True)
        except (OSError, ValueError):
            # Of a Hub that is out of reach it would ask eighteen times, for over a minute.
            repository = name if "/" in name else f"sentence-transformers/{name}"
            if os.path.exists(name) or unreachable(repository, "modules.json") is not None:
                raise
        return SentenceTransformer(name)
    except (OSError, ValueError) as e:
        text = str(e).strip().splitlines() or [type(e).__name__]
        raise MismatchError(
            f"encoder {name!r} can't be loaded: {text[0]} (give a model's folder, or {NGRAMS!r})"
        ) from e


def plain(batch: Any) -> Any:
    """A batch as a list, or as vectors in a dense tensor or array; None where it is neither.

    Sets have no order and mappings are something else; a sparse matrix is what many encoders give.
    """
    if isinstance(batch, Tensor):
        batch = batch if batch.layout == torch.strided else batch.to_dense()
    elif hasattr(batch, "toarray"):
        batch = batch.toarray()
    elif hasattr(batch, "__array__"):
        batch = np.asarray(batch)
    if isinstance(batch, np.ndarray) and batch.dtype.kind in "OSTU":
        return batch.tolist()  # texts, for one
    if isinstance(batch, Tensor | np.ndarray):
        return batch if batch.ndim else None
    listed = isinstance(batch, Iterable) and not isinstance(batch, str | bytes | Mapping | Set)
    return list(batch) if listed else None


def check_width(x: Any, width: int) -> None:
    """Check that something is vectors (…, width).

    Raises:
        MismatchError: it is not.
    """
    if not isinstance(x, Tensor) or not x.ndim:
        raise MismatchError(f"vectors are a tensor (B, D), found {one_line(x)}")
    if x.shape[-1] != width:
        raise MismatchError(f"vectors have {x.shape[-1]} numbers where the router has {width}")


def vectors_of(
    batch: Any,
    encoder: Encoder | None,
    width: int | None = None,
    owners: Sequence[Any] | None = None,
) -> Tensor:
    """The vectors (B, D) of a batch of texts, or the ones that it already is; float32 at least.

    Args:
        batch: texts, or vectors in whatever form. width: D, where it is known.
        owners: the name that each is an example of, where that is known.

    Raises:
        MismatchError: texts without an encoder, a vector that is not finite (naming which), or of
            another length.
    """
    if isinstance(batch, str):
        raise MismatchError("a batch is a list of texts, found one text: give [text]")
    given, batch = batch, plain(batch)
    if batch is None:
        raise MismatchError(f"a batch is a list of texts or vectors, found {one_line(given)}")
    if isinstance(batch, list):
        texts = [isinstance(item, str) for item in batch]
        if batch and all(texts):
            batch = _encoded(batch, encoder)
        elif any(texts):
            raise MismatchError("a batch is either texts or vectors, not some of each")
    x = _tensor(batch)
    if x.ndim == 1 and not x.numel():
        x = x.reshape(0, width or 0)
    if x.ndim != 2 or x.is_complex():
        raise MismatchError(f"a batch of vectors is (B, D), found {tuple(x.shape)} {x.dtype}")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if width is not None:
        check_width(x, width)
    bad = ~x.detach().isfinite().all(1)
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        whose = "" if owners is None else f" (an example of {owners[i]!r})"
        raise MismatchError(f"vector {i} of the batch is not finite{whose}")
    return x


def _encoded(texts: list[str], encoder: Encoder | None) -> Tensor:
    if encoder is None:
        raise MismatchError("texts need an encoder: give encoder=, or give vectors instead")
    x = _tensor(encoder(texts))
    if x.ndim != 2 or len(x) != len(texts):
        raise MismatchError(
            f"the encoder gave {tuple(x.shape)} for {len(texts)} texts; (B, D) was expected"
        )
    return x.detach().clone()  # some encoders give inference tensors, which nothing can train on


def _tensor(x: Any) -> Tensor:
    found = plain(x)
    x = x if found is None else found
    if isinstance(x, Tensor):
        return x
    if isinstance(x, Sequence) and x and all(isinstance(item, Tensor) for item in x):
        if len({item.shape for item in x}) > 1:
            raise MismatchError("the vectors of a batch differ in length")
        return torch.stack(list(x))
    try:
        return torch.as_tensor(np.asarray(x, dtype=None if isinstance(x, np.ndarray) else float))
    except (TypeError, ValueError) as e:
        raise MismatchError(f"a batch is texts or vectors of one length: {e}") from e


def unit(x: Tensor) -> Tensor:
    """Rows of length 1, whatever their size was; zero rows stay."""
    largest = x.abs().amax(1, keepdim=True) if x.numel() else x.new_zeros(len(x), 1)
    x = x / torch.where(largest > 0, largest, 1.0)
    length = x.norm(dim=1, keepdim=True)
    return x / torch.where(length > 0, length, 1.0)
