"""The formats beside PEFT's that adapters are written in: for each a file here, and a line below.

Nothing here imports torch, as the command line lists these formats in its help.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ...adapter import Adapter

_WRITERS = {"mlx": "mlx_writing:mlx_form"}
WRITTEN = tuple(_WRITERS)


@dataclass(frozen=True)
class Written:
    """An adapter in another format: what `save` writes into a directory.

    Args:
        file: the name of the file of tensors.
        tensors: {key: tensor} in it.
        metadata: of its header.
        config: of adapter_config.json.
    """

    file: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    config: Mapping[str, Any]


class Writer(Protocol):
    """What puts an adapter into a format; it raises where the format can't hold a part of it."""

    def __call__(
        self,
        adapter: Adapter,
        *,
        base: Any,
        base_model: str | None,
        dtype: torch.dtype | None,
    ) -> Written: ...


def writer(name: str) -> Writer:
    """The one of a format in `WRITTEN`."""
    found: Writer = pkgutil.resolve_name(f"{__package__}.{_WRITERS[name]}")
    return found
