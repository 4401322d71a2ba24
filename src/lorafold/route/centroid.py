"""Routing to the nearest centroid: no training, a matrix product, and a threshold that is known.

Every example is held out once: its cosine to its own name's centroid is that to the mean of the
*other* examples of the name. On these scores the threshold is calibrated, and they say which
domains overlap.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import FileError, MismatchError
from ..words import one_line
from . import store
from .encoders import check_width, encoder_of, unit
from .examples import NOWHERE, Examples, checked_error, checked_names
from .router import Calibration, Router

KIND = "centroid"


@dataclass(frozen=True)
class DomainOverlap:
    """Two domains that inputs don't tell apart well.

    Args:
        a, b: their names. cosine: of their centroids.
        confused: the share of the held-out examples of both that are nearer to the other.
    """

    a: str
    b: str
    cosine: float
    confused: float


class CentroidRouter(Router):
    """Routes to the name whose examples an input is most like, or to none.

    `fit` makes one.

    Args:
        names: of the adapters. centroids: (N, D) of length 1, in their order.
        encoder: from texts to vectors: a function, or the name of one.
        calibration: of the threshold; None to abstain from nothing.
        confused: {(a, b): held-out examples of a that are nearer to b}, by position.
        counts: (N,) held-out examples of each name.

    Not for: blends of several adapters, which `LearnedRouter` gives; nor a choice token by token
    (`ArrowRouter`).

    Examples:
        >>> import lorafold as lf
        >>> texts = {
        ...     "sql": ["SELECT a FROM b", "SELECT c FROM d WHERE e", "SELECT f FROM g"],
        ...     "morse": ["-.. --- -", ".... .. -.", "- .... .."],
        ... }
        >>> router = lf.CentroidRouter.fit(texts, "ngrams")
        >>> router(["SELECT x FROM y", ".-. --- --", "Guten Tag!"])
        [{'sql': 1.0}, {'morse': 1.0}, None]
    """

    top_k = 1

    def __init__(
        self,
        names: Sequence[str],
        centroids: Tensor,
        encoder: Any = None,
        calibration: Calibration | None = None,
        confused: Mapping[tuple[int, int], int] | None = None,
        counts: Sequence[int] = (),
    ) -> None:
        self.names, self.centroids = checked_names(names), _checked(centroids, len(names))
        self.width, self.calibration = centroids.shape[1], calibration
        self._confused, self._counts = dict(confused or {}), list(counts) or [0] * len(self.names)
        self.encode_with(encoder)

    def __repr__(self) -> str:
        return f"CentroidRouter({len(self.names)} adapters, vectors of {self.width} numbers)"

    @classmethod
    def fit(
        cls,
        examples: Mapping[str | None, Any],
        encoder: Any = None,
        error: float | None = 0.05,
        *,
        heldout: Mapping[str | None, Any] | None = None,
    ) -> CentroidRouter:
        """A router from examples.

        Args:
            examples: {name: texts or vectors (n, D)}; under None, examples of nothing here, which
                only the threshold is calibrated on.
            encoder: from texts to vectors: a function, or the name of one ("ngrams", or a model
                of sentence-transformers); None where vectors are given.
            error: of the held-out examples that are routed, the share that may go to a wrong name;
                None never abstains.
            heldout: examples to calibrate on; each of `examples` in its turn when None.

        Raises:
            MismatchError: no examples, vectors of different lengths or not finite, an error that is
                no share. MissingExtraError: an encoder's package is not there.
        """
        error = checked_error(error)
        encode = encoder_of(encoder)[0]
        found = Examples.of(examples, encode)
        x, labels = unit(found.vectors), found.labels
        sums = x.new_zeros(len(found.names), x.shape[1])
        known = labels != NOWHERE
        sums.index_add_(0, labels[known], x[known])
        centroids = unit(sums)
        if heldout is None:
            scores, labels = _left_out(x, labels, sums, centroids)
        else:
            own = Examples.of(heldout, encode, found.names, x.shape[1])
            labels = own.labels.to(centroids.device)
            scores = _cosines(unit(own.vectors).to(centroids), centroids)
        if error is not None and not len(scores):
            raise MismatchError(
                "a threshold takes two examples of a name, and every name has one: give more"
            )
        best, chosen = scores.max(1)
        right, named = chosen == labels, labels != NOWHERE
        wrong = (~right & named & best.isfinite()).nonzero().flatten()
        confused = Counter(zip(labels[wrong].tolist(), chosen[wrong].tolist(), strict=True))
        counts = labels[named].bincount(minlength=len(found.names)).tolist()
        router = cls(found.names, centroids, encoder, None, confused, counts)
        router.calibrate_on(best, right, error)
        return router

    def scores(self, vectors: Tensor) -> Tensor:
        """The cosine (B, N) of vectors (B, D) to every centroid; -inf for zeros, like nothing."""
        check_width(vectors, self.width)
        return _cosines(unit(vectors).to(self.centroids), self.centroids)

    def overlaps(self, threshold: float = 0.9) -> list[DomainOverlap]:
        """Domains that overlap, the most confused first.

        Args:
            threshold: centroids of this cosine or more are told as well where no example was
                confused.
        """
        cosines = self.centroids @ self.centroids.T
        near = ((cosines >= threshold).triu(1)).nonzero().tolist()
        pairs = {(min(p), max(p)) for p in self._confused} | {(a, b) for a, b in near}
        found = []
        for a, b in pairs:
            both = self._confused.get((a, b), 0) + self._confused.get((b, a), 0)
            share = both / max(1, self._counts[a] + self._counts[b])
            names = self.names[a], self.names[b]
            found.append(DomainOverlap(*names, float(cosines[a, b]), share))
        return sorted(found, key=lambda o: (-o.confused, -o.cosine, o.a, o.b))

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the router as a directory; an encoder that is a function is not part of it.

        Raises:
            FileError: something is at `path`, and `overwrite` is False or it is no router.
        """
        record = {
            **self.common_record(KIND),
            "confused": [[a, b, n] for (a, b), n in self._confused.items()],
            "counts": [[n] for n in self._counts],
        }
        store.write(path, record, {"centroids": self.centroids}, overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str], encoder: Any = None) -> CentroidRouter:
        """A router that `save` wrote.

        Args:
            encoder: a function, or the name of one; the one that was saved by name when None.

        Raises:
            FileError: no router of this kind, or a damaged one.
        """
        f, tensors = store.read(path, KIND)
        names = f.names()
        centroids = tensors.get("centroids")
        if centroids is None or centroids.ndim != 2 or len(centroids) != len(names):
            raise FileError(f"{f.where}: the centroids are not those of {len(names)} names")
        confused = {(a, b): n for a, b, n in f.counts("confused", 3)}
        counts = [n for (n,) in f.counts("counts", 1)]
        if len(counts) != len(names) or any(max(p) >= len(names) for p in confused):
            raise FileError(f"{f.where}: the counts are not those of {len(names)} names")
        encoder = f.get("encoder", str, type(None)) if encoder is None else encoder
        calibration = Calibration.read(f)
        try:
            router = cls(names, centroids, None, calibration, confused, counts)
        except MismatchError as e:
            raise FileError(f"{f.where}: {e}") from e
        router.encode_with(encoder)
        return router


