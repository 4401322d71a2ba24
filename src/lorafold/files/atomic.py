"""Directories and files that appear whole or not at all.

What is written goes to a hidden sibling on the same file system, is flushed to the disk, and only
then takes its name in one rename: a process killed at any moment leaves the old state or the new
one. Where something is replaced, the two names are exchanged in one step (renameat2 with
RENAME_EXCHANGE), so that no moment exists without the one or the other. File systems that can't
exchange get two renames; a kill between them leaves the old state set aside under a hidden name,
which `set_aside` finds.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

from safetensors import SafetensorError

from ..errors import FileError
from .remote.place import Place, UrlPath, is_url, new_place, place_of
from .remote.writing import appearing_at, file_appearing_at
from .replacing import (
    FileKind,
    Kind,
    check_apart,
    check_named,
    check_replaceable,
    is_free,
    keep_others,
)

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

HAS_LOCKS = fcntl is not None

READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC
CREATE_FLAGS = (
    os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
)  # for one that mustn't be there yet

_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_CANNOT = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}
_STAGING = re.compile(r"\..*\.[0-9a-f]{16}\.tmp", re.DOTALL)
_swept: set[Path] = set()  # folders already cleared of what killed writers left, in this process


@contextlib.contextmanager
def writing(target: Place) -> Iterator[None]:
    """Tell what the system says where the target is written as a `FileError` that names it."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or e
        other = os.fsdecode(getattr(e, "filename", None) or "")
        about = f" ({other})" if other and not _STAGING.search(other) else ""
        raise FileError(f"{target} can't be written: {reason}{about}") from e


@contextlib.contextmanager
def new_directory(
    path: str | os.PathLike[str],
    kind: Kind,
    *,
    sources: Iterable[str | os.PathLike[str] | None] = (),
    overwrite: bool = False,
) -> Iterator[Path]:
    """A fresh directory to fill, which takes the name `path` when the block ends well.

    On normal exit every file in it is flushed to the disk and the directory renamed into place; on
    an exception it is removed and whatever is at `path` stays untouched. Missing parents are
    created. A symbolic link at `path` is refused. An old state of it that an overwrite set aside
    when it was killed, where names can't be exchanged, is put back first.

    An empty directory counts as nothing. Of what is replaced, only the files go that are of the
    kind's own; the others stay.

    At a URL, what was written on this machine is put there at the end, file after file: see
    `remote.writing`.

    Args:
        path: the directory to appear.
        kind: what is written.
        sources: files and folders that it is made from: the directory is, holds and lies in none.
        overwrite: replace a directory of this kind that is there.

    Returns:
        A context manager giving the staging directory, an empty sibling of `path`.

    Raises:
        FileError: something is there and `overwrite` is False, it is not of this kind, it is (or
            holds) the current directory, or one of the sources is in the way; before the block is
            entered, except for what appeared meanwhile. Or it can't be written: the disk is full.

    Examples:
        >>> import tempfile
        >>> from lorafold.files.save import ADAPTER
        >>> folder = Path(tempfile.mkdtemp())
        >>> with new_directory(folder / "out", ADAPTER) as staging:
        ...     _ = (staging / "a.txt").write_text("whole")
        >>> (folder / "out" / "a.txt").read_text()
        'whole'
    """
    if is_url(path):
        with writing(place_of(path)):
            yield from appearing_at(new_place(path), kind, sources, overwrite)
        return
    target = _place(path)
    with writing(target):
        yield from _appearing(path, target, kind, sources, overwrite)


