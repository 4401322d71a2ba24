"""The doors to adapters: what a user gives, opened by its header, or read as a whole.

An adapter is a PEFT directory, its file, an id on the Hub, or it lies with others in one folder, as
LIB:NAME (a library's) or SUB:TASK (of a vLoRA folder). A path that exists is a path.

Libraries are `fold`'s, which stands on these files. So one on the disk is opened by the public name
that the package hands out, looked up when it is met.
"""

from __future__ import annotations

import hashlib
import os
import pkgutil
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter, on_base
from ..errors import FileError, MismatchError, UnknownNameError
from ..roles.fused import Packing
from ..roles.onto import onto
from ..roles.roles import Tables
from ..thin import thin
from ..words import did_you_mean
from . import safetensors
from .adapter_file import AdapterFile, Record, assembled
from .config import check_length, plain, read_text
from .disk.held import ChangedError, Held
from .disk.settled import Standing, settled
from .find import (
    GGUF_SUFFIX,
    Location,
    adapters_at,
    in_library,
    in_subspace,
    is_adapter,
    is_subspace,
    locate,
    name_of,
)
from .formats.diffusion.bases import by_base
from .formats.gguf.base import gguf_base
from .formats.gguf.header import read_head
from .formats.gguf.reading import GGUF, BaseNeededError, gguf_found
from .formats.pickled import unpickled
from .formats.readers import format_of
from .formats.reading import Source, Stored
from .formats.running import running_parts
from .formats.vlora import Subspace, Tasks
from .remote.file import UrlFile, held
from .remote.place import Place, UrlPath, is_dir, place_of

_records: weakref.WeakValueDictionary[bytes, Record] = weakref.WeakValueDictionary()
_LIBRARY = f"{__package__.partition('.')[0]}:Library"


@dataclass(frozen=True)
class _Options:
    """What a caller says of a file: its α, what to cut it to, its format, and of GGUF its base."""

    alpha: float | None
    tolerance: float | None
    form: str | None
    base: Any = None


def open_adapter(
    source: str | os.PathLike[str] | Adapter,
    *,
    alpha: float | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
    format: str | None = None,  # noqa: A002
    base: Any = None,
) -> AdapterFile:
    """Open an adapter without reading its tensors.

    Args:
        source: a PEFT or MLX directory, one holding a single such, a safetensors or GGUF file,
            LIB:NAME for one in a library, SUB:TASK for one in a vLoRA folder, a URL of any of
            these, an id on the Hub (when huggingface_hub is installed), or an `Adapter` in memory.
            A path that exists is a path, and what looks like a path is never asked for on the Hub,
            unless
            `revision` is given.
        alpha: α, where there is no `adapter_config.json`; its rank is then the factors' own.
        revision: a branch, tag or commit, for a Hub id.
        allow_pickle: read `adapter_model.bin` too (with `weights_only=True`, into memory).
        dtype: what factors of 8 bits are read in; those of other dtypes stay as they are.
        tolerance: ‖error‖ / ‖ΔW‖ in [0, 1) to which the modules of a LoHa or LoKr are cut whose
            factors multiply to full rank; such a file is read when it is opened.
        format: what the file is in ("peft", "portable", "flat", "mlx", "gguf", "kohya", "comfy",
            "diffusers"), where its keys are those of two; by default by what is in it.
        base: of a GGUF file, its base: a folder with its config.json, a model, or its
            configuration, which say what its modules are called and how many heads it has.

    Raises:
        FileError: nothing there, or no adapter of a kind that is read; naming file and key.
        UnknownNameError: a library or vLoRA folder has no such name.
        MismatchError: the file contradicts itself or its config; naming file and key.
    """
    if isinstance(source, Adapter):
        return AdapterFile.of(source)
    if isinstance(source, str | os.PathLike):
        text = os.fsdecode(source)
        found = in_library(text)
        if found is not None:
            with open_library(found[0]) as library:
                nbytes = library.entry(found[1])["file_bytes"]
                return AdapterFile.of(library[found[1]], place_of(text), nbytes)
        found = in_subspace(text)
        if found is not None:
            return AdapterFile.of(load_many(found[0], alpha=alpha)[found[1]], place_of(text))
    options = _Options(alpha, tolerance, format, base)
    return _open_files(source, options, revision, allow_pickle, dtype)


