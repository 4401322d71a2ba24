"""fold: many adapters into one library with a stated error per adapter.

`lorafold.fold` is this package and the function at once: `lf.fold(sources, path, tolerance=0.1)`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..adapter import Adapter
    from .folding import fold as fold
    from .library import Library as Library
    from .library import Projection as Projection

__all__ = ["Library", "Projection", "fold"]

_HOME = {"fold": "folding", "Library": "library", "Projection": "library"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


class _Callable(ModuleType):
    # Python binds a submodule to its parent's name when it is imported, so `lorafold.fold` would be
    # the function or the package depending on what was imported before. It is both.
    def __call__(
        self,
        sources: Any,
        path: str | os.PathLike[str] | None = None,
        *,
        tolerance: float | None = None,
        form: str = "auto",
        rank: int | None = None,
        energy: float | None = None,
        bits: float | None = None,
        retention: float | None = None,
        score: Callable[[str, Adapter | None], float] | None = None,
        memory: str | int = "1GiB",
        device: Any = None,
        overwrite: bool = False,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> Library:
        from .folding import fold

        options: Mapping[str, Any] = {
            k: v for k, v in locals().items() if k not in ("self", "fold", "sources", "path")
        }
        return fold(sources, path, **options)


sys.modules[__name__].__class__ = _Callable