def _appearing(
    path: str | os.PathLike[str],
    target: Path,
    kind: Kind,
    sources: Iterable[str | os.PathLike[str] | None],
    overwrite: bool,
) -> Iterator[Path]:
    """The staging directory; what follows makes it the target."""
    check_apart(target, sources)
    _recover(target, kind)
    check_replaceable(target, kind, overwrite, path)
    replaces = not is_free(target)
    with parents(target) as created:
        _remove_dead_staging(target.parent)
        staging, lock = _new_staging(target)
        try:
            yield staging
            if replaces and os.path.lexists(target):
                check_replaceable(target, kind, overwrite, path)  # it may have changed meanwhile
                keep_others(target, staging, kind)
            _sync_tree(staging)
            _move_into_place(staging, target, replaces)
        except BaseException:
            _remove(staging)
            raise
        finally:
            if lock is not None:
                os.close(lock)
    for parent in (target.parent, *(p.parent for p in reversed(created))):
        sync_directory(parent)
    # After the exchange the old state lies under the staging name. It goes last: had the flush
    # above failed, the disk could still need it.
    _remove_replaced(staging, target, kind)


@contextlib.contextmanager
def new_file(
    path: str | os.PathLike[str],
    kind: FileKind,
    *,
    sources: Iterable[str | os.PathLike[str] | None] = (),
    overwrite: bool = False,
) -> Iterator[Path]:
    """A path to write a file at, which takes the name `path` when the block ends well.

    As `new_directory`, for what is one file: whole or not at all, missing parents are created, a
    symbolic link at `path` is refused, and at a URL it is put there at the end. A file that is
    replaced leaves its permissions to the new one.

    Args:
        path: the file to appear.
        kind: what is written.
        sources: files and folders that it is made from: the file is and lies in none.
        overwrite: replace a file of this kind that is there.

    Returns:
        A context manager giving a path where nothing is yet.

    Raises:
        FileError: something is there and `overwrite` is False, it is not of this kind, or a source
            is in the way; before the block is entered, except for what appeared meanwhile. Or it
            can't be written: the disk is full.
    """
    if is_url(path):
        with writing(place_of(path)):
            yield from file_appearing_at(new_place(path), kind, sources, overwrite)
        return
    target = _place(path)
    with writing(target):
        yield from _file_appearing(path, target, kind, sources, overwrite)


def _file_appearing(
    path: str | os.PathLike[str],
    target: Path,
    kind: FileKind,
    sources: Iterable[str | os.PathLike[str] | None],
    overwrite: bool,
) -> Iterator[Path]:
    """Where to write; what follows makes it the target."""
    check_apart(target, sources)
    check_replaceable(target, kind, overwrite, path)
    with parents(target) as created:
        _remove_dead_staging(target.parent)
        staging, lock = _new_staging(target)
        try:
            new = staging / f"new{kind.ending}"
            yield new
            check_replaceable(target, kind, overwrite, path)  # it may have changed meanwhile
            with contextlib.suppress(FileNotFoundError):
                os.chmod(new, stat.S_IMODE(os.stat(target).st_mode))
            _sync_tree(staging)
            if os.path.lexists(target) or not _rename_with(new, target, _RENAME_NOREPLACE):
                os.replace(new, target)
        finally:
            _remove(staging)
            if lock is not None:
                os.close(lock)
    for parent in (target.parent, *(p.parent for p in reversed(created))):
        sync_directory(parent)


def replace_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file, new or in place of the old one, so that a reader sees the one or the other.

    The permissions of a file that is replaced are kept. Of a symbolic link it takes the place: what
    that leads to stays as it is.

    Args:
        path: the file.
        data: all of its content.

    Raises:
        FileError: it can't be written: the disk is full, a folder is not there.
    """
    if is_url(path):
        url = place_of(path)
        assert isinstance(url, UrlPath)
        with writing(url):
            url.write_bytes(data)
        return
    target = _place(path)
    with writing(target):
        _replace(target, data)


def _replace(target: Path, data: bytes) -> None:
    temporary = _sibling(target, "tmp")
    descriptor = os.open(temporary, CREATE_FLAGS, 0o666)
    try:
        try:
            if hasattr(os, "fchmod"):
                with contextlib.suppress(OSError):
                    os.fchmod(descriptor, stat.S_IMODE(os.stat(target).st_mode))
            write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_directory(target.parent)


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Flush a directory's entries to the disk, so that names given or taken survive a power cut.

    Args:
        path: the directory.
    """
    descriptor = os.open(path, READ_FLAGS)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such
            raise
    finally:
        os.close(descriptor)


