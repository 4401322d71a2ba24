"""ComfyUI's names, which ai-toolkit and others write as well: those of each model's first code.

Behind a module's name are kohya-ss's factors, or PEFT's `lora_A` and `lora_B`; x-flux's are of
FLUX's attentions. Paths of models that no table here has stay as they are.
"""

from __future__ import annotations

from ..kohya.keys import COMFY_KEY, parsed
from ..kohya.reading import Grammar, factors_of, found_by
from ..reading import Format, Found, Source
from .keys import ENCODERS, MODEL, OF_FLUX, is_comfy_name

_FLAT = {
    ENCODERS[f"text_encoder{end}"]: f"lora_te{n}_" for end, n in (("", 1), ("_2", 2), ("_3", 3))
}


def _flat(name: str) -> str:
    """A name as kohya-ss would have it; itself where it is no module's that is known."""
    for start, flat in _FLAT.items():
        if name.startswith(start):
            return flat + name.removeprefix(start).replace(".", "_")
    rest = name.removeprefix(MODEL)
    match = OF_FLUX.match(rest)
    if match is not None:
        rest = rest[match.end() :]
    elif rest == name:
        return name
    return "lora_unet_" + rest.replace(".", "_")


def _claims(source: Source) -> bool:
    found = (parsed(key, COMFY_KEY) for key in source.tensors)
    return any(said is not None and is_comfy_name(said[0]) for said in found)


_GRAMMAR = Grammar("ComfyUI", COMFY_KEY, _flat)


def _found(source: Source) -> Found:
    return found_by(source, _GRAMMAR)


COMFY = Format("comfy", "ComfyUI", _claims, _found, factors_of)
