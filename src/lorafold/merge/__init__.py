"""Adapters into one adapter, and an adapter into a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._verb import make_face

if TYPE_CHECKING:
    from .into_checkpoint import Merged as Merged
    from .into_checkpoint import merge_into_weights as merge_into_weights
    from .merge import merge as merge
    from .recipe import Recipe as Recipe

__all__ = ["Merged", "Recipe", "merge", "merge_into_weights"]

make_face(
    __name__,
    {
        "merge": "merge",
        "Merged": "into_checkpoint",
        "Recipe": "recipe",
        "merge_into_weights": "into_checkpoint",
    },
)