def open_library(path: str | os.PathLike[str]) -> Any:
    """The `Library` at a folder."""
    return pkgutil.resolve_name(_LIBRARY).open(path)


@thin
def load(
    source: str | os.PathLike[str] | Adapter | Mapping[str, Tensor] | nn.Module,
    *,
    alpha: float | None = None,
    config: Any = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    device: Any = None,
    dtype: torch.dtype | None = None,
    base: Any = None,
    tables: Tables = (),
    base_model: str | None = None,
    tolerance: float | None = None,
    format: str | None = None,  # noqa: A002
) -> Adapter:
    """Read an adapter.

    Not for: folders of many adapters (`lorafold.files.load_many`, or `fold`).

    Args:
        source: what `open_adapter` takes; or what is in memory, and copied: the state dict of an
            adapter, a `PeftModel`, or a transformers model with adapters, for its active one.
        alpha: α, where there is no config.
        config: of a state dict: a mapping, or PEFT's LoraConfig.
        revision: a branch, tag or commit, for a Hub id.
        allow_pickle: read `adapter_model.bin` too (with `weights_only=True`).
        device, dtype: where the tensors go, and in what dtype the factors.
        base: a base of the same shapes to put it on, by roles: a model, its configuration or
            folder, or module paths. A file that was saved with `format="portable"` says how its
            fused modules pack their parts; of others their own base's folder does. A file of
            kohya-ss's has its flat names told apart by the base's modules, and a GGUF file takes
            the names and heads of its own base.
        tables: of modules whose roles are not known; see `lf.roles`.
        base_model: what its base is called, where two adapters of one base spell it differently.
        tolerance: ‖error‖ / ‖ΔW‖ in [0, 1) to which the modules of a LoHa or LoKr are cut whose
            factors multiply to full rank; without it such a file is refused.
        format: as `open_adapter` takes it.

    Returns:
        An `Adapter`; every tensor in memory of its own, bit for bit as in the file.

    Raises:
        FileError: nothing there, or nothing that is read; naming file and key.
        MismatchError: the file contradicts itself, or holds NaN; naming file, module and tensor.
            Or it does not fit the `base`.
        RefusedError: it holds an extra tensor that has no place in the `base`.

    Examples:
        >>> import tempfile, torch
        >>> import lorafold as lf
        >>> a = lf.Adapter({"layers.0.q_proj": lf.LowRank(torch.randn(2, 8), torch.randn(4, 2))})
        >>> folder = tempfile.mkdtemp() + "/adapter"
        >>> lf.save(a, folder)
        >>> lf.load(folder).digest == a.digest
        True
    """
    if isinstance(source, nn.Module):
        if config is not None:
            raise MismatchError("config= goes with a state dict; a model has its own")
        source, config = running_parts(source)
    if isinstance(source, Mapping) and not isinstance(source, Adapter):
        options = _Options(alpha, tolerance, format)
        adapter, names = _of_state_dict(source, config, options, device, dtype)
        adapter = adapter if base_model is None else on_base(adapter, base_model)
        return _placed(adapter, names, base, None, tables)
    if config is not None:
        raise MismatchError("config= goes with a state dict; a file has its own")

    def look(_: Standing) -> tuple[AdapterFile, Adapter]:
        opened = open_adapter(
            source,
            alpha=alpha,
            revision=revision,
            allow_pickle=allow_pickle,
            tolerance=tolerance,
            format=format,
            base=base,
        )
        return opened, opened.load(device, dtype)

    opened, adapter = settled(source, look)  # which one overwritten in place is not
    if base_model is not None:
        adapter = on_base(adapter, base_model)
    if opened.is_on_base:
        return adapter
    return _placed(adapter, opened.names, base, opened.packings or None, tables)


