"""What a module does in its model: module paths to roles, and several projections in one weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._verb import make_face

if TYPE_CHECKING:
    from .fused import Heads as Heads
    from .fused import Packing as Packing
    from .fused import heads as heads
    from .fused import packing as packing
    from .onto import known_packings as known_packings
    from .onto import onto as onto
    from .role import Role as Role
    from .roles import recognised as recognised
    from .roles import roles as roles
    from .roles import told as told
    from .tables import ORDERS as ORDERS

__all__ = [
    "ORDERS",
    "Heads",
    "Packing",
    "Role",
    "heads",
    "known_packings",
    "onto",
    "packing",
    "recognised",
    "roles",
    "told",
]

make_face(
    __name__,
    {
        "roles": "roles",
        "recognised": "roles",
        "told": "roles",
        "Role": "role",
        "ORDERS": "tables",
        "Heads": "fused",
        "Packing": "fused",
        "heads": "fused",
        "packing": "fused",
        "onto": "onto",
        "known_packings": "onto",
    },
)
