"""An `Alignment`: how the maps of one base are those of another, for every adapter of the pair.

Kept are sums over the tokens of texts that ran through both (`align/covariances.py`), for the input
and the output of every pair of maps, in two parts: those that maps are fitted on, and every fifth
text's, which they are judged by. Which map is made of them is a method's.

On disk it is one safetensors file: the sums as float32 `fitted/…` and `held/…` (float64 while it is
unfinished), the rest as JSON in the metadata.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as as_safetensors
from torch import Tensor

from ..errors import FileError, MismatchError
from ..files.atomic import parents, replace_file, writing
from ..files.config import json_object
from ..files.disk.sealed import read_whole
from ..roles import Heads, Packing, Role
from ..words import one_line
from .align.bases import Part
from .align.covariances import FIELDS, Moments

KEY = "lorafold_alignment"
VERSION = 1
_FIELDS = {
    **dict.fromkeys(("counts", "joins", "layers", "settings"), dict),
    **dict.fromkeys(("digests", "unpaired"), list),
    **dict.fromkeys(("texts", "tokens"), int),
    "output": str,
}

# What some maps of a family give, and which sees it, channel for channel.
_INNER = ((("gate", "up"), "down"), (("value",), "output"))

Heading = tuple[tuple[int, tuple[int, ...]], ...]  # (head of the target, heads of the source)


@dataclass(frozen=True)
class Join:
    """A linear map of the target and the one of the source that it is paired with.

    Args:
        source, target: the two.
        input, output: the names of their sums.
        input_heads, output_heads: which heads of that side are paired; None where it has none.
        shared: how many layers of the target the source's layer is paired with.
    """

    source: Part
    target: Part
    input: str
    output: str
    input_heads: Heading | None = None
    output_heads: Heading | None = None
    shared: int = 1


@dataclass(frozen=True, eq=False)
class Alignment:
    """What `lf.align` found out about two bases. Serves every adapter of that pair.

    Not for: another pair, nor the same one with the two exchanged: it is refused there.

    Args:
        joins: {role in the target: what it is paired with}.
        fitted, held: {name: sums over paired tokens}; fitted on, and kept for judging.
        digests: of the weights of the source and of the target.
        layers: {stack: the source's layer for each of the target's}.
        texts: how many it has seen. tokens: how many pairs of tokens in them.
        unpaired: paths in the source, and in the target, that have no counterpart.
        output: "activations" or "gradients": what the outputs' sums are of.
        settings: what else it was made with.

    Examples:
        >>> import lorafold as lf
        >>> from lorafold.transfer.alignment import Alignment
        >>> Alignment({}, {}, {}, ("a", "b")).nbytes
        0
    """

    joins: Mapping[Role, Join]
    fitted: Mapping[str, Moments]
    held: Mapping[str, Moments]
    digests: tuple[str, str]
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    texts: int = 0
    tokens: int = 0
    unpaired: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    output: str = "activations"
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all sums together, as they lie in memory."""
        sums = (*self.fitted.values(), *self.held.values())
        return sum(getattr(m, f).nbytes for m in sums for f in FIELDS)

    def all_of(self, name: str) -> Moments:
        """The sums of that name over all texts, the held out ones too."""
        return self.fitted[name] + self.held[name] if name in self.held else self.fitted[name]

    def space(self, role: Role, end: str) -> tuple[str, ...]:
        """The sums of all sites that have the coordinates of a role's "input" or "output".

        The hidden units of an MLP are what up and gate give and what down sees: seen alone, the
        outputs of up span no more directions than its inputs.
        """
        family, _, word = role.kind.rpartition(".")
        own: str = getattr(self.joins[role], end)
        for given, seen in _INNER:
            if (word, end) in ((seen, "input"), *((w, "output") for w in given)):
                others = [(w, "output") for w in given] + [(seen, "input")]
                names = [
                    getattr(self.joins[other], side)
                    for w, side in others
                    if (other := replace(role, kind=f"{family}.{w}")) in self.joins
                ]
                shape = self.fitted[own].st.shape
                return tuple(n for n in names if self.fitted[n].st.shape == shape)
        return (own,)

    def __repr__(self) -> str:
        size = f"{len(self.joins)} maps, {self.texts} texts, {self.tokens:,} tokens"
        return f"Alignment({size}, {self.nbytes / 2**20:.1f} MiB)"

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write it as one safetensors file; the sums in float32.

        Args:
            path: the file. overwrite: replace an alignment that is there.

        Raises:
            FileError: something is there.
        """
        write(self, path, torch.float32, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Alignment:
        """Read what `save` wrote.

        Raises:
            FileError: no such file, no alignment, or an unfinished one.
        """
        found = read(path)
        if found.settings.get("batches") is not None:
            raise FileError(
                f"{os.fspath(path)}: the alignment is unfinished; run align with resume= on it"
            )
        return found


def check_place(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Raise unless an alignment may be written there: what is none is not replaced.

    Raises:
        FileError: something is there.
    """
    if not os.path.exists(path):
        return
    if not overwrite:
        raise FileError(f"{os.fspath(path)} is there already; give overwrite=True to replace it")
    read(path)


