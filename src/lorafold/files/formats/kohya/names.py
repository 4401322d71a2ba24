"""kohya-ss's names: a module's path with its dots written as `_`, behind the name of its model.

Paths have `_` themselves, so a name alone does not tell where the dots were. With the base's own
modules it does. Without them it does where every piece of it is a word that diffusers' UNets and
CLIP's text encoders (SD 1, 2 and XL) put between dots. A model of which one name is another keeps
all its names as they are in the file.

SDXL's UNet is written with the names of its first code (sgm): its blocks are counted through, a
level has two on the way down and three on the way up, and the one between levels resizes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ....adapter import Adapter
from ....errors import MismatchError
from ....parts import LINEAR, PREFIX, Layout
from ....roles.names import weights_in
from ....words import some_of

# The model of a pipeline that a name begins with; how module lists may call it, the first is ours.
_MODELS = {
    "lora_unet_": ("unet", "transformer", "diffusion_model"),
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_3",),
    "lycoris_": (),
}
_FLAT = re.compile(rf"({'|'.join(_MODELS)})[^.]+\..+")

_UNET = (
    *("down_blocks", "mid_block", "up_blocks", "resnets", "attentions", "downsamplers"),
    *("upsamplers", "transformer_blocks", "attn1", "attn2", "to_q", "to_k", "to_v", "to_out"),
    *("ff", "net", "proj", "proj_in", "proj_out", "conv", "conv1", "conv2", "conv_in"),
    *("conv_out", "conv_shortcut", "time_emb_proj", "time_embedding", "add_embedding"),
    *("linear_1", "linear_2"),
)
_TEXT = (
    *("text_model", "encoder", "layers", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    *("mlp", "fc1", "fc2", "embeddings", "token_embedding", "position_embedding"),
    *("text_projection",),
)
_WORDS = {
    model: re.compile(rf"({'|'.join(sorted(words, key=len, reverse=True))}|\d+)(?:_|$)")
    for model, words in (("lora_unet_", _UNET), *((f"lora_te{n}_", _TEXT) for n in ("", 1, 2)))
}

# sgm's names of parts, and diffusers'.
_IN_RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_AROUND = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}
_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)_(\d+)(?:_(\d+))?_(.+)")
_MIDDLE = ("resnets_0", "attentions_0", "resnets_1")


def is_flat_name(key: str) -> bool:
    """Whether a key begins as a module's name of kohya-ss's or LyCORIS's."""
    return _FLAT.fullmatch(key) is not None


def paths_of(names: Iterable[str]) -> dict[str, str]:
    """{name in a file: module path}, as far as the names tell; else the name itself.

    Examples:
        >>> paths_of(["lora_unet_mid_block_attentions_0_proj_in"])
        {'lora_unet_mid_block_attentions_0_proj_in': 'unet.mid_block.attentions.0.proj_in'}
    """
    split = {name: _split(name) for name in names}
    strange = {_parted(name)[0] for name, path in split.items() if path is None}
    return {n: n if p is None or _parted(n)[0] in strange else p for n, p in split.items()}


def _split(name: str) -> str | None:
    """The path of a module by words that are known; None where there are others in it."""
    model, rest = _parted(name)
    if model not in _WORDS:
        return None
    rest = _of_sgm(rest) or rest
    words = _WORDS[model].findall(rest)
    return ".".join((_MODELS[model][0], *words)) if "_".join(words) == rest else None


def _parted(name: str) -> tuple[str, str]:
    model = next((m for m in _MODELS if name.startswith(m)), "")
    return model, name.removeprefix(model)


def _of_sgm(rest: str) -> str | None:
    """A name of sgm's as diffusers' names would be; None where it is none."""
    if rest in _AROUND:
        return _AROUND[rest]
    match = _BLOCK.fullmatch(rest)
    if match is None:
        return None
    where, n, end = match[1], int(match[2]), match[4]
    if where == "middle_block":
        end = f"{match[3]}_{end}" if match[3] else end
        return f"mid_block_{_MIDDLE[n]}_{_IN_RESNET.get(end, end)}" if n < 3 else None
    if match[3] is None:
        return None
    part, down = int(match[3]), where == "input_blocks"
    level, block = divmod(n - 1 if down else n, 3)
    side = f"{'down' if down else 'up'}_blocks_{level}"
    if end == ("op" if down else "conv"):
        return f"{side}_{'down' if down else 'up'}samplers_0_conv"
    if part > 1 or level < 0 or (down and block == 2):
        return None
    return f"{side}_{('resnets', 'attentions')[part]}_{block}_{_IN_RESNET.get(end, end)}"


def by_base(adapter: Adapter, names: Mapping[str, str], base: Any) -> Adapter:
    """The adapter under the names of the base's modules.

    Args:
        adapter: as it was read.
        names: {module path: its name in the file}.
        base: a model, its configuration or folder, or module paths. Those of several models have
            theirs before them: `unet.`, `text_encoder.`, `text_encoder_2.`.

    Raises:
        MismatchError: names that no module of the base is meant by, or several; all named.
    """
    shapes = weights_in(base)
    modules: dict[str, list[str]] = {}
    for path in shapes:
        modules.setdefault(path.replace(".", "_"), []).append(path)
    moved: dict[str, str] = {}
    lost = []
    for path, name in names.items():
        found = next((modules[flat] for flat in _spellings(name) if flat in modules), [])
        if len(found) != 1 or found[0] in moved.values():
            lost.append(name)
        else:
            moved[path] = found[0]
    if lost:
        raise MismatchError(
            f"no module of the base, or more than one, is meant by {some_of(lost)}; a base of "
            "several models is given as a list of all their modules, with 'unet.', "
            "'text_encoder.' and 'text_encoder_2.' before them"
        )
    layouts = {
        moved[path]: _layout(adapter.layout(path), adapter[path].shape, shapes[moved[path]])
        for path in names
    }
    extras = {}
    for key, t in adapter.extras.items():
        path, dot, what = key.removeprefix(PREFIX).rpartition(".")
        is_ours = key.startswith(PREFIX) and path in moved
        extras[f"{PREFIX}{moved[path]}{dot}{what}" if is_ours else key] = t
    return replace(
        adapter,
        modules={moved[path]: u for path, u in adapter.modules.items()},
        extras=extras,
        layouts={path: layout for path, layout in layouts.items() if layout != LINEAR},
    )


def _spellings(name: str) -> list[str]:
    """What a base's module may be called, flattened; the surest first."""
    model, rest = _parted(name.replace(".", "_"))
    rests = [rest]
    if model == "lora_unet_":
        rests += [other] if (other := _of_sgm(rest)) is not None else []
    elif model:
        rests.append(rest.removeprefix("text_model_"))  # which newer releases leave out
    owners = [f"{owner}_" for owner in _MODELS.get(model, ())]
    return [owner + rest for owner in (*owners, "") for rest in rests]


def _layout(layout: Layout, shape: tuple[int, int], weight: tuple[int, ...] | None) -> Layout:
    """That of a convolution, where the file had its kernel flattened."""
    if layout != LINEAR or weight is None or len(weight) < 3 or weight[0] != shape[0]:
        return layout
    conv = Layout("conv", kernel=tuple(weight[1:]))
    return conv if shape[1] == math.prod(weight[1:]) else layout
