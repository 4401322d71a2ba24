"""Folders of many adapters, and vLoRA's subspace folders among them.

vLoRA (vlora-dev on PyPI; Share, arXiv:2602.06043) flattens every A and B of a module and keeps,
per side, a mean, K components and K numbers per adapter: vec(A_i) = mean + loadings_i · components.
The components are float, or NF4 (arXiv:2305.14314): two 4-bit indices a byte, the first in the
high half, and a float scale per block of the flattened components. Its files hold no α.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...adapter import Adapter
from ...errors import FileError, MismatchError, UnknownNameError
from ...lowrank import LowRank
from ...parts import PREFIX
from ...words import did_you_mean
from ..config import SUBSPACE_NAME, json_object, read_text
from ..find import adapters_at, is_adapter, is_subspace, name_of
from ..peft import load
from ..peft_keys import check_gathered, plain_key
from ..safetensors import open_file, read_entries, read_tensors

# The sixteen levels of NF4 at the four digits to which vLoRA keeps them.
_NF4 = (
    *(-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0),
    *(0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.723, 1.0),
)


def load_many(
    path: str | os.PathLike[str],
    *,
    alpha: float | None = None,
    allow_pickle: bool = False,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> Mapping[str, Adapter]:
    """All adapters of a folder, by name, each read when it is asked for.

    Args:
        path: a vLoRA folder (float or NF4), a folder of PEFT directories, or one PEFT directory.
        alpha: α of the adapters; needed for a vLoRA folder and where there are no configs.
        allow_pickle, device, dtype: as in `load`.

    Returns:
        {name: Adapter}; the name is vLoRA's task, or the directory's. An adapter is built anew at
        every access, so that a large folder never lies in memory as a whole.

    Raises:
        FileError: no adapters there, or a damaged file; naming file and key.

    Example:
        >>> import tempfile, torch
        >>> import lorafold as lf
        >>> from lorafold.files import load_many
        >>> folder = tempfile.mkdtemp()
        >>> a = lf.Adapter({"q_proj": lf.LowRank(torch.randn(2, 8), torch.randn(4, 2))})
        >>> lf.save(a, folder + "/sql"); lf.save(0.5 * a, folder + "/poems")
        >>> sorted(load_many(folder))
        ['poems', 'sql']
    """
    folder = Path(path)
    if is_subspace(folder):
        return _Subspace(folder, alpha, device, dtype)
    if not folder.is_dir():
        raise FileError(f"{folder} is no directory")
    places = adapters_at(folder)
    if places == [folder] and not is_adapter(folder):
        raise FileError(f"{folder} holds neither adapters nor a vLoRA subspace")
    options = {"alpha": alpha, "allow_pickle": allow_pickle, "device": device, "dtype": dtype}
    return _Folder({name_of(place): place for place in places}, options)


class _Folder(Mapping[str, Adapter]):
    """PEFT directories in one folder."""

    def __init__(self, places: Mapping[str, Path], options: Mapping[str, Any]) -> None:
        self._places, self._options = places, options

    def __getitem__(self, name: str) -> Adapter:
        if name not in self._places:
            raise UnknownNameError(f"no adapter {name!r}; {did_you_mean(name, self._places)}")
        return load(self._places[name], **self._options)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class _Subspace(Mapping[str, Adapter]):
    """The tasks of a vLoRA folder; the shared tensors are read once."""

    def __init__(
        self, folder: Path, alpha: float | None, device: Any, dtype: torch.dtype | None
    ) -> None:
        self._where = folder / SUBSPACE_NAME
        if alpha is None:
            raise FileError(f"{folder}: a vLoRA folder does not hold α; give alpha=")
        self._folder, self._alpha, self._device, self._dtype = folder, alpha, device, dtype
        meta = _meta(self._where)
        self._layers: list[str] = meta["layer_names"]
        self._files = self._task_files(meta)
        self._rank: int = meta["rank"]
        self._shapes: dict[str, dict[str, Any]] = {
            side: meta.get(f"shapes_{side}") or {} for side in "ab"
        }
        self._packed = meta.get("format") == "nf4_packed"
        self._block = meta.get("nf4_block_size", 64)
        names = ("subspace_nf4", "subspace_float") if self._packed else ("subspace",)
        self._shared: dict[str, Tensor] = {}
        for name in names:
            self._shared |= _read_all(folder / f"{name}.safetensors")

    def __getitem__(self, name: str) -> Adapter:
        if name not in self._files:
            raise UnknownNameError(f"no task {name!r}; {did_you_mean(name, self._files)}")
        file = self._files[name]
        twins = [n for n, f in self._files.items() if f == file]
        if len(twins) > 1:
            raise FileError(
                f"{self._where}: the tasks {' and '.join(map(repr, twins))} were written to one "
                f"file {file.name!r}, so only one of them survived, and which one is not recorded"
            )
        loadings = _read_all(file)
        modules = {}
        for layer in self._layers:
            A, B = (self._factor(layer, side, loadings, file) for side in "ab")
            try:
                u = LowRank(A, B, self._alpha / A.shape[0])
            except MismatchError as e:
                raise MismatchError(f"{file}: module {layer!r}: {e}") from e
            modules[plain_key(layer).removeprefix(PREFIX)] = u.to(self._device, self._dtype)
        return Adapter(modules)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def _task_files(self, meta: Mapping[str, Any]) -> dict[str, Path]:
        files = {}
        for task in meta["task_ids"]:
            stem = (meta.get("task_filenames") or {}).get(task, task)
            file = f"task_{stem}.safetensors"
            # The name comes from a file, so it must not lead out of the folder.
            if Path(file).name != file:
                raise FileError(f"{self._where}: {stem!r} is no file name")
            files[task] = self._folder / file
        return files

    def _factor(self, layer: str, side: str, loadings: Mapping[str, Tensor], file: Path) -> Tensor:
        mean = self._tensor(f"{layer}.mean_{side}")
        coefficients = _tensor(loadings, f"{layer}.loadings_{side}", file)
        components = self._components(layer, side, len(coefficients), mean.numel())
        shape = self._shapes[side].get(layer)
        if shape is None:
            shape = (self._rank, -1) if side == "a" else (-1, self._rank)
        try:
            flat = mean.float().flatten() + coefficients.float() @ components.float()
            return flat.reshape(tuple(shape))
        except RuntimeError as e:
            raise MismatchError(f"{file}: the sizes of {layer!r} do not fit together: {e}") from e

    def _components(self, layer: str, side: str, k: int, width: int) -> Tensor:
        if not self._packed:
            return self._tensor(f"{layer}.components_{side}")
        packed = self._tensor(f"{layer}.packed_{side}")
        scales = self._tensor(f"{layer}.scales_{side}")
        levels = torch.tensor(_NF4)
        values = levels[torch.stack([packed >> 4, packed & 15], 1).long()]
        try:
            blocks = values.reshape(len(scales), self._block) * scales[:, None]
            return blocks.flatten()[: k * width].reshape(k, width)
        except RuntimeError as e:
            raise MismatchError(
                f"{self._where}: the packed components of {layer!r} have another size than "
                f"{k} × {width}: {e}"
            ) from e

    def _tensor(self, key: str) -> Tensor:
        return _tensor(self._shared, key, self._where)


def _meta(path: Path) -> dict[str, Any]:
    meta = json_object(read_text(path), path)
    for field, kind in (("layer_names", list), ("task_ids", list), ("rank", int)):
        if not isinstance(meta.get(field), kind):
            raise FileError(f"{path}: {field!r} is missing or of the wrong kind")
    return meta


def _read_all(path: Path) -> dict[str, Tensor]:
    entries = read_entries(path)
    check_gathered(((key, entry.shape) for key, entry in entries.items()), str(path))
    with open_file(path) as f:
        return dict(zip(entries, read_tensors(f, entries.items(), path), strict=True))


def _tensor(tensors: Mapping[str, Tensor], key: str, where: Path) -> Tensor:
    if key not in tensors:
        raise FileError(f"{where}: the tensor {key!r} is missing")
    return tensors[key]
