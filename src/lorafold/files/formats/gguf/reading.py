"""llama.cpp's adapters: pairs of tensors behind its own names, in one GGUF file.

    <name>.weight.lora_a (r, in), .lora_b (out, r)          ΔW = s · b a
    token_embd.weight.lora_a (vocab, r), .lora_b (dim, r)   the update is (dim, vocab): a is turned
    <name>_exps.weight.lora_a (E, r, in), .lora_b (E, out, r)

s is `adapter.lora.alpha` / r with each module's own r, and 1 where no α is said, or 0. How a base's
modules are called, and how many heads its q and k have, is not in the file: see `architectures`.
Experts that are one tensor there are one module each here, under the names of a checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ....adapter import ORIGIN
from ....errors import FileError, MismatchError
from ....naming import kind
from ....parts import LINEAR, Layout
from ....words import some_of
from ...config import json_object
from ...disk.header import DTYPE_NAMES, Entry
from ..reading import Format, Found, Plan, Shape, Slot, Source, common_dtype, scaling_of
from .architectures import (
    PERMUTED,
    Architecture,
    architecture,
    heads_of,
    names_of,
    unpermuted,
    usual_name,
)
from .base import GgufBase
from .header import Q8_0_BYTES, Q8_0_NUMBERS, Head, not_an_adapter

RANKS = "lorafold.ranks"  # of what lorafold wrote: {tensor: rank of each expert}, of those padded
BASE_MODEL = "lorafold.base_model"
METADATA = "lorafold."  # before the keys of a header's metadata
ALPHA, ALORA = "adapter.lora.alpha", "adapter.alora.invocation_tokens"
_KEY = re.compile(r"(?P<name>.+)\.weight\.lora_(?P<side>[ab])")
_BLOCK = re.compile(r"blk\.(\d{1,6})\.")
USED = ("general.architecture", "general.type", "adapter.type", BASE_MODEL, RANKS)

_EXPERTS = "_exps"
_MOST_EXPERTS = 1 << 16


class BaseNeededError(MismatchError):
    """An adapter that can't be read without its base.

    Attributes:
        found: the same without the remedy, which not every door has.
    """

    def __init__(self, found: str) -> None:
        self.found = found
        super().__init__(f"{found}: load it with base=, the base's folder")


@dataclass(frozen=True)
class _Pair:
    """The two tensors of a module, by their keys; shapes with the ones that GGUF leaves out."""

    name: str
    keys: tuple[str, str]
    a: Shape
    b: Shape
    dtype: torch.dtype


def gguf_found(head: Head, base: GgufBase | None, where: str) -> Found:
    """What the file holds, and a config that says the same in PEFT's words.

    Raises:
        FileError: no adapter, or not a LoRA.
        BaseNeededError: its q and k are permuted, and there is no base.
        MismatchError: naming file and tensor: no pair, shapes that do not fit, an architecture that
            was not tried, a base that is another.
        MissingExtraError: the package gguf is not there.
    """
    arch = _checked(head, base, where)
    pairs, others = _pairs(head, where)
    alpha = _alpha(head, where)
    ranks = _ranks(head, where)
    paths = _Paths(arch, base, where)
    slots: dict[str, Slot] = {}
    for pair in pairs:
        try:
            heads = _heads(pair, arch, base, where)
            for path, slot in _slots(pair, paths, heads, ranks.get(pair.name)):
                if path in slots:
                    raise MismatchError(f"{path!r} is in the file twice; keep one")
                scale = alpha / pair.b[-1] if alpha else 1.0
                slots[path] = replace(slot, scale=scale, stored=(pair.a, pair.b), form=GGUF.name)
                paths.check_shape(path, slot)
        except BaseNeededError:
            raise
        except MismatchError as e:
            raise MismatchError(f"{where}: {pair.name!r}: {e}") from e
    paths.check_found()
    config = scaling_of(slots.values())
    if ALORA in head.values:
        config["alora_invocation_tokens"] = head.values[ALORA]
    if isinstance(head.values.get(BASE_MODEL), str):
        config["base_model_name_or_path"] = head.values[BASE_MODEL]
    metadata = {
        key.removeprefix(METADATA): value
        for key, value in head.values.items()
        if isinstance(value, str) and key not in USED
    }
    config |= {ORIGIN: {"metadata": metadata}} if metadata else {}
    return Found(Plan(slots, tuple(others)), config, {}, is_on_base=base is not None)


def _factors(tensors: Sequence[Tensor], slot: Slot) -> tuple[Tensor, Tensor]:
    """Contiguous copies.

    Raises:
        MismatchError: what the file says is padding is not zero.
    """
    assert slot.stored is not None
    A, B = (_numbers(t, shape) for t, shape in zip(tensors, slot.stored, strict=True))
    if slot.part is not None:
        A, B = A[slot.part[0]], B[slot.part[0]]
    if slot.layout.kind == "embedding":
        A = A.T
    if bool(A[slot.rank :].any()) or bool(B[:, slot.rank :].any()):
        raise MismatchError(
            f"its rank is not the {slot.rank} that {RANKS!r} in the file says: remove that"
        )
    A, B = A[: slot.rank], B[:, : slot.rank]
    if slot.heads is not None:
        B = unpermuted(B, slot.heads)
    whole = torch.contiguous_format
    return A.clone(memory_format=whole), B.clone(memory_format=whole)


def _numbers(t: Tensor, shape: Shape) -> Tensor:
    """A tensor in its shape: of q8_0's bytes, a float16 for every 32 of int8, in float32."""
    if t.dtype != torch.uint8:
        return t.reshape(shape)
    blocks = t.reshape(-1, Q8_0_BYTES)
    scales = blocks[:, :2].contiguous().view(torch.float16).float()
    numbers = blocks[:, 2:].contiguous().view(torch.int8).float()
    assert numbers.shape[1] == Q8_0_NUMBERS
    return (scales * numbers).reshape(shape)


