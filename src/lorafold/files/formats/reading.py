"""What every format that is read gives: whether a file is its, what is in it, and its factors.

A format is a `Format`, three functions: of what a header says, `claims` and `found`; of a module's
tensors, `factors`. `readers` lists them. Nothing here or there opens a file: a `Source` says what
is known of one, and reads what a format has to look at (an α of each module, say).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...adapter import ORIGIN
from ...errors import MismatchError
from ...parts import Layout
from ...roles.fused import Packing
from ..config import json_object
from .alphas import SAID

Shape = tuple[int, ...]
# In the header of what lorafold wrote: {module: rank} of those padded, or the ranks of its parts.
RANKS = "lorafold_ranks"
BASE_MODEL = "lorafold_base_model"  # there as well, where a form has no config that says it
Tensors = Mapping[str, tuple[torch.dtype, Shape]]


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file: its key there, its dtype, and the shape that it is taken to have."""

    key: str
    dtype: torch.dtype
    shape: Shape


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of a module's factors that is another's.

    Args:
        rows: from where to where, of B.
        ranks: from where to where, of A's rows and B's columns; the rows have zeros elsewhere.
        swapped: whether the two halves of the rows are in the other order.
    """

    rows: tuple[int, int]
    ranks: tuple[int, int]
    swapped: bool = False

    def of(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Contiguous copies, so that a part does not keep the whole alive.

        Raises:
            MismatchError: there are other numbers where zeros have to be.
        """
        first, last = self.ranks
        B = B[slice(*self.rows)]
        if bool(B[:, :first].any()) or bool(B[:, last:].any()):
            raise MismatchError(
                f"its rank is not the {last - first} that {RANKS!r} in the header says: remove that"
            )
        B = B[:, first:last]
        if self.swapped:
            B = torch.cat(B.chunk(2)[::-1])
        return A[first:last].clone(), B.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one module's factors lie in a file, and what they are.

    Args:
        A, B: the file's keys.
        shape: (out, in) of the update.
        rank: of this module (of one expert).
        scale: multiplies the product.
        layout: how the weight relates to the update.
        dtype: of the factors (promoted, should they differ).
        form: the name of the format that makes factors of the tensors.
        part: (index, count) of it among the parts that the tensors hold, where `form` has such.
        others: keys of the tensors that it is made of beside these two.
        tolerance: relative error to which it is cut when it is read, and its rank with it.
        blocks: which blocks of its rows are updated, where each of these has factors of its own.
        cut: the part of these factors that it has; None: all of them.
        stored: the shapes of the two tensors, where they are not what was read (GGUF).
        heads: those that B's rows are in another order in (GGUF).
    """

    A: str
    B: str
    shape: tuple[int, int]
    rank: int
    scale: float
    layout: Layout
    dtype: torch.dtype
    form: str = "peft"
    part: tuple[int, int] | None = None
    others: tuple[str, ...] = ()
    tolerance: float | None = None
    blocks: tuple[bool, ...] = ()
    cut: Cut | None = None
    stored: tuple[Shape, Shape] | None = None
    heads: int | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys of the file that it is read from."""
        return self.A, self.B, *self.others


