"""Adapters in formats that are not read: told by how their tensors are called, with a way out.

Nothing of such a file would be found by PEFT's names, and what is not found would be an adapter
without any effect. So each is an error that says what the file is and which tool turns it into
one that is read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from ...words import some_of

DIFFERENCE = (
    "merge it into its base with its own tool, and take the difference: "
    "`lorafold extract BASE MERGED -o OUT`"
)
_DIFFUSERS = (
    "load it with diffusers, `pipe.load_lora_weights(file, adapter_name='default')`, write it with "
    "`pipe.unet.save_lora_adapter(folder)`, and give the file in that folder"
)

# What a format is, how a key of it that nothing else has looks, and what to do.
_FORMATS = (
    (
        "a LyCORIS adapter (OFT)",
        re.compile(r"[._](oft_(blocks|diag)|boft_)"),
        DIFFERENCE,
    ),
    (
        "in an older form of diffusers",
        re.compile(r"(\.lora(_linear_layer)?|[._]lora\d?)\.(down|up)\.weight$"),
        _DIFFUSERS,
    ),
    (
        "in cloneofsimo's form, which has no names of modules",
        re.compile(r"^\w+:\d+:(down|up)$|^w_[ab]_\d+$"),
        DIFFERENCE,
    ),
    (
        "in torchtune's form",
        re.compile(r"\.lora_[ab]\.weight$"),
        "write it with torchtune's checkpointer, which has PEFT's form too",
    ),
    (
        "in the form of NeMo or Megatron",
        re.compile(r"adapter\w*\.linear_(in|out)\.weight$"),
        "export it for PEFT (`export_ckpt(…, target='hf-peft')`)",
    ),
    (
        "in the form of AdapterHub's library",
        re.compile(r"(^|\.)loras\.[^.]+\.lora_[AB]$"),
        DIFFERENCE,
    ),
    (
        "of another method than LoRA",
        re.compile(
            r"\.(lora_E|vera_(lambda_[bd]|[AB])|ia3_l|b?oft_[rRs]|randlora_\w+|fourierft_spectrum"
            r"|vblora_\w+|hra_u|miss_block|bone_block)(\.|$)|(^|\.)prompt_embeddings$"
        ),
        f"convert it to LoRA (newer releases of PEFT have convert_to_lora), or {DIFFERENCE}",
    ),
)


def foreign(keys: Iterable[str]) -> str | None:
    """What format the tensors of a file are in that is not read, and what to do; None if none."""
    for key in keys:
        for what, pattern, remedy in _FORMATS:
            if pattern.search(key):
                return f"this is {what} ({key!r:.120}), which is not read: {remedy}"
    return None


def no_pair(keys: Collection[str]) -> str:
    """What to say of a file with tensors of which none is a factor of an update."""
    return (
        f"none of its {len(keys)} tensors is a factor of LoRA (….lora_A.weight, ….lora_B.weight), "
        f"found {some_of(keys, 3)}; if it is a whole model, take its difference from the base: "
        "`lorafold extract BASE MODEL -o OUT`"
    )
