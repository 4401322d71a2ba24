"""The formats beside PEFT's that adapters are written in: for each a file here, and a line below.

Nothing here imports torch, as the command line lists these formats in its help.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ...adapter import Adapter


@dataclass(frozen=True)
class Format:
    """A format by what writes it.

    Args:
        writer: file in this folder, and function in it: a `Writer`.
        ending: of the one file that it is; None where it is a folder.
        of_images: whether it is one of image models, whose modules have diffusers' paths here.
    """

    writer: str
    ending: str | None = None
    of_images: bool = False


FORMATS = {
    "mlx": Format("mlx.writing:mlx_form"),
    "gguf": Format("gguf.writing:gguf_form", ".gguf"),
    "kohya": Format("diffusion.writing:kohya_form", ".safetensors", of_images=True),
    "diffusers": Format("diffusion.writing:diffusers_form", ".safetensors", of_images=True),
    "comfy": Format("diffusion.writing:comfy_form", ".safetensors", of_images=True),
}
WRITTEN = tuple(FORMATS)


@dataclass(frozen=True)
class Written:
    """An adapter in another format: what `save` writes, a folder or one file.

    Args:
        tensors: {key: tensor}.
        metadata: what the file's header says beside; what a merge has said of the adapter joins it.
        file: of a folder, the name of the file of tensors; None where the format is one file.
        config: of a folder, its adapter_config.json.
        write: puts tensors and metadata into a file at a path; None for safetensors.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    file: str | None = None
    config: Mapping[str, Any] | None = None
    write: Callable[[Mapping[str, Tensor], Path, Mapping[str, str]], None] | None = None


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
    found: Writer = pkgutil.resolve_name(f"{__package__}.{FORMATS[name].writer}")
    return found
