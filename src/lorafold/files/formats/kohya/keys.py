"""The keys of kohya-ss's and LyCORIS's files, and of what has their factors under other names."""

from __future__ import annotations

import re

import torch

_PLAIN = r"lora_(?:down|up|mid)"
_PRODUCT = r"hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)"
KEY = re.compile(rf"(?P<name>.+)\.(?:(?P<plain>{_PLAIN})(?:\.weight)?|(?P<product>{_PRODUCT}))")
# ComfyUI takes PEFT's words as well, and diffusers' older ones; x-flux names FLUX's attentions.
COMFY_KEY = re.compile(
    rf"(?P<name>.+)\.(?:(?P<plain>{_PLAIN}|lora_[AB])(?:\.(?:default\.)?weight)?"
    rf"|(?P<product>{_PRODUCT}))"
    r"|(?P<older>.+_blocks\.\d+\.processor\.\w+_lora[12]?|.+(?=\.lora(?:_linear_layer)?\.))"
    r"(?:\.lora(?:_linear_layer)?)?\.(?P<side>down|up)\.weight"
)
_SAME = {"lora_A": "lora_down", "lora_B": "lora_up", "down": "lora_down", "up": "lora_up"}


def parsed(key: str, pattern: re.Pattern[str]) -> tuple[str, str] | None:
    """A module's name, and what of it a key has; None where it is no factor's."""
    match = pattern.fullmatch(key)
    if match is None:
        return None
    said = match.groupdict()
    what = said["plain"] or said["product"] or said["side"]
    return said["name"] or said["older"], _SAME.get(what, what)


def what_of(key: str) -> str:
    """What of a module a factor's key has, by kohya-ss's words."""
    found = parsed(key, COMFY_KEY)
    assert found is not None
    return found[1]


def wide(dtype: torch.dtype) -> torch.dtype:
    """What products are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
