"""diffusers, `load_lora_weights`; measured with 0.42.1.

It takes a file by the beginnings of its keys. Names of kohya-ss's are converted where all keys are
of a UNet and of CLIP; FLUX's from kohya-ss's and ComfyUI's words, with what is left over dropped or
an error. Anything else goes in as it is, and what no module is called has no effect.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping

from ..files.formats.diffusion.keys import OWNED
from ..files.formats.diffusion.names import pieces_of
from .finding import Finding, convert, factors_of, told
from .look import Look

_OF_UNET = re.compile(r"lora_unet_")
_FLUX = re.compile(
    r"lora_unet_(double_blocks|single_blocks|final_layer|guidance_in|img_in|txt_in|time_in"
    r"|vector_in)[_.]"
)
_BY_PATHS = re.compile(r"lora_unet_(single_)?transformer_blocks_")  # of FLUX and others
_MIXED = "lora_transformer_"  # FLUX by diffusers' own paths: a converter of its own
_OF_SD = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
_OF_FLUX = ("lora_unet_", "lora_te_", "lora_te1_")
_PRODUCTS = re.compile(r"\.(hada_|lokr_)")
_DIFFERENCE = re.compile(r"\.(diff|diff_b|w_norm|b_norm)$")
_COMFY = re.compile(r"^diffusion_model\.(double|single)_blocks\.|^diffusion_model\.final_layer\.")
_XFLUX = re.compile(r"(diffusion_model\.)?(double|single)_blocks\.\d+\.processor\.")
_CLIP = "text_encoders.clip_l.transformer."
_NOT_OF_CLIP = re.compile(r"text_projection|position_embedding")
_ATTENTION = re.compile(r"\.attn\d\.to_(q|k|v|out\.0)$")
_FINAL = re.compile(r"lora_unet_final_layer")


def findings(look: Look) -> Iterator[Finding]:
    """What diffusers does with a file."""
    again = convert(look.path, "diffusers")
    if look.form == "comfy" or any(map(_COMFY.search, look.tensors)):
        yield from _comfy(look, again)
    elif look.form == "kohya":
        yield from _kohya(look, again)
    elif look.form == "diffusers":
        yield from _own(look, again)
    elif look.form == "peft" and look.config is None and not look.is_of_images:
        yield Finding(
            "form", "ignores", "no part of a pipeline has such modules: nothing is attached"
        )
    elif look.form != "peft":
        yield Finding(
            "form",
            "refuses",
            f"diffusers does not read the form of {look.said}",
            remedy=again if look.is_of_images else None,
        )
    elif look.config is not None:
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


def _comfy(look: Look, again: str) -> Iterator[Finding]:
    """ComfyUI's names: FLUX's of lora_down and lora_up are converted, and x-flux's."""
    is_flux = any(map(_COMFY.search, look.tensors))
    if is_flux and any(".lora_down.weight" in key for key in look.tensors):
        yield from _lycoris(look, again)
        yield from _flux({_flat(key): key for key in look.tensors}, again)
    elif not all(map(_XFLUX.match, look.tensors)):
        yield Finding(
            "comfy_names",
            "ignores",
            "of ComfyUI's own names FLUX's with lora_down and lora_up are converted alone; others "
            "pass through as they are, and no module has them: nothing is attached, without an "
            "error",
            remedy=again,
        )


def _flat(key: str) -> str:
    """A key of ComfyUI's as diffusers makes it one of kohya-ss's."""
    for start, flat in (("diffusion_model.", "lora_unet_"), (_CLIP, "lora_te_")):
        if key.startswith(start):
            stem, dot, what = key.removeprefix(start).partition(".lora_")
            if not dot:
                stem, dot, what = key.removeprefix(start).rpartition(".")
            return flat + stem.replace(".", "_") + dot + what
    return key