def _placed(
    adapter: Adapter,
    names: Mapping[str, str],
    base: Any,
    packings: Mapping[str, Packing] | None,
    tables: Tables,
) -> Adapter:
    """The adapter on a base: by the flat names of its file where it has such, else by roles."""
    if base is None:
        return adapter
    if names:
        return by_base(adapter, names, base)
    return onto(adapter, base, packings=packings, tables=tables)


def load_many(
    path: str | os.PathLike[str],
    *,
    alpha: float | None = None,
    allow_pickle: bool = False,
    device: Any = None,
    dtype: torch.dtype | None = None,
    base: Any = None,
) -> Mapping[str, Adapter]:
    """All adapters of a folder, by name, each read when it is asked for.

    Args:
        path: a vLoRA folder (float or NF4), a folder of PEFT directories, or one PEFT directory.
        alpha: α of the adapters; needed for a vLoRA folder and where there are no configs.
        allow_pickle, device, dtype: as in `load`.
        base: of GGUF files, as `open_adapter` takes it.

    Returns:
        {name: Adapter}; the name is vLoRA's task, or the directory's. An adapter is built anew at
        every access, so that a large folder never lies in memory as a whole.

    Raises:
        FileError: no adapters there, or a damaged file; naming file and key.

    Examples:
        >>> import tempfile, torch
        >>> import lorafold as lf
        >>> from lorafold.files import load_many
        >>> folder = tempfile.mkdtemp()
        >>> a = lf.Adapter({"q_proj": lf.LowRank(torch.randn(2, 8), torch.randn(4, 2))})
        >>> lf.save(a, folder + "/sql"); lf.save(0.5 * a, folder + "/poems")
        >>> sorted(load_many(folder))
        ['poems', 'sql']
    """
    folder = place_of(path)
    folder = folder.at_once() if isinstance(folder, UrlPath) else folder
    if is_subspace(folder):
        return Tasks(Subspace.at(folder), alpha, device, dtype)
    if not is_dir(folder):
        raise FileError(f"{folder} is no directory")
    places = adapters_at(folder)
    if places == [folder] and not is_adapter(folder):
        raise FileError(f"{folder} holds neither adapters nor a vLoRA subspace")
    options = {"alpha": alpha, "allow_pickle": allow_pickle, "device": device, "dtype": dtype}
    return _Folder({name_of(place): place for place in places}, options, base)


def _open_files(
    source: str | os.PathLike[str],
    options: _Options,
    revision: str | None,
    allow_pickle: bool,
    wide: torch.dtype | None,
) -> AdapterFile:
    """An adapter that has files of its own."""
    with safetensors.file_errors(str(source)):
        place, weights, text, nbytes = _opened_together(source, revision, allow_pickle)
    if place.weights.suffix == ".safetensors":
        return _open_safetensors(place, weights, text, nbytes, options, wide)
    where = str(place.weights)
    if place.weights.suffix == GGUF_SUFFIX:
        return AdapterFile(
            place.path, _of_gguf(weights, where, options), nbytes, file=weights, wide=wide
        )
    tensors, record = _in_memory(unpickled(weights), where, options, None, text, place.config)
    adapter = assembled(tensors, record, where, wide=wide)
    return AdapterFile.of(adapter, place.path, nbytes, record.names)


def is_adapter_file(path: Place) -> bool:
    """Whether a file is an adapter that is read, by its header alone."""
    try:
        _open_files(path, _Options(None, 0.0, None), None, False, torch.float32)
    except BaseNeededError:
        return True
    except (FileError, MismatchError):
        return False
    return True


