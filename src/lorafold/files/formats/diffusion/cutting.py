"""Of a fused module's factors, those of its parts; of padded ones, those that are not zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ....errors import FileError, MismatchError
from ...config import json_object
from ..reading import RANKS, Cut, Slot, Source
from .flux import Piece

Ranks = int | list[int]


def said_ranks(source: Source) -> dict[str, Ranks]:
    """{name in the file: its rank, or those of its parts} of what lorafold has padded or joined.

    Raises:
        FileError: the header says something else.
    """
    if RANKS not in source.metadata:
        return {}
    where = f"{source.where}: {RANKS} in the header"
    found = json_object(source.metadata[RANKS], where)
    for said in found.values():
        whole = type(said) is int and said >= 1
        parts = isinstance(said, list) and all(type(r) is int and r >= 0 for r in said)
        if not whole and not (parts and any(said)):
            raise FileError(f"{where} must give whole numbers, or lists of them")
    return found


def own_ranks(
    source: Source, up: str, slot: Slot, pieces: Sequence[Piece]
) -> tuple[list[int] | None, bool]:
    """The ranks of the parts where each has its own A, and whether that took reading.

    B is block-diagonal then, in blocks of one rank. That first rows have numbers elsewhere tells
    most of those that are not, so that only what may be is read as a whole.

    Args:
        up: the key of B in the file.
    """
    count = len(pieces)
    rank, rest = divmod(slot.rank, count)
    if rest or slot.shape[0] < count:
        return None, False
    spans = [_rows(piece, slot) for piece in pieces]
    for k, (first, _) in enumerate(spans):
        row = source.rows(up, first, first + 1).flatten()
        row[k * rank : (k + 1) * rank] = 0
        if bool(row.any()):
            return None, True
    (whole,) = source.read([up])
    B = whole.flatten(1)
    for k, (first, last) in enumerate(spans):
        block = B[first:last]
        inside = block[:, k * rank : (k + 1) * rank]
        if not bool(inside.any()) or bool(block.count_nonzero() != inside.count_nonzero()):
            return None, True
    return [rank] * count, True


def cut_to(slot: Slot, pieces: Sequence[Piece], ranks: Ranks | None) -> dict[str, Slot]:
    """{module path: its slot} of what is in the file under one name.

    Args:
        slot: of all of it.
        pieces: the modules that it is of.
        ranks: of the whole where the rest is zeros, or of each part where it has its own; a part of
            rank 0 is not there.

    Raises:
        MismatchError: it can't be taken apart so.
    """
    own = ranks if isinstance(ranks, list) else None
    whole = ranks if isinstance(ranks, int) else slot.rank
    if whole > slot.rank or (own and (len(own) != len(pieces) or sum(own) > slot.rank)):
        raise MismatchError(
            f"its rank is {slot.rank}, and {RANKS!r} in the header says {ranks}: remove that"
        )
    found: dict[str, Slot] = {}
    start = 0
    for k, piece in enumerate(pieces):
        rank = own[k] if own else whole
        first, last = (start, start + rank) if own else (0, rank)
        start += rank
        if not rank:
            continue
        rows = _rows(piece, slot)
        cut = Cut(rows, (first, last), piece.swapped)
        if rows == (0, slot.shape[0]) and rank == slot.rank and not piece.swapped:
            found[piece.path] = slot
        else:
            shape = (rows[1] - rows[0], slot.shape[1])
            found[piece.path] = replace(slot, shape=shape, rank=rank, cut=cut)
    return found


def _rows(piece: Piece, slot: Slot) -> tuple[int, int]:
    if piece.swapped and slot.shape[0] % 2:
        raise MismatchError(f"its {slot.shape[0]} rows are no two halves, as those of FLUX are")
    try:
        return piece.rows(slot.shape[0])
    except ValueError as e:
        raise MismatchError(str(e)) from e
