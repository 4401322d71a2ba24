"""A base that texts are run through: its model, its tokenizer, and its linear maps by role.

A fused module counts as the maps that it holds (its rows of queries, of keys, of values), so two
bases that cut their weights differently are paired all the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ...errors import FileError, MismatchError, MissingExtraError
from ...files.base import read_base
from ...files.config import json_object, read_text
from ...files.safetensors import file_errors
from ...roles import Heads, Packing, Role, heads, packing, recognised
from ...words import one_line, warn
from .offsets import Tokenize, tokenize_of

_ROWS, _COLUMNS = 16, 64  # of each weight, that its digest sees
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Part:
    """A linear map of a base: a module, or one part of a fused one.

    Args:
        path: of the module. packing: how a fused one packs its parts. word: which of them it is.
        heads: those of the attention that it belongs to; None outside of one.
    """

    path: str
    packing: Packing | None = None
    word: str = ""
    heads: Heads | None = None

    def rows(self, out: int) -> Tensor | None:
        """Which of the module's `out` outputs are its own; None for all."""
        return None if self.packing is None else self.packing.rows(out)[self.word]


@dataclass(frozen=True, eq=False)
class Base:
    """One of the two.

    Args:
        side: "source" or "target", for messages. model: as it was given or read.
        tokenizer: as it was given or read. tokenize: of it; None where ids are given.
        vocabulary: {token: id}, where it is known.
        parts: {role: its map}. digest: of its weights; see `digest_of`.
    """

    side: str
    model: nn.Module
    tokenizer: Any
    tokenize: Tokenize | None
    vocabulary: Mapping[str, int]
    parts: Mapping[Role, Part]
    digest: str

    @property
    def context(self) -> int | None:
        """How many tokens it takes at once, as far as its configuration says."""
        found = getattr(getattr(self.model, "config", None), "max_position_embeddings", None)
        return found if isinstance(found, int) and found > 0 else None

    @property
    def device(self) -> torch.device:
        """Where its inputs go."""
        return next(self.model.parameters()).device

    @property
    def depth(self) -> dict[str, int]:
        """{stack: how many layers it has}."""
        found: dict[str, int] = {}
        for role in self.parts:
            if role.layer is not None:
                found[role.side] = max(found.get(role.side, 0), role.layer + 1)
        return found


def base_of(given: Any, side: str, tokenizer: Any, tables: Any, device: Any) -> Base:
    """The base that a model or a folder is.

    Args:
        given: a model, or a folder that transformers reads. side: "source" or "target".
        tokenizer: see `tokenize_of`, or the folder of one; the base's own when None.
        tables: of roles, for modules that lorafold does not know. device: of a model that is read.

    Raises:
        MismatchError: neither, or not one of its linear layers has a known role.
        FileError: a folder without a model. MissingExtraError: one, without transformers.
    """
    folder = Path(given) if isinstance(given, str | os.PathLike) else None
    model = given if folder is None else _read(folder, device)
    if not isinstance(model, nn.Module):
        raise MismatchError(
            f"the {side} must be a model or the folder of one, found {one_line(given)}"
        )
    if next(model.parameters(), None) is None:
        raise MismatchError(f"the {side} has no weights")
    tokenizer = _tokenizer(tokenizer, folder)
    return Base(
        side,
        model,
        tokenizer,
        None if tokenizer is None else tokenize_of(tokenizer, side),
        _vocabulary(tokenizer),
        parts_of(model, side, tables),
        str(digest_of(model)),
    )


def parts_of(model: nn.Module, side: str, tables: Any = ()) -> dict[Role, Part]:
    """The linear maps of a model by role.

    Raises:
        MismatchError: no layer has a known role; two have the same one.
    """
    names = [name for name, module in model.named_modules() if _is_linear(module)]
    known, unknown = recognised(names, tables)
    if not known:
        shown = ", ".join(map(repr, unknown[:5])) + (", …" if len(unknown) > 5 else "")
        raise MismatchError(
            f"no role is known for any of the {len(unknown)} linear layers of the {side}: {shown}; "
            "give a table in roles=, {end of the path: kind}, as {'wq': 'attention.query'}"
        )
    parts: dict[Role, Part] = {}
    for path, role in known.items():
        packed = packing(role, model) if role.parts else None
        attention = role.kind.partition(".")[0] in ("attention", "cross")
        of = heads(model, role.side) if attention else None
        for inner in role.parts or (role,):
            if inner in parts:
                raise MismatchError(
                    f"{parts[inner].path!r} and {path!r} of the {side} have the same role "
                    f"{str(inner)!r}; tell them apart in roles="
                )
            word = inner.kind.rpartition(".")[2] if packed else ""
            parts[inner] = Part(path, packed, word, of)
    return parts


