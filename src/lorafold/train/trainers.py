"""The two trainers: classes that exist where their libraries do, made when they are asked for."""

from __future__ import annotations

import functools
from typing import Any

from ..errors import MissingExtraError, RefusedError
from ..layers.swap import Swapped
from .mixin import AdapterTraining
from .packing import Fit, prepared


@functools.cache
def trainer() -> Any:
    """The class `lorafold.train.Trainer`.

    Raises:
        MissingExtraError: transformers or accelerate is not there.
    """
    try:
        import accelerate  # noqa: F401  (Trainer asks for it when it is made)
        import transformers
    except ImportError as e:
        raise _missing("Trainer", "transformers and accelerate") from e

    class Trainer(AdapterTraining, transformers.Trainer):
        """`transformers.Trainer` that saves and resumes the adapters only, never the base.

        Everything else is the library's. A column `adapter` in the data trains many adapters in one
        batch: each row runs the adapter that it names, the loss is the sum over adapters of each
        one's mean over its own tokens of the whole accumulation window, gradients are clipped
        adapter by adapter, and one without rows takes no step and does not decay. So each becomes
        what it would become alone on its rows by the same steps. Such a batch has labels of next
        tokens.

        Not for: sharded parameters (FSDP, ZeRO 3), whose adapters are refused when they are saved.

        Args:
            model: with adapters attached, trained ones among them.
            args, and all else: as for `transformers.Trainer`.
            lora_plus: the learning rate of B over that of A (LoRA+).
            random_rank: a `RandomRank`, to run another rank prefix each step (DyLoRA).
            controller: an `OrbitalController` of the optimiser given in `optimizers=`; it is shown
                the loss of each step's first batch, at full rank.

        Attributes:
            live: the model's handle.

        Raises:
            MismatchError: nothing is attached to the model, or nothing is trained.
            UnknownNameError: the column `adapter` names nobody.
            MissingExtraError: transformers or accelerate is not there.
        """

    return _public(Trainer)


@functools.cache
def sft_trainer() -> Any:
    """The class `lorafold.train.SFTTrainer`.

    Raises:
        MissingExtraError: trl is not there.
    """
    try:
        import trl
    except ImportError as e:
        raise _missing("SFTTrainer", "trl") from e

    library: Any = trl  # whose types say nothing of it

    class SFTTrainer(AdapterTraining, library.SFTTrainer):  # type: ignore[misc]
        """`trl.SFTTrainer` that saves and resumes the adapters only; see `Trainer` for the rest.

        Its data formats, templates, packing and losses are TRL's. `peft_config=` is not for it:
        what is attached is trained. With a column `adapter`, packed rows hold sequences of many
        adapters, each of which runs its own (`packing_strategy` "bfd" or "bfd_split").

        Not for: other losses (`loss_type`) on rows of many adapters, whose loss is `Trainer`'s.

        Attributes:
            fits: {"train": …, "eval": …} how each part of the data fits into `max_length`.

        Raises:
            MismatchError: nothing is attached to the model, or nothing is trained.
            RefusedError: an adapter is attached to the output layer; packing that cuts anywhere.
            MissingExtraError: trl is not there.
        """

        def __init__(self, model: Any = None, *more: Any, **options: Any) -> None:
            _refuse_head(model)
            self.fits: dict[str, Fit] = {}
            super().__init__(model, *more, **options)

        def _prepare_dataset(
            self, dataset: Any, tokens: Any, args: Any, packing: bool, form: Any, name: str
        ) -> Any:
            how = super()._prepare_dataset, library.pack_dataset
            made, fit = prepared(*how, dataset, tokens, args, packing, self._names, form, name)
            if fit is not None:
                self.fits[name] = fit
            return made

    return _public(SFTTrainer)


def _missing(name: str, what: str) -> MissingExtraError:
    return MissingExtraError(
        f"lorafold.train.{name} takes {what}, not there: pip install 'lorafold[train]'"
    )


def _refuse_head(model: Any) -> None:
    """TRL computes its loss from the head's weight, past what is attached to the head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(head, Swapped):
        raise RefusedError(
            "an adapter is attached to the output layer, which TRL's loss goes past, so that it "
            "would not be trained: leave that layer out (exclude=), or use lorafold.train.Trainer"
        )


def _public(made: type) -> type:
    made.__module__, made.__qualname__ = __package__, made.__name__
    return made
