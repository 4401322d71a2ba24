"""An output layer and an embedding that are one weight, and what a configuration says of it.

What is loaded from the files of a model that says `tie_word_embeddings` has one weight for both,
whatever the files hold: so where they come to differ, it must not say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

_FLAG = "tie_word_embeddings"


def say_untied(model: nn.Module) -> list[Any]:
    """Set the flag false where output layer and embedding have a weight each.

    Returns:
        The configurations that said otherwise, for `say_tied`.
    """
    ends = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            ends.append(getattr(getattr(model, getter)(), "weight", None))
        except (AttributeError, NotImplementedError):
            return []  # a model that has no such thing
    if any(W is None for W in ends) or ends[0] is ends[1]:
        return []
    config = getattr(model, "config", None)
    configs = [config, getattr(config, "text_config", None)]
    said = [c for c in configs if getattr(c, _FLAG, False)]
    for c in said:
        setattr(c, _FLAG, False)
    return said


def say_tied(configs: Sequence[Any]) -> None:
    """Set the flag true again."""
    for config in configs:
        setattr(config, _FLAG, True)
