"""Adapters on the Hugging Face Hub, through huggingface_hub and its cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import FileError
from .config import CONFIG_NAME

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_id(text: str) -> bool:
    """Whether the letters are those of an id, with an owner or without."""
    return _ID.fullmatch(text) is not None


def snapshot(name: str, revision: str | None, allow_pickle: bool) -> Path:
    """The folder in the Hub's cache that holds the adapter `name`, fetched where needed.

    Raises:
        FileError: no such path, and no such adapter on the Hub (or no huggingface_hub).
    """
    from .config import DIFFUSERS_NAME, MLX_NAME, PICKLE_NAME, WEIGHTS_NAME

    try:
        import huggingface_hub as hub
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
    except ImportError:
        raise FileError(
            f"no such file or directory: {name!r} (if it is an id on the Hub: "
            "pip install 'lorafold[hub]')"
        ) from None

    def fetched(filename: str) -> Path:
        _check_reachable(hub, name, filename, revision)
        return Path(hub.hf_hub_download(name, filename, revision=revision))

    weights = [WEIGHTS_NAME, MLX_NAME, DIFFUSERS_NAME, *([PICKLE_NAME] if allow_pickle else [])]
    missing: Exception | None = None
    try:
        for filename in weights:
            try:
                folder = fetched(filename).parent
            except EntryNotFoundError as e:
                missing = e
                continue
            if filename == DIFFUSERS_NAME:
                return folder  # which says its scale itself
            try:
                fetched(CONFIG_NAME)
            except LocalEntryNotFoundError:
                raise  # it may exist, but can't be fetched now
            except EntryNotFoundError:
                pass  # then alpha= is asked for, as with a local folder
            return folder
    except (OSError, HFValidationError) as e:
        # What the Hub's client raises is an OSError, whatever library it speaks HTTP with.
        missing = e
    reason = str(missing).strip().partition("\n")[0]
    raise FileError(
        f"no such file or directory: {name!r}, and the Hub has no adapter of that id "
        f"to give: {reason}"
    ) from missing


def _check_reachable(hub: Any, name: str, filename: str, revision: str | None) -> None:
    """Ask once: of a Hub that is out of reach the download asks six times, for half a minute.

    Args:
        hub: the client. name, filename, revision: of what is asked for.

    Raises:
        LocalEntryNotFoundError: no connection, and it is not in the cache.
    """
    if hub.try_to_load_from_cache(name, filename, revision=revision) is not None:
        return
    failure = unreachable(name, filename, revision)
    if failure is not None:
        raise hub.errors.LocalEntryNotFoundError(f"it can't be reached ({failure})") from failure


def unreachable(name: str, filename: str, revision: str | None = None) -> Exception | None:
    """What keeps the Hub from being asked for a file, found by asking once; None if it answers."""
    try:
        import huggingface_hub as hub
    except ImportError as e:
        return e
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(name, filename, revision=revision))
    except hub.errors.HfHubHTTPError:
        return None  # whether it has the file is for the download to tell
    except Exception as e:  # noqa: BLE001  (what its HTTP library raises: one or another)
        return e
    return None
