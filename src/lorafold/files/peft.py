"""Reading adapters in PEFT's format: the header first, tensors when they are asked for.

`open_files` gives an `AdapterFile`: what is in the file, by its header and config alone, and
`read(path)` for the factors of one module. Files with equal headers and
equal configs (a collection trained by one script) share everything but their path.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..adapter import ORIGIN, Adapter, Layout
from ..errors import FileError, MismatchError, UnknownNameError
from ..lowrank import LowRank
from ..parts import Parts, refusal_reason
from ..roles.fused import Packing
from ..thin import thin
from ..words import did_you_mean
from . import safetensors
from .config import check_length, checked, json_object, parsed, plain, read_card, read_text
from .disk.header import Entry
from .disk.held import ChangedError, Held
from .disk.settled import Standing, settled
from .find import Location, locate
from .formats.alphas import SAID, Alphas, alpha_keys, by_part, common_config, header_says
from .formats.flat import is_flat, read_flat
from .formats.kohya.reading import (
    is_kohya,
    kohya_cut,
    kohya_factors,
    kohya_keys,
    kohya_names,
    kohya_plan,
)
from .formats.mlx import RANKS, is_mlx, mlx_factors, mlx_keys, mlx_plan
from .formats.pickled import unpickled
from .formats.portable import is_portable, portable_plan
from .peft_keys import Plan, Slot, Tensors, make_plan, plain_keys
from .remote.file import UrlFile, held
from .remote.place import Place


class _Record:
    """What the header and the config say; shared by all files in which they are the same."""

    def __init__(
        self, config: Mapping[str, Any], plan: Plan, entries: Mapping[str, Entry], size: int
    ) -> None:
        self.config = MappingProxyType(dict(config))
        self.slots = plan.slots
        self.entries = entries
        self.size = size
        self.packings: Mapping[str, Packing] = {}
        self.names: Mapping[str, str] = {}
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
        said = dict(self.config), plan, dict(self.entries), self.size
        return _Record, said, {"packings": dict(self.packings), "names": dict(self.names)}

    @cached_property
    def digest(self) -> str:
        """Of all that it says."""
        said = repr((dict(self.entries), dict(self.slots), dict(self.config)))
        return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()


_records: weakref.WeakValueDictionary[bytes, _Record] = weakref.WeakValueDictionary()


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
        record: _Record,
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
        record = _Record(adapter.config, Plan(slots, tuple(adapter.extras)), {}, 0)
        record.names = names
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
        return _assembled(tensors, self._record, self._where, device, dtype, self._wide)

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


def open_files(
    source: str | os.PathLike[str],
    alpha: float | None,
    revision: str | None,
    allow_pickle: bool,
    wide: torch.dtype | None,
    tolerance: float | None,
) -> AdapterFile:
    """An adapter that has files of its own; see `open_adapter`, which knows libraries as well."""
    with safetensors.file_errors(str(source)):
        place, weights, text, nbytes = _opened_together(source, revision, allow_pickle)
    if place.weights.suffix != ".safetensors":
        _check_alpha(alpha, text is not None, str(place.weights))
        config = None if text is None else parsed(text, str(place.config))
        where = str(place.weights)
        tensors, record = _in_memory(unpickled(weights), config, alpha, where, tolerance)
        adapter = _assembled(tensors, record, where, wide=wide)
        return AdapterFile.of(adapter, place.path, nbytes, record.names)
    return _open_safetensors(place, weights, text, alpha, nbytes, wide, tolerance)


def is_adapter_file(path: Place) -> bool:
    """Whether a file is an adapter that is read, by its header alone."""
    try:
        open_files(path, None, None, False, torch.float32, 0.0)
    except (FileError, MismatchError):
        return False
    return True


@thin
def from_state_dict(
    tensors: Mapping[str, Tensor],
    alpha: float | None,
    config: Any,
    device: Any,
    dtype: torch.dtype | None,
    tolerance: float | None,
) -> Adapter:
    """The adapter of a state dict in memory, copied; see `load`."""
    where = "state dict"
    copies = {k: _copied(k, t) for k, t in tensors.items()}
    if is_mlx(copies):
        copies, said = mlx_keys(copies, where), None if config is None else plain(config)
        shapes = {k: (t.dtype, tuple(t.shape)) for k, t in copies.items()}
        plan, found_config = mlx_plan(shapes, said, alpha, where)
        return _assembled(copies, _Record(found_config, plan, {}, 0), where, device, dtype)
    _check_alpha(alpha, config is not None, where)
    checked_config = None if config is None else checked(plain(config), where)
    found, record = _in_memory(copies, checked_config, alpha, where, tolerance)
    return _assembled(found, record, where, device, dtype)


def _opened_together(
    source: str | os.PathLike[str], revision: str | None, allow_pickle: bool
) -> tuple[Location, Held | UrlFile, str | None, int]:
    """Where an adapter is, its tensors' file, its config's text, and the bytes of both.

    Both files were at their paths at one moment: where an overwrite came between, once more.
    """

    def look(standing: Standing) -> tuple[Location, Held | UrlFile, str | None, int]:
        place = locate(source, revision=revision, allow_pickle=allow_pickle)
        config = None if place.config is None else held(place.config)
        weights = held(place.weights)
        if config is not None:
            check_length(config.place, config.size)
        raw = None if config is None else config.read()
        if isinstance(weights, UrlFile):
            weights.begin()  # the header, which is to be of the same moment
        together = config is None or (config.is_there() and weights.is_there())
        if not together or not standing.is_there():
            raise ChangedError(f"{source} changes faster than it can be opened; try again")
        text = None if place.config is None else read_text(place.config, raw)
        return place, weights, text, weights.size + (0 if config is None else config.size)

    return settled(source, look)


def _open_safetensors(
    place: Location,
    weights: Held | UrlFile,
    text: str | None,
    alpha: float | None,
    nbytes: int,
    wide: torch.dtype | None,
    tolerance: float | None,
) -> AdapterFile:
    where = str(place.weights)
    f = weights.file()
    header, size = safetensors.header_bytes(f, where)
    hashed = hashlib.sha256(header)
    hashed.update(repr((size, alpha, text, tolerance)).encode("utf-8", "surrogatepass"))
    digest = hashed.digest()
    record = _records.get(digest)
    if record is None:
        found, metadata = safetensors.parse_header(header, size, where)
        if is_flat(found):
            tensors = safetensors.read_tensors(f, found.items(), where)
            flat = read_flat(dict(zip(found, tensors, strict=True)), metadata, where)
            return AdapterFile.of(flat.adapter(alpha, where), place.path, nbytes)
        if is_portable(metadata):
            record = _of_roles(found, metadata, size, alpha, where)
        elif is_mlx(found):
            said = None if text is None else json_object(text, str(place.config))
            record = _of_mlx(found, said, alpha, where, metadata, size)
        elif is_kohya(found):
            record = _of_kohya(found, f, alpha, where, metadata, size, tolerance)
            _check_bare(text is not None, where)
            if any(slot.tolerance is not None for slot in record.slots.values()):
                numbers = safetensors.read_tensors(f, record.entries.items(), where)
                by_key = dict(zip(record.entries, numbers, strict=True))
                cut = _assembled(by_key, record, where, wide=wide)
                return AdapterFile.of(cut, place.path, nbytes, record.names)
            if alpha_keys(_shapes(found)):
                return AdapterFile(place.path, record, nbytes, file=weights, wide=wide)
        else:
            config = None if text is None else parsed(text, str(place.config))
            alphas, config = _said(metadata, config, alpha, where)
            entries, config = plain_keys(found, config, where)
            shapes = _shapes(entries)
            beside = alpha_keys(shapes)
            alphas = replace(alphas, modules=_numbers(f, beside, entries, where))
            plan = make_plan(shapes, config, alphas, where)
            kept = common_config(alphas.parts.values()) if config is None else config
            record = _Record({**kept, **_origin(metadata)}, plan, entries, size)
            if beside:  # which the header does not tell apart
                return AdapterFile(place.path, record, nbytes, file=weights, wide=wide)
        _records[digest] = record
    return AdapterFile(place.path, record, nbytes, file=weights, wide=wide)


def _said(
    metadata: Mapping[str, str], config: dict[str, Any] | None, alpha: float | None, where: str
) -> tuple[Alphas, dict[str, Any] | None]:
    """What is said of α, and the config: that in the header, where there is no other."""
    header, inside = header_says(metadata, where)
    parts = {} if inside is None else by_part(inside, where)
    if config is None and parts.keys() == {""}:
        config = parts[""]
    _check_alpha(alpha, config is not None, where)
    alphas = Alphas(alpha, header, parts=parts)
    if config is not None:
        try:
            alphas.check_header(config)
        except MismatchError as e:
            raise MismatchError(f"{where}: {e}") from e
    return alphas, config


def _of_roles(
    found: Mapping[str, Entry],
    metadata: Mapping[str, str],
    size: int,
    alpha: float | None,
    where: str,
) -> _Record:
    if alpha is not None:
        raise MismatchError(f"{where}: a portable file has its scales; leave out alpha=")
    told = portable_plan(found, metadata, where)
    record = _Record(told.config, told.plan, told.entries, size)
    record.packings = told.packings
    return record


def _of_mlx(
    found: Mapping[str, Entry],
    said: Mapping[str, Any] | None,
    alpha: float | None,
    where: str,
    metadata: Mapping[str, str],
    size: int,
) -> _Record:
    entries = mlx_keys(found, where)
    plan, config = mlx_plan(_shapes(entries), said, alpha, where, metadata)
    others = {key: text for key, text in metadata.items() if key != RANKS}
    return _Record({**config, **_origin(others)}, plan, entries, size)


def _of_kohya(
    found: Mapping[str, Entry],
    file: safetensors.Opened,
    alpha: float | None,
    where: str,
    metadata: Mapping[str, str],
    size: int,
    tolerance: float | None,
) -> _Record:
    entries = kohya_keys(found)
    shapes = _shapes(entries)
    # kohya-ss's resizing writes this in the place of a number, and each module's α beside it.
    told = {key: text for key, text in metadata.items() if text != "Dynamic"}
    numbers = _numbers(file, alpha_keys(shapes), entries, where)
    alphas = Alphas(alpha, header_says(told, where)[0], numbers)
    plan, config = kohya_plan(shapes, alphas, where, tolerance)
    record = _Record({**config, **_origin(metadata)}, plan, entries, size)
    record.names = kohya_names(found)
    return record


def _shapes(entries: Mapping[str, Entry]) -> Tensors:
    return {key: (entry.dtype, entry.shape) for key, entry in entries.items()}


def _numbers(
    file: safetensors.Opened, keys: Mapping[str, str], entries: Mapping[str, Entry], where: str
) -> dict[str, Tensor]:
    """{module: α} of tensors of one number."""
    if not keys:
        return {}
    wanted = [(key, entries[key]) for key in keys.values()]
    return dict(zip(keys, safetensors.read_tensors(file, wanted, where), strict=True))


def _check_bare(has_config: bool, where: str) -> None:
    if has_config:
        raise MismatchError(
            f"{where}: its tensors are in the form of kohya-ss, which says its scales itself, and "
            "there is an adapter_config.json as PEFT's have: remove the config, or give the "
            "tensors alone"
        )


def _origin(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a header says beside the format, such as how the adapter came about: `save` has it."""
    told = {key: text for key, text in metadata.items() if key not in ("format", *SAID)}
    return {ORIGIN: {"metadata": told}} if told else {}