def set_aside(path: str | os.PathLike[str]) -> list[Path]:
    """Old states of `path` that overwrites left under hidden names, the newest last.

    They were killed between two renames, on file systems that can't exchange names.

    Args:
        path: what was being overwritten.
    """
    if is_url(path):
        return []
    target = Path(os.path.abspath(path))
    pattern = re.compile(re.escape(f".{_short(target)}.") + r"[0-9a-f]{16}\.old")
    try:
        names = os.listdir(target.parent)
        found = [target.parent / name for name in names if pattern.fullmatch(name)]
        return sorted(found, key=lambda path: (os.lstat(path).st_mtime_ns, path))
    except OSError:
        return []


def appears(path: str | os.PathLike[str]) -> bool:
    """Whether something is at `path`, or comes there in a moment: an overwrite has it set aside."""
    if is_url(path):
        return place_of(path).exists()
    for pause in (0.001, 0.01, 0.1):
        if os.path.lexists(path) or not set_aside(path):
            break
        time.sleep(pause)
    return os.path.lexists(path)


def try_lock(descriptor: int) -> bool:
    """Lock without waiting; False when someone else holds it."""
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def share_lock(descriptor: int) -> bool:
    """Lock together with others who share it, without waiting; False when someone holds it alone.

    Raises:
        OSError: there are no locks here.
    """
    if fcntl is None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(descriptor: int) -> None:
    """Let go of what `try_lock` or `share_lock` locked."""
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def is_still_at(descriptor: int, path: Path) -> bool:
    """Whether `path` still names the open file, itself and not by a link."""
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)


def write_all(descriptor: int, data: bytes | bytearray | memoryview) -> None:
    """Write all of `data`, however many calls it takes (Linux writes 2 GiB at most in one)."""
    view = memoryview(data).cast("B")
    while len(view):
        view = view[os.write(descriptor, view) :]


# Names


def _place(path: str | os.PathLike[str]) -> Path:
    """Absolute; a link that it is is not followed."""
    check_named(path)
    target = Path(os.path.abspath(path))
    if not target.name:
        raise FileError(f"{path} is the root of a file system, not a place to write to")
    return target


def _short(target: Path) -> str:
    return target.name[:40]  # 40 characters of 4 bytes and our own stay below the usual limit, 255


def _sibling(target: Path, suffix: str) -> Path:
    return target.with_name(f".{_short(target)}.{secrets.token_hex(8)}.{suffix}")


@contextlib.contextmanager
def parents(target: Path) -> Iterator[list[Path]]:
    """Make the folders that are missing above a target, outermost first; none stays on an error."""
    created: list[Path] = []
    try:
        _make_parents(target.parent, created)
        yield created
    except BaseException:
        for parent in reversed(created):
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def _make_parents(parent: Path, created: list[Path]) -> None:
    missing = []
    while not os.path.exists(parent):
        missing.append(parent)
        parent = parent.parent
    missing.reverse()
    try:
        for path in missing:
            path.mkdir(exist_ok=True)
            created.append(path)
    except (FileExistsError, NotADirectoryError) as e:
        raise FileError(f"{e.filename} is in the way: it is not a directory") from e


# Staging directories. A writer locks its own, so that the ones without a living writer are known.


def _new_staging(target: Path) -> tuple[Path, int | None]:
    while True:
        staging = _sibling(target, "tmp")
        try:
            os.mkdir(staging)  # not tempfile.mkdtemp, whose 0700 would stay with the result
        except NotADirectoryError as e:
            raise FileError(f"{target.parent} is not a directory") from e
        if fcntl is None:
            return staging, None
        lock = None
        try:
            lock = os.open(staging, READ_FLAGS)
            if try_lock(lock) and is_still_at(lock, staging):
                return staging, lock
        except FileNotFoundError:
            pass
        except OSError:  # no locks on this file system; nobody will take the staging for dead
            if lock is not None:
                os.close(lock)
            return staging, None
        # Another process took it for dead between the two calls above. Once more.
        if lock is not None:
            os.close(lock)


