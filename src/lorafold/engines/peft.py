"""PEFT, `PeftModel.from_pretrained`; measured with 0.21.2."""

from __future__ import annotations

from collections.abc import Iterator

from ..roles.names import weights_in
from .finding import Finding, convert, told
from .look import Look
from .peft_folder import form_findings, wrapped_names


def _other_names(look: Look) -> Iterator[Finding]:
    """Modules that the base has in memory under other names, or as parts of others."""
    if look.base is None or look.file is None or not look.base.config.get("model_type"):
        return
    there = weights_in(look.base.path)
    lost = [
        path
        for path in look.file.shapes
        if path not in there and path.partition("[")[0] not in there
    ]
    if lost:
        yield Finding(
            "names",
            "ignores",
            f"{len(lost)} of {len(look.file.shapes)} modules have other names in the base: what is "
            f"not found by {told(lost)} has no effect, or is an error where no target is found",
            modules=tuple(lost),
            remedy=convert(look.path, "peft", "--base", str(look.base.path)),
        )


def findings(look: Look) -> Iterator[Finding]:
    """What PEFT does with a file."""
    found = list(form_findings(look, "PEFT"))
    yield from found
    if found or look.config is None:
        return
    yield from wrapped_names(look, "PEFT")
    yield from _other_names(look)
    if look.config.get("enable_lora"):
        yield Finding(
            "enable_lora",
            "refuses",
            "releases from 0.3 on have no merged layers (enable_lora): the shapes do not fit",
            remedy=convert(look.path, "peft"),
        )
    foreign = [
        key
        for key, stored in look.tensors.items()
        if "unembed_tokens.lora_" in key or (".experts.w" in key and len(stored.shape) == 3)
    ]
    if foreign:
        yield Finding(
            "tinker_names",
            "ignores",
            f"PEFT finds no module by Tinker's {told(foreign)}: these updates have no effect",
            modules=tuple(foreign),
            remedy=convert(look.path, "peft"),
        )
