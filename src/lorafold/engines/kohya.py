"""kohya-ss's sd-scripts, and LyCORIS for what is its own; measured with lycoris-lora 4.1.3."""

from __future__ import annotations

from collections.abc import Iterator

from .finding import Finding, convert, told
from .look import Look


def findings(look: Look) -> Iterator[Finding]:
    """What kohya-ss's readers do with a file."""
    again = convert(look.path, "kohya")
    if look.form != "kohya":
        yield Finding(
            "form",
            "refuses",
            f"its readers find no module by the names of {look.said}: they want lora_unet_…",
            remedy=again if look.is_of_images else None,
        )
        return
    names = {key.partition(".")[0] for key in look.tensors if not key.endswith(".alpha")}
    lacking = sorted(name for name in names if name not in look.alphas)
    if lacking:
        yield Finding(
            "no_alpha",
            "refuses",
            f"LyCORIS needs an alpha of every module, and {told(lacking)} has none (sd-scripts "
            "takes the rank for it)",
            modules=tuple(lacking),
            remedy=again,
        )
    tucker = [key for key in look.tensors if key.endswith("lokr_t2")]
    if tucker:
        yield Finding(
            "lokr_t2",
            "refuses",
            f"LyCORIS can't load {told(tucker)}: its own loader looks for the rank elsewhere",
            modules=tuple(tucker),
            remedy=again,
        )
    columns = [
        key
        for key, stored in look.tensors.items()
        if key.endswith("dora_scale") and stored.shape[:1] == (1,) and max(stored.shape) > 1
    ]
    if columns:
        yield Finding(
            "dora_columns",
            "refuses",
            f"LyCORIS can't load magnitudes of columns, (1, in): {told(columns)}",
            modules=tuple(columns),
        )
