"""transformers' Trainer for a model with adapters attached."""

from __future__ import annotations

from typing import Any

from ..errors import MissingExtraError
from .mixin import AdapterTraining

try:
    import accelerate  # noqa: F401  (Trainer asks for it when it is made)
    import transformers
except ImportError as e:
    raise MissingExtraError(
        "lorafold.train.Trainer takes transformers and accelerate: pip install 'lorafold[train]'"
    ) from e

_Base: Any = transformers.Trainer


class Trainer(AdapterTraining, _Base):  # type: ignore[misc]
    """`transformers.Trainer` that saves and resumes the adapters only, never the base.

    Everything else is the library's. A column `adapter` in the data trains many adapters in one
    batch: each row runs the adapter that it names, the loss is the sum over adapters of each one's
    mean over its own tokens of the whole accumulation window, gradients are clipped adapter by
    adapter, and one without rows takes no step and does not decay. So each becomes what it would
    become alone on its rows by the same steps. Such a batch has labels of next tokens.

    Not for: sharded parameters (FSDP, ZeRO 3), whose adapters are refused when they are saved.

    Args:
        model: with adapters attached, trained ones among them.
        args, and all else: as for `transformers.Trainer`.
        lora_plus: the learning rate of B over that of A (LoRA+).
        random_rank: a `RandomRank`, to run another rank prefix each step (DyLoRA).
        controller: an `OrbitalController` of the optimiser given in `optimizers=`; it is shown the
            loss of each step's first batch, at full rank.

    Attributes:
        live: the model's handle.

    Raises:
        MismatchError: nothing is attached to the model, or nothing is trained.
        UnknownNameError: the column `adapter` names nobody.
        MissingExtraError: transformers or accelerate is not there.
    """