def _remove_dead_staging(parent: Path) -> None:
    """Remove what killed writers left in `parent`; once per process, as a folder may be long."""
    if fcntl is None or parent in _swept:
        return
    _swept.add(parent)
    try:
        names = os.listdir(parent)
    except OSError:  # one may write to a folder without the right to list it
        return
    for name in names:
        path = parent / name
        if not _STAGING.fullmatch(name) or path.is_symlink() or not path.is_dir():
            continue
        with contextlib.suppress(OSError):
            lock = os.open(path, READ_FLAGS)
            try:
                if try_lock(lock):
                    _remove(path)
            finally:
                os.close(lock)


def _recover(target: Path, kind: Kind) -> None:
    """After an overwrite that was killed between two renames, put the old state back.

    One that was killed after them has left an old state that nobody needs, and that goes.
    """
    for old in set_aside(target):
        if _has_writer(old.with_suffix(".tmp")):
            continue
        with contextlib.suppress(OSError):
            if is_free(target):
                os.rename(old, target)
            elif kind.known(target) and kind.known(old):
                _remove_replaced(old, target, kind)


def _has_writer(staging: Path) -> bool:
    """Whether whoever writes there is alive."""
    try:
        lock = os.open(staging, READ_FLAGS)
    except OSError:
        return False
    try:
        return not try_lock(lock)
    except OSError:  # no locks on this file system
        return True
    finally:
        os.close(lock)


def _remove(path: Path) -> None:
    """Remove a file or a tree, as far as it goes: what remains is hidden, and in nobody's way."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _remove_replaced(old: Path, new: Path, kind: Kind) -> None:
    """Remove the old state; not what came into it since the rest was linked into the new one."""
    if old.is_dir():
        try:
            keep_others(old, new, kind)
        except FileError:
            os.rename(old, _sibling(new, "old"))
            return
    _remove(old)


def _sync_tree(top: Path) -> None:
    """Flush all files and directories under `top`, innermost first."""
    for folder, _, names in os.walk(top, topdown=False):
        for name in names:
            path = os.path.join(folder, name)
            if stat.S_ISREG(os.lstat(path).st_mode):
                descriptor = os.open(path, READ_FLAGS)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        sync_directory(folder)


# Renames


def _move_into_place(staging: Path, target: Path, replaces: bool) -> None:
    """Give `staging` the name `target`; what was there takes the staging name."""
    if is_free(target):
        if target.is_dir():
            shutil.copymode(target, staging)  # one made beforehand may be meant to be private
        try:
            if target.is_dir() or not _rename_with(staging, target, _RENAME_NOREPLACE):
                # A directory takes the place of an empty one only: nothing is lost in a race.
                os.rename(staging, target)
        except OSError as e:
            if e.errno == errno.EBUSY:
                raise FileError(f"{target} is a mount point: name a folder inside it") from e
            if e.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise FileError(f"{target} appeared while it was being written") from e
    elif not replaces:
        raise FileError(f"{target} appeared while it was being written; give overwrite=True")
    elif not _rename_with(staging, target, _RENAME_EXCHANGE):
        old = staging.with_suffix(".old")  # by whose lock it is known if the writer lives
        os.rename(target, old)
        try:
            os.rename(staging, target)
        except BaseException:
            os.rename(old, target)
            raise
        with contextlib.suppress(OSError):  # the new one is in place: too late to fail
            os.rename(old, staging)


def _rename_with(source: Path, target: Path, flags: int) -> bool:
    """Rename by renameat2; False where the system or the file system doesn't have it."""
    number = _renameat2(os.fsencode(source), os.fsencode(target), flags)
    if number in _CANNOT:
        return False
    if number:
        raise OSError(number, os.strerror(number), str(source), None, str(target))
    return True


def _renameat2(source: bytes, target: bytes, flags: int) -> int:
    """The system call: 0, or the error's number."""
    if not sys.platform.startswith("linux"):
        return errno.ENOSYS
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return errno.ENOSYS
    here = -100  # AT_FDCWD; the paths are absolute
    done: int = library.renameat2(here, source, here, target, flags)
    return ctypes.get_errno() if done else 0