def write(
    alignment: Alignment, path: str | os.PathLike[str], dtype: torch.dtype, *, overwrite: bool
) -> None:
    """Write an alignment, finished or not, with sums of that type; missing folders are made."""
    check_place(path, overwrite)
    target = Path(path)
    tensors: dict[str, Tensor] = {}
    counts = {}
    for part in ("fitted", "held"):
        for name, m in getattr(alignment, part).items():
            counts[f"{part}/{name}"] = m.count
            for f in FIELDS:
                tensors[f"{part}/{name}/{f}"] = getattr(m, f).detach().to("cpu", dtype).contiguous()
    record = {
        "version": VERSION,
        "counts": counts,
        "joins": {str(role): asdict(join) for role, join in alignment.joins.items()},
        "digests": alignment.digests,
        "layers": alignment.layers,
        "texts": alignment.texts,
        "tokens": alignment.tokens,
        "unpaired": alignment.unpaired,
        "output": alignment.output,
        "settings": dict(alignment.settings),
    }
    data = as_safetensors(tensors, {KEY: json.dumps(record)})
    with writing(target), parents(target):
        replace_file(target, data)


def read(path: str | os.PathLike[str]) -> Alignment:
    """An alignment from its file, finished or not.

    Raises:
        FileError: no such file, or not one that `write` wrote.
    """
    where = os.fspath(path)
    if os.path.isdir(where):
        raise FileError(f"{where} is a folder, and an alignment is a file")
    metadata, tensors = read_whole(where)
    if KEY not in metadata:
        raise FileError(f"{where} is no alignment: its metadata has no {KEY}")
    record = json_object(metadata[KEY], where)
    if record.get("version") != VERSION:
        found = one_line(record.get("version"))
        raise FileError(f"{where}: version {found} is not one that is read here ({VERSION})")
    for name, kind in _FIELDS.items():
        if type(record.get(name)) is not kind:
            raise FileError(f"{where}: no alignment can be read from it ({name!r} is none)")
    try:
        sums: dict[str, dict[str, Moments]] = {"fitted": {}, "held": {}}
        for key, count in record["counts"].items():
            part, _, name = key.partition("/")
            values = (tensors[f"{key}/{f}"].double() for f in FIELDS)
            sums[part][name] = Moments(count, *values)
        joins = {Role.parse(role): _join(j) for role, j in record["joins"].items()}
        return Alignment(
            joins,
            sums["fitted"],
            sums["held"],
            _pair(record["digests"]),
            {side: tuple(of) for side, of in record["layers"].items()},
            record["texts"],
            record["tokens"],
            _pair(tuple(map(tuple, record["unpaired"]))),
            record["output"],
            record["settings"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise FileError(f"{where}: no alignment can be read from it ({e})") from e


def _pair(values: Iterable[Any]) -> tuple[Any, Any]:
    first, second = values
    return first, second


def _join(record: Mapping[str, Any]) -> Join:
    heading = {
        side: None if record[side] is None else tuple((t, tuple(of)) for t, of in record[side])
        for side in ("input_heads", "output_heads")
    }
    parts = {side: _part(record[side]) for side in ("source", "target")}
    return Join(**{**record, **heading, **parts})


def _part(record: Mapping[str, Any]) -> Part:
    packed, of = record["packing"], record["heads"]
    if packed is not None:
        packed = Packing(tuple(packed["words"]), tuple(packed["shares"]), packed["groups"])
    return Part(record["path"], packed, record["word"], None if of is None else Heads(**of))


def check_pair(alignment: Alignment, digests: tuple[str | None, str | None]) -> None:
    """Refuse an alignment of other bases than these.

    Args:
        digests: of the source and the target; None for one that is not there.
    """
    for side, own, found in zip(("source", "target"), alignment.digests, digests, strict=True):
        if found is not None and found != own:
            swapped = digests == alignment.digests[::-1]
            raise MismatchError(
                f"the alignment is of another {side} (weights {own[:12]}…, here {found[:12]}…)"
                + ("; the two are exchanged" if swapped else "; align this pair")
            )


def finished(alignment: Alignment) -> Alignment:
    """It without the mark of how far it has come."""
    settings = {k: v for k, v in alignment.settings.items() if k != "batches"}
    return replace(alignment, settings=settings)
