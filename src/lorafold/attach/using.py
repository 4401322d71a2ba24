"""What `Live.use` returns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .selection import Selection

if TYPE_CHECKING:
    from .live import Live


class Using:
    """What `use` returns: as a context it gives the earlier selection back when left."""

    def __init__(self, live: Live, before: Selection | None) -> None:
        self._live, self._before = live, before

    def __enter__(self) -> Live:
        return self._live

    def __exit__(self, *_: object) -> None:
        if not self._live.detached:
            self._live._show(self._before)
