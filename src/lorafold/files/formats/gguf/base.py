"""What of a base a GGUF file needs: its architecture, its heads, and how it calls its modules."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ....errors import FileError, MismatchError
from ....naming import Base
from ....roles.names import config_of, is_config
from ....words import one_line
from ...base import BaseFiles, read_base
from .architectures import BY_MODEL, TIED_UNLESS_SAID, Architecture


@dataclass(frozen=True)
class GgufBase:
    """A base by its configuration and, where they are known, its tensors.

    Args:
        where: it, for messages. config: its configuration.
        tensors: by name and shape; None where there is a configuration alone.
        files: of a folder with safetensors files.
    """

    where: str
    config: Mapping[str, Any]
    tensors: Base | None = None
    files: BaseFiles | None = None

    @property
    def architecture(self) -> Architecture:
        """What llama.cpp calls it.

        Raises:
            MismatchError: none that was tried.
        """
        kind = self.config.get("model_type")
        found = BY_MODEL.get(kind) if isinstance(kind, str) else None
        if found is None:
            raise MismatchError(
                f"{self.where} is of the architecture {kind!r:.40}, of which it is not known what "
                f"llama.cpp does to its weights; known are {', '.join(BY_MODEL)}"
            )
        return found

    @property
    def is_tied(self) -> bool:
        """Whether embedding and output layer have one weight."""
        if self.files is not None:
            return self.files.named().tied is not None
        said = self.config.get("tie_word_embeddings")
        return self.config.get("model_type") in TIED_UNLESS_SAID if said is None else bool(said)


def gguf_base(base: Any) -> GgufBase:
    """The base that is given: a folder with its config.json, a model, or its configuration.

    Raises:
        FileError: no such folder, or no config.json in it. MismatchError: none of these.
    """
    if isinstance(base, str | os.PathLike):
        place = os.fspath(base)
        if not place or not os.path.exists(place):
            raise FileError(f"no such folder: {place!r}")
        config = config_of(place)
        if not config:
            raise FileError(f"{place} has no config.json, which says how many heads a base has")
        folder = Path(place) if os.path.isdir(place) else Path(place).parent
        if not any(folder.glob("*.safetensors")):
            return GgufBase(place, config)
        files = read_base(folder)
        return GgufBase(place, config, files.named(), files)
    if isinstance(base, nn.Module):
        state = base.state_dict()
        tensors = Base({key: (tuple(t.shape), t.dtype) for key, t in state.items()})
        return GgufBase("the base", config_of(base), tensors)
    if is_config(base):
        return GgufBase("the base", config_of(base))
    raise MismatchError(
        "a base of a GGUF file is its folder, a model, or its configuration, found "
        f"{one_line(base)}"
    )
