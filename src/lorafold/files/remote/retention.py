"""Old files of a folder that is changed by new ones: kept for as long as somebody may read them.

A store has no open files: what is removed is gone for who still reads an older state. So a file
that is needed no more is noted when that is first seen, and removed by a change that comes a day
later at least. The time is the store's, for machines disagree. A note that is lost, or that two
writers make at once, delays a removal and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Collection
from datetime import timezone

from ...errors import FileError
from .asking import ask
from .place import UrlPath

KEPT = 24 * 3600.0  # seconds that a file is there after it was seen to be needed no more
NOTES = ".retired.json"  # {name: when that was, in seconds since 1970}


def retire(
    folder: UrlPath, unneeded: Collection[str], newest: str, till_now: Collection[str] = ()
) -> None:
    """Note files that are needed no more, and remove those that were noted long ago.

    Args:
        folder: where they are. unneeded: their names; they are there.
        newest: name of a file that was just written, by which the store says what time it is.
        till_now: names that were needed until just now, whatever was noted of them.

    Raises:
        OSError, FileError: as `asking.ask`; what is not noted or removed then is so later.
    """
    noted = _noted(folder)
    if not noted and not unneeded:
        return
    now = _written(folder / newest)
    notes = {name: now if name in till_now else noted.get(name, now) for name in unneeded}
    old = [name for name, since in notes.items() if now - since >= KEPT]
    for name in old:
        # One that came again meanwhile, the same bytes under the same name, is somebody's.
        if now - _written(folder / name) >= KEPT:
            (folder / name).unlink()
            del notes[name]
        else:
            notes[name] = now
    if notes != noted:
        (folder / NOTES).write_bytes(json.dumps(notes, sort_keys=True).encode())


def _noted(folder: UrlPath) -> dict[str, float]:
    with contextlib.suppress(OSError, FileError, ValueError):
        found = json.loads((folder / NOTES).read_bytes())
        if isinstance(found, dict):
            return {k: float(v) for k, v in found.items() if isinstance(v, int | float)}
    return {}


def _written(path: UrlPath) -> float:
    """When a file was written, in the store's time; now, where it does not say."""
    try:
        found = ask(path.url, str(path), lambda fs, key: fs.modified(key))
    except OSError:
        return time.time()
    return float(found.replace(tzinfo=found.tzinfo or timezone.utc).timestamp())
