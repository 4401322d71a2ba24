"""What a file says of its scale, where its config does not: beside the factors, or in its header.

    <module>.alpha                              α of one module, a tensor of one number
    lora_alpha, network_alpha, alpha            α of all, a text in the header's metadata
    lora_adapter_metadata                       in the metadata, a LoraConfig as JSON (diffusers'):
                                                {"r": …}, or {"<part of a pipeline>.r": …}

It is used, and whatever else is said of α (the config, `alpha=`) has to be the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import MismatchError
from ...parts import PREFIX, alpha_of, refusal_reason, scaling
from ...words import one_line
from ..config import checked, json_object

CONFIG_IN_HEADER = "lora_adapter_metadata"
_IN_HEADER = ("lora_alpha", "network_alpha", "ss_network_alpha", "alpha")
SAID = frozenset((*_IN_HEADER, CONFIG_IN_HEADER))  # keys of the metadata that are used up

_SUFFIX = ".alpha"
# Of a part's config: what is of its modules alone, and so is in their scales.
_OF_MODULES = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
_OF_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class Alphas:
    """What is said of α.

    Args:
        given: with `alpha=`.
        header: of all modules; key and value.
        modules: {module's name in the file: its number, in the dtype that it is stored in}.
        parts: {part of a pipeline: its config}.
        of_rank: whether α is the rank where nothing is said.
    """

    given: float | None = None
    header: tuple[str, float] | None = None
    modules: Mapping[str, Tensor] = field(default_factory=dict)
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    of_rank: bool = False

    def known(self, stem: str) -> bool:
        """Whether anything is said of a module."""
        anywhere = self.of_rank or self.given is not None or self.header is not None
        return anywhere or stem in self.modules or self._part(stem) is not None

    def of(self, stem: str, rank: int) -> float:
        """α of a module of which no config says it.

        Raises:
            MismatchError: two things are said.
        """
        part = self._part(stem)
        if stem in self.modules:
            told, how = float(self.modules[stem]), f"{stem + _SUFFIX!r}"
        elif part is not None:
            r, scale = self._in_part(part, stem)
            told, how = scale * rank, f"{CONFIG_IN_HEADER} in the header"
            if r != rank:
                raise MismatchError(f"{stem!r} has the rank {rank}, but {how} says {r}")
        elif self.header is not None:
            told, how = self.header[1], f"{self.header[0]!r} in the header"
        elif self.given is not None:
            return self.given
        else:
            assert self.of_rank
            return rank
        if self.given is not None and not self._agrees(stem, self.given, told):
            raise MismatchError(
                f"{how} says that α is {told:g}, and alpha= says {self.given:g}: leave out alpha="
            )
        return told

    def check(self, stem: str, config: Mapping[str, Any], path: str) -> None:
        """Refuse what a file says of a module where it is not what its config gives it.

        Args:
            path: by which the config knows it.

        Raises:
            MismatchError: naming both.
        """
        if stem in self.modules:
            expected, told = alpha_of(config, path), float(self.modules[stem])
            if not self._agrees(stem, expected, told):
                raise MismatchError(
                    f"{stem + _SUFFIX!r} says that α is {told:g}, and the config gives {path!r} "
                    f"{expected:g}: correct or remove one of them"
                )
        part = self._part(stem)
        if part is not None and self._in_part(part, stem) != scaling(config, path):
            raise MismatchError(
                f"{CONFIG_IN_HEADER} in the header gives {path!r} another rank or α than the "
                "config: correct or remove one of them"
            )

    def check_header(self, config: Mapping[str, Any]) -> None:
        """Refuse a header that contradicts the config.

        Raises:
            MismatchError: naming both.
        """
        if self.header is not None and not math.isclose(
            self.header[1], config["lora_alpha"], rel_tol=1e-6
        ):
            key, told = self.header
            raise MismatchError(
                f"{key!r} in the header says that α is {told:g}, and the config "
                f"{config['lora_alpha']:g}: correct or remove one of them"
            )

    def _part(self, stem: str) -> str | None:
        return next((p for p in self.parts if not p or stem.startswith(f"{p}.")), None)

    def _in_part(self, part: str, stem: str) -> tuple[int, float]:
        return scaling(self.parts[part], stem.removeprefix(f"{part}."))

    def _agrees(self, stem: str, exact: float, told: float) -> bool:
        """Whether two say the same; a number in a file is as exact as its dtype."""
        if stem in self.modules:
            exact = float(torch.tensor(exact, dtype=self.modules[stem].dtype))
        return math.isclose(exact, told, rel_tol=1e-6)


def alpha_keys(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, str]:
    """{name of a module: key of its α}, of what may be one: a tensor of one number."""
    found = {}
    for key, (dtype, shape) in tensors.items():
        if key.endswith(_SUFFIX) and math.prod(shape) == 1 and not dtype.is_complex:
            found[key.removesuffix(_SUFFIX).removeprefix(PREFIX)] = key
    return found


def header_says(
    metadata: Mapping[str, str], where: str
) -> tuple[tuple[str, float] | None, dict[str, Any] | None]:
    """(key, α) of all modules, and the config in a header's metadata.

    Raises:
        FileError: a config that is none.
        MismatchError: an α that is no number, or two.
    """
    told: tuple[str, float] | None = None
    for key in _IN_HEADER:
        if metadata.get(key, "None") in ("None", ""):
            continue
        try:
            value = float(metadata[key])
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            found = one_line(metadata[key])
            raise MismatchError(f"{where}: {key!r} in the header must be α, found {found}")
        if told is not None and told[1] != value:
            raise MismatchError(
                f"{where}: {told[0]!r} in the header says that α is {told[1]:g}, {key!r} {value:g}"
            )
        told = told or (key, value)
    if CONFIG_IN_HEADER not in metadata:
        return told, None
    place = f"{where}: {CONFIG_IN_HEADER} in the header"
    return told, json_object(metadata[CONFIG_IN_HEADER], place)


def by_part(config: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """{part of a pipeline: its config}; {"": config} where the config is of one model.

    Raises:
        FileError: one that is no LoRA's.
    """
    parts: dict[str, dict[str, Any]] = {} if config else {"": {}}
    for key, value in config.items():
        part, _, field_ = key.rpartition(".")
        parts.setdefault(part, {})[field_] = value
    place = f"{where}: {CONFIG_IN_HEADER} in the header"
    for part, said in parts.items():
        checked(said, f"{place}, {part!r}" if part else place)
    return parts


def common_config(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What the configs of a pipeline's parts say beside scales; that which refuses goes first."""
    found = list(parts)
    first = next((p for p in found if refusal_reason(p, ()) is not None), next(iter(found), {}))
    return {k: v for k, v in first.items() if k not in (*_OF_MODULES, *_OF_TARGETS)}
