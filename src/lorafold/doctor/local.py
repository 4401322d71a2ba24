"""The run that a server is compared with: the base in transformers, the adapter attached."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter
from ..attach import attach
from ..errors import FileError, MissingExtraError

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Dear Sir or Madam,\n\n",
    "Question: What is 17 + 25?\nAnswer:",
)
_NAME = "adapter"
_WORDS = 8  # tokens of a prompt, where there is no tokenizer
_LONGEST = 512  # tokens of a prompt


@dataclass(frozen=True)
class Prompt:
    """A prompt as numbers of tokens, and as a text where there is a tokenizer."""

    ids: tuple[int, ...]
    text: str | None = None


class LocalRun:
    """A base with an adapter, to be run at any strength.

    Args:
        model: transformers', of causal language. adapter: that goes onto it.
        tokenizer: None where there is none; prompts are drawn from the vocabulary then.
        texts: the prompts.
    """

    def __init__(
        self, model: Any, adapter: Adapter, tokenizer: Any, texts: Iterable[str] = PROMPTS
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._live = attach(model, {_NAME: adapter})
        self._device = next(model.parameters()).device
        self._spelled: dict[str, int] = {}
        self._count = int(model.get_input_embeddings().weight.shape[0])
        self.prompts = self._drawn() if tokenizer is None else [self._prompt(t) for t in texts]

    @property
    def has_tokenizer(self) -> bool:
        """Whether texts are known here."""
        return self._tokenizer is not None

    def _prompt(self, text: str) -> Prompt:
        return Prompt(tuple(self._tokenizer(text)["input_ids"][:_LONGEST]), text)

    def _drawn(self) -> list[Prompt]:
        chance = random.Random(0)
        low = min(3, self._count - 1)  # the first ones are often special
        return [
            Prompt(tuple(chance.randrange(low, self._count) for _ in range(_WORDS)))
            for _ in range(len(PROMPTS))
        ]

    def logprobs(self, c: float) -> list[Tensor]:
        """Log-probabilities of the next token (vocab,), float64, of each prompt; 0 is the base."""
        with torch.no_grad(), self._live.use(_NAME, c=c):
            return [
                self._model(self._ids(p)).logits[0, -1].double().log_softmax(-1).cpu()
                for p in self.prompts
            ]

    def greedy(self, c: float, tokens: int) -> list[list[int]]:
        """What each prompt goes on with."""
        with torch.no_grad(), self._live.use(_NAME, c=c):
            found = []
            for p in self.prompts:
                ids = self._ids(p)
                made = self._model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=tokens,
                    do_sample=False,
                    pad_token_id=0,
                )
                found.append(made[0, ids.shape[1] :].tolist())
        return found

    def _ids(self, prompt: Prompt) -> Tensor:
        return torch.tensor([prompt.ids], device=self._device)

    def text_of(self, ids: Sequence[int]) -> str:
        """Tokens as a text; needs a tokenizer."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def number_of(self, token: int | str) -> int | None:
        """A token's number, of what a server calls it; None where it is not known."""
        if isinstance(token, int):
            return token if 0 <= token < self._count else None
        if self._tokenizer is None:
            return None
        if not self._spelled:
            for i in range(min(self._count, len(self._tokenizer))):
                self._spelled.setdefault(str(self._tokenizer.decode([i])), i)
        return self._spelled.get(token)


def opened_base(base: str, device: str | None) -> tuple[Any, Any]:
    """Model, in float32, and tokenizer; None where the folder has none.

    Raises:
        FileError: no base is there. MissingExtraError: transformers is not.
    """
    from ..collection.limits import torch_device

    try:
        import transformers
    except ImportError as e:
        raise MissingExtraError("doctor takes transformers: pip install 'lorafold[train]'") from e
    where = torch_device(device)
    folder = Path(base)
    if not os.path.isfile(folder / "config.json"):
        raise FileError(f"{base} is not a base: no config.json is in it; give a model's folder")
    try:
        made: Any = transformers.AutoModelForCausalLM
        model = made.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except Exception as e:  # a damaged folder can raise anything
        raise FileError(f"{base}: transformers can't load it: {_first_line(e)}") from e
    has_tokenizer = any(
        os.path.isfile(folder / name)
        for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    )
    tokenizer = None
    if has_tokenizer:
        try:
            kind: Any = transformers.AutoTokenizer
            tokenizer = kind.from_pretrained(folder, local_files_only=True)
        except Exception as e:
            raise FileError(f"{base}: its tokenizer can't be loaded: {_first_line(e)}") from e
    return model.eval().to(where or "cpu"), tokenizer


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0]
