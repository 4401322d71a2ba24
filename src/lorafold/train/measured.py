"""What is logged of adapters while they are trained."""

from __future__ import annotations

from ..adapter import Adapter
from ..attach import Live


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
        adapters each after its name and a slash.
        """
        found: dict[str, float] = {}
        names = self._live.trained
        for name in names:
            now, before = self._live.adapter(name), self._last.get(name)
            head = f"{name}/" if len(names) > 1 else ""
            found[f"{head}norm"] = now.norm()
            if before is not None:
                found[f"{head}moved"] = now.distance(before)
            found[f"{head}rank"] = now.rank
            found[f"{head}trainable"] = sum(p.numel() for p in self._live.parameters(name))
            self._last[name] = now
        return found
