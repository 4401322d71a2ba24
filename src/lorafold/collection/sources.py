"""Sources to named handles: whatever a user may give where adapters are asked for.

A source is a path or URL, a glob, a folder of adapters, LIB:NAME, a library (its folder, or a
`Library`), an `Adapter`, an opened adapter, {name: any of these}, or a list of any of these, within
one another. A handle is an opened adapter: its header is known, its tensors are read one by one.

Libraries are `fold`'s, which stands on this room. So they are known here by what they can do, which
is `__lorafold_handles__`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..adapter import Adapter, Layout, on_base
from ..errors import FileError, LorafoldError, MismatchError
from ..files import AdapterFile, load_many, open_adapter
from ..files.disk.settled import settled
from ..files.find import (
    GGUF_SUFFIX,
    NoSuchPathError,
    PickleError,
    idle_among,
    in_library,
    in_subspace,
    is_library,
    is_subspace,
    locate,
    name_of,
    places_at,
    tell_idle,
)
from ..files.formats.gguf.reading import BaseNeededError
from ..files.opening import open_library
from ..files.remote.place import Place, concurrently, is_url, place_of
from ..lowrank import LowRank
from ..words import some_of

_BASE = "base_model_name_or_path"
NO_DOOR: Any = object()
Broken = Callable[[str, LorafoldError], None]


@runtime_checkable
class Handle(Protocol):
    """An adapter whose tensors are read one by one (`lorafold.files.open_adapter` gives one)."""

    @property
    def path(self) -> Place | None: ...

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

    @property
    def card(self) -> str | None: ...

    def read(self, path: str) -> LowRank: ...

    def read_extras(self) -> dict[str, Tensor]: ...

    def load(self) -> Adapter: ...


@runtime_checkable
class Shelf(Protocol):
    """What holds adapters by name, and opens each alone: a `Library`."""

    def __lorafold_handles__(self, name: str | None = None) -> Mapping[str, Handle]:
        """Its adapters as handles by name; only the one of that name where it is given."""
        ...


class TwiceNamedError(MismatchError):
    """Two sources of one name, or several such."""

    def __init__(self, names: Sequence[str]) -> None:
        self.found = f"two sources are both named {names[0]!r}"
        if names[1:]:
            self.found += f", and so with {some_of(names[1:])}"
        super().__init__(f"{self.found}: give names, {{name: source}}, to tell them apart")


def named_handles(
    sources: Any,
    *,
    alpha: float | None = None,
    revision: str | None = None,
    allow_pickle: bool | None = None,
    base_model: str | None = None,
    dtype: torch.dtype | None = None,
    base: Any = NO_DOOR,
    broken: Broken | None = None,
) -> dict[str, Handle]:
    """Open every source by its header.

    Args:
        sources: one source, or several in a list or by name, see above. A name is given, or is the
            last component of a path, or the name in a library; an `Adapter` without one is task_k
            where it is source number k, counted from 0.
        alpha: α of those that have no config. revision: of those on the Hub.
        allow_pickle: read `adapter_model.bin` too. None is no, from who has no such option.
        base_model: what the base of all of them is called, however each spells it.
        dtype: what factors of 8 bits are read in.
        base: that of GGUF files, as `open_adapter` takes it. NO_DOOR from who has no such option.
        broken: told of what can't be opened, by name, which is left out then.

    Raises:
        FileError: a path that is not there, a glob or folder without adapters, a closed library.
        UnknownNameError: a library has no such name.
        MismatchError: no source at all, or two with one name.
    """
    opener = _Opener(alpha, revision, allow_pickle, dtype, base, broken)
    handles: dict[str, Handle] = {}
    twice: dict[str, None] = {}
    for name, handle in opener.opened(sources):
        if name in handles:
            twice[name] = None
        handles[name] = handle
    if twice:
        raise TwiceNamedError(list(twice))
    if not handles:
        raise MismatchError(
            "there are no adapters: "
            + ("none can be opened" if opener.left_out else "the list of sources is empty")
        )
    if base_model is not None:
        return {name: OnBase(handle, base_model) for name, handle in handles.items()}
    return handles


class OnBase:
    """A handle on a base by another name.

    Args:
        handle: it. base_model: the name.
    """

    def __init__(self, handle: Handle, base_model: str) -> None:
        self._handle, self.base_model = handle, base_model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return OnBase, (self._handle, self.base_model)

    def __lorafold_key__(self) -> Any:
        return self.base_model, self._handle

    @property
    def path(self) -> Place | None:
        return self._handle.path

    @property
    def shapes(self) -> Mapping[str, tuple[int, int, int]]:
        return self._handle.shapes

    @property
    def layouts(self) -> Mapping[str, Layout]:
        return self._handle.layouts

    @property
    def config(self) -> Mapping[str, Any]:
        config = dict(self._handle.config)
        return {**config, _BASE: self.base_model} if _BASE in config else config

    @property
    def nbytes(self) -> int:
        return self._handle.nbytes

    @property
    def refusal(self) -> str | None:
        return self._handle.refusal

    @property
    def card(self) -> str | None:
        return self._handle.card

    def read(self, path: str) -> LowRank:
        return self._handle.read(path)

    def read_extras(self) -> dict[str, Tensor]:
        return self._handle.read_extras()

    def load(self) -> Adapter:
        return on_base(self._handle.load(), self.base_model)


class _Opener:
    """Opens sources in their order; a library that several of them name, once."""

    def __init__(
        self,
        alpha: float | None,
        revision: str | None,
        allow_pickle: bool | None,
        dtype: torch.dtype | None,
        base: Any,
        broken: Broken | None,
    ) -> None:
        self._broken, self.left_out = broken, 0
        self._alpha, self._revision, self._allow_pickle = alpha, revision, allow_pickle
        self._dtype, self._base = dtype, base
        self._libraries: dict[str, Shelf] = {}
        self._count = 0  # sources so far

    def opened(self, source: Any) -> Iterator[tuple[str, Handle]]:
        """Name and handle of every adapter that a source stands for."""
        if isinstance(source, Mapping) and not isinstance(source, Adapter | Shelf):
            yield from self._by_name(source)
        elif isinstance(source, Iterable) and not isinstance(
            source, str | bytes | os.PathLike | Adapter | Shelf | Handle | Tensor
        ):
            listed = list(source)
            paths = [one for one in listed if isinstance(one, str | os.PathLike)]
            idle = idle_among(paths) if paths[1:] else []
            tell_idle(idle)
            for one in listed:
                if not any(one is path for path in idle):
                    yield from self._unless_broken(one, self.opened(one))
        else:
            position, self._count = self._count, self._count + 1
            yield from self._one(source, f"task_{position}")

    def _by_name(self, sources: Mapping[Any, Any]) -> Iterator[tuple[str, Handle]]:
        for name, source in sources.items():
            if not isinstance(name, str) or not name:
                raise MismatchError(f"a name must be a non-empty text, found {name!r}")
            yield from self._unless_broken(name, self._called(name, source))

    def _called(self, name: str, source: Any) -> Iterator[tuple[str, Handle]]:
        left_out = self.left_out
        found = list(self.opened(source))
        if len(found) == 1:
            yield name, found[0][1]
        elif found or self.left_out == left_out:
            raise MismatchError(
                f"source {name!r} stands for {len(found)} adapters; a named source must be one"
            )

    def _unless_broken(
        self, source: Any, opened: Iterator[tuple[str, Handle]]
    ) -> Iterator[tuple[str, Handle]]:
        """What a source stands for; one that can't be opened is told of and left out, if anybody
        is there to be told.
        """
        try:
            yield from opened
        except LorafoldError as e:
            if self._broken is None:
                raise
            self.left_out += 1
            path = isinstance(source, os.PathLike)
            self._broken(name_of(place_of(source)) if path else str(source), e)

    def _one(self, source: Any, name: str) -> Iterator[tuple[str, Handle]]:
        """What no more than one source stands for; `name` is for what has none."""
        if isinstance(source, Adapter):
            yield name, open_adapter(source)
        elif isinstance(source, Shelf):
            yield from source.__lorafold_handles__().items()
        elif isinstance(source, Handle):
            place = source.path if isinstance(source, AdapterFile) else None
            yield name if place is None else name_of(place), source
        elif isinstance(source, str | os.PathLike):
            yield from self._at(source)
        else:
            raise MismatchError(
                f"a source must be a path or an Adapter, or a Library, not {type(source).__name__}"
            )

    def _at(self, text: str | os.PathLike[str]) -> Iterator[tuple[str, Handle]]:
        """The adapters that a path, a glob or LIB:NAME stands for."""
        inside = in_subspace(os.fsdecode(text))
        if inside is not None:
            yield inside[1], open_adapter(text, alpha=self._alpha)
            return
        found = in_library(os.fsdecode(text))
        if found is not None:
            folder, name = found
            yield from self._library(folder).__lorafold_handles__(name).items()
            return
        places, idle = places_at(text)
        tell_idle(idle)
        for place, found_in in zip(places, concurrently(self._tried, places), strict=True):
            yield from self._unless_broken(place, _given(found_in))

    def _tried(self, place: Place) -> list[tuple[str, Handle]] | LorafoldError:
        """What `_in` gives, or raises: where several are opened at once, in their order."""
        try:
            return list(self._in(place))
        except LorafoldError as e:
            return e

    def _in(self, place: Place) -> Iterator[tuple[str, Handle]]:
        if is_library(place):
            yield from self._library(os.fspath(place)).__lorafold_handles__().items()
        elif is_subspace(place):
            for name, adapter in load_many(place, alpha=self._alpha).items():
                yield name, open_adapter(adapter)
        else:
            yield name_of(place), self._file(place)

    def _library(self, folder: str) -> Shelf:
        place = folder if is_url(folder) else os.path.realpath(folder)
        if place not in self._libraries:
            self._libraries[place] = open_library(folder)
        return self._libraries[place]

    def _file(self, place: Place) -> Handle:
        alpha, revision, pickled = self._alpha, self._revision, bool(self._allow_pickle)
        try:
            if alpha is not None:
                found = settled(
                    place, lambda _: locate(place, revision=revision, allow_pickle=pickled)
                )
                has_own = found.config is not None or found.weights.suffix == GGUF_SUFFIX
                alpha = None if has_own else alpha  # it is for those without their own
            return open_adapter(
                place,
                alpha=alpha,
                revision=revision,
                allow_pickle=pickled,
                dtype=self._dtype,
                base=None if self._base is NO_DOOR else self._base,
            )
        except BaseNeededError as e:
            if self._base is not NO_DOOR:
                raise
            raise MismatchError(
                f"{e.found}: load it with its base (`lorafold.load` takes it), and give the adapter"
            ) from None
        except (PickleError, NoSuchPathError) as e:
            if self._allow_pickle is not None:
                raise
            if isinstance(e, NoSuchPathError):
                raise FileError(e.found) from None
            raise FileError(
                f"{e.found}: if you trust it, load it with that option of `lorafold.load` in "
                "Python, and give the adapter, or the path where `lorafold.save` puts it"
            ) from None


def _given(found: list[tuple[str, Handle]] | LorafoldError) -> Iterator[tuple[str, Handle]]:
    if isinstance(found, LorafoldError):
        raise found
    yield from found
