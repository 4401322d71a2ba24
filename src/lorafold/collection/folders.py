"""Folders for adapters by their names, which are data: any text, and never a path."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import FileError
from ..files.remote.place import Place, is_dir, is_file

NAMES_FILE = "names.json"

_PLAIN = re.compile(r"\w[\w.+-]{0,99}")  # letters of any script
_MOST_BYTES = 200  # of a folder's name; file systems have 255
_LONGEST = 60  # letters of a name that its folder keeps


def folder_names(names: Iterable[str]) -> dict[str, str]:
    """{name: folder}: a name is data and may be any text; its folder is one plain component.

    A name that is one already keeps it. Any other becomes its plain letters and a part of its
    hash, so that it does not depend on what else is there. No two folders differ in case alone.

    Examples:
        >>> folder_names(["sql", "../etc"])
        {'sql': 'sql', '../etc': 'etc-f7f9121f'}
    """
    names = list(names)
    folders: dict[str, str] = {}
    taken = {NAMES_FILE}
    for name in names:
        if _is_plain(name) and name.casefold() not in taken:
            folders[name] = name
            taken.add(name.casefold())
    for name in names:
        if name not in folders:
            folders[name] = _hashed(name, taken)
            taken.add(folders[name].casefold())
    return {name: folders[name] for name in names}


def known_names(folder: Place) -> dict[str, str]:
    """{folder: name} that an earlier `unfold` has listed in names.json; {} where it is not there.

    Raises:
        FileError: a file of that name which is not one of these.
    """
    path = folder / NAMES_FILE
    if not is_file(path):
        return {}
    from ..files.config import json_value, read_text

    known: Any = None
    with contextlib.suppress(FileError):
        known = json_value(read_text(path), path)
    if not isinstance(known, dict) or not all(
        isinstance(name, str) and _digest(name).startswith(key.rpartition("-")[2]) and "-" in key
        for key, name in known.items()
    ):
        raise FileError(f"{path} is no list of unfolded adapters: move it, or write elsewhere")
    return known


def write_names(folder: Place, known: Mapping[str, str], renamed: Mapping[str, str]) -> None:
    """Add {folder: name} to what names.json says of other folders that are still there.

    Args:
        known: as `known_names` gave it.
    """
    from ..files.atomic import replace_file

    kept = {k: v for k, v in known.items() if is_dir(folder / k)}
    text = json.dumps({**kept, **renamed}, indent=2) + "\n"
    replace_file(folder / NAMES_FILE, text.encode())


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()


def _hashed(name: str, taken: set[str]) -> str:
    letters = re.sub(r"[\W_]+", "_", unicodedata.normalize("NFC", name)).strip("_")[:_LONGEST]
    start, digest = letters or "adapter", _digest(name)
    lengths = range(8, len(digest) + 1)
    return next(f for n in lengths if (f := f"{start}-{digest[:n]}").casefold() not in taken)


def _is_plain(name: str) -> bool:
    """Whether a name is one component on every file system, and the same on each."""
    return (
        _PLAIN.fullmatch(name) is not None
        and name[-1] != "."
        and unicodedata.is_normalized("NFC", name)
        and len(name.encode()) <= _MOST_BYTES
    )
