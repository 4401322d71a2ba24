"""Between an adapter and an alignment: its modules as the maps that were paired, and back.

A fused module is taken apart into the maps that it holds before, and put together after.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...adapter import Adapter
from ...errors import MismatchError
from ...lowrank import LowRank
from ...roles import Role
from ..align.align import align
from ..align.bases import Part, digest_of
from ..alignment import Alignment, Join, check_pair
from ..job import Job


@dataclass(frozen=True, eq=False)
class Given:
    """What there is to move.

    Args:
        pairs: roles in the target, each with the update that goes there.
        without: {path in the source: why it has none}.
    """

    pairs: list[tuple[Role, LowRank]]
    without: Mapping[str, str]


def alignment_of(job: Job) -> Alignment:
    """The alignment that was given, of these bases; or one made of the texts.

    Raises:
        MismatchError: neither is there, or an alignment of another pair.
    """
    given = job.alignment
    if isinstance(given, str | os.PathLike):
        given = Alignment.load(given)
    if given is None:
        if job.texts is None:
            raise MismatchError("give texts= to align the bases on, or give an alignment= of them")
        return align(
            job.source,
            job.target,
            job.texts,
            tokenizers=job.options["tokenizers"],
            roles=job.options["roles"],
            progress=job.progress,
        )
    if not isinstance(given, Alignment):
        raise MismatchError(f"alignment must be an Alignment or its file, found {given!r:.80}")
    check_pair(given, (digest_of(job.source), digest_of(job.target)))
    return given


def parts_in(adapter: Adapter, alignment: Alignment) -> Given:
    """The adapter's updates as the maps that the alignment pairs.

    Raises:
        MismatchError: modules that the source doesn't have, or of other shapes there.
    """
    joins: dict[str, list[tuple[Role, Join]]] = {}
    for role, join in alignment.joins.items():
        joins.setdefault(join.source.path, []).append((role, join))
    alone = set(alignment.unpaired[0])
    strange = strangers(adapter, [*joins, *alone])
    pairs: list[tuple[Role, LowRank]] = []
    misfits, without = [], {}
    for path, u in adapter.modules.items():
        if path not in joins:
            why = "no linear layer of the source" if path in strange else "no counterpart"
            without[path] = why
            continue
        for role, join in joins[path]:
            part = _part(u, join.source)
            sums = alignment.fitted
            found = len(sums[join.output].s), len(sums[join.input].s)
            if part is None or part.shape != found:
                misfits.append(misfit(path, u, found))
                break
            pairs.append((role, part))
    refuse(misfits)
    return Given(pairs, without)


def strangers(adapter: Adapter, own: Iterable[str]) -> list[str]:
    """The adapter's modules that the source has no linear layer for.

    Raises:
        MismatchError: none of them is there.
    """
    there = dict.fromkeys(own)
    found = [path for path in adapter.modules if path not in there]
    if len(found) == len(adapter.modules):
        raise MismatchError(
            f"the adapter's modules are not in the source base, e.g. {found[0]!r} (the base has "
            f"{next(iter(there))!r}): was it trained on another one?"
        )
    return found


def misfit(path: str, u: LowRank, shape: tuple[int, int]) -> str:
    """An update and the weight of the source that it should be of."""
    return f"{path!r} is {u.shape[0]}×{u.shape[1]}, in the base {shape[0]}×{shape[1]}"


def refuse(misfits: Sequence[str]) -> None:
    """Raise where something doesn't fit.

    Raises:
        MismatchError: naming the first few.
    """
    if misfits:
        shown = "; ".join(misfits[:5]) + ("; …" if len(misfits) > 5 else "")
        raise MismatchError(f"the adapter doesn't fit the source base: {shown}")


def _part(u: LowRank, part: Part) -> LowRank | None:
    if part.packing is None:
        return u
    try:
        return part.packing.split(u)[part.word]
    except MismatchError:
        return None


def assembled(
    found: Mapping[Part, LowRank], given: Given, alignment: Alignment
) -> tuple[dict[str, LowRank], dict[str, tuple[str, ...]]]:
    """{path in the target: update}, and {path: paths in the source that it was made of}."""
    sources: dict[str, dict[str, None]] = {}
    for role, _ in given.pairs:
        join = alignment.joins[role]
        sources.setdefault(join.target.path, {})[join.source.path] = None
    groups: dict[str, dict[str, LowRank]] = {}
    packings = {}
    for part, u in found.items():
        groups.setdefault(part.path, {})[part.word] = u
        packings[part.path] = part.packing
    modules = {}
    for path, words in groups.items():
        packed = packings[path]
        modules[path] = words[""] if packed is None else packed.fuse(words)
    return modules, {path: tuple(of) for path, of in sources.items()}
