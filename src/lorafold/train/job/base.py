"""The base of a run: its model, and a tokenizer that knows where texts end and turns begin."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import FileError, MismatchError
from ...files.config import read_text
from ...quantize import quantize_base
from .libraries import Libraries
from .recipe import QUANTIZED, Recipe

# For bases that have none: a line with the speaker's role, then what is said.
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Words:
    """How texts become tokens.

    Args:
        tokenizer: with tokens for the end and for padding. own: a chat template that the base does
            not have, None where it has. marks: whether the template marks the assistant's turns.
        said: what was chosen for it, in words.
    """

    tokenizer: Any
    own: str | None
    marks: bool
    said: tuple[str, ...]


def read_model(folder: Path, recipe: Recipe, bf16: bool, of: Libraries) -> Any:
    """The model in a folder, quantised where that is asked for.

    Raises:
        FileError: there is none that transformers can load as a language model.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    try:
        model, told = of.transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except Exception as e:  # a damaged folder can raise anything
        text = str(e).strip().splitlines() or [type(e).__name__]
        raise FileError(f"{folder}: transformers can't load a model from it: {text[0]}") from e
    if told["missing_keys"]:
        lacking = sorted(told["missing_keys"])
        raise FileError(
            f"{folder}: {len(lacking)} weights of the model are in no file of it, as {lacking[0]!r}"
        )
    model.config.use_cache = False
    if torch.cuda.is_available() and not recipe.cpu:
        model.to("cuda")
    if recipe.quantize is not None:
        quantize_base(model, **QUANTIZED[recipe.quantize])
    return model


def check_folder(folder: Path) -> None:
    """Raise a `FileError` where no base can be."""
    if not os.path.isfile(folder / "config.json"):
        raise FileError(
            f"{folder} is no base: a base is a folder with config.json, weights and tokenizer; one "
            "on the Hub is fetched with `hf download ID --local-dir DIR`"
        )


def read_words(folder: Path, recipe: Recipe, kind: str, chats: bool, of: Libraries) -> Words:
    """The tokenizer in a folder.

    Args:
        kind: of the data. chats: whether there are messages in it.

    Raises:
        FileError: none that transformers can read. MismatchError: a tokenizer without an end.
    """
    tokenizer, own, said = _tokenizer(folder, of), None, []
    if recipe.chat_template is not None:
        own = _template(recipe.chat_template)
    elif chats and tokenizer.chat_template is None:
        own = TEMPLATE
        said.append("no chat template: <|role|>, a line break, what is said, a text's end")
    if own is not None:
        tokenizer = _tokenizer(folder, of, chat_template=own)
    if tokenizer.eos_token is None:
        said.append(f"no token for a text's end: {_end_of_lines(tokenizer, folder)}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
        said.append("no token for padding: token 0")
    marks = kind == "messages" and _marks(tokenizer, of)
    if kind == "messages" and not marks and not recipe.train_on_prompts:
        said.append("its chat template does not mark the assistant's turns: all turns are learned")
    return Words(tokenizer, own, marks, tuple(said))


def _tokenizer(folder: Path, of: Libraries, **options: Any) -> Any:
    try:
        return of.transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, **options
        )
    except Exception as e:  # a damaged file can raise anything
        raise FileError(f"{folder}: there is no tokenizer that transformers can read") from e


def _end_of_lines(tokenizer: Any, folder: Path) -> str:
    """Make the line break a text's end."""
    ids = tokenizer("\n", add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise MismatchError(
            f"the tokenizer of {folder} has no token for a text's end, and none for a line break: "
            "name one, eos_token, in its tokenizer_config.json"
        )
    # Said to be a special token, so that its name in a text is read as the token.
    tokenizer.add_special_tokens({"eos_token": tokenizer.convert_ids_to_tokens(ids[0])})
    return f"the line break, token {ids[0]}"


def _template(path: str) -> str:
    try:
        return read_text(Path(path))
    except FileError as e:
        raise FileError(f"{path}: can't be read as a chat template ({e})") from e


def _marks(tokenizer: Any, of: Libraries) -> bool:
    """Whether TRL knows which tokens are the assistant's: marked, or a template that it marks."""
    try:
        of.trl.get_training_chat_template(tokenizer)
    except ValueError:
        return "generation" in tokenizer.chat_template.replace("add_generation_prompt", "")
    return True
