"""`align`: texts through both bases, and what their linear maps see and give, side by side.

A text is cut into the tokens of either base; two tokens that end at the same character are a pair
(`offsets.py`). For each pair of maps of one role (`depth.py` pairs the layers) the sums of
`covariances.py` are taken over all pairs of tokens, of the input and of the output; the activations
of one batch are all that is held at a time. Every fifth text is kept for judging.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor

from ...collection.limits import memory_bytes, torch_device
from ...errors import MismatchError
from ...layers.modes import evaluating
from ...roles import Role
from ...words import one_of
from ..alignment import Alignment, Join
from .bases import Base, base_of
from .batches import Batch, batches_of
from .heads import with_heads
from .offsets import two
from .pairing import joined, layers_of
from .recording import readers
from .summing import Progress, Runner, Sum, check_memory, summed, sums_of
from .tokens import token_sums

Output: TypeAlias = Literal["activations", "gradients"]
OUTPUTS = get_args(Output)


def align(
    source: Any,
    target: Any,
    texts: Sequence[Any],
    *,
    tokenizers: Any = None,
    layers: Any = "proportional",
    output: Output = "activations",
    modules: Sequence[str] | None = None,
    roles: Any = (),
    tokens: bool = True,
    context: int | None = None,
    memory: str | int = "8GiB",
    device: Any = None,
    resume: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Alignment:
    """Find out how the linear maps of one base correspond to those of another.

    Args:
        source, target: models of transformers, or folders of them; neither is changed.
        texts: strings; or (length,) tensors of ids where both bases have the same tokens.
        tokenizers: (of the source, of the target), each a fast tokenizer of transformers or its
            folder, "bytes", or a function from a text to (ids, character at which each token ends);
            one for both where one is given; by default the folders' own.
        layers: "proportional" (by the share of the depth), "cka" (the most alike, never going
            back), or {stack: [the source's layer for each of the target's]}.
        output: what outputs are aligned by: "activations", or "gradients" of the loss of the texts'
            own next tokens with respect to them.
        modules: kinds of role ("attention.query") or words of them ("mlp") to take; all when None.
        roles: {end of a module's path: kind}, for layers that lorafold does not know.
        tokens: whether the tokens that both vocabularies have join the first layer's inputs.
        context: tokens of a text at most; by default what both bases take.
        memory: what the sums may take, 8 · 2 · Σ (d_s² + d_t² + d_s d_t) bytes over their sites;
            beside them lie the activations of one batch.
        device: of bases that are read from folders.
        resume: a file that the state is written to once a minute, and that an interrupted run goes
            on from.
        progress: called with batches done, all batches, and what is done.

    Returns:
        An `Alignment`.

    Raises:
        MismatchError: no tokens that end together, no roles or none in common, sums that are too
            large, activations that are NaN or infinite (the module named), options that are none.
        FileError: a folder that is no base, a file that is no state of this run.
        MissingExtraError: folders without transformers; heads to pair without scipy.

    Not for: moving an adapter, which `lf.transfer` does with what this returns.

    Source: orthogonal Procrustes: Schönemann, A generalized solution of the orthogonal Procrustes
    problem (1966).

    Examples:
        >>> import lorafold as lf
        >>> lf.align("folder-s", "folder-t", [])
        Traceback (most recent call last):
        lorafold.errors.MismatchError: there are no texts to align on
    """
    texts = _checked(texts, output)
    tokenizer_s, tokenizer_t = two(tokenizers)
    where = torch_device(device)
    s = base_of(source, "source", tokenizer_s, roles, where)
    t = base_of(target, "target", tokenizer_t, roles, where)
    batches = batches_of(s, t, texts, context)
    with ExitStack() as stack:
        for base in (s, t):
            stack.enter_context(evaluating(base.model))
        chosen = layers_of(layers, s, t, batches)
        start, sums = _started(s, t, batches[0], chosen, modules)
        settings = {"run": _digest(texts, layers, modules, context)}
        start = replace(start, texts=len(texts), output=output, settings=settings)
        runner = Runner((s, t), sums, output == "gradients")
        check_memory(runner, batches, memory_bytes(memory))
        found = summed(start, runner, batches, resume, progress)
        if tokens:
            found = token_sums(found, runner)
    return with_heads(found)


def _checked(texts: Any, output: str) -> list[Any]:
    if isinstance(texts, str):
        raise MismatchError("texts is a list of texts, found one string: give [text]")
    found = list(texts)
    if not found:
        raise MismatchError("there are no texts to align on")
    if output not in OUTPUTS:
        raise MismatchError(f"output must be {one_of(OUTPUTS)}, found {output!r}")
    return found


def _started(
    s: Base,
    t: Base,
    batch: Batch,
    layers: Mapping[str, tuple[int, ...]],
    modules: Sequence[str] | None,
) -> tuple[Alignment, list[Sum]]:
    """What is paired, before anything is summed; and the sums that it takes."""
    pairs, unpaired = joined(s, t, layers, modules)
    joins = {r: Join(s.parts[o], t.parts[r], "", "", shared=n) for r, (o, n) in pairs.items()}
    sums, joins = sums_of(joins, (_sharing(s, joins, 0, batch), _sharing(t, joins, 1, batch)))
    return Alignment(joins, {}, {}, (s.digest, t.digest), layers, 0, unpaired=unpaired), sums


def _sharing(base: Base, joins: dict[Role, Join], side: int, batch: Batch) -> dict[str, str]:
    """Which modules of a base read one tensor."""
    paths = dict.fromkeys((j.source, j.target)[side].path for j in joins.values())
    ids = (batch.source, batch.target)[side].ids[:1].to(base.device)
    return readers(base.model, paths, ids)


def _digest(texts: Sequence[Any], *options: Any) -> str:
    """SHA-256 of what a run is of."""
    found = hashlib.sha256(repr(options).encode())
    for text in texts:
        plain = text.tolist() if isinstance(text, Tensor) else text
        found.update(json.dumps(plain).encode())
    return found.hexdigest()
