"""route: which adapters an input wants, and how much of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._verb import make_face

if TYPE_CHECKING:
    from .arrow import ArrowRouter as ArrowRouter
    from .centroid import CentroidRouter as CentroidRouter
    from .encoders import ngrams as ngrams
    from .learned import LearnedRouter as LearnedRouter
    from .load import load as load
    from .router import Calibration as Calibration
    from .router import Explanation as Explanation

__all__ = [
    "ArrowRouter",
    "Calibration",
    "CentroidRouter",
    "Explanation",
    "LearnedRouter",
    "load",
    "ngrams",
]

make_face(
    __name__,
    {
        "ArrowRouter": "arrow",
        "Calibration": "router",
        "CentroidRouter": "centroid",
        "Explanation": "router",
        "LearnedRouter": "learned",
        "load": "load",
        "ngrams": "encoders",
    },
)
