"""A base model seen through its safetensors headers: names, shapes, dtypes, and no weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import FileError
from .safetensors import Entry, read_entries

INDEX_SUFFIX = ".safetensors.index.json"
WHOLE_NAME = "model.safetensors"

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_WEIGHTS = (".weight", ".qweight")


@dataclass(frozen=True)
class Base:
    """What the headers say.

    Args:
        path: as it was given.
        entries: {tensor name: dtype and shape}.
        prefix: how an adapter's paths differ from these names: "+transformer." where the adapter
            has it and the files don't, "-model." the other way round, "" where they agree.
        files: the safetensors files.
        index: the file that says which tensor is in which of them, if there is one.
    """

    path: str
    entries: Mapping[str, Entry]
    prefix: str = ""
    files: tuple[Path, ...] = ()
    index: Path | None = None

    def named(self, name: str) -> str:
        """An adapter's name as the files have it."""
        sign, letters = self.prefix[:1], self.prefix[1:]
        if sign == "+":
            return name.removeprefix(letters)
        return letters + name if sign == "-" else name

    def unnamed(self, name: str) -> str:
        """A name of the files as the adapter has it."""
        sign, letters = self.prefix[:1], self.prefix[1:]
        if sign == "-":
            return name.removeprefix(letters)
        return letters + name if sign == "+" else name

    def below(self, name: str) -> bool:
        """Whether anything is stored under the module `name`."""
        start = self.named(name) + "."
        return any(key.startswith(start) for key in self.entries)

    def embedding(self) -> str | None:
        """The key of the input embedding, which a tied head has in common."""
        return next((key for key in self.entries if key.endswith(_EMBEDDINGS)), None)

    def modules(self) -> Iterator[str]:
        """Modules with a matrix or a kernel, and 3-D parameters, by the adapter's names."""
        for key, entry in self.entries.items():
            if len(entry.shape) < 2 and not key.endswith(_WEIGHTS[1]):
                continue
            end = next((e for e in _WEIGHTS if key.endswith(e)), None)
            yield self.unnamed(key.removesuffix(end) if end else key)


def read_base(path: str, names: Iterable[str]) -> Base:
    """The base in a folder (or a safetensors file), its prefix chosen so that `names` match best.

    Raises:
        FileError: nothing there in safetensors, a shard missing, a tensor in two shards, or a
            damaged header.
    """
    entries: dict[str, Entry] = {}
    files, index = _files(Path(path))
    for file in files:
        found = read_entries(file)
        twice = found.keys() & entries.keys()
        if twice:
            raise FileError(f"{path}: {min(twice)!r} is in {file.name} and in another file as well")
        entries |= found
    if not entries:
        raise FileError(f"{path}: there are no tensors in it")
    plain = Base(path, entries)
    prefix = _prefix(list(names), set(plain.modules()))
    return Base(path, entries, prefix, tuple(files), index)


def _files(path: Path) -> tuple[list[Path], Path | None]:
    """The files that hold the model, and their index; one whole file goes before shards."""
    if path.is_file():
        return [path], None
    if not path.is_dir():
        raise FileError(f"no such folder: {str(path)!r}")
    if (path / WHOLE_NAME).is_file():
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
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted(set(parts))
        strange = [name for name in names if name in ("", ".", "..") or Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise FileError(f"{index}: not an index of safetensors files ({e})") from e
    if strange:  # a name is never a path
        raise FileError(f"{index} names {strange[0]!r}, which is no file beside it")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise FileError(f"{index} names {missing[0]!r}, which is not there")
    return [index.parent / name for name in names]


def _prefix(names: list[str], known: set[str]) -> str:
    """What to take away from, or put before, the adapter's names so that most are known.

    transformers saves a model without the name of its body's attribute, and loads it so.
    """
    candidates = {"": 0}
    for name in {kind(n): n for n in names}.values():
        for other in known:
            if other.endswith(f".{name}"):
                candidates["-" + other[: -len(name)]] = 0
            elif name.endswith(f".{other}"):
                candidates["+" + name[: -len(other)]] = 0
    for prefix in candidates:
        base = Base("", {}, prefix)
        candidates[prefix] = sum(base.named(name) in known for name in names)
    best = max(candidates.values())
    return min((p for p, n in candidates.items() if n == best), key=lambda p: (len(p), p))


def kind(name: str) -> str:
    """A module's name with its numbers left out: modules of one kind differ in these alone.

    Example:
        >>> kind("model.layers.12.self_attn.q_proj")
        'model.layers.#.self_attn.q_proj'
    """
    return re.sub(r"(?<![^.])\d+(?![^.])", "#", name)


def by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    """{kind: the numbers of each name}, for listing many in little space."""
    found: dict[str, list[str]] = {}
    for name in names:
        numbers = re.findall(r"(?<![^.])\d+(?![^.])", name)
        found.setdefault(kind(name), []).append(".".join(numbers))
    return found
