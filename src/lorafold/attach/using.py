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
        if self._live.detached:
            return
        before = self._before
        if before is not None:  # some of it may have been removed inside
            named = {name for row in before.rows for name, _ in row.mix}
            before = before.left_by(named - set(self._live.names))
        self._live._show(before)
