"""vLoRA's folders, of many adapters in one subspace.

vLoRA (vlora-dev on PyPI; Share, arXiv:2602.06043) flattens every A and B of a module and keeps,
per side, a mean, K components and K numbers per adapter: vec(A_i) = mean + loadings_i · components.
The components are float, or NF4 (arXiv:2305.14314): two 4-bit indices a byte, the first in the
high half, and a float scale per block of the flattened components. Its files hold no α.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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
from ..peft_keys import check_gathered, plain_key
from ..remote.place import Place, is_file, place_of, size_of
from ..safetensors import is_finite, open_place, read_entries, read_tensors

# The sixteen levels of NF4 at the four digits to which vLoRA keeps them.
_NF4 = (
    *(-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0),
    *(0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.723, 1.0),
)
_ORTHONORMAL = 1e-3  # that the product of two components may be off, as vLoRA writes float32


class Tasks(Mapping[str, Adapter]):
    """The tasks of a vLoRA folder as adapters."""

    def __init__(
        self, space: Subspace, alpha: float | None, device: Any, dtype: torch.dtype | None
    ) -> None:
        if alpha is None:
            raise FileError(f"{space.folder}: a vLoRA folder does not hold α; give alpha=")
        self._space, self._alpha, self._device, self._dtype = space, alpha, device, dtype

    def __getitem__(self, name: str) -> Adapter:
        file, loadings = self._space.loadings(name)
        modules = {}
        for layer in self._space.layers:
            A, B = (self._space.factor(layer, side, loadings, file) for side in "ab")
            try:
                u = LowRank(A, B, self._alpha / A.shape[0])
            except MismatchError as e:
                raise MismatchError(f"{file}: module {layer!r}: {e}") from e
            modules[plain_key(layer).removeprefix(PREFIX)] = u.to(self._device, self._dtype)
        return Adapter(modules)

    def __iter__(self) -> Iterator[str]:
        return iter(self._space.files)

    def __len__(self) -> int:
        return len(self._space.files)


@dataclass(frozen=True)
class Subspace:
    """A vLoRA folder: what all tasks share, read once, and a file of loadings for each.

    Args:
        folder: it. layers: its modules. files: {task: file}. rank: of every update.
        shapes: {side: {layer: shape of the factor}}, where it says them.
        shared: {key: tensor}. block: of NF4, the numbers of a block; None for floats.
    """

    folder: Place
    layers: list[str]
    files: Mapping[str, Place]
    rank: int
    shapes: Mapping[str, Mapping[str, Any]]
    shared: Mapping[str, Tensor]
    block: int | None

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> Subspace:
        """The folder at a path.

        Raises:
            FileError: damaged; naming file and key.
        """
        folder = place_of(path)
        where = folder / SUBSPACE_NAME
        meta = _meta(where)
        packed = meta.get("format") == "nf4_packed"
        names = ("subspace_nf4", "subspace_float") if packed else ("subspace",)
        shared: dict[str, Tensor] = {}
        for name in names:
            shared |= _read_all(folder / f"{name}.safetensors")
        shapes = {side: _object(meta, f"shapes_{side}", where) for side in "ab"}
        block = meta.get("nf4_block_size", 64)
        if type(block) is not int or block < 1:
            raise FileError(f"{where}: nf4_block_size must be at least 1, found {block!r:.40}")
        files = _task_files(meta, folder)
        return cls(
            folder,
            meta["layer_names"],
            files,
            meta["rank"],
            shapes,
            shared,
            block if packed else None,
        )

    @property
    def _where(self) -> Place:
        return self.folder / SUBSPACE_NAME

    def loadings(self, name: str) -> tuple[Place, dict[str, Tensor]]:
        """A task's file and what is in it.

        Raises:
            UnknownNameError: no such task. FileError: it is damaged, or another's as well.
        """
        if name not in self.files:
            raise UnknownNameError(f"no task {name!r}; {did_you_mean(name, self.files)}")
        file = self.files[name]
        twins = [n for n, f in self.files.items() if f == file]
        if len(twins) > 1:
            raise FileError(
                f"{self._where}: the tasks {' and '.join(map(repr, twins))} were written to one "
                f"file {file.name!r}, so only one of them survived, and which one is not recorded"
            )
        return file, _read_all(file)

    def factor(self, layer: str, side: str, loadings: Mapping[str, Tensor], file: Place) -> Tensor:
        """A (side "a") or B of a task's module, rebuilt."""
        mean = self._tensor(f"{layer}.mean_{side}")
        coefficients = _tensor(loadings, f"{layer}.loadings_{side}", file)
        components = self.components(layer, side, coefficients.numel())
        shape = self.shapes[side].get(layer)
        if shape is None:
            shape = (self.rank, -1) if side == "a" else (-1, self.rank)
        try:
            flat = mean.float().flatten() + coefficients.float() @ components.float()
            return flat.reshape(tuple(shape))
        except (RuntimeError, TypeError, ValueError) as e:
            raise MismatchError(f"{file}: the sizes of {layer!r} do not fit together: {e}") from e

    def components(self, layer: str, side: str, k: int | None = None) -> Tensor:
        """(K, numbers of a factor) of one side of a module; of NF4 the first k."""
        if self.block is None:
            return self._tensor(f"{layer}.components_{side}")
        packed = self._tensor(f"{layer}.packed_{side}").flatten()
        scales = self._tensor(f"{layer}.scales_{side}").flatten()
        width = self._tensor(f"{layer}.mean_{side}").numel()
        what = f"{self._where}: the packed components of {layer!r}"
        if packed.dtype != torch.uint8 or not scales.is_floating_point():
            raise MismatchError(f"{what} are {packed.dtype}, and their scales {scales.dtype}")
        levels = torch.tensor(_NF4, dtype=torch.float32)
        try:
            values = levels[torch.stack([packed >> 4, packed & 15], 1).long()]
            blocks = values.reshape(len(scales), self.block) * scales[:, None]
            k = blocks.numel() // max(width, 1) if k is None else k
            if -(-k * width // self.block) != len(scales):
                raise RuntimeError(f"{len(scales)} blocks of {self.block}")
            return blocks.flatten()[: k * width].reshape(k, width)
        except (RuntimeError, TypeError, IndexError) as e:
            raise MismatchError(f"{what} have another size than {k} × {width}: {e}") from e

    def facts(self) -> dict[str, Any]:
        """What it holds, in JSON's types."""
        counts = {len(self.components(layer, side)) for layer in self.layers for side in "ab"}
        there = {name: size_of(f) for name, f in self.files.items() if is_file(f)}
        return {
            "adapters": len(self.files),
            "modules": len(self.layers),
            "rank": self.rank,
            "components": sorted(counts),
            "stored": "floats" if self.block is None else f"NF4 in blocks of {self.block}",
            "tasks": [{"name": name, "bytes": there.get(name)} for name in self.files],
        }

    def problems(self) -> list[str]:
        """What is wrong with it, a line each: numbers that are none, sizes, directions.

        The components of a side are orthonormal where they are floats; NF4 rounds them.
        """
        found: list[str] = []
        for key, t in self.shared.items():
            if not is_finite(t):
                found.append(f"{self.folder}: {key!r} holds NaN or infinity")
        for layer in self.layers:
            for side in "ab":
                found += self._told(self._check_side, layer, side)
        for name in self.files:
            found += self._told(self._check_task, name)
        return found

    def _told(self, check: Callable[..., list[str]], *args: str) -> list[str]:
        try:
            return check(*args)
        except (FileError, MismatchError) as e:
            return [str(e)]

    def _check_side(self, layer: str, side: str) -> list[str]:
        C = self.components(layer, side).double()
        width = self._tensor(f"{layer}.mean_{side}").numel()
        what = f"{self.folder}: components_{side} of {layer!r}"
        if C.ndim != 2 or C.shape[1] != width:
            return [f"{what} are {tuple(C.shape)}, not (K, {width})"]
        if self.block is not None or not bool(C.isfinite().all()):
            return []
        off = float((C @ C.T - torch.eye(len(C), dtype=C.dtype)).abs().max()) if len(C) else 0.0
        return [f"{what} are not orthonormal, off by {off:.2g}"] if off > _ORTHONORMAL else []

    def _check_task(self, name: str) -> list[str]:
        file, loadings = self.loadings(name)
        found = [
            f"{file}: {key!r} holds NaN or infinity"
            for key, t in loadings.items()
            if not is_finite(t)
        ]
        for layer in self.layers:
            for side in "ab":
                self.factor(layer, side, loadings, file)
        return found

    def _tensor(self, key: str) -> Tensor:
        return _tensor(self.shared, key, self._where)


def _task_files(meta: Mapping[str, Any], folder: Place) -> dict[str, Place]:
    where = folder / SUBSPACE_NAME
    files = {}
    names = _object(meta, "task_filenames", where)
    for task in meta["task_ids"]:
        stem = names.get(task, task)
        file = f"task_{stem}.safetensors"
        # The name comes from a file, so it must not lead out of the folder.
        if Path(file).name != file:
            raise FileError(f"{where}: {stem!r} is no file name")
        files[task] = folder / file
    return files


def _object(meta: Mapping[str, Any], field: str, where: Place) -> dict[str, Any]:
    found = meta.get(field) or {}
    if not isinstance(found, dict):
        raise FileError(f"{where}: {field!r} must be an object, found {found!r:.40}")
    return found


def _meta(path: Place) -> dict[str, Any]:
    meta = json_object(read_text(path), path)
    for field, kind in (("layer_names", list), ("task_ids", list), ("rank", int)):
        value = meta.get(field)
        texts = not isinstance(value, list) or all(isinstance(name, str) for name in value)
        if type(value) is not kind or not texts:
            raise FileError(f"{path}: {field!r} is missing or of the wrong kind")
    return meta


def _read_all(path: Place) -> dict[str, Tensor]:
    entries = read_entries(path)
    check_gathered(((key, entry.shape) for key, entry in entries.items()), str(path))
    with open_place(path) as f:
        return dict(zip(entries, read_tensors(f, entries.items(), path), strict=True))


def _tensor(tensors: Mapping[str, Tensor], key: str, where: Place) -> Tensor:
    if key not in tensors:
        raise FileError(f"{where}: the tensor {key!r} is missing")
    return tensors[key]