@dataclass(frozen=True)
class Plan:
    """All modules of a file, and the keys that are none."""

    slots: Mapping[str, Slot]
    extra_keys: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """What is known of a file before its tensors are read.

    Args:
        tensors: {key: what is stored there}, in the file's order.
        where: the file, for messages.
        read: the tensors at keys of the file.
        rows: those from one to another of a tensor at a key.
        metadata: of its header.
        text: of the config beside it; None where there is none.
        given: the config itself, where it is in memory.
        config_place: where the config is, for messages.
        alpha: α, as the caller says it.
        tolerance: relative error of what is cut, as the caller says it.
    """

    tensors: Mapping[str, Stored]
    where: str
    read: Callable[[Iterable[str]], list[Tensor]]
    rows: Callable[[str, int, int], Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    text: str | None = None
    given: dict[str, Any] | None = None
    config_place: str = ""
    alpha: float | None = None
    tolerance: float | None = None

    @property
    def has_config(self) -> bool:
        """Whether there is a config, in memory or beside the file."""
        return self.text is not None or self.given is not None

    def config(self) -> dict[str, Any] | None:
        """The config, whatever it says; None where there is none.

        Raises:
            FileError: it is no JSON.
        """
        return self.given if self.text is None else json_object(self.text, self.config_place)

    def refuse_alpha(self, why: str) -> None:
        """Refuse an α of the caller's.

        Raises:
            MismatchError: there is one.
        """
        if self.alpha is not None:
            raise MismatchError(f"{self.where}: {why}; leave out alpha=")

    def origin(self, *used: str) -> dict[str, Any]:
        """A config of what the header says beside the format, the base's name for one: `save`
        writes it again.

        Args:
            used: its keys that the format has used up.
        """
        out = ("format", BASE_MODEL, *SAID, *used)
        told = {key: text for key, text in self.metadata.items() if key not in out}
        found: dict[str, Any] = {ORIGIN: {"metadata": told}} if told else {}
        name = self.metadata.get(BASE_MODEL)
        return found | ({"base_model_name_or_path": name} if name else {})


@dataclass(frozen=True)
class Found:
    """What a format finds in a file.

    Args:
        plan: its modules and what is beside them, by keys of `tensors`.
        config: of the adapter.
        tensors: {key: what is stored there}: all that the file holds.
        names: {module path: its name in the file}, of files with flat names.
        packings: of fused modules, as far as the file says them.
        by_numbers: whether tensors had a say in it, and not the header alone.
        is_on_base: whether modules have the names of a base that the caller gave.
    """

    plan: Plan
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    names: Mapping[str, str] = field(default_factory=dict)
    packings: Mapping[str, Packing] = field(default_factory=dict)
    by_numbers: bool = False
    is_on_base: bool = False


@dataclass(frozen=True)
class Format:
    """A format that is read.

    Args:
        name: what `format=` calls it.
        said: what messages call it.
        claims: whether a file is one, by its keys and its header.
        found: what is in it.
        factors: A (r, in) and B (out, r) of a module's tensors, in the order of `slot.keys`.
    """

    name: str
    said: str
    claims: Callable[[Source], bool]
    found: Callable[[Source], Found]
    factors: Callable[[Sequence[Tensor], Slot], tuple[Tensor, Tensor]]


def shapes_of(tensors: Mapping[str, Stored]) -> Tensors:
    """{key: (dtype, shape)}."""
    return {key: (stored.dtype, stored.shape) for key, stored in tensors.items()}


def numbers_at(
    source: Source, keys: Mapping[str, str], tensors: Mapping[str, Stored]
) -> dict[str, Tensor]:
    """{module: number}, of keys of `tensors` that have one each."""
    found = source.read([tensors[key].key for key in keys.values()]) if keys else []
    return dict(zip(keys, found, strict=True))


def common_dtype(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The dtype of two factors together."""
    if a == b:
        return a
    # torch refuses to promote its 8-bit types.
    return torch.promote_types(a, b) if min(a.itemsize, b.itemsize) > 1 else torch.float32


def scaling_of(slots: Collection[Slot]) -> dict[str, Any]:
    """r and α of a config, where all modules have one of each that is exactly their scale."""
    ranks, scales = ({getattr(slot, name) for slot in slots} for name in ("rank", "scale"))
    if len(ranks) != 1 or len(scales) != 1:
        return {}
    (rank,), (scale,) = ranks, scales
    near = scale * rank
    tries = (near, math.nextafter(near, 0.0), math.nextafter(near, math.inf))
    alpha = next((x for x in tries if x / rank == scale), None)
    return {} if alpha is None else {"r": rank, "lora_alpha": alpha}
