"""`vocabulary`: without texts, by the embeddings of tokens that both vocabularies have.

The residual stream of one base is mapped to the other's by the orthogonal R that turns the shared
tokens' embeddings E_s into E_t (Procrustes). What lies within a layer (heads, hidden units) is then
mapped by how its weights read from that stream and write into it: as if W_s R and W_t were
activations. Rows of unlike norms, a tokenizer of other pieces, and layers that changed their stream
on the way are why this is far from what texts give; gains of norms are not looked at.

Never by index of singular vectors: those have no sign of their own and no order but their size's,
so U_t U_sᵀ of two bases is as good as random even where one is a rotation of the other.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...errors import MismatchError
from ...layers.kinds import kind_of
from ...roles import Role
from ..align.bases import Base, Part, digest_of
from ..align.covariances import Moments, moments_of
from ..align.heads import with_heads
from ..align.pairing import joined, layers_of
from ..align.tokens import shared_tokens
from ..alignment import Alignment, Join
from ..job import Job, Moved
from .aligned import turned
from .maps import procrustes
from .running import both_bases

_LEAST = 16  # tokens in common
_WRITE = ("output", "down")  # what gives to the residual stream; the others read from it
_STREAM = "residual"


def vocabulary(job: Job) -> Moved:
    """The update in the target's coordinates, as far as its vocabulary tells."""
    with both_bases(job) as (source, target):
        alignment = alignment_of_weights(source, target)
    options = {"centre": False, "whiten": 0.0, "threshold": None, **job.options}
    moved = turned(replace(job, options=options), alignment)
    tokens = alignment.fitted[_STREAM].count
    return replace(moved, said={**moved.said, "tokens": tokens, "texts": 0})


@torch.no_grad()
def alignment_of_weights(source: Base, target: Base) -> Alignment:
    """An alignment whose sums are of embeddings and weights.

    Raises:
        MismatchError: hardly a token in common.
    """
    of_s, of_t = shared_tokens(source, target)
    if len(of_s) < _LEAST:
        raise MismatchError(
            f"the vocabularies have {len(of_s)} tokens in common, too few to align by; give the "
            "tokenizers of these bases in tokenizers=, or texts= and another method"
        )
    stream = moments_of(_embedding(source)[of_s], _embedding(target)[of_t])
    R = procrustes(stream, None, 0.0).forward
    layers = layers_of("proportional", source, target, ())
    pairs, unpaired = joined(source, target, layers, None)
    sums: dict[str, Moments] = {_STREAM: stream}
    joins = {}
    for role, (other, shared) in pairs.items():
        s, t = source.parts[other], target.parts[role]
        W_s, W_t = _weight(source, s), _weight(target, t)
        name = str(role)
        if role.kind.rpartition(".")[2] in _WRITE:
            sums[name] = moments_of(R.T @ W_s, W_t)  # rows: the stream; columns: the inner side
            joins[role] = Join(s, t, name, _STREAM, shared=shared)
        else:
            sums[name] = moments_of((W_s @ R).T, W_t.T)
            joins[role] = Join(s, t, _STREAM, name, shared=shared)
    digests = str(digest_of(source.model)), str(digest_of(target.model))
    found = Alignment(joins, sums, {}, digests, layers, unpaired=unpaired)
    return with_heads(found)


def _embedding(base: Base) -> Tensor:
    found: Tensor = base.model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    return found.double()


def _weight(base: Base, part: Part) -> Tensor:
    """(out, in), float64, whatever it is stored as."""
    module = base.model.get_submodule(part.path)
    W = kind_of(module, part.path).matrix(module, part.path).detach().double()
    rows = part.rows(len(W))
    return W if rows is None else W[rows.to(W.device)]


def reads_stream(role: Role) -> bool:
    """Whether its input is the residual stream."""
    return role.kind.rpartition(".")[2] not in _WRITE
