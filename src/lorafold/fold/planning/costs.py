"""What forms cost, in bytes."""

from __future__ import annotations

import numpy as np

from .plan import Shared


def _there(energy: np.ndarray, U: Shared | None, V: Shared | None) -> np.ndarray:
    """(N, k) True for the components that cores have: no more than either side has columns."""
    most = np.full(len(energy), energy.shape[1])
    for shared in (U, V):
        if shared is not None:
            for g, basis in shared.bases.items():
                most[shared.groups == g] = np.minimum(most[shared.groups == g], basis.rank)
    there: np.ndarray = np.arange(energy.shape[1]) < most[:, None]
    return there