def _checked(centroids: Any, count: int) -> Tensor:
    fits = isinstance(centroids, Tensor) and centroids.is_floating_point() and centroids.ndim == 2
    if not fits or len(centroids) != count or not centroids.shape[1]:
        shape = tuple(centroids.shape) if isinstance(centroids, Tensor) else one_line(centroids)
        raise MismatchError(f"centroids of {count} names are a tensor ({count}, D), found {shape}")
    length = centroids.double().norm(dim=1)
    if not bool(((length - 1).abs().minimum(length) < 1e-2).all()):  # half types round
        raise MismatchError("a centroid has length 1, or is zero: give unit vectors")
    found: Tensor = centroids
    return found


def _left_out(x: Tensor, labels: Tensor, sums: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines (n, N) with each example out of its own centroid, and the examples' labels.

    The only example of a name is not among them: there is no centroid without it.
    """
    counts = labels[labels != NOWHERE].bincount(minlength=len(sums))
    mine = labels.clamp_min(0)
    kept = (labels == NOWHERE) | (counts[mine] > 1)
    x, labels, mine = x[kept], labels[kept], mine[kept]
    scores = _cosines(x, centroids)
    own = (x * unit(sums[mine] - x)).sum(1)
    known = (labels != NOWHERE) & x.any(1)
    scores[known, labels[known]] = own[known]
    return scores, labels


def _cosines(x: Tensor, centroids: Tensor) -> Tensor:
    """Of rows of length 1, or 0."""
    return (x @ centroids.T).masked_fill(~x.any(1, keepdim=True), -math.inf)
