"""What `Live.save` wrote, read back: enough to train on without a specification."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...adapter import Adapter
from ...errors import FileError, MismatchError
from ...files import load
from ...files.config import STATE_NAME, json_object
from ...files.disk.sealed import check_seal, read_whole
from ...layers.sites import Place
from ...layers.swap import device_of
from ...prefixes import Prefixes
from ...words import one_line
from ..run.factors import Factors, Modulation, Pair
from .loadings import Loaded

HEADER = "lorafold"  # the key of the header's text
VERSION = 2


@dataclass(frozen=True)
class Training:
    """A state of training: of each module its own tensors, and what a header says of all.

    Args:
        path: the file. header: kind ("lora", "pissa" or "loadings"), metadata (the user's), scales
            {module: s}, dropout, and of "pissa" select. tensors: {module: {name: tensor}}.
    """

    path: Path
    header: Mapping[str, Any]
    tensors: Mapping[str, dict[str, Tensor]]

    @classmethod
    def at(cls, path: Path) -> Training:
        """The file at a path.

        Raises:
            FileError: it can't be read, or is damaged. MismatchError: NaN or infinity in it.
        """
        metadata, flat = read_whole(path)
        header = json_object(metadata.get(HEADER, "{}"), f"{path}: its header {HEADER!r}")
        _check_header(path, header, flat)
        found: dict[str, dict[str, Tensor]] = {}
        for key, value in flat.items():
            module, _, name = key.rpartition(".")
            found.setdefault(module, {})[name] = value
        return cls(path, header, found)

    @property
    def metadata(self) -> dict[str, Any]:
        """What the user kept with it."""
        return dict(self.header.get("metadata") or {})

    def factors(self, name: str, place: Place, prefixes: Prefixes) -> Factors:
        """One module's factors at a layer.

        Raises:
            MismatchError: it is not there, or lacks a tensor.
        """
        try:
            tensors, kind = self.tensors[name], self.header["kind"]
            t = {key: value.to(device_of(place.layer)) for key, value in tensors.items()}
            if kind == "pissa":
                sides, own = (t["U"], t["S"], t["Vh"]), (t["delta_s"], t["index"])
                of, select = min(place.dims), self.header["select"]
                return Modulation(place.kind, *sides, *own, directions=of, select=select)
            if kind == "loadings":
                own, rest = (t["own_A"], t["own_B"]), (t["rest_A"], t["rest_B"])
                return Loaded(place.kind, t.get("U"), t.get("V"), t["core"], own, rest)
            start = (t["A0"], t["B0"]) if "A0" in t else None
            dropout = self.header.get("dropout", 0.0)
            scale = self.header["scales"][name]
            return Pair(place.kind, t["A"], t["B"], scale, dropout, start, prefixes)
        except KeyError as e:
            raise MismatchError(
                f"{self.path} has no {e} of module {name!r}, which the adapter beside it updates"
            ) from None


@dataclass(frozen=True)
class Checkpoint:
    """An adapter with the state of its training.

    Args:
        adapter: as any reader sees it. training: the state beside it.
    """

    adapter: Adapter
    training: Training

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> Checkpoint | None:
        """What lies at a path, if it is one.

        Raises:
            FileError: it can't be read.
        """
        beside = Path(path) / STATE_NAME
        return cls(load(path), Training.at(beside)) if os.path.isfile(beside) else None


def _check_header(path: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Refuse a state of training that is not as it was written.

    Raises:
        FileError: it is damaged, or of a later version.
    """
    version = header.get("version")
    if version not in (1, VERSION):
        raise FileError(
            f"{path}: no state of training of a version that is read (1 or {VERSION}), found "
            f"{one_line(version)}"
        )
    # The first version had no seal.
    if version == VERSION:
        check_seal(path, header, tensors)
