"""Reading a module of some adapters in another process, on this machine or another.

What travels is where each one's tensors lie, and what the file was when it was opened; of adapters
in memory, their tensors. Nobody gets more of a collection than what it works on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from ..adapter import Layout, module_digest
from ..errors import LorafoldError, MismatchError
from ..files import open_adapter
from ..files.remote.place import concurrently
from ..lowrank import LowRank
from .sources import Handle


@runtime_checkable
class Portable(Protocol):
    """What reads one module, and can be pickled."""

    @property
    def identity(self) -> str:
        """Says whether another one reads the same."""

    def read(self, path: str) -> LowRank:
        """The update."""


class InMemory:
    """An update that travels itself.

    Args:
        update: it.
    """

    def __init__(self, update: LowRank) -> None:
        self._update = update

    @property
    def identity(self) -> str:
        return module_digest("", self._update, Layout()).hex()

    def read(self, path: str) -> LowRank:
        return self._update


def one_module(handle: Handle, path: str) -> Portable:
    """What reads a module of an opened adapter elsewhere."""
    narrowed = getattr(handle, "only", None)
    found = None if narrowed is None else narrowed(path)
    return InMemory(handle.read(path)) if found is None else found


def travelling(handle: Handle) -> Handle:
    """An opened adapter that can be pickled, as lorafold's can; one of another kind is read now."""
    return handle if hasattr(handle, "__lorafold_key__") else open_adapter(handle.load())


def unreadable(handle: Handle) -> LorafoldError | None:
    """Why an adapter can't be read; None if all of it can."""
    try:
        for path in handle.shapes:
            handle.read(path)
        handle.read_extras()
    except LorafoldError as e:
        return e
    return None


class Said:
    """What tells a run's adapters from those of another; looked at where it is asked for.

    Args:
        handles: name → handle.
    """

    def __init__(self, handles: Mapping[str, Handle]) -> None:
        self._handles = handles

    def __lorafold_key__(self) -> Any:
        return [(name, travelling(handle)) for name, handle in self._handles.items()]


class Elsewhere:
    """Reads one module of some adapters, as a `Stack` asks for it; made to be pickled.

    Args:
        path: the module's. readers: position → what reads it. names: position → adapter.
        layouts: position → its layout, of those that are not plain linear layers.
    """

    def __init__(
        self,
        path: str,
        readers: Mapping[int, Portable],
        names: Mapping[int, str],
        layouts: Mapping[int, Layout],
    ) -> None:
        self.path = path
        self._readers, self._names, self._layouts = readers, names, layouts
        self._digests: dict[int, bytes] | None = None

    def __call__(self, i: int) -> LowRank:
        return self._seen(i, self._read(i))

    def several(self, members: Sequence[int]) -> list[LowRank]:
        """The same of several."""
        found = concurrently(
            self._read, members, lambda i: getattr(self._readers[i], "place", None)
        )
        return [self._seen(i, u) for i, u in zip(members, found, strict=True)]

    def _read(self, i: int) -> LowRank:
        try:
            return self._readers[i].read(self.path)
        except MismatchError as e:
            raise MismatchError(f"adapter {self._names[i]!r}: {e}") from e

    def _seen(self, i: int, u: LowRank) -> LowRank:
        if self._digests is not None and i not in self._digests:
            self._digests[i] = module_digest(self.path, u, self._layouts.get(i, Layout()))
        return u

    def take_digests(self) -> dict[int, bytes]:
        """Where the digest of whatever is read from now on is put: position → digest."""
        self._digests = {}
        return self._digests

    @property
    def identity(self) -> dict[str, str]:
        """Name → which update is read."""
        return {self._names[i]: reader.identity for i, reader in self._readers.items()}
