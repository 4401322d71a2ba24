"""PEFT, `PeftModel.from_pretrained`; measured with 0.21.2."""

from __future__ import annotations

from collections.abc import Iterator

from .finding import Finding, convert, told
from .look import Look
from .peft_folder import form_findings, wrapped_names


def findings(look: Look) -> Iterator[Finding]:
    """What PEFT does with a file."""
    found = list(form_findings(look, "PEFT"))
    yield from found
    if found or look.config is None:
        return
    yield from wrapped_names(look, "PEFT")
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
