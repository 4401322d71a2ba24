"""Where an attached adapter comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..adapter import Adapter
from .spec import Spec

if TYPE_CHECKING:
    from ..fold import Library


@dataclass
class Source:
    """Where an attached adapter comes from: one of the three.

    Args:
        adapter: held as it was given. library: that holds it. key: of the trained factors.
        spec: that trained factors were made from. rank: its largest. config: it is saved with.
    """

    rank: int
    adapter: Adapter | None = None
    library: Library | None = None
    key: str | None = None
    spec: Spec | None = None
    config: Mapping[str, Any] | None = None
