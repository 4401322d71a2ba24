"""What the methods that run both bases share: the bases, the texts, where each module goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from ...errors import MismatchError
from ...layers.modes import evaluating
from ..align.bases import Base, base_of, shape_of
from ..align.batches import Batch, batches_of
from ..align.offsets import two
from ..align.pairing import joined, layers_of
from ..job import Job
from .pair import misfit, refuse, strangers


@dataclass(frozen=True, eq=False)
class Goals:
    """Where the adapter's modules go.

    Args:
        ranks: {path in the target: rank}. sources: {path in the target: paths in the source}.
        without: {path in the source: why it has no counterpart}.
    """

    ranks: Mapping[str, int]
    sources: Mapping[str, tuple[str, ...]]
    without: Mapping[str, str]


@contextmanager
def both_bases(job: Job) -> Iterator[tuple[Base, Base]]:
    """The two bases, in evaluation mode for as long.

    Raises:
        MismatchError: one is not there.
    """
    for side, given in (("source", job.source), ("target", job.target)):
        if given is None:
            raise MismatchError(
                f"this method runs both bases: give the {side}, not only alignment="
            )
    tokenizers, tables = two(job.options["tokenizers"]), job.options["roles"]
    source = base_of(job.source, "source", tokenizers[0], tables, None)
    target = base_of(job.target, "target", tokenizers[1], tables, None)
    with evaluating(source.model), evaluating(target.model):
        yield source, target


def texts_of(job: Job, source: Base, target: Base, at_once: int | None = None) -> list[Batch]:
    """The job's texts as batches of both bases, of so many tokens.

    Raises:
        MismatchError: there are none.
    """
    if not job.texts:
        raise MismatchError("this method runs texts through both bases: give texts=")
    return batches_of(source, target, job.texts, None, at_once=at_once)


def goals(job: Job, source: Base, target: Base) -> Goals:
    """Where the modules go, by role and layer for layer; ranks add where several go to one.

    Raises:
        MismatchError: the adapter has other modules than the source, or none has a counterpart.
    """
    layers = layers_of("proportional", source, target, ())
    if job.alignment is not None:
        layers = job.alignment.layers
    pairs, _ = joined(source, target, layers, None)
    strange = strangers(job.adapter, (part.path for part in source.parts.values()))
    shapes = {p: shape_of(source.model, p) for p in job.adapter.modules if p not in strange}
    updates = job.adapter.modules
    refuse([misfit(p, updates[p], s) for p, s in shapes.items() if updates[p].shape != s])
    ranks: dict[str, int] = {}
    sources: dict[str, dict[str, None]] = {}
    for role, (other, _) in pairs.items():
        u = job.adapter.modules.get(source.parts[other].path)
        if u is not None:
            path = target.parts[role].path
            ranks[path] = max(u.rank, ranks.get(path, 0))
            sources.setdefault(path, {})[source.parts[other].path] = None
    reached = {p for of in sources.values() for p in of}
    without = {
        path: "no linear layer of the source" if path in strange else "no counterpart"
        for path in job.adapter.modules
        if path not in reached
    }
    if not ranks:
        raise MismatchError("none of the adapter's modules has a counterpart in the target")
    return Goals(ranks, {path: tuple(of) for path, of in sources.items()}, without)
