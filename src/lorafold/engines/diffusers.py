"""diffusers, `load_lora_weights`; measured with 0.42.1."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from .finding import Finding, convert, factors_of, told
from .look import Look

_OF_UNET = re.compile(r"lora_unet_")
_FLUX = re.compile(r"lora_unet_(double|single)_blocks_|lora_unet_final_layer")
_PRODUCTS = re.compile(r"\.(hada_|lokr_)")
_COMFY = re.compile(r"^diffusion_model\.(double|single)_blocks\.|^diffusion_model\.final_layer\.")
_ATTENTION = re.compile(r"\.attn\d\.to_(q|k|v|out\.0)$")
_FINAL = re.compile(r"lora_unet_final_layer")


def findings(look: Look) -> Iterator[Finding]:
    """What diffusers does with a file."""
    again = convert(look.path, "diffusers")
    if look.form == "comfy" or any(map(_COMFY.search, look.tensors)):
        yield Finding(
            "comfy_names",
            "ignores",
            "ComfyUI's own names of FLUX pass through as they are, and no module has them: nothing "
            "is attached, without an error",
            remedy=again,
        )
    elif look.form == "kohya":
        yield from _kohya(look, again)
    elif look.form not in ("diffusers", "peft"):
        yield Finding(
            "form",
            "refuses",
            f"diffusers does not read the form of {look.said}",
            remedy=again if look.is_of_images else None,
        )
    elif look.form == "peft" and look.config is not None:
        yield Finding(
            "form",
            "refuses",
            "diffusers reads a file of its own names, and no PEFT folder",
            remedy=again if look.is_of_images else None,
        )
    if "lora_adapter_metadata" in look.metadata:
        yield Finding(
            "metadata",
            "loads",
            "the scale is in the header (lora_adapter_metadata), which "
            "model.load_lora_adapter(file) drops without use_safetensors=True",
            remedy=again,
        )


def _kohya(look: Look, again: str) -> Iterator[Finding]:
    products = [key for key in look.tensors if _PRODUCTS.search(key)]
    middle = [key for key in look.tensors if key.endswith("lora_mid.weight")]
    if products:
        name = "loha" if any(".hada_" in key for key in products) else "lokr"
        yield Finding(
            name, "refuses", f"factors of LyCORIS are not renamed ({told(products)})", remedy=again
        )
    if middle:
        yield Finding(
            "mid", "refuses", f"Tucker's third factor is not renamed ({told(middle)})", remedy=again
        )
    dora = [key for key in look.tensors if key.endswith("dora_scale")]
    if dora:
        yield Finding(
            "dora",
            "ignores",
            f"the magnitudes are filtered out, with a warning ({told(dora)})",
            modules=tuple(dora),
        )
    final = [key for key in look.tensors if _FINAL.search(key)]
    if final:
        yield Finding(
            "final_layer",
            "ignores",
            f"FLUX's final layer gets names without transformer., and is dropped ({told(final)})",
            modules=tuple(final),
            remedy=again,
        )
    if not any(map(_FLUX.search, look.tensors)):
        yield from _alphas(look, again)


def _alphas(look: Look, again: str) -> Iterator[Finding]:
    """Alphas of a UNet that are not all one: the most frequent of them is applied too often."""
    names = {} if look.file is None else dict(look.file.names)
    unet = {path: name for path, name in names.items() if _OF_UNET.match(name)}
    said = {path: look.alphas[name] for path, name in unet.items() if name in look.alphas}
    if look.file is None or not said:
        return
    common = Counter(said.values()).most_common()[0][0]
    applied = {}
    for path in unet:
        alpha = said.get(path, common)
        if _ATTENTION.search(path):  # by whose old names the pattern goes
            alpha = common
        applied[path] = alpha / look.file.shapes[path][2]
    wrong = factors_of(applied, {path: look.file.scales[path] for path in unet})
    if wrong:
        yield Finding(
            "alphas",
            "misreads",
            "the α of modules differ, or some have none: queries, keys, values and outputs of "
            f"attention, and modules without α, get the most frequent, {common:g}",
            wrong,
            tuple(wrong),
            again,
        )
