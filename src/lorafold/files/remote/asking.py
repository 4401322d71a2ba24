"""Asking a store: by fsspec, again where that may help, and told in one line without secrets.

Only what may be over in a moment is asked again (a connection that breaks, a store that is busy),
a few times, with longer pauses, and never once half a minute is over: the libraries of some stores
are patient themselves.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ...errors import FileError

T = TypeVar("T")

PAUSES = (0.1, 0.4, 1.6)  # seconds before it is asked again
_PATIENCE = 30.0  # seconds after which it is not

# What asking again does not change.
_LASTING = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
)
_LASTING_NUMBERS = {errno.EINVAL, errno.ENOTSUP, errno.EFBIG, errno.ENAMETOOLONG}
_CREDENTIALS = re.compile(r"Credential|AuthToken|TokenRetrieval|SSOToken|ProfileNotFound|Refresh")
_FROM = {
    "s3": "the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), ~/.aws, or the machine's "
    "role; of a public bucket FSSPEC_S3_ANON=true",
    "gs": "the environment (GOOGLE_APPLICATION_CREDENTIALS) or gcloud",
}
_EXTRA = "pip install 'lorafold[remote]'"
_SECRET = re.compile(r"KEY|SECRET|TOKEN|PASSW", re.IGNORECASE)
_LONGEST = 200  # letters of what a store says


def ask(url: str, shown: str, question: Callable[[Any, str], T]) -> T:
    """What a store answers.

    Args:
        url: of a file or folder. shown: what to call that.
        question: given fsspec's file system and the path in it.

    Raises:
        OSError: with what the system would say of a path, `shown` being its name.
        FileError: no such store, none without an extra, or no credentials for it.
    """
    begun = time.monotonic()
    for tried in range(len(PAUSES) + 1):
        fs, path = _file_system(url, shown)
        try:
            return question(fs, path)
        except FileError:
            raise
        except Exception as e:  # what the libraries of stores raise: one or another
            again = tried < len(PAUSES) and time.monotonic() - begun < _PATIENCE
            if not again or not _may_pass(e):
                raise _told(e, fs, url, shown, tried + 1) from e
        time.sleep(PAUSES[tried])
    raise AssertionError("asked once more than there are pauses")


def codes(error: BaseException | None) -> Iterator[str]:
    """What a store calls an error, and what that came from."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            yield str(response.get("Error", {}).get("Code"))
        error = error.__cause__ or error.__context__


def is_s3(fs: Any) -> bool:
    """Whether a file system of fsspec's speaks S3."""
    protocols = fs.protocol if isinstance(fs.protocol, tuple | list) else (fs.protocol,)
    return "s3" in protocols


def _file_system(url: str, shown: str) -> tuple[Any, str]:
    scheme = url.partition("://")[0].lower()
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise FileError(f"{shown}: files at URLs are read with fsspec: {_EXTRA}") from None
    try:
        fs, path = url_to_fs(url, use_listings_cache=False)  # others write there, too
    except ImportError as e:
        needs = _EXTRA if scheme in ("s3", "s3a") else " ".join(str(e).split())
        raise FileError(
            f"{shown}: {scheme}:// needs a package that is not there: {needs}"
        ) from None
    except Exception as e:
        if isinstance(e, ValueError) and "Protocol not known" in str(e):
            raise FileError(f"{shown}: fsspec knows no store by {scheme}://") from None
        raise FileError(f"{shown}: {scheme}:// can't be opened so: {_cleaned(e, None)}") from e
    return fs, str(path)


def _may_pass(e: Exception) -> bool:
    if isinstance(e, _LASTING) or _CREDENTIALS.search(type(e).__name__):
        return False
    if not isinstance(e, OSError) and type(e).__module__ == "builtins":
        return False  # of what is no path there
    return getattr(e, "errno", None) not in _LASTING_NUMBERS


def _told(e: Exception, fs: Any, url: str, shown: str, tried: int) -> Exception:
    """The error as the system's own of a path, or a `FileError` where no path is at fault."""
    scheme = url.partition("://")[0].lower()
    lacking = _CREDENTIALS.search(type(e).__name__)
    if lacking or (isinstance(e, PermissionError) and "Credential" in str(e)):
        where = _FROM.get("s3" if scheme == "s3a" else scheme, "where its fsspec package looks")
        return FileError(
            f"{shown}: no credentials for {scheme}:// were found: they come from {where}"
        )
    if isinstance(e, PermissionError):
        why = "the store does not allow it, with the credentials it was asked with"
        return PermissionError(errno.EACCES, f"{why} ({_cleaned(e, fs)})", shown)
    if isinstance(e, _LASTING):
        number = getattr(e, "errno", None) or _number_of(e)
        return OSError(number, os.strerror(number), shown)  # of the class that has the number
    often = f"; asked {tried} times" if tried > 1 else ""
    number = getattr(e, "errno", None) or errno.EIO
    return OSError(number, f"{_cleaned(e, fs)}{often}", shown)


def _number_of(e: Exception) -> int:
    numbers = {
        FileNotFoundError: errno.ENOENT,
        FileExistsError: errno.EEXIST,
        IsADirectoryError: errno.EISDIR,
        NotADirectoryError: errno.ENOTDIR,
    }
    return next((n for kind, n in numbers.items() if isinstance(e, kind)), errno.ENOTSUP)


def _cleaned(e: Exception, fs: Any) -> str:
    """What an error says, in a line, without what must not be seen."""
    text = " ".join(str(getattr(e, "strerror", None) or e).split()) or type(e).__name__
    hidden = [v for k, v in os.environ.items() if _SECRET.search(k)]
    options = dict(getattr(fs, "storage_options", None) or {})
    hidden += [str(v) for k, v in options.items() if _SECRET.search(str(k))]
    for secret in sorted(hidden, key=len, reverse=True):
        if len(secret) > 3:
            text = text.replace(secret, "…")
    text = re.sub(r"//[^/@\s]*@", "//…@", text)
    text = re.sub(r"\?[^\s\"']*=[^\s\"']*", "?…", text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