def _own(look: Look, again: str) -> Iterator[Finding]:
    """Files of diffusers' own names."""
    if not any(map(OWNED.match, look.tensors)):
        yield Finding(
            "no_part",
            "ignores",
            "no key begins with a part of the pipeline (unet., transformer., text_encoder.): "
            "nothing is attached, without an error",
            remedy=again,
        )
        return
    is_flux = any(key.startswith("transformer.") for key in look.tensors)
    other = [key for key in look.tensors if "lora" not in key]
    if other and not is_flux:
        yield Finding(
            "keys",
            "refuses",
            f"every key has to have 'lora' in it, and {told(other)} has not",
            modules=tuple(other),
            remedy=again,
        )
    if is_flux and any(".lora_down.weight" in key for key in look.tensors):
        wrong = factors_of(dict.fromkeys(look.scales, 1.0), look.scales)
        if wrong:
            yield Finding(
                "alphas",
                "misreads",
                "beside lora_down and lora_up of a transformer's own paths no α is read",
                wrong,
                tuple(wrong),
                again,
            )


def _kohya(look: Look, again: str) -> Iterator[Finding]:
    yield from _lycoris(look, again)
    if not any(_FLUX.match(key) or _BY_PATHS.match(key) for key in look.tensors):
        yield from _unet(look, again)
    elif not any(key.startswith(_MIXED) for key in look.tensors):
        yield from _flux({key: key for key in look.tensors}, again)


def _lycoris(look: Look, again: str) -> Iterator[Finding]:
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


def _flux(keys: Mapping[str, str], again: str) -> Iterator[Finding]:
    """FLUX by the words of its first code.

    Args:
        keys: {key as kohya-ss has it: the file's}.
    """
    final = [own for key, own in keys.items() if _FINAL.search(key)]
    if final:
        yield Finding(
            "final_layer",
            "ignores",
            f"FLUX's final layer gets names without transformer., and is dropped ({told(final)})",
            modules=tuple(final),
            remedy=again,
        )
    dropped = [
        own
        for key, own in keys.items()
        if not key.startswith(_OF_FLUX) or _NOT_OF_CLIP.search(key) or key.endswith(".diff_b")
    ]
    if dropped:
        yield Finding(
            "dropped",
            "ignores",
            "beside FLUX's transformer it takes the layers of CLIP alone, and drops T5's, biases "
            f"and all others without an error ({told(dropped)})",
            modules=tuple(dropped),
            remedy=again,
        )
    gone = set(dropped)
    kept = {key: own for key, own in keys.items() if own not in gone}
    yield from _left_over(kept, again, is_flux=True)


def _is_others(name: str) -> bool:
    """Whether a transformer's module has a name by diffusers' own paths."""
    return name.startswith("lora_unet_") and _FLUX.match(name + ".") is None


def _left_over(keys: Mapping[str, str], again: str, *, is_flux: bool) -> Iterator[Finding]:
    """Differences, and names that no table has: of FLUX an error, of a UNet without an effect."""
    whole = [own for key, own in keys.items() if _DIFFERENCE.search(key)]
    if whole:
        yield Finding(
            "differences",
            "refuses",
            f"whole differences are not renamed ({told(whole)})",
            modules=tuple(whole),
        )
    names = {key.partition(".")[0]: None for key in keys if not _DIFFERENCE.search(key)}
    strange = [
        name
        for name in names
        if pieces_of([name])[name][0].path == name or (is_flux and _is_others(name))
    ]
    if strange:
        yield Finding(
            "names",
            "refuses" if is_flux else "ignores",
            f"no module is known to be called {told(strange)}",
            modules=tuple(strange),
            remedy=" ".join([again, "--base", "PIPELINE"]),
        )


def _unet(look: Look, again: str) -> Iterator[Finding]:
    """Stable Diffusion's: converted where all keys are of a UNet or of CLIP."""
    others = [key for key in look.tensors if not key.startswith(_OF_SD)]
    if others:
        yield Finding(
            "other_keys",
            "ignores" if all("lora" in key for key in look.tensors) else "refuses",
            f"names are converted where all are of a UNet or of CLIP, and {told(others)} is not: "
            "nothing of the file is attached",
            modules=tuple(others),
            remedy=again,
        )
        return
    yield from _left_over({key: key for key in look.tensors}, again, is_flux=False)
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
