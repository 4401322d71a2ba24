"""A library: many adapters on shared bases, each with its stated error.

What is on the disk is described in docs/formats.md. A `Library` reads adapters back one by one;
`add`, `remove` and `refold` change the folder in one atomic step and this object with it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import MismatchError
from ..files.remote.place import everywhere
from ..lowrank import LowRank
from ..words import Keyed, Table
from .addition import projection
from .change import add_to, refold_all
from .checking import Checks, Verifying, checked
from .contents import Contents, Stored
from .options import Kept, Refolding
from .stats import adapter_rows, entry_record, library_html, library_stats
from .store.compaction import remove
from .store.store import Store
from .store.turns import TIMEOUT

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Projection:
    """What the present bases make of an adapter.

    Not for: storing it; `Library.add` does, and may bring directions that make the error smaller.

    Args:
        loadings: module path → coordinates in the shared sides: (R_U, R_V) where both are shared,
            (out, R_V) or (R_U, in) where one is; (k_A,) of A and (k_B,) of B, a pair, in the form
            `flat`. Modules without shared bases are left out.
        error: ‖ΔŴ − ΔW‖ / ‖ΔW‖ over all modules, before directions or residuals of its own.
        errors: module path → the same of that module; 1 where there are no shared bases, 0 for a
            zero update.
    """

    loadings: dict[str, Tensor | tuple[Tensor, Tensor]]
    error: float
    errors: dict[str, float]


class Library(Keyed, Table, Mapping[str, Adapter]):
    """Adapters in one folder (or in memory), by name. Made by `fold` and `Library.open`.

    `lib["sql"]` gives the adapter back, its factors float32 with scale 1 unless it is stored
    exactly. Reading is safe while other processes change the folder: this object keeps the state
    it opened until it changes the library itself or is opened anew. Where several threads share
    it, each call sees one state; several calls that must see the same go to a `copy.copy` of it.

    Not for: a file that other programs read: `lf.save(lib[name], path)` and `unfold` write PEFT's.

    Examples:
        >>> import torch, lorafold as lf
        >>> u = lf.LowRank(torch.randn(2, 8), torch.randn(4, 2))
        >>> lib = lf.fold({"sql": lf.Adapter({"q_proj": u})}, tolerance=0.1)
        >>> lib.names, lib.error("sql") <= 0.1
        (['sql'], True)
    """

    def __init__(self, store: Store, device: Any = None, dtype: torch.dtype | None = None) -> None:
        self._contents = Contents(store, device)
        self._dtype = dtype

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        timeout: float = TIMEOUT,
    ) -> Library:
        """Open a folder that `fold` wrote.

        Where files of it are damaged or missing, that is warned of, and it gives the adapters that
        don't need them; `entry(name)["problem"]` is said of those in a lost shard.

        Args:
            path: the folder, or its URL. device, dtype: of the adapters it gives.
            timeout: seconds that a change waits for its turn among others.

        Raises:
            FileError: no library there, or its manifest is damaged.
        """
        lib = cls(Store.open(path, timeout), device, dtype)
        lib.contents.warn_of_damage()
        return lib

    # What is in it

    @property
    def contents(self) -> Contents:
        """What it holds now, piece by piece: records, bases, an adapter's parts at a module."""
        found = self._contents
        if found.state is not found.store.state:
            found = self._contents = found.now()
        return found

    @property
    def names(self) -> list[str]:
        """The adapters' names, in the order in which they came."""
        return list(self.contents.manifest.adapters)

    def __iter__(self) -> Iterator[str]:
        return iter(self.contents.manifest.adapters)

    def __len__(self) -> int:
        return len(self.contents.manifest.adapters)

    def __contains__(self, name: object) -> bool:
        return name in self.contents.manifest.adapters

    def __dir__(self) -> list[str]:
        own = (name for name in vars(type(self)) if not name.startswith("_"))
        return [name for name in own if name != "contents"]  # that is for lorafold's own verbs

    def __repr__(self) -> str:
        where = f" at {self.path}" if self.path else ""
        return f"Library({len(self)} adapters, {self.nbytes:,} bytes{where})"

    def _repr_html_(self) -> str:
        return library_html(repr(self), self.contents)

    @property
    def path(self) -> str | None:
        """The folder; None in memory."""
        path = self.contents.store.path
        return None if path is None else str(path)

    @property
    def base_model(self) -> str | None:
        """The base that the adapters belong to."""
        return self.contents.manifest.base_model

    @property
    def tolerance(self) -> float | None:
        """The bound that every adapter keeps unless it has its own; None when folded by size."""
        return self.contents.manifest.options.tolerance

    @property
    def nbytes(self) -> int:
        """Bytes of the library on disk (or as it would be written)."""
        return self.contents.store.nbytes

    @property
    def file_bytes(self) -> int:
        """Bytes of the adapters' files as they were when folded."""
        return sum(e.file_bytes for e in self.contents.manifest.adapters.values())

    def error(self, name: str) -> float:
        """‖ΔŴ − ΔW‖ / ‖ΔW‖ of an adapter, measured on what was written."""
        return self.contents.entry(name).error

    def entry(self, name: str) -> dict[str, Any]:
        """What the manifest says of an adapter, as plain JSON types.

        Returns:
            The fields that docs/formats.md names, and bound (what its error keeps below, None when
            folded by size), ranks (the original's), bytes (its records, without what is shared);
            problem: what happened to its shard, where that is lost.
        """
        return entry_record(self.contents, name)

    def rows(self) -> list[dict[str, Any]]:
        """A record of each adapter: name, error, bound, rank, bytes, file_bytes."""
        return list(adapter_rows(self.contents))

    def stats(self) -> dict[str, Any]:
        """Bytes, errors and forms, in total and per module; see docs/fold.md."""
        return library_stats(self.contents)

    # Reading

    def __getitem__(self, name: str) -> Adapter:
        adapter = self.contents.adapter(name)
        return adapter if self._dtype is None else adapter.to(dtype=self._dtype)

    def update(self, name: str, path: str) -> LowRank:
        """One module of one adapter, read alone.

        Raises:
            UnknownNameError: no such adapter, or it does not have the module.
        """
        u = self.contents.update(name, path)
        return u if self._dtype is None else u.to(dtype=self._dtype)

    def __lorafold_handles__(self, name: str | None = None) -> dict[str, Stored]:
        """Its adapters as sources, as they are now (`collection.sources`); or the one of a name."""
        contents = self.contents.as_it_is()
        names = contents.manifest.adapters if name is None else [name]
        return {n: Stored(contents, n) for n in names}

    # Comparing

    def project(self, adapter: Any, *, warn: float | None = None) -> Projection:
        """The adapter in the coordinates of the present bases; nothing is stored.

        Args:
            adapter: an `Adapter`, a path or LIB:NAME.
            warn: warn where the bases cover less than this share of it: where 1 − error is below.

        Raises:
            MismatchError: it has a module of another shape; a share that is none.
            RefusedError: ΔW algebra would be wrong.
        """
        return Projection(*projection(self.contents, adapter, warn))

    @overload
    def verify(
        self, sources: Any = ..., *, strict: Literal[True] = ..., **options: Unpack[Verifying]
    ) -> dict[str, float]: ...

    @overload
    def verify(
        self, sources: Any = ..., *, strict: Literal[False], **options: Unpack[Verifying]
    ) -> Checks: ...

    def verify(
        self, sources: Any = None, *, strict: bool = True, **options: Unpack[Verifying]
    ) -> dict[str, float] | Checks:
        """Check the checksums, what is stored exactly, and against the sources where given.

        Args:
            sources: as for `fold`; each name must be in the library.
            strict: raise for damaged files, and for the first adapter that is not what its source
                says; otherwise all are compared, and told by `Check`s.
            progress: called with (done, total, name).
            executor, workers, work: who compares with the sources, as in `fold`; the errors are the
                same, whoever does.

        Returns:
            name → error: measured against the sources, or as stored. Where not strict, name → a
            `Check`: its error (None where it can't be compared), its bound, and what is wrong; with
            `.damage`, what is wrong with files.

        Raises:
            FileError: damaged files, or an executor that fails. ToleranceError: an error above its
                bound, or an exactly stored adapter that is not the source's.
            MismatchError: what is to work is no executor, or workers are below 1.
        """
        found = checked(self.contents, sources, strict, **options)
        if not strict:
            return found
        return {n: check.error for n, check in found.items() if check.error is not None}

    # Changing

    def add(
        self,
        adapter: Any,
        name: str | None = None,
        *,
        replace: bool = False,
        tolerance: float | None = None,
        form: Kept | None = None,
        base_model: str | None = None,
    ) -> float:
        """Add an adapter; what is stored of the others does not change by a bit.

        Within the tolerance its coordinates in the present bases are all that is stored; otherwise
        the bases get new directions, shared from then on, or it keeps a residual of its own,
        whichever takes fewer bytes. In one folded by size it is only projected: see docs/fold.md.

        Args:
            adapter: an `Adapter`, a path or LIB:NAME. name: its own; its path's last part if None.
            replace: take the place of an adapter with that name.
            tolerance: its own bound; the library's when None.
            form: "svd" keeps it off the shared bases, "exact" keeps its tensors untouched.
            base_model: what its base is called, where it spells it otherwise than the library.

        Returns:
            The error it came out at.

        Raises:
            MismatchError: the name is taken, or shapes or bases disagree.
            ToleranceError: an error of .95 or more in a library folded by size, or above the bound.
        """
        add = partial(add_to, self.contents, adapter, name, base_model=base_model)
        return add(replace=replace, tolerance=tolerance, form=form)

    def remove(self, name: str) -> None:
        """Take an adapter out; its name is free again.

        Raises:
            UnknownNameError: no such name.
        """
        remove(self.contents.store, name)

    def refold(
        self, tolerance: float | None = None, sources: Any = None, **options: Unpack[Refolding]
    ) -> None:
        """Fold everything anew, from the sources or from what is stored.

        Args:
            tolerance: the new bound; the library's own when no option is given.
            sources: {name: source} or paths for every name in the library. Without them the old
                error counts: the new and the old one together must keep the bound.
            options: as for `fold` (form, rank, energy, bits, memory, device, progress).

        Raises:
            ToleranceError: a bound that can't be met without the sources; nothing has changed.
        """
        refold_all(self.contents, tolerance, sources, options)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Library:
        """Write the library to a folder (a copy, where it has one); that, opened, is returned.

        Raises:
            FileError: something is at `path` and `overwrite` is False.
        """
        store = self.contents.store.save(path, overwrite=overwrite)
        return Library(store, self.contents.device, self._dtype)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Library:
        """A copy, giving its adapters on `device` in `dtype`, and independent (`copy.copy` too).

        What is changed through one, or that it is closed, does not reach the other.
        """
        c = self.contents
        return Library(c.store.as_it_is(), device or c.device, dtype or self._dtype)

    def __copy__(self) -> Library:
        return self.to()

    def __deepcopy__(self, memo: dict[int, Any]) -> Library:
        return self.to()

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, _where(self, self._dtype)

    def close(self) -> None:
        """Let go of the files."""
        self.contents.store.close()

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _where(library: Library, dtype: torch.dtype | None) -> tuple[Any, ...]:
    """What `_opened` takes, whatever directory is the current one there."""
    if library.path is None:
        raise MismatchError("a library in memory can't be pickled: save it to a folder first")
    c = library.contents
    return everywhere(library.path), c.device, dtype, c.store.timeout


def _opened(path: str, device: Any, dtype: torch.dtype | None, timeout: float) -> Library:
    return Library.open(path, device=device, dtype=dtype, timeout=timeout)
