"""Flat files of a training: a key is `<what>.<module>`, with the module's dots written `__`.

    A.layers__0__q_proj, B.layers__0__q_proj            a LoRA: α/r · B A
    U.…, S.…, Vh.…, delta_s.…                           a change of singular values: U diag(Δs) Vh

The header's metadata says `r`, `alpha`, `kind` ("lora" or "pissa"), `targets` (a list, or names
between commas) and `layer_range` (the first and the last layer), as far as it says anything; all
else in it is the user's. What it says has to be what the tensors are.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...adapter import Adapter
from ...errors import FileError, MismatchError
from ...lowrank import LowRank
from ...parts import LINEAR
from ...words import one_line, some_of
from .reading import Format, Found, Plan, Slot, Source

_KINDS = {"A": "lora", "B": "lora", "U": "pissa", "S": "pissa", "Vh": "pissa", "delta_s": "pissa"}
_KEY = re.compile(rf"({'|'.join(_KINDS)})\.([^.]+)")
_SAID = ("r", "alpha", "kind", "targets", "layer_range", "format")


@dataclass(frozen=True)
class Flat:
    """What a flat file holds.

    Args:
        kind: "lora" or "pissa".
        modules: {module as the file spells it, dots as `__`: {what: tensor}}.
        alpha: α, where the header says it.
        metadata: what else the header says.
    """

    kind: str
    modules: Mapping[str, Mapping[str, Tensor]]
    alpha: float | None
    metadata: Mapping[str, str]

    def adapter(self, alpha: float | None, where: str) -> Adapter:
        """The updates that it stands for.

        Raises:
            FileError: no α. MismatchError: two of them, or tensors that do not fit together.
        """
        if self.kind == "pissa" and alpha is not None:
            raise MismatchError(f"{where}: changed singular values have no α; leave out alpha=")
        if None not in (alpha, self.alpha) and alpha != self.alpha:
            raise MismatchError(
                f"{where}: the header says that α is {self.alpha:g}, and alpha= says {alpha:g}"
            )
        told = alpha if self.alpha is None else self.alpha
        if self.kind == "lora" and told is None:
            raise FileError(f"{where}: its header says no α, so the scale is unknown; give alpha=")
        found = {}
        for name, parts in self.modules.items():
            path = name.replace("__", ".")
            try:
                if self.kind == "pissa":
                    found[path] = LowRank(parts["Vh"], parts["U"] * parts["delta_s"])
                else:
                    A, B = parts["A"], parts["B"]
                    found[path] = LowRank(A, B, float(told or 0) / len(A))
            except (MismatchError, KeyError, RuntimeError, ZeroDivisionError, TypeError) as e:
                why = f"there is no {e}" if isinstance(e, KeyError) else e
                raise MismatchError(f"{where}: module {path!r}: {why}") from e
        return Adapter(found)


def _claims(source: Source) -> bool:
    return bool(source.tensors) and all(_KEY.fullmatch(key) for key in source.tensors)


def _found(source: Source) -> Found:
    empty = {
        key: torch.empty(stored.shape, dtype=stored.dtype, device="meta")
        for key, stored in source.tensors.items()
    }
    flat = read_flat(empty, source.metadata, source.where)
    modules = flat.adapter(source.alpha, source.where).modules  # shapes and scales, no numbers
    slots = {}
    for name, parts in flat.modules.items():
        u = modules[path := name.replace("__", ".")]
        first, second, *others = sorted(parts, key=("A", "B", "Vh", "U", "delta_s", "S").index)
        keys = (f"{first}.{name}", f"{second}.{name}")
        dtype = torch.promote_types(u.A.dtype, u.B.dtype)
        more = tuple(f"{what}.{name}" for what in others)
        slots[path] = Slot(
            *keys, u.shape, u.rank, u.scale, LINEAR, dtype, form=FLAT.name, others=more
        )
    return Found(Plan(slots, ()), {}, source.tensors)


def _factors(tensors: Sequence[Tensor], slot: Slot) -> tuple[Tensor, Tensor]:
    A, B, *others = tensors  # or Vh and U, and Δs
    return A, B * others[0] if others else B


def read_flat(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: str) -> Flat:
    """A flat file's tensors by module, and what its header says.

    Raises:
        FileError: keys of another kind, or of two.
        MismatchError: a header that contradicts the tensors; naming the field.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    kinds: dict[str, None] = {}
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            every = ", ".join(f"{k}.<module>" for k in _KINDS)
            raise FileError(f"{where}: key {key!r:.80} is none of {every}")
        kinds[_KINDS[match[1]]] = None
        modules.setdefault(match[2], {})[match[1]] = value
    if len(kinds) != 1:
        raise FileError(f"{where}: holds {' and '.join(sorted(kinds)) or 'no tensors'}")
    (kind,) = kinds
    told = metadata.get("kind", kind)
    if told != kind:
        raise MismatchError(f"{where}: the header says kind {told!r:.40}, the keys are of {kind!r}")
    whole = [parts[w] for parts in modules.values() for w in ("A", "S") if w in parts]
    ranks = sorted({len(t) for t in whole if t.ndim})
    r = _number(metadata, "r", where)
    if r is not None and set(ranks) - {r}:
        raise MismatchError(f"{where}: the header says r {r:g}, the tensors have {ranks}")
    _check_names([name.replace("__", ".") for name in modules], metadata, where)
    kept = {key: text for key, text in metadata.items() if key not in _SAID}
    return Flat(kind, modules, _number(metadata, "alpha", where), kept)


def _number(metadata: Mapping[str, str], field: str, where: str) -> float | None:
    if field not in metadata:
        return None
    try:
        value = float(metadata[field])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        found = one_line(metadata[field])
        raise MismatchError(f"{where}: {field!r} in the header must be a number, found {found}")
    return value


def _check_names(paths: list[str], metadata: Mapping[str, str], where: str) -> None:
    """Refuse modules that `targets` and `layer_range` do not mean."""
    targets = _listed(metadata.get("targets", ""))
    meant = {p for p in paths for t in targets if p == t or p.endswith(f".{t}")}
    others = [p for p in paths if p not in meant] if targets else []
    if others:
        named = ", ".join(targets)
        raise MismatchError(
            f"{where}: the header's targets are {named}, and it holds {some_of(others)}"
        )
    said = metadata.get("layer_range", "")
    bounds = re.fullmatch(r"\D*(\d+)[^\d.]+(\d+)\D*", said)
    numbers = ((p, re.search(r"(?:^|\.)(\d+)\.", p)) for p in paths if bounds)
    beyond = [
        p
        for p, n in numbers
        if n is not None and bounds and not int(bounds[1]) <= int(n[1]) <= int(bounds[2])
    ]
    if beyond:
        raise MismatchError(
            f"{where}: the header's layer_range is {said!r:.40}, and it holds {some_of(beyond)}"
        )


def _listed(text: str) -> list[str]:
    """A list of JSON, or names between commas."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = text.split(",")
    return [str(x).strip() for x in found if str(x).strip()] if isinstance(found, list) else []


FLAT = Format("flat", "the flat files of a training", _claims, _found, _factors)
