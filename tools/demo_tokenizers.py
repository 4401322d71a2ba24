"""The tokenizers of the demo's bases: bytes, and byte pairs learned from the bases' own corpus.

Both are byte-level: no text is without tokens, and decoding gives the text back. In the first a
token's id is its byte. A character of several bytes gives tokens that share its offsets.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers


def byte_tokenizer() -> Tokenizer:
    """One token a byte, whose id is the byte."""
    return _byte_level(models.BPE({sign: byte for byte, sign in enumerate(_signs())}, []), False)


def pair_tokenizer(corpus: str, size: int) -> Tokenizer:
    """The bytes and the most frequent pairs of them within words, `size` tokens in all."""
    learned = _byte_level(models.BPE(), True)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=_signs(), show_progress=False)
    learned.train_from_iterator(corpus.splitlines(keepends=True), trainer)
    return learned


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write what transformers' `AutoTokenizer` reads from a model's folder."""
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _byte_level(model: models.BPE, words: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _signs() -> list[str]:
    """The printable character that stands for each byte, in the order of the bytes.

    Bytes that print in Latin-1 stand for themselves; the others take the characters from 256 on.
    """
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in prints else next(others)) for byte in range(256)]
