"""What a path stands for: an adapter, a folder of them, one in a library; and where its files are.

A folder is an adapter if it holds weights or a config of one, whole or not: one without the other
is listed like any, and opening it says what is missing. A folder that is none itself stands for
the adapters directly below it: folders, and files as those of image models lie about. Of the files
those are taken that have an adapter's tensors by their names, or can't be read. What is hidden is
passed over: caches, and what a writer that was killed has left.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import FileError
from ..words import some_of, warn
from .atomic import appears, set_aside
from .config import (
    CHECKPOINTS,
    CONFIG_NAME,
    DIFFUSERS_NAME,
    LIBRARY_NAME,
    MLX_NAME,
    PICKLE_NAME,
    PORTABLE_NAME,
    RECIPE_NAME,
    SUBSPACE_NAME,
    WEIGHTS_NAME,
)
from .formats.foreign import foreign, kind_of_file, kind_of_folder, may_hold_adapter
from .hub import is_id, snapshot
from .remote.place import Place, UrlPath, is_dir, is_file, is_url, matching, place_of

_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".json", ".gguf")  # of files, and of no id
_FILES = (WEIGHTS_NAME, PICKLE_NAME, PORTABLE_NAME, MLX_NAME, DIFFUSERS_NAME, CONFIG_NAME)
GGUF_SUFFIX = ".gguf"
_LOOSE = (".safetensors", ".bin", GGUF_SUFFIX)  # of adapters that are a file


@dataclass(frozen=True)
class Location:
    """One adapter on the disk: what was given, its tensors and, where there is one, its config."""

    path: Place
    weights: Place
    config: Place | None


class PickleError(FileError):
    """An adapter that is a pickle, and was not asked for as one."""

    def __init__(self, path: Place) -> None:
        self.found = f"{path} is a pickle, which can run code when it is read"
        super().__init__(
            f"{self.found}: give allow_pickle=True if you trust it (it is read with "
            "weights_only=True)"
        )


def is_adapter(path: Place) -> bool:
    """Whether the directory itself holds an adapter's weights or config."""
    return any(is_file(path / name) for name in _FILES)


def is_subspace(path: str | os.PathLike[str]) -> bool:
    """Whether the directory is one of vLoRA's, of many adapters."""
    return is_file(place_of(path) / SUBSPACE_NAME)


def is_library(path: str | os.PathLike[str]) -> bool:
    """Whether the directory holds a library."""
    return is_file(place_of(path) / LIBRARY_NAME)


def is_of_a_run(path: Place) -> bool:
    """Whether the directory holds the checkpoints of a training run."""
    return path.name == CHECKPOINTS and is_file(path / RECIPE_NAME)


def in_library(text: str) -> tuple[str, str] | None:
    """Library and name of LIB:NAME; None where the text is a path, or no library is there.

    A path that exists is a path, whatever colons are in it. That of `scheme://` is not looked at.
    """
    return _inside(text, is_library)


def in_subspace(text: str) -> tuple[str, str] | None:
    """Folder and task of SUB:TASK, of a vLoRA folder; None where the text is a path, or none."""
    return _inside(text, is_subspace)


def _inside(text: str, is_one: Callable[[str], bool]) -> tuple[str, str] | None:
    if is_url(text):
        drive = text.index("://") + 3
        if ":" not in text[drive:] or place_of(text).exists():
            return None
    else:
        if os.path.exists(text):  # of what is no path (too long, a NUL in it) it says no
            return None
        drive = len(os.path.splitdrive(text)[0])  # Windows' C: is no library
    colons = (at for at, letter in enumerate(text) if letter == ":" and at >= drive)
    return next(((text[:at], text[at + 1 :]) for at in colons if is_one(text[:at])), None)


