"""transformers' continuous batching, one step at a time in its caller's thread.

Of what there is, this takes the pages and the batches: which sequences a step is of, where their
keys and values lie, and the call of the model. The thread, the queues and the sampler there are not
used: one bad request would end the thread, and the sampler knows one seed for all. Those parts are
private; that they are as known is checked before anything is made.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import MismatchError, MissingExtraError, RefusedError

# Keys and values of a prefix depend on the adapters, and pages are told apart by tokens alone: so
# none is shared. What is asked for is written before a step, which a recorded graph would not see,
# and a step that is prepared while another runs would change.
OPTIONS = {
    "allow_block_sharing": False,
    "use_async_batching": False,
    "use_cuda_graph": False,
    "auto_switch_to_flash": False,
    "per_request_processors": False,
    "safety_margin": 0.0,  # whoever adds a sequence has reserved all its pages
}
_ROOM = ("page_size", "num_blocks", "max_batch_tokens", "max_requests_per_batch")
_PACKAGE = "transformers.generation.continuous_batching"
_CONFIG = "transformers.generation.configuration_utils"
# Module, class → what is called there, and with what.
_KNOWN: dict[tuple[str, str], dict[str, tuple[str, ...]]] = {
    ("continuous_api", "ContinuousBatchingManager"): {
        "__init__": ("model", "generation_config", "continuous_batching_config"),
        "add_request": ("input_ids", "request_id", "max_new_tokens"),
        "_create_batch_processor": (),
    },
    ("continuous_api", "ContinuousBatchProcessor"): {
        "prepare_next_batch": (),
        "_generation_step": ("model",),
        "update_batch": (),
        "reset": (),
    },
    ("model_runner", "ModelRunner"): {"_sample": ("scores", "output_ids")},
    ("requests", "FutureRequestState"): {"__init__": ("state", "has_new_token", "query_length")},
    ("scheduler", "Scheduler"): {"set_request_cancellation": ("request_id",)},
}
Choose = Callable[[list[str], Tensor], Sequence[int]]


class Paged:
    """Sequences in a cache of pages.

    Not for: several threads; more tokens than there are pages for.

    Args:
        model: a causal language model of transformers.
        pages, size: of the cache: how many, and tokens of each. tokens: of a step.
        sequences: at once.
        choose: called in a step with the keys of the sequences of which a token is to be chosen,
            and their scores (n, vocabulary); gives the tokens.

    Attributes:
        masked: whether all sequences of a step are in one attention, apart by a mask: numbers that
            are not finite go from one to others then.

    Raises:
        RefusedError: continuous batching is not as it is known.
        MismatchError: the cache is larger than memory. MissingExtraError: no psutil.
    """

    def __init__(
        self, model: Any, pages: int, size: int, tokens: int, sequences: int, choose: Choose
    ) -> None:
        check_known()
        if torch.device(model.device).type == "cpu" and importlib.util.find_spec("psutil") is None:
            raise MissingExtraError(
                "the packed engine takes psutil, which is not there: pip install 'lorafold[serve]'"
            )
        api = importlib.import_module(f"{_PACKAGE}.continuous_api")
        config = importlib.import_module(_CONFIG)
        room = dict(zip(_ROOM, (size, pages, tokens, sequences), strict=True))
        self._model, self._choose = model, choose
        try:
            self._manager = api.ContinuousBatchingManager(
                model,
                config.GenerationConfig(do_sample=False, eos_token_id=-1),
                config.ContinuousBatchingConfig(**room, **OPTIONS),
            )
            self._processor = self._manager._create_batch_processor()
            self._io = self._processor.inputs_and_outputs
            self._io.compute_stream = None  # what is asked for is written on the current one
            self._processor.model_runner._sample = self._sample
            self.masked = self._io.attention_mask is not None
            self._batch = list(self._io.requests_in_batch)
            self.clear()
        except AttributeError as e:
            raise _unknown(str(e)) from e
        except MemoryError as e:
            raise MismatchError(
                f"{pages * size:,} tokens of cache are more than memory holds: give a lower "
                "max_rows= or max_len="
            ) from e

    def add(self, key: str, tokens: Sequence[int], new: int) -> None:
        """One more sequence, of which so many tokens are to be chosen.

        Args:
            key: that no other had since `clear`.
        """
        self._manager.add_request(list(tokens), request_id=key, max_new_tokens=new)

    def drop(self, key: str) -> None:
        """Let go of a sequence; one that has all its tokens is let go of by itself."""
        self._processor.scheduler.set_request_cancellation(key)

    def clear(self) -> None:
        """Let go of all of them, and leave nothing in the pages."""
        self._empty(self._manager.input_queue)  # added, and never prepared
        self._empty(self._manager.output_router.output_queue)
        self._processor.reset()
        self._processor.cache.cache_tensor.zero_()
        self._batch = []

    def prepare(self) -> list[tuple[str, int]]:
        """The sequences of the next step, in order: (key, tokens of it)."""
        there = self._processor.prepare_next_batch()
        self._batch = list(self._io.requests_in_batch) if there else []
        new = [f.has_new_token for f in self._batch]
        if new != sorted(new, reverse=True):  # a row of scores is told by its place
            raise RuntimeError("a prompt that was cut is not the last of its batch")
        return [(f.state.request_id, f.query_length) for f in self._batch]

    def step(self) -> None:
        """Run the model for what was prepared, and choose."""
        self._processor._generation_step(self._model)
        self._processor.update_batch()
        # What has come out was told when it was chosen; nobody asks for it again.
        self._empty(self._manager.output_router.output_queue)

    def _sample(self, scores: Tensor, output_ids: Tensor) -> None:
        keys = [f.state.request_id for f in self._batch if f.has_new_token]
        if keys:
            tokens = self._choose(keys, scores[0, : len(keys)])
            output_ids[0, : len(keys)] = torch.tensor(tokens, device=output_ids.device)

    def _empty(self, queue: Any) -> None:
        while not queue.empty():
            queue.get_nowait()


def check_known() -> None:
    """Raise a `RefusedError` where continuous batching is not as it is known."""
    try:
        for (file, kind), methods in _KNOWN.items():
            found = getattr(importlib.import_module(f"{_PACKAGE}.{file}"), kind)
            for name, wanted in methods.items():
                have = inspect.signature(getattr(found, name)).parameters
                for argument in wanted:
                    if argument not in have:
                        raise _unknown(f"{kind}.{name} has no {argument}")
        config = importlib.import_module(_CONFIG)
        fields = {f.name for f in dataclasses.fields(config.ContinuousBatchingConfig)}
    except (ImportError, AttributeError) as e:
        raise _unknown(str(e)) from e
    for name in (*_ROOM, *OPTIONS):
        if name not in fields:
            raise _unknown(f"ContinuousBatchingConfig has no {name}")


def _unknown(what: str) -> RefusedError:
    return RefusedError(
        "the packed engine runs on continuous batching as transformers 5.23 has it, which "
        f"{importlib.metadata.version('transformers')} has not ({what}): give engine='rows'"
    )