def _of_gguf(weights: Held | UrlFile, where: str, options: _Options) -> Record:
    """What the head of a GGUF file says."""
    if options.form not in (None, GGUF.name):
        raise MismatchError(
            f"{where}: a GGUF file is in the form of {GGUF.said}: give format={GGUF.name!r}, or "
            "none"
        )
    if options.alpha is not None:
        raise MismatchError(f"{where}: a GGUF file has its scales; leave out alpha=")
    file = weights.file()
    head = read_head(
        lambda start, n: safetensors.read_range(file, start, n, where), weights.size, where
    )
    base = None if options.base is None else gguf_base(options.base)
    return Record(gguf_found(head, base, where), head.entries, weights.size)


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
    nbytes: int,
    options: _Options,
    wide: torch.dtype | None,
) -> AdapterFile:
    where = str(place.weights)
    f = weights.file()
    header, size = safetensors.header_bytes(f, where)
    hashed = hashlib.sha256(header)
    hashed.update(repr((size, text, options)).encode("utf-8", "surrogatepass"))
    digest = hashed.digest()
    record = _records.get(digest)
    if record is not None:
        return AdapterFile(place.path, record, nbytes, file=weights, wide=wide)
    entries, metadata = safetensors.parse_header(header, size, where)
    source = Source(
        {key: Stored(key, entry.dtype, entry.shape) for key, entry in entries.items()},
        where,
        lambda keys: safetensors.read_tensors(f, ((key, entries[key]) for key in keys), where),
        lambda key, *rows: safetensors.read_rows(f, (key, entries[key]), rows, where),
        metadata,
        text=text,
        config_place=str(place.config),
        alpha=options.alpha,
        tolerance=options.tolerance,
    )
    found = format_of(source, options.form).found(source)
    taken = {k: replace(entries[t.key], shape=t.shape) for k, t in found.tensors.items()}
    record = Record(found, taken, size)
    if any(slot.tolerance is not None for slot in record.slots.values()):
        numbers = safetensors.read_tensors(f, taken.items(), where)
        cut = assembled(dict(zip(taken, numbers, strict=True)), record, where, wide=wide)
        return AdapterFile.of(cut, place.path, nbytes, record.names)
    if not found.by_numbers:  # else equal headers may be of different contents
        _records[digest] = record
    return AdapterFile(place.path, record, nbytes, file=weights, wide=wide)


def _in_memory(
    tensors: Mapping[str, Tensor],
    where: str,
    options: _Options,
    given: dict[str, Any] | None = None,
    text: str | None = None,
    config_place: Place | None = None,
) -> tuple[dict[str, Tensor], Record]:
    """Tensors under the keys of a record, and that."""
    source = Source(
        {key: Stored(key, t.dtype, tuple(t.shape)) for key, t in tensors.items()},
        where,
        lambda keys: [tensors[key] for key in keys],
        lambda key, start, stop: tensors[key][start:stop].clone(),
        text=text,
        given=given,
        config_place=where if config_place is None else str(config_place),
        alpha=options.alpha,
        tolerance=options.tolerance,
    )
    found = format_of(source, options.form).found(source)
    taken = {key: tensors[t.key].reshape(t.shape) for key, t in found.tensors.items()}
    return taken, Record(found, {}, 0)


def _of_state_dict(
    tensors: Mapping[str, Tensor],
    config: Any,
    options: _Options,
    device: Any,
    dtype: torch.dtype | None,
) -> tuple[Adapter, Mapping[str, str]]:
    """The adapter of a state dict in memory, copied; and the names of its modules there."""
    where = "state dict"
    copies = {k: _copied(k, t) for k, t in tensors.items()}
    given = None if config is None else plain(config)
    found, record = _in_memory(copies, where, options, given)
    return assembled(found, record, where, device, dtype), record.names


def _copied(key: str, t: Tensor) -> Tensor:
    if not isinstance(t, Tensor):
        raise MismatchError(f"state dict: {key!r} must be a tensor, not {type(t).__name__}")
    return t.detach().clone(memory_format=torch.contiguous_format)


class _Folder(Mapping[str, Adapter]):
    """PEFT directories in one folder."""

    def __init__(self, places: Mapping[str, Place], options: Mapping[str, Any], base: Any) -> None:
        self._places, self._options, self._base = places, options, base

    def __getitem__(self, name: str) -> Adapter:
        if name not in self._places:
            raise UnknownNameError(f"no adapter {name!r}; {did_you_mean(name, self._places)}")
        place = self._places[name]
        base = self._base if place.suffix == GGUF_SUFFIX else None
        return load(place, base=base, **self._options)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
