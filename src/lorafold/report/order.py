"""In what order adapters stand beside one another, and which of many are drawn."""

from __future__ import annotations

import numpy as np

from ..errors import MissingExtraError
from .section import evenly


def cluster_order(cosines: np.ndarray) -> np.ndarray:
    """An order in which like stands beside like: the leaves of average linkage on 1 − cosine.

    Args:
        cosines: (N, N), symmetric.

    Returns:
        (N,) positions.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    if len(cosines) < 3:
        return np.arange(len(cosines))
    try:
        from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
        from scipy.spatial.distance import squareform
    except ImportError:
        raise MissingExtraError(
            "the order of clusters is scipy's, which is not there: pip install 'lorafold[report]'"
        ) from None
    distances = np.clip(1 - cosines, 0, 2)
    np.fill_diagonal(distances, 0)
    condensed = squareform((distances + distances.T) / 2, checks=False)
    order: np.ndarray = leaves_list(optimal_leaf_ordering(linkage(condensed, "average"), condensed))
    return order


def sample(scores: np.ndarray, most: int) -> np.ndarray:
    """(≤ most,) ascending positions out of (N,): half have the highest scores, half are spread."""
    count = len(scores)
    if count <= most:
        return np.arange(count)
    first = np.argsort(-scores, kind="stable")[: most // 2]
    rest = np.setdiff1d(np.arange(count), first)
    return np.sort(np.concatenate([first, rest[evenly(len(rest), most - len(first))]]))


def nearest(cosines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each one's nearest other, (N,) positions, and their cosine (N,); N ≥ 2."""
    others = np.where(np.eye(len(cosines), dtype=bool), -np.inf, cosines)
    return others.argmax(1), others.max(1)
