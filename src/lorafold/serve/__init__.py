"""serve: one base and many adapters over HTTP, each request with its own mix, c and rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._verb import make_face

if TYPE_CHECKING:
    from .base import Base as Base
    from .base import Room as Room
    from .base import read_base as read_base
    from .engine import Engine as Engine
    from .engine import Limits as Limits
    from .engine import Piece as Piece
    from .engine import Request as Request
    from .engine import Sampling as Sampling
    from .http.app import app as app
    from .http.service import Settings as Settings

make_face(
    __name__,
    {
        **dict.fromkeys(("Base", "Room", "read_base"), "base"),
        **dict.fromkeys(("Engine", "Limits", "Piece", "Request", "Sampling"), "engine"),
        "app": "http.app",
        "Settings": "http.service",
    },
)
