"""From what a user gives to the two files of one adapter."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import FileError
from .config import CONFIG_NAME, PICKLE_NAME, SUBSPACE_NAME, WEIGHTS_NAME


@dataclass(frozen=True)
class Location:
    """One adapter on the disk: what was given, its tensors and, where there is one, its config."""

    path: Path
    weights: Path
    config: Path | None


def locate(
    source: str | os.PathLike[str], *, revision: str | None = None, allow_pickle: bool = False
) -> Location:
    """Find an adapter's files.

    Raises:
        FileError: nothing there, or not exactly one adapter; the message says which.
    """
    if not isinstance(source, str | os.PathLike):
        raise FileError(f"an adapter is given as a path, not as {type(source).__name__}")
    path = Path(source)
    if not os.path.lexists(path):
        from .hub import snapshot

        path = snapshot(os.fspath(source), revision, allow_pickle)
    elif revision is not None:
        raise FileError(f"{path} is a local path; revision= is for ids on the Hub")
    if path.is_dir():
        return _in_directory(path, allow_pickle)
    if path.suffix not in (".safetensors", ".bin"):
        raise FileError(f"{path}: an adapter is a directory or a .safetensors file")
    if path.suffix == ".bin" and not allow_pickle:
        raise _pickle_error(path)
    config = path.with_name(CONFIG_NAME)
    return Location(path, path, config if config.is_file() else None)


def is_adapter(path: Path) -> bool:
    """Whether the directory itself holds an adapter's tensors."""
    return (path / WEIGHTS_NAME).is_file() or (path / PICKLE_NAME).is_file()


def adapters_below(path: Path) -> list[Path]:
    """The directories directly below that hold an adapter, by name."""
    try:
        return sorted(p for p in path.iterdir() if p.is_dir() and is_adapter(p))
    except OSError as e:
        raise FileError(f"{path}: {e.strerror or e}") from e


def _in_directory(path: Path, allow_pickle: bool) -> Location:
    if is_adapter(path):
        folder = path
    elif (path / SUBSPACE_NAME).is_file():
        raise FileError(
            f"{path} is a vLoRA folder of many adapters; "
            "use lorafold.files.load_many(path, alpha=…)"
        )
    else:
        below = adapters_below(path)
        if len(below) != 1:
            raise FileError(_none_or_many(path, (p.name for p in below)))
        (folder,) = below  # PEFT saves an adapter that is not named "default" one level down
    config = folder / CONFIG_NAME
    found = config if config.is_file() else None
    if (folder / WEIGHTS_NAME).is_file():
        return Location(path, folder / WEIGHTS_NAME, found)
    if not allow_pickle:
        raise _pickle_error(folder / PICKLE_NAME)
    return Location(path, folder / PICKLE_NAME, found)


def _none_or_many(path: Path, names: Iterable[str]) -> str:
    names = list(names)
    if names:
        shown = ", ".join(repr(n) for n in names[:5])
        return f"{path} holds {len(names)} adapters: {shown}; give the path of one of them"
    has = "there is only adapter_config.json" if (path / CONFIG_NAME).is_file() else "neither is"
    return f"{path} is no adapter: it needs {WEIGHTS_NAME} and {CONFIG_NAME}, {has}"


def _pickle_error(path: Path) -> FileError:
    return FileError(
        f"{path} is a pickle, which can run code when it is read: give allow_pickle=True "
        "if you trust it (it is read with weights_only=True)"
    )


def _name_of(path: Path) -> str:
    resolved = path if path.name not in ("", "..") else path.resolve()
    return resolved.parent.name if resolved.suffix in (".safetensors", ".bin") else resolved.name


def adapter_folders(path: Path) -> list[Path] | None:
    """The adapters in a folder that is not itself one; None where it is, or holds none."""
    if not path.is_dir() or _is_adapter(path):
        return None
    inside = sorted(p for p in path.iterdir() if _is_adapter(p))
    # PEFT writes a named adapter as <path>/<name>/, so a single one is still a folder of one.
    return inside or None


def _is_adapter(path: Path) -> bool:
    return path.is_dir() and (path / "adapter_config.json").is_file()
