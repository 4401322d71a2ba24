"""A base in 4 or 8 bits, in place and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._verb import make_face

if TYPE_CHECKING:
    from .footprint import Footprint as Footprint
    from .quantize import dequantize as dequantize
    from .quantize import quantize_base as quantize_base

__all__ = ["Footprint", "dequantize", "quantize_base"]

make_face(
    __name__, {"Footprint": "footprint", "dequantize": "quantize", "quantize_base": "quantize"}
)
