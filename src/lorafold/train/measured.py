"""What is logged of adapters while they are trained."""

from __future__ import annotations

import math

from ..adapter import Adapter
from ..attach import Live
from .many import finite


class Measured:
    """Sizes of the trained adapters, and how far each has moved since it was asked last.

    Args:
        live: the handle.
    """

    def __init__(self, live: Live) -> None:
        self._live = live
        self._last: dict[str, Adapter] = {}

    def __call__(self) -> dict[str, float]:
        """`norm` ‖ΔW‖, `moved` ‖ΔW − ΔW before‖, `rank` and `trainable` (numbers); of several
        adapters each after its name and a slash. The norm of what is not finite is NaN.
        """
        found: dict[str, float] = {}
        names = self._live.trained
        for name in names:
            head = f"{name}/" if len(names) > 1 else ""
            own = list(self._live.parameters(name))
            found[f"{head}trainable"] = sum(p.numel() for p in own)
            if not finite(own):
                found[f"{head}norm"] = math.nan
                continue
            now, before = self._live.adapter(name), self._last.get(name)
            found[f"{head}norm"], found[f"{head}rank"] = now.norm(), now.rank
            if before is not None:
                found[f"{head}moved"] = now.distance(before)
            self._last[name] = now
        return found
