"""The updates of an adapter of an image model, under diffusers' paths, on their way into a file.

What is no update of a linear layer or a convolution of such a model is refused by name; so is what
a format has no place for beside the updates.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from ....adapter import Adapter
from ....errors import MismatchError, RefusedError
from ....lowrank import LowRank
from ....parts import PREFIX, Layout, refusal_reason
from ....words import some_of
from .bases import matched, modules_of
from .flux import to_flux
from .keys import OWNED, owner_of
from .names import LYCORIS, OWNERS, is_flat_path, parted, with_text_model

_MAGNITUDE = ".lora_magnitude_vector"
# What kohya-ss's files and those alike have beside updates, under keys of their own.
_CARRIED = re.compile(r"(?P<name>.+)\.(?:dora_scale|diff|diff_b|w_norm|b_norm)")
Unet = Literal["sd1", "sdxl"]

_SDXL = re.compile(r"add_embedding\.|up_blocks\.0\.attentions\.|.*\.transformer_blocks\.[1-9]\d*\.")
_SD1 = re.compile(
    r"down_blocks\.(?:0\.attentions|2\.downsamplers|3)\.|up_blocks\.(?:2\.(?:attentions|upsamplers)|3)\."
)


@dataclass(frozen=True)
class Module:
    """One update.

    Args:
        path: diffusers', with the part of the pipeline; or a name of a format's own.
        update: A and B flat, and its scale.
        layout: of its weight.
        magnitudes: DoRA's, of rows.
    """

    path: str
    update: LowRank
    layout: Layout
    magnitudes: Tensor | None = None


@dataclass(frozen=True)
class Images:
    """An adapter of an image model.

    Args:
        modules: its updates.
        carried: {key: tensor} of what files of kohya-ss's family have beside them.
        known: diffusers' paths of the base, as far as one is given.
    """

    modules: tuple[Module, ...]
    carried: Mapping[str, Tensor]
    known: tuple[str, ...] = ()

    @property
    def is_flux(self) -> bool:
        """Whether it is of FLUX, by any of its modules."""
        return any(to_flux(module.path) is not None for module in self.modules)

    @property
    def has_two_encoders(self) -> bool:
        """Whether its pipeline has a second text encoder, as the modules or the base tell."""
        paths = (*(module.path for module in self.modules), *self.known)
        return any(path.startswith("text_encoder_2.") for path in paths)

    @cached_property
    def unet(self) -> Unet:
        """Whose UNet it is of.

        Raises:
            MismatchError: its modules do not tell, or tell both.
        """
        paths = [m.path for m in self.modules if m.path.startswith("unet.")]
        rests = [path.removeprefix("unet.") for path in (*paths, *self.known)]
        is_sdxl = self.has_two_encoders or any(map(_SDXL.match, rests))
        is_sd1 = any(map(_SD1.match, rests))
        if is_sd1 == is_sdxl and paths:
            said = "are of both" if is_sd1 else "are in either"
            raise MismatchError(
                "the UNets of Stable Diffusion 1 and XL have other names, and the modules here "
                f"({some_of(paths, 2)}) {said}: give base= (the folder of its UNet or pipeline)"
            )
        return "sdxl" if is_sdxl else "sd1"


def images_of(adapter: Adapter, form: str, base: Any, *, dora: bool, carries: bool) -> Images:
    """The parts of an adapter that go into a file.

    Args:
        adapter: of an image model.
        form: the format, for messages.
        base: what `by_base` takes; where it is given, names and shapes are checked, and it has the
            kernels of convolutions which a file had flattened.
        dora: whether the format has a place for magnitudes.
        carries: whether it has one for what files of kohya-ss's family have beside updates.

    Raises:
        RefusedError: a part that the format has no place for, by name.
        MismatchError: a module of no image model, or that does not fit the base.
    """
    reason = refusal_reason({**adapter.config, "use_dora": False}, ())
    if reason is not None:
        raise RefusedError(f"{form} can't hold the adapter: {reason}")
    if not adapter.modules:
        raise RefusedError(f"{form} holds updates alone, and the adapter has none")
    layouts = {path: adapter.layout(path) for path in adapter.modules}
    known: tuple[str, ...] = ()
    places = dict(zip(adapter.modules, adapter.modules, strict=True))
    if base is not None:
        shapes = modules_of(base)
        known = tuple(path.removeprefix("unet.") for path in shapes)
        on_base = matched(adapter, {path: path for path in adapter.modules}, shapes)
        layouts |= on_base.layouts
        places |= on_base.moved
    paths = _paths(adapter.modules, places)
    magnitudes, others = _beside(adapter, form, dora=dora, carries=carries)
    modules = []
    for path, u in adapter.modules.items():
        layout = layouts[path]
        if layout.kind not in ("linear", "conv") or layout.parameter != "weight" or layout.stem:
            raise RefusedError(
                f"{form} has no place for {path!r}, which is no linear layer and no convolution: "
                "save it with format='peft'"
            )
        modules.append(Module(paths[path], u, layout, magnitudes.get(path)))
    return Images(tuple(modules), others, known)


def _paths(paths: Iterable[str], places: Mapping[str, str]) -> dict[str, str]:
    """{path of the adapter: diffusers', with the part of the pipeline}.

    Raises:
        MismatchError: two that are one.
    """
    found = {}
    for path in paths:
        model, _ = parted(path)
        known = bool(model) and model != LYCORIS and places[path] != path
        found[path] = path
        if known:  # a flat name that the base has told apart
            there = places[path]
            found[path] = there if OWNED.match(there) else f"{OWNERS[model]}.{there}"
    owner = owner_of(found.values())
    if owner is not None:
        found = {path: f"{owner}.{new}" for path, new in found.items()}
    found = {path: with_text_model(new) for path, new in found.items()}
    counts = Counter(found.values())
    twice = [path for path, new in found.items() if counts[new] > 1]
    if twice:
        raise MismatchError(f"{some_of(twice)} are one module: drop one")
    return found


def _beside(
    adapter: Adapter, form: str, *, dora: bool, carries: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Magnitudes by the adapter's path, and what else is carried."""
    magnitudes, others = {}, {}
    for key, t in adapter.extras.items():
        path = key.removeprefix(PREFIX).removesuffix(".weight").removesuffix(_MAGNITUDE)
        if key.removesuffix(".weight").endswith(_MAGNITUDE) and path in adapter.modules:
            magnitudes[path] = t
        else:
            others[key] = t
    if magnitudes and not dora:
        raise RefusedError(
            f"{form} has no place for DoRA ({some_of(magnitudes)}): save it with format='kohya'"
        )
    lost = [key for key in others if not (carries and _is_carried(key, adapter.modules))]
    if lost:
        raise RefusedError(
            f"{form} has no place for {some_of(lost)}, which is no update of a module: "
            "save it with format='peft'"
        )
    return magnitudes, others


def _is_carried(key: str, modules: Collection[str]) -> bool:
    """Whether a key of kohya-ss's family means the same in a file that is written."""
    match = _CARRIED.fullmatch(key)
    return match is not None and (is_flat_path(match["name"]) or match["name"] in modules)