def _in_memory(
    tensors: dict[str, Tensor],
    config: dict[str, Any] | None,
    alpha: float | None,
    where: str,
    tolerance: float | None,
) -> tuple[dict[str, Tensor], _Record]:
    """Tensors under the keys of a record, and that."""
    is_kohyas, names = is_kohya(tensors), kohya_names(tensors)
    if is_kohyas:
        tensors = kohya_keys(tensors)
    else:
        tensors, config = plain_keys(tensors, config, where)
    shapes = {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()}
    alphas = Alphas(alpha, modules={s: tensors[key] for s, key in alpha_keys(shapes).items()})
    if is_kohyas:
        plan, said = kohya_plan(shapes, alphas, where, tolerance)
        _check_bare(config is not None, where)
        config = said
    else:
        plan = make_plan(shapes, config, alphas, where)
    record = _Record(config or {}, plan, {}, 0)
    record.names = names
    return tensors, record


def _check_alpha(alpha: float | None, has_config: bool, where: str) -> None:
    if has_config and alpha is not None:
        raise MismatchError(f"{where}: there is a config, which has its own α; leave out alpha=")


def _assembled(
    tensors: dict[str, Tensor],
    record: _Record,
    where: str,
    device: Any = None,
    dtype: torch.dtype | None = None,
    wide: torch.dtype | None = None,
) -> Adapter:
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
    narrow = next((t.dtype for t in tensors if t.dtype.itemsize == 1), None)
    if narrow is not None and dtype is None:
        if wide is None:
            raise MismatchError(
                f"{where}: module {path!r} is {narrow}: load it with dtype=torch.float32"
            )
        dtype = wide
    try:
        A, B = _factors(tensors, slot)
        return LowRank(A.to(dtype or A.dtype), B.to(dtype or B.dtype), slot.scale)
    except MismatchError as e:
        raise MismatchError(f"{where}: module {path!r}: {e}") from e


