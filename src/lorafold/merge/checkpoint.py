"""A model's folder written anew, with some of its tensors changed and everything else as it was.

The safetensors files keep their names and what is in each of them. Where no dtype changes, a file
keeps its header byte for byte and what is not changed is copied as bytes; so one pass over the
bytes is all it takes, and one tensor at a time all that is held.

Weights in other formats would be those of the unchanged model: they are left out, and named.
"""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FileError, MismatchError
from ..files import safetensors
from ..files.atomic import CREATE_FLAGS, write_all
from ..files.base import CONFIG_NAME, INDEX_SUFFIX, BaseFiles
from ..files.config import as_json, json_object, read_text
from ..files.disk.header import Entry, header_of
from ..files.replacing import Kind

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# How the weights of a model are called. Tensors under other names are somebody's data.
_WEIGHTS_FILE = re.compile(r"(.*[._-])?(model|weights|consolidated)([._-].*)?\.safetensors")
_OTHERS_OF_OURS = ("adapter_model.", "training_state.", "shard-")
# What transformers writes beside the weights: none of it may stay with another model's.
_SIDE_FILES = re.compile(
    r"config\.json|generation_config\.json|.*\.safetensors\.index\.json|tokenizer\.(json|model)"
    r"|tokenizer_config\.json|vocab\.(json|txt)|special_tokens_map\.json|added_tokens\.json"
    r"|merges\.txt|chat_template\..*|(pre)?processor_config\.json"
)


def model_kind(files: Iterable[Path]) -> Kind:
    """What a merge may take the place of: a folder of these files' names, or of the usual ones."""
    names = "".join(f"|{re.escape(file.name)}" for file in files)
    weights = re.compile(
        f"(?!{'|'.join(map(re.escape, _OTHERS_OF_OURS))})({_WEIGHTS_FILE.pattern}{names})"
    )

    def known(path: Path) -> bool:
        found = [name for name in os.listdir(path) if name.endswith(".safetensors")]
        return bool(found) and all(map(weights.fullmatch, found))

    return Kind(
        "a model in safetensors", known, re.compile(f"{weights.pattern}|{_SIDE_FILES.pattern}")
    )


Change = Callable[[Tensor], Tensor]
Advance = Callable[[int, str], None]  # bytes, and the file that they are from

_CHUNK = 1 << 24  # bytes
_CANNOT = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV, errno.EBADF}
# Whole models, wherever in the folder; and weights that stand beside the safetensors files.
_MODELS = (".pth", ".gguf", ".onnx", ".onnx_data", ".h5", ".msgpack", ".ot", ".ckpt")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".bin.index.json", INDEX_SUFFIX, "adapter_config.json")


@dataclass(frozen=True)
class Edits:
    """What becomes of a base's files.

    Args:
        changes: {key: from the tensor to what is stored in its place}: of the same shape, and of
            the dtype that `stored_dtype` says.
        dtype: of all floating point tensors of 16 bits or more; their own when None.
        added: {new key: the key of the tensor that it starts from}; beside it, in its file.
        fields: set in the model's configuration.
    """

    changes: Mapping[str, Change] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    added: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)


def write_checkpoint(base: BaseFiles, folder: Path, edits: Edits, advance: Advance) -> list[str]:
    """Write the base's folder into another one that is there and empty.

    Args:
        base: of a folder.
        folder: where it goes.
        advance: told of every step.

    Returns:
        The files of the base that were left out, as weights of another form.

    Raises:
        FileError: a file can't be read or was changed.
        MismatchError: a number is beyond the range of `dtype`.
    """
    for file in base.files:
        rewrite(file, folder / file.name, edits, advance)
    done = {file.name for file in base.files}
    if base.index is not None:
        _write_index(base.index, folder / base.index.name, done, edits)
        done.add(base.index.name)
    left_out = []
    for path, name in _others(Path(base.path)):
        if name in done:
            continue
        if not os.path.isfile(path) or _is_left_out(name):
            left_out.append(name)
        elif name == CONFIG_NAME and (edits.dtype is not None or edits.fields):
            _write_config(path, folder / name, edits)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
    return left_out


