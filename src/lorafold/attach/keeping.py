"""Kept rounds: adapters that run in the background of whatever is current.

The updates that are kept are concatenated at each layer into one pair of factors, with their
coefficients in B; a dense ΔW never appears. A gate says when they run: "current", only where a
current adapter has c ≠ 0, so that the reference pass c = 0 is the pristine base; "always"; or a
function of the rows' coefficients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from ..errors import MismatchError
from ..lowrank import LowRank
from .fresh import Kept
from .selection import Selection

if TYPE_CHECKING:
    from .live import Live

Gate: TypeAlias = "str | Callable[[Tensor], Any]"


def checked_gate(gate: Any) -> Gate:
    """The gate, if it is one."""
    if gate not in ("current", "always") and not callable(gate):
        raise MismatchError(f"gate must be 'current', 'always' or a function, found {gate!r}")
    return gate  # type: ignore[no-any-return]


def gates_of(gate: Gate, selection: Selection) -> list[float]:
    """How much of the background each row gets."""
    if gate == "always":
        return [1.0] * len(selection.rows)
    if gate == "current":
        return [float(row.on) for row in selection.rows]
    assert callable(gate)
    c = torch.zeros(len(selection.rows), selection.width, dtype=torch.float64)
    for i, row in enumerate(selection.rows):
        for j, (_, value) in enumerate(row.mix):
            c[i, j] = value
    values = torch.as_tensor(gate(c), dtype=torch.float64).flatten()
    if values.numel() not in (1, len(c)):
        raise MismatchError(f"the gate gave {values.numel()} values for {len(c)} rows")
    found: list[float] = values.expand(len(c)).tolist()
    return found


def rebuild(live: Live) -> None:
    """Make every layer's background from what is kept now."""
    for path, patch in live.patches.items():
        updates: list[LowRank] = []
        for name, c in live.kept.items():
            u = live.update(name, path)
            if u is not None:
                updates.append(c * u)
        patch.kept = Kept(patch.kind, updates, patch.device) if updates else None
