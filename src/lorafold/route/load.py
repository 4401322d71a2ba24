"""Opening a router of whichever kind it is."""

from __future__ import annotations

import os
from typing import Any

from ..errors import FileError
from . import arrow, centroid, learned, store


def load(path: str | os.PathLike[str], encoder: Any = None) -> Any:
    """A router that `save` wrote.

    Args:
        path: its directory.
        encoder: a function from texts to vectors, or the name of one; the one that was saved by
            name when None.

    Returns:
        A CentroidRouter, LearnedRouter or ArrowRouter.

    Raises:
        FileError: no router, or a damaged one.

    Not for: adapters, which `lf.load` reads.

    Examples:
        >>> import tempfile, lorafold as lf
        >>> from lorafold.route import load
        >>> folder = tempfile.mkdtemp()
        >>> lf.CentroidRouter.fit({"a": ["x", "xx"], "b": ["y", "yy"]}, "ngrams").save(folder)
        >>> load(folder)(["xxx"])
        [{'a': 1.0}]
    """
    kind = store.read(path)[0].get("kind", str)
    if kind == centroid.KIND:
        return centroid.CentroidRouter.load(path, encoder)
    if kind == learned.KIND:
        return learned.LearnedRouter.load(path, encoder)
    if kind == arrow.KIND:
        return arrow.ArrowRouter.load(path)
    raise FileError(f"{path}: it is a router of the unknown kind {kind!r}")
