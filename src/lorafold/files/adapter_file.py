"""Adapters of which the header is read first, and tensors when they are asked for.

An `AdapterFile` has what a file's format found in it, by the header and the config, and
`read(path)` for the factors of one module. Files with equal headers and equal configs (a
collection trained by one script) share everything but their path: their `Record`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter, Layout
from ..errors import MismatchError, UnknownNameError
from ..lowrank import LowRank
from ..parts import Parts, refusal_reason
from ..roles.fused import Packing
from ..thin import thin
from ..words import did_you_mean
from . import safetensors
from .config import read_card
from .disk.header import Entry
from .disk.held import Held
from .formats.readers import reader
from .formats.reading import Found, Plan, Slot
from .remote.file import UrlFile
from .remote.place import Place


class Record:
    """What the header and the config say; shared by all files in which they are the same.

    Args:
        found: by the file's format.
        entries: of the file's header, by the keys of `found.tensors`; {} of what is in memory.
        size: of the file.
    """

    def __init__(self, found: Found, entries: Mapping[str, Entry], size: int) -> None:
        config, plan = found.config, found.plan
        self.config = MappingProxyType(dict(config))
        self.slots = plan.slots
        self.entries = entries
        self.size = size
        self.packings, self.names = found.packings, found.names
        self.is_on_base = found.is_on_base
        self.extra_keys = plan.extra_keys
        self.refusal = refusal_reason(config, plan.extra_keys)
        self.shapes = MappingProxyType({p: (*s.shape, s.rank) for p, s in plan.slots.items()})
        self.scales = MappingProxyType({p: s.scale for p, s in plan.slots.items()})
        self.dtypes = MappingProxyType({p: s.dtype for p, s in plan.slots.items()})
        self.layouts = MappingProxyType(
            {p: s.layout for p, s in plan.slots.items() if s.layout != Layout()}
        )

    def __reduce__(self) -> tuple[Any, ...]:
        plan = Plan(dict(self.slots), self.extra_keys)
        told = dict(self.names), dict(self.packings)
        found = Found(plan, dict(self.config), {}, *told, is_on_base=self.is_on_base)
        return Record, (found, dict(self.entries), self.size)

    @cached_property
    def digest(self) -> str:
        """Of all that it says."""
        said = repr((dict(self.entries), dict(self.slots), dict(self.config)))
        return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()


class AdapterFile:
    """An adapter of which only the header has been read.

    Not made directly: see `open_adapter`. What it reads is of the file that it opened, whatever
    takes its path meanwhile, or it is an error: tensors and config belong together.

    Pickled, it is what reads the same file in another process, or the adapter in memory itself.

    Not for: algebra; `load()` gives the `Adapter`, which has it.

    Attributes:
        path: the folder or file it was opened from; None for an adapter in memory.
        config: the configuration ({} where there is none).
        base_model: name or path of the base, if the config says.
        shapes: {module path: (out, in, rank)}.
        scales: {module path: scale}.
        layouts: {module path: Layout} of the modules that are not plain linear layers.
        dtypes: {module path: dtype of the factors}.
        extra_keys: the file's keys that belong to no module.
        refusal: why ΔW algebra would be wrong, with the remedy; None if it is right.
        nbytes: bytes of its files on the disk (of its tensors, in memory).
    """

    __slots__ = ("_adapter", "_file", "_record", "_wide", "nbytes", "path")

    def __init__(
        self,
        path: Place | None,
        record: Record,
        nbytes: int,
        file: Held | UrlFile | None = None,
        adapter: Adapter | None = None,
        wide: torch.dtype | None = None,
    ) -> None:
        self.path, self.nbytes = path, nbytes
        self._record, self._file, self._adapter, self._wide = record, file, adapter, wide

    @classmethod
    def of(
        cls,
        adapter: Adapter,
        path: Place | None = None,
        nbytes: int | None = None,
        names: Mapping[str, str] = MappingProxyType({}),
    ) -> AdapterFile:
        """The same interface on an adapter in memory."""
        slots = {
            p: Slot("", "", u.shape, u.rank, u.scale, adapter.layout(p), u.A.dtype)
            for p, u in adapter.modules.items()
        }
        plan = Plan(slots, tuple(adapter.extras))
        record = Record(Found(plan, adapter.config, {}, names), {}, 0)
        if nbytes is None:
            tensors = [t for u in adapter.modules.values() for t in (u.A, u.B)]
            nbytes = sum(t.nbytes for t in [*tensors, *adapter.extras.values()])
        return cls(path, record, nbytes, adapter=adapter)

    def __repr__(self) -> str:
        where = "in memory" if self.path is None else repr(str(self.path))
        return f"AdapterFile({where}, {len(self.shapes)} modules)"

    @property
    def config(self) -> Mapping[str, Any]:
        return self._record.config

    @property
    def base_model(self) -> str | None:
        if self._adapter is not None:
            return self._adapter.base_model
        return self.config.get("base_model_name_or_path") or None

    @property
    def shapes(self) -> Mapping[str, tuple[int, int, int]]:
        return self._record.shapes

    @property
    def scales(self) -> Mapping[str, float]:
        return self._record.scales

    @property
    def layouts(self) -> Mapping[str, Layout]:
        return self._record.layouts

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        return self._record.dtypes

    @property
    def extra_keys(self) -> tuple[str, ...]:
        return self._record.extra_keys

    @property
    def parts(self) -> Parts:
        """What it is made of, without the numbers."""
        modules = {path: (out, inner) for path, (out, inner, _) in self.shapes.items()}
        if self._adapter is not None:
            extras = {key: tuple(t.shape) for key, t in self._adapter.extras.items()}
        else:
            extras = {key: self._record.entries[key].shape for key in self.extra_keys}
        return Parts(modules, extras, self.config, self.layouts)

    @property
    def refusal(self) -> str | None:
        return self._record.refusal

    @property
    def packings(self) -> Mapping[str, Packing]:
        """How fused modules pack their parts, as far as a portable file says it."""
        return self._record.packings

    @property
    def names(self) -> Mapping[str, str]:
        """{module path: its name in the file}, of a file with flat names."""
        return self._record.names

    @property
    def is_on_base(self) -> bool:
        """Whether its modules have the names of the base that it was opened with."""
        return self._record.is_on_base

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys of the file, in its order; the extras' only, for an adapter in memory."""
        return tuple(self._record.entries) or self.extra_keys

    @thin
    def read(self, path: str, dtype: torch.dtype | None = None) -> LowRank:
        """The update of one module, read into memory of its own.

        Args:
            path: the module path.
            dtype: convert the factors to it.

        Raises:
            UnknownNameError: no such module.
            FileError: the file is gone or was changed.
            MismatchError: the factors hold NaN or infinity, or a dtype that needs `dtype=`.
        """
        slot = self._record.slots.get(path)
        if slot is None:
            hint = did_you_mean(path, self._record.slots)
            raise UnknownNameError(f"{self._where}: no module {path!r}; {hint}")
        if self._adapter is not None:
            return _moved(self._adapter[path], None, dtype)
        tensors = self._tensors(slot.keys)
        return _update(tensors, path, slot, self._where, dtype, self._wide)

    @property
    def card(self) -> str | None:
        """Its model card: the text of the README.md beside it, None where there is none.

        That of an adapter in memory is in its config (`ORIGIN`), if it has one.
        """
        where = self.path if self._file is None else self._file.place.parent
        return None if where is None else read_card(where)

    def only(self, path: str) -> ModuleFile | None:
        """What reads one module in another process; None for an adapter in memory."""
        if self._file is None:
            return None
        return ModuleFile(self._file, self._record.slots[path], self._record.entries, self._wide)

    @property
    def identity(self) -> str:
        """Which adapter it is: by its file's size, time of change and header; by all of it where it
        is in memory.
        """
        if self._file is None:
            return self.load().digest
        return f"{self._file.version} {self._record.digest}"

    def __lorafold_key__(self) -> Any:
        return self.identity, self.base_model, str(self._wide)

    def read_extras(self) -> dict[str, Tensor]:
        """{file key: tensor} of everything that is no module's factor."""
        if self._adapter is not None:
            return dict(self._adapter.extras)
        return dict(zip(self.extra_keys, self._tensors(self.extra_keys), strict=True))

    @thin
    def load(self, device: Any = None, dtype: torch.dtype | None = None) -> Adapter:
        """The whole adapter.

        Args:
            device: where the tensors go.
            dtype: of the factors; extras keep theirs.
        """
        if self._adapter is not None:
            adapter = self._adapter
            return adapter if device is None and dtype is None else adapter.to(device, dtype)
        tensors = dict(zip(self.keys, self._tensors(self.keys), strict=True))
        return assembled(tensors, self._record, self._where, device, dtype, self._wide)

    @property
    def _where(self) -> str:
        return str(self.path or "adapter") if self._file is None else self._file.path

    def _tensors(self, keys: Iterable[str]) -> list[Tensor]:
        assert self._file is not None
        return _tensors_of(self._file, {key: self._record.entries[key] for key in keys})