def _checked(head: Head, base: GgufBase | None, where: str) -> Architecture:
    """The architecture of what is an adapter, and the base's."""
    if head.values.get("general.type") != "adapter":
        raise not_an_adapter(where, head.values.get("general.type"))
    kind = head.values.get("adapter.type")
    if kind != "lora":
        raise FileError(f"{where} is an adapter of the type {kind!r:.40}; only 'lora' is read")
    arch = architecture(head.values.get("general.architecture"), where)
    if base is not None and base.architecture is not arch:
        raise MismatchError(
            f"{where} is of the architecture {arch.name!r}, and {base.where} is of "
            f"{base.architecture.name!r}: give its own base"
        )
    return arch


def _pairs(head: Head, where: str) -> tuple[list[_Pair], list[str]]:
    sides: dict[str, dict[str, str]] = {}
    others = []
    for key in head.entries:
        match = _KEY.fullmatch(key)
        if match is not None:
            sides.setdefault(match["name"], {})[match["side"]] = key
        elif key.endswith("_norm.weight") and _is_float(head.entries[key]):
            others.append(key)  # which llama.cpp passes over
        else:
            raise MismatchError(
                f"{where}: {key!r} is no factor (….weight.lora_a or .lora_b), and llama.cpp "
                "refuses it: remove it"
            )
    pairs = []
    for name, keys in sides.items():
        if len(keys) == 1:
            ((side, there),) = keys.items()
            lacking = f"{name}.weight.lora_{'b' if side == 'a' else 'a'}"
            raise MismatchError(
                f"{where}: {there!r} has no partner {lacking}: the file is incomplete"
            )
        n = 3 if name.endswith(_EXPERTS) else 2
        a, b = ((1,) * (n - len(s)) + s for s in (head.shapes[keys[x]] for x in "ab"))
        dtypes = [_dtype(head.entries[keys[x]]) for x in "ab"]
        pairs.append(_Pair(name, (keys["a"], keys["b"]), a, b, common_dtype(*dtypes)))
    if not pairs:
        raise FileError(f"{where}: there is no update in it")
    return pairs, others


def _is_float(entry: Entry) -> bool:
    return entry.code != "U8"


def _dtype(entry: Entry) -> torch.dtype:
    found: torch.dtype = (
        getattr(torch, DTYPE_NAMES[entry.code]) if _is_float(entry) else (torch.float32)
    )
    return found


def _alpha(head: Head, where: str) -> float:
    found = head.values.get(ALPHA, 0.0)
    if isinstance(found, bool) or not isinstance(found, float | int) or not math.isfinite(found):
        raise FileError(f"{where}: {ALPHA!r} must be a number, found {found!r:.40}")
    return float(found)


def _ranks(head: Head, where: str) -> dict[str, list[int]]:
    """{tensor: rank of each expert} of those that lorafold has padded."""
    if RANKS not in head.values:
        return {}
    found = json_object(str(head.values[RANKS]), f"{where}: {RANKS}")
    lists = all(isinstance(ranks, list) for ranks in found.values())
    if not lists or not all(type(r) is int and r >= 1 for ranks in found.values() for r in ranks):
        raise FileError(f"{where}: {RANKS} must give lists of whole numbers")
    return found


