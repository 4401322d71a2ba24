"""Modulated singular directions: which of a weight's directions a `PiSSA` adapter changes.

With W = Σ S_i u_i v_iᵀ and inputs x of the layer, directions are scored by S_i, by how strongly
inputs excite them, mean|v_i · x|, by the product of the two, or by min(std₁, std₂) of v_i · x over
two sets of inputs (chosen and rejected answers): what varies in both can tell them apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import MismatchError
from ...layers.kinds import LayerKind
from ...layers.swap import device_of
from ..run.factors import Modulation
from .calibration import Calibration, DirectionStats, stats_of
from .lora import leading_directions
from .specs import PiSSA


def fresh_modulation(
    spec: PiSSA,
    path: str,
    layer: nn.Module,
    kind: LayerKind,
    generator: torch.Generator,
    used: Iterable[int] = (),
) -> Modulation:
    """The directions that a specification means at one layer, with Δs at its start.

    Args:
        used: directions that kept rounds have taken.

    Raises:
        MismatchError: a calibration that is missing or does not fit, or no direction is left.
    """
    W = kind.matrix(layer, path)
    taken = sorted(set(used))
    select = spec.select or ("min_std" if _has_two(spec.calibration, path) else "s_only")
    if select != "s_only" and spec.calibration is None:
        raise MismatchError(f"select={select!r} needs calibration= (see lf.calibrate)")
    count = spec.rank + len(taken) if select == "s_only" and spec.niter is not None else None
    if count is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        U, S, Vh = leading_directions(W, min(count, *W.shape), spec.niter, generator)
    score = S if select == "s_only" else _score(select, spec.calibration, path, S, Vh)
    score = score.clone()
    score[torch.tensor(taken, dtype=torch.int64)] = -torch.inf
    r = min(spec.rank, len(S) - len(taken))
    if r < 1:
        raise MismatchError(f"kept rounds have taken every direction of module {path!r}")
    index = torch.argsort(score, descending=True, stable=True)[:r]
    noise = torch.zeros(r, dtype=torch.float32)
    if spec.std:
        noise.normal_(generator=generator)
    device = device_of(layer)
    delta = (spec.mean + spec.std * noise).to(device)
    U, S, Vh = (t.to(device, spec.dtype).contiguous() for t in (U[:, index], S[index], Vh[index]))
    return Modulation(kind, U, S, Vh, delta, index.to(device), min(W.shape), select)


def _has_two(calibration: Any, path: str) -> bool:
    if isinstance(calibration, Calibration):
        return calibration.contrasted
    found = calibration.get(path) if isinstance(calibration, Mapping) else None
    return isinstance(found, tuple)


def _score(select: str, calibration: Any, path: str, S: Tensor, Vh: Tensor) -> Tensor:
    stats = _stats(calibration, path, Vh)
    if len(stats.mean_abs) != len(S):
        raise MismatchError(
            f"the calibration of module {path!r} has {len(stats.mean_abs)} directions, the weight "
            f"{len(S)}: it was made with another model"
        )
    if select == "min_std":
        if stats.other_std is None:
            raise MismatchError(
                "select='min_std' needs two sets of inputs: lf.calibrate(…, rejected=…)"
            )
        score = torch.minimum(stats.std, stats.other_std).to(S)
    else:
        score = S * stats.mean_abs.to(S) if select == "wanda" else stats.mean_abs.to(S)
    if not bool(torch.isfinite(score).all()):
        raise MismatchError(f"the calibration of module {path!r} holds NaN or infinite values")
    return score


def _stats(calibration: Any, path: str, Vh: Tensor) -> DirectionStats:
    if not isinstance(calibration, Mapping):
        raise MismatchError(
            "calibration must be what lf.calibrate returned, {path: X} or {path: (X₁, X₂)}, "
            f"found a {type(calibration).__name__}"
        )
    if path not in calibration:
        raise MismatchError(f"the calibration has nothing for module {path!r}")
    found = calibration[path]
    if isinstance(found, DirectionStats):
        return found
    sets = found if isinstance(found, tuple) else (found,)
    if len(sets) not in (1, 2):
        raise MismatchError(
            f"the calibration of module {path!r} must be one set of inputs or two, not {len(sets)}"
        )
    for X in sets:
        if not isinstance(X, Tensor) or X.ndim < 2 or X.shape[-1] != Vh.shape[1] or not len(X):
            raise MismatchError(
                f"the calibration of module {path!r} must be inputs (n, {Vh.shape[1]}), found "
                f"{tuple(X.shape) if isinstance(X, Tensor) else type(X).__name__}"
            )
    return stats_of(sets, Vh)
