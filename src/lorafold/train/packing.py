"""What TRL's trainer makes of data: tokens that fit, and packed rows that know whose they are.

TRL packs token columns alone, so that whose a row is would be lost. Here its number rides along as
one more of them, a number a token, and comes back as a column of names, one for each sequence of a
packed row, beside TRL's own `seq_lengths`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ..errors import RefusedError
from .many import numbers_of

COLUMN = "adapter"
_OWNERS = "lorafold_owners"  # while it is packed: a number for each token

Prepare = Callable[..., Any]


@dataclass(frozen=True)
class Fit:
    """How a part of the data fits into `max_length`.

    Args:
        rows: that there are, in tokens. tokens: in all of them, before any is cut.
        cut: how many rows are longer, and lose their end. dropped: how many of them are left
            without a token to be learned, and are left out.
    """

    rows: int
    tokens: int
    cut: int
    dropped: int


def prepared(
    prepare: Prepare,
    pack: Callable[..., Any],
    dataset: Any,
    processing_class: Any,
    args: Any,
    packing: bool,
    names: Sequence[str],
    *more: Any,
) -> tuple[Any, Fit | None]:
    """A dataset as TRL's trainer takes it, and how it fits; None of a stream.

    Args:
        prepare: TRL's own way to do so, of (dataset, processing_class, args, packing, *more).
        pack: TRL's `pack_dataset`.
        args: the trainer's. packing: whether rows are joined. names: of the trained adapters.

    Raises:
        RefusedError: packing that cuts rows anywhere, where each has an adapter.
    """
    owned = packing and COLUMN in (getattr(dataset, "column_names", None) or next(iter(dataset)))
    if owned and args.packing_strategy == "wrapped":
        raise RefusedError(
            "packing_strategy='wrapped' cuts rows anywhere, and one adapter's tokens would be read "
            f"by another's: with a column {COLUMN} choose 'bfd' or 'bfd_split'"
        )
    if args.max_length is None or not (owned or hasattr(dataset, "__len__")):
        return prepare(dataset, processing_class, args, packing, *more), None
    whole = copy.copy(args)
    vars(whole).update(max_length=None, shuffle_dataset=False)
    rows = prepare(dataset, processing_class, whole, False, *more)
    if owned:
        made = _packed(pack, rows, args, names)
    else:
        made = prepare(rows, processing_class, args, packing, *more)
    if not hasattr(rows, "__len__"):
        return made, None
    return made, _fit(rows, made, args, packing)


def _packed(pack: Callable[..., Any], rows: Any, args: Any, names: Sequence[str]) -> Any:
    """Rows of tokens and labels packed by TRL, each packed row with the names of its sequences."""

    def owners(row: dict[str, Any]) -> dict[str, Any]:
        return {_OWNERS: numbers_of([row[COLUMN]], names).tolist() * len(row["input_ids"])}

    def named(row: dict[str, Any]) -> dict[str, Any]:
        starts = accumulate(row["seq_lengths"][:-1], initial=0)
        return {COLUMN: [names[row[_OWNERS][start]] for start in starts]}

    rows = rows.map(owners).select_columns(["input_ids", "labels", _OWNERS])
    if args.shuffle_dataset:
        rows = rows.shuffle(seed=args.seed)
    rows = pack(rows, args.max_length, args.packing_strategy)
    rows = rows.map(named, remove_columns=[_OWNERS])
    return rows.shuffle(seed=args.seed) if args.shuffle_dataset else rows


def _fit(rows: Any, made: Any, args: Any, packing: bool) -> Fit:
    lengths = [len(ids) for ids in rows["input_ids"]]
    cuts = not packing or args.packing_strategy == "bfd"  # the others go on in another row
    cut = sum(n > args.max_length for n in lengths) if cuts else 0
    return Fit(len(rows), sum(lengths), cut, 0 if packing else len(rows) - len(made))


def sequences(features: Sequence[dict[str, Any]]) -> Iterator[tuple[Any, int]]:
    """(whose it is, how many tokens) of every sequence of a batch, packed or not."""
    for feature in features:
        if "seq_lengths" in feature:
            yield from zip(feature[COLUMN], feature["seq_lengths"], strict=True)
        else:
            yield feature[COLUMN], len(feature["input_ids"])