def _heads(pair: _Pair, arch: Architecture, base: GgufBase | None, where: str) -> int | None:
    """How many heads the rows of B are permuted in; None where they are not."""
    if not arch.permuted or not pair.name.endswith(PERMUTED):
        return None
    if base is None:
        raise BaseNeededError(
            f"{where}: llama.cpp has the rows of {pair.name!r} in another order, which depends on "
            "how many heads the base has"
        )
    heads = heads_of(base.config, pair.name, base.where)
    if pair.b[0] % (2 * heads):
        raise MismatchError(f"its {pair.b[0]} rows are not those of the {heads} heads of the base")
    return heads


def _slots(
    pair: _Pair, paths: _Paths, heads: int | None, ranks: list[int] | None
) -> Iterator[tuple[str, Slot]]:
    """The modules that a pair stands for: one, or one for each expert; of scale 1."""
    a, b, rank = pair.a, pair.b, pair.b[-1]
    wrong = MismatchError(f"lora_a {a} and lora_b {b} are no factors of one update")
    if pair.name.endswith(_EXPERTS):
        if len(a) != 3 or len(b) != 3 or a[0] != b[0] or a[1] != rank or a[0] > _MOST_EXPERTS:
            raise wrong
        own = ranks or [rank] * a[0]
        if len(own) != a[0]:
            raise MismatchError(f"{RANKS!r} in the file names {len(own)} of {a[0]} experts")
        for e, path in enumerate(paths.of_experts(pair.name, a[0])):
            part = (e, a[0])
            shape, r = (b[1], a[2]), min(own[e], rank)
            yield path, Slot(*pair.keys, shape, r, 1.0, LINEAR, pair.dtype, part=part)
        return
    embedding = pair.name == "token_embd"
    if len(a) != 2 or len(b) != 2 or a[1 if embedding else 0] != rank:
        raise wrong
    shape = (b[0], a[0] if embedding else a[1])
    layout = Layout("embedding") if embedding else LINEAR
    yield paths.of(pair.name), Slot(*pair.keys, shape, rank, 1.0, layout, pair.dtype, heads=heads)


class _Paths:
    """What the base calls the modules of a file.

    Args:
        arch: the file's. base: where it is known. where: the file, for messages.
    """

    def __init__(self, arch: Architecture, base: GgufBase | None, where: str) -> None:
        self._arch, self._where, self._base = arch, where, base
        self._tensors = None if base is None else base.tensors
        self._kinds: dict[str, list[str]] = {}
        for checkpoint, name in names_of(arch).items():
            self._kinds.setdefault(name, []).append(checkpoint)
        self._lost: list[str] = []

    def of(self, name: str) -> str:
        """The path of a module that is one."""
        usual = self._usual(name)
        if self._tensors is None:
            return usual
        number = _number(name)
        for candidate in self._kinds.get(kind(name), ()):
            path = candidate.replace("#", number)
            if f"{path}.weight" in self._tensors.tensors:
                return path
        if self._tensors.find(f"{usual}.weight") is None:
            self._lost.append(name)
        return usual

    def of_experts(self, name: str, count: int) -> list[str]:
        """The paths of experts that are one tensor there."""
        usual, number = self._usual(name), _number(name)
        if self._tensors is not None:
            for candidate in self._kinds.get(kind(name), ()):
                path = candidate.replace("#", number)
                if f"{_expert(path, 0)}.weight" in self._tensors.tensors:
                    usual = path
        return [_expert(usual, e) for e in range(count)]

    def _usual(self, name: str) -> str:
        found = usual_name(self._arch, name)
        if found is None:
            raise MismatchError(f"adapters of {self._arch.name} are known to have no such module")
        return found

    def check_shape(self, path: str, slot: Slot) -> None:
        """Raise where the base's weight has another shape."""
        held = None if self._tensors is None else self._tensors.find(f"{path}.weight")
        if held is None or not held.dtype.is_floating_point:
            return
        fitting = slot.layout.shapes(*slot.shape)
        if held.shape not in fitting:
            raise MismatchError(
                f"{path!r} has the shape {held.shape} in the base, the update fits {fitting[0]}"
            )

    def check_found(self) -> None:
        """Raise where the base lacks modules."""
        if self._lost:
            assert self._base is not None
            raise MismatchError(
                f"{self._where}: no module of {self._base.where} is meant by "
                f"{some_of(self._lost)}: give its own base"
            )


def _number(name: str) -> str:
    match = _BLOCK.match(name)
    return match[1] if match else "#"


def _expert(path: str, e: int) -> str:
    owner, _, last = path.rpartition(".")
    return f"{owner}.{e}.{last}"


def _not_by_keys(source: Source) -> bool:
    """A safetensors file is none, whatever its keys."""
    return False


def _no_source(source: Source) -> Found:
    raise MismatchError(f"{source.where}: llama.cpp's adapters are .gguf files")


GGUF = Format("gguf", "llama.cpp's, GGUF", _not_by_keys, _no_source, _factors)
