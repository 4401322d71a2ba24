"""The manifest of a store, `library.json`: read with care, written compactly.

The store's own entries are `format`, `version`, and `shards`: name -> bytes and checksums. All
others are the caller's. Names in it are any text, with surrogates too; the name of a shard is not,
as it becomes a path.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...adapter import Layout
from ...errors import FileError
from ...files.atomic import set_aside
from ...files.config import LIBRARY_NAME
from .shard import ShardInfo

FORMAT = "lorafold-library"
VERSION = 1
MANIFEST = LIBRARY_NAME
SHARD_NAME = re.compile(r"shard-[0-9a-f]{16}\.safetensors")
_SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def read_manifest(path: Path) -> bytes:
    """The bytes of the manifest in the folder `path`.

    Raises:
        FileError: there is none, or it can't be read.
    """
    try:
        return (path / MANIFEST).read_bytes()
    except FileNotFoundError as e:
        if path.is_dir():
            raise FileError(f"{path} is not a library: it holds no {MANIFEST}") from e
        aside = set_aside(path)
        if aside:
            raise FileError(
                f"{path} does not exist; an interrupted overwrite left its old state in {aside[-1]}"
            ) from e
        raise FileError(f"{path} does not exist") from e
    except NotADirectoryError as e:
        raise FileError(f"{path} is a file; a library is a folder with a {MANIFEST}") from e
    except OSError as e:
        raise FileError(f"{path / MANIFEST} can't be read: {e.strerror}") from e


def parse_manifest(raw: bytes, path: Path | None) -> tuple[dict[str, Any], dict[str, ShardInfo]]:
    """The manifest and what it says about its shards.

    Args:
        raw: as read.
        path: the folder, for the messages; None in memory.

    Raises:
        FileError: not JSON, not a library's, or of a newer version.
    """
    where = f"{path / MANIFEST}" if path else "the manifest"
    try:
        manifest = json.loads(raw.decode())
    except (ValueError, RecursionError) as e:
        raise FileError(f"{where} is not valid JSON ({e})") from e
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise FileError(f"{where} is not a library's: format is {found!r:.80}, expected {FORMAT!r}")
    version = manifest.get("version")
    if type(version) is not int or version < 1:
        raise FileError(f"{where}: version must be a whole number, found {version!r:.80}")
    if version > VERSION:
        raise FileError(
            f"{where} has format version {version}; this lorafold reads up to {VERSION}: update it"
        )
    shards = manifest.get("shards")
    if not isinstance(shards, dict):
        raise FileError(f"{where}: `shards` must be an object, found {type(shards).__name__}")
    return manifest, {name: _shard_info(name, entry, where) for name, entry in shards.items()}


def _shard_info(name: str, entry: Any, where: str) -> ShardInfo:
    if not SHARD_NAME.fullmatch(name):  # anything else could be a path out of the folder
        raise FileError(f"{where}: {name!r:.80} is not the name of a shard")
    keys = {"bytes": int, "header_sha256": str, "data_sha256": str}
    for key, kind in keys.items():
        value = entry.get(key) if isinstance(entry, dict) else None
        if type(value) is not kind:
            raise FileError(
                f"{where}, shard {name}: {key} must be {kind.__name__}, found {value!r:.80}"
            )
    return ShardInfo(name, entry["bytes"], entry["header_sha256"], entry["data_sha256"])


def manifest_bytes(manifest: Mapping[str, Any], shards: Mapping[str, ShardInfo]) -> bytes:
    """A manifest as written: the caller's entries, and the store's own (format, version, shards).

    Raises:
        FileError: it has no form in JSON.
    """
    whole = _whole(manifest, shards)
    try:
        text = _encode(whole)
    except (TypeError, ValueError, RecursionError) as e:
        raise FileError(f"the manifest can't be written as JSON: {e}") from e
    try:
        return text.encode()
    except UnicodeEncodeError:
        # Lone surrogates, as in file names that are not UTF-8, survive as escapes. Two that make up
        # a pair would come back as one character, so two names could become one.
        pair = _SURROGATE_PAIR.search(text)
        if pair:
            around = text[max(0, pair.start() - 20) : pair.end() + 20]
            raise FileError(f"the manifest can't hold a pair of surrogates: {around!r}") from None
        return json.dumps(whole, allow_nan=False, separators=(",", ":")).encode()


def _whole(manifest: Mapping[str, Any], shards: Mapping[str, ShardInfo]) -> dict[str, Any]:
    own = {
        name: {"bytes": i.nbytes, "header_sha256": i.header_sha256, "data_sha256": i.data_sha256}
        for name, i in shards.items()
    }
    rest = {k: v for k, v in manifest.items() if k not in ("format", "version", "shards")}
    return {"format": FORMAT, "version": VERSION, **rest, "shards": own}


class KnownEntries:
    """Makes manifests that mostly repeat the one before, and encodes only what is new in them.

    An entry is one item of an object of the manifest, such as one adapter. Entries are replaced,
    never changed in place, so one that is the same object as before has the same text. With a
    thousand adapters, to encode and to parse all of them takes as long as to code a new one.
    """

    def __init__(self) -> None:
        self._known: dict[str, dict[str, tuple[Any, str]]] = {}  # object -> name -> entry, text

    def made(
        self, manifest: Mapping[str, Any], shards: Mapping[str, ShardInfo]
    ) -> tuple[bytes, dict[str, Any]]:
        """What `manifest_bytes` gives, and what parsing that gives.

        Raises:
            FileError: it has no form in JSON.
        """
        parsed: dict[str, Any] = {}
        parts = []
        try:
            for key, value in _whole(manifest, shards).items():
                text, parsed[key] = self._object(key, value)
                parts.append(f"{_encode(key)}:{text}")
            return ("{" + ",".join(parts) + "}").encode(), parsed
        except (TypeError, ValueError, RecursionError):  # UnicodeEncodeError is a ValueError
            raw = manifest_bytes(manifest, shards)
            return raw, parse_manifest(raw, None)[0]

    def _object(self, key: str, value: Any) -> tuple[str, Any]:
        if type(value) is not dict or not all(type(name) is str for name in value):
            text = _encode(value)
            return text, json.loads(text)
        known = self._known.get(key, {})
        found: dict[str, tuple[Any, str]] = {}
        for name, entry in value.items():
            before = known.get(name)
            if before is None or before[0] is not entry:
                text = _encode(entry)
                before = (json.loads(text), text)
            found[name] = before
        self._known[key] = found
        text = ",".join(f"{_encode(name)}:{text}" for name, (_, text) in found.items())
        return "{" + text + "}", {name: entry for name, (entry, _) in found.items()}


def config_difference(common: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What turns `common` into `config`."""
    changed = {
        k: v
        for k, v in config.items()
        if k not in common or common[k] != v or type(common[k]) is not type(v)
    }
    dropped = [k for k in common if k not in config]
    return {**({"set": changed} if changed else {}), **({"drop": dropped} if dropped else {})}


def config_of(common: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter's config from the common one and its entry."""
    difference = entry.get("config", {})
    kept = {k: copy.deepcopy(v) for k, v in common.items() if k not in difference.get("drop", ())}
    return {**kept, **copy.deepcopy(difference.get("set", {}))}


def layout_entry(layout: Layout) -> dict[str, Any]:
    """A layout's fields that are not the default's."""
    default = asdict(Layout())
    return {k: v for k, v in asdict(layout).items() if v != default[k]}


def read_layout(entry: Mapping[str, Any]) -> Layout:
    """The inverse of `layout_entry`."""
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
    return Layout(**given)
