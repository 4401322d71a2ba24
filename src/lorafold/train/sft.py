"""TRL's SFTTrainer for a model with adapters attached."""

from __future__ import annotations

from typing import Any

from ..errors import MissingExtraError
from .mixin import AdapterTraining

try:
    import trl
except ImportError as e:
    raise MissingExtraError(
        "lorafold.train.SFTTrainer takes trl: pip install 'lorafold[train]'"
    ) from e

_library: Any = trl  # whose types say nothing of it
_Base: Any = _library.SFTTrainer


class SFTTrainer(AdapterTraining, _Base):  # type: ignore[misc]
    """`trl.SFTTrainer` that saves and resumes the adapters only; see `Trainer` for the rest.

    Its data formats, templates, packing and losses are TRL's. `peft_config=` is not for it: what is
    attached is trained. Packing joins rows before anything is known of adapters, so that with a
    column `adapter` it is `padding_free=True` that lays rows end to end.

    Not for: other losses (`loss_type`) on rows of many adapters, whose loss is `Trainer`'s.

    Raises:
        MismatchError: nothing is attached to the model, or nothing is trained.
        MissingExtraError: trl is not there.
    """
