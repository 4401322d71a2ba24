"""A base model seen through its safetensors headers: names, shapes, dtypes; weights one by one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FileError
from ..naming import Base, is_head, is_shared, kind
from .config import json_object, read_text
from .disk.header import Entry
from .peft_keys import check_gathered
from .safetensors import file_errors, open_file, read_entries, read_tensors

INDEX_SUFFIX = ".safetensors.index.json"
WHOLE_NAME = "model.safetensors"

CONFIG_NAME = "config.json"

# Architectures that end in an output layer over the vocabulary.
_WITH_HEAD = re.compile(
    "LMHead|ForCausal|ForConditionalGeneration|ForMaskedLM|ForPreTraining|MTModel|GenerationDecoder"
    "|Text2Text|SpeechToText|BlockDiffusion|BlipForQuestionAnswering"
)
# What it is called where it is not `lm_head`: by how the architecture's name starts; "" where
# that can't be said. Of masked language models no others are known.
_HEADS = {
    "lm_head": ("Funnel", "ModernVBert", "NeoMME"),
    "lm_head.decoder": (
        *("Roberta", "XLMRoberta", "XLMRobertaXL", "Camembert", "JinaEmbeddings", "Data2VecText"),
        *("BertGeneration", "Esm", "Gte", "IBert", "Longformer", "MPNet", "Xmod"),
    ),
    "cls.predictions.decoder": (
        *("Bert", "BigBird", "ErnieFor", "RoCBert", "Deberta", "FNet", "MobileBert", "RoFormer"),
        *("LayoutLM", "Lxmert", "MegatronBert", "Mra", "NomicBert", "Nystromformer"),
        *("SqueezeBert", "Tapas", "VisualBert", "Yoso"),
    ),
    "predictions.decoder": ("Albert",),
    "head.decoder": ("Ultrabert",),
    "decoder": ("ModernBert",),
    "vocab_projector": ("DistilBert",),
    "generator_lm_head": ("Electra", "ConvBert"),
    "proj_out": ("Whisper", "Canary", "CohereAsr", "Moonshine"),
    "output_projection": ("BioGpt", "TrOCR"),
    "embed_out": ("GPTNeoXJapanese",),
    "pred_layer.proj": ("XLM", "Flaubert"),
    "lm_loss": ("XLNet",),
    "lm_head.out_proj": ("T5Gemma",),
    "": (
        *("Blip", "Blt", "Csm", "DiffusionGemma", "FSMT", "Git", "Kosmos2", "Luke", "ProphetNet"),
        *("Rwkv", "SpeechT5", "T5Gemma2"),
    ),
}
_BY_ARCHITECTURE = {start: head for head, starts in _HEADS.items() for start in starts}


@dataclass(frozen=True)
class BaseFiles:
    """What the headers and the configuration of a base model say.

    Args:
        path: as it was given.
        entries: {tensor name: dtype and shape}.
        files: the safetensors files.
        index: the file that says which tensor is in which of them, if there is one.
        config: the model's configuration; {} where there is none.
    """

    path: str
    entries: Mapping[str, Entry]
    files: tuple[Path, ...] = ()
    index: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    def named(self, asked: Iterable[str] = ()) -> Base:
        """Its tensors, to be found by the names that an adapter asks for."""
        asked = list(asked)
        tensors = {key: (entry.shape, entry.dtype) for key, entry in self.entries.items()}
        return Base(tensors, asked, self._tied(any(map(is_head, asked))))

    def _tied(self, asked: bool) -> tuple[str, str] | None:
        """The keys of output layer and embedding, if they are one weight.

        Args:
            asked: an adapter has an output layer, so there is one.
        """
        embedding = Base(dict.fromkeys(self.entries, ((), None))).embedding()
        head = next((key for key in self.entries if is_head(key)), None)
        says = self.config.get("tie_word_embeddings")
        if says is None:
            inner = self.config.get("text_config")
            says = inner.get("tie_word_embeddings") if isinstance(inner, dict) else None
        if embedding is None:
            return None
        if is_shared(embedding) and not any(
            key.endswith("embed_tokens.weight") for key in self.entries
        ):
            # Whatever is said of the output layer, it is the embedding of encoder and decoder.
            return (head if head is not None and says else "", embedding)
        if says is False:
            return None
        if head is not None:
            return (head, embedding) if says else None
        names = [str(name) for name in self.config.get("architectures") or []]
        ends = any(map(_WITH_HEAD.search, names)) if names else says is True
        return (self._head_of(embedding), embedding) if ends or asked else None

    def _head_of(self, embedding: str) -> str:
        """What an output layer is called that is in no file; "" where that is not known."""
        names = [str(name) for name in self.config.get("architectures") or []]
        if embedding.startswith("language_model.model."):
            return "language_model.lm_head.weight"
        starts = sorted(_BY_ARCHITECTURE, key=len, reverse=True)  # the most exact one counts
        special = (_BY_ARCHITECTURE[s] for s in starts if any(n.startswith(s) for n in names))
        masked = any("MaskedLM" in n or "PreTraining" in n for n in names)
        head = next(special, "" if masked else "lm_head")
        return head and f"{head}.weight"

    def untying_refusal(self, untied: str | None) -> str | None:
        """Why an output layer can't get a weight of its own in a merge; None where it can.

        Args:
            untied: as `Placement.untied` says.
        """
        if untied is None:
            return None
        if not os.path.isfile(self.files[0].parent / CONFIG_NAME):
            return f"{self.path} has no {CONFIG_NAME}, so its weights can't be untied"
        embedding = Base(dict.fromkeys(self.entries, ((), None))).embedding()
        if embedding is not None and is_shared(embedding):
            return (
                f"{self.path} has one weight, {embedding!r}, for encoder, decoder and output "
                "layer, of which one would part from the others: keep the adapter attached"
            )
        if untied == "":
            return (
                f"{self.path} has an output layer that shares the embedding's weight and would "
                "part from it, under a name that is not known here: keep the adapter attached"
            )
        return None


class Weights:
    """A base's tensors, read one by one; the last one stays in memory.

    An output layer that shares the embedding's weight is there as well, whether it is stored or
    not: of two writers of one model one may have parted them.

    Args:
        files: the base's. asked: names of tensors that an adapter has to do with.
    """

    def __init__(self, files: BaseFiles, asked: Iterable[str] = ()) -> None:
        self.files, self.named = files, files.named(asked)
        self._at = {k: (f, e) for f in files.files for k, e in read_entries(f).items()}
        bias = self.named.tied_bias
        for key in [self.named.tied and self.named.tied[0], bias and bias[0]]:
            if key:  # "" is one whose name is not known
                self._at.setdefault(key, self._at[self.named.source(key)])
        self._last: tuple[str, Tensor] | None = None

    def __contains__(self, key: str) -> bool:
        return key in self._at

    def dtype(self, key: str) -> torch.dtype:
        """Of a tensor, as it is stored."""
        return self._at[key][1].dtype

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self._at[key][1].shape

    @property
    def keys(self) -> list[str]:
        """All tensors' names."""
        return list(self._at)

    def read(self, key: str) -> Tensor:
        """One tensor, in memory of its own; not to be written to."""
        if self._last is None or self._last[0] != key:
            file, entry = self._at[key]
            with open_file(file) as f:
                (t,) = read_tensors(f, [(key, entry)], file)
            self._last = key, t
        return self._last[1]


