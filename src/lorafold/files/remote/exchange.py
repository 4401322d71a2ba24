"""Replacing a file only as long as it is what one has read: what a store has instead of a lock.

S3 puts a file on the condition that the one there has the ETag that was looked at (If-Match), or
that there is none (If-None-Match). Not every store that speaks S3 keeps to that, so each bucket is
asked once for something that it must refuse. `memory://` lives in one process, where a lock does.
All other stores get a look and a put, with a gap between: there one writer at a time is allowed.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ...errors import FileError
from ...words import hint
from .asking import ask, codes, is_s3
from .place import UrlPath

T = TypeVar("T")

_ATTEMPTS = 20  # at a change that others come between; each needs one more of them
_LONGEST_PAUSE = 0.5  # seconds before the next, at random, so that two don't meet again
_REFUSALS = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409", "NoSuchKey", "404"}
_UNKNOWN = {"NotImplemented", "501", "InvalidRequest", "InvalidArgument"}
_IN_ONE = 1 << 30  # bytes put in one request: in several, a condition would be lost
_PROBE = ".lock"  # never there
_lock = threading.Lock()  # of memory://
_keep: dict[str, bool] = {}  # by bucket: whether it keeps to conditions


class OvertakenError(FileError):
    """Somebody else has changed what was about to be changed."""


def again(change: Callable[[], T]) -> T:
    """Make a change, from its start again where another writer of a store came between.

    Raises:
        OvertakenError: too often.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return change()
        except OvertakenError:
            if attempt == _ATTEMPTS - 1:
                raise
        time.sleep(random.uniform(0, min(0.02 * 2**attempt, _LONGEST_PAUSE)))
    raise AssertionError("no change is tried once more than there are attempts")


def replace_if(path: UrlPath, data: bytes, before: bytes | None) -> None:
    """Put a file, if what is there still is `before`; None: if there is none.

    Raises:
        OvertakenError: it is not. OSError, FileError: as `ask`.
    """
    ask(path.url, str(path), lambda fs, key: _replace_if(fs, key, path, data, before))


def is_guarded(path: UrlPath) -> bool:
    """Whether the store that a file lies on keeps two writers apart."""
    return ask(path.url, str(path), lambda fs, key: is_s3(fs) and _keeps(fs, key)) or (
        path.url.startswith("memory://")
    )


def _replace_if(fs: Any, key: str, path: UrlPath, data: bytes, before: bytes | None) -> None:
    if path.url.startswith("memory://"):
        with _lock:
            _look_and_put(fs, key, path, data, before)
    elif is_s3(fs) and _keeps(fs, key):
        _put_on_condition(fs, key, path, data, before)
    else:
        hint(
            f"{path.parent}: this store has no conditional put: only one process at a time may "
            "change what is there, and nothing but you sees to that"
        )
        _look_and_put(fs, key, path, data, before)


def _look_and_put(fs: Any, key: str, path: UrlPath, data: bytes, before: bytes | None) -> None:
    there = _there(fs, key)
    if there == data:
        return  # a put that was answered too late, and asked again
    if there != before:
        raise _overtaken(path)
    fs.pipe_file(key, data)


def _put_on_condition(fs: Any, key: str, path: UrlPath, data: bytes, before: bytes | None) -> None:
    condition = {"IfNoneMatch": "*"}
    if before is not None:
        # What has this ETag is what was read: it had it before and after.
        tag = _tag(fs, key)
        there = _there(fs, key)
        if there == data:
            return  # a put that was answered too late, and asked again
        if tag is None or there != before or _tag(fs, key) != tag:
            raise _overtaken(path)
        condition = {"IfMatch": tag}
    try:
        fs.pipe_file(key, data, chunksize=_IN_ONE, **condition)
    except OSError as e:
        if not isinstance(e, FileExistsError | FileNotFoundError) and not _REFUSALS & {*codes(e)}:
            raise
        if _there(fs, key) != data:  # else it was the same put, asked twice
            raise _overtaken(path) from e


def _overtaken(path: UrlPath) -> OvertakenError:
    return OvertakenError(
        f"{path.parent} was changed by another writer meanwhile; nothing is lost: try again"
    )


def _there(fs: Any, key: str) -> bytes | None:
    try:
        found: bytes = fs.cat_file(key)
    except FileNotFoundError:
        return None
    return found


def _tag(fs: Any, key: str) -> str | None:
    try:
        return str(fs.info(key)["ETag"])
    except FileNotFoundError:
        return None


def _keeps(fs: Any, key: str) -> bool:
    """Whether a put on a condition that nothing fulfils is refused."""
    bucket = key.partition("/")[0]
    where = f"{fs.endpoint_url} {os.environ.get('AWS_ENDPOINT_URL')} {bucket}"
    if where not in _keep:
        probe = f"{key.rpartition('/')[0]}/{_PROBE}"
        try:
            fs.pipe_file(probe, b"", IfMatch='"0"')
        except OSError as e:
            refused = isinstance(e, FileNotFoundError) or bool(_REFUSALS & {*codes(e)})
            if not refused and not _UNKNOWN & {*codes(e)}:
                raise
            _keep[where] = refused
        else:
            fs.rm_file(probe)
            _keep[where] = False
    return _keep[where]
