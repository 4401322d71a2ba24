"""Checkpoints of a trainer: there as a whole, with the checksums of their files, or not at all.

What goes on from a checkpoint must be what was written, and half of what is in it are pickles, to
whose bits nobody else looks. So `checksums.json` has the length and SHA-256 of every file beside
it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from ..errors import FileError
from ..files.atomic import replace_file, writing
from ..files.config import as_json, json_object, read_text
from ..files.disk.sealed import check_sums, sums_of

SUMS, STATE = "checksums.json", "trainer_state.json"


@contextlib.contextmanager
def written(folder: Path, *, seals: bool = True) -> Iterator[None]:
    """Write a checkpoint within; where that fails, what was at its place before is there again.

    Args:
        folder: `checkpoint-<step>`. seals: whether this process seals it, and is who cleans up.

    Raises:
        FileError: it can't be written, naming the last checkpoint that is whole.
    """
    before = folder.with_name(f".{folder.name}.before")
    with writing(folder):
        if seals and os.path.lexists(folder):
            shutil.rmtree(before, ignore_errors=True)
            os.rename(folder, before)
    try:
        yield
        if seals:
            seal(folder)
            shutil.rmtree(before, ignore_errors=True)
    except (OSError, RuntimeError, SafetensorError, FileError) as e:
        if seals:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                os.rename(before, folder)
        last = last_checkpoint(folder.parent)
        kept = "" if last is None else f"; {last} is whole"
        raise FileError(f"{folder} can't be written ({_reason(e)}){kept}") from e


def seal(folder: Path) -> None:
    """Write the checksums of all files in a checkpoint.

    Raises:
        FileError: they can't be.
    """
    (folder / SUMS).unlink(missing_ok=True)
    files = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if os.path.isfile(p))
    replace_file(folder / SUMS, as_json(sums_of(folder, sorted(files))).encode())


def check_sealed(folder: Path) -> None:
    """Check that a checkpoint holds what was written, where it has checksums.

    Raises:
        FileError: it does not; naming the file and the remedy.
    """
    if os.path.lexists(folder / SUMS):
        told = json_object(read_text(folder / SUMS), folder / SUMS)
        remedy = f"remove {folder} to go on from the checkpoint before it"
        check_sums(folder, told, f"{remedy}, or its {SUMS} to go on from it as it is")


def drop_older(folder: Path, most: int | None, best: str | None) -> None:
    """Remove all but the newest checkpoints, as transformers does; never the newest, nor the best.

    Args:
        most: how many stay; all when None. best: one that stays.
    """
    found = [p for p in folder.glob("checkpoint-*") if _is_numbered(p) and p.is_dir()]
    if not most or not found:
        return
    found.sort(key=lambda p: p.stat().st_mtime_ns, reverse=True)
    first = [p for p in found if p == found[0] or (best and p.name == Path(best).name)]
    for path in [*first, *(p for p in found if p not in first)][max(most, len(first)) :]:
        shutil.rmtree(path, ignore_errors=True)


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint in a folder that was written whole."""
    found = [p.parent for p in folder.glob(f"checkpoint-*/{STATE}") if _is_whole(p)]
    steps = {int(p.name.removeprefix("checkpoint-")): p for p in found}
    return steps[max(steps)] if steps else None


def _is_whole(state: Path) -> bool:
    """Whether a trainer's state, which it writes last, is there to its end."""
    if not _is_numbered(state.parent):
        return False
    with contextlib.suppress(FileError):
        return bool(json_object(read_text(state), state))
    return False


def _is_numbered(path: Path) -> bool:
    return path.name.removeprefix("checkpoint-").isdecimal()


def _reason(e: BaseException) -> str:
    e = e.__cause__ or e if isinstance(e, FileError) else e  # which names a hidden folder
    return str(getattr(e, "strerror", None) or e).strip().splitlines()[0]
