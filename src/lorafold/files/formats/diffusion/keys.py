"""Keys of image models' files with dots in their names: diffusers' three generations, ComfyUI's.

diffusers has had three generations of names:

    unet.<path>.lora_A.weight, .lora_B.weight               the third, PEFT's; `lora_down`, too
    unet.<path>.lora.down.weight, .lora.up.weight           the second
    text_encoder.<path>.lora_linear_layer.down.weight       the second, of text encoders
    unet.<path of an attention>.processor.to_q_lora.down.weight     the first

ComfyUI calls a UNet or transformer, its text encoders (clip_l, clip_g, t5xxl), and FLUX alone:

    diffusion_model.<path>
    text_encoders.clip_l.transformer.<path>
    transformer.double_blocks.…, double_blocks.…
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ....parts import PREFIX
from .names import with_text_model

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
OWNED = re.compile(rf"({'|'.join(PARTS)})\.")
THIRD = re.compile(r"(?P<path>.+)\.lora_(?P<side>A|B|down|up)(?:\.default)?\.weight")
OLDER = re.compile(
    r"(?P<path>.+)\.processor\.(?P<inner>to_(?:q|k|v|out)|add_[qkv]_proj|to_add_out)_lora"
    r"\.(?:(?P<first>down|up)\.weight|alpha)"
    r"|(?P<encoder>.+\.self_attn)\.to_(?P<of>q|k|v|out)_lora\.(?:(?P<third>down|up)\.weight|alpha)"
    r"|(?P<module>.+)\.lora(?:_linear_layer)?\.(?:(?P<second>down|up)\.weight|alpha)"
)
_SIDES = {"down": "A", "up": "B", "A": "A", "B": "B"}
# What tells a model by a path in it: the first word, or any.
_FIRST = {
    "unet": re.compile(r"(?:down_blocks|mid_block|up_blocks|time_embedding|add_embedding)\."),
    "transformer": re.compile(r"(?:single_)?transformer_blocks\."),
    "text_encoder": re.compile(r"text_model\."),
}
_MORE = {
    "unet": re.compile(r"(?:conv_in|conv_out)(?:\.|$)"),
    "transformer": re.compile(
        r"(?:proj_out|norm_out|x_embedder|context_embedder|time_text_embed)(?:\.|$)"
    ),
    "text_encoder": re.compile(r"text_projection"),
}
_IN_TRANSFORMER = re.compile(
    r"(?:.*\.)?(?:(?:single_)?transformer_blocks|attn[12])\."
    r"|(?:x_embedder|context_embedder|time_text_embed|norm_out|proj_out)(?:\.|$)"
)


def is_of_diffusers(key: str) -> bool:
    """Whether a key can be of no other format."""
    found = path_in(key)
    if found is None or key.startswith(PREFIX) or is_comfy_name(found):
        return False
    match = OWNED.match(found)
    rest = found if match is None else found[match.end() :]
    if OLDER.fullmatch(key) is not None:
        return True
    if match is None:
        return any(pattern.match(rest) for pattern in (_FIRST["unet"], _FIRST["transformer"]))
    if match[1] == "transformer":
        return _IN_TRANSFORMER.match(rest) is not None
    return match[1] == "unet" or with_text_model(found) != found or rest.startswith("text_model.")


def path_in(key: str) -> str | None:
    """The module of a factor's key, as far as it is one of diffusers'."""
    third = THIRD.fullmatch(key)
    if third is not None:
        return third["path"]
    older = _older(key)
    return None if older is None else older[0]


def _older(key: str) -> tuple[str, str] | None:
    """Path and what it has, of a key of the first two generations."""
    match = OLDER.fullmatch(key)
    if match is None:
        return None
    said = match.groupdict()
    side = said["first"] or said["second"] or said["third"]
    what = "alpha" if side is None else f"lora_{_SIDES[side]}.weight"
    if said["path"] is not None:
        inner = {"to_out": "to_out.0"}.get(said["inner"], said["inner"])
        return f"{said['path']}.{inner}", what
    if said["encoder"] is not None:
        return f"{said['encoder']}.{said['of']}_proj", what
    return said["module"], what


def owner_of(paths: Iterable[str]) -> str | None:
    """The part of a pipeline that paths are of which do not say it; None where they do.

    Examples:
        >>> owner_of(["mid_block.attentions.0.proj_in", "conv_in"])
        'unet'
    """
    paths = list(paths)
    if any(OWNED.match(path) for path in paths):
        return None
    for owner, first in _FIRST.items():
        if any(map(first.match, paths)):
            known = all(first.match(path) or _MORE[owner].match(path) for path in paths)
            return owner if known else None
    return None


def third_generation(key: str) -> str:
    """A key as the third generation has it.

    Examples:
        >>> third_generation("unet.mid_block.attn1.processor.to_out_lora.up.weight")
        'unet.mid_block.attn1.to_out.0.lora_B.weight'
    """
    match = THIRD.fullmatch(key)
    if match is not None:
        return f"{match['path']}.lora_{_SIDES[match['side']]}.weight"
    older = _older(key)
    return key if older is None else ".".join(older)


MODEL = "diffusion_model."
ENCODERS = {
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
    "text_encoder_3": "text_encoders.t5xxl.transformer.",
}
OF_FLUX = re.compile(
    r"(?:transformer\.)?(?=(?:double_blocks|single_blocks|final_layer|img_in|txt_in|time_in"
    r"|vector_in|guidance_in)(?:\.|$))"
)


_COMFY = re.compile(
    r"diffusion_model\.|text_encoders\.|(?:transformer\.)?(?:double|single)_blocks\.\d"
)


def is_comfy_name(name: str) -> bool:
    """Whether a module's name is one of ComfyUI's, or of FLUX's first code with dots."""
    return _COMFY.match(name) is not None


def is_of_images(key: str) -> bool:
    """Whether a key with dots can be of an image model's file alone."""
    return is_comfy_name(key) or is_of_diffusers(key)
