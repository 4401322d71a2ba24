"""Does a layer compute with the weight that it stores?

On processors with AVX-512, bitsandbytes' kernel for 4 bits takes the wrong scales where a row is no
whole number of groups: some 90 % of such a weight is wrong, in silence. So what the kernel gives is
compared with codes × scales, worked out here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..words import warn
from .storage import storage_of
from .swap import base_modules

ROUNDING = 1e-3  # of a kernel; a wrong scale is off by much more


def misread(layer: Any) -> float:
    """‖K − W‖ / ‖W‖ of the weight K that a layer computes with and the W that it stores.

    0 where they are the same but for rounding, or the layer has no kernel of its own.
    """
    storage = storage_of(layer)
    stored = None if storage.kernel is None else storage.read(layer)
    if storage.kernel is None or stored is None or layer.weight.is_floating_point():
        return 0.0
    stored = stored.float()
    norm = float(torch.linalg.vector_norm(stored))
    wrong = float(torch.linalg.vector_norm(storage.kernel(layer).float() - stored))
    return wrong / norm if wrong > ROUNDING * norm else 0.0


def warn_of_misread(model: nn.Module) -> None:
    """Warn of the layers of a model that compute with another weight than they store."""
    found = {}
    for path, layer in base_modules(model):
        if not _may_be(layer):
            continue
        error = misread(layer)
        if error:
            found[path] = error
    if found:
        first, error = next(iter(found.items()))
        others = f" and {len(found) - 1} more" if len(found) > 1 else ""
        warn(
            f"module {first!r}{others} computes with another weight than it stores, {error:.0%} "
            "off: on this processor, bitsandbytes reads 4-bit rows wrongly that are no whole "
            "groups. lf.dequantize(model) gives the stored weights as floats; lf.quantize_base "
            "takes other groups (group_size=)"
        )


def _may_be(layer: Any) -> bool:
    """Whether a kernel reads its rows in groups that run on; comparing all would take long."""
    state = getattr(getattr(layer, "weight", None), "quant_state", None)
    return state is not None and state.shape[-1] % state.blocksize != 0
