"""A package that is its verb: `lorafold.fold` is the package and the function at once.

Python binds a submodule to its parent's name when it is imported, so `lorafold.fold` would be the
function or the package depending on what was imported before. So it is both: `make_verb` gives the
package's module a class that calls the function, and loads what it hands on when first asked for.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any


class _Face(ModuleType):
    """A package whose names lie in its files, imported when first asked for."""

    lorafold_homes: Mapping[str, str]

    def __getattr__(self, name: str) -> Any:
        if name not in self.lorafold_homes:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        home = importlib.import_module(f".{self.lorafold_homes[name]}", self.__name__)
        return getattr(home, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system binds a package's files to their names: not over what is handed on.
        if not (isinstance(value, ModuleType) and name in self.__dict__.get("lorafold_homes", ())):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.lorafold_homes})


class _Verb(_Face):
    __doc__ = property(lambda self: self._function().__doc__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function()(*args, **kwargs)

    def _function(self) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function())


def make_face(package: str, homes: Mapping[str, str]) -> None:
    """Have a package hand on names: {name: the file of the package that defines it}."""
    module = sys.modules[package]
    module.__class__ = _Verb if package.rpartition(".")[2] in homes else _Face
    module.__dict__["lorafold_homes"] = homes
