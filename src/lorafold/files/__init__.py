"""Files to adapters and back: one module per format, PEFT's first."""

from __future__ import annotations

from .formats.vlora import load_many as load_many
from .peft import AdapterFile as AdapterFile
from .peft import load as load
from .peft import open_adapter as open_adapter
from .save import save as save

__all__ = ["AdapterFile", "load", "load_many", "open_adapter", "save"]