def _is_linear(module: nn.Module) -> bool:
    # transformers' Conv1D is a linear layer under another name.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def shape_of(model: nn.Module, path: str) -> tuple[int, int]:
    """(out, in) of a linear layer, however its weight is stored."""
    module: Any = model.get_submodule(path)
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    inner, out = module.weight.shape  # Conv1D
    return out, inner


def digest_of(given: Any) -> str | None:
    """SHA-256 of a corner of every weight matrix, whatever it is called and of whatever float type.

    Args:
        given: a model, a state dict, or a folder; None gives None.

    Raises:
        FileError: a folder without a base in it.

    Not for: telling two bases apart that differ in a few numbers only.
    """
    if given is None:
        return None
    seen = set()
    for corner, shape in _corners(given):
        numbers = corner.float().cpu().contiguous().numpy().tobytes()
        seen.add(hashlib.sha256(json.dumps(shape).encode() + numbers).hexdigest())
    return hashlib.sha256("".join(sorted(seen)).encode()).hexdigest()


def _corners(given: Any) -> Iterator[tuple[Tensor, list[int]]]:
    """The first rows' first numbers of every matrix, and its shape."""
    if isinstance(given, str | os.PathLike):
        for file in read_base(given).files:
            with file_errors(file), safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (no mapping)
                    part = opened.get_slice(name)
                    if len(part.get_shape()) == 2 and part.get_dtype() in _FLOATS:
                        yield part[:_ROWS, :_COLUMNS], list(part.get_shape())
        return
    state = given if isinstance(given, Mapping) else given.state_dict()
    for weight in state.values():
        if weight.ndim == 2 and weight.is_floating_point():
            yield weight.detach()[:_ROWS, :_COLUMNS], list(weight.shape)


def _read(folder: Path, device: Any) -> nn.Module:
    transformers = _transformers()
    try:
        config = json_object(read_text(folder / "config.json"), folder / "config.json")
        named = getattr(transformers, (config.get("architectures") or [""])[0], None)
    except (FileError, TypeError, LookupError) as e:
        raise FileError(
            f"{folder} is not a base: no config.json can be read in it ({e}); give the folder of a "
            "model, or the model itself"
        ) from e
    if not (isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)):
        named = transformers.AutoModel  # a file's text: no other name of the package is called
    model, missing = _loaded(named, folder)
    if missing and named is not transformers.AutoModel:
        # Encoders of sentences are often kept without the head that their configuration names.
        model, missing = _loaded(transformers.AutoModel, folder)
    if missing:
        warn(
            f"{folder}: {len(missing)} weights of the model are in no file of it, and random: "
            f"{missing[0]!r}{', …' if len(missing) > 1 else ''}"
        )
    return model if device is None else model.to(device)


def _loaded(made: Any, folder: Path) -> tuple[nn.Module, list[str]]:
    """The model of a class, and which of its weights the folder lacks."""
    try:
        model, told = made.from_pretrained(
            folder, dtype="auto", local_files_only=True, output_loading_info=True
        )
    except Exception as e:  # a damaged folder can raise anything
        text = str(e).strip().splitlines() or [type(e).__name__]
        raise FileError(f"{folder}: transformers can't load it: {text[0]}") from e
    return model, sorted(told["missing_keys"])


def _tokenizer(given: Any, base: Path | None) -> Any:
    """The one that was given, by its folder or itself; else that of the base's folder, if any."""
    named = isinstance(given, str | os.PathLike) and given != "bytes"
    if not named and (given is not None or base is None):
        return given
    folder = Path(given) if named else base
    try:
        return _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # a damaged file can raise anything
        if not named:
            return None  # what needs one says so
        raise FileError(
            f"tokenizers: {folder} holds none that transformers can read; give the folder of one, "
            "or 'bytes'"
        ) from e


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingExtraError(
            "bases in folders take transformers: pip install 'lorafold[transfer]', or give models"
        ) from None
    return transformers


def _vocabulary(tokenizer: Any) -> Mapping[str, int]:
    if isinstance(tokenizer, str) and tokenizer == "bytes":
        return {chr(k): k for k in range(256)}
    get = getattr(tokenizer, "get_vocab", None)
    return dict(get()) if callable(get) else {}
