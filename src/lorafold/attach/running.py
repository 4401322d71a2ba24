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

from ..errors import MismatchError, RefusedError
from ..layers.modes import outside_inference_mode
from ..lowrank import LowRank
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
    if not bool(values.isfinite().all()):
        raise MismatchError(f"the gate gave {values.tolist()}, which is not finite")
    found: list[float] = values.expand(len(c)).tolist()
    return found


def no_background(name: str, path: str) -> RefusedError:
    """The error for an adapter that is more than updates of layers."""
    return RefusedError(
        f"{name!r} also holds {path!r} (experts, or a module saved whole), which can't run in the "
        "background: merge it instead (live.merge)"
    )


@outside_inference_mode
def frozen_updates(live: Live, name: str) -> dict[str, LowRank]:
    """{path: update} of an adapter as it is now, to be kept.

    Raises:
        RefusedError: it holds more than updates of layers.
    """
    more = [path for path, saved in live.saved.items() if name in saved.keys]
    for path, experts in live.experts.items():
        if experts.has(name):
            more.append(path)
    if more:
        raise no_background(name, more[0])
    return {path: u for path in live.patches if (u := live.update(name, path)) is not None}


@outside_inference_mode
def rebuild(live: Live) -> None:
    """Make every layer's background from what is kept now."""
    for path, patch in live.patches.items():
        kept = [(live.background[name], c) for name, c in live.kept.items()]
        patch.keep([c * found[path] for found, c in kept if path in found])


def refuse_rows(selection: Selection, live: Live) -> None:
    """Raise a `RefusedError` where rows of a batch would need experts of their own."""
    if selection.uniform:
        return
    blind = [s for s in (*live.experts.values(), *live.patches.values()) if not s.knows_rows]
    for site in blind:
        for name in [*selection.names, *live.kept]:
            if site.has(name) or live.update(name, site.path) is not None:
                raise RefusedError(
                    f"{name!r} updates the experts of {site.path!r}, where routing hides the rows "
                    "of a batch: use one mix for the whole batch"
                )
