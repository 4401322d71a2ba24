"""Adapters into one adapter, and an adapter into a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._verb import make_face

if TYPE_CHECKING:
    from .extract import extract as extract
    from .into_checkpoint import Merged as Merged
    from .into_checkpoint import merge_into_weights as merge_into_weights
    from .merge import merge as merge
    from .recipe import Recipe as Recipe
    from .verify import Verification as Verification
    from .verify import verify_merge as verify_merge

__all__ = [
    "Merged",
    "Recipe",
    "Verification",
    "extract",
    "merge",
    "merge_into_weights",
    "verify_merge",
]

make_face(
    __name__,
    {
        "merge": "merge",
        "Merged": "into_checkpoint",
        "Recipe": "recipe",
        "Verification": "verify",
        "extract": "extract",
        "merge_into_weights": "into_checkpoint",
        "verify_merge": "verify",
    },
)