def matches(text: str | os.PathLike[str]) -> list[Path] | list[UrlPath]:
    """The path itself, or what a glob matches, sorted.

    Raises:
        FileError: a glob that matches nothing, or a path that only is one and is not there.
    """
    path = os.fspath(text)
    if isinstance(place := place_of(text), UrlPath):
        return _matches(place)
    if os.path.lexists(path) or not glob.has_magic(path):
        if not os.path.lexists(path) and str(Path(path)) != path:
            # "" would become the working directory, and "./sql" an id on the Hub.
            raise NoSuchPathError(path)
        return [Path(path)]
    found = [Path(p) for p in sorted(glob.glob(path))]
    if not found:
        raise FileError(f"no adapter matches {path!r}")
    return found


def _matches(url: UrlPath) -> list[UrlPath]:
    url = url.at_once()
    if not glob.has_magic(url.url) or url.exists():
        return [url]
    found = matching(url)
    if not found:
        raise FileError(f"no adapter matches {str(url)!r}")
    return found


def places_at(text: str | os.PathLike[str]) -> tuple[list[Place], list[Place]]:
    """Where a path, folder or glob has adapters and libraries; and what it has that is neither.

    A path that is named is taken at its word. Of what a glob matches, and of the folders in a
    folder of adapters, those that hold none are passed over, and listed for a warning. A library
    in a folder of adapters is none of them: it may have been folded from them.

    Raises:
        FileError: a glob that matches nothing, or no adapter.
    """
    found: list[Place] = [*matches(text)]
    if found == [place_of(text)]:
        (path,) = found
        places = [path] if is_library(path) else adapters_at(path)
        if places == [path]:
            return places, []
        taken = {*places, path}
        below = (p for p in path.iterdir() if not p.name.startswith(".")) if is_dir(path) else ()
        below = (p for p in below if is_dir(p) or p.suffix == ".safetensors")
        below = (p for p in below if not is_library(p) and not is_of_a_run(p))
        return places, sorted(p for p in below if p not in taken)
    kept = {path: None for path in found if holds_any(path)}
    if not kept:
        raise FileError(f"no adapter matches {os.fspath(text)!r}, only {some_of(map(str, found))}")
    places = [p for path in kept for p in ([path] if is_library(path) else adapters_at(path))]
    return places, [path for path in found if path not in kept]


def holds_any(path: Place) -> bool:
    """Whether there is an adapter, whole or not, or a library."""
    if not is_dir(path):
        return path.suffix in _LOOSE
    found = adapters_at(path)
    return found != [path] or is_library(path) or is_adapter(path) or is_subspace(path)


def idle_among(paths: Iterable[str | os.PathLike[str]]) -> list[str | os.PathLike[str]]:
    """Those that hold no adapter, of folders of which all that they hold is named.

    That is what a shell makes of `adapters/*`, and so it is taken for one.
    """
    given: dict[Path, list[str | os.PathLike[str]]] = {}
    for path in paths:
        if not is_url(path) and os.path.lexists(path):
            given.setdefault(Path(path).parent, []).append(path)
    idle: list[str | os.PathLike[str]] = []
    for folder, inside in given.items():
        try:
            names = {name for name in os.listdir(folder) if not name.startswith(".")}
        except OSError:  # one may enter it, but not look around
            continue
        if len(names) > 1 and names <= {Path(path).name for path in inside}:
            none = [path for path in inside if not holds_any(Path(path))]
            idle += none if len(none) < len(inside) else []
    return idle


def tell_idle(paths: Sequence[str | os.PathLike[str]]) -> None:
    """Warn of what was passed over."""
    if paths:
        warn(f"passed over, as no adapter is there: {some_of(map(os.fspath, paths))}")


def adapters_at(path: Place) -> list[Place]:
    """The adapters that a path stands for: those directly below it, or the path itself.

    It is itself where it is no directory, is an adapter or a subspace, or has neither below.
    PEFT saves an adapter that is not named "default" one level down, so one is enough.

    Raises:
        FileError: the directory can't be read.
    """
    try:
        if not is_dir(path) or is_adapter(path) or is_subspace(path):
            return [path]
        files_too = not is_library(path)  # whose shards are no adapters
        below = [p for p in path.iterdir() if not p.name.startswith(".")]
        return sorted(p for p in below if _is_one(p, files_too)) or [path]
    except OSError as e:
        raise FileError(f"{path}: {e.strerror or e}") from e