def _factors(tensors: Sequence[Tensor], slot: Slot) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) of a module's tensors, in the order of `slot.keys`."""
    A, B = tensors[:2]
    layout = slot.layout
    if slot.form == "kohya":
        parts = dict(zip(slot.keys, tensors, strict=True))
        if slot.tolerance is not None:
            u = kohya_cut(parts, slot.tolerance).to(dtype=slot.dtype)
            return u.A, u.B
        A, B = kohya_factors(parts)
    if slot.form == "mlx":
        A, B = mlx_factors(A, B, slot)
    if layout.kind == "expert":
        assert layout.expert is not None
        e, count = layout.expert
        if count > 1 and len(A) > slot.rank:  # a portable file has each expert by itself
            # Contiguous copies, so that one expert does not keep all of them alive.
            A = A[e * slot.rank : (e + 1) * slot.rank].clone()
            B = B[:, e::count].contiguous()
    return A.flatten(1), B.flatten(1)


def _moved(u: LowRank, device: Any, dtype: torch.dtype | None) -> LowRank:
    return u if device is None and dtype is None else u.to(device, dtype)


def _copied(key: str, t: Tensor) -> Tensor:
    if not isinstance(t, Tensor):
        raise MismatchError(f"state dict: {key!r} must be a tensor, not {type(t).__name__}")
    return t.detach().clone(memory_format=torch.contiguous_format)
