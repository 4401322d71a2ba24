"""attach: adapters on a running model, any rank, any strength, exactly reversible.

`lorafold.attach` is this package and the function at once: `live = lf.attach(model, adapter)`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .attaching import attach as attach
    from .calibration import calibrate as calibrate
    from .export import merge_into_weights as merge_into_weights
    from .footprint import Footprint as Footprint
    from .live import Live as Live
    from .quantizing import dequantize as dequantize
    from .quantizing import quantize_base as quantize_base
    from .spec import LoRA as LoRA
    from .spec import PiSSA as PiSSA

_HOME = {
    "attach": "attaching",
    "calibrate": "calibration",
    "merge_into_weights": "export",
    "quantize_base": "quantizing",
    "dequantize": "quantizing",
    "Footprint": "footprint",
    "Live": "live",
    "LoRA": "spec",
    "PiSSA": "spec",
}

__all__ = [
    "Footprint",
    "Live",
    "LoRA",
    "PiSSA",
    "attach",
    "calibrate",
    "dequantize",
    "merge_into_weights",
    "quantize_base",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


class _Callable(ModuleType):
    # As for `fold`: the package and the function share a name, and are one object.
    def __call__(
        self,
        model: Any,
        x: Any,
        *,
        slots: int | None = None,
        max_rank: int | None = None,
        cache: str | int | None = None,
        trainable: bool = False,
        dtype: torch.dtype | None = None,
        rank_scaling: str = "constant",
    ) -> Live:
        from .attaching import attach

        return attach(
            model,
            x,
            slots=slots,
            max_rank=max_rank,
            cache=cache,
            trainable=trainable,
            dtype=dtype,
            rank_scaling=rank_scaling,
        )


sys.modules[__name__].__class__ = _Callable