def _is_one(path: Place, files_too: bool) -> bool:
    """Whether what lies in a folder of adapters is one."""
    if path.is_dir():
        return is_adapter(path) or is_subspace(path)
    return files_too and path.suffix in (".safetensors", GGUF_SUFFIX) and may_hold_adapter(path)


def name_of(path: Place) -> str:
    """What an adapter is called by its path: a file of a name that many have by its folder's."""
    resolved = path
    if isinstance(path, Path) and path.name in ("", ".."):
        resolved = path.resolve()
    if resolved.suffix not in _LOOSE:
        return resolved.name
    if resolved.name in _FILES:
        return resolved.parent.name
    return resolved.name.removesuffix(resolved.suffix)


def locate(
    source: str | os.PathLike[str], *, revision: str | None = None, allow_pickle: bool = False
) -> Location:
    """Find an adapter's files.

    Raises:
        FileError: nothing there, or not exactly one adapter; the message says which.
    """
    if not isinstance(source, str | os.PathLike):
        raise FileError(f"an adapter is given as a path, not as {type(source).__name__}")
    if is_url(source):
        return _at_url(source, revision, allow_pickle)
    path = Path(source)
    if not os.fspath(source):  # which would be the working directory
        raise NoSuchPathError("")
    if not appears(path):
        path = _fetched(os.fspath(source), revision, allow_pickle)
    elif revision is not None:
        raise FileError(f"{path} is a local path; revision= is for ids on the Hub")
    if os.path.isdir(path) or not os.path.lexists(path):  # a folder that is being replaced
        return _in_directory(path, allow_pickle)
    return _file_at(path, allow_pickle)


def _at_url(source: str | os.PathLike[str], revision: str | None, allow_pickle: bool) -> Location:
    url = place_of(source)
    assert isinstance(url, UrlPath)
    url = url.at_once()
    if revision is not None:
        raise FileError(f"{url} is a URL; revision= is for ids on the Hub")
    if url.is_dir():
        return _in_directory(url, allow_pickle)
    if not url.exists():
        raise NoSuchPathError(str(url))
    return _file_at(url, allow_pickle)


def _file_at(path: Place, allow_pickle: bool) -> Location:
    if path.suffix not in _LOOSE:
        told = kind_of_file(path.name)
        if told is not None:
            raise FileError(f"{path} is {told}")
        raise FileError(f"{path}: an adapter is a directory, a .safetensors or a .gguf file")
    if path.suffix == GGUF_SUFFIX:
        return Location(path, path, None)
    if path.suffix == ".bin" and not allow_pickle:
        raise PickleError(path)
    config = path.with_name(CONFIG_NAME)
    return Location(path, path, config if is_file(config) else None)


def _fetched(text: str, revision: str | None, allow_pickle: bool) -> Path:
    aside = set_aside(text)
    if aside:
        raise FileError(
            f"{text} does not exist; an interrupted overwrite left its old state in {aside[-1]}"
        )
    if not is_id(text) or (revision is None and _looks_like_path(text)):
        raise NoSuchPathError(text)
    return snapshot(text, revision, allow_pickle)


def _looks_like_path(text: str) -> bool:
    """Whether an id, by its letters, is meant as a path: the Hub would be asked for it in vain."""
    owner, slash, _ = text.partition("/")
    near = near_path(text)
    return (
        not slash  # no adapter is without an owner
        or text.endswith(_ENDINGS)
        or os.path.exists(owner)
        or (near is not None and near.count(os.sep) > 0)
    )


class NoSuchPathError(FileError):
    """Nothing is at a path, with what may have been meant.

    Attributes:
        found: the same without the remedy that not every door has.
    """

    def __init__(self, text: str) -> None:
        self.found = f"no such file or directory: {text!r}"
        near = near_path(text)
        if near is not None:
            self.found += f"; did you mean {near!r}?"
        asks = is_id(text) and "/" in text and not text.endswith(_ENDINGS)
        hint = " (for an id on the Hub, give revision='main')" if asks else ""
        super().__init__(f"{self.found}{hint}")