def stored_dtype(own: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that a tensor of dtype `own` is written in."""
    return dtype if dtype is not None and own in FLOATS else own


def narrowed(t: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    """The tensor in another dtype.

    Raises:
        MismatchError: a finite number in it is not finite there.
    """
    result = t.to(dtype)
    if result is not t and bool((t.isfinite() & ~result.isfinite()).any()):
        raise MismatchError(out_of_range(key, dtype))
    return result


def out_of_range(key: str, dtype: torch.dtype) -> str:
    """The message."""
    name = str(dtype).removeprefix("torch.")
    return f"{key!r} has numbers beyond the range of {name}: write bfloat16 or float32 instead"


def same(W: Tensor, W1: Tensor) -> bool:
    """Whether W1 is W, in its own dtype; NaN is NaN."""
    if W.shape != W1.shape:
        return False
    W = W.to(W1.dtype)
    if W.dtype not in FLOATS:  # not every kind of code can be compared
        one, other = (t.contiguous().reshape(-1).view(torch.uint8) for t in (W, W1))
        return torch.equal(one, other)
    holes = W.isnan()
    if not bool(holes.any()):
        return torch.equal(W, W1)
    return bool(((W == W1) | (holes & W1.isnan())).all())


# One file


def rewrite(source: Path, target: Path, edits: Edits, advance: Advance) -> None:
    """Write one safetensors file anew; see `write_checkpoint`."""
    dtype = edits.dtype
    with safetensors.open_file(source) as f:
        header, size = safetensors.header_bytes(f, source)
        entries, metadata = safetensors.parse_header(header, size, source)
        head, order = len(header).to_bytes(8, "little") + header, list(entries.items())
        new = [(key, entries[like]) for key, like in edits.added.items() if like in entries]
        order += new
        if new or any(stored_dtype(entry.dtype, dtype) != entry.dtype for _, entry in order):
            # Wide numbers first, so that all of them are aligned.
            order.sort(key=lambda item: -stored_dtype(item[1].dtype, dtype).itemsize)
            stored = [
                (k, safetensors.CODES[stored_dtype(e.dtype, dtype)], e.shape) for k, e in order
            ]
            head = header_of(stored, metadata or None, target)
        out = os.open(target, CREATE_FLAGS, 0o666)
        try:
            write_all(out, head)
            for key, entry in order:
                _write(f, out, key, entry, source, edits.changes.get(key), dtype)
                advance(entry.stop - entry.start, source.name)
        finally:
            os.close(out)


def _write(
    f: FileIO,
    out: int,
    key: str,
    entry: Entry,
    source: Path,
    change: Change | None,
    dtype: torch.dtype | None,
) -> None:
    wanted = stored_dtype(entry.dtype, dtype)
    if change is not None:
        (t,) = safetensors.read_tensors(f, [(key, entry)], source)
        _write_tensor(out, change(t))
    elif wanted == entry.dtype:
        _copy(f, out, entry.start, entry.stop, f"{source}: {key!r}")
    else:
        size = entry.dtype.itemsize
        count = _CHUNK // size
        for at in range(0, math.prod(entry.shape), count):
            n = min(count, math.prod(entry.shape) - at)
            start = entry.start + at * size
            piece = Entry(entry.code, (n,), start, start + n * size)
            (t,) = safetensors.read_tensors(f, [(key, piece)], source)
            _write_tensor(out, narrowed(t, wanted, key))


def _write_tensor(out: int, t: Tensor) -> None:
    if t.numel():
        write_all(out, t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _copy(f: FileIO, out: int, start: int, stop: int, what: str) -> None:
    """Append bytes of a file to another; within the system where it can (Linux)."""
    while start < stop and hasattr(os, "copy_file_range"):
        try:
            n = os.copy_file_range(f.fileno(), out, min(stop - start, _CHUNK), offset_src=start)
        except OSError as e:
            if e.errno not in _CANNOT:
                raise
            break
        if not n:
            break
        start += n
    f.seek(start)
    while start < stop:
        data = f.read(min(stop - start, _CHUNK))
        if not data:
            raise FileError(f"{what} ends too early: the file is cut off or was changed")
        write_all(out, data)
        start += len(data)


# The other files


def _others(top: Path) -> Iterator[tuple[Path, str]]:
    """(path, name in the folder) of all files, and of what else is no folder."""
    for folder, inner, names in os.walk(top):
        # Hidden folders are caches and version control. Linked ones may lead in circles.
        links = [name for name in inner if Path(folder, name).is_symlink()]
        inner[:] = sorted(name for name in inner if name[0] != "." and name not in links)
        for name in sorted(names):
            path = Path(folder, name)
            yield path, path.relative_to(top).as_posix()
        for name in links:
            yield Path(folder, name), f"{Path(folder, name).relative_to(top).as_posix()}/"


def _is_left_out(name: str) -> bool:
    # In folders of their own are other parts, such as a sentence encoder's dense layer.
    return name.endswith(_MODELS if "/" in name else _MODELS + _WEIGHTS)


def _write_index(source: Path, target: Path, names: set[str], edits: Edits) -> None:
    if edits.dtype is None and not edits.added:
        shutil.copyfile(source, target)
        return
    index = json_object(read_text(source), source)
    for key, like in edits.added.items():
        index["weight_map"][key] = index["weight_map"][like]
    metadata = index.get("metadata")
    if isinstance(metadata, dict) and "total_size" in metadata:
        metadata["total_size"] = sum(_data_bytes(target.parent / name) for name in names)
    target.write_text(as_json(index), encoding="utf-8")


def _data_bytes(path: Path) -> int:
    return sum(entry.stop - entry.start for entry in safetensors.read_entries(path).values())


def _write_config(source: Path, target: Path, edits: Edits) -> None:
    config = json_object(read_text(source), source)
    if edits.dtype is not None:
        name = str(edits.dtype).removeprefix("torch.")
        _set_in_parts(
            config, {"dtype": name, "torch_dtype": name}, lambda old: isinstance(old, str)
        )
    if isinstance(config, dict):
        # A flag that a part of the model has of its own says the same as the whole's.
        _set_in_parts(config, edits.fields, lambda _: True)
        config |= edits.fields
    target.write_text(as_json(config), encoding="utf-8")


def _set_in_parts(config: Any, fields: Mapping[str, Any], may: Callable[[Any], bool]) -> None:
    """Change fields where a config, or that of a part of the model, has them."""
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        if key in fields and may(value):
            config[key] = fields[key]
        elif key.endswith("_config"):
            _set_in_parts(value, fields, may)
