"""Files to adapters and back: one module per format, PEFT's first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._verb import make_face

if TYPE_CHECKING:
    from .adapter_file import AdapterFile as AdapterFile
    from .opening import load as load
    from .opening import load_many as load_many
    from .opening import open_adapter as open_adapter
    from .save import save as save

__all__ = ["AdapterFile", "load", "load_many", "open_adapter", "save"]

make_face(
    __name__,
    {
        "AdapterFile": "adapter_file",
        "load": "opening",
        "load_many": "opening",
        "open_adapter": "opening",
        "save": "save",
    },
)