def near_path(text: str) -> str | None:
    """The path that is there and most like one that is not; None where none is like it.

    Every part that is missing is taken for the name most like it, as far as there is one. Of
    LIB:NAME, that is of LIB.
    """
    if is_url(text):
        return None
    path = Path(text)
    at, changed = Path(path.anchor), False
    for part in path.relative_to(path.anchor).parts:
        step = at / part
        if not os.path.exists(step):
            near = _near_name(at, part)
            if near is None:
                break
            step, changed = at / near, True
        at = step
    if changed:
        return str(at)
    folder, colon, name = text.rpartition(":")
    near = near_path(folder) if colon and folder else None
    return f"{near}:{name}" if near is not None and is_library(near) else None


def _near_name(folder: Path, name: str) -> str | None:
    import difflib

    with contextlib.suppress(OSError, ValueError):
        names = [n for n in os.listdir(folder) if not n.startswith(".")]
        return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.6)), None)
    return None


def _in_directory(path: Place, allow_pickle: bool) -> Location:
    found = adapters_at(path)
    if len(found) > 1:
        raise FileError(_many(path, (p.name for p in found)))
    (folder,) = found
    if folder != path and not is_dir(folder):
        return _file_at(folder, allow_pickle)
    if not is_adapter(folder):
        raise FileError(_none(folder))
    config = folder / CONFIG_NAME if is_file(folder / CONFIG_NAME) else None
    if is_file(folder / WEIGHTS_NAME):
        if is_file(folder / MLX_NAME):
            raise FileError(
                f"{folder} holds {WEIGHTS_NAME} of PEFT and {MLX_NAME} of MLX, and has one config "
                "for both: move one of them to a folder of its own"
            )
        if is_file(folder / DIFFUSERS_NAME):
            raise FileError(
                f"{folder} holds {WEIGHTS_NAME} of PEFT and {DIFFUSERS_NAME} of diffusers: give "
                "the path of one of them"
            )
        return Location(path, folder / WEIGHTS_NAME, config)
    if is_file(folder / MLX_NAME):
        return Location(path, folder / MLX_NAME, config)
    if is_file(folder / PORTABLE_NAME):
        return Location(path, folder / PORTABLE_NAME, None)
    if is_file(folder / DIFFUSERS_NAME):
        return Location(path, folder / DIFFUSERS_NAME, config)
    if not is_file(folder / PICKLE_NAME):
        raise FileError(_none(folder))
    if not allow_pickle:
        raise PickleError(folder / PICKLE_NAME)
    return Location(path, folder / PICKLE_NAME, config)


def _many(path: Place, names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(repr(n) for n in names[:5]) + (", …" if names[5:] else "")
    return f"{path} holds {len(names)} adapters: {shown}; give the path of one of them"


def _none(path: Place) -> str:
    from .safetensors import read_entries  # and torch with it, which finding does not need

    if is_subspace(path):
        return (
            f"{path} is a vLoRA folder, which does not hold α; name one of its adapters, as "
            f"{path}:NAME, and give alpha="
        )
    if is_library(path):
        return f"{path} is a library; name one of its adapters, as {path}:NAME"
    others = sorted(p for p in path.glob("*.safetensors") if p.is_file())
    for other in others:
        with contextlib.suppress(FileError):
            told = foreign(read_entries(other))
            if told is not None:
                return f"{other}: {told}"
    told = kind_of_folder(path)
    if told is not None:
        return f"{path} is {told}"
    has = "there is only adapter_config.json" if is_file(path / CONFIG_NAME) else "neither is"
    if others:
        has = f"there is {some_of((p.name for p in others), 2)}: if that is one, give its own path"
    return f"{path} is no adapter: it needs {WEIGHTS_NAME} and {CONFIG_NAME}, {has}"
