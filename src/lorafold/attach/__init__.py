"""attach: adapters on a running model, any rank, any strength, exactly reversible.

`lorafold.attach` is this package and the function at once: `live = lf.attach(model, adapter)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._verb import make_face

if TYPE_CHECKING:
    from .attach import attach as attach
    from .begin.calibration import calibrate as calibrate
    from .begin.loadings import Loadings as Loadings
    from .begin.specs import LoRA as LoRA
    from .begin.specs import PiSSA as PiSSA
    from .live import Live as Live
    from .selection import TokenMix as TokenMix

__all__ = ["Live", "LoRA", "Loadings", "PiSSA", "TokenMix", "attach", "calibrate"]

make_face(
    __name__,
    {
        "attach": "attach",
        "calibrate": "begin.calibration",
        "Live": "live",
        "LoRA": "begin.specs",
        "Loadings": "begin.loadings",
        "PiSSA": "begin.specs",
        "TokenMix": "selection",
    },
)