def _tensors_of(held: Held | UrlFile, entries: Mapping[str, Entry]) -> list[Tensor]:
    found = safetensors.read_tensors(held.file(), entries.items(), held.path)
    held.check()  # which says if it was written to meanwhile
    return found


class ModuleFile:
    """One module of an adapter's file, to be read in another process; made by `AdapterFile.only`.

    Args:
        file: the file. slot: where the factors are in it. entries: of its header.
        wide: what factors of 8 bits are read in.
    """

    def __init__(
        self,
        file: Held | UrlFile,
        slot: Slot,
        entries: Mapping[str, Entry],
        wide: torch.dtype | None,
    ) -> None:
        self._file, self._slot, self._wide = file, slot, wide
        self._entries = {key: entries[key] for key in slot.keys}

    @property
    def place(self) -> Place:
        """Where the file is."""
        return self._file.place

    @property
    def identity(self) -> str:
        """Which numbers they are: by the file's size and time of change, and where in it."""
        return f"{self._file.version} {self._slot} {self._entries} {self._wide}"

    @thin
    def read(self, path: str) -> LowRank:
        """As `AdapterFile.read`."""
        tensors = _tensors_of(self._file, self._entries)
        return _update(tensors, path, self._slot, self._file.path, None, self._wide)


def assembled(
    tensors: Mapping[str, Tensor],
    record: Record,
    where: str,
    device: Any = None,
    dtype: torch.dtype | None = None,
    wide: torch.dtype | None = None,
) -> Adapter:
    """The adapter of a record, of all its tensors.

    Args:
        tensors: by the record's keys.
        where: the file, for messages.
        device, dtype: of what is made of them.
        wide: what factors of 8 bits are read in.
    """
    modules = {}
    for path, slot in record.slots.items():
        u = _update([tensors[key] for key in slot.keys], path, slot, where, dtype, wide)
        modules[path] = _moved(u, device, None)
    extras = {k: tensors[k].to(device=device) for k in record.extra_keys}
    return Adapter(modules, extras, record.config, layouts=record.layouts)


def _update(
    tensors: Sequence[Tensor],
    path: str,
    slot: Slot,
    where: str,
    dtype: torch.dtype | None,
    wide: torch.dtype | None,
) -> LowRank:
    # What is bytes (`uint8`) its format unpacks.
    narrow = next((t.dtype for t in tensors if t.is_floating_point() and t.itemsize == 1), None)
    if narrow is not None and dtype is None:
        if wide is None:
            raise MismatchError(
                f"{where}: module {path!r} is {narrow}: load it with dtype=torch.float32"
            )
        dtype = wide
    try:
        A, B = reader(slot.form).factors(tensors, slot)
        A, B = (A, B) if slot.cut is None else slot.cut.of(A, B)
        return LowRank(A.to(dtype or A.dtype), B.to(dtype or B.dtype), slot.scale)
    except MismatchError as e:
        raise MismatchError(f"{where}: module {path!r}: {e}") from e


def _moved(u: LowRank, device: Any, dtype: torch.dtype | None) -> LowRank:
    return u if device is None and dtype is None else u.to(device, dtype)
