"""A library: many adapters on shared bases, each with its stated error.

What is on the disk is described in docs/formats.md. A `Library` reads adapters back one by one;
`add`, `remove` and `refold` change the folder in one atomic step and this object with it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapter import Adapter
from ..collection.batch import (
    Block,
    decompose,
    joined_factors,
    squared_norms,
    squared_residuals,
)
from ..collection.sources import named_handles
from ..errors import MismatchError, RefusedError, UnknownNameError
from ..lowrank import LowRank
from ..words import did_you_mean
from .coding.bases import Basis, projected, read_basis, residual
from .coding.flat_part import code_parts, flattened, read_side
from .coding.record import StoredPart, decode, stored_parts
from .store.manifest import config_of, read_layout
from .store.shard import Shard
from .store.store import Store


@dataclass(frozen=True)
class Projection:
    """What the present bases make of an adapter.

    Args:
        loadings: module path → coordinates in the shared sides: (R_U, R_V) where both are shared,
            (out, R_V) or (R_U, in) where one is; (k_A,) of A and (k_B,) of B, a pair, in the form
            `flat`. Modules without shared bases are left out.
        error: ‖ΔŴ − ΔW‖ / ‖ΔW‖ over all modules, before directions or residuals of its own.
    """

    loadings: dict[str, Tensor | tuple[Tensor, Tensor]]
    error: float


class Library(Mapping[str, Adapter]):
    """Adapters in one folder (or in memory), by name. Made by `fold` and `Library.open`.

    `lib["sql"]` gives the adapter back, its factors float32 with scale 1 unless it is stored
    exactly. Reading is safe while other processes change the folder: this object keeps the state
    it opened until it changes the library itself or is opened anew.

    Example:
        >>> import torch, lorafold as lf
        >>> u = lf.LowRank(torch.randn(2, 8), torch.randn(4, 2))
        >>> lib = lf.fold({"sql": lf.Adapter({"q_proj": u})}, tolerance=0.1)
        >>> lib.names, lib.error("sql") <= 0.1
        (['sql'], True)
    """

    def __init__(self, store: Store, device: Any = None, dtype: torch.dtype | None = None) -> None:
        self._store = store
        self._device, self._dtype = device, dtype
        self._indices: dict[str, np.ndarray] = {}
        self._pieces: dict[tuple[str, str], Tensor] = {}
        self._known_sides: dict[tuple[tuple[str, str], ...], Basis] = {}
        self._refresh()

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, device: Any = None, dtype: torch.dtype | None = None
    ) -> Library:
        """Open a folder that `fold` wrote.

        Args:
            path: the folder. device, dtype: of the adapters it gives.

        Raises:
            FileError: no library there, or a damaged one.
        """
        return cls(Store.open(path), device, dtype)

    def _refresh(self) -> None:
        self._manifest: dict[str, Any] = self._store.manifest
        self._shards: dict[str, Shard] = self._store.shards
        self._modules: list[dict[str, Any]] = self._manifest["modules"]
        self._number = {m["path"]: j for j, m in enumerate(self._modules)}
        # Shards never change, so what was decoded of one stays right while the library names it.
        self._indices = {n: at for n, at in self._indices.items() if n in self._shards}
        self._known_sides = {
            k: b for k, b in self._known_sides.items() if all(s in self._shards for s, _ in k)
        }
        self._pieces = {key: piece for key, piece in self._pieces.items() if key[0] in self._shards}
        self.__dict__.pop("_known_nbytes", None)

    # What is in it

    @property
    def names(self) -> list[str]:
        """The adapters' names, in the order in which they came."""
        return list(self._manifest["adapters"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._manifest["adapters"])

    def __len__(self) -> int:
        return len(self._manifest["adapters"])

    def __contains__(self, name: object) -> bool:
        return name in self._manifest["adapters"]

    def __repr__(self) -> str:
        where = f" at {self.path}" if self.path else ""
        return f"Library({len(self)} adapters, {self.nbytes:,} bytes{where})"

    @property
    def path(self) -> str | None:
        """The folder; None in memory."""
        return None if self._store.path is None else str(self._store.path)

    @property
    def base_model(self) -> str | None:
        """The base that the adapters belong to."""
        base = self._manifest.get("base_model")
        return None if base is None else str(base)

    @property
    def tolerance(self) -> float | None:
        """The bound that every adapter keeps unless it has its own; None when folded by size."""
        value = self._manifest["options"].get("tolerance")
        return None if value is None else float(value)

    @property
    def nbytes(self) -> int:
        """Bytes of the library on disk (or as it would be written)."""
        return self._store.nbytes

    def error(self, name: str) -> float:
        """‖ΔŴ − ΔW‖ / ‖ΔW‖ of an adapter, measured on what was written."""
        return float(self._entry(name)["error"])

    def config(self, name: str) -> dict[str, Any]:
        """An adapter's configuration, as its file had it."""
        return config_of(self._manifest["config"], self._entry(name))

    def entry(self, name: str) -> dict[str, Any]:
        """What the manifest says of an adapter (a copy)."""
        return copy.deepcopy(self._entry(name))

    def _entry(self, name: str) -> dict[str, Any]:
        try:
            entry: dict[str, Any] = self._manifest["adapters"][name]
        except (KeyError, TypeError):
            raise UnknownNameError(
                f"no adapter {name!r} in the library; {did_you_mean(str(name), self)}"
            ) from None
        return entry

    def stats(self) -> dict[str, Any]:
        """Bytes, errors and forms, in total and per module; see docs/fold.md."""
        from .stats import library_stats

        return library_stats(self)

    # Reading

    def __getitem__(self, name: str) -> Adapter:
        entry = self._entry(name)
        modules = {self._modules[j]["path"]: self._update(j, entry) for j in self._present(entry)}
        layouts = {
            m["path"]: read_layout(m["layout"])
            for m in self._modules
            if "layout" in m and m["path"] in modules
        }
        layouts |= {path: read_layout(fields) for path, fields in entry.get("layouts", {}).items()}
        adapter = Adapter(
            modules,
            self.extras(name),
            self.config(name),
            self.base_model,
            layouts,
        )
        return adapter if self._dtype is None else adapter.to(dtype=self._dtype)

    def update(self, name: str, path: str) -> LowRank:
        """One module of one adapter, read alone.

        Raises:
            UnknownNameError: no such adapter, or it does not have the module.
        """
        entry = self._entry(name)
        j = self._number.get(path)
        if j is None or j not in self._present(entry):
            hint = did_you_mean(path, [self._modules[k]["path"] for k in self._present(entry)])
            raise UnknownNameError(f"{name!r} has no module {path!r}; {hint}")
        u = self._update(j, entry)
        return u if self._dtype is None else u.to(dtype=self._dtype)

    def parts(self, name: str, path: str) -> list[StoredPart]:
        """One module of one adapter in the coordinates of the shared sides, nothing multiplied out.

        Returns:
            Parts that add up to the update; none where the adapter lacks the module.

        Raises:
            UnknownNameError: no such adapter.
        """
        entry, j = self._entry(name), self._number.get(path)
        if j is None or not self.record_size(j, entry):
            return []
        out, inner = self._modules[j]["shape"]
        return stored_parts(
            self.record(j, entry), (out, inner), functools.partial(self.basis, j), self._device
        )

    def extras(self, name: str) -> dict[str, Tensor]:
        """What the adapter's file held beside its factors, bit for bit."""
        entry = self._entry(name)
        shard = self._shards[entry["shard"]]
        return {
            key: shard.read_tensor(t).to(self._device) for key, t in entry.get("extras", {}).items()
        }

    def _present(self, entry: Mapping[str, Any]) -> list[int]:
        at = self._index(entry["shard"])
        row = entry["row"]
        present: list[int] = np.flatnonzero(at[:, row + 1] > at[:, row]).tolist()
        return present

    def _index(self, shard: str) -> np.ndarray:
        if shard not in self._indices:
            self._indices[shard] = self._shards[shard].read("at").astype(np.int64)
        return self._indices[shard]

    def record(self, j: int, entry: Mapping[str, Any]) -> bytes:
        """An adapter's bytes at module number j."""
        at, row = self._index(entry["shard"]), entry["row"]
        return self._shards[entry["shard"]].read_bytes(
            f"m{j}", int(at[j, row]), int(at[j, row + 1])
        )

    def record_size(self, j: int, entry: Mapping[str, Any]) -> int:
        """Bytes of an adapter at module number j; 0 where it lacks the module."""
        at, row = self._index(entry["shard"]), entry["row"]
        return int(at[j, row + 1] - at[j, row]) if j < len(at) else 0

    def basis_size(self, shard: str, tensor: str) -> int:
        """Bytes of one stored piece of a basis."""
        return int(self._shards[shard].shape(tensor)[0])

    def _update(self, j: int, entry: Mapping[str, Any]) -> LowRank:
        out, inner = self._modules[j]["shape"]
        basis = functools.partial(self.basis, j)
        return decode(self.record(j, entry), (out, inner), basis, self._device)

    def basis(self, j: int, side: str, number: int, count: int | None = None) -> Tensor:
        """A shared basis of module number j: (d, R) for "U" and "V", (1 + k, D) for "A" and "B".

        Args:
            count: its first columns only (for "A", "B": the factor's rank).
        """
        out, inner = self._modules[j]["shape"]
        d = {"U": out, "V": inner, "A": inner * (count or 0), "B": out * (count or 0)}[side]
        pieces = []
        for shard, tensor, _ in self._modules[j]["bases"][f"{side}{number}"]:
            if (shard, tensor) not in self._pieces:
                record = self._shards[shard].read_bytes(tensor)
                read = read_side(record, d, side, self._device).rows if side in "AB" else None
                self._pieces[shard, tensor] = (
                    read_basis(record, d, side, self._device).columns if read is None else read
                )
            pieces.append(self._pieces[shard, tensor])
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 0 if side in "AB" else 1)
        return whole if side in "AB" or count is None else whole[:, :count]

    def sides(self, j: int) -> dict[str, list[Basis]]:
        """The shared bases of module number j by side, "U" and "V", in order of their numbers."""
        found: dict[str, list[Basis]] = {"U": [], "V": []}
        for name, segments in self._modules[j].get("bases", {}).items():
            if name[0] in found:
                key = tuple((shard, tensor) for shard, tensor, _ in segments)
                if key not in self._known_sides:
                    self._known_sides[key] = Basis(self.basis(j, name[0], int(name[1:])), b"", 0)
                found[name[0]].append(self._known_sides[key])
        return found

    # Comparing

    def project(self, adapter: Any) -> Projection:
        """The adapter in the coordinates of the present bases; nothing is stored.

        Args:
            adapter: an `Adapter` or a path.

        Raises:
            MismatchError: it has a module of another shape.
            RefusedError: ΔW algebra would be wrong.
        """
        from .addition import flat_bases, nearest_sides
        from .change import one_handle

        _, handle = one_handle(adapter)
        if handle.refusal:
            raise RefusedError(handle.refusal)
        loadings: dict[str, Tensor | tuple[Tensor, Tensor]] = {}
        lost = total = 0.0
        for path in handle.shapes:
            u = handle.read(path).to(self._device)
            self.check_shape(path, u.shape)
            block = block_of(u)
            norm = float((block.S**2).sum())
            total += norm
            j = self._number.get(path)
            if j is not None and (flat := flat_bases(self, j, u.rank)):
                f = joined_factors(block.members, [(u.B, u.A, u.scale)])
                parts = code_parts(f, flat.A, flat.B, 0, flat.wide)
                lost += float(squared_residuals(f.B, f.A, parts.B, parts.A))
                a, b = (x.loadings(flattened(f, s))[0] for x, s in ((flat.A, "A"), (flat.B, "B")))
                loadings[path] = a, b
                continue
            sides = None if j is None else nearest_sides(self, j, block)
            if sides is None:
                lost += norm
                continue
            (_, U), (_, V) = sides
            f = block.factors()
            left, right = projected(f, U, V)
            lost += float(squared_norms(*residual(f, left, right, U, V)))
            loadings[path] = (left @ right)[0]
        return Projection(loadings, (lost / total) ** 0.5 if total > 0 else 0.0)

    def check_shape(self, path: str, shape: tuple[int, int]) -> None:
        """Raise a `MismatchError` if the library has the module in another shape."""
        j = self._number.get(path)
        if j is not None and tuple(self._modules[j]["shape"]) != tuple(shape):
            raise MismatchError(
                f"module {path!r} is {tuple(self._modules[j]['shape'])} in the library and "
                f"{tuple(shape)} in the adapter"
            )

    def verify(self, sources: Any = None) -> dict[str, float]:
        """Check the shards' checksums, and the errors against the sources where these are given.

        Args:
            sources: as for `fold`; each name must be in the library.

        Returns:
            name → error: measured against the sources, or as stored.

        Raises:
            FileError: a damaged shard. ToleranceError: an error above its bound, or an exactly
                stored adapter that is not the source's.
        """
        self._store.verify()
        if sources is None:
            return {name: self.error(name) for name in self.names}
        from .change import checked_error

        return {
            name: checked_error(self, name, handle)
            for name, handle in named_handles(sources).items()
        }

    # Changing

    def add(
        self,
        adapter: Any,
        name: str | None = None,
        *,
        replace: bool = False,
        tolerance: float | None = None,
        form: str | None = None,
    ) -> float:
        """Add an adapter; what is stored of the others does not change by a bit.

        Within the tolerance its coordinates in the present bases are all that is stored; otherwise
        the bases get new directions, shared from then on, or it keeps a residual of its own,
        whichever takes fewer bytes. In a library folded by size it is only projected.

        Args:
            adapter: an `Adapter` or a path. name: its name; the path's last component when None.
            replace: take the place of an adapter with that name.
            tolerance: its own bound; the library's when None.
            form: "svd" keeps it off the shared bases, "exact" keeps its tensors untouched.

        Returns:
            The error it came out at.

        Raises:
            MismatchError: the name is taken, or shapes or bases disagree.
        """
        from .change import add_to

        return add_to(self, adapter, name, replace=replace, tolerance=tolerance, form=form)

    def remove(self, name: str) -> None:
        """Take an adapter out; its name is free again.

        Raises:
            UnknownNameError: no such name.
        """
        from .change import remove_from

        remove_from(self, name)

    def refold(self, tolerance: float | None = None, sources: Any = None, **options: Any) -> None:
        """Fold everything anew, from the sources or from what is stored.

        Args:
            tolerance: the new bound; the library's own when no option is given.
            sources: {name: source} or paths for every name in the library. Without them the old
                error counts: the new and the old one together must keep the bound.
            options: as for `fold` (form, rank, energy, bits, memory, device, progress).

        Raises:
            ToleranceError: a bound that can't be met without the sources; nothing has changed.
        """
        from .change import refold_all

        refold_all(self, tolerance, sources, options)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Library:
        """Write the library to a folder (a copy, where it already has one).

        Returns:
            The library opened from there.

        Raises:
            FileError: something is at `path` and `overwrite` is False.
        """
        return Library(self._store.save(path, overwrite=overwrite), self._device, self._dtype)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Library:
        """The same library, giving its adapters on `device` in `dtype`."""
        return Library(self._store, device or self._device, dtype or self._dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Library:
        return self.to()  # what is stored never changes, so both read the same

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is None:
            raise MismatchError("a library in memory can't be pickled: save it to a folder first")
        return _opened, (self.path, self._device, self._dtype)

    def close(self) -> None:
        """Let go of the files."""
        self._store.close()

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # For the other files of this folder

    @property
    def store(self) -> Store:
        """The shards and the manifest."""
        return self._store

    @property
    def modules(self) -> list[dict[str, Any]]:
        """The manifest's module entries, in order (not to be changed)."""
        return self._modules

    @cached_property
    def _known_nbytes(self) -> int:
        return sum(int(e["file_bytes"]) for e in self._manifest["adapters"].values())

    @property
    def file_bytes(self) -> int:
        """Bytes of the adapters' files as they were when folded."""
        return self._known_nbytes

    @contextlib.contextmanager
    def changing(self) -> Iterator[Any]:
        """A transaction on the store; this object follows it when it commits."""
        with self._store.transaction() as t:
            self._refresh()
            yield t
        self._refresh()


def _opened(path: str, device: Any, dtype: torch.dtype | None) -> Library:
    return Library.open(path, device=device, dtype=dtype)


def block_of(u: LowRank) -> Block:
    """One update as a block."""
    B, A = (u.scale * u.B.float())[None], u.A.float()[None]
    return Block(np.zeros(1, np.int64), *decompose(B, A))