def read_base(path: str | os.PathLike[str]) -> BaseFiles:
    """The base in a folder, or a safetensors file.

    Raises:
        FileError: nothing there in safetensors, a shard missing, a tensor in two shards, or a
            damaged header.
    """
    entries: dict[str, Entry] = {}
    if not isinstance(path, str | os.PathLike):
        raise FileError(f"a base is given as a path, not as {type(path).__name__}")
    path = os.fspath(path)
    if not path:  # which would be the working directory
        raise FileError("no such folder: ''")
    with file_errors(path):
        files, index = _files(Path(path))
    for file in files:
        found = read_entries(file)
        twice = found.keys() & entries.keys()
        if twice:
            raise FileError(f"{path}: {min(twice)!r} is in {file.name} and in another file as well")
        entries |= found
    if not entries:
        raise FileError(f"{path}: there are no tensors in it")
    weights = ((k, e.shape) for k, e in entries.items() if k.endswith((".weight", ".bias")))
    check_gathered(weights, path)
    return BaseFiles(path, entries, tuple(files), index, _config(files[0].parent))


def _config(folder: Path) -> dict[str, Any]:
    """The model's configuration; {} where there is none.

    Raises:
        FileError: it is damaged: what it says of tied weights would be lost.
    """
    path = folder / CONFIG_NAME
    if not os.path.isfile(path):
        return {}
    found = json_object(read_text(path), path)
    if not isinstance(found.get("architectures") or [], list):
        raise FileError(f"{path}: 'architectures' must be a list of names")
    return found


def _files(path: Path) -> tuple[list[Path], Path | None]:
    """The files that hold the model, and their index; one whole file goes before shards."""
    if os.path.isfile(path):
        return [path], None
    if not os.path.isdir(path):
        raise FileError(f"no such folder: {str(path)!r}")
    if os.path.isfile(path / WHOLE_NAME):
        return [path / WHOLE_NAME], None
    indices = sorted(
        path.glob(f"*{INDEX_SUFFIX}"), key=lambda p: (p.name != f"model{INDEX_SUFFIX}", p)
    )
    if indices:
        return _indexed(indices[0]), indices[0]
    found = sorted(path.glob("*.safetensors"))
    if not found:
        raise FileError(f"{path} holds no safetensors file of a base model")
    return found, None


def _indexed(index: Path) -> list[Path]:
    text = read_text(index)
    try:
        whole = json_object(text, index)
    except FileError as e:
        raise FileError(f"{e}: not an index of safetensors files") from e
    try:
        parts = whole["weight_map"].values()
        names = sorted(set(parts))
        strange = [name for name in names if name in ("", ".", "..") or Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise FileError(f"{index}: not an index of safetensors files ({e})") from e
    if strange:  # a name is never a path
        raise FileError(f"{index} names {strange[0]!r}, which is no file beside it")
    missing = [name for name in names if not os.path.isfile(index.parent / name)]
    if missing:
        raise FileError(f"{index} names {missing[0]!r}, which is not there")
    return [index.parent / name for name in names]


def by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    """{kind: the numbers of each name}, for listing many in little space."""
    found: dict[str, list[str]] = {}
    for name in names:
        numbers = re.findall(r"(?<![^.])\d+(?![^.])", name)
        found.setdefault(kind(name), []).append(".".join(numbers))
    return found
