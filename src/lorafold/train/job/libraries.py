"""The libraries that a run takes, imported when it begins, and kept from talking meanwhile."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...errors import MissingExtraError


@dataclass(frozen=True)
class Libraries:
    """datasets, transformers and trl."""

    datasets: Any
    transformers: Any
    trl: Any


def libraries() -> Libraries:
    """The three of them.

    Raises:
        MissingExtraError: one is not there.
    """
    try:
        import accelerate  # noqa: F401  (the trainers ask for it when they are made)
        import datasets
        import transformers
        import trl
    except ImportError as e:
        raise MissingExtraError(
            f"training takes {e.name}, which is not there: pip install 'lorafold[train]'"
        ) from e
    return Libraries(datasets, transformers, trl)


@contextlib.contextmanager
def without_bars(of: Libraries) -> Iterator[None]:
    """While they run, they draw no bars, and warn of nothing that users can't change."""
    logs, bars = of.transformers.utils.logging, of.datasets.utils
    was = logs.is_progress_bar_enabled(), bars.are_progress_bars_disabled()
    logs.disable_progress_bar()
    bars.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if was[0]:
            logs.enable_progress_bar()
        if not was[1]:
            bars.enable_progress_bars()
