"""YAML whose mappings know their lines, and that says no more and no other than one reads in it.

pyyaml keeps the last of two equal keys, builds what an alias makes of a few lines, however large,
and what holds itself: here each is an error that names the line.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FileError, MissingExtraError
from ..files.config import read_text

_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
_DEEPEST = 500  # brackets within one another
_LARGEST = 10_000  # values in a file


def tables_in(path: Path) -> Any:
    """What a YAML file holds, its mappings as tables (pyyaml must be there).

    Raises:
        FileError: it can't be read, is no YAML, says a key twice, or is a bomb; naming the line.
        MissingExtraError: there is no pyyaml.
    """
    try:
        import yaml
    except ImportError:
        raise MissingExtraError(
            "recipes are YAML, and pyyaml is not there: pip install 'lorafold[merge]'"
        ) from None
    text = read_text(path)
    if _depth(text) > _DEEPEST:  # of which pyyaml's time is the square
        raise FileError(f"{path}: it is nested too deeply")
    loader = None
    try:
        loader = _loader(yaml)(text)
        return loader.get_single_data()
    except RecursionError:
        raise FileError(f"{path}: it is nested too deeply") from None
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = mark.line if mark is not None else text.count("\n", 0, getattr(e, "position", 0))
        problem = getattr(e, "problem", None) or str(e).partition("\n")[0]
        raise FileError(f"{path}: line {line + 1}: {problem}") from e
    finally:
        if loader is not None:
            loader.dispose()


def _depth(text: str) -> int:
    """How many brackets are open at once, at most."""
    steps = (1 if mark in "[{" else -1 for mark in re.findall(r"[][{}]", text))
    return max(itertools.accumulate(steps), default=0)


class Table(dict[Any, Any]):
    """A mapping that knows the line of each of its keys."""

    def __init__(self, values: Mapping[Any, Any], lines: Mapping[str, int]) -> None:
        super().__init__(values)
        self._lines = lines

    def at(self, key: Any) -> str:
        """Where a key stands, for a message; "" where it came with `<<`."""
        line = self._lines.get(str(key))
        return "" if line is None else f"line {line}: "


@functools.cache
def _loader(yaml: Any) -> Any:
    """YAML's safe loader, without what makes a recipe say something else than one reads there."""

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def get_single_data(self) -> Any:
            node = self.get_single_node()
            if node is not None and self._size(node, {}) > _LARGEST:
                self._refuse(node, f"with its aliases it has more than {_LARGEST:,} values")
            self.deep_construct = True  # so that what holds itself is refused
            return None if node is None else self.construct_document(node)

        def table(self, node: Any) -> Table:
            lines: dict[str, int] = {}
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in lines:
                        self._refuse(key, f"{key.value!r} is there twice")
                    lines[key.value] = key.start_mark.line + 1
            return Table(self.construct_mapping(node, deep=True), lines)

        def _size(self, node: Any, known: dict[int, int]) -> int:
            if id(node) not in known:
                known[id(node)] = 1  # of what holds itself: it is refused later
                inner = node.value if isinstance(node.value, list) else []
                pairs = (
                    x for item in inner for x in (item if isinstance(item, tuple) else (item,))
                )
                known[id(node)] = 1 + sum(self._size(x, known) for x in pairs)
            return known[id(node)]

        def _refuse(self, node: Any, problem: str) -> None:
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)

    Loader.add_constructor("tag:yaml.org,2002:map", Loader.table)
    # pyyaml takes 1e-3 and -.5 for texts, which YAML 1.2 does not, nor who writes them.
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))
    return Loader
