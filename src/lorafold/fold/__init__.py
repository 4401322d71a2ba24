"""fold: many adapters into one library with a stated error per adapter.

`lorafold.fold` is this package and the function at once: `lf.fold(sources, path, tolerance=0.1)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._verb import make_face

if TYPE_CHECKING:
    from .fold import fold as fold
    from .library import Library as Library
    from .library import Projection as Projection
    from .repair import Repair as Repair
    from .repair import repair as repair

__all__ = ["Library", "Projection", "Repair", "fold", "repair"]

make_face(
    __name__,
    {
        "fold": "fold",
        "Library": "library",
        "Projection": "library",
        "Repair": "repair",
        "repair": "repair",
    },
)
