"""Sources to named handles: a path, a glob, a folder, an `Adapter`, a `Library`, or several.

A handle is an opened adapter: its header is known, its tensors are read one by one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..adapter import Adapter, Layout
from ..errors import FileError, MismatchError
from ..files import open_adapter
from ..files.find import PickleError, adapters_at, matches, name_of
from ..lowrank import LowRank


class Handle(Protocol):
    """An adapter whose tensors are read one by one (`lorafold.files.open_adapter` gives one)."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, int, int]]: ...

    @property
    def layouts(self) -> Mapping[str, Layout]: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def base_model(self) -> str | None: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def refusal(self) -> str | None: ...

    def read(self, path: str) -> LowRank: ...

    def read_extras(self) -> dict[str, Tensor]: ...

    def load(self) -> Adapter: ...


Source = Any  # a path, a glob, or an Adapter


def named_handles(sources: Any) -> dict[str, Handle]:
    """Open every source by its header.

    Args:
        sources: one source, several, or {name: source}; a source is an adapter's path, a glob, a
            folder of adapters, an `Adapter`, or a `Library`.

    Raises:
        FileError: a path that is not there, a glob or folder without adapters.
        MismatchError: no source at all, or two with one name.
    """
    if isinstance(sources, Mapping) and not isinstance(sources, Adapter) and not _shelf(sources):
        handles = {}
        for name, source in sources.items():
            found = _opened(source, 0)
            if len(found) != 1:
                raise MismatchError(
                    f"source {name!r} stands for {len(found)} adapters; a named source must be one"
                )
            handles[_checked_name(name)] = found[0][1]
    else:
        single = isinstance(sources, str | os.PathLike | Adapter) or _shelf(sources)
        items: Iterable[Source] = [sources] if single else sources
        pairs = [pair for k, source in enumerate(items) for pair in _opened(source, k)]
        handles = {}
        for name, handle in pairs:
            if name in handles:
                raise MismatchError(
                    f"two sources are both named {name!r}: give names, {{name: source}}, to tell "
                    "them apart"
                )
            handles[name] = handle
    if not handles:
        raise MismatchError("there is nothing to fold: the list of sources is empty")
    return handles


def _opened(source: Source, position: int) -> list[tuple[str, Handle]]:
    if isinstance(source, Adapter):
        return [(f"task_{position}", open_adapter(source))]
    if _shelf(source):
        return [(name, Shelved(source, name)) for name in source]
    if not isinstance(source, str | os.PathLike):
        raise MismatchError(f"a source must be a path or an Adapter, not {type(source).__name__}")
    places = [place for path in matches(source) for place in adapters_at(path)]
    return [(name_of(place), _handle(place)) for place in places]


def _shelf(source: Source) -> bool:
    """Whether it is a `Library`, which makes its adapters anew whenever one is asked for."""
    return isinstance(source, Mapping) and hasattr(source, "contents")


class Shelved:
    """An adapter of a library as a handle: read module by module, and not kept."""

    def __init__(self, library: Any, name: str) -> None:
        a: Adapter = library[name]
        self.shapes = {p: (*u.shape, u.rank) for p, u in a.modules.items()}
        self.layouts, self.config, self.base_model = a.layouts, a.config, a.base_model
        self.refusal, self.nbytes = a.refusal, int(library.entry(name)["bytes"])
        self._library, self._name = library, name

    def read(self, path: str) -> LowRank:
        update: LowRank = self._library.update(self._name, path)
        return update

    def read_extras(self) -> dict[str, Tensor]:
        return dict(self.load().extras)

    def load(self) -> Adapter:
        adapter: Adapter = self._library[self._name]
        return adapter


def _handle(place: Path) -> Handle:
    try:
        return open_adapter(place)
    except PickleError as e:  # what reads many adapters has no option for it
        raise FileError(
            f"{e.found}: if you trust it, load it with that option of `lorafold.load` in Python, "
            "and give the adapter, or the path where `lorafold.save` puts it"
        ) from None


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise MismatchError(f"a name must be a non-empty text, found {name!r}")
    return name
