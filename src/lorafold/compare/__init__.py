"""Who is like whom: all pairs, two adapters, one adapter, and what a collection shares."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._verb import make_face

if TYPE_CHECKING:
    from .anatomy import Anatomy as Anatomy
    from .anatomy import Anomaly as Anomaly
    from .anatomy import ModuleAnatomy as ModuleAnatomy
    from .anatomy import anatomy as anatomy
    from .overlap import ModuleOverlap as ModuleOverlap
    from .overlap import Overlap as Overlap
    from .overlap import overlap as overlap
    from .shared import SharedSide as SharedSide
    from .shared import SharedSpectrum as SharedSpectrum
    from .shared import shared_spectrum as shared_spectrum
    from .similarity import Outlier as Outlier
    from .similarity import Pair as Pair
    from .similarity import Similarity as Similarity
    from .similarity import similarity as similarity

__all__ = [
    "Anatomy",
    "Anomaly",
    "ModuleAnatomy",
    "ModuleOverlap",
    "Outlier",
    "Overlap",
    "Pair",
    "SharedSide",
    "SharedSpectrum",
    "Similarity",
    "anatomy",
    "overlap",
    "shared_spectrum",
    "similarity",
]

make_face(
    __name__,
    {
        "similarity": "similarity",
        "Similarity": "similarity",
        "Pair": "similarity",
        "Outlier": "similarity",
        "overlap": "overlap",
        "Overlap": "overlap",
        "ModuleOverlap": "overlap",
        "anatomy": "anatomy",
        "Anatomy": "anatomy",
        "ModuleAnatomy": "anatomy",
        "Anomaly": "anatomy",
        "shared_spectrum": "shared",
        "SharedSpectrum": "shared",
        "SharedSide": "shared",
    },
)
